"""The paper's released classifier: gte-large-en-v1.5 (434M), all parameters, lambda 100 (Maini et al. 2025, C.1).

    python -m safelm.train_classifier --config=configs/classifier_gte_large.py --output=classifier \
        --config.backbone.source=FOLDER --data=harm_score:scored.jsonl

As `classifier_gte_base.py`, with Alibaba-NLP/gte-large-en-v1.5.
Published: macro-F1 .453, recall at 1 .885, recall at 3 .656. Hardware, time and result of ours: not yet measured.
"""

from ml_collections import ConfigDict

from configs import classifier_gte_base


def get_config() -> ConfigDict:
    config = classifier_gte_base.get_config()
    with config.unlocked():
        config.harm_weight = 100.0
        config.tuning.update(epochs=5, learning_rate=1e-6)
    return config.lock()
