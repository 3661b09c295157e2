r"""Compiles a config's training step for a TPU slice without a TPU: does it fit, how fast can it be, what to change?

    python -m safelm.aot --config=configs/smollm2_1b7.py --topology=v5e:4x4 --config.mesh.fsdp=16 \
        [--slices=N] [--config.a.b=value ...] [--output=FILE.json]
    python -m safelm.aot --config=configs/smollm2_1b7.py --topology=v5e:16x16 --plan
    python -m safelm.aot --config=configs/smollm2_1b7.py --topology=v5e:1x1 --decode=safe_beam \
        [--decode_prompts=8] [--decode_cache=1024] [--decode_weights=int8]

The step is the one that `safelm.train` runs, lowered from shapes and compiled by the TPU's own compiler (`libtpu`, the
extra `tpu`); no data, tokenizer or checkpoint is read. `--plan` searches for the fastest mesh, remat policy and
gradient accumulation that fit, and prints their flags. The default mesh (data -1, fsdp 1) here means parameters split
over all chips of a slice. `--decode` compiles a decoding step instead, with the method's default settings, and compares
the bytes it moves with those it must read.

Exit code 0: it fits; 1: it does not; 2: bad input.
"""

from safelm.aot.command import command

if __name__ == "__main__":
    command()
