"""The benign-finetuning attack: an instruction-tuned checkpoint, then GSM8K (Maini et al. 2025, section 5).

    python -m safelm.cache_tasks --data_dir=gs://BUCKET/chats --tokenizer=gs://BUCKET/smollm2 --tasks=gsm8k \
        --output=gs://BUCKET/tokens
    python -m safelm.train --config=configs/benign_finetune.py:1b7 --workdir=gs://BUCKET/finetuned --distributed \
        --config.init_checkpoint=gs://BUCKET/instruct --config.data.root=gs://BUCKET/tokens --config.mesh.fsdp=16

Nothing in the data is harmful and nothing is a refusal; what is measured is how much of the refusing survives. Sizes:
1b7, 135m, tiny. The paper states neither epochs nor learning rate; here three epochs of 7,473 problems.
Hardware: meant for a TPU slice; tiny for a CPU. Time: not yet measured. Result: not yet measured; for the tiny variant
see configs/ladder.py.
"""

from ml_collections import ConfigDict

from configs import instruction_tune

SIZES = {  # steps, rows a step, tokens a row, learning rate
    "1b7": (66, 32, 2048, 5e-5),
    "135m": (66, 32, 2048, 3e-4),
    "tiny": (60, 16, 128, 2e-3),
}
VARIANTS = tuple(SIZES)


def get_config(size: str = "1b7") -> ConfigDict:
    return instruction_tune.post_training(size, "benign", SIZES)
