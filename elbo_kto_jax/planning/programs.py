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
from elbo_kto_jax.data.packing import Rows, Segment, pack
from elbo_kto_jax.diffusion.elbo import CHUNK
from elbo_kto_jax.models import axes, lora
from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.models.network import MaskPredictor
from elbo_kto_jax.planning import hlo
from elbo_kto_jax.planning.chips import Topology
from elbo_kto_jax.planning.workload import Workload
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
    host: int  # in the host's memory: temporaries, and residuals of all micro-batches that wait there
    transferred: int  # residuals that go to the host, or come from there
    resident: int  # what the run keeps on the chip besides, while the program runs
    hbm_bytes: float  # read and written, loop bodies counted once: a lower bound
    cost: hlo.Cost | None  # None: the compiler would not print the program
    compile_seconds: float
    length: int = 0  # tokens of the rows that it takes; 0: none

    def label(self, longest: int) -> str:
        """The name, with the length of rows that are shorter than the longest."""
        return self.name if self.length in (0, longest) else f"{self.name}, rows of {self.length}"

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
    topology: Topology,
    devices: list[jax.Device],
    work: Workload,
    *,
    sampler: bool,
) -> Iterator[Compiled]:
    """The programs of a step, and the sampler's, one after another, for they take minutes.

    `devices` are those of the `topology`, as libtpu describes them. In one pass the residuals of all micro-batches of
    `work` wait at once. Programs that take rows are compiled for the longest that a run may meet, and for those of
    `work`. Where residuals are kept has to be said by the config.

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
    residuals = config.train.residuals
    if residuals == "auto":
        raise ValueError("config.train.residuals: expected one that is resolved, got 'auto'")
    scorer = Scorer(model, mesh, size=config.train.global_batch_size * draws, residuals=residuals)
    programs = build_programs(scorer, objective, draws=draws, tx=tx, shardings=shardings)
    online = objective.needs.reference and config.reference.mode == "online"
    compiler = _Compiler(model_config, mesh, shapes, topology, work, online=online)
    for length in sorted({config.data.max_length, *work.row_lengths}, reverse=True):
        shapes = shapes._replace(rows=_rows(config, model_config, mesh, length))
        if scorer.takes_one_pass:
            yield from _one_pass(compiler, scorer, programs, shapes, work.micro_batches, online=online)
        else:
            yield from _two_passes(compiler, scorer, programs, shapes)
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
    examples = config.train.global_batch_size
    return _Shapes(
        state=state,
        weights=weights,
        rows=_rows(config, model.config, mesh, config.data.max_length),
        estimates=_everywhere((examples * config.estimator.draws,), jnp.float32, mesh),
        cotangent=_everywhere((examples,), jnp.float32, mesh),
        grads=jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=p.sharding), state.params),
    )


def _rows(config: Config, model: ModelConfig, mesh: Mesh, length: int) -> Any:
    """A micro-batch of rows of so many tokens."""
    segment = Segment(np.zeros(1, np.int32), 0, np.ones(1, bool), 1.0, 0)
    (empty,) = pack([segment], layout_of(config, model, mesh)._replace(length=length, shorter=()))
    return jax.tree.map(lambda x: _abstract(x, rules.row_sharding(mesh)), empty)


class _Compiler:
    """Compiles programs for the devices of a mesh, and adds what the run keeps there besides."""

    def __init__(
        self,
        model_config: ModelConfig,
        mesh: Mesh,
        shapes: _Shapes,
        topology: Topology,
        work: Workload,
        *,
        online: bool,
    ):
        self._num_devices, self._mesh, self._model = mesh.devices.size, mesh, model_config
        self._topology, self._visited = topology, dict(work.visited)
        # What stays on the chip: the state, the adapters' base, and an online reference, which adapters have in their
        # base.
        self._held = bytes_on_chip(shapes.weights) + bytes_on_chip(shapes.state.opt_state)
        if online and not isinstance(shapes.weights, lora.Adapted):
            self._held += bytes_on_chip(shapes.state.params)

    def run(
        self, name: str, program: Any, *arguments: Any, kept: Any = (), **options: Any
    ) -> tuple[jax.stages.Compiled, Compiled]:
        """The compiled program and what the compiler says of it; of its arguments, the run keeps `kept` anyway.

        Raises:
          DoesNotFit: the compiler's refusal.
        """
        rows = next((argument for argument in arguments if isinstance(argument, Rows)), None)
        shape = None if rows is None else (rows.tokens.shape[0], rows.tokens.shape[1])
        of_rows = f" of rows of {shape[1]} tokens" if shape else ""
        log.info("compiling %s%s for %d devices", name, of_rows, self._num_devices)
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
            transferred=memory.host_argument_size_in_bytes + memory.host_output_size_in_bytes,
            resident=self._held - bytes_on_chip(kept),
            hbm_bytes=(compiled.cost_analysis() or {}).get("bytes accessed", 0.0),
            cost=self._cost(name, compiled, shape),
            compile_seconds=seconds,
            length=shape[1] if shape else 0,
        )

    def _cost(self, name: str, compiled: jax.stages.Compiled, rows: tuple[int, int] | None) -> hlo.Cost | None:
        """What the program costs as its text says, given the shape of its rows; None where that is not known."""
        try:
            text = compiled.as_text()
        except jax.errors.JaxRuntimeError:
            text = None
        if text is None:
            log.warning("%s: libtpu does not print this program: its FLOPs and collectives are not known", name)
            return None
        if name == "sampler":  # how often its loops run depends on the data
            return None
        visited = self._visited.get(rows[1], 1.0) if rows else 1.0  # rows that are not of the typical batch: all
        kernels = kernel_flops(self._model, self._mesh, rows[1], visited) if rows else {}
        trips = math.ceil(rows[1] / 2 / CHUNK) if rows else 0  # of the head's loop: half of a row is scored
        return hlo.program_cost(
            text,
            kernels=kernels,
            dynamic_trips=trips,
            chips=self._num_devices,
            flops_per_byte=lambda group: self._topology.chip.flops / self._topology.bandwidth(group),
        )


def _two_passes(compiler: _Compiler, scorer: Scorer, programs: Programs, shapes: _Shapes) -> Iterator[Compiled]:
    """The scoring and the gradient of a step in two passes."""
    weights, estimates, rows = shapes.weights, shapes.estimates, shapes.rows
    yield compiler.run("score", scorer.score, weights, estimates, rows, kept=weights)[1]
    arguments = (weights, shapes.grads, estimates, rows, shapes.cotangent)
    yield compiler.run("grad", programs.grad, *arguments, kept=weights)[1]


def _one_pass(
    compiler: _Compiler,
    scorer: Scorer,
    programs: Programs,
    shapes: _Shapes,
    micro_batches: int,
    *,
    online: bool,
) -> Iterator[Compiled]:
    """The forward and the backward pass of a step that keeps all its micro-batches between them."""
    arguments = shapes.weights, shapes.estimates, shapes.rows
    forward, found = compiler.run("forward", scorer.forward, *arguments, kept=shapes.weights)
    handed_out = found.outputs - found.aliased  # what a backward pass needs
    # Beside the last of them, or all while the reference is scored; beside the first to go back, the others.
    waiting = micro_batches - 1 + online
    yield _beside(found, waiting * handed_out, micro_batches * found.transferred)
    _, pull_back = jax.tree.map(_abstract, scorer.forward.eval_shape(*arguments), forward.output_shardings)
    total = shapes.grads if micro_batches > 1 else None
    to_go_back = pull_back, shapes.weights, total, shapes.rows, shapes.cotangent
    found = compiler.run("backward", programs.backward, *to_go_back, kept=shapes.weights)[1]
    yield _beside(found, (micro_batches - 1) * handed_out, micro_batches * found.transferred)


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


def _beside(program: Compiled, on_chip: int, on_host: int) -> Compiled:
    """The program with so many bytes more that lie beside it."""
    return dataclasses.replace(program, resident=program.resident + on_chip, host=program.host + on_host)


def bytes_on_chip(tree: Any) -> int:
    """Bytes of one device's part of abstract arrays."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape), dtype=np.int64)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def kernel_flops(model: ModelConfig, mesh: Mesh, length: int, visited: float) -> dict[str, float]:
    """FLOPs of one call of splash attention on one device, which is for one row of `length` tokens.

    Two products forward and five backward, of that part of the blocks which is `visited`.
    """
    length = -(-length // 128) * 128
    product = 2.0 * (model.n_heads // mesh.shape["tensor"]) * model.head_dim * length**2 * visited
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
