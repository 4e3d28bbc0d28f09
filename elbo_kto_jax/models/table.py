"""The rows of a parameter table: everything that is to be said of one parameter of an architecture, once.

Conversion, sharding, FLOPs, adapters, digests, planning and the network itself read the table (`registry.parameters`).
A row is made by what it holds:

    kernel("blocks/q_proj", "model.layers.{}.self_attn.q_proj", layers=n, model=d, heads=h)

is the leaf blocks/q_proj/kernel [n d h] of our tree, whose axes are called layers, model and heads, and layer i of it
is the transpose of the published tensor model.layers.{i}.self_attn.q_proj.weight [h d].
"""

import dataclasses
import math
from typing import Literal

TreePath = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One leaf of the parameter tree, and the published tensors in it.

    Attributes:
      path: keys of the leaf, outermost first.
      shape: shape of the leaf, with the layer axis in front if it is stacked.
      axes: the logical name of each axis, which sharding/rules.py lays out over a mesh.
      tensors: published names, in the order of the layers; exactly one if the leaf is not stacked.
      transposed: the leaf holds the transpose of each published tensor.
      init: how a fresh one begins: normal with a standard deviation of 0.02, ones, or zeros.
      duplicate: a second name under which the tensor may be published too, with equal values.
    """

    path: TreePath
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    tensors: tuple[str, ...]
    transposed: bool
    init: Literal["normal", "ones", "zeros"]
    duplicate: str | None = None

    @property
    def stacked(self) -> bool:
        """Whether the first axis counts layers."""
        return self.axes[0] == "layers"

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix of a layer: every token meets it once, it may be int8 and have an adapter."""
        return self.stacked and self.path[-1] == "kernel"

    @property
    def size(self) -> int:
        return math.prod(self.shape)


Table = dict[TreePath, Parameter]


def kernel(path: str, published: str, **axes: int) -> Parameter:
    """The matrix of a linear map, [in out] here and [out in] in the published checkpoint."""
    return _row(f"{path}/kernel", f"{published}.weight", axes, transposed=True, init="normal")


def bias(path: str, published: str, **axes: int) -> Parameter:
    """What a linear map adds."""
    return _row(f"{path}/bias", f"{published}.bias", axes, transposed=False, init="zeros")


def scale(path: str, published: str, **axes: int) -> Parameter:
    """The weight of an RMSNorm."""
    return _row(f"{path}/scale", f"{published}.weight", axes, transposed=False, init="ones")


def embedding(path: str, published: str, duplicate: str | None = None, **axes: int) -> Parameter:
    """A vector for each token; `duplicate`: see `Parameter`."""
    row = _row(f"{path}/embedding", f"{published}.weight", axes, transposed=False, init="normal")
    return dataclasses.replace(row, duplicate=duplicate)


def table(*rows: Parameter) -> Table:
    """The rows by their paths, in their order."""
    return {row.path: row for row in rows}


def _row(path: str, published: str, axes: dict[str, int], *, transposed: bool, init) -> Parameter:
    tensors = tuple(published.format(layer) for layer in range(axes.get("layers", 1)))
    return Parameter(tuple(path.split("/")), tuple(axes.values()), tuple(axes), tensors, transposed, init)
