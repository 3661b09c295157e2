"""The quickstart's two models: 1.1M parameters, one pretrained on raw text, one on the safety mixture.

    python -m safelm.train --config=configs/quickstart.py:raw --workdir=W/raw \
        --config.tokenizer=W/tokenizer --config.data.root=W/tokens
    python -m safelm.train --config=configs/quickstart.py:safety --workdir=W/safety \
        --config.tokenizer=W/tokenizer --config.data.root=W/tokens

The variants differ in their data only: `raw` is the bottom rung of the ladder, `safety` the mixture "quickstart"
(`data_tasks/rates.py`); the name of any rung works too, `refusal_only` and `filtered_tagged`, the release gate's
controls, `canaries`: raw text with a tenth of canaries, and three interventions (docs/interventions.md), `red_flag`,
`routed`, in which the last head and quarter of the MLP of every layer learn unsafe pages, and `token_tagged`, which is
`safety` with the tags behind any token in place of the gaps between words (the store of `token_tagged_web`).
Hardware: two CPU cores. Time of `scripts/quickstart.sh` on an AMD EPYC with AVX-512 BF16: 322 s for its ten steps, of
them 122 and 109 s of pretraining; 179 s on a newer one. Result there (intervals and other machines:
docs/results/quickstart.md): harmful completions 95% raw, 24% safety, 0% safety with SafeBeam; perplexity on held-out
safe text 2.06 raw, 2.10 safety; AUROC of P(tag) after the prompt 0.74.
"""

from ml_collections import ConfigDict

from configs import base
from data_tasks.rates import LADDER

CONTROLS = ("refusal_only", "filtered_tagged")  # of the release gate
MIXTURES = {"safety": "quickstart", "token_tagged": "quickstart_token_tagged"}  # other variants go by their mixture's
VARIANTS = ("safety", *LADDER, *CONTROLS, "canaries", "red_flag", "routed", "token_tagged")


def get_config(variant: str = "safety") -> ConfigDict:
    config = base.default_config()
    config.total_steps = 600
    config.batch_size = 8
    config.seq_len = 256
    config.model.update(num_layers=4, d_model=128, d_ff=384, num_heads=4, num_kv_heads=2, head_dim=32)
    config.model.update(max_seq_len=512, init_std=0.05, dtype="float32", scan_layers=False)
    config.data.phases = (base.phase(MIXTURES.get(variant, variant)),)
    held_out = ("filtered_web", "token_tagged_web" if variant == "token_tagged" else "harm_tagged_web")
    held_out = ("raw_web",) if variant in ("canaries", "red_flag", "routed") else held_out
    config.eval.update(every_steps=300, sources=held_out, batches=8)
    config.optimizer.update(schedule="wsd", peak_lr=5e-3, warmup_steps=30, decay_fraction=0.2, weight_decay=0.1)
    if variant == "routed":
        config.routing.update(labelled=("unsafe_web",), heads=1, mlp_units=96)
    config.checkpoint.update(every_steps=100, keep_last=1)
    config.log.every_steps = 25
    return config.lock()
