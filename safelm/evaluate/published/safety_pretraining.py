"""The chat evaluation of Safety Pretraining (Maini et al. 2025, arXiv:2504.16980, section 6 and appendix C.5).

Prompts of HarmBench, TDC 2023, JailbreakBench and AdvBench in the model's chat template, attack success by a yes-or-no
judge of the kind of HarmBench's classifier; 300 harmless prompts of PHTest, in the paper's five classes. The paper does
not say how long answers may be: 512 tokens here, greedy; SafeBeam may stand in its place.
"""

from safelm.evaluate.published import Published

PROTOCOL = Published(
    name="safety_pretraining",
    version=1,
    benchmarks=("harmbench", "tdc", "jailbreakbench", "advbench", "phtest"),
)
