"""How many planted prompts decontamination finds in real pages, and how many pages it takes for leaks that are none.

    python scripts/studies/decontamination.py --pages='web/*.jsonl.gz' --decontaminate advbench:advbench.csv

Prompts are drawn at random among those that are long enough, disguised (case, punctuation, white space) and put between
two words of a page, one a page. False alarms are pages as they were that hold a prompt by our rule; each was on the web
before, so some may be true. Prints ids and counts, never texts.
"""

import random
import time
from collections.abc import Mapping

from safelm import cli, documents
from safelm.evaluate.suites import prompt_sets
from safelm.report.table import Cell, Table, count, words
from safelm.selection.contamination import Decontaminator, PromptIndex, PromptSet, index_prompts, normal_words

_BETWEEN = (" ", "  ", "\n", ", ", " - ", "; ", ". ", '" ', " / ", "\u00a0")


def main() -> None:
    """Prints a table by the least words of a prompt."""
    parser = cli.parser("scripts.studies.decontamination", __doc__)
    parser.add_argument("--pages", nargs="+", required=True, help="files of pages with a column text")
    parser.add_argument("--decontaminate", nargs="+", required=True, metavar="NAME:FILE", help="as in safelm.select")
    parser.add_argument("--planted", type=int, default=100, help="(default %(default)s)")
    parser.add_argument("--min_prompt_words", type=int, nargs="+", default=[4, 6, 8, 13], help="(default 4 6 8 13)")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    flags = parser.parse_args()
    pages = [row["text"] for path in documents.list_files(flags.pages) for _, row in documents.read_rows(path)]
    read = prompt_sets.read_prompt_sets(flags.decontaminate, "--decontaminate")
    sets = [PromptSet(suite, tuple(ids), tuple(texts)) for suite, (ids, texts) in read.items()]
    rows = [_row(pages, sets, least, flags.planted, flags.seed) for least in flags.min_prompt_words]
    print(
        f"{len(pages):,} pages, {sum(map(len, pages)) / len(pages):,.0f} characters each; "
        f"{sum(len(one.ids) for one in sets):,} prompts of {len(sets)} suites\n"
    )
    heads = ["least words", "too short, %", "planted", "found", "pages flagged", "of suites", "pages/s"]
    print(Table("", heads, rows).markdown())


def _row(pages: list[str], sets: list[PromptSet], least: int, planted: int, seed: int) -> list[Cell]:
    index = index_prompts(sets, least)
    decontaminator, rng = Decontaminator(index), random.Random(seed)
    known = {(one.suite, prompt): text for one in sets for prompt, text in zip(one.ids, one.texts, strict=True)}
    chosen = rng.sample(range(len(index.prompts)), planted)
    with_leaks = [_plant(rng, rng.choice(pages), known[index.prompts[prompt]]) for prompt in chosen]
    pairs = zip(chosen, decontaminator.find(with_leaks), strict=True)
    found = sum(_is_found(index.prompts[prompt], prompts, index, known) for prompt, prompts in pairs)
    started = time.perf_counter()
    flagged = [prompts for prompts in decontaminator.find(pages) if prompts]
    rate = len(pages) / (time.perf_counter() - started)
    suites = sorted({index.prompts[prompt][0] for prompts in flagged for prompt in prompts})
    too_short = sum(one["too_short"] for one in index.suites.values()) / len(known)
    cells = [words(f"{100 * too_short:.1f}"), *map(count, (planted, found, len(flagged)))]
    return [count(least), *cells, words(", ".join(suites) or "-"), count(round(rate))]


def _is_found(
    planted: tuple[str, str], prompts: list[int], index: PromptIndex, known: Mapping[tuple[str, str], str]
) -> bool:
    """Whether the prompt itself, or one of the same words in another suite, is among those found."""
    wanted = normal_words(known[planted])
    return any(normal_words(known[index.prompts[prompt]]) == wanted for prompt in prompts)


def _plant(rng: random.Random, page: str, prompt: str) -> str:
    cases = (str.upper, str.lower, str.title)
    leak = "".join(rng.choice(cases)(word) + rng.choice(_BETWEEN) for word in prompt.split())
    spaces = [at for at, character in enumerate(page) if character == " "] or [0]
    at = rng.choice(spaces)
    return f"{page[:at]} {leak} {page[at:]}"


if __name__ == "__main__":
    main()
