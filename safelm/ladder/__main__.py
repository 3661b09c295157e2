r"""The ladder: does a data intervention survive instruction tuning and a benign finetuning, and by how much?

    python -m safelm.ladder --config=configs/ladder.py:embedded --output=runs/ladder [--workers=2] [--config.a.b=value]

Every rung is pretrained, instruction-tuned, finetuned on harmless sums, and asked held-out prompts after each stage
(Maini et al. 2025, figures 2 and 4): `safelm.ladder.plan` has the list. Data, models, labels and the report are kept
under --output; after any stop the same command goes on. `results.md`, `results.json` and `results.png` are written anew
after every measurement from all that is done, so a table can be read while it runs; --report only writes them.
"""

from safelm.ladder.command import command

if __name__ == "__main__":
    command()
