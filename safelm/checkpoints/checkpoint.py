"""Checkpoints: Orbax folders of parameters, optimizer state and a JSON record of what they belong to.

A run's folder (a workdir, local or `gs://`), and equally one written by `save_params`:

    <folder>/checkpoints/<step>/params      the parameters
    <folder>/checkpoints/<step>/optimizer   the optimizer's state (training only)
    <folder>/checkpoints/<step>/meta        JSON: step, model config, vocabulary hash, data position, run settings,
                                            whether the harm tag was trained on (`saw_tag`), what was converted
    <folder>/tokenizer/                     the tokenizer, so that the folder is all one needs

A step's folder gets its name only when it is whole, so a killed or failed save leaves the checkpoints before it as they
were. `meta` holds the data position as integers: what is fed at a step is a function of the step (`safelm.data`); and
fingerprints of all arrays, which a restore compares, so that a damaged checkpoint is an error and never a wrong model.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

os.environ.setdefault("EPATH_USE_TF", "false")  # otherwise etils imports TensorFlow for gs:// where it is installed

import fsspec.config
import jax
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers

from safelm.checkpoints import integrity as checkpoint_integrity
from safelm.checkpoints.integrity import CorruptCheckpointError
from safelm.checkpoints.quiet import hush_what_is_under_way
from safelm.io import lease, remote
from safelm.models import decoder as model_lib
from safelm.models import lora
from safelm.models.config import FAMILY_OPTIONS
from safelm.text.tokenizer import Tokenizer

Meta = dict[str, Any]

# By default fsspec remembers a folder's listing for good: no host would see what another one has written since.
fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)

# What a checkpoint's arrays mean depends on these. The other fields (dtype, remat, attention ...) say how to compute.
ARCHITECTURE_FIELDS = (
    "vocab_size",
    "num_layers",
    "d_model",
    "d_ff",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "rope_theta",
    *FAMILY_OPTIONS,
    "rms_norm_eps",
    "tie_embeddings",
)

CORRUPT_FOLDER = "corrupt_checkpoints"
# What reading a whole checkpoint may also end in.
_PASSING_ERRORS = (PermissionError, MemoryError, TimeoutError, ConnectionError)
_PASSING_STATUS = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAUTHENTICATED")


class Checkpoints:
    """The checkpoints under `<folder>/checkpoints`, written in the background, read on demand.

    Keeps the newest `keep_last`, and each whose step is a multiple of `keep_every` (0: none) for good.
    """

    def __init__(
        self,
        folder: str,
        *,
        keep_last: int = 1,
        keep_every: int = 0,
        read_only: bool = False,
        is_only_writer: bool = False,
    ):
        """`is_only_writer`: nobody else can be writing there (a lock or lease is held), so half-written steps go."""
        self._place = folder
        path = epath.Path(folder)
        self.folder = path if remote.is_remote(folder) else path.resolve()  # Orbax wants it absolute
        policies = [checkpoint_managers.LatestN(keep_last)]
        if keep_every:
            policies.append(checkpoint_managers.EveryNSteps(keep_every))
        hush_what_is_under_way()
        handler = ocp.StandardCheckpointHandler
        self._manager = ocp.CheckpointManager(
            self.folder / "checkpoints",
            options=ocp.CheckpointManagerOptions(
                create=not read_only,
                save_root_metadata=not read_only,
                cleanup_tmp_directories=is_only_writer and not read_only,
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            ),
            item_handlers={"params": handler(), "optimizer": handler(), "meta": ocp.JsonCheckpointHandler()},
        )

    def latest_step(self) -> int | None:
        """The newest whole checkpoint's step, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Steps of all whole checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def name(self, step: int) -> str:
        """A checkpoint in messages."""
        return f"checkpoint {self.folder}/checkpoints/{step}"

    def read_meta(self, step: int) -> Meta:
        """The JSON record of a checkpoint. Raises CorruptCheckpointError if it was changed since it was written."""
        with self._read_errors(step):
            meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        if not isinstance(meta, dict) or "step" not in meta:
            raise CorruptCheckpointError(f"{self.name(step)}: its meta is not the record of a checkpoint")
        checkpoint_integrity.check_seal(meta, where=self.name(step))
        return meta

    def save(self, step: int, meta: Mapping[str, Any], params: PyTree, opt_state: PyTree | None = None) -> None:
        """Starts writing a checkpoint in the background; returns once the arrays may be reused.

        Raises OSError if this save can't begin or the previous one failed (a full disk, for example).
        """
        arrays = {"params": params} if opt_state is None else {"params": params, "optimizer": opt_state}
        record = {**meta, "step": step, "fingerprints": checkpoint_integrity.fingerprints(arrays)}
        items: dict[str, Any] = {
            "params": ocp.args.StandardSave(params),
            "meta": ocp.args.JsonSave(checkpoint_integrity.seal(record)),
        }
        if opt_state is not None:
            items["optimizer"] = ocp.args.StandardSave(opt_state)
        remote.check_guards(self._place)
        with self._write_errors(step):
            self._manager.wait_until_finished()
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def check(self) -> None:
        """Raises OSError if a background save has failed; doesn't wait for an unfinished one.

        Orbax's own `check_for_errors` would take the error away from the thread that finishes the save, which would
        then delete older checkpoints as if the save had succeeded.
        """
        remote.check_guards(self._place, asks=False)
        with self._write_errors(None):
            if not self._manager.is_saving_in_progress():
                self._manager.wait_until_finished()

    def wait(self) -> None:
        """Waits until the last save is on disk; raises OSError if it failed."""
        with self._write_errors(None):
            self._manager.wait_until_finished()

    def restore(self, step: int, params: PyTree, opt_state: PyTree | None = None) -> tuple[PyTree, PyTree | None]:
        """Reads a checkpoint into arrays of the given abstract trees' shapes, dtypes and shardings.

        Raises ValueError naming the parameter if the checkpoint's arrays have other names or shapes,
        CorruptCheckpointError if they can't be read or were changed since they were written.
        """
        wanted = self.read_meta(step).get("fingerprints", {})
        self._check_shapes(step, params)
        items: dict[str, Any] = {"params": ocp.args.StandardRestore(params)}
        if opt_state is not None:
            items["optimizer"] = ocp.args.StandardRestore(opt_state)
        with self._read_errors(step):
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
            checkpoint_integrity.check_fingerprints(dict(restored.items()), wanted, where=self.name(step))
        return restored.params, restored.get("optimizer")

    def set_aside(self, step: int, reason: str) -> epath.Path:
        """Moves a checkpoint to `<folder>/corrupt_checkpoints` with a text file that states the reason.

        Returns its new place.
        """
        aside = self.folder / CORRUPT_FOLDER
        taken = {path.name for path in aside.iterdir()} if aside.is_dir() else set()
        aside.mkdir(parents=True, exist_ok=True)
        name = next(name for name in (str(step), *(f"{step}.{i}" for i in range(2, 10**6))) if name not in taken)
        (aside / f"{name}.txt").write_text(reason + "\n")  # first: an object store has no folder without an object
        (self.folder / "checkpoints" / str(step)).rename(aside / name)
        self.reload()
        return aside / name

    def reload(self) -> None:
        """Lists the folder's checkpoints again."""
        self._manager.reload()

    def close(self) -> None:
        """Waits for the last save and closes the folder."""
        self.wait()
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        """Lets a background save finish; its failure doesn't hide an exception that is already being raised."""
        with contextlib.suppress(OSError) if error_type else contextlib.nullcontext():
            self.close()

    def _check_shapes(self, step: int, params: PyTree) -> None:
        with self._read_errors(step):
            stored = _shapes(self._manager.item_metadata(step).params.tree)
        wanted = _shapes(params)
        for name, shape in wanted.items():
            if name not in stored:
                raise ValueError(f"{self.name(step)} is of another model: it has no parameter {name}")
            if stored[name] != shape:
                raise ValueError(
                    f"{self.name(step)} is of another model: {name} has shape {stored[name]} there, {shape} here"
                )
        if extra := sorted(stored.keys() - wanted.keys()):
            raise ValueError(f"{self.name(step)} is of another model: this one has no parameter {extra[0]}")

    @contextlib.contextmanager
    def _read_errors(self, step: int) -> Iterator[None]:
        """Tells a damaged checkpoint, which must be skipped, from failing storage or machines."""
        try:
            yield
        except CorruptCheckpointError:
            raise
        except Exception as error:  # Orbax and tensorstore raise many kinds
            reason = f"{self.name(step)} can't be read: {type(error).__name__}: {' '.join(str(error).split())[:500]}"
            passing = isinstance(error, _PASSING_ERRORS) or any(status in str(error) for status in _PASSING_STATUS)
            raise (OSError if passing else CorruptCheckpointError)(reason) from error

    @contextlib.contextmanager
    def _write_errors(self, step: int | None) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and tensorstore raise many kinds; to a run they mean the same
            which = "a checkpoint" if step is None else f"the checkpoint before or at step {step}"
            kept = sorted(self._manager.all_steps(read=True))
            good = f"the last good one is {self.name(kept[-1])}" if kept else "there is none before it"
            raise OSError(f"could not write {which} under {self.folder}/checkpoints ({good}): {error}") from error


def save_params(
    folder: str,
    model_config: model_lib.ModelConfig,
    params: PyTree,
    tokenizer: Tokenizer,
    *,
    source: str = "",
    saw_tag: bool | None = None,
) -> None:
    """Writes a folder that `load_for_inference` and a config's `init_checkpoint` read: step 0, parameters only.

    `source`: where the parameters come from, kept in the record (of a hub's model with its commit). `saw_tag`: as that
    of the same name returns it.

    Raises FileExistsError if the folder holds a checkpoint already, OSError if it can't be written, ValueError while
    another process writes into a folder in a bucket.
    """
    with lease.held(folder) if remote.is_remote(folder) else contextlib.nullcontext():
        checkpoints = Checkpoints(folder, is_only_writer=True)
        if (step := checkpoints.latest_step()) is not None:
            raise FileExistsError(f"{folder} already holds a checkpoint (step {step})")
        save_tokenizer(folder, tokenizer)
        known = {"source": source or None, "saw_tag": saw_tag}
        known = {name: value for name, value in known.items() if value is not None}
        checkpoints.save(0, model_meta(model_config, tokenizer) | known, params)
        checkpoints.close()


def load_for_inference(path: str, *, step: int | None = None) -> tuple[model_lib.ModelConfig, PyTree, Tokenizer]:
    """`load` with adapters merged into the model: what everything takes that isn't about the adapters themselves."""
    config, params, tokenizer = load(path, step=step)
    return *lora.merged(config, params), tokenizer


def load(path: str, *, step: int | None = None) -> tuple[model_lib.ModelConfig, PyTree, Tokenizer]:
    """Loads a model from a workdir or a `save_params` folder: config, parameters on one device, tokenizer.

    Takes the newest checkpoint unless `step` is given. Raises FileNotFoundError if there is none, ValueError if the
    folder's tokenizer isn't the one the model was trained with.
    """
    checkpoints, step, meta = open_checkpoint(path, step=step)
    tokenizer = load_tokenizer(path)
    check_vocabulary(meta, tokenizer, where=f"checkpoint {path} (step {step})")
    config = model_config_from_meta(meta, where=f"checkpoint {path} (step {step})")
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), model_lib.abstract_params(config)
    )
    params, _ = checkpoints.restore(step, target)
    checkpoints.close()
    return config, params, tokenizer


def open_checkpoint(path: str, *, step: int | None = None, setting: str = "step") -> tuple[Checkpoints, int, Meta]:
    """Opens a folder's newest (or the given) checkpoint; FileNotFoundError, naming `setting`, if it isn't there."""
    if not remote.is_dir(f"{path}/checkpoints"):
        raise remote.missing(path, f"no checkpoint at {path}: it has no folder 'checkpoints'")
    checkpoints = Checkpoints(path, read_only=True)
    steps = checkpoints.steps()
    if not steps:
        raise FileNotFoundError(f"no checkpoint at {path}: nothing whole under {path}/checkpoints")
    if step is None:
        step = steps[-1]
    elif step not in steps:
        names = ", ".join(map(str, steps))
        raise FileNotFoundError(f"{setting}={step}: no such checkpoint in {path}, which has {names}")
    return checkpoints, step, checkpoints.read_meta(step)


def saw_tag(path: str, *, step: int | None = None) -> bool | None:
    """Whether a checkpoint was trained on the harm tag, so that its P(tag) is meaningful; None if it doesn't say."""
    checkpoints, _, meta = open_checkpoint(path, step=step)
    checkpoints.close()
    return meta.get("saw_tag")


def model_meta(model_config: model_lib.ModelConfig, tokenizer: Tokenizer) -> Meta:
    """The part of `meta` that every checkpoint has."""
    return {"model": dataclasses.asdict(model_config), "vocab_hash": tokenizer.hash}


def model_config_from_meta(meta: Meta, *, where: str) -> model_lib.ModelConfig:
    """The model config a checkpoint records; ValueError if it has fields this version doesn't know."""
    known = {field.name for field in dataclasses.fields(model_lib.ModelConfig)}
    if unknown := sorted(meta["model"].keys() - known):
        raise ValueError(f"{where} has an unknown model field: {unknown[0]}")
    return model_lib.ModelConfig(**meta["model"])


def check_model(meta: Meta, model_config: model_lib.ModelConfig, *, where: str) -> None:
    """Raises ValueError naming the first architecture field in which the checkpoint's model differs."""
    recorded = model_config_from_meta(meta, where=where)
    for name in ARCHITECTURE_FIELDS:
        there, here = getattr(recorded, name), getattr(model_config, name)
        if there != here:
            raise ValueError(f"{where} is of another model: {name} is {there} there, {here} here")


def check_vocabulary(meta: Meta, tokenizer: Tokenizer, *, where: str) -> None:
    """Raises ValueError if the checkpoint was trained with another tokenizer."""
    if meta["vocab_hash"] != tokenizer.hash:
        raise ValueError(
            f"{where} is of another vocabulary: hash {meta['vocab_hash'][:12]} there, {tokenizer.hash[:12]} here"
        )


def save_tokenizer(folder: str, tokenizer: Tokenizer) -> None:
    """Writes `<folder>/tokenizer`, local or remote."""
    tokenizer.save(f"{folder}/tokenizer")


def load_tokenizer(folder: str) -> Tokenizer:
    """Reads `<folder>/tokenizer`; FileNotFoundError if there is none."""
    return Tokenizer.from_pretrained(f"{folder}/tokenizer")


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {checkpoint_integrity.path_name(path): tuple(leaf.shape) for path, leaf in leaves}
