"""SmolLM2-1.7B's architecture and hyperparameters on the safety mixture, from fresh parameters.

    python -m safelm.train --config=configs/smollm2_1b7.py --workdir=gs://BUCKET/smollm2_1b7 --distributed \
        --config.data.root=gs://BUCKET/tokens --config.tokenizer=gs://BUCKET/smollm2 --config.mesh.fsdp=256

2,097,152 tokens a step (1024 x 2048), 11 trillion tokens as released; learning rate 5e-4 with a decay over the last
10%. Hardware: meant for a TPU slice. Time: not yet measured. Result: not yet measured.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.smollm2()
    config.total_tokens = 11_000_000_000_000
    config.batch_size = 1024
    config.model.update(num_layers=24, d_model=2048, d_ff=8192, num_heads=32, num_kv_heads=32, init_std=0.02)
    config.optimizer.update(peak_lr=5e-4, decay_fraction=0.1)
    return config.lock()
