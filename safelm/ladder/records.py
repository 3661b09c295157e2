"""Records of finished rungs, small enough to be kept with a project: so another machine does only the seeds that lack.

A record is a JSON file for each seed and model with the results of all its jobs, facts and hashes of the data, a hash
of the package's code, and the machine. Checkpoints and texts are not kept. `settings.json` beside them has the settings
that decide the results: a study goes on from records if all settings that it shares with them are the same, so a later
version of the package, with settings that it did not have, can go on too.
"""

import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from safelm.io import records
from safelm.io.files import write_whole
from safelm.ladder.jobs import done_file, read_done
from safelm.ladder.plan import Job, Model, chosen_models, plan_jobs, study_of

# A study may be widened, and its data and the model that it begins with lie elsewhere.
_FREE = ("seeds", "models", "methods", "real", "init_checkpoint")
INIT = "init_checkpoint.json"  # of a study's folder: the hash of the model that it begins with
_FACTS = ("corpus/corpus.json", "classifiers/judges.json", "filter.json", INIT)  # of the folder, where there are any
_ONCE = ("predictions.json",)  # what a study wrote before it looked: kept as it was first written
_KEPT = "facts.json"  # those of the records, for a folder whose data isn't made yet
_SETTINGS = "settings.json"
_REMEDY = "restore it from version control, or remove it and the rung is done again"


def settings_of(config: ConfigDict) -> dict[str, Any]:
    """The settings that decide a rung's results, as JSON."""
    settings = json.loads(config.to_json_best_effort())
    return {name: value for name, value in settings.items() if name not in _FREE}


def changed(old: Any, new: Any, name: str = "") -> str:
    """The name of a setting that both have with different values, "" if there is none."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return "" if old == new else name
    found = (changed(old[key], new[key], f"{name}.{key}".lstrip(".")) for key in old if key in new)
    return next(filter(None, found), "")


@functools.cache
def code_hash() -> str:
    """The hash of all modules of the package."""
    spec = importlib.util.find_spec("safelm")
    if spec is None or spec.origin is None:
        raise OSError("the package safelm has no files")
    root, digest = pathlib.Path(spec.origin).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _jobs(config: ConfigDict, model: Model, seed: int) -> list[Job]:
    return plan_jobs([model], [seed], config.methods, study_of(config))


def _path(folder: pathlib.Path, model: Model, seed: int) -> pathlib.Path:
    return folder / f"seed-{seed}.{model.name}.json"


def _names(jobs: Sequence[Job]) -> set[str]:
    return {job.name for job in jobs}


def _has_jobs(path: pathlib.Path, jobs: Sequence[Job]) -> bool:
    return path.exists() and not records.read(path, _REMEDY)["jobs"].keys() < _names(jobs)


def save(config: ConfigDict, output: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the records of the seeds and models whose jobs are all done, unless they are there with these jobs.

    A record with fewer jobs, from before the study was widened, is replaced.
    """
    settings = folder / _SETTINGS
    for model in chosen_models(config.models):
        for seed in config.seeds:
            jobs = _jobs(config, model, seed)
            results = {job.name: read_done(output, job) for job in jobs}
            if None in results.values() or _has_jobs(_path(folder, model, seed), jobs):
                continue
            found = {job.name: {k: v for k, v in (results[job.name] or {}).items() if k != "texts"} for job in jobs}
            text = json.dumps(_header(config, output) | {"seed": seed, "model": model.name, "jobs": found})
            if not settings.exists():
                folder.mkdir(parents=True, exist_ok=True)
                records.write(settings, settings_of(config))
            partial = folder / f".{model.name}-{seed}-{os.getpid()}"
            partial.write_text(text + "\n", encoding="utf-8")
            partial.rename(_path(folder, model, seed))
    if settings.exists():
        _copy_once(output, folder)


def _copy_once(source: pathlib.Path, target: pathlib.Path) -> None:
    for name in _ONCE:
        if (source / name).exists() and not (target / name).exists():
            write_whole(target / name, (source / name).read_text(encoding="utf-8"))


def _header(config: ConfigDict, output: pathlib.Path) -> dict[str, Any]:
    return {
        "study": study_of(config).name,
        "code": code_hash(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "data": facts(output),
    }


def facts(output: pathlib.Path) -> dict[str, Any]:
    """What a study's folder says of its data, by the names of the files."""
    paths = {pathlib.Path(name).stem: output / name for name in _FACTS}
    kept = output / _KEPT
    found = records.read(kept, _REMEDY) if kept.exists() else {}
    return found | {name: records.read(path, _REMEDY) for name, path in paths.items() if path.exists()}


def restore(config: ConfigDict, output: pathlib.Path, folder: pathlib.Path) -> list[Mapping[str, Any]]:
    """Marks the jobs of kept records as done in the study's folder; the records.

    A record that lacks a job, since the study was widened, is left out: that rung is done again.

    Raises ValueError for a damaged record and one of other settings or other data.
    """
    found: list[Mapping[str, Any]] = []
    settings = folder / _SETTINGS
    if settings.exists() and (name := changed(records.read(settings, _REMEDY), settings_of(config))):
        raise ValueError(f"{settings}: {name} is another than that of --config: name another --records")
    _copy_once(folder, output)
    for model in chosen_models(config.models):
        for seed in config.seeds:
            path, jobs = _path(folder, model, seed), _jobs(config, model, seed)
            if not path.exists():
                continue
            record = records.read(path, _REMEDY)
            _check_data(record, path, [*found[:1], {"data": facts(output)}])
            if not _names(jobs) <= record["jobs"].keys():
                continue
            found.append(record)
            records.write(output / _KEPT, record["data"])
            for job in (job for job in jobs if not done_file(output, job).exists()):
                done_file(output, job).parent.mkdir(parents=True, exist_ok=True)
                records.write(done_file(output, job), record["jobs"][job.name])
    return found


def _check_data(record: Mapping[str, Any], path: pathlib.Path, others: Sequence[Mapping[str, Any]]) -> None:
    for other in others:
        for name, said in (("corpus", "data (corpus"), (pathlib.Path(INIT).stem, "weights (init_checkpoint")):
            mine, theirs = (each["data"].get(name, {}).get("sha256") for each in (record, other))
            if mine and theirs and mine != theirs:
                raise ValueError(f"{path}: of other {said} {mine[:12]}, not {theirs[:12]}): name another --records")
