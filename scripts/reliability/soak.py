"""Faults at random, one after another, on a tiny run by the real command: is anything lost?

    python scripts/reliability/soak.py --faults=100 --minutes=60

First the run is done without any fault. Then it is done again in a folder of its own and, at random moments, killed,
told to stop (while it starts, compiles, trains, evaluates or saves), stopped and woken (as when every read is slow),
left without room on its disk (a small tmpfs, filled up, where root may mount one; else a limit on file sizes), and
between two launches its newest checkpoint or a token shard is damaged; the shard is put right after the refusal. When
all faults are done, or the minutes are over, the run is left alone to finish. Prints a table of faults and outcomes.

Exit code 0 only if every launch ended as it should and nothing is lost: parameters and optimizer bit for bit, every
metric but those of time, the faults' record and the data position are those of the run without faults.
"""

import collections
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT), str(ROOT / "tests/helpers")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import tiny_runs  # noqa: E402

from safelm import cli  # noqa: E402

STEPS_PER_FAULT = 80  # more than a fault lets pass on average: the run must not end before the faults do
DISK_BYTES = 48 << 20
TOLD = {128 + signal.SIGTERM, -signal.SIGTERM}  # by us once it listens, by the kernel while Python starts


class Soak:
    """One run under faults: its folder, its process, and what has happened to it."""

    def __init__(self, folder: Path, total_steps: int, seed: int):
        self.folder, self.total_steps, self.rng = folder, total_steps, random.Random(seed)
        self.inputs, self.disk = folder / "inputs", folder / "disk"
        self.workdir = self.disk / "run"
        self.disk.mkdir(parents=True)
        tiny_runs.write_inputs(self.inputs)
        shutil.copytree(self.inputs / "tokens", folder / "tokens_whole")
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(self.disk)]
        self.mounted = subprocess.run(mount, capture_output=True).returncode == 0
        self.process: subprocess.Popen | None = None
        self.outcomes: collections.Counter[tuple[str, str]] = collections.Counter()
        self.losses: list[str] = []

    def command(self, workdir: Path) -> list[str]:
        fields = {
            "tokenizer": self.inputs / "tokenizer",
            "data.root": self.inputs / "tokens",
            "compilation_cache_dir": self.folder / "compiled",
            "total_steps": self.total_steps,
            "log.every_steps": 2,
            "eval.every_steps": 25,
            "checkpoint.every_steps": 7,
            "checkpoint.keep_last": 3,
        }
        flags = [f"--config.{name}={value}" for name, value in fields.items()]
        return [sys.executable, "-m", "safelm.train", "--config=configs/tiny_cpu.py", f"--workdir={workdir}", *flags]

    def launch(self, *, limit: Callable[[], None] | None = None) -> None:
        log = open(self.folder / "log.txt", "ab")
        self.process = subprocess.Popen(
            self.command(self.workdir), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=log, preexec_fn=limit
        )

    def wait_for_step(self, step: int) -> bool:
        """Until the run has logged a step; False if it ended before."""
        while self.process.poll() is None:
            if last_step(self.workdir) >= step:
                return True
            time.sleep(0.01)
        return False

    def end(self, fault: str, expected: set[int], timeout_s: float = 300) -> int:
        """Waits for the process and writes down how it ended."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
            self.lose(fault, f"did not end within {timeout_s:.0f} s")
        self.outcomes[fault, f"exit code {code}"] += 1
        if code == 0 and last_step(self.workdir) == self.total_steps:
            return code  # it was done before the fault could reach it
        if code not in expected:
            self.lose(fault, f"exit code {code}, not one of {sorted(expected)}; see {self.folder}/log.txt")
        return code

    def lose(self, fault: str, what: str) -> None:
        self.losses.append(f"{fault}: {what}")
        print(f"LOST {self.losses[-1]}", flush=True)

    def run_until_random_step(self) -> bool:
        goal = last_step(self.workdir) + self.rng.randrange(1, STEPS_PER_FAULT)
        self.launch()
        reached = self.wait_for_step(min(goal, self.total_steps - 1))
        time.sleep(self.rng.random() * 0.1)
        return reached

    # The faults: each launches the run, does its harm and leaves the process ended.

    def kill_while_running(self) -> None:
        self.run_until_random_step()
        self.process.kill()
        self.end("SIGKILL while it trains", {-signal.SIGKILL})

    def kill_while_starting(self) -> None:
        self.launch()
        time.sleep(self.rng.random() * 8)
        self.process.kill()
        self.end("SIGKILL while it starts", {-signal.SIGKILL})

    def stop_while_running(self, number: int = signal.SIGTERM, times: int = 1) -> None:
        fault = f"{signal.Signals(number).name} while it trains" + (", twice" if times > 1 else "")
        self.run_until_random_step()
        for _ in range(times):
            self.process.send_signal(number)
            time.sleep(0.02)
        if self.end(fault, {128 + number}) == 128 + number:
            (stop,) = [event for event in self.events() if event["event"] == "stop"][-1:] or [None]
            if stop is None or stop["step"] != max(self.checkpoints(), default=0):
                self.lose(fault, f"stopped at {stop}, but the checkpoints are {self.checkpoints()}")

    def stop_while_starting(self) -> None:
        self.launch()
        time.sleep(self.rng.random() * 8)
        self.process.terminate()
        self.end("SIGTERM while it starts", TOLD)

    def stall(self) -> None:
        """Stops the process, wakes it, and lets it go on before it is killed."""
        self.run_until_random_step()
        self.process.send_signal(signal.SIGSTOP)
        time.sleep(self.rng.uniform(1, 6))
        self.process.send_signal(signal.SIGCONT)
        before = last_step(self.workdir)
        if not self.wait_for_step(min(before + 10, self.total_steps - 1)):
            self.lose("stalled for seconds", f"ended by itself after step {before}")
        self.process.kill()
        self.end("stalled for seconds, then SIGKILL", {-signal.SIGKILL})

    def full_disk(self) -> None:
        if not self.mounted:
            self.launch(limit=limit_file_size)
            self.end("no file over 20 kB", {2})
            return
        self.run_until_random_step()
        filler = self.disk / "filler"
        free = shutil.disk_usage(self.disk).free
        try:
            with contextlib.suppress(OSError), open(filler, "wb") as file:  # the run may take the room first
                file.write(bytes(max(0, free - self.rng.randrange(1, 400_000))))
            self.end("disk full", {2})
        finally:
            filler.unlink()

    def damage_checkpoint(self) -> None:
        """Damages a file of the newest checkpoint while nothing runs; the next launch has to notice if it matters."""
        self.kill_while_running()
        if len(self.checkpoints()) < 2:
            return
        newest = self.workdir / "checkpoints" / str(max(self.checkpoints()))
        file = self.rng.choice([path for path in newest.rglob("*") if path.is_file() and path.stat().st_size])
        how = damage(file, self.rng)
        aside = count_files(self.workdir / "corrupt_checkpoints")
        self.launch()
        self.wait_for_step(last_step(self.workdir) + 1)
        self.process.kill()
        self.end(f"newest checkpoint: a file {how}", {-signal.SIGKILL})
        was_set_aside = count_files(self.workdir / "corrupt_checkpoints") > aside
        self.outcomes["  of these", "set aside" if was_set_aside else "damage without effect"] += 1

    def damage_shard(self) -> None:
        """Cuts or removes a file of tokens; the launch has to be refused. Then the file is put right."""
        tokens = self.inputs / "tokens" / "raw_web" / "train"
        file = self.rng.choice(sorted([*tokens.glob("tokens-*"), *tokens.glob("bounds-*"), tokens / "manifest.json"]))
        how = self.rng.choice(["cut", "removed"])
        file.write_bytes(file.read_bytes()[:-2]) if how == "cut" else file.unlink()
        self.launch()
        self.end(f"token shard {how}", {2})
        shutil.copy2(self.folder / "tokens_whole" / file.relative_to(self.inputs / "tokens"), file)

    def events(self) -> list[dict]:
        lines = (self.workdir / "events.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def checkpoints(self) -> list[int]:
        folder = self.workdir / "checkpoints"
        return [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.exists() else []

    def finish(self) -> None:
        """The last launch, left alone."""
        self.launch()
        self.end("none: the rest of the run", {0}, timeout_s=1800)

    def compare(self, whole: Path) -> None:
        """What differs from a run without faults is a loss."""
        try:
            tiny_runs.assert_same_checkpoint(whole, self.workdir, self.total_steps)
        except (AssertionError, FileNotFoundError, ValueError) as error:
            self.lose("at the end", f"parameters or optimizer differ: {error}")
        ours, theirs = tiny_runs.metric_lines(self.workdir), tiny_runs.metric_lines(whole)
        for mine, other in zip(ours, theirs, strict=False):
            if mine != other:
                self.lose("at the end", f"metrics differ first at {other}: {mine}")
                break
        if len(ours) != len(theirs):
            self.lose("at the end", f"metrics have {len(ours)} lines, not {len(theirs)}")
        for name in ("data", "faults", "fingerprints"):
            if meta(whole, self.total_steps)[name] != meta(self.workdir, self.total_steps)[name]:
                self.lose("at the end", f"{name} in the last checkpoint's record differ")

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.mounted:
            subprocess.run(["umount", str(self.disk)], check=False)


def last_step(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines[-3:] if line.endswith("}")), default=0)


def meta(workdir: Path, step: int) -> dict:
    return json.loads((workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text())


def damage(file: Path, rng: random.Random) -> str:
    content = bytearray(file.read_bytes())
    how = rng.choice(["cut in half", "with a flipped bit", "removed"])
    if how == "removed":
        file.unlink()
        return how
    if how == "cut in half":
        content = content[: len(content) // 2]
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return how


def count_files(folder: Path) -> int:
    return sum(1 for _ in folder.iterdir()) if folder.exists() else 0


def limit_file_size() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def main() -> int:
    parser = cli.parser("scripts.reliability.soak", __doc__)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=60, help="after these, no further fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="for the run, its inputs and its log; a temporary one by default")
    options = parser.parse_args()
    folder = Path(options.folder or tempfile.mkdtemp(prefix="soak_"))
    soak = Soak(folder, (options.faults + 5) * STEPS_PER_FAULT, options.seed)
    faults = [soak.kill_while_running, soak.kill_while_starting, soak.stop_while_running, soak.stop_while_starting]
    faults += [lambda: soak.stop_while_running(times=2), lambda: soak.stop_while_running(signal.SIGINT)]
    faults += [soak.stall, soak.full_disk, soak.damage_checkpoint, soak.damage_checkpoint, soak.damage_shard]
    print(
        f"{folder}: {soak.total_steps} steps; disk: {'a tmpfs' if soak.mounted else 'limited file sizes'}", flush=True
    )
    try:
        whole = folder / "whole"
        log = open(folder / "whole.txt", "wb")
        subprocess.run(soak.command(whole), cwd=ROOT, stdout=log, stderr=log, check=True)
        begin, done = time.monotonic(), 0
        plan = [soak.rng.choice(faults) for _ in range(options.faults)]
        while done < options.faults and time.monotonic() - begin < 60 * options.minutes:
            if last_step(soak.workdir) >= soak.total_steps - 1:
                break
            plan[done]()
            done += 1
            print(f"{done} faults, step {last_step(soak.workdir)}, {time.monotonic() - begin:.0f} s", flush=True)
        soak.finish()
        soak.compare(whole)
    finally:
        soak.close()
    for (fault, outcome), count in sorted(soak.outcomes.items()):
        print(f"{fault:45} {outcome:25} {count:4}")
    minutes = (time.monotonic() - begin) / 60
    lost = "; ".join(soak.losses) or "nothing"
    print(f"{done} faults in {minutes:.1f} minutes; lost: {lost}")
    return 1 if soak.losses or done < options.faults else 0


if __name__ == "__main__":
    sys.exit(main())
