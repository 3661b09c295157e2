"""The smallest run that has every part: to try a change on a laptop in seconds.

    python -m safelm.train --config=configs/tiny_cpu.py --workdir=/tmp/tiny \
        --config.tokenizer=W/tokenizer --config.data.root=W/tokens

W as made by `scripts/quickstart.sh`. Hardware: one CPU core. Time: not yet measured. Result: not yet measured.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.default_config()
    config.total_steps = 20
    config.batch_size = 4
    config.seq_len = 64
    config.grad_accum_steps = 2
    config.model.update(num_layers=2, d_model=32, d_ff=64, num_heads=2, num_kv_heads=1, head_dim=16, dtype="float32")
    config.data.phases = (base.phase("raw"), base.phase("harm_tagged", start=0.2))
    config.eval.update(every_steps=10, sources=("filtered_web",), batches=2)
    config.optimizer.update(schedule="cosine", warmup_steps=2)
    config.loss.z_loss = 1e-4
    config.checkpoint.every_steps = 10
    config.log.every_steps = 5
    return config.lock()
