r"""Compiles a config's training step for a TPU slice, without a TPU: does it fit, how fast can it be, what to change.

    python -m safelm.aot --config=configs/smollm2_1b7.py --topology=v5e:4x4 --config.mesh.fsdp=16 \
        [--slices=N] [--config.a.b=value ...] [--output=FILE.json]
    python -m safelm.aot --config=configs/smollm2_1b7.py --topology=v5e:16x16 --plan
    python -m safelm.aot --config=configs/smollm2_1b7.py --topology=v5e:1x1 --decode=safe_beam \
        [--decode_prompts=8] [--decode_cache=1024] [--decode_weights=int8]

It is the step that `safelm.train` runs, lowered from shapes and compiled by the TPU's own compiler (`libtpu`, the extra
`tpu`); no data, no tokenizer and no checkpoint is read. `--plan` looks for the mesh, remat policy and gradient
accumulation with the best estimate that fits, and prints the flags. A mesh left as in the defaults (data -1, fsdp 1)
is taken to mean: parameters split over all chips of a slice. `--decode` compiles a step of decoding instead, with the
method's default settings, and sets the bytes that it moves against those that it must read.

Exit code 0: it fits; 1: it does not; 2: bad input.
"""

from safelm.aot.command import command

if __name__ == "__main__":
    command()
