"""What a training step needs of a device's memory: estimates, made before anything is compiled."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import jax.numpy as jnp

from elbo_kto_jax import objectives
from elbo_kto_jax.models import registry
from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.models.flops import layer_matrices
from elbo_kto_jax.runtime.config import Config


def parameters(model: ModelConfig) -> int:
    """Numbers in all parameters."""
    return sum(row.size for row in registry.parameters(model).values())


def adapters(model: ModelConfig, rank: int, targets: Collection[str] = ()) -> int:
    """Weights in the adapters of all matrices of the blocks, or of the `targets`."""
    matrices = [row for row in registry.parameters(model).values() if row.is_matrix]
    shapes = [row.shape for row in matrices if not targets or row.path[1] in targets]
    return sum(layers * rank * (rows + columns) for layers, rows, columns in shapes)


def residual_bytes(config: Config, model: ModelConfig, tensor: int) -> float:
    """Bytes of one device that the layers keep of a micro-batch's forward pass, on a mesh with that `tensor` axis."""
    tokens = max(1, config.train.microbatch_tokens // config.data.max_length) * config.data.max_length
    d, f = model.d_model, model.mlp_hidden_size / tensor
    attention = model.n_heads * model.head_dim / tensor
    numbers = {
        "full": d,
        "attention": d + attention,
        "most": 2 * d + 4 * attention + d + f,
        "dots": 2 * d + 4 * attention + d + 2 * f,
        "none": 6 * d + 6 * attention + 5 * f,
    }[config.model.remat]
    return tokens * model.n_layers * numbers * jnp.dtype(config.model.dtype).itemsize


class StepMemory(NamedTuple):
    """Bytes of one device while the gradient's program runs, and of what lies beside it."""

    parameters: float  # that are trained
    optimizer: float  # Adam's moments
    gradients: float  # of a micro-batch, and the sum of several
    residuals: float  # that wait for their backward pass, one micro-batch's at least
    base: float  # the frozen weights under adapters
    reference: float  # the weights of a reference that scores in every step
    working: float  # what a layer or the head needs while it is computed


def step_memory(config: Config, model: ModelConfig, mesh: Mapping[str, int], waiting: int) -> StepMemory:
    """The memory of a step, part by part; for the arguments see `step_bytes`."""
    item, stored = jnp.dtype(config.model.dtype).itemsize, jnp.dtype(config.model.param_dtype).itemsize
    whole = parameters(model) / (mesh["fsdp"] * mesh["tensor"])
    trained, base, reference = whole, 0.0, 0.0
    if config.lora.rank:
        base = whole * (1 if config.lora.base_quantization == "int8" else item)
        trained *= adapters(model, config.lora.rank, config.lora.targets) / parameters(model)
    elif config.reference.mode == "online" and objectives.build(config.objective).needs.reference:
        reference = whole * stored
    accumulator = 0 if waiting == 1 else 4
    tokens = max(1, config.train.microbatch_tokens // config.data.max_length) * config.data.max_length
    d, f = model.d_model, model.mlp_hidden_size / mesh["tensor"]
    head = model.d_model * model.embedding_size / mesh["tensor"] * (2 * item + 4)
    layer = 2 * 2 * layer_matrices(model) / mesh["tensor"] * item + tokens * (8 * d + 4 * f) * item
    return StepMemory(
        parameters=trained * stored,
        optimizer=trained * 2 * jnp.dtype(config.optimizer.moments_dtype).itemsize,
        gradients=trained * (accumulator + stored),
        residuals=max(1, waiting) * residual_bytes(config, model, mesh["tensor"]),
        base=base,
        reference=reference,
        working=max(head, layer) + 12 * tokens * d,
    )


def step_bytes(config: Config, model: ModelConfig, mesh: Mapping[str, int], waiting: int) -> float:
    """Bytes of one device while the gradient's program runs, and of what lies beside it; within a sixth of the truth.

    `mesh` has the sizes of the axes fsdp and tensor. `waiting`: micro-batches whose residuals wait on the device for
    their backward pass; 0: none do.
    """
    return sum(step_memory(config, model, mesh, waiting))
