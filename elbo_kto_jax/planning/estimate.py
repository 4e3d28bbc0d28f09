"""Estimates, made before anything is compiled: they order the candidates of a search, and no more."""

from collections import Counter
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.models.flops import forward_flops, layer_matrices
from elbo_kto_jax.models.memory import parameters
from elbo_kto_jax.planning import hlo
from elbo_kto_jax.planning.chips import Topology
from elbo_kto_jax.planning.workload import Workload
from elbo_kto_jax.runtime.config import Config


def row_flops(model: ModelConfig, length: int) -> float:
    """FLOPs of a forward pass over one whole row of which half is scored."""
    return forward_flops(model, np.array([length]), np.array([length / 2]))


def text_flops(model: ModelConfig, lengths: Sequence[int]) -> float:
    """FLOPs of a forward pass over sequences of so many tokens, of which half are scored."""
    tokens = np.array(lengths)
    return forward_flops(model, tokens, tokens / 2)


def recomputed(model: ModelConfig, remat: str, length: int) -> float:
    """The part of a forward pass that the backward pass computes again."""
    layer = 2 * layer_matrices(model) + 4 * model.n_heads * model.head_dim * length  # FLOPs per token
    again = {
        "full": layer - 2 * model.d_model * model.mlp_hidden_size,  # all but ff_out, which nothing needs
        "attention": 2 * layer_matrices(model) - 2 * model.d_model * model.mlp_hidden_size,
        "most": 2 * model.d_model * model.mlp_hidden_size,  # up_proj
        "dots": 0.0,
        "none": 0.0,
    }[remat]
    return again * model.n_layers * length / row_flops(model, length)


def estimated_cost(name: str, config: Config, model: ModelConfig, mesh: dict[str, int], length: int) -> hlo.Cost:
    """What a program for rows of `length` costs if the compiler does as expected and overlaps all collectives."""
    if name == "update":
        return hlo.Cost(0.0, ())
    per_chip = max(1, config.train.microbatch_tokens // config.data.max_length)
    forward = per_chip * row_flops(model, length) / mesh["tensor"]
    again = recomputed(model, config.model.remat, length)
    back = 2 - bool(config.lora.rank) + again
    passes = {"score": 1, "forward": 1, "grad": 1 + back, "backward": back}[name]
    whole = parameters(model) * jnp.dtype(config.model.dtype).itemsize / mesh["tensor"]
    sent = whole * (mesh["fsdp"] - 1) / mesh["fsdp"]
    gathers = {"score": 1, "forward": 1, "grad": 2, "backward": 1}[name]
    found = []
    if mesh["fsdp"] > 1:
        found.append(hlo.Collective("all-gather", sent, mesh["fsdp"], True, gathers))
    if name in ("grad", "backward") and not config.lora.rank:  # adapters' gradients are small
        if mesh["fsdp"] > 1:
            found.append(hlo.Collective("reduce-scatter", sent, mesh["fsdp"], True, 1))
        if mesh["data"] > 1:
            shared = 2 * parameters(model) * 4 / mesh["tensor"] / mesh["fsdp"]
            found.append(hlo.Collective("all-reduce", shared, mesh["data"], False, 1))
    if mesh["tensor"] > 1:
        states = 2 * per_chip * length * model.d_model * jnp.dtype(config.model.dtype).itemsize
        times = 2 * model.n_layers * (gathers + (name in ("grad", "backward")))
        found.append(hlo.Collective("all-reduce", states, mesh["tensor"], False, times))
    return hlo.Cost(passes * forward, tuple(found))


def estimated_step(
    config: Config, model: ModelConfig, topology: Topology, work: Workload, mesh: dict[str, int]
) -> float:
    """Seconds of a step by estimate; collectives of the update and HBM are left out."""

    def seconds(name: str, length: int) -> float:
        cost = estimated_cost(name, config, model, mesh, length)
        waits = {
            overlapped: sum(
                c.bytes * c.times / topology.bandwidth(c.group) for c in cost.collectives if c.overlapped == overlapped
            )
            for overlapped in (True, False)
        }
        return max(cost.flops / topology.chip.flops, waits[True]) + waits[False]

    names = ("forward", "backward") if work.one_pass else ("score", "grad")
    of_each = Counter(work.row_lengths)
    return sum(times * seconds(name, length) for length, times in of_each.items() for name in names)
