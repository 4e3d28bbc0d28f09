"""The one table between the tensor names of a published LLaDA checkpoint and the leaves of our tree (docs/method.md 4).

Published Linear weights are [out, in] and there is one tensor per layer; our kernels are [in, out] and the layers of
one kind are stacked along a new first axis:

    blocks/q_proj/kernel [n_layers, d_model, n_heads * head_dim]  <->  model.transformer.blocks.{i}.q_proj.weight
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from elbo_kto_jax.errors import UserError
from elbo_kto_jax.model.config import ModelConfig

TreePath = tuple[str, ...]
Index = tuple[slice, ...]  # one slice per axis, with its start and stop

_BAND = 16  # columns that are copied at once: of a transposed array a cache holds no more; half the time of 64
ROWS = 4096  # of a published tensor that conversions hold at once: 100 MB of the 8B model's widest, in bfloat16


@dataclasses.dataclass(frozen=True)
class PublishedTensor:
    """Where one published tensor lives in our tree.

    Attributes:
      shape: its shape in the published checkpoint.
      path: keys of the leaf that holds it, outermost first.
      layer: index along the first axis of a stacked leaf; None: the tensor is the whole leaf.
      transposed: the leaf holds the transpose.
    """

    shape: tuple[int, ...]
    path: TreePath
    layer: int | None
    transposed: bool


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of our parameter tree and the published tensors in it.

    Attributes:
      shape: shape of the leaf, with the layer axis in front if it is stacked.
      tensors: published names, in the order of the layers; exactly one if the leaf is not stacked.
      stacked: the first axis of the leaf counts layers.
      transposed: the leaf holds the transpose of each published tensor.
    """

    shape: tuple[int, ...]
    tensors: tuple[str, ...]
    stacked: bool
    transposed: bool


def parameter_leaves(config: ModelConfig) -> dict[TreePath, Leaf]:
    """Every leaf of the parameter tree by its path."""
    d_model = config.d_model
    attention, key_value = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim

    def single(name: str, *shape: int, transposed: bool = False) -> Leaf:
        return Leaf(shape, (f"model.transformer.{name}.weight",), stacked=False, transposed=transposed)

    def stacked(name: str, *shape: int, transposed: bool = True) -> Leaf:
        tensors = tuple(f"model.transformer.blocks.{i}.{name}.weight" for i in range(config.n_layers))
        return Leaf((config.n_layers, *shape), tensors, stacked=True, transposed=transposed)

    return {
        ("wte", "embedding"): single("wte", config.embedding_size, d_model),
        ("blocks", "attn_norm", "scale"): stacked("attn_norm", d_model, transposed=False),
        ("blocks", "q_proj", "kernel"): stacked("q_proj", d_model, attention),
        ("blocks", "k_proj", "kernel"): stacked("k_proj", d_model, key_value),
        ("blocks", "v_proj", "kernel"): stacked("v_proj", d_model, key_value),
        ("blocks", "attn_out", "kernel"): stacked("attn_out", attention, d_model),
        ("blocks", "ff_norm", "scale"): stacked("ff_norm", d_model, transposed=False),
        ("blocks", "ff_proj", "kernel"): stacked("ff_proj", d_model, config.mlp_hidden_size),
        ("blocks", "up_proj", "kernel"): stacked("up_proj", d_model, config.mlp_hidden_size),
        ("blocks", "ff_out", "kernel"): stacked("ff_out", config.mlp_hidden_size, d_model),
        ("ln_f", "scale"): single("ln_f", d_model),
        ("head", "kernel"): single("ff_out", d_model, config.embedding_size, transposed=True),
    }


def published_tensors(config: ModelConfig) -> dict[str, PublishedTensor]:
    """Every tensor of the published checkpoint by its name: embedding, then layer by layer, then the output head."""
    table = {}
    for path, leaf in parameter_leaves(config).items():
        shape = leaf.shape[1:] if leaf.stacked else leaf.shape
        for layer, name in enumerate(leaf.tensors):
            published_shape = shape[::-1] if leaf.transposed else shape
            table[name] = PublishedTensor(published_shape, path, layer if leaf.stacked else None, leaf.transposed)
    first, *last = (name for name, tensor in table.items() if tensor.layer is None)
    blocks = sorted((name for name in table if table[name].layer is not None), key=lambda name: table[name].layer)
    return {name: table[name] for name in (first, *blocks, *last)}


def unflatten(leaves: dict[TreePath, object]) -> dict:
    """The nested dictionary whose leaves lie at the given paths."""
    tree: dict = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def get(tree: dict, path: TreePath):
    """The leaf at `path`."""
    for key in path:
        tree = tree[key]
    return tree


def pieces(leaf: Leaf, layer: int) -> Iterator[Index]:
    """Indices into `leaf` that together are its published tensor number `layer`, at most ROWS of its rows each."""
    shape = leaf.shape[1:] if leaf.stacked else leaf.shape
    rows = len(shape) - 1 if leaf.transposed else 0
    for start in range(0, shape[rows], ROWS):
        index = [slice(0, size) for size in shape]
        index[rows] = slice(start, min(start + ROWS, shape[rows]))
        yield (slice(layer, layer + 1), *index) if leaf.stacked else tuple(index)


def convert(to: np.ndarray, tensor: np.ndarray, where: str) -> None:
    """to[...] = tensor in the dtype of `to`, also fast where one of them is transposed.

    Raises:
      UserError: a value of the tensor, which `where` names, is too large for that dtype.
    """
    with np.errstate(over="ignore"):  # found below, for bfloat16 too, which sets no flag
        for start in range(0, to.shape[-1], _BAND):
            to[..., start : start + _BAND] = tensor[..., start : start + _BAND]
    if tensor.dtype != to.dtype and np.any(np.isinf(to) != np.isinf(tensor)):
        raise UserError(f"{where}: a value is too large for {to.dtype}; choose float32 or bfloat16")
