"""What training changes: parameters and optimizer state; and how (docs/method.md 2)."""

import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float32, Int

from elbo_kto_jax.models import axes, lora
from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.models.network import MaskPredictor, Params, abstract_params
from elbo_kto_jax.runtime import config
from elbo_kto_jax.sharding import rules


class TrainState(NamedTuple):
    params: Params
    opt_state: Any


def abstract_trained(model: MaskPredictor, options: config.Lora) -> Params:
    """Shapes and dtypes of what the optimizer moves: every parameter, or adapters alone."""
    whole = abstract_params(model)
    if not options.rank:
        return whole
    return lora.abstract_adapters(whole, options.rank, model.param_dtype, options.targets)


def abstract_base(model: MaskPredictor, options: config.Lora) -> Params:
    """Shapes and dtypes of the base of adapters.

    It is kept in the dtype that the model computes in: nothing is ever added to it, so more bits would change nothing.
    """
    return lora.abstract_base(abstract_params(model), model.dtype, options.base_quantization == "int8")


def learning_rate(options: config.Optimizer, total_steps: int) -> optax.Schedule:
    """Linear warm-up from 0 over ceil(warmup_fraction * steps), then options.schedule: to 0 at the last step, or none.

    As in the authors' trainer, the very first step of a warm-up has rate 0: moments are updated, parameters are not.
    """
    peak, warmup = options.learning_rate, math.ceil(options.warmup_fraction * total_steps)
    if warmup >= total_steps:
        return optax.linear_schedule(0.0, peak, max(1, warmup))
    if options.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0 if warmup else peak, peak_value=peak, warmup_steps=warmup, decay_steps=total_steps
        )
    after = (
        optax.constant_schedule(peak)
        if options.schedule == "constant"
        else optax.linear_schedule(peak, 0.0, total_steps - warmup)
    )
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup]) if warmup else after


def optimizer(options: config.Optimizer, total_steps: int) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW with decoupled weight decay on matrices (neither norm scales nor biases).

    It begins with moments in `moments_dtype`, and computes in the dtype of what it is given.
    """
    adamw = optax.chain(
        optax.clip_by_global_norm(options.clip_norm),
        optax.adamw(
            learning_rate(options, total_steps),
            b1=options.b1,
            b2=options.b2,
            eps=1e-8,
            weight_decay=options.weight_decay,
            mask=lambda params: jax.tree_util.tree_map_with_path(
                lambda path, _: path[-1].key not in ("scale", "bias"), params
            ),
        ),
    )

    def stored(x: Any) -> Any:  # counters are whole numbers, and optax traces `init` with what is no array
        return x.astype(options.moments_dtype) if jnp.issubdtype(getattr(x, "dtype", int), jnp.floating) else x

    def init(params: Params) -> Any:
        return jax.tree.map(stored, adamw.init(params))

    return optax.GradientTransformation(init, adamw.update)


def state_shardings(tx: optax.GradientTransformation, abstract: Params, mesh: Mesh, model: ModelConfig) -> TrainState:
    """Shardings of the whole state: Adam's moments lie where their parameters do, counters everywhere."""
    params = axes.param_shardings(abstract, mesh, model)
    opt_state = optax.tree_map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(tx.init, abstract),
        params,
        transform_non_params=lambda _: rules.replicated(mesh),
    )
    return TrainState(params, opt_state)


def init_state(tx: optax.GradientTransformation, params: Params, shardings: TrainState) -> TrainState:
    """The state before the first step."""
    return TrainState(params, jax.jit(tx.init, out_shardings=shardings.opt_state)(params))


def abstract_state(tx: optax.GradientTransformation, abstract: Params, shardings: TrainState) -> TrainState:
    """The state as shapes, dtypes and shardings, for restoring a checkpoint."""
    shapes = TrainState(abstract, jax.eval_shape(tx.init, abstract))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def zeros_like_params(params: Params) -> Params:
    """A float32 accumulator for each parameter."""
    return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)


def gradient_noise_scale(opt_state: Any, options: config.Optimizer, batch_size: int) -> Float32[Array, ""]:
    """tr Cov(g) / |E g|^2 of a step's gradient g, times the batch: the examples at which noise equals signal.

    McCandlish et al., arXiv 1812.06162, B_simple, without another gradient: Adam's moments are means of g and g^2 over
    the last steps (clipped, which hardly changes the ratio). E |m|^2 = |E g|^2 + f tr Cov(g), with f the sum of the
    squared weights of the mean m, and E sum(v) = |E g|^2 + tr Cov(g). Masks and the choice of examples both count.
    NaN where the signal is not seen above the noise, and after the first step.
    """
    count = steps_taken(opt_state)
    shrink = options.b1**count
    squares = jax.tree.map(lambda m: jnp.square(m.astype(jnp.float32)), optax.tree.get(opt_state, "mu"))
    of_mean = _sum(squares) / jnp.square(1 - shrink)
    of_step = _sum(optax.tree.get(opt_state, "nu")) / (1 - options.b2**count)
    share = (1 - options.b1) / (1 + options.b1) * (1 + shrink) / (1 - shrink)
    noise = (of_step - of_mean) / (1 - share)
    signal = of_step - noise
    return jnp.where((count > 1) & (signal > 0), batch_size * noise / signal, jnp.nan)


def steps_taken(opt_state: Any) -> Int[Array, ""]:
    """How many steps Adam has taken; 0 where `opt_state` is none of Adam's."""
    adam = optax.tree.get_all_with_path(
        opt_state, "count", filtering=lambda path, _: path[-1].tuple_name == "ScaleByAdamState"
    )
    return adam[0][1] if adam else jnp.int32(0)


def root_mean_square(params: Params) -> Float32[Array, ""]:
    """Of all parameters together."""
    squares = jax.tree.map(lambda p: jnp.square(p.astype(jnp.float32)), params)
    return jnp.sqrt(_sum(squares) / sum(p.size for p in jax.tree.leaves(params)))


def _sum(tree: Any) -> Float32[Array, ""]:
    """The sum of all elements of a tree, in float32."""
    return cast(Array, sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(tree)))  # there are some
