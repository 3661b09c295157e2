"""The token states behind a backbone's frozen layers, computed once for all epochs and all runs that share them.

    <folder>/<backbone's fingerprint>-layer<n>/<hash>.npy     states of some chunks end to end [tokens, D], float16
    <folder>/<backbone's fingerprint>-layer<n>/<hash>.json    sha256 keys of the chunks and their lengths, written last

Files are mapped into memory, not read; a file appears under its name only when it is whole; no text is stored.
"""

import functools
import hashlib
import json
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float

from safelm.io.files import write_whole
from safelm.io.progress import Bar
from safelm.safety.embedding import Backbone, packed

_ROWS, _ROWS_A_FILE = 8, 256


class StateCache:
    """The states of every chunk given to `fill`; kept on disk where `folder` is given, else in memory."""

    def __init__(self, backbone: Backbone, layer: int, folder: str | None = None):
        self._backbone, self.layer = backbone, layer
        name = f"{backbone.fingerprint[:24]}-layer{layer}"
        self._folder = pathlib.Path(folder) / name if folder else None
        self._known: dict[bytes, np.ndarray] = {}
        self._stream = jax.jit(functools.partial(backbone.stream, layer=layer))
        self._params = jax.device_put(backbone.params)
        if self._folder:
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(self._folder.glob("[!.]*.json")):
                self._read(path)

    def fill(self, chunks: Sequence[np.ndarray], description: str = "frozen layers") -> None:
        """Computes what is missing, in packed rows, with a bar; safe to interrupt at any time."""
        missing = [c for key, c in {_key(chunk): chunk for chunk in chunks}.items() if key not in self._known]
        row_tokens = self._backbone.max_tokens
        plan = packed.plan([len(chunk) for chunk in missing], row_tokens) if missing else []
        with Bar(total=sum(map(len, missing)), desc=description, unit=" tokens", disable=None) as bar:
            for start in range(0, len(plan), _ROWS_A_FILE):
                done: list[int] = []
                values: list[np.ndarray] = []
                for at in range(start, min(start + _ROWS_A_FILE, len(plan)), _ROWS):
                    part = plan[at : at + _ROWS]
                    found = self._computed(part, missing)
                    done += [chunk for row in part for chunk in row]
                    values += found
                    bar.update(sum(map(len, found)))
                self._keep([missing[i] for i in done], np.concatenate(values))

    def _computed(self, part: Sequence[Sequence[int]], chunks: Sequence[np.ndarray]) -> list[np.ndarray]:
        rows = packed.filled(part, self._backbone.max_tokens, _ROWS, lambda i: chunks[i])
        x_BTD = np.asarray(self._stream(self._params, rows.values, rows.segments_BT, rows.positions_BT))
        return [
            x_BTD[b, rows.segments_BT[b] == s + 1].astype(np.float16)
            for b, row in enumerate(part)
            for s in range(len(row))
        ]

    def states(self, chunk: np.ndarray) -> Float[np.ndarray, "tokens D"]:
        """Of a chunk that was filled in."""
        return self._known[_key(chunk)]

    def _keep(self, chunks: Sequence[np.ndarray], states: np.ndarray) -> None:
        keys, lengths = [_key(chunk) for chunk in chunks], [len(chunk) for chunk in chunks]
        if not self._folder:
            self._remember(keys, lengths, states)
            return
        path = self._folder / f"{hashlib.sha256(b''.join(keys)).hexdigest()[:24]}.json"
        write_whole(path.with_suffix(".npy"), lambda place: _save(place, states))
        write_whole(path, json.dumps({"keys": [key.hex() for key in keys], "lengths": lengths}).encode())
        self._read(path)

    def _read(self, path: pathlib.Path) -> None:
        try:
            found = json.loads(path.read_bytes())
            states = np.load(path.with_suffix(".npy"), mmap_mode="r")
            if sum(found["lengths"]) != len(states):
                raise ValueError("lengths")
        except (ValueError, OSError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a cache of token states; remove it ({type(error).__name__})") from None
        self._remember([bytes.fromhex(key) for key in found["keys"]], found["lengths"], states)

    def _remember(self, keys: Sequence[bytes], lengths: Sequence[int], states: np.ndarray) -> None:
        self._known |= dict(zip(keys, np.split(states, np.cumsum(lengths)[:-1]), strict=True))


def _save(place: pathlib.Path, states: np.ndarray) -> None:
    with open(place, "wb") as file:
        np.save(file, states)


def _key(chunk: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(chunk, np.int32).tobytes()).digest()


def embed(
    backbone: Backbone, chunks: Sequence[np.ndarray], states: StateCache | None = None
) -> Float[np.ndarray, "N D"]:
    """The embedding of each chunk, in packed rows, from the states of the layers that are kept where there are any."""
    if states:
        states.fill(chunks)
    value_of = (lambda i: states.states(chunks[i])) if states else lambda i: chunks[i]
    pooled = jax.jit(functools.partial(backbone.pooled_rows, first=states.layer if states else 0))
    params = jax.device_put(backbone.params)
    plan = packed.plan([len(chunk) for chunk in chunks], backbone.max_tokens)
    out_ND = np.zeros((len(chunks), backbone.dim), np.float32)
    for start in Bar(range(0, len(plan), _ROWS), desc="embed", unit=" batches", disable=None):
        rows = packed.filled(plan[start : start + _ROWS], backbone.max_tokens, _ROWS, value_of)
        found_BSD = np.asarray(pooled(params, rows.values, rows.segments_BT, rows.positions_BT))
        out_ND[rows.chunk_BS[rows.chunk_BS >= 0]] = found_BSD[rows.chunk_BS >= 0]
    return out_ND
