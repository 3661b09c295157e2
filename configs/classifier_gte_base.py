"""The paper's small classifier: gte-base-en-v1.5 (137M), all parameters (Maini et al. 2025, 3.1 and C.1).

    python -m safelm.train_classifier --config=configs/classifier_gte_base.py --output=classifier \
        --config.backbone.source=FOLDER --data=harm_score:scored.jsonl

FOLDER is the Hugging Face folder of Alibaba-NLP/gte-base-en-v1.5; `scored.jsonl` holds `text` and `harm_score`, such as
an LLM judge gives (`python -m safelm.score --scorers=judge:... --output=S`, then `--data='harm_score:S/score=*/*'`).
The paper took 10,000 FineWeb documents (bootstrapped to 600,000) and 4chan, ToxiGen and Jigsaw texts. Its lambda for
small models isn't stated: 1 here.
Published: macro-F1 .411, recall at 1 .775, recall at 3 .682. Hardware, time and result of ours: not yet measured.
"""

from ml_collections import ConfigDict

from safelm.safety.classifier.recipe_config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.backbone.update(pooling="cls", max_tokens=512, normalize=False, dtype="bfloat16")
    config.head.update(solver="adam", epochs=1, learning_rate=1e-3, batch_size=32)
    config.tuning.update(epochs=50, learning_rate=1e-5, batch_tokens=4096, weight_decay=1e-3, selection="recall_1")
    return config.lock()
