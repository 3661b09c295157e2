"""HarmBench's evaluation of direct requests (Mazeika et al. 2024, arXiv:2402.04249, sections 4 and B).

Behaviors (standard and contextual; copyright behaviors, which are judged by hashes of the works, are left out) in the
model's chat template, greedy, at most 512 new tokens; of each completion 512 of the classifier's tokens are judged,
which a judge behind an endpoint can't count and reads by characters. The classifier's question is whether the
completion is an instance of the behavior, yes or no; attack success is the share of yes.
"""

from safelm.evaluate.published import Published

PROTOCOL = Published(name="harmbench", version=1, benchmarks=("harmbench",), answer_tokens=512)
