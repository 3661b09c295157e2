"""Instruction tuning on UltraChat-200k, WildGuardMix and WildJailbreak (Maini et al. 2025, section 5).

    python -m safelm.cache_tasks --data_dir=gs://BUCKET/chats --tokenizer=gs://BUCKET/smollm2 \
        --tasks=ultrachat,wildguardmix,wildjailbreak,harm_tagged_chat --output=gs://BUCKET/tokens
    python -m safelm.train --config=configs/instruction_tune.py:1b7_tagged --workdir=gs://BUCKET/chat --distributed \
        --config.init_checkpoint=gs://BUCKET/safelm_1b7 --config.data.root=gs://BUCKET/tokens --config.mesh.fsdp=16

The variant is SIZE, SIZE_tagged or SIZE_refusal. SIZE: 1b7, 135m or tiny (a model of the synthetic web). `_tagged`: for
models that had the harm tag in pretraining; a tenth of the tokens are then WildGuardMix's harmful answers with the tag
in them. `_refusal`: every answer begins with a refusal token (docs/interventions.md), which the model's vocabulary must
have.
Loss on the assistant's tokens alone; whole conversations are packed into rows. The paper states neither steps nor
learning rate: 1b7 and 135m get 1.05B tokens here, at a tenth of pretraining's peak rate. Model and tokenizer are the
checkpoint's.
Hardware: meant for a TPU slice; tiny for a CPU. Time: not yet measured. Result: not yet measured; what becomes of such
stages on the synthetic web is in configs/ladder.py.
"""

from ml_collections import ConfigDict

from configs import base

SIZES = {  # steps, rows a step, tokens a row, learning rate
    "1b7": (2000, 256, 2048, 5e-5),
    "135m": (2000, 256, 2048, 3e-4),
    "tiny": (150, 16, 128, 2e-3),
}
MIXTURES = {"": "instruction", "_tagged": "instruction_tagged", "_refusal": "instruction_refusal"}  # by suffix
VARIANTS = tuple(f"{size}{suffix}" for suffix in MIXTURES for size in SIZES)


def get_config(variant: str = "1b7") -> ConfigDict:
    size, _, suffix = variant.partition("_")
    return post_training(size, MIXTURES[suffix and f"_{suffix}"])


def post_training(size: str, mixture: str, sizes: dict[str, tuple[int, int, int, float]] = SIZES) -> ConfigDict:
    """A stage after pretraining on one of the mixtures of conversations."""
    config = base.default_config()
    config.total_steps, config.batch_size, config.seq_len, peak_lr = sizes[size]
    config.init_checkpoint = "pretrained"  # give --config.init_checkpoint=DIR
    config.data.root = "tokens"
    config.data.packing = "fit"
    config.data.phases = (base.phase(mixture),)
    config.model.update(dtype="float32" if size == "tiny" else "bfloat16", remat="none" if size == "tiny" else "full")
    config.optimizer.update(schedule="linear", peak_lr=peak_lr, warmup_steps=config.total_steps // 20)
    config.checkpoint.update(every_steps=500, keep_last=1)
    return config.lock()
