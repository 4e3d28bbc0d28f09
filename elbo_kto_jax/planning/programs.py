"""The programs of a run, compiled for a TPU that is not there, and what the compiler says of them.

They are the very programs of training/step.py and sampling/denoise.py, on shapes instead of arrays.
"""

import dataclasses
import importlib.metadata
import logging
import math
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh

from elbo_kto_jax import objectives
from elbo_kto_jax.data.packing import Segment, pack
from elbo_kto_jax.diffusion.elbo import CHUNK
from elbo_kto_jax.models import axes, lora
from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.models.network import MaskPredictor
from elbo_kto_jax.planning import hlo
from elbo_kto_jax.planning.chips import Topology
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.sampling.denoise import take_steps
from elbo_kto_jax.sampling.rows import DecodeRows, DecodeState
from elbo_kto_jax.scoring.layout import layout_of
from elbo_kto_jax.scoring.opened import build_model
from elbo_kto_jax.scoring.scorer import Scorer
from elbo_kto_jax.sharding import rules
from elbo_kto_jax.training import state as train_state
from elbo_kto_jax.training.step import Programs, build_programs

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


def versions() -> dict[str, str]:
    """The jax and the libtpu that compile: with another libtpu a program may need a quarter more memory, or less."""
    try:
        libtpu = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        libtpu = "not installed"
    return {"jax": jax.__version__, "libtpu": libtpu}


def topology_devices(topology: Topology) -> list[jax.Device]:
    """The devices of a slice, described by libtpu.

    A slice of one chip is said to have hosts of one chip: libtpu takes hosts for 2x2 unless told, and some versions of
    it then refuse a 1x1.

    Raises:
      UserError: libtpu does not know the name.
    """
    hosts = {"chips_per_host_bounds": (1, 1, 1)} if topology.devices == 1 else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **hosts).devices)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology={topology.name}: libtpu says: {str(error).splitlines()[0]}") from None


def compile_programs(
    config: Config,
    model_config: ModelConfig,
    devices: list[jax.Device],
    *,
    topology: Topology,
    waiting: int,
    sampler: bool,
) -> Iterator[Compiled]:
    """The programs of a step, and the sampler's, one after another, for they take minutes.

    `devices` are those of the `topology`, as libtpu describes them. `waiting` is how many micro-batches wait for their
    backward pass at once in one pass; 0: two passes.

    Raises:
      UserError: the model, the mesh and the shapes do not fit together.
      DoesNotFit: the compiler's refusal.
    """
    model_config = with_some_tokens(model_config)
    mesh = rules.make_mesh(config.mesh, devices)
    log.info("mesh: %s", ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items()))
    axes.check_heads(model_config, mesh)
    model = build_model(config, model_config)
    tx = train_state.optimizer(config.optimizer, _STEPS)
    shardings = train_state.state_shardings(tx, train_state.abstract_trained(model, config.lora), mesh, model_config)
    shapes = _shapes(config, model, mesh, tx, shardings)
    objective, draws = objectives.build(config.objective), config.estimator.draws
    scorer = Scorer(model, mesh, size=config.train.global_batch_size * draws)
    programs = build_programs(scorer, objective, draws=draws, tx=tx, shardings=shardings)
    online = objective.needs.reference and config.reference.mode == "online"
    compiler = _Compiler(config, model_config, mesh, shapes, topology, online=online)
    if waiting:
        accumulates = config.train.one_pass_microbatches > 1
        yield from _one_pass(compiler, scorer, programs, shapes, waiting, online=online, accumulates=accumulates)
    else:
        weights, estimates, rows = shapes.weights, shapes.estimates, shapes.rows
        yield compiler.run("score", scorer.score, weights, estimates, rows, kept=weights)[1]
        arguments = (weights, shapes.grads, estimates, rows, shapes.cotangent)
        yield compiler.run("grad", programs.grad, *arguments, kept=weights)[1]
    loss, go = (_everywhere((), dtype, mesh) for dtype in (jnp.float32, jnp.bool_))
    yield compiler.run("update", programs.update, shapes.state, shapes.grads, loss, go, kept=shapes.state)[1]
    if sampler:
        yield _sampler(compiler, config, model.clone(mesh=mesh), lora.parameters(shapes.weights), mesh)


def with_some_tokens(model: ModelConfig) -> ModelConfig:
    """`model` with every special token: without a tokenizer nobody may say them, and no cost depends on them."""
    said = (model.mask_token_id, model.eos_token_id, model.pad_token_id)
    mask_id, eos_id, pad_id = (0 if token is None else token for token in said)
    return dataclasses.replace(model, mask_token_id=mask_id, eos_token_id=eos_id, pad_token_id=pad_id)


class _Shapes(NamedTuple):
    """What the programs of a step are given, as shapes on the devices of a mesh."""

    state: Any
    weights: Any  # the parameters of the state, or its adapters and their base
    rows: Any  # a micro-batch
    estimates: jax.ShapeDtypeStruct
    cotangent: jax.ShapeDtypeStruct
    grads: Any


def _shapes(
    config: Config, model: MaskPredictor, mesh: Mesh, tx: optax.GradientTransformation, shardings: Any
) -> _Shapes:
    """The arguments of a step's programs; `shardings` are those of the state."""
    state = train_state.abstract_state(tx, train_state.abstract_trained(model, config.lora), shardings)
    weights = state.params
    if config.lora.rank:
        base = train_state.abstract_base(model, config.lora)
        base = jax.tree.map(_abstract, base, axes.param_shardings(base, mesh, model.config))
        scale: Any = _everywhere((model.config.n_layers,), jnp.float32, mesh)
        weights = lora.Adapted(base, state.params, scale)
    segment = Segment(np.zeros(1, np.int32), 0, np.ones(1, bool), 1.0, 0)
    empty = pack([segment], layout_of(config, model.config, mesh))[0]
    examples = config.train.global_batch_size
    return _Shapes(
        state=state,
        weights=weights,
        rows=jax.tree.map(lambda x: _abstract(x, rules.row_sharding(mesh)), empty),
        estimates=_everywhere((examples * config.estimator.draws,), jnp.float32, mesh),
        cotangent=_everywhere((examples,), jnp.float32, mesh),
        grads=jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=p.sharding), state.params),
    )


class _Compiler:
    """Compiles programs for the devices of a mesh, and adds what the run keeps there besides."""

    def __init__(
        self,
        config: Config,
        model_config: ModelConfig,
        mesh: Mesh,
        shapes: _Shapes,
        topology: Topology,
        *,
        online: bool,
    ):
        self._num_devices, self._topology = mesh.devices.size, topology
        # What stays on the chip: the state, the adapters' base, and an online reference, which adapters have in their
        # base.
        self._held = bytes_on_chip(shapes.weights) + bytes_on_chip(shapes.state.opt_state)
        if online and not config.lora.rank:
            self._held += bytes_on_chip(shapes.state.params)
        self._kernels = kernel_flops(model_config, mesh, shapes.rows.tokens.shape)
        self._trips = math.ceil(config.data.max_length / 2 / CHUNK)  # of the head's loop: half of a row is scored

    def run(
        self, name: str, program: Any, *arguments: Any, kept: Any = (), **options: Any
    ) -> tuple[jax.stages.Compiled, Compiled]:
        """The compiled program and what the compiler says of it; of its arguments, the run keeps `kept` anyway.

        Raises:
          DoesNotFit: the compiler's refusal.
        """
        log.info("compiling %s for %d devices", name, self._num_devices)
        began = time.monotonic()
        try:
            compiled = program.trace(*arguments, **options).lower(lowering_platforms=("tpu",)).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise DoesNotFit(f"{name}: {_refusal(str(error))}") from None
        seconds = time.monotonic() - began
        memory = compiled.memory_analysis()
        return compiled, Compiled(
            name=name,
            arguments=memory.argument_size_in_bytes,
            outputs=memory.output_size_in_bytes,
            aliased=memory.alias_size_in_bytes,
            temporaries=memory.temp_size_in_bytes,
            host=memory.host_temp_size_in_bytes,
            resident=self._held - bytes_on_chip(kept),
            hbm_bytes=(compiled.cost_analysis() or {}).get("bytes accessed", 0.0),
            cost=self._cost(name, compiled),
            compile_seconds=seconds,
        )

    def _cost(self, name: str, compiled: jax.stages.Compiled) -> hlo.Cost | None:
        """What the program costs as its text says; None where that is not known."""
        try:
            text = compiled.as_text()
        except jax.errors.JaxRuntimeError:
            text = None
        if text is None:
            log.warning("%s: libtpu does not print this program: its FLOPs and collectives are not known", name)
            return None
        if name == "sampler":  # how often its loops run depends on the data
            return None
        return hlo.program_cost(
            text,
            kernels=self._kernels,
            dynamic_trips=self._trips,
            chips=self._num_devices,
            flops_per_byte=lambda group: self._topology.chip.flops / self._topology.bandwidth(group),
        )


def _one_pass(
    compiler: _Compiler,
    scorer: Scorer,
    programs: Programs,
    shapes: _Shapes,
    waiting: int,
    *,
    online: bool,
    accumulates: bool,
) -> Iterator[Compiled]:
    """The forward and the backward pass of a step whose `waiting` micro-batches are kept between them."""
    arguments = shapes.weights, shapes.estimates, shapes.rows
    forward, found = compiler.run("forward", scorer.forward, *arguments, kept=shapes.weights)
    handed_out = found.outputs - found.aliased  # what a backward pass needs
    # Beside the last of them, or all while the reference is scored; beside the first to go back, the others.
    yield _beside(found, (waiting - 1 + online) * handed_out)
    _, pull_back = jax.tree.map(_abstract, scorer.forward.eval_shape(*arguments), forward.output_shardings)
    total = shapes.grads if accumulates else None
    to_go_back = pull_back, shapes.weights, total, shapes.rows, shapes.cotangent
    found = compiler.run("backward", programs.backward, *to_go_back, kept=shapes.weights)[1]
    yield _beside(found, (waiting - 1) * handed_out)


def _sampler(compiler: _Compiler, config: Config, model: MaskPredictor, params: Any, mesh: Mesh) -> Compiled:
    """The sampler's program for a whole batch of prompts."""
    shards = rules.row_shards(mesh)
    b = -(-config.sampler.batch_size // shards) * shards
    g, by_row = config.sampler.gen_length, rules.row_sharding(mesh)

    def row(*shape: int, dtype: Any = jnp.int32) -> Any:  # in the place of an array
        return jax.ShapeDtypeStruct((b, *shape), dtype, sharding=by_row)

    count: Any = _everywhere((), jnp.int32, mesh)
    rows = DecodeRows(row(PROMPT_TOKENS), row(), row(2, dtype=jnp.uint32), row(), row(), row())
    state = DecodeState(row(g), row(g), row(g, dtype=jnp.float32), row(), count)
    options = {"options": config.sampler, "eot_id": 0, "mesh": mesh, "window": None}
    return compiler.run("sampler", take_steps, model, params, rows, state, None, count, kept=params, **options)[1]


def _everywhere(shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """An array that every device of the mesh has whole."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=rules.replicated(mesh))


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
