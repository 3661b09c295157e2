"""Builds the compiled functions of a config's run, for training and for ahead-of-time compilation alike."""

import dataclasses
from collections.abc import Callable, Sequence

import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from safelm.data.channels import Channel
from safelm.models import attention_kernels, lora, product_kernels
from safelm.models import decoder as model
from safelm.models.decoder import ModelConfig
from safelm.models.loss import LossSums
from safelm.train import compiler, fused_adamw
from safelm.train import step as train_step
from safelm.train.data import make_schedule
from safelm.train.optimizer import make_optimizer
from safelm.train.types import Batch, Params


def make_program(
    config: ConfigDict, model_config: ModelConfig, mesh: Mesh, harm_tag_id: int | None = None
) -> tuple[train_step.Program, attention_kernels.Choice]:
    """The program of a resolved config for a mesh, and the attention kernel settled for its devices.

    `harm_tag_id` as in `train_step.make_program`: of a run that tells kinds of tokens apart.

    Raises ValueError for sizes that don't divide over the mesh, and for kernels that can't run on it.
    """
    optimizer = configured_optimizer(config.optimizer, model_config)
    attention = attention_kernels.choose(model_config, config.seq_len, mesh)
    products = product_kernels.choose(model_config, mesh)
    program = train_step.make_program(
        dataclasses.replace(model_config, attention=attention.kernel, products=products.kernel),
        optimizer,
        mesh,
        batch_size=config.batch_size,
        grad_accum_steps=config.grad_accum_steps,
        z_loss=config.loss.z_loss,
        vocab_chunks=config.loss.vocab_chunks,
        harm_tag_id=harm_tag_id,
        routes=model_config.routed.routes(make_schedule(config).sources) if model_config.routed else (),
        fused=fused_adamw.choose(config.optimizer, model_config, mesh),
    )
    return program, attention


def configured_optimizer(fields: ConfigDict, model_config: ModelConfig) -> optax.GradientTransformation:
    """The optimizer of `config.optimizer` for what is trained of a model's parameters."""
    names = ("name", "b1", "b2", "eps", "momentum", "weight_decay", "clip_norm")
    axes, _ = lora.split(model_config, model.logical_axes(model_config))
    return make_optimizer(**{name: fields[name] for name in names}, axes=axes)


def compile_ahead(
    program: train_step.Program, config: ConfigDict, channels: Sequence[Channel], *, has_evaluation: bool
) -> tuple[
    Callable[[train_step.TrainState, Batch, train_step.Controls], tuple[train_step.TrainState, train_step.StepMetrics]],
    Callable[[Params, Batch], LossSums] | None,
]:
    """The update and the evaluation, compiled before the first step so that nothing later has to wait for it.

    `channels`: what batches have beside the loss weight. `config.compiler_options` are the update's, those of another
    platform left out. Raises ValueError for one that the compiler refuses.
    """

    def batch(rows: int) -> Batch:
        return train_step.abstract_batch(program, rows, config.seq_len, channels)

    state = program.abstract_state
    controls = train_step.abstract_controls(program.batch_sharding.mesh)
    lowered = program.step.lower(state, batch(config.batch_size), controls)
    platform = program.batch_sharding.mesh.devices.flat[0].platform
    update = compiler.compile_with(lowered, config.compiler_options, platform)
    if not has_evaluation:
        return update, None
    micro_batch = batch(config.batch_size // config.grad_accum_steps)
    return update, program.evaluate.lower(state.params, micro_batch).compile()
