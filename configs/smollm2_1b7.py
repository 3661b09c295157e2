"""SmolLM2-1.7B's architecture and hyperparameters on the safety mixture, from fresh parameters.

    python -m safelm.train --config=configs/smollm2_1b7.py --workdir=gs://BUCKET/smollm2_1b7 --distributed \
        --config.data.root=gs://BUCKET/tokens --config.tokenizer=gs://BUCKET/smollm2 \
        --config.mesh.fsdp=256 --config.model.remat=dots --config.grad_accum_steps=2

2,097,152 tokens a step (1024 x 2048), 11 trillion tokens as released; learning rate 5e-4 with a decay over the last
10%. Hardware: meant for a TPU slice. Time: not yet measured. Result: not yet measured.

Compiled ahead of time, no TPU (`python -m safelm.aot --config=configs/smollm2_1b7.py --topology=...`, jax 0.10.2,
remat dots, 2 rows a chip in a micro-batch; estimates, not measurements: the roofline, and by the compiler's cycles):

    v5e:16x16  --config.mesh.fsdp=256 --config.mesh.data=1 --config.model.remat=dots --config.grad_accum_steps=2
               libtpu 0.0.42.1: 7.0 of 15.75 GiB a chip; 0.645 s a step at best (MFU 74%), 1.001 s by cycles (48%);
               collectives 0.154 s, 0.106 s of them not hidden: gradients are still all-reduced, not scattered
    v5e:4x4    --config.mesh.fsdp=16 --config.mesh.data=1 --config.model.remat=dots --config.grad_accum_steps=32
               libtpu 0.0.42.1: 9.9 of 15.75 GiB a chip; 9.12 s a step at best (MFU 84%), 15.3 s by cycles (50%);
               collectives 3.25 s, 0.07 s of them not hidden
               remat full, 16 micro-batches of 4 rows (libtpu 0.0.52, kernels not yet gathered before products):
               4.4 GiB, 13.1 s (58%), 27.6 s by cycles
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
