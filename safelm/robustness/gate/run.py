"""Runs the gate: every attack on every model, kept in a journal, so that a stopped run goes on with the next attack."""

import dataclasses
import pathlib
import time
from collections.abc import Collection, Mapping, Sequence

from safelm.evaluate.journal import Journal, open_journal
from safelm.evaluate.protocol import hash_params
from safelm.evaluate.suites.suite import hash_prompts
from safelm.io import records
from safelm.io.progress import Bar
from safelm.jobs.settings import check_same
from safelm.robustness.gate.asking import NONE, Row
from safelm.robustness.gate.battery import MERGING, Battery, Job
from safelm.robustness.gate.material import Material
from safelm.robustness.gate.profiles import Profile
from safelm.robustness.target import NotTriedError, hash_store, load_target, may_know_tag
from safelm.safety.synthesis.writer import Writer

SETTINGS_FILE, JOURNAL = "gate.json", "attacks.jsonl"
_VERSION = 3  # of what a row holds


def run(
    models: Mapping[str, str],
    profile: Profile,
    material: Material,
    output: pathlib.Path,
    *,
    merge_with: str = "",
    attacker: Writer | None = None,
    only: Collection[str] = (),
) -> dict[str, dict[str, Row]]:
    """The rows of every model by attack: those of the journal, and the missing ones, measured and added.

    An attack that can't be tried on a model has a row that says why (`left_out`). The journal has no such rows: the
    next run tries the attack again.

    Args:
      models: folders by name.
      merge_with: the model, of these, that others are merged with; empty: none.
      attacker: rewrites requests; None for the synthetic web's own.
      only: attacks whose names hold one of these are run, and nobody's attack; empty: all.

    Raises:
      ValueError: the output was begun with other settings, or a model can't be asked.
      OSError: another process writes there.
    """
    _guard(profile, material, output, merge_with, attacker)
    other = load_target(models[merge_with], is_chat=material.is_chat) if merge_with else None
    beside = f"/{hash_params(other.params)[:16]}" if other else ""
    found: dict[str, dict[str, Row]] = {}
    with open_journal(output / JOURNAL) as journal:
        for name, folder in models.items():
            target = load_target(folder, is_chat=material.is_chat)
            merged = None if name == merge_with else other
            battery = Battery(target, profile, material, merged, may_know_tag(folder), attacker)
            marked = f"{name}@{hash_params(target.params)[:16]}"
            is_full = battery.knows_tag and name != merge_with
            jobs = _asked_for(list(battery.jobs()), only, is_full=is_full)
            keys = {f"{marked}/{job.name}{beside if job.name == MERGING else ''}": job for job in jobs}
            done = sum(key in journal.rows for key in keys)
            found[name] = {}
            with Bar(total=len(keys), initial=done, desc=name, unit=" attacks", disable=None) as bar:
                for key, job in keys.items():
                    is_new = key not in journal.rows
                    found[name][job.name] = _measured(job, key, journal) if is_new else journal.rows[key]
                    bar.update(is_new)
    return found


def _measured(job: Job, key: str, journal: Journal) -> Row:
    """The row of an attack, added to the journal; or, not added, why the attack was not tried."""
    start = time.monotonic()
    about = {"kind": job.kind, "black_box": job.black_box}
    try:
        row = job.run() | about
    except NotTriedError as error:
        reason = {"left_out": str(error), "applies": error.applies}
        row = about | reason | {"method": job.method, "data": job.data}
    row["seconds"] = round(time.monotonic() - start, 1)
    if "left_out" not in row:
        journal.add({key: row})
    return row


def _asked_for(jobs: Sequence[Job], only: Collection[str], *, is_full: bool) -> list[Job]:
    """Nobody's attack, and those whose names hold one of `only`.

    ValueError for one of these that no name holds, where the model is one that every attack is for.
    """
    names = [job.name for job in jobs if not job.name.startswith(NONE)]
    for part in only:
        if is_full and not any(part in name for name in names):
            raise ValueError(f"--only={part}: no attack's name holds that, they are {', '.join(names)}")
    return [job for job in jobs if not only or job.name.startswith(NONE) or any(part in job.name for part in only)]


def _guard(
    profile: Profile, material: Material, output: pathlib.Path, merge_with: str, attacker: Writer | None
) -> None:
    settings = {
        "version": _VERSION,
        "profile": profile.name,
        "battery": records.fingerprint(dataclasses.asdict(profile)),
        "prompts": hash_prompts(material.prompts),
        "development": hash_prompts(material.development),
        "stores": {kind: hash_store(folder) for kind, folder in material.stores.items()},
        "chat": material.is_chat,
        "merge_with": merge_with,
        "attacker": attacker.fingerprint if attacker else "",
    }
    path = output / SETTINGS_FILE
    if path.exists():
        flags = {name: f"--{name}" for name in ("profile", "prompts", "development", "chat", "merge_with", "attacker")}
        check_same(str(output), records.read(path, "choose another --output"), settings, flags)
    output.mkdir(parents=True, exist_ok=True)
    records.write(path, settings)
