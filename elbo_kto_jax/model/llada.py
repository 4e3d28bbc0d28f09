"""The LLaDA mask predictor: a Llama-like pre-norm transformer without a causal mask (docs/method.md 4).

The parameters are one tree, the layers' parameters stacked along a first axis and scanned over, so that the compiled
program does not grow with the depth. Names follow the published checkpoint:

    wte/embedding [v d]    blocks/{attn_norm,ff_norm}/scale [n d]    blocks/{q_proj,k_proj,v_proj,attn_out}/kernel
    [n in out]    blocks/{ff_proj,up_proj,ff_out}/kernel [n in out]    ln_f/scale [d]    head/kernel [d v]

The kernels of the blocks may be int8 and have adapters beside them (model/lora.py).

Beside "params" there may be the collection "cache": every layer's rotated keys, and values, of a row of t positions
(blocks/{key,value} [n b t kv e]). A call that may change it (`mutable`) leaves those of its own row there; a call that
may not attends to them as well as to its own, as `key_segment_ids` says.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from elbo_kto_jax.model import rope
from elbo_kto_jax.model.attention import SAVED, attention
from elbo_kto_jax.model.config import ModelConfig
from elbo_kto_jax.model.lora import Linear

Params = Any  # the tree above
CACHE = "cache"

# What a layer's backward pass keeps of its forward pass. "full" keeps the layer's input and computes the rest again;
# "attention" keeps the result of attention too, the costliest for its size; "dots" keeps the results of matrix products
# and of attention, and computes what lies between them again. "none" keeps everything, weights that were gathered or
# changed in dtype among it.
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(SAVED),
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(SAVED),
    ),
    "none": jax.checkpoint_policies.everything_saveable,
}


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back to x's dtype, then times the weight."""

    config: ModelConfig
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        return rms_norm(x, scale.astype(x.dtype), self.config.rms_norm_eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "b s d"], scale: Float[Array, " d"], eps: float) -> Float[Array, "b s d"]:
    """x / sqrt(mean(x^2) + eps), computed in float32 and cast back to x's dtype, then times the scale.

    Its derivative is written down, with its sums as matrix products: the scale's, as XLA for CPUs fuses it, recomputes
    the norm column by column, and sums of a product of two arrays take ten times as long as they need.
    """
    return _rms_norm_forward(x, scale, eps)[0]


def _rms_norm_forward(x, scale, eps):
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * inverse).astype(x.dtype) * scale, (x, scale, inverse)


def _rms_norm_backward(eps, residuals, d_out):
    x, scale, inverse = residuals
    normed = x.astype(jnp.float32) * inverse
    d_normed = (d_out * scale).astype(jnp.float32)
    inner = jnp.einsum("bsd,bsd->bs", d_normed, normed, precision=jax.lax.Precision.HIGHEST)[..., None]
    d_x = inverse * (d_normed - normed * (inner / x.shape[-1]))
    product = d_out.astype(jnp.float32) * normed.astype(x.dtype)
    d_scale = jnp.einsum("bs,bsd->d", jnp.ones(x.shape[:2]), product, precision=jax.lax.Precision.HIGHEST)
    return d_x.astype(x.dtype), d_scale.astype(scale.dtype)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


class Block(nn.Module):
    """One pre-norm transformer layer: x + attn_out(attention(...)), then x + ff_out(silu(ff_proj) * up_proj)."""

    config: ModelConfig
    dtype: Any
    param_dtype: Any
    mesh: Mesh | None

    @nn.compact
    def __call__(self, x, cos, sin, segment_ids, key_segment_ids):
        cfg = self.config
        norm = functools.partial(RMSNorm, cfg, self.param_dtype)

        def dense(features, name):
            init = nn.initializers.normal(0.02)
            return Linear(features, self.dtype, self.param_dtype, matmul_precision(self.dtype), init, name=name)

        heads = lambda y, n: y.reshape(*y.shape[:2], n, cfg.head_dim)  # noqa: E731

        h = norm(name="attn_norm")(x)
        q = heads(dense(cfg.n_heads * cfg.head_dim, name="q_proj")(h), cfg.n_heads)
        k = heads(dense(cfg.n_kv_heads * cfg.head_dim, name="k_proj")(h), cfg.n_kv_heads)
        v = heads(dense(cfg.n_kv_heads * cfg.head_dim, name="v_proj")(h), cfg.n_kv_heads)
        q, k = rope.rotate(q, cos, sin), rope.rotate(k, cos, sin)
        if self.is_mutable_collection(CACHE):
            self.put_variable(CACHE, "key", k)
            self.put_variable(CACHE, "value", v)
        elif self.has_variable(CACHE, "key"):
            k = jnp.concatenate([self.get_variable(CACHE, "key"), k], axis=1)
            v = jnp.concatenate([self.get_variable(CACHE, "value"), v], axis=1)
        mixed = attention(q, k, v, segment_ids, self.mesh, key_segment_ids)
        x = x + dense(cfg.d_model, name="attn_out")(mixed.reshape(*x.shape[:2], -1))

        h = norm(name="ff_norm")(x)
        h = nn.silu(dense(cfg.mlp_hidden_size, name="ff_proj")(h)) * dense(cfg.mlp_hidden_size, name="up_proj")(h)
        return x + dense(cfg.d_model, name="ff_out")(h), None


class LLaDA(nn.Module):
    """tokens -> hidden states; `logits` turns hidden states into logits.

    The two are apart because the loss needs logits at masked positions only, and computes them in chunks
    (diffusion/elbo.py).
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "full"
    mesh: Mesh | None = None  # over which the rows are spread; None: they are not
    gather: Callable[[Params], Params] | None = None  # makes a layer's parameters whole; None: they are

    def setup(self):
        cfg = self.config
        init = nn.initializers.normal(0.02)
        self.wte = nn.Embed(
            cfg.embedding_size, cfg.d_model, dtype=self.dtype, param_dtype=self.param_dtype, embedding_init=init
        )
        block = Block
        if self.gather is not None:
            block = nn.map_variables(Block, "params", lambda tree: {"params": self.gather(tree["params"])})
        layer = nn.remat(block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        scanned = nn.scan(
            layer,
            variable_axes={"params": 0, CACHE: 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=cfg.n_layers,
        )
        self.blocks = scanned(cfg, self.dtype, self.param_dtype, self.mesh)
        self.ln_f = RMSNorm(cfg, self.param_dtype)
        self.head = nn.Dense(
            cfg.embedding_size,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=matmul_precision(self.dtype),
            kernel_init=init,
        )

    def __call__(
        self,
        tokens: Int[Array, "b s"],
        positions: Int[Array, "b s"] | None = None,
        segment_ids: Int[Array, "b s"] | None = None,
        key_segment_ids: Int[Array, "b t_s"] | None = None,
    ) -> Float[Array, "b s d"]:
        """Hidden states after the last norm. Positions default to 0..s-1, segment ids to one segment per row.

        Together with a cache of t positions, `key_segment_ids` are those of the t + s keys: the cache's, then the own.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return self.states(self.wte(tokens), positions, segment_ids, key_segment_ids)

    def states(
        self,
        embedded: Float[Array, "b s d"],
        positions: Int[Array, "b s"],
        segment_ids: Int[Array, "b s"] | None,
        key_segment_ids: Int[Array, "b t_s"] | None = None,
    ) -> Float[Array, "b s d"]:
        """The same from the tokens' embeddings on."""
        cos, sin = rope.rotation(positions, self.config.head_dim, self.config.rope_theta)
        x, _ = self.blocks(embedded, cos, sin, segment_ids, key_segment_ids)
        return self.ln_f(x)

    def logits(
        self,
        tokens: Int[Array, "b s"],
        positions: Int[Array, "b s"] | None = None,
        segment_ids: Int[Array, "b s"] | None = None,
    ) -> Float[Array, "b s v"]:
        """Logits at every position, float32."""
        return self.head(self(tokens, positions, segment_ids)).astype(jnp.float32)


def matmul_precision(dtype) -> jax.lax.Precision | None:
    """float32 compute means float32: TPUs and GPUs would otherwise round the operands to bfloat16 or TF32."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def init_params(model: LLaDA, key: jax.Array) -> Params:
    """A freshly initialised parameter tree (normal, standard deviation 0.02)."""
    return model.init(key, jnp.zeros((1, 1), jnp.int32), method=LLaDA.logits)["params"]


def abstract_params(model: LLaDA) -> Params:
    """The tree of `init_params` as shapes and dtypes only."""
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
