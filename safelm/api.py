"""The functions of `safelm` for texts and corpora: `safelm.score`, `safelm.report_card`, `safelm.load_scorer`."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, overload

from safelm.safety.scorer import BUNDLED, Scorer, Verdict, load_scorer

__all__ = ["load_scorer", "report_card", "score"]

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@overload
def score(texts: str, scorer: str | Scorer = BUNDLED) -> Verdict: ...
@overload
def score(texts: Sequence[str], scorer: str | Scorer = BUNDLED) -> list[Verdict]: ...


def score(texts: str | Sequence[str], scorer: str | Scorer = BUNDLED) -> Verdict | list[Verdict]:
    """Harm scores, 0 (safe) to 5, as `python -m safelm.score` gives them to a corpus.

    Args:
      texts: one text, or several; one without content has score 0, and the scorer isn't asked.
      scorer: by default the small classifier that comes with SafeLM; or such as "classifier:DIR", "hf:ORG/NAME",
        "judge:MODEL" or "endpoint:URL#MODEL" (see `safelm.safety.scorer`); or what `safelm.load_scorer` made of one,
        which saves loading it at every call.

    Returns:
      A verdict for one text, a list of them for several.

    Raises:
      ValueError: there is no such scorer, or it can't score these texts.
      OSError: the scorer's files aren't there, or it can't be reached.
    """
    from safelm.safety.scoring import columns, shard

    loaded = load_scorer(scorer) if isinstance(scorer, str) else scorer
    answers = shard.LoadedScorers([loaded]).ask([texts] if isinstance(texts, str) else list(texts))
    verdicts = [answer.get(loaded.name, columns.EMPTY) for answer in answers]
    return verdicts[0] if isinstance(texts, str) else verdicts


def report_card(
    paths: Paths,
    *,
    slices: Mapping[str, Paths] | None = None,
    queries: str | None = None,
    tokenizer: str | None = None,
    text_column: str = "text",
    id_column: str = "id",
    score_column: str | None = None,
    top: int = 20,
    annotations: str | None = None,
) -> dict[str, Any]:
    """The data safety report card of a corpus: its harm scores, and how often harmful n-grams occur in it.

    Args:
      paths: files, folders or patterns of JSON lines and Parquet, local, gs:// or hf://; cut into slices by harm score.
      slices: more files, each a slice of its own, by name.
      queries: a file of other n-grams; None: the paper's.
      tokenizer: counts this tokenizer's tokens instead of words.
      text_column: holds the text.
      id_column: names documents.
      score_column: holds the harm score; None: see `safelm.documents.harm`.
      top: so many documents with most hits are named.
      annotations: folders of annotations of `paths`, by comma (see `safelm.documents.annotations`).

    Returns:
      What `python -m safelm.report_card` writes to card.json: "slices", "inputs", "queries" and "definitions".

    Raises:
      ValueError: a file is damaged, has no text or holds too many malformed rows; the message names it.
      OSError: a file can't be read, or there is none.
    """
    from safelm.documents.annotations import parse
    from safelm.safety.report_card import card
    from safelm.safety.report_card.corpus import SliceInput
    from safelm.safety.report_card.counting import CountSettings

    named = {name: _patterns(patterns) for name, patterns in (slices or {}).items()}
    inputs = [SliceInput(None, _patterns(paths)), *(SliceInput(name, patterns) for name, patterns in named.items())]
    settings = CountSettings(
        queries, tokenizer, text_column, id_column, score_column, top, annotations=parse(annotations)
    )
    with tempfile.TemporaryDirectory(prefix="safelm_card_") as folder:
        return card.count_and_build(inputs, settings, folder)


def _patterns(paths: Paths) -> tuple[str, ...]:
    return (os.fspath(paths),) if isinstance(paths, str | os.PathLike) else tuple(map(os.fspath, paths))
