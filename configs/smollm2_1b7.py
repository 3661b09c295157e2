"""SmolLM2-1.7B's architecture and hyperparameters on the safety mixture, from fresh parameters.

    python -m safelm.train --config=configs/smollm2_1b7.py --workdir=gs://BUCKET/smollm2_1b7 --distributed \
        --config.data.root=gs://BUCKET/tokens --config.tokenizer=gs://BUCKET/smollm2 \
        --config.mesh.fsdp=256 --config.model.remat=dots --config.grad_accum_steps=2

2,097,152 tokens a step (1024 x 2048), 11 trillion tokens as released; learning rate 5e-4 with a decay over the last
10%. Hardware: meant for a TPU slice. Time: not yet measured. Result: not yet measured.

Compiled ahead of time, no TPU (`python -m safelm.aot --config=configs/smollm2_1b7.py --topology=...`, jax 0.10.2,
remat dots, 2 or 4 rows a chip in a micro-batch; no measurements: the roofline, and the compiler's cycles):

    v5e:16x16  --config.mesh.data=16 --config.mesh.fsdp=16 --config.model.remat=dots --config.grad_accum_steps=1
               libtpu 0.0.42.1: 14.5 of 15.75 GiB a chip; 0.645 s a step at best (MFU 74%), 0.895 s by cycles (53%);
               collectives 0.125 s, 0.066 s of them not hidden; fsdp 256: 12.5 GiB, 0.921 s by cycles (52%)
    v5e:8x8    --config.mesh.data=1 --config.mesh.fsdp=64 --config.model.remat=dots --config.grad_accum_steps=4
               --config.compiler_options="('xla_tpu_scoped_vmem_limit_kib=65536',)"
               libtpu 0.0.42.1: 13.7 GiB; 2.72 s at best (70%), 3.71 s by cycles (52%; 49% without the option);
               0.42 s not hidden
    v5e:4x4    --config.mesh.data=1 --config.mesh.fsdp=16 --config.model.remat=dots --config.grad_accum_steps=32
               libtpu 0.0.42.1: 9.7 of 15.75 GiB a chip; 9.48 s a step at best (MFU 80%), 14.2 s by cycles (54%);
               collectives 3.25 s, 0.07 s of them not hidden; 15.0 s by cycles with the option of 8x8
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
