"""AdamW in one pass over memory, on one CPU.

XLA makes a pass of each part of an update: the mean gradient, its norm, the clip, both moments, their corrections, the
choice between the new and the old. With more parameters than caches hold a step of few tokens waits for them. The state
is optax's, so checkpoints are the same.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from safelm.models import cpu_kernels, lora
from safelm.models import decoder as model
from safelm.models.arrays import Params
from safelm.models.decoder import ModelConfig
from safelm.train.optimizer import decayed

LEAST_PARAMETERS = 2**24  # below, caches hold them, and XLA's passes cost little


@dataclasses.dataclass(frozen=True)
class FusedAdamW:
    """The update of `make_optimizer(name="adamw")`, to rounding."""

    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float
    is_decayed: tuple[bool, ...]  # of every parameter, in the order of the tree's leaves

    def norm(self, gradients: Params, divisor: Float[Array, ""]) -> Float[Array, ""]:
        """The global norm of the mean gradient."""
        return jnp.sqrt(cpu_kernels.squared_norm(jax.tree.leaves(gradients))) / divisor

    def update(
        self,
        params: Params,
        opt_state: optax.OptState,
        gradients: Params,
        *,
        norm: Float[Array, ""],
        divisor: Float[Array, ""],
        learning_rate: Float[Array, ""],
        is_applied: Bool[Array, ""],
    ) -> tuple[Params, optax.OptState]:
        """Parameters and state after an update, or as they were.

        Args:
          gradients: not yet divided by `divisor`; `norm` is that of the divided ones.
        """
        adam = next(state for state in opt_state if isinstance(state, optax.ScaleByAdamState))
        count = adam.count + is_applied.astype(adam.count.dtype)
        clipped = self.clip_norm / jnp.maximum(norm, self.clip_norm) if self.clip_norm else 1.0
        structure = jax.tree.structure(params)
        new = cpu_kernels.adamw(
            *(jax.tree.leaves(tree) for tree in (params, adam.mu, adam.nu, gradients)),
            scale=clipped / divisor,
            learning_rate=learning_rate,
            corrections=tuple(1 - b ** jnp.float32(count) for b in (self.b1, self.b2)),
            is_applied=is_applied,
            b1=self.b1,
            b2=self.b2,
            eps=self.eps,
            decays=[self.weight_decay if is_decayed else 0.0 for is_decayed in self.is_decayed],
        )
        params, mu, nu = (jax.tree.unflatten(structure, leaves) for leaves in new)
        moved = adam._replace(count=count, mu=mu, nu=nu)
        return params, tuple(moved if state is adam else state for state in opt_state)


def choose(fields: ConfigDict, config: ModelConfig, mesh: Mesh) -> FusedAdamW | None:
    """The update for `config.optimizer` where it pays and can run: many parameters in float32 on one CPU; else None."""
    if fields.name != "adamw" or config.products == "xla" or config.param_dtype != "float32":
        return None
    if mesh.size > 1 or mesh.devices.flat[0].platform != "cpu" or cpu_kernels.refusal():
        return None
    trained, _ = lora.split(config, model.abstract_params(config))
    if sum(leaf.size for leaf in jax.tree.leaves(trained)) < LEAST_PARAMETERS:
        return None
    axes, _ = lora.split(config, model.logical_axes(config))
    flags = tuple(jax.tree.leaves(decayed(axes)))
    return FusedAdamW(fields.b1, fields.b2, fields.eps, fields.weight_decay, fields.clip_norm, flags)
