"""The manifest of a scored corpus: exactly-once counts, per shard and in all, and the agreement of the scorers."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from safelm.documents import MANIFEST_NAME, WRITTEN_BY
from safelm.jobs.output import OutputFolder
from safelm.safety.ensemble import Agreement
from safelm.safety.scoring.columns import FOLDERS, QUARANTINE
from safelm.safety.scoring.plan import COMMAND, FORMAT, ScorePlan
from safelm.safety.scoring.scorers import ScorerSpec

_SUMMED = ("rows", "empty", "characters")
_OF_SHARDS = ("rows", "folders", "empty", "seconds")


def finish(out: OutputFolder, plan: ScorePlan, speed: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the manifest when every shard has its record; the manifest.

    Raises ValueError where one lacks, and where every row of the input is malformed.
    """
    missing = [job.name for job in plan.shards if job.name not in plan.done]
    if missing:
        raise ValueError(f"{out.root}: {len(missing)} shards have no record, the first is {missing[0]}: run again")
    records = [plan.done[job.name] for job in plan.shards]
    totals = {name: sum(record[name] for record in records) for name in _SUMMED}
    totals |= {name: sum(record["folders"][name] for record in records) for name in (*FOLDERS, QUARANTINE)}
    _check(out, totals)
    _check_any_left(out, plan, totals)
    names = [spec.name for spec in plan.work.scorers]
    agreements = [Agreement.from_json(record["agreement"]) for record in records]
    manifest = {
        WRITTEN_BY: COMMAND,
        "format": FORMAT,
        "input": list(plan.inputs),
        "scorers": scorer_records(plan.work.scorers),
        "safe_bound": plan.work.safe_bound,
        "columns": dict(plan.work.columns.types),
        "text_column": plan.work.text_column,
        "id_column": plan.work.id_column,
        "totals": totals,
        "agreement": functools.reduce(Agreement.merge, agreements, Agreement(names)).report(),
        "files": {name: facts for record in records for name, facts in _document_files(record).items()},
        "shards": [job.summary(plan.done[job.name], _OF_SHARDS) for job in plan.shards],
        "speed": dict(speed),
    }
    out.write_json(MANIFEST_NAME, manifest)
    return manifest


def scorer_records(scorers: Sequence[ScorerSpec]) -> list[dict[str, Any]]:
    """What a manifest says of the scorers."""
    return [
        {"name": s.name, "spec": s.spec, "fingerprint": s.fingerprint, "measured": dict(s.measured)}
        | ({"settings": dict(s.settings)} if s.settings else {})
        for s in scorers
    ]


def _check(out: OutputFolder, totals: Mapping[str, int]) -> None:
    written = sum(totals[name] for name in (*FOLDERS, QUARANTINE))
    if totals["rows"] != written:
        raise ValueError(f"{out.root}: {totals['rows']} rows were read, {written} written: the records don't agree")


def _check_any_left(out: OutputFolder, plan: ScorePlan, totals: Mapping[str, int]) -> None:
    """Raises ValueError, and forgets the shards, so that files can be mended, if every row is malformed."""
    try:
        paths, more = (job.path for job in plan.shards), f"they are kept in {out.path(QUARANTINE)}"
        plan.work.limit.check_any_left(paths, totals[QUARANTINE], totals["rows"], more=more)
    except ValueError:
        for job in plan.shards:
            out.remove(job.record)
        raise


def _document_files(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: facts for name, facts in record["files"].items() if not name.startswith(f"{QUARANTINE}/")}
