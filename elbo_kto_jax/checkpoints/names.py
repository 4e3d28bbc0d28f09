"""Between the tensors of a published checkpoint and the leaves of our tree, as the table of parameters says.

Published Linear weights are [out, in] and there is one tensor per layer; our kernels are [in, out] and the layers of
one kind are stacked along a new first axis (models/table.py).
"""

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

from elbo_kto_jax.models import registry
from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.models.table import Parameter, TreePath
from elbo_kto_jax.runtime.errors import UserError

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


def published_tensors(config: ModelConfig) -> dict[str, PublishedTensor]:
    """Every tensor of the published checkpoint by its name: embedding, then layer by layer, then the output head."""
    table = {}
    for path, leaf in registry.parameters(config).items():
        shape = leaf.shape[1:] if leaf.stacked else leaf.shape
        for layer, name in enumerate(leaf.tensors):
            published_shape = shape[::-1] if leaf.transposed else shape
            table[name] = PublishedTensor(published_shape, path, layer if leaf.stacked else None, leaf.transposed)
    first, *last = (name for name, tensor in table.items() if tensor.layer is None)
    layers = {name: tensor.layer for name, tensor in table.items() if tensor.layer is not None}
    return {name: table[name] for name in (first, *sorted(layers, key=lambda name: layers[name]), *last)}


def published_duplicates(config: ModelConfig) -> dict[str, str]:
    """The second name under which a tensor may be published -> its first."""
    rows = registry.parameters(config).values()
    return {row.duplicate: row.tensors[0] for row in rows if row.duplicate is not None}


def unflatten(leaves: Mapping[TreePath, object]) -> dict:
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


def pieces(leaf: Parameter, layer: int) -> Iterator[Index]:
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
