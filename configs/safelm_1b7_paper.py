"""The paper's run: a 1.7B model safe from pretraining on (Maini et al. 2025, section 5; card of locuslab/safelm-1.7b).

    python -m safelm.train --config=configs/safelm_1b7_paper.py[:STUDY] --workdir=gs://BUCKET/safelm_1b7 --distributed \
        --config.data.root=gs://BUCKET/tokens --config.tokenizer=gs://BUCKET/smollm2 --config.mesh.fsdp=256

STUDY is a rung of `data_tasks.rates.LADDER` (harm_tagged unless given), or start_20 or start_60: interventions after
20% or 60% of the tokens, raw text before (Sam et al. 2026).

Stated by the paper: SmolLM2-1.7B's architecture, AdamW with learning rate 5e-4 and decay 0.01, bfloat16 mixed
precision, 1024 x 2048 tokens a step, 600B tokens = 286,102 steps. Not stated, so taken from stock LitGPT, which they
trained with: cosine to 4e-5 after 2,000 steps of warmup, betas (0.9, 0.999), untied embeddings, rope theta 130,000. The
rates of the mixture aren't stated either: see `data_tasks/rates.py`.
Hardware: meant for a TPU slice. Time: not yet measured. Result: not yet measured.
Compiled ahead of time: configs/smollm2_1b7.py has the figures of the same sizes with tied embeddings; untied, not yet.
"""

from ml_collections import ConfigDict

from configs import base
from data_tasks.rates import LADDER

VARIANTS = (*LADDER, "start_20", "start_60")


def get_config(study: str = "harm_tagged") -> ConfigDict:
    config = base.smollm2()
    config.total_steps = 286_102
    config.batch_size = 1024
    config.model.update(num_layers=24, d_model=2048, d_ff=8192, num_heads=32, num_kv_heads=32, init_std=0.02)
    config.model.update(tie_embeddings=False, rope_theta=130_000.0)
    config.optimizer.update(schedule="cosine", peak_lr=5e-4, min_lr=4e-5, b1=0.9, b2=0.999)
    if study.startswith("start_"):
        share = float(study.removeprefix("start_")) / 100
        config.data.phases = (base.phase("raw"), base.phase("harm_tagged", start=share))
    else:
        config.data.phases = (base.phase(study),)
    return config.lock()
