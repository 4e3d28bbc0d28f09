"""One optimizer step (docs/method.md 2), as plain Python over a few compiled programs.

    SCORE      params, rows           -> the ELBO estimate of every draw                 scoring/scorer.py
    LOSS       scores                 -> loss, c_b = d loss / d B_theta(b), metrics      objectives/
    GRAD       params, rows, c_b      -> gradient += sum over the rows' draws of c_b / K * d B_draw / d params
    UPDATE     state, gradient        -> state

The loss may need every score of the global batch before any gradient, hence two passes over the micro-batches; memory
is that of one micro-batch, whatever the number of draws or examples. In one pass GRAD falls apart into FORWARD, which
scores and hands out its residuals, what the backward pass needs, and BACKWARD, with LOSS between them. The step then
does four fifths of the work. The residuals of all micro-batches wait on the devices, or in the host's memory, where
they cost the devices nothing (training/residuals.py).

Where adapters are trained (models/lora.py), the programs take a lora.Adapted for params, state and gradient hold the
adapters alone, and the reference is the base with the adapters' scale at 0.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float32

from elbo_kto_jax.data.packing import Rows
from elbo_kto_jax.models import lora
from elbo_kto_jax.models.network import Params
from elbo_kto_jax.objectives.protocol import Feedback, Objective
from elbo_kto_jax.scoring.scorer import Scorer, Weights, pull_back, write
from elbo_kto_jax.training.rounding import in_float32, round_like
from elbo_kto_jax.training.state import TrainState, steps_taken, zeros_like_params

Reference = Weights | lora.Base | Float32[np.ndarray, " bk"] | None  # online, of adapters, precomputed, none
Metrics = dict[str, Array]


class Batch(NamedTuple):
    """A global batch: its feedback, and their b * K draws laid out in micro-batches."""

    feedback: Feedback
    micro_batches: Sequence[Rows]
    real_tokens: int  # positions of the micro-batches that hold text, not padding


class Programs(NamedTuple):
    """The compiled programs; see `build_programs`."""

    scorer: Scorer
    loss: Callable[..., tuple[Float32[Array, " b"], Metrics]]
    grad: Callable[..., tuple[Params, Float32[Array, " bk"]]]
    backward: Callable[[Any, Weights, Params | None, Rows, Float32[Array, " b"]], Params]
    update: Callable[..., tuple[TrainState, Float32[Array, ""], Bool[Array, ""]]]
    zero_grads: Callable[[Params], Params]
    objective: Objective


def train_step(
    programs: Programs,
    state: TrainState,
    batch: Batch,
    reference: Reference,
    base: lora.Base | None = None,
    go: Bool[Array, ""] | None = None,
) -> tuple[TrainState, Metrics]:
    """The state after one step, and its metrics (still on the device).

    `reference` is B_ref of every draw (precomputed), or the reference's parameters or the adapters' base (online), or
    None where the objective needs none. `base` is what the adapters in `state` belong to; None: the state holds a whole
    model. The state stays as it is where the loss or the gradient is not finite, and where `go` is False; `applied`
    says which it was.
    """
    go = programs.scorer.place_everywhere(np.True_) if go is None else go
    policy = state.params if base is None else base.policy(state.params)
    if isinstance(reference, lora.Base):
        reference = reference.reference(state.params)
    batch = batch._replace(micro_batches=programs.scorer.place(batch.micro_batches))
    if programs.scorer.takes_one_pass:
        gradient = in_one_pass
    elif programs.objective.needs.scores:
        gradient = in_two_passes
    else:
        gradient = without_scores
    grads, metrics = gradient(programs, policy, state.params, reference, batch)
    state, grad_norm, applied = programs.update(state, grads, metrics["loss"], go)
    return state, {**metrics, "grad_norm": grad_norm, "applied": applied}


def in_two_passes(
    programs: Programs, policy: Weights, trained: Params, reference: Reference, batch: Batch
) -> tuple[Params, Metrics]:
    """The gradient and the metrics: scores, cotangents, gradient."""
    cotangent, metrics = batch_loss(programs, programs.scorer(policy, batch.micro_batches), reference, batch)
    grads, _ = accumulate(programs, policy, trained, cotangent, batch)
    return grads, metrics


def without_scores(
    programs: Programs, policy: Weights, trained: Params, reference: Reference, batch: Batch
) -> tuple[Params, Metrics]:
    """The same where no cotangent depends on a score: the pass with the gradient gives the scores for the metrics."""
    cotangent, _ = batch_loss(programs, programs.scorer.no_estimates(), reference, batch)
    grads, elbo_policy = accumulate(programs, policy, trained, cotangent, batch)
    return grads, batch_loss(programs, elbo_policy, reference, batch)[1]


def in_one_pass(
    programs: Programs, policy: Weights, trained: Params, reference: Reference, batch: Batch
) -> tuple[Params, Metrics]:
    """The same, keeping what each micro-batch's backward pass needs; each is dropped as it is used."""
    elbo_policy, residuals = programs.scorer.keeping_residuals(policy, batch.micro_batches)
    cotangent, metrics = batch_loss(programs, elbo_policy, reference, batch)
    grads = programs.zero_grads(trained) if len(batch.micro_batches) > 1 else None  # one alone needs no sum
    for rows in reversed(batch.micro_batches):
        grads = programs.scorer.pace(programs.backward(residuals.pop(), policy, grads, rows, cotangent))
    return grads, metrics


def accumulate(
    programs: Programs, policy: Weights, trained: Params, cotangent: Float32[Array, " b"], batch: Batch
) -> tuple[Params, Float32[Array, " bk"]]:
    """sum_b c_b * d B_theta(b) / d params over the micro-batches, and the estimates that were met on the way."""
    grads, estimates = programs.zero_grads(trained), programs.scorer.no_estimates()
    for rows in batch.micro_batches:
        grads, estimates = programs.scorer.pace(programs.grad(policy, grads, estimates, rows, cotangent))
    return grads, estimates


def batch_loss(
    programs: Programs, elbo_policy: Float32[Array, " bk"], reference: Reference, batch: Batch
) -> tuple[Float32[Array, " b"], Metrics]:
    """c_b and the metrics, given the policy's estimates; for `reference` see `train_step`."""
    if reference is None:
        elbo_ref = programs.scorer.no_estimates()
    elif isinstance(reference, np.ndarray):
        elbo_ref = programs.scorer.place_everywhere(reference)
    else:
        elbo_ref = programs.scorer(reference, batch.micro_batches)
    return programs.loss(elbo_policy, elbo_ref, programs.scorer.place_everywhere(batch.feedback))


def build_programs(
    scorer: Scorer,
    objective: Objective,
    *,
    draws: int,
    tx: optax.GradientTransformation | None = None,
    shardings: TrainState | None = None,
    seed: int = 0,
) -> Programs:
    """The programs for batches whose draws `scorer` scores, `draws` of each example.

    `tx` and `shardings` are needed for the gradient and the update, not for the loss; `seed` for rounding to bfloat16.
    """
    everywhere = scorer.everywhere
    params = shardings.params if shardings else None

    def loss(elbo_policy, elbo_ref, feedback):
        outcome = objective(elbo_policy.reshape(-1, draws), elbo_ref.reshape(-1, draws), feedback)
        name, values = outcome.values
        return outcome.elbo_cotangent, {"loss": outcome.loss, **outcome.metrics, name: values}

    grad, backward = gradient_programs(scorer, draws)
    return Programs(
        scorer=scorer,
        loss=jax.jit(loss, out_shardings=everywhere),
        grad=jax.jit(grad, donate_argnums=(1, 2), out_shardings=(params, everywhere)),
        backward=jax.jit(backward, donate_argnums=2, out_shardings=params, compiler_options=scorer.compiler_options),
        update=jax.jit(
            lambda *arguments: update(tx, seed, *arguments),
            donate_argnums=0,
            out_shardings=(shardings, everywhere, everywhere),
        ),
        zero_grads=jax.jit(zeros_like_params, out_shardings=params),
        objective=objective,
    )


def gradient_programs(scorer: Scorer, draws: int) -> tuple[Callable, Callable]:
    """GRAD and BACKWARD, to be compiled: the gradient of sum_b c_b * B_theta(b), added to another."""

    def of_slots(rows, cotangent):
        return cotangent.at[rows.slot_index // draws].get(mode="fill", fill_value=0) / draws

    def grad(weights, grads, estimates, rows, cotangent):
        trained, replace = lora.split_trained(weights)
        values, pull = jax.vjp(lambda t: scorer.estimates(replace(t), rows), trained)
        (new,) = pull(of_slots(rows, cotangent))
        return jax.tree.map(jnp.add, grads, in_float32(new)), write(estimates, values, rows)

    def backward(residuals, weights, grads, rows, cotangent):
        new, _ = lora.split_trained(pull_back(residuals, weights, rows, of_slots(rows, cotangent)))
        new = in_float32(new)
        return new if grads is None else jax.tree.map(jnp.add, grads, new)

    return grad, backward


def update(
    tx: optax.GradientTransformation,
    seed: int,
    state: TrainState,
    grads: Params,
    loss: Float32[Array, ""],
    go: Bool[Array, ""],
) -> tuple[TrainState, Float32[Array, ""], Bool[Array, ""]]:
    """The state after the optimizer, where loss and gradient are finite and `go` says so; the gradient's norm.

    The optimizer computes in float32. What is stored in bfloat16 is rounded stochastically (docs/method.md 12), from
    random bits of the seed, the step, the parameter and the place in it.
    """
    grad_norm = optax.tree.norm(grads)
    go = go & jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    params, opt_state = in_float32(state.params), in_float32(state.opt_state)
    updates, opt_state = tx.update(grads, opt_state, params)
    key = jax.random.fold_in(jax.random.key(seed), steps_taken(state.opt_state))
    new = round_like(TrainState(optax.apply_updates(params, updates), opt_state), state, key)
    return jax.tree.map(lambda after, before: jnp.where(go, after, before), new, state), grad_norm, go
