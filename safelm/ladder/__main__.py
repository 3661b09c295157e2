r"""The ladder: does a data intervention survive instruction tuning and a benign finetuning, and by how much?

    python -m safelm.ladder --config=configs/ladder.py:embedded --output=runs/ladder [--workers=2] [--config.a.b=value]

The model of every rung is pretrained, instruction-tuned and finetuned on harmless sums, and answers held-out prompts
after each stage (Maini et al. 2025, figures 2 and 4); `safelm.ladder.plan` lists the rungs. Data, models, labels and
the report are kept under --output, and after any stop the same command continues. Every measurement updates
`results.md`, `results.json` and `results.png`, so the table can be read while the study runs; --report only writes
them. --study=NAME is short for --config=configs/ladder.py:NAME: `toxicity` pretrains on real text that is toxic in
part, `scaling` fits a law to four sizes and predicts a fifth. --records=FOLDER keeps a small file for each finished
seed and model, with which another machine does only what lacks. --plan prints what a larger study could tell, from the
variances of the one in --output: with --planned_seeds=3,8 seeds and --planned_prompts=400 harmful prompts.
"""

from safelm.ladder.command import command

if __name__ == "__main__":
    command()
