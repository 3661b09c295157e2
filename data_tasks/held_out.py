"""What a corpus without validation files holds out, alike for all tasks that read it.

A document goes by its `split_id`: its own id or, of a rewrite, that of the page it was made from. By the hash of that
id a share of all is held out. In a small corpus two things are added: a harm score of which the hash holds nothing out
has its first page held out, and the last page of a score is never held out (first and last in the order of their
hashes). A page's rewrites follow the page, wherever the corpus of pages has no validation files either: they are held
out with it, even where they are all that their corpus has of a score.
"""

import functools
from collections.abc import Collection, Mapping

from data_tasks.preprocessors import in_validation_split, validation_rank
from data_tasks.readers import MalformedLimit, ReadReport, RowFormat, read_documents
from safelm.documents import file_at, find_named

TRAIN, VALIDATION = "train", "validation"
_SMALL_CORPUS_BYTES = 16 << 20  # thousands of documents, of which a share of 1% is never none


class CorpusSplit:
    """A corpus's files by split and, if those are of "train" alone, which documents are held out of it.

    Args:
      folder: a URL or a path, also of a single file.
      row_format: what all tasks read of its rows, or more, so that they agree.
      fraction: the share that is held out; 0 for none.
      pages: the corpus of the pages that this one's texts were made from.
    """

    def __init__(
        self,
        folder: str,
        row_format: RowFormat,
        fraction: float,
        limit: MalformedLimit | None = None,
        pages: "CorpusSplit | None" = None,
    ):
        if not 0.0 <= fraction < 1.0:
            raise ValueError(f"validation_fraction must be from 0 to below 1, got {fraction}")
        self._folder, self._row_format, self.fraction = folder.rstrip("/"), row_format, fraction
        self._limit, self._pages = limit or MalformedLimit(), pages

    @functools.cached_property
    def files(self) -> Mapping[str, list[str]]:
        """The paths of each split's files."""
        rows = self._row_format
        if self._folder.endswith(rows.suffixes):
            return {TRAIN: [self._folder], VALIDATION: []}
        named = {TRAIN: rows.train_files, VALIDATION: rows.validation_files}
        return {split: find_named(self._folder, names, rows.suffixes) for split, names in named.items()}

    @property
    def is_by_hash(self) -> bool:
        """Whether documents of the files of "train" are held out."""
        return self.fraction > 0 and not self.files[VALIDATION]

    def holds_out(self, split_id: str) -> bool:
        """Whether documents with this id are held out."""
        if not self.is_by_hash:
            return False
        told = self._told.get(split_id)
        return in_validation_split(split_id, self.fraction) if told is None else told

    @functools.cached_property
    def _told(self) -> Mapping[str, bool]:
        """Whether documents are held out, by ids for which it isn't their hash that says so."""
        pages = self._pages
        if pages is None or not pages._decides():
            return tell(self._scores, self.fraction, {}) if self._is_small else {}
        of_pages = pages._told
        if not self._is_small or not pages._is_small:
            return of_pages
        return tell(self._scores, self.fraction, {page: pages.holds_out(page) for page in pages._scores})

    def _decides(self) -> bool:
        """Whether the corpus is there and has no validation files, so that rewrites of its pages follow it."""
        try:
            return self.is_by_hash and bool(self.files[TRAIN])
        except FileNotFoundError:  # no such bucket or repository
            return False

    @functools.cached_property
    def _is_small(self) -> bool:
        total = 0
        for path in self.files[TRAIN]:
            total += file_at(path).bytes
            if total > _SMALL_CORPUS_BYTES:
                return False
        return True

    @functools.cached_property
    def _scores(self) -> Mapping[str, set[int]]:
        """The harm scores of each id's documents."""
        found: dict[str, set[int]] = {}
        for path in self.files[TRAIN]:
            for document in read_documents(path, row_format=self._row_format, limit=self._limit, report=ReadReport()):
                found.setdefault(document.split_id, set()).add(document.harm_score)
        return found


def tell(scores_of: Mapping[str, Collection[int]], fraction: float, pages: Mapping[str, bool]) -> dict[str, bool]:
    """Whether a small corpus's documents are held out, by id; of ids that are missing their hash says so.

    Args:
      scores_of: by id, the harm scores of its documents.
      pages: of known pages, whether they are held out, which stays.
    """
    by_score: dict[int, list[str]] = {}
    for split_id in sorted(scores_of, key=lambda each: (validation_rank(each), each)):
        for score in scores_of[split_id]:
            by_score.setdefault(score, []).append(split_id)
    told = dict(pages)
    for ids in by_score.values():
        told.setdefault(ids[-1], False)
    for _, ids in sorted(by_score.items()):
        if not any(told.get(each, in_validation_split(each, fraction)) for each in ids):
            free = next((each for each in ids if each not in told), None)
            told |= {} if free is None else {free: True}
    return told
