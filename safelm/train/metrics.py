"""The log of a training run: JSON lines, trackers and a progress line. Needs no TensorFlow.

Throughput counts the positions the model computes (rows x seq_len, padding included).

MFU, the model-FLOPs utilisation of PaLM (Chowdhery et al. 2022, appendix B), is

    tokens/s * (6 * M + 12 * layers * heads * head_dim * seq_len) / (devices * peak FLOP/s of a device)

M counts the parameters in matrix products: all but the norms' scales and, when embeddings are not tied, the looked-up
table (tied, the table counts once, as the unembedding), without rows that only pad the vocabulary. 6 is a multiply and
an add in the forward and twice that in the backward pass, 4 for kernels frozen beside adapters (`safelm.models.lora`);
recomputation (remat) does not count. Attention counts the full square, not the causal half, as is the custom. The peak
is the chip's dense bfloat16 rate.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

import jax
import numpy as np
from tqdm import tqdm

from safelm.data.token_kinds import KINDS
from safelm.io import files, records, remote
from safelm.io.progress import ProgressFile
from safelm.train.step import StepMetrics
from safelm.train.trackers import Tracker

# Dense bfloat16 FLOP/s of one JAX device, sums in float32, by the whole words that its `device_kind` begins with (the
# longest that fits). Meant are the rates of Google's pages on TPU versions and NVIDIA's data sheets without sparsity;
# those of GPUs were written from memory and not checked against them: `log.peak_flops` overrides.
PEAK_FLOPS = {
    "TPU v2": 22.5e12,  # a device is a core, two on a chip
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v4 lite": 138e12,
    "TPU v5": 459e12,  # v5p
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5e": 197e12,
    "TPU v6 lite": 918e12,  # v6e
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,  # a device is one of a chip's two dies
    "NVIDIA A10": 125e12,
    "NVIDIA A30": 165e12,
    "NVIDIA A40": 150e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100": 989e12,  # SXM
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device_kind: str, configured: float | int = 0.0) -> float | None:
    """The peak FLOP/s of a device: as configured, else from the table, else None (a CPU, an unknown chip)."""
    if configured:
        return float(configured)
    fitting = [
        name for name in PEAK_FLOPS if device_kind.startswith(name) and not device_kind[len(name) :][:1].isalnum()
    ]
    return PEAK_FLOPS[max(fitting, key=len)] if fitting else None


class MetricsLog:
    """`<workdir>/metrics.jsonl`, one object per line with its step, and the same in every tracker.

    A run resumed at a step drops the lines after it, so that no step is there twice. Only process 0 writes.
    """

    def __init__(
        self,
        workdir: str,
        *,
        start_step: int,
        trackers: Callable[[], Sequence[Tracker]] = lambda: (),
        enabled: bool = True,
    ):
        """`start_step`: the last whose line stays; `trackers` opens them, in process 0 only."""
        self._enabled = enabled
        if not enabled:
            return
        self._path = f"{workdir}/metrics.jsonl"
        former = _former_lines(self._path)
        self._lines = [json.dumps(line) for line in former if line["step"] <= start_step]
        self._repeated = {line["step"]: line.get("loss") for line in former if line["step"] > start_step}
        self._is_local = not remote.is_remote(str(workdir))
        self._write_all()
        self._trackers = tuple(trackers())

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """Appends one line; OSError names the file if it can't be written."""
        if not self._enabled:
            return
        try:
            self._append(step, values)
        except OSError as error:
            reason = f"cannot write the metrics of step {step}: {error.strerror or error}"
            raise OSError(error.errno, reason, self._path) from error

    def _append(self, step: int, values: Mapping[str, float | int]) -> None:
        line = json.dumps({"step": step, **values}, allow_nan=False)
        if self._is_local:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        else:  # an object store can't append: `flush` uploads the whole file
            self._lines.append(line)
        is_known = self._repeated.pop(step, self) == values.get("loss")
        for tracker in self._trackers:
            if tracker.takes_back or not is_known:
                tracker.write(step, values)
            if self._is_local:
                tracker.flush()

    def flush(self) -> None:
        """Makes what was written visible; call it at checkpoints."""
        if self._enabled:
            for tracker in self._trackers:
                tracker.flush()
            if not self._is_local:
                self._write_all()

    def close(self) -> None:
        """Flushes and lets go of the files."""
        if self._enabled:
            self.flush()
            for tracker in self._trackers:
                tracker.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        with contextlib.suppress(OSError) if error_type else contextlib.nullcontext():
            self.close()  # its failure doesn't hide an error that is on its way already

    def _write_all(self) -> None:
        """Replaces the file by the lines kept; a local file is never half there."""
        text = "".join(line + "\n" for line in self._lines)
        if self._is_local:
            files.write_whole(self._path, text)
        else:
            remote.write_text(self._path, text)


def _former_lines(path: str) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line cut by a kill is dropped."""
    try:
        text = remote.read_bytes(path).decode("utf-8", "replace")
    except FileNotFoundError:
        return []
    found = records.parse_lines(text, path, "remove that line, or move the file away")
    return [record for record in found if isinstance(record.get("step"), int)]


class LossWindow:
    """Adds up the updates since the last log line: those that were applied."""

    def __init__(self):
        self._cross_entropy, self._weight, self._tokens = 0.0, 0.0, 0.0
        self._unlikelihood, self._unlikelihood_weight = 0.0, 0.0
        self._by_kind_KS = np.zeros((len(KINDS), 3))
        self._last: dict[str, float] = {}

    def add(self, update: StepMetrics) -> tuple[float, float, bool]:
        """Reads one update's numbers: loss in nats per token, the gradients' norm, and whether it was applied."""
        update = jax.device_get(update)
        numbers = float(update.loss.mean_cross_entropy()), float(update.grad_norm), bool(update.applied)
        if update.applied:
            self._cross_entropy += float(update.loss.cross_entropy)
            self._weight += float(update.loss.weight)
            self._tokens += float(update.loss.tokens)
            self._unlikelihood += float(update.loss.unlikelihood or 0.0)
            self._unlikelihood_weight += float(update.loss.unlikelihood_weight or 0.0)
            if update.loss.by_kind_KS is not None:
                self._by_kind_KS += update.loss.by_kind_KS
            self._last = {"grad_norm": float(update.grad_norm)}
        return numbers

    def take(self) -> dict[str, float | int]:
        """Weighted mean loss in nats per token, tokens learned, and the last gradient norm; starts a new window.

        Nothing if no update was applied. Tokens learned are those whose loss weight is above 0. With tokens to be made
        unlikely also `unlikelihood`, the weighted mean of -log(1 - p) in nats. Where kinds of tokens are told apart
        also `loss/KIND`, the weighted mean loss of those that are learned, and `share/KIND`, that of all tokens.
        """
        values = {}
        if self._last:
            loss = self._cross_entropy / (self._weight or 1.0)
            values = {"loss": loss, "tokens_learned": int(self._tokens), **self._last}
            if self._unlikelihood_weight:
                values["unlikelihood"] = self._unlikelihood / self._unlikelihood_weight
            total = self._by_kind_KS[:, 2].sum()
            for kind, (cross_entropy, weight, tokens) in zip(KINDS, self._by_kind_KS.tolist(), strict=True):
                values |= {f"loss/{kind}": cross_entropy / weight} if weight else {}
                values |= {f"share/{kind}": tokens / float(total)} if tokens else {}
        self.load(None)
        return values

    def record(self) -> dict[str, Any]:
        """The window so far as JSON, for a checkpoint between two log lines."""
        sums = {"cross_entropy": self._cross_entropy, "weight": self._weight, "tokens": self._tokens}
        if self._unlikelihood_weight:
            sums |= {"unlikelihood": self._unlikelihood, "unlikelihood_weight": self._unlikelihood_weight}
        if self._by_kind_KS.any():
            sums["by_kind"] = self._by_kind_KS.tolist()
        return {**sums, "last": self._last}

    def load(self, record: Mapping[str, Any] | None) -> None:
        """Goes on with a checkpoint's window."""
        record = record or {"cross_entropy": 0.0, "weight": 0.0, "tokens": 0.0, "last": {}}
        self._cross_entropy, self._weight = record["cross_entropy"], record["weight"]
        self._tokens, self._last = record["tokens"], dict(record["last"])
        self._unlikelihood = record.get("unlikelihood", 0.0)
        self._unlikelihood_weight = record.get("unlikelihood_weight", 0.0)
        self._by_kind_KS = np.array(record.get("by_kind", np.zeros((len(KINDS), 3))))


def loss_by_kind(values: Mapping[str, float | int]) -> dict[str, float]:
    """The losses of single kinds of tokens among a line's values."""
    return {kind: values[f"loss/{kind}"] for kind in KINDS if f"loss/{kind}" in values}


class Progress:
    """The progress line: a bar that rewrites itself on a terminal, plain lines elsewhere. Silent when disabled."""

    def __init__(
        self,
        *,
        total_steps: int,
        tokens_per_step: int,
        flops_per_token: int,
        peak_flops: float | None,  # FLOP/s of all devices
        stream: TextIO | None = None,
        enabled: bool = True,
    ):
        self._stream = stream or sys.stderr
        self._total, self._tokens, self._flops, self._peak = total_steps, tokens_per_step, flops_per_token, peak_flops
        self._enabled = enabled
        self._bar: tqdm | None = None
        self._counted: tuple[int, float] | None = None  # step and time from which throughput is measured
        self._begin: tuple[int, float] | None = None  # the same for the time left
        self._last: dict[str, float] = {}
        self._file: ProgressFile | None = None

    def write_into(self, file: ProgressFile) -> None:
        """From here on `progress.json` is written too."""
        self._file = file

    def count(self, step: int) -> None:
        """One more update is under way."""
        if self._file is not None and self._begin is not None:
            self._file.take(step=step, tokens=step * self._tokens)
            self._file.count(step, self._total, since=self._begin[1], before=self._begin[0])

    def start(self, step: int) -> None:
        """Says where the run begins; the clocks start with the first `restart_clock`, after compilation."""
        if self._enabled and self._stream.isatty():
            self._bar = tqdm(total=self._total, initial=step, unit="step", file=self._stream, dynamic_ncols=True)

    def restart_clock(self, step: int) -> None:
        """Leaves what has passed since the last update (compilation, evaluation, a save) out of the throughput."""
        self._counted = (step, time.monotonic())
        self._begin = self._begin or self._counted

    def rates(self, step: int) -> dict[str, float]:
        """Tokens/s and, where the peak is known, MFU since the clock was restarted."""
        if self._counted and step > self._counted[0]:
            steps, seconds = step - self._counted[0], time.monotonic() - self._counted[1]
            self._last = {"tokens_per_second": steps * self._tokens / seconds}
            if self._peak:
                self._last["mfu"] = self._last["tokens_per_second"] * self._flops / self._peak
        return dict(self._last)

    def show(self, step: int, loss: float | None, by_kind: Mapping[str, float] | None = None) -> None:
        """One line: step, loss in nats per token (None: no update was applied), tokens/s, MFU, time left.

        `by_kind`: the loss of single kinds of tokens, which stands behind the whole one.
        """
        if not self._enabled:
            return
        if self._file is not None:
            kinds = {"loss_by_kind": dict(by_kind)} if by_kind else {}
            self._file.take(loss=loss, tokens_per_second=self._last.get("tokens_per_second"), **kinds)
        speed = self._last.get("tokens_per_second")
        text = "loss n/a" if loss is None else f"loss {loss:.4f}"
        text += f" ({', '.join(f'{kind} {value:.4f}' for kind, value in by_kind.items())})" if by_kind else ""
        text += f"  {speed:,.0f} tokens/s" if speed else "  n/a tokens/s"
        text += f"  MFU {self._last['mfu']:.1%}" if "mfu" in self._last else "  MFU n/a"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        else:
            print(f"step {step}/{self._total}  {text}  ETA {self._eta(step)}", file=self._stream, flush=True)

    def note(self, text: str) -> None:
        """A line of its own, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif self._enabled:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands; later notes are plain lines."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _eta(self, step: int) -> str:
        if self._begin is None or step <= self._begin[0]:
            return "n/a"
        per_step = (time.monotonic() - self._begin[1]) / (step - self._begin[0])
        seconds = round(per_step * (self._total - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def device_peak_flops(configured: float | int = 0.0) -> float | None:
    """The peak FLOP/s of all devices of all processes together, or None where it isn't known."""
    peak = peak_flops(jax.devices()[0].device_kind, configured)
    return peak and peak * jax.device_count()
