"""SmolLM2-135M's architecture and hyperparameters on the safety mixture, from fresh parameters.

    python -m safelm.train --config=configs/smollm2_135m.py --workdir=gs://BUCKET/smollm2_135m --distributed \
        --config.data.root=gs://BUCKET/tokens --config.tokenizer=gs://BUCKET/smollm2 --config.mesh.fsdp=16

1,048,576 tokens a step (512 x 2048), 2 trillion tokens as released; learning rate 3e-3 with a decay over the last 20%.
Hardware: meant for a TPU slice. Time: not yet measured. Result: not yet measured.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.smollm2()
    config.total_tokens = 2_000_000_000_000
    config.batch_size = 512
    config.model.update(num_layers=30, d_model=576, d_ff=1536, num_heads=9, num_kv_heads=3, init_std=0.041667)
    config.optimizer.update(peak_lr=3e-3, decay_fraction=0.2)
    return config.lock()
