"""The mask predictor: a pre-norm transformer without a causal mask (docs/method.md 4, 10).

What differs between architectures is in the table of their parameters (models/registry.py) and in ModelConfig. The
parameters are one tree, the layers' parameters stacked along a first axis and scanned over, so that the compiled
program does not grow with the depth:

    wte/embedding [v d]    blocks/... [n ...]    ln_f/scale [d]    head/kernel [d v], unless the embedding is the head

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

from elbo_kto_jax.models import registry, rope
from elbo_kto_jax.models.attention_plain import SAVED
from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.models.layers import (
    CACHE,
    INITIALIZERS,
    KEPT_PRODUCTS,
    LAYER_INPUT,
    Block,
    RMSNorm,
    matmul_precision,
)

Params = Any  # the tree above

# What a layer's backward pass keeps of its forward pass. "full" keeps the layer's input and computes the rest again;
# "attention" keeps the result of attention too, the costliest for its size; "dots" keeps the results of matrix products
# and of attention, and computes what lies between them again. "most" is "dots" without up_proj: three quarters of the
# memory, and a quarter of the work that "full" does again. "none" keeps everything, weights that were gathered or
# changed in dtype among it.
_KEPT: dict[str, tuple[str, ...]] = {
    "full": (),
    "attention": (SAVED,),
    "most": (SAVED, *KEPT_PRODUCTS),
    "dots": (SAVED, *KEPT_PRODUCTS, "up_proj"),
}
REMAT_POLICIES = {
    **{remat: jax.checkpoint_policies.save_only_these_names(*names) for remat, names in _KEPT.items()},
    "none": jax.checkpoint_policies.everything_saveable,
}


def remat_policy(remat: str, on_host: bool) -> Callable[..., Any]:
    """What a layer's backward pass keeps; `on_host`: in the host's memory, from which it fetches a layer at a time.

    "none" is then as "dots": what it keeps besides, weights too, takes less time to compute again than to fetch.
    """
    if not on_host:
        return REMAT_POLICIES[remat]
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=(),
        names_which_can_be_offloaded=(LAYER_INPUT, *_KEPT.get(remat, _KEPT["dots"])),
        offload_src="device",
        offload_dst="pinned_host",
    )


class MaskPredictor(nn.Module):
    """tokens -> hidden states; `logits` turns hidden states into logits.

    The two are apart because the loss needs logits at masked positions only, and computes them in chunks
    (diffusion/elbo.py). The state at a position is the one from which the token there is predicted, whatever the
    architecture.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "full"
    residuals_on_host: bool = False  # what the layers' backward pass keeps lies in the host's memory
    mesh: Mesh | None = None  # over which the rows are spread; None: they are not
    gather: Callable[[Params], Params] | None = None  # makes a layer's parameters whole; None: they are

    def setup(self):
        cfg, rows = self.config, registry.parameters(self.config)
        self.wte = nn.Embed(
            cfg.embedding_size,
            cfg.d_model,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            embedding_init=INITIALIZERS[rows["wte", "embedding"].init],
        )
        block = Block
        if self.gather is not None:
            block = nn.map_variables(Block, "params", lambda tree: {"params": self.gather(tree["params"])})
        layer = nn.remat(block, policy=remat_policy(self.remat, self.residuals_on_host), prevent_cse=False)
        scanned = nn.scan(
            layer,
            variable_axes={"params": 0, CACHE: 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=cfg.n_layers,
        )
        self.blocks = scanned(cfg, self.dtype, self.param_dtype, self.mesh)
        self.ln_f = RMSNorm(cfg.rms_norm_eps, self.param_dtype)
        if not cfg.tied_head:
            self.head = nn.Dense(
                cfg.embedding_size,
                use_bias=False,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                precision=matmul_precision(self.dtype),
                kernel_init=INITIALIZERS[rows["head", "kernel"].init],
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
        x = self.ln_f(x)
        return aligned(x, positions) if self.config.predicts_next else x

    def logits(
        self,
        tokens: Int[Array, "b s"],
        positions: Int[Array, "b s"] | None = None,
        segment_ids: Int[Array, "b s"] | None = None,
    ) -> Float[Array, "b s v"]:
        """Logits at every position, float32."""
        hidden = self(tokens, positions, segment_ids)
        if not self.config.tied_head:
            return self.head(hidden).astype(jnp.float32)
        kernel = self.wte.embedding.T.astype(self.dtype)
        return jnp.matmul(hidden, kernel, precision=matmul_precision(self.dtype)).astype(jnp.float32)


def aligned(states: Float[Array, "b s d"], positions: Int[Array, "b s"]) -> Float[Array, "b s d"]:
    """States about the next token as states about the token itself: each from the position before it.

    aligned[i] = states[i - 1], and states[i] where a segment begins (position 0): docs/method.md 10.
    """
    return jnp.where(positions[..., None] == 0, states, jnp.roll(states, 1, axis=1))


def head_part(params: Params) -> Params:
    """The part of the tree that holds the output head, for `head_kernel`."""
    return {name: params[name] for name in (["head"] if "head" in params else ["wte"])}


def head_kernel(part: Params) -> Float[Array, "d v"]:
    """The output head, given its part of the tree."""
    return part["head"]["kernel"] if "head" in part else part["wte"]["embedding"].T


def init_params(model: MaskPredictor, key: jax.Array) -> Params:
    """A freshly initialised parameter tree."""
    return model.init(key, jnp.zeros((1, 1), jnp.int32), method=MaskPredictor.logits)["params"]


def abstract_params(model: MaskPredictor) -> Params:
    """The tree of `init_params` as shapes and dtypes only.

    Raises:
      ValueError: a parameter of the network has no row in its architecture's table, or a row no parameter.
    """
    tree = _shapes(MaskPredictor(model.config, param_dtype=model.param_dtype))
    found = {tuple(key.key for key in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    said = {path: row.shape for path, row in registry.parameters(model.config).items()}
    if wrong := {path for path in found.keys() | said.keys() if found.get(path) != said.get(path)}:
        path = min(wrong)
        raise ValueError(
            f"models/{model.config.architecture}.py: parameter {'/'.join(path)} has the shape {said.get(path)} in the "
            f"table and {found.get(path)} in the network"
        )
    return jax.tree.map(lambda leaf: leaf, tree)  # the caller's own


@functools.cache
def _shapes(model: MaskPredictor) -> Params:
    """Shapes and dtypes of a network on one device. Every command asks several times, and tracing takes a while."""
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
