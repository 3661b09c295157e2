"""JailbreakBench's evaluation of its behaviors (Chao et al. 2024, arXiv:2404.01318, section 3).

100 behaviors that ask for misuse and 100 benign ones on the same topics, in the model's chat template, temperature 0,
at most 150 new tokens. The judge (Llama 3 70B in the source) says whether an answer fulfils the behavior; benign
behaviors measure over-refusal.
"""

from safelm.evaluate.published import Published

PROTOCOL = Published(
    name="jailbreakbench",
    version=1,
    benchmarks=("jailbreakbench", "jailbreakbench_benign"),
    max_new_tokens=150,
)
