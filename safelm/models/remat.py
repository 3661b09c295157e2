"""What a block keeps for its backward pass, in place of computing it again: `ModelConfig.remat` as JAX's policies."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

NONE = "none"
PRODUCT_OUTPUT = "product_output"  # of a product with parameters that is not XLA's
ATTENTION_OUTPUT = "attention_output"  # of a fused kernel: its result and what its backward pass needs
# What can be kept by name: results of products with parameters, and "attention", a kernel's or XLA's.
NAMES = ("query", "key", "value", "attention", "output", "gate", "up", "down")
POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ATTENTION_OUTPUT, PRODUCT_OUTPUT),
    ),
}


@dataclasses.dataclass(frozen=True)
class Kept:
    """What a block keeps for its backward pass by name: on the device, and in the host's memory until it is needed."""

    on_device: tuple[str, ...]
    offloaded: tuple[str, ...] = ()

    @classmethod
    def parse(cls, remat: str) -> "Kept | None":
        """Of "keep:NAMES", "offload:NAMES" or "keep:NAMES;offload:NAMES", names by comma; None for another form.

        Raises ValueError for an unknown name and for one that stands twice.
        """
        parts = [part.partition(":") for part in remat.split(";")]
        kinds = [kind for kind, _, _ in parts]
        if kinds not in (["keep"], ["offload"], ["keep", "offload"]):
            return None
        named = {kind: tuple(filter(None, names.split(","))) for kind, _, names in parts}
        every = [name for names in named.values() for name in names]
        for name in every:
            if name not in NAMES:
                raise ValueError(f"model.remat={remat!r}: unknown name {name!r}, there are {', '.join(NAMES)}")
            if every.count(name) > 1:
                raise ValueError(f"model.remat={remat!r}: {name} is named twice")
        return cls(named.get("keep", ()), named.get("offload", ()))


def policy(remat: str) -> Callable[..., Any] | None:
    """The policy of `jax.checkpoint` for a `ModelConfig.remat`; None for "none"."""
    if (kept := Kept.parse(remat)) is None:
        return POLICIES.get(remat)
    if not kept.offloaded:
        return jax.checkpoint_policies.save_only_these_names(*map(name_of, kept.on_device))
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[*map(name_of, kept.on_device)],
        names_which_can_be_offloaded=[*map(name_of, kept.offloaded)],
        offload_src="device",
        offload_dst="pinned_host",
    )


def name_of(name: str) -> str:
    """The name in the program of one of NAMES."""
    return ATTENTION_OUTPUT if name == "attention" else f"{name}_product"


def named(kept: str, x: jax.Array) -> jax.Array:
    """The array under the name by which `kept`, one of NAMES, is kept."""
    return jax.ad_checkpoint.checkpoint_name(x, name_of(kept))


def check(remat: str) -> None:
    """Raises ValueError for what is no `ModelConfig.remat`."""
    if Kept.parse(remat) is None and remat not in (NONE, *POLICIES):
        forms = ", ".join((NONE, *POLICIES, "keep:NAMES", "offload:NAMES", "keep:NAMES;offload:NAMES"))
        raise ValueError(f"model.remat={remat!r}: one of {forms}")
