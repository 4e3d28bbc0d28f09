"""The programs of a run, compiled for a TPU that is not there, and what the compiler says of them.

They are the very programs of training/step.py and sampling/denoise.py, on shapes instead of arrays.
"""

import dataclasses
import logging
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from elbo_kto_jax import objectives
from elbo_kto_jax.data.packing import Segment, pack
from elbo_kto_jax.diffusion.elbo import CHUNK
from elbo_kto_jax.models import lora
from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.models.network import MaskPredictor
from elbo_kto_jax.planning import hlo
from elbo_kto_jax.planning.chips import Topology
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.sampling.denoise import take_steps
from elbo_kto_jax.sampling.rows import DecodeRows, DecodeState
from elbo_kto_jax.scoring.layout import layout_of
from elbo_kto_jax.scoring.scorer import Scorer
from elbo_kto_jax.sharding import rules
from elbo_kto_jax.training import state as train_state
from elbo_kto_jax.training.setup import build_model
from elbo_kto_jax.training.step import build_programs

log = logging.getLogger(__name__)
PROMPT_TOKENS = 512  # of the prompts that the sampler's program is compiled for
_STEPS = 1000  # the schedule's length is a constant of the update and changes nothing else


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One program on one chip; bytes as the compiler reports them."""

    name: str
    arguments: int
    outputs: int
    aliased: int  # outputs that take the place of arguments
    temporaries: int
    host: int  # of temporaries, in the host's memory
    resident: int  # what the run keeps on the chip besides, while the program runs
    hbm_bytes: float  # read and written, loop bodies counted once: a lower bound
    cost: hlo.Cost | None  # None: the compiler would not print the program
    compile_seconds: float

    @property
    def bytes_per_chip(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.resident


class DoesNotFit(Exception):
    """The compiler refused a program for want of memory; its words."""


def topology_devices(topology: Topology) -> list[jax.Device]:
    """The devices of a slice, described by libtpu.

    Raises:
      UserError: libtpu does not know the name.
    """
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology={topology.name}: libtpu says: {str(error).splitlines()[0]}") from None


def compile_programs(
    config: Config, model_config: ModelConfig, devices: list[jax.Device], *, waiting: int, sampler: bool
) -> Iterator[Compiled]:
    """The programs of a step, and the sampler's, one after another, for they take minutes.

    `waiting` is how many micro-batches wait for their backward pass at once in one pass; 0: two passes.

    Raises:
      UserError: the model, the mesh and the shapes do not fit together.
      DoesNotFit: the compiler's refusal.
    """
    mesh = rules.make_mesh(config.mesh, devices)
    log.info("mesh: %s", ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items()))
    rules.check_heads(model_config, mesh)
    model = build_model(config, model_config)
    trained = train_state.abstract_trained(model, config.lora)
    tx = train_state.optimizer(config.optimizer, _STEPS)
    shardings = train_state.state_shardings(tx, trained, mesh, model_config)
    state = train_state.abstract_state(tx, trained, shardings)
    weights = state.params
    if config.lora.rank:
        base = train_state.abstract_base(model, config.lora)
        base = jax.tree.map(_abstract, base, rules.param_shardings(base, mesh, model_config))
        scale = jax.ShapeDtypeStruct((model_config.n_layers,), jnp.float32, sharding=rules.replicated(mesh))
        weights = lora.Adapted(base, state.params, scale)
    draws, examples = config.estimator.draws, config.train.global_batch_size
    objective, scorer = objectives.build(config.objective), Scorer(model, mesh, size=examples * draws)
    programs = build_programs(scorer, objective, draws=draws, tx=tx, shardings=shardings)
    everywhere = rules.replicated(mesh)
    empty = pack([Segment(np.zeros(1, np.int32), 0, np.ones(1, bool), 1.0, 0)], layout_of(config, model_config, mesh))[
        0
    ]
    rows = jax.tree.map(lambda x: _abstract(x, rules.row_sharding(mesh)), empty)
    estimates = jax.ShapeDtypeStruct((examples * draws,), jnp.float32, sharding=everywhere)
    cotangent = jax.ShapeDtypeStruct((examples,), jnp.float32, sharding=everywhere)
    grads = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=p.sharding), state.params)

    # What stays on the chip: the state, the adapters' base, and an online reference, which adapters have in their base.
    online = objective.needs.reference and config.reference.mode == "online"
    held = bytes_on_chip(weights) + bytes_on_chip(state.opt_state)
    if online and not config.lora.rank:
        held += bytes_on_chip(state.params)
    kernels = kernel_flops(model_config, mesh, empty.tokens.shape)
    trips = math.ceil(config.data.max_length / 2 / CHUNK)  # of the head's loop: half of a row is scored

    def run(name: str, program: Callable, *arguments: Any, kept: Any = (), **options: Any):
        log.info("compiling %s for %d devices", name, len(devices))
        began = time.monotonic()
        try:
            compiled = program.trace(*arguments, **options).lower(lowering_platforms=("tpu",)).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise DoesNotFit(f"{name}: {_refusal(str(error))}") from None
        seconds = time.monotonic() - began
        memory, cost = compiled.memory_analysis(), None
        try:
            text = compiled.as_text()
        except jax.errors.JaxRuntimeError:
            log.warning("%s: libtpu does not print this program: its FLOPs and collectives are not known", name)
        else:
            if name != "sampler":  # how often its loops run depends on the data
                cost = hlo.program_cost(text, kernels=kernels, dynamic_trips=trips, chips=len(devices))
        return compiled, Compiled(
            name=name,
            arguments=memory.argument_size_in_bytes,
            outputs=memory.output_size_in_bytes,
            aliased=memory.alias_size_in_bytes,
            temporaries=memory.temp_size_in_bytes,
            host=memory.host_temp_size_in_bytes,
            resident=held - bytes_on_chip(kept),
            hbm_bytes=(compiled.cost_analysis() or {}).get("bytes accessed", 0.0),
            cost=cost,
            compile_seconds=seconds,
        )

    if waiting:
        arguments = weights, estimates, rows
        forward, found = run("forward", scorer.forward, *arguments, kept=weights)
        handed_out = found.outputs - found.aliased  # what a backward pass needs
        # Beside the last of them, or all while the reference is scored; beside the first to go back, the others.
        yield _beside(found, (waiting - 1 + online) * handed_out)
        _, pull_back = jax.tree.map(_abstract, scorer.forward.eval_shape(*arguments), forward.output_shardings)
        total = grads if config.train.one_pass_microbatches > 1 else None
        found = run("backward", programs.backward, pull_back, weights, total, rows, cotangent, kept=weights)[1]
        yield _beside(found, (waiting - 1) * handed_out)
    else:
        yield run("score", scorer.score, weights, estimates, rows, kept=weights)[1]
        yield run("grad", programs.grad, weights, grads, estimates, rows, cotangent, kept=weights)[1]
    loss, go = (jax.ShapeDtypeStruct((), dtype, sharding=everywhere) for dtype in (jnp.float32, jnp.bool_))
    yield run("update", programs.update, state, grads, loss, go, kept=state)[1]
    if sampler:
        yield _sampler(run, config, model.clone(mesh=mesh), lora.parameters(weights), mesh)


def _sampler(run: Callable, config: Config, model: MaskPredictor, params: Any, mesh: Mesh) -> Compiled:
    shards = rules.row_shards(mesh)
    b = -(-config.sampler.batch_size // shards) * shards
    g, by_row, everywhere = config.sampler.gen_length, rules.row_sharding(mesh), rules.replicated(mesh)
    row = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct((b, *shape), dtype, sharding=by_row)  # noqa: E731
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    rows = DecodeRows(row(PROMPT_TOKENS), row(), row(2, dtype=jnp.uint32), row(), row(), row())
    state = DecodeState(row(g), row(g), row(g, dtype=jnp.float32), row(), count)
    options = {"options": config.sampler, "eot_id": 0, "mesh": mesh, "window": None}
    return run("sampler", take_steps, model, params, rows, state, None, count, kept=params, **options)[1]


def _beside(program: Compiled, size: int) -> Compiled:
    """The program with so many bytes more that lie beside it."""
    return dataclasses.replace(program, resident=program.resident + size)


def bytes_on_chip(tree: Any) -> int:
    """Bytes of one device's part of abstract arrays."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape), dtype=np.int64)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def kernel_flops(model: ModelConfig, mesh: Mesh, tokens_shape: tuple[int, int]) -> dict[str, float]:
    """FLOPs of one call of splash attention on one device: two products forward, five backward, every tile visited."""
    rows, length = tokens_shape[0] // rules.row_shards(mesh), -(-tokens_shape[1] // 128) * 128
    product = 2.0 * rows * (model.n_heads // mesh.shape["tensor"]) * model.head_dim * length**2
    return {"splash_mha_fwd": 2 * product, "splash_mha_dkv": 5 * product}


def _abstract(x: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _refusal(message: str) -> str:
    """What matters of the compiler's out-of-memory message."""
    found = re.search(r"the total memory required for ([^(]*)\(([^)]*)\) exceeds available HBM \(([^)]*)\)", message)
    if found:
        return f"needs {found[2]} for {found[1].strip()} of {found[3]} HBM"
    used = re.search(r"Used ([\d.]+\w) of ([\d.]+\w)", message)
    return f"needs {used[1]} of {used[2]} HBM" if used else message.splitlines()[0]
