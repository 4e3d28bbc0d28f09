"""The program that scores rows: one ELBO estimate in nats for every draw of every example (docs/method.md 1).

    SCORE      weights, rows  ->  the estimates of the rows' draws
    FORWARD    weights, rows  ->  the same, and what a backward pass needs

`Scorer` owns the two, where their arguments are placed, and how far the host may run ahead of the devices. Policy and
reference go through the same program on the same rows, so a reward is exactly 0 while the two have the same parameters,
in bfloat16 too. FORWARD rounds differently from SCORE there, so a batch takes one of the two for both.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

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


class Scorer:
    """Scores micro-batches of rows, whose draws have indices below `size`.

    Attributes:
      size: length of the array of estimates; static.
      one_pass_microbatches: a batch of at most so many micro-batches goes through FORWARD, every other through SCORE.
      everywhere: the sharding of what every device has whole.
      score: the compiled program (weights, estimates, rows) -> estimates; it takes the estimates over.
      forward: the compiled program (weights, estimates, rows) -> (estimates, residuals).
    """

    def __init__(self, model: MaskPredictor, mesh: Mesh, *, size: int, one_pass_microbatches: int = 0):
        self.mesh, self.size, self.one_pass_microbatches = mesh, size, one_pass_microbatches
        self._axes_of = functools.partial(axes.axes_of, model=model.config)
        self._whole = functools.partial(gather.whole, mesh=mesh, dtype=model.dtype, axes_of=self._axes_of)
        self._model = model.clone(mesh=mesh, gather=functools.partial(self._whole, prefix="blocks/"))
        self.everywhere = rules.replicated(mesh)
        self.score = jax.jit(self._score, donate_argnums=1, out_shardings=self.everywhere)
        self.forward = jax.jit(self._forward, donate_argnums=1, out_shardings=(self.everywhere, None))
        self.no_estimates = jax.jit(lambda: jnp.zeros(size, jnp.float32), out_shardings=self.everywhere)
        # With more than 32 programs in flight, XLA's CPU devices wait for each other for ever. Elsewhere nothing waits.
        self._waits = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"

    def __call__(self, weights: Weights, micro_batches: Sequence[Rows]) -> Estimates:
        """The estimate of every draw in the micro-batches (on the host, or placed); 0 where there is no draw."""
        estimates, one_pass = self.no_estimates(), self.takes_one_pass(micro_batches)
        for rows in self.place(micro_batches):
            scored = self.forward(weights, estimates, rows)[0] if one_pass else self.score(weights, estimates, rows)
            estimates = self.pace(scored)
        return estimates

    def keeping_residuals(self, weights: Weights, micro_batches: Sequence[Rows]) -> tuple[Estimates, list[Any]]:
        """The same by FORWARD, and the residuals of each micro-batch."""
        estimates, residuals = self.no_estimates(), []
        for rows in self.place(micro_batches):
            estimates, kept = self.pace(self.forward(weights, estimates, rows))
            residuals.append(kept)
        return estimates, residuals

    def with_one_pass_up_to(self, micro_batches: int) -> "Scorer":
        """The same scorer, and the same compiled programs, with another `one_pass_microbatches`."""
        other = copy.copy(self)
        other.one_pass_microbatches = micro_batches
        return other

    def takes_one_pass(self, micro_batches: Sequence[Rows]) -> bool:
        """Whether these go through FORWARD."""
        return len(micro_batches) <= self.one_pass_microbatches

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

    def estimates(self, weights: Weights, rows: Rows, *, keeps_head: bool = True) -> Float32[Array, "m g"]:
        """The estimate of each slot of each row (docs/method.md 1).

        `keeps_head`: the backward pass finds the gathered head, which is as large as a few layers, among the residuals;
        otherwise it gathers it again.
        """
        params = lora.parameters(weights)
        head = self._head if keeps_head else jax.checkpoint(self._head)
        part = functools.partial(self._estimates_of_part, head)
        return gather.over_rows(part, self.mesh, params, self._axes_of)(params, rows)

    def _estimates_of_part(self, head: Callable, params: Params, rows: Rows) -> Float32[Array, "part g"]:
        model = self._model
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

    def _score(self, weights, estimates, rows):
        return write(estimates, self.estimates(weights, rows), rows)

    def _forward(self, weights, estimates, rows):
        values, pull_back = jax.vjp(functools.partial(self.estimates, keeps_head=False), weights, rows)
        # The arguments that it saved are at hand in the backward pass; a program that handed them out would copy them.
        return write(estimates, values, rows), dataclasses.replace(pull_back, args_res=[])


def write(estimates: Estimates, values: Float32[Array, "m g"], rows: Rows) -> Estimates:
    """The estimates with those of the rows' slots in their places."""
    return estimates.at[rows.slot_index].set(values, mode="drop")


def pull_back(residuals: Any, weights: Weights, rows: Rows, cotangent: Float32[Array, "m g"]) -> Weights:
    """d (cotangent . estimates) / d weights, from what FORWARD handed out and its arguments; to be traced."""
    return dataclasses.replace(residuals, args_res=[weights, rows])(cotangent)[0]
