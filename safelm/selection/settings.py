"""What decides a selection, and the forms in which its flags say so."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from safelm.documents import MalformedLimit, harm
from safelm.documents.annotations import AnnotationFolder
from safelm.tags import MAX_SCORE, MIN_SCORE

SCORE, SOURCE, LANGUAGE = "score", "source", "language"
LICENCE_COLUMNS = ("license", "licence", "metadata.license", "metadata.licence")
NONE = "(none)"  # how a missing value is called in a stratum
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_AMOUNT = re.compile(r"(\d[\d_]*(?:\.\d+)?)([KMBT]?)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Mix:
    """Shares of the budget by the values of one column of the strata."""

    column: str
    shares: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class SelectSettings:
    """What decides which rows stay.

    Attributes:
      token_budget: tokens of the selection; None for all that pass.
      tokenizer: whose tokens count; "" for the numbers in `token_column`.
      score_column: the column of harm scores; None for what `safelm.documents.harm` finds.
      min_score, max_score: the harm scores that pass.
      class_thresholds: harm score -> the probability of at least that score from which a row keeps it.
      probabilities_column: a list of six probabilities, of the scores 0 to 5, or what six columns' names begin with.
      strata: columns that share the budget in proportion; SCORE is the harm score, SOURCE the name of an input, if it
        has one, and LANGUAGE the detected language with `detect_language`.
      licence_column: what the data card counts; None for LICENCE_COLUMNS, as far as they are there, "" for nothing.
      matched_safe: tokens of safe rows marked for each token of harmful ones; 0 marks nothing.
      harmful_score: the least harm score of a harmful row there.
      only_matched: whether only marked rows are written.
      exact_duplicates: whether one copy of each text stays.
      near_duplicates: the similarity from which a document is one too many; 0 keeps all.
      min_prompt_words: shorter prompts are not looked for.
      annotations: folders with columns of the rows, which are read and written as the rows' own.
    """

    token_budget: int | None
    tokenizer: str = ""
    token_column: str = ""
    text_column: str = "text"
    score_column: str | None = None
    min_score: int = MIN_SCORE
    max_score: int = MAX_SCORE
    class_thresholds: Mapping[int, float] = dataclasses.field(default_factory=dict)
    probabilities_column: str = "safety_probs"
    strata: tuple[str, ...] = (SCORE,)
    mix: Mix | None = None
    detect_language: bool = False
    licence_column: str | None = None
    matched_safe: float = 0.0
    harmful_score: int = 3
    only_matched: bool = False
    mark_column: str = "matched"
    exact_duplicates: bool = False
    near_duplicates: float = 0.0
    min_prompt_words: int = 6
    seed: int = 0
    index_only: bool = False
    limit: MalformedLimit = dataclasses.field(default_factory=MalformedLimit)
    annotations: tuple[AnnotationFolder, ...] = ()

    def __post_init__(self) -> None:
        if self.token_budget is not None and self.token_budget < 1:
            raise ValueError(f"--token_budget={self.token_budget}: must be at least 1")
        if bool(self.tokenizer) == bool(self.token_column):
            raise ValueError("--tokenizer or --token_column: want one of them, to count tokens by")
        for name in ("min_score", "max_score", "harmful_score"):
            _check_score(f"--{name}", getattr(self, name))
        if self.min_score > self.max_score:
            raise ValueError(f"--min_score={self.min_score}: above --max_score={self.max_score}")
        for score, threshold in self.class_thresholds.items():
            _check_score("--class_threshold", score)
            if not 0 <= threshold <= 1:
                raise ValueError(f"--class_threshold={score}={threshold}: a probability lies from 0 to 1")
        if not 0 <= self.near_duplicates <= 1:
            raise ValueError(f"--near_duplicates={self.near_duplicates}: a similarity lies above 0 and up to 1")
        is_ratio = 0 <= self.matched_safe < math.inf
        if not is_ratio or (self.only_matched and not self.matched_safe):
            raise ValueError(f"--matched_safe={self.matched_safe:g}: want more than 0 tokens for each harmful one")
        if self.min_prompt_words < 1:
            raise ValueError(f"--min_prompt_words={self.min_prompt_words}: must be at least 1")
        self._check_strata()

    def _check_strata(self) -> None:
        if len(set(self.strata)) < len(self.strata):
            raise ValueError(f"--strata={','.join(self.strata)}: a column is named twice")
        if self.detect_language and LANGUAGE not in self.strata:
            raise ValueError(f"--detect_language: its place is the stratum {LANGUAGE}: add it to --strata")
        if self.mix and self.mix.column not in self.strata:
            raise ValueError(f"--mix={self.mix.column}:...: want a column of --strata={','.join(self.strata)}")

    @property
    def needs_scores(self) -> bool:
        """Whether a row without a harm score can't be selected."""
        is_filtered = (self.min_score, self.max_score) != (MIN_SCORE, MAX_SCORE)
        return SCORE in self.strata or is_filtered or bool(self.class_thresholds or self.matched_safe)

    def stratum_columns(self, source: str) -> dict[str, str]:
        """The strata that are read from a column of the files of an input called `source` ("" has no name)."""
        own = {SCORE: True, SOURCE: bool(source), LANGUAGE: self.detect_language}
        return {name: name for name in self.strata if not own.get(name, False)}

    def columns(self, source: str) -> list[str]:
        """The columns to read beside the text, of which a file may lack some."""
        found = [*harm.score_columns(self.score_column), *harm.TEXT_COLUMNS, *self.stratum_columns(source)]
        found += self.licence_columns
        found += [self.token_column] if self.token_column else []
        return found + ([self.probabilities_column, *self.probability_columns] if self.class_thresholds else [])

    @property
    def licence_columns(self) -> Sequence[str]:
        """The columns of licences, of which the first that has a value counts."""
        if self.licence_column is None:
            return LICENCE_COLUMNS
        return (self.licence_column,) if self.licence_column else ()

    @property
    def probability_columns(self) -> list[str]:
        """The six columns that may stand for the list of probabilities, as annotations have them."""
        return [f"{self.probabilities_column}_{score}" for score in range(MIN_SCORE, MAX_SCORE + 1)]

    def required(self, path: str, source: str) -> dict[str, Sequence[str]]:
        """The columns that a file must have: name -> any of these."""
        names = [*self.stratum_columns(source), *([self.token_column] if self.token_column else [])]
        names += [self.licence_column] if self.licence_column else []
        found: dict[str, Sequence[str]] = {name: (name,) for name in names}
        if self.class_thresholds:
            found[self.probabilities_column] = (self.probabilities_column, *self.probability_columns)
        return found

    def to_json(self) -> dict[str, Any]:
        """The settings for manifests, by the flag's name; tokenizer and annotations are left to their hashes."""
        values = dataclasses.asdict(self)
        del values["limit"], values["tokenizer"], values["annotations"]
        values["class_thresholds"] = {str(score): value for score, value in sorted(self.class_thresholds.items())}
        return values | {"strata": list(self.strata)}


def parse_tokens(value: str) -> int:
    """A number of tokens: `1500000`, `1_500_000`, `1.5M`, `2B`. Raises ValueError for anything else."""
    found = _AMOUNT.fullmatch(value.strip())
    amount = float(found[1].replace("_", "")) * _UNITS[found[2].upper()] if found else 0.0
    if not found or amount != int(amount):
        raise ValueError(f"--token_budget={value}: want a whole number of tokens, such as 1500000, 1.5M or 2B")
    return int(found[1].replace("_", "")) if not found[2] and "." not in found[1] else round(amount)


def parse_thresholds(value: str) -> dict[int, float]:
    """Probabilities by score from `3=0.5,5=0.95`. Raises ValueError naming what is wrong."""
    found: dict[int, float] = {}
    for pair in filter(None, value.split(",")):
        score, equals, threshold = pair.partition("=")
        try:
            if not equals or int(score) in found:
                raise ValueError
            found[int(score)] = float(threshold)
        except ValueError:
            raise ValueError(f"--class_threshold={pair}: want SCORE=PROBABILITY,... with each score once") from None
    return found


def parse_mix(value: str) -> Mix | None:
    """Shares from `source:web=0.7,wiki=0.3`; None for "". Raises ValueError where they don't add up to 1."""
    if not value:
        return None
    column, colon, pairs = value.partition(":")
    shares: dict[str, float] = {}
    for pair in filter(None, pairs.split(",")):
        name, equals, share = pair.rpartition("=")
        try:
            if not equals or name in shares or not float(share) > 0:
                raise ValueError
            shares[name] = float(share)
        except ValueError:
            raise ValueError(
                f"--mix={value}: {pair!r}: want VALUE=SHARE with a share above 0, each value once"
            ) from None
    if not colon or not column or not shares:
        raise ValueError(f"--mix={value}: want COLUMN:VALUE=SHARE,...")
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(f"--mix={value}: the shares add up to {sum(shares.values()):g}, not 1")
    return Mix(column, shares)


def _check_score(flag: str, score: int) -> None:
    if not MIN_SCORE <= score <= MAX_SCORE:
        raise ValueError(f"{flag}={score}: a harm score lies from {MIN_SCORE} to {MAX_SCORE}")
