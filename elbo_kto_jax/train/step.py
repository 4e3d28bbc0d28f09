"""One optimizer step (METHOD 2), as plain Python over a few compiled programs.

    SCORE    params, rows           -> one ELBO estimate per (example, draw)      the reference pass runs this one too
    LOSS     rewards                -> loss, c_b = d loss / d B_theta(b), metrics
    GRAD     params, rows, c_b      -> gradient += sum over the rows' draws of c_b / K * d B_draw / d params
    UPDATE   state, gradient        -> state

z0 needs every reward of the global batch before any gradient, hence two passes over the micro-batches; memory is that
of one micro-batch, whatever the number of draws or examples. A batch of at most `train.one_pass_microbatches` takes one
pass: GRAD falls apart into FORWARD, which scores and hands out what the backward pass needs, and BACKWARD, with LOSS
between them; memory grows by what every micro-batch keeps, and the step does three quarters of the work.

Policy and reference share SCORE (or FORWARD), its shapes and its rows, so a reward is exactly 0 while the two have the
same parameters, in bfloat16 too. Where adapters are trained (model/lora.py), the programs take a lora.Adapted for
params, state and gradient hold the adapters alone, and the reference is the base with the adapters' scale at 0.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float32, Int32

from elbo_kto_jax import config
from elbo_kto_jax.diffusion import elbo
from elbo_kto_jax.model import lora
from elbo_kto_jax.model.llada import LLaDA, Params
from elbo_kto_jax.packing import Rows
from elbo_kto_jax.preference import kto
from elbo_kto_jax.sharding import gather, rules
from elbo_kto_jax.train.state import TrainState, zeros_like_params

Weights = Params | lora.Adapted  # a whole model, for a pass through it
SATURATED = 4.0  # |s| beyond which an example's gradient is below 7.1% of its maximum, 4 * sigmoid'(4)


class Feedback(NamedTuple):
    """What the loss knows of the b examples of a global batch; b is static, `is_example` is False on the padding."""

    is_desirable: Bool[np.ndarray, " b"]
    is_example: Bool[np.ndarray, " b"]
    completion_length: Int32[np.ndarray, " b"]  # tokens


class Batch(NamedTuple):
    """A global batch: its feedback, and their b * K draws laid out in micro-batches."""

    feedback: Feedback
    micro_batches: Sequence[Rows]
    real_tokens: int  # positions of the micro-batches that hold text, not padding


class Programs(NamedTuple):
    """The compiled programs; see `build_programs`."""

    score: Callable[[Weights, Float32[Array, " bk"], Rows], Float32[Array, " bk"]]
    loss: Callable[..., tuple[Float32[Array, " b"], dict[str, Array]]]
    grad: Callable[..., tuple[Params, Float32[Array, " bk"]]]
    forward: Callable[[Weights, Float32[Array, " bk"], Rows], tuple[Float32[Array, " bk"], Callable]]
    backward: Callable[[Callable, Weights, Params | None, Rows, Float32[Array, " b"]], Params]
    update: Callable[..., tuple[TrainState, Float32[Array, ""], Bool[Array, ""]]]
    zero_estimates: Callable[[], Float32[Array, " bk"]]
    zero_grads: Callable[[Params], Params]
    place_rows: Callable[[Rows], Rows]
    place: Callable[[Any], Any]
    pace: Callable[[Any], Any]
    objective: str
    one_pass_microbatches: int

    def takes_one_pass(self, micro_batches: Sequence[Rows]) -> bool:
        """Whether a batch of these takes one pass, of FORWARD and BACKWARD, or two, of SCORE and GRAD."""
        return len(micro_batches) <= self.one_pass_microbatches


def train_step(
    programs: Programs,
    state: TrainState,
    batch: Batch,
    reference: Params | lora.Base | Float32[np.ndarray, " bk"] | None,
    base: lora.Base | None = None,
    go: Bool[Array, ""] | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """The state after one step, and its metrics (still on the device).

    `reference` is B_ref of every draw (precomputed), or the reference's parameters or the adapters' base (online); SFT
    has none. `base` is what the adapters in `state` belong to; None: the state holds a whole model. The state stays as
    it is where the loss or the gradient is not finite, and where `go` is False; `applied` says which it was.
    """
    go = programs.place(np.True_) if go is None else go
    policy = state.params if base is None else base.policy(state.params)
    if isinstance(reference, lora.Base):
        reference = reference.reference(state.params)
    micro_batches = [programs.place_rows(rows) for rows in batch.micro_batches]
    if programs.takes_one_pass(micro_batches):
        elbo_policy, pull_backs = programs.zero_estimates(), []
        for rows in micro_batches:
            elbo_policy, pull_back = programs.pace(programs.forward(policy, elbo_policy, rows))
            pull_backs.append(pull_back)
        del pull_back  # each is to go with its backward pass
        elbo_cotangent, metrics = batch_loss(programs, elbo_policy, reference, batch, micro_batches)
        grads = programs.zero_grads(state.params) if programs.one_pass_microbatches > 1 else None
        for rows in reversed(micro_batches):
            grads = programs.pace(programs.backward(pull_backs.pop(), policy, grads, rows, elbo_cotangent))
        state, grad_norm, applied = programs.update(state, grads, metrics["loss"], go)
        return state, {**metrics, "grad_norm": grad_norm, "applied": applied}
    needs_rewards = programs.objective == "elbo_kto"
    elbo_policy = score(programs, policy, micro_batches) if needs_rewards else programs.zero_estimates()
    elbo_cotangent, metrics = batch_loss(programs, elbo_policy, reference, batch, micro_batches)
    grads, elbo_policy = programs.zero_grads(state.params), programs.zero_estimates()
    for rows in micro_batches:
        grads, elbo_policy = programs.pace(programs.grad(policy, grads, elbo_policy, rows, elbo_cotangent))
    if not needs_rewards:
        _, metrics = batch_loss(programs, elbo_policy, reference, batch, micro_batches)
    state, grad_norm, applied = programs.update(state, grads, metrics["loss"], go)
    return state, {**metrics, "grad_norm": grad_norm, "applied": applied}


def batch_loss(
    programs: Programs,
    elbo_policy: Float32[Array, " bk"],
    reference: Weights | Float32[np.ndarray, " bk"] | None,
    batch: Batch,
    micro_batches: Sequence[Rows],
) -> tuple[Float32[Array, " b"], dict[str, Array]]:
    """c_b and the metrics, given the policy's estimates; for `reference` see `train_step`."""
    if reference is None:
        elbo_ref = programs.zero_estimates()
    elif isinstance(reference, np.ndarray):
        elbo_ref = programs.place(reference)
    else:
        elbo_ref = score(programs, reference, micro_batches)
    return programs.loss(elbo_policy, elbo_ref, programs.place(batch.feedback))


def score(programs: Programs, weights: Weights, micro_batches: Sequence[Rows]) -> Float32[Array, " bk"]:
    """The ELBO estimate, in nats, of every draw in the micro-batches (placed on the devices), by Segment.index."""
    estimates = programs.zero_estimates()
    one_pass = programs.takes_one_pass(micro_batches)  # the program that `train_step` runs, for the same bits
    for rows in micro_batches:
        scored = programs.forward(weights, estimates, rows)[0] if one_pass else programs.score(weights, estimates, rows)
        estimates = programs.pace(scored)
    return estimates


def build_programs(
    model: LLaDA,
    mesh: Mesh,
    *,
    num_examples: int,
    draws: int,
    objective: config.Objective,
    one_pass_microbatches: int = 1,
    tx: optax.GradientTransformation | None = None,
    shardings: TrainState | None = None,
) -> Programs:
    """The programs for global batches of at most `num_examples` examples with `draws` draws each.

    `one_pass_microbatches` is train.one_pass_microbatches, where training's bits are wanted. `tx` and `shardings` are
    needed for the gradient and the update, not for scoring.
    """
    everywhere, by_row = rules.replicated(mesh), rules.row_sharding(mesh)
    whole = functools.partial(gather.whole, mesh=mesh, dtype=model.dtype)
    model = model.clone(mesh=mesh, gather=functools.partial(whole, prefix="blocks"))

    def estimates_of(weights: Weights, rows: Rows) -> Float32[Array, "m g"]:
        params = lora.parameters(weights)
        return gather.over_rows(estimates_of_part, mesh, params)(params, rows)

    def estimates_of_part(params: Params, rows: Rows) -> Float32[Array, "part g"]:
        embedded = gather.embed(params["wte"]["embedding"], rows.tokens, mesh, model.dtype)
        hidden = model.apply({"params": params}, embedded, rows.positions, rows.segment_ids, method=LLaDA.states)
        return elbo.elbo_draws(
            hidden,
            whole(params["head"], prefix="head")["kernel"],
            rows.target_position,
            rows.target_token,
            rows.target_slot,
            rows.target_weight,
            rows.num_targets,
            slots=rows.slot_index.shape[1],
        )

    def score(weights, estimates, rows):
        return estimates.at[rows.slot_index].set(estimates_of(weights, rows), mode="drop")

    def reward_noise(elbo_policy, elbo_ref, reward, is_example):
        """Var(r) from the masks, nats^2, and the draws at which it would be a tenth of the variance between examples.

        From the spread of the K draws as if they were independent: too much where a scheme spreads them on purpose.
        """
        spread = jnp.var((elbo_policy - elbo_ref).reshape(-1, draws), axis=1, ddof=1)
        variance = kto.masked_mean(spread / draws, is_example)
        centred = jnp.square(reward - kto.masked_mean(reward, is_example))
        between = jnp.sum(jnp.where(is_example, centred, 0.0)) / (jnp.sum(is_example) - 1) - variance
        return {
            "reward_variance": variance,
            "draws_needed": jnp.where(between > 0, 10.0 * draws * variance / between, jnp.nan),
        }

    def kto_loss(elbo_policy, elbo_ref, feedback):
        reward = jnp.mean(elbo_policy.reshape(-1, draws), axis=1) - jnp.mean(elbo_ref.reshape(-1, draws), axis=1)
        z0 = kto.reference_point(reward, feedback.is_example, objective.reference_point)
        loss = kto.loss_and_cotangent(
            reward,
            z0,
            feedback.is_desirable,
            feedback.is_example,
            beta=objective.beta,
            desirable_weight=objective.desirable_weight,
            undesirable_weight=objective.undesirable_weight,
        )
        desirable = kto.masked_mean(reward, feedback.is_desirable & feedback.is_example)
        undesirable = kto.masked_mean(reward, ~feedback.is_desirable & feedback.is_example)
        return loss.elbo_cotangent, {
            "loss": loss.loss,
            "reward_desirable": desirable,
            "reward_undesirable": undesirable,
            "reward_margin": desirable - undesirable,
            "reference_point": z0,
            "saturated_fraction": kto.masked_mean(1.0 * (jnp.abs(loss.kto_logit) > SATURATED), feedback.is_example),
            "reward": reward,
            **(reward_noise(elbo_policy, elbo_ref, reward, feedback.is_example) if draws > 1 else {}),
        }

    def sft_loss(elbo_policy, _, feedback):
        # Mean over examples of -B_theta / L: the LLaDA fine-tuning objective, nats per completion token.
        scale = feedback.is_example / (jnp.maximum(feedback.completion_length, 1) * jnp.sum(feedback.is_example))
        elbo_mean = jnp.mean(elbo_policy.reshape(-1, draws), axis=1)
        return -scale, {"loss": -jnp.sum(scale * elbo_mean), "elbo": elbo_mean}

    def forward(weights, estimates, rows):
        trained, replace = lora.split_trained(weights)
        values, pull_back = jax.vjp(lambda t: estimates_of(replace(t), rows), trained)
        return estimates.at[rows.slot_index].set(values, mode="drop"), pull_back

    def pull(pull_back, rows, elbo_cotangent):
        per_slot = elbo_cotangent.at[rows.slot_index // draws].get(mode="fill", fill_value=0) / draws
        return jax.tree.map(lambda g: g.astype(jnp.float32), pull_back(per_slot)[0])

    def grad(weights, grads, estimates, rows, elbo_cotangent):
        estimates, pull_back = forward(weights, estimates, rows)
        return jax.tree.map(jnp.add, grads, pull(pull_back, rows, elbo_cotangent)), estimates

    def forward_alone(weights, estimates, rows):
        estimates, pull_back = forward(weights, estimates, rows)
        return estimates, _without(pull_back, weights)

    def backward(pull_back, weights, grads, rows, elbo_cotangent):
        new = pull(_with(pull_back, weights), rows, elbo_cotangent)
        return new if grads is None else jax.tree.map(jnp.add, grads, new)

    def update(state, grads, loss, go):
        grad_norm = optax.tree.norm(grads)
        go = go & jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        new = TrainState(optax.apply_updates(state.params, updates), opt_state)
        return jax.tree.map(lambda after, before: jnp.where(go, after, before), new, state), grad_norm, go

    param_shardings = shardings.params if shardings else None
    return Programs(
        score=jax.jit(score, donate_argnums=1, out_shardings=everywhere),
        loss=jax.jit(kto_loss if objective.name == "elbo_kto" else sft_loss, out_shardings=everywhere),
        grad=jax.jit(grad, donate_argnums=(1, 2), out_shardings=(param_shardings, everywhere)),
        forward=jax.jit(forward_alone, donate_argnums=1, out_shardings=(everywhere, None)),
        backward=jax.jit(backward, donate_argnums=2, out_shardings=param_shardings),
        update=jax.jit(update, donate_argnums=0, out_shardings=(shardings, everywhere, everywhere)),
        zero_estimates=jax.jit(lambda: jnp.zeros(num_examples * draws, jnp.float32), out_shardings=everywhere),
        zero_grads=jax.jit(zeros_like_params, out_shardings=param_shardings),
        place_rows=lambda rows: jax.tree.map(lambda x: rules.place(x, by_row), rows),
        place=lambda tree: jax.tree.map(lambda x: rules.place(x, everywhere), tree),
        # With more than 32 programs in flight, XLA's CPU devices wait for each other for ever. Elsewhere nothing waits.
        pace=jax.block_until_ready if mesh.size > 1 and mesh.devices.flat[0].platform == "cpu" else lambda x: x,
        objective=objective.name,
        one_pass_microbatches=one_pass_microbatches,
    )


@functools.partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("index",))
@dataclasses.dataclass(frozen=True)
class _Weight:
    """In the place of a weight among what a backward pass needs: a program that handed it out would copy it."""

    index: int  # among the leaves of the weights


def _without(pull_back: Callable, weights: Weights) -> Callable:
    """`pull_back` with a `_Weight` for each of its leaves that is one of the weights."""
    index = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves(weights))}
    return jax.tree.map(lambda leaf: _Weight(index[id(leaf)]) if id(leaf) in index else leaf, pull_back)


def _with(pull_back: Callable, weights: Weights) -> Callable:
    """The inverse of `_without`."""
    leaves = jax.tree.leaves(weights)
    is_weight = lambda leaf: isinstance(leaf, _Weight)  # noqa: E731
    return jax.tree.map(lambda leaf: leaves[leaf.index] if is_weight(leaf) else leaf, pull_back, is_leaf=is_weight)
