"""The program that scores rows: one ELBO estimate in nats for every draw of every example (docs/method.md 1).

    SCORE      weights, rows  ->  the estimates of the rows' draws
    FORWARD    weights, rows  ->  the same, and the residuals: what a backward pass needs

`Scorer` owns the two, where their arguments are placed, and how far the host may run ahead of the devices. Policy and
reference go through the same program on the same rows, so a reward is exactly 0 while the two have the same parameters,
in bfloat16 too. FORWARD rounds differently from SCORE there, so a batch takes one of the two for both.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32

from elbo_kto_jax.data.packing import Rows
from elbo_kto_jax.diffusion import elbo
from elbo_kto_jax.models import axes, lora
from elbo_kto_jax.models.network import MaskPredictor, Params, head_kernel, head_part
from elbo_kto_jax.sharding import gather, rules

Weights = Params | lora.Adapted  # a whole model, for a pass through it
Estimates = Float32[Array, " size"]  # nats, by Segment.index
Kept = Literal["recompute", "device", "host"]  # where residuals wait: nowhere, there are none; in which memory
_HOST, _DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
# For programs that move residuals. Otherwise libtpu takes the first turn out of the loop over the layers, to fetch
# earlier, and copies the stack of their gradients twice. A fetch runs beside the gathering of the layer's weights.
_WITH_TRANSFERS = {"tpu": {"xla_tpu_pipeline_memory_host_transfers": False}}


class OnHost(NamedTuple):
    """Residuals in the host's memory: those of the layers, which are fetched one by one, and the others.

    The two are trees of one form, and what is not in one is None there.
    """

    layers: Any
    others: Any


class Scorer:
    """Scores micro-batches of rows, whose draws have indices below `size`.

    Attributes:
      size: length of the array of estimates; static.
      residuals: "recompute": a batch goes through SCORE; otherwise through FORWARD, which leaves its residuals there.
      everywhere: the sharding of what every device has whole.
      score: the compiled program (weights, estimates, rows) -> estimates; it takes the estimates over.
      forward: the compiled program (weights, estimates, rows) -> (estimates, residuals).
    """

    def __init__(self, model: MaskPredictor, mesh: Mesh, *, size: int, residuals: Kept = "recompute"):
        self.mesh, self.size, self.residuals = mesh, size, residuals
        self._axes_of = functools.partial(axes.axes_of, model=model.config)
        self._whole, layer = (
            functools.partial(function, mesh=mesh, dtype=model.dtype, axes_of=self._axes_of)
            for function in (gather.whole, gather.layer)
        )
        self._model = model.clone(mesh=mesh, gather=layer)
        self.everywhere = rules.replicated(mesh)
        self.score = jax.jit(self._score, donate_argnums=1, out_shardings=self.everywhere)
        self.forward = self._compiled_forward()
        self.no_estimates = jax.jit(lambda: jnp.zeros(size, jnp.float32), out_shardings=self.everywhere)
        # With more than 32 programs in flight, XLA's CPU devices wait for each other for ever. Elsewhere nothing waits.
        self._waits = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"

    def __call__(self, weights: Weights, micro_batches: Sequence[Rows]) -> Estimates:
        """The estimate of every draw in the micro-batches (on the host, or placed); 0 where there is no draw."""
        estimates = self.no_estimates()
        for rows in self.place(micro_batches):
            arguments = weights, estimates, rows
            scored = self.forward(*arguments)[0] if self.takes_one_pass else self.score(*arguments)
            estimates = self.pace(scored)
        return estimates

    def keeping_residuals(self, weights: Weights, micro_batches: Sequence[Rows]) -> tuple[Estimates, list[Any]]:
        """The same by FORWARD, and the residuals of each micro-batch."""
        estimates, residuals = self.no_estimates(), []
        for rows in self.place(micro_batches):
            estimates, kept = self.pace(self.forward(weights, estimates, rows))
            residuals.append(kept)
        return estimates, residuals

    def keeping(self, residuals: Kept) -> "Scorer":
        """The same scorer, and the same compiled SCORE, with its residuals elsewhere."""
        other = copy.copy(self)
        other.residuals = residuals
        other.forward = other._compiled_forward()
        return other

    @property
    def takes_one_pass(self) -> bool:
        """Whether batches go through FORWARD."""
        return self.residuals != "recompute"

    @property
    def compiler_options(self) -> dict[str, bool]:
        """Of FORWARD and of the program that takes its residuals."""
        return _WITH_TRANSFERS.get(self.mesh.devices.flat[0].platform, {}) if self.residuals == "host" else {}

    def place(self, micro_batches: Sequence[Rows]) -> list[Rows]:
        """The micro-batches on the devices, each device with its rows."""
        by_row = rules.row_sharding(self.mesh)
        return [jax.tree.map(functools.partial(rules.place, sharding=by_row), rows) for rows in micro_batches]

    def place_everywhere(self, tree: Any) -> Any:
        """The arrays of a tree on the devices, whole on each."""
        return jax.tree.map(functools.partial(rules.place, sharding=self.everywhere), tree)

    def pace(self, results: Any) -> Any:
        """The results of a program, once it is safe to start the next one."""
        return jax.block_until_ready(results) if self._waits else results

    # To be traced.

    def estimates(
        self, weights: Weights, rows: Rows, *, keeps_head: bool = True, on_host: bool = False
    ) -> Float32[Array, "m g"]:
        """The estimate of each slot of each row (docs/method.md 1).

        `keeps_head`: the backward pass finds the gathered head, which is as large as a few layers, among the residuals;
        otherwise it gathers it again. `on_host`: the residuals of the layers are in the host's memory.
        """
        params = lora.parameters(weights)
        head = self._head if keeps_head else jax.checkpoint(self._head)
        model = self._model.clone(residuals_on_host=on_host)
        part = functools.partial(self._estimates_of_part, model, head)
        return gather.over_rows(part, self.mesh, params, self._axes_of)(params, rows)

    def _estimates_of_part(
        self, model: MaskPredictor, head: Callable, params: Params, rows: Rows
    ) -> Float32[Array, "part g"]:
        embedded = gather.embed(params["wte"]["embedding"], rows.tokens, self.mesh, model.dtype)
        hidden = model.apply(
            {"params": params}, embedded, rows.positions, rows.segment_ids, method=MaskPredictor.states
        )
        return head(hidden, head_part(params), rows)

    def _head(self, hidden: Float[Array, "part s d"], head: Params, rows: Rows) -> Float32[Array, "part g"]:
        return elbo.elbo_draws(
            hidden,
            head_kernel(self._whole(head)),
            rows.target_position,
            rows.target_token,
            rows.target_slot,
            rows.target_weight,
            rows.num_targets,
            slots=rows.slot_index.shape[1],
        )

    def _compiled_forward(self):
        options = self.compiler_options
        return jax.jit(self._forward, donate_argnums=1, out_shardings=(self.everywhere, None), compiler_options=options)

    def _score(self, weights, estimates, rows):
        return write(estimates, self.estimates(weights, rows), rows)

    def _forward(self, weights, estimates, rows):
        on_host = self.residuals == "host"
        of = functools.partial(self.estimates, keeps_head=False, on_host=on_host)
        values, pull_back = jax.vjp(of, weights, rows)
        # The arguments that it saved are at hand in the backward pass; a program that handed them out would copy them.
        residuals = dataclasses.replace(pull_back, args_res=[])
        return write(estimates, values, rows), _on_host(residuals) if on_host else residuals


def write(estimates: Estimates, values: Float32[Array, "m g"], rows: Rows) -> Estimates:
    """The estimates with those of the rows' slots in their places."""
    return estimates.at[rows.slot_index].set(values, mode="drop")


def pull_back(residuals: Any, weights: Weights, rows: Rows, cotangent: Float32[Array, "m g"]) -> Weights:
    """d (cotangent . estimates) / d weights, from what FORWARD handed out and its arguments; to be traced."""
    if isinstance(residuals, OnHost):
        others = jax.tree.map(lambda x: jax.device_put(x, _DEVICE), residuals.others)
        residuals = jax.tree.map(_first_not_none, residuals.layers, others, is_leaf=_is_none)
    return dataclasses.replace(residuals, args_res=[weights, rows])(cotangent)[0]


def _on_host(residuals: Any) -> OnHost:
    """All residuals in the host's memory, to be traced: the layers have left theirs there already."""
    is_there = jax.tree.map(lambda x: jax.typeof(x).memory_space == _HOST, residuals)
    layers = jax.tree.map(lambda x, there: x if there else None, residuals, is_there)
    others = jax.tree.map(lambda x, there: None if there else jax.device_put(x, _HOST), residuals, is_there)
    return OnHost(layers, others)


def _is_none(x: Any) -> bool:
    return x is None


def _first_not_none(x: Any, other: Any) -> Any:
    return other if x is None else x
