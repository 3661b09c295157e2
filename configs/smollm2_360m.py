"""SmolLM2-360M's architecture and hyperparameters on the safety mixture, from fresh parameters.

    python -m safelm.train --config=configs/smollm2_360m.py --workdir=gs://BUCKET/smollm2_360m --distributed \
        --config.data.root=gs://BUCKET/tokens --config.tokenizer=gs://BUCKET/smollm2 --config.mesh.fsdp=16

1,572,864 tokens a step (768 x 2048), 4 trillion tokens as released; learning rate 3e-3 with a decay over the last 20%.
Hardware: meant for a TPU slice. Time: not yet measured. Result: not yet measured.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.smollm2()
    config.total_tokens = 4_000_000_000_000
    config.batch_size = 768
    config.model.update(num_layers=32, d_model=960, d_ff=2560, num_heads=15, num_kv_heads=5, init_std=0.03227)
    config.optimizer.update(peak_lr=3e-3, decay_fraction=0.2)
    return config.lock()
