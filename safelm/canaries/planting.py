"""Plants canaries: a corpus with exact counts, and the key, which says what was planted."""

import dataclasses
import gzip
import io
import json
import pathlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

from safelm.canaries.kinds import KINDS, NAMES, Canary, draws, make_canaries, planted_carrier, planted_text
from safelm.documents import MANIFEST_NAME, WRITTEN_BY
from safelm.io import records
from safelm.io.files import file_sha256, write_whole

COMMAND = "safelm.canaries"
VERSION = 1
CORPUS, KEY_NAME = "canaries/train-00000.jsonl.gz", "canaries.json"
_MAX_DOCUMENTS = 2_000_000


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that decides what is planted.

    Attributes:
      doses: numbers of documents a canary; 0 is planted nowhere, and tells what is measured without planting.
      per_dose: canaries of each kind with each dose.
    """

    seed: int = 0
    kinds: tuple[str, ...] = KINDS
    doses: tuple[int, ...] = (0, 4, 16, 64)
    per_dose: int = 8

    def __post_init__(self) -> None:
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise ValueError(f"--kinds={','.join(self.kinds)}: {unknown[0]!r} is none of {', '.join(KINDS)}")
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"--kinds={','.join(self.kinds)}: want different ones of {', '.join(KINDS)}")
        if not self.doses or list(self.doses) != sorted(set(self.doses)) or self.doses[0] < 0:
            raise ValueError(f"--doses={','.join(map(str, self.doses))}: want ascending whole numbers of at least 0")
        if self.per_dose < 1:
            raise ValueError(f"--per_dose={self.per_dose}: must be at least 1")
        for kind in self.kinds:
            if (wanted := self.per_dose * len(self.doses)) > NAMES[kind] // 2:
                raise ValueError(f"--per_dose: {wanted} {kind}s, at most {NAMES[kind] // 2} have different names")
        if not 0 < (total := len(self.kinds) * self.per_dose * sum(self.doses)) <= _MAX_DOCUMENTS:
            raise ValueError(f"--doses: {total} documents, must be 1 to {_MAX_DOCUMENTS}")


@dataclasses.dataclass(frozen=True)
class Key:
    """What was planted: the canaries, and the canary of every document of the corpus in its order."""

    folder: pathlib.Path
    recipe: Mapping[str, Any]
    canaries: Mapping[str, Canary]
    documents: tuple[str, ...]
    sha256: str  # of the corpus's file

    def texts(self) -> list[str]:
        """The corpus's texts. Raises ValueError for another file than was written."""
        path = self.folder / CORPUS
        if file_sha256(str(path)) != self.sha256:
            raise ValueError(f"{path}: is not the file that {KEY_NAME} describes: plant anew in another folder")
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return [json.loads(line)["text"] for line in file]


def plant(output: str, recipe: Recipe) -> Key:
    """Writes the corpus, the key, and the manifest last; the same recipe gives the same bytes.

    Raises ValueError if the folder holds what another recipe made.
    """
    folder = pathlib.Path(output)
    wanted = json.loads(json.dumps({"version": VERSION, **dataclasses.asdict(recipe)}))
    if (folder / MANIFEST_NAME).exists():
        if (key := read_key(output)).recipe != wanted:
            raise ValueError(f"--output={output}: holds canaries of another recipe, {dict(key.recipe)}")
        return key
    canaries = make_canaries(recipe.seed, recipe.kinds, recipe.doses, recipe.per_dose)
    placed = [(canary, copy) for canary in canaries for copy in range(canary.dose)]
    draws(recipe.seed, "order").shuffle(placed)
    rows = [
        {
            "id": f"{canary.id}-{copy:05d}",
            "text": planted_text(canary, planted_carrier(recipe.seed, canary, copy), copy),
            "harm_score": 0,
            "canary": canary.id,
        }
        for canary, copy in placed
    ]
    path = write_whole(folder / CORPUS, _packed(rows))
    sha256 = file_sha256(str(path))
    listed = [dataclasses.asdict(canary) for canary in canaries]
    key = {"recipe": wanted, "canaries": listed, "documents": [canary.id for canary, _ in placed], "sha256": sha256}
    write_whole(folder / KEY_NAME, json.dumps(key) + "\n")
    facts = {"rows": len(rows), "bytes": path.stat().st_size, "sha256": sha256}
    manifest = {WRITTEN_BY: COMMAND, "recipe": wanted, "counts": counts(canaries), "files": {CORPUS: facts}}
    records.write(folder / MANIFEST_NAME, manifest)
    return read_key(output)


def counts(canaries: list[Canary]) -> dict[str, dict[str, dict[str, int]]]:
    """Canaries and documents by kind and dose."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for canary in canaries:
        of_dose = found.setdefault(canary.kind, {}).setdefault(str(canary.dose), {"canaries": 0, "documents": 0})
        of_dose["canaries"] += 1
        of_dose["documents"] += canary.dose
    return found


def read_key(folder: str) -> Key:
    """What was planted in a folder. Raises FileNotFoundError or ValueError that names it."""
    path = pathlib.Path(folder)
    if not (path / MANIFEST_NAME).exists():
        raise FileNotFoundError(f"{folder}: no canaries there, it has no {MANIFEST_NAME}: safelm canaries --plant")
    found = records.read(path / KEY_NAME, "plant anew in another folder")
    try:
        canaries = [Canary(**each | {"choices": tuple(each["choices"])}) for each in found["canaries"]]
        key = Key(path, found["recipe"], {c.id: c for c in canaries}, tuple(found["documents"]), found["sha256"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path / KEY_NAME}: is no key of canaries: {error}") from None
    planted = Counter(key.documents)
    if wrong := [c for c in canaries if planted[c.id] != c.dose]:
        raise ValueError(f"{path / KEY_NAME}: {wrong[0].id} has {planted[wrong[0].id]} documents, not {wrong[0].dose}")
    return key


def _packed(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    with gzip.GzipFile("", "wb", 6, buffer, mtime=0) as file:
        for row in rows:
            file.write(json.dumps(row).encode() + b"\n")
    return buffer.getvalue()
