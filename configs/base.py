"""What the configs of this folder share. See `safelm.train.defaults.default_config` for every field and its meaning."""

from ml_collections import ConfigDict

from data_tasks.rates import rates
from safelm.train.defaults import default_config


def phase(rung: str, start: float = 0.0) -> dict:
    """The mixture of one rung of the ablation ladder from a fraction of the run on."""
    return {"start": start, "rates": rates(rung)}


def smollm2() -> ConfigDict:
    """What SmolLM2's three sizes have in common (huggingface/smollm, text/pretraining/smollm2).

    Vocabulary 49,152 and the harm tag; AdamW (0.9, 0.95), decay 0.01, clip 1.0, 2,000 steps of warmup, then constant,
    at the end a linear decay to 0; bfloat16 computation, float32 parameters and gradient accumulation. The data is
    the ladder's top rung, the paper's mixture. Decays can branch at every 25,000th step: it is kept.
    """
    config = default_config()
    config.tokenizer = "smollm2"  # a folder or file of SmolLM2's tokenizer: give --config.tokenizer=PATH
    config.seq_len = 2048
    config.model.update(vocab_size=49_153, max_seq_len=2048, rope_theta=10_000.0, rms_norm_eps=1e-5, head_dim=64)
    config.model.update(tie_embeddings=True, dtype="bfloat16", param_dtype="float32", remat="full")
    config.data.root = "tokens"
    config.data.phases = (phase("harm_tagged"),)
    config.eval.update(every_steps=1000, sources=("filtered_web", "harm_tagged_web"), batches=16)
    config.optimizer.update(schedule="wsd", min_lr=0.0, warmup_steps=2000, weight_decay=0.01, clip_norm=1.0)
    config.optimizer.update(b1=0.9, b2=0.95, eps=1e-8)
    config.checkpoint.update(every_steps=1000, keep_last=2, keep_every=25_000)
    return config
