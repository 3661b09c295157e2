"""Where in a word P(tag) is high: at the ends of words, where the tag stands in training, or within them?

    python scripts/studies/measure_tag_positions.py --checkpoint=W/safety \
        --texts='W/corpus/raw_web/validation-*.jsonl.gz'

Reads documents with a harm score (see `safelm.documents.harm`), harmful (4 and 5) and safe (0), and asks the
model at every position: P(tag), and P(gap), the probability that whitespace or the tag comes next, so that a word ends
here. A position is a word's end if whitespace follows in the text. Prints a line for word ends and one for the rest:
P(tag) in harmful and safe documents, the AUROC between their positions of P(tag) and of P(tag) / P(gap), and the share
with P(gap) >= 1/2.

The quickstart's safety model (1.05M parameters), 500 validation documents: mean P(tag) in harmful text .0335 at word
ends and .000337 within words; in safe text .000821 and .0000444. So within a word of harmful text P(tag) is below that
at word ends of safe text. AUROC .960 and .761. P(gap) is at least 1/2 at 99.9% of word ends, 0.6% of other positions.
"""

import json
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from safelm import cli, documents
from safelm.checkpoints import checkpoint
from safelm.models import decoder as model
from safelm.stats.intervals import auroc
from safelm.text.prompting import text_prompt


def scored_texts(pattern: str, count: int) -> Iterator[tuple[str, bool]]:
    """Up to `count` harmful and as many safe texts."""
    left = {True: count, False: count}
    for path in documents.list_files(pattern):
        for _, row in documents.read_rows(path):
            score = documents.harm_score(row, path).value
            is_harmful = score is not None and score >= 4
            if (is_harmful or score == 0) and left[is_harmful]:
                left[is_harmful] -= 1
                yield row["text"], is_harmful


def main() -> None:
    parser = cli.parser("scripts.studies.measure_tag_positions", __doc__)
    parser.add_argument("--checkpoint", required=True, metavar=cli.CHECKPOINT)
    parser.add_argument("--texts", required=True, help="files .jsonl.gz, may hold *")
    parser.add_argument("--documents", type=int, default=200, help="harmful and safe each")
    parser.add_argument("--tokens", type=int, default=128, help="of each document")
    flags = parser.parse_args()
    config, params, tokenizer = checkpoint.load_for_inference(cli.checkpoint(flags.checkpoint)[1])
    gap_ids = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i)[:1].isspace()]
    is_gap_V = np.isin(np.arange(config.padded_vocab_size), [*gap_ids, tokenizer.harm_tag_id])

    @jax.jit
    def look(params, tokens_BT):
        logits_BTV = model.apply(config, params, tokens_BT)
        probs_BTV = jax.nn.softmax(logits_BTV, axis=-1)
        return probs_BTV[..., tokenizer.harm_tag_id], (probs_BTV * is_gap_V).sum(-1)

    first = len(tokenizer.conventions.begin_ids)
    found = []  # harmful, word end, P(tag), P(gap)
    for text, is_harmful in scored_texts(flags.texts, flags.documents):
        tokens = text_prompt(tokenizer, text)[: flags.tokens]
        row = jnp.array([tokens + [0] * (flags.tokens - len(tokens))])
        tag_T, gap_T = (np.asarray(each)[0, first : len(tokens) - 1] for each in look(params, row))
        is_end_T = is_gap_V[tokens[first + 1 :]]
        found += zip([is_harmful] * len(tag_T), is_end_T, tag_T, gap_T, strict=True)
    harmful, ends, tag, gap = (np.array(column) for column in zip(*found, strict=True))
    for name, chosen in (("word ends", ends), ("within words", ~ends)):
        line = {"positions": name, "count": int(chosen.sum())}
        for kind, part in (("harmful", harmful), ("safe", ~harmful)):
            line[f"mean P(tag), {kind}"] = float(f"{tag[chosen & part].mean():.3g}")
            line[f"median P(tag), {kind}"] = float(f"{np.median(tag[chosen & part]):.3g}")
        for shown, value in (("P(tag)", tag), ("P(tag) / P(gap)", tag / gap)):
            line[f"AUROC of {shown}"] = round(auroc(value[chosen & harmful], value[chosen & ~harmful]).value, 3)
        line["P(gap) >= 1/2"] = round(float((gap[chosen] >= 0.5).mean()), 3)
        print(json.dumps(line))


if __name__ == "__main__":
    main()
