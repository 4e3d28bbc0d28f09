"""A model with all that it takes to use it or to publish it again, in two forms.

`Model` holds its parameters in memory. `Source` reads them piece by piece from wherever they are, so that a conversion
holds pieces of a tensor and never a leaf of stacked layers. How either is loaded: load.py.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from jax.typing import DTypeLike
from transformers import PreTrainedTokenizerFast

from elbo_kto_jax.checkpoints import names
from elbo_kto_jax.checkpoints.arrays import damaged
from elbo_kto_jax.checkpoints.buffers import Buffers
from elbo_kto_jax.checkpoints.digest import Digest
from elbo_kto_jax.checkpoints.tokenizer import build_tokenizer
from elbo_kto_jax.models import registry
from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.models.table import TreePath


@dataclasses.dataclass(frozen=True)
class Model:
    """A mask predictor with everything needed to use it or to publish it again.

    Attributes:
      config: the architecture.
      params: parameter tree (registry.parameters).
      assets: file name -> content: config.json and the tokenizer files, byte for byte as published.
      source: the folder that it was loaded from.
    """

    config: ModelConfig
    params: dict
    assets: Mapping[str, bytes]
    source: str

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer of the checkpoint, chat template included.

        Raises:
          UserError: the checkpoint came without a readable tokenizer.json.
        """
        return build_tokenizer(self.assets, self.source)


@dataclasses.dataclass(frozen=True)
class Source:
    """A model whose parameters are read piece by piece, from wherever they are.

    Attributes:
      config, assets, path: as in `Model` (there: `source`).
      leaves: shape and dtype of every parameter by its path.
      read: (path of a leaf, index into one layer of it, Buffers or None) -> that piece, in memory of the former or new
        memory.
      arrays_per_read: how many arrays of its Buffers a call of `read` takes, the one that it returns among them.
      digest: of the bits that were saved, where that is known.
    """

    config: ModelConfig
    assets: Mapping[str, bytes]
    path: str
    leaves: Mapping[TreePath, jax.ShapeDtypeStruct]
    read: Callable[[TreePath, names.Index, Buffers | None], np.ndarray]
    arrays_per_read: int
    digest: str | None = None

    @classmethod
    def of(cls, model: Model) -> "Source":
        """The model in memory."""
        params = {path: names.get(model.params, path) for path in registry.parameters(model.config)}
        leaves = {path: jax.ShapeDtypeStruct(leaf.shape, np.dtype(leaf.dtype)) for path, leaf in params.items()}

        def read(path: TreePath, index: names.Index, buffers: Buffers | None) -> np.ndarray:
            return np.asarray(params[path][index])

        return cls(model.config, model.assets, model.source, leaves, read, arrays_per_read=0)

    @property
    def nbytes(self) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in self.leaves.values())

    def published(self, dtype: DTypeLike | None = None) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype (of all: `dtype`, or None: as read) of every published tensor, in the order of writing."""
        tensors = names.published_tensors(self.config)
        return {
            name: jax.ShapeDtypeStruct(t.shape, np.dtype(dtype or self.leaves[t.path].dtype))
            for name, t in tensors.items()
        }

    def buffers(self, pieces: int, *, published: bool) -> Buffers:
        """Memory in which that many of the latest pieces are valid at a time.

        Args:
          pieces: those in use, and the one that is read meanwhile.
          published: they come from `published_pieces`; otherwise from `read`.
        """
        return Buffers(pieces * (self.arrays_per_read + published))

    def published_pieces(
        self,
        tensor: names.PublishedTensor,
        buffers: Buffers,
        digest: Digest | None = None,
        dtype: DTypeLike | None = None,
    ) -> Iterator[np.ndarray]:
        """A published tensor, names.ROWS of its rows at a time; what is read is added to `digest`.

        Args:
          buffers: from the method `buffers`.
          dtype: of the pieces; None: as they are read.

        Raises:
          UserError: a value is too large for `dtype`.
        """
        leaf = registry.parameters(self.config)[tensor.path]
        dtype = self.leaves[tensor.path].dtype if dtype is None else np.dtype(dtype)
        for index in names.pieces(leaf, tensor.layer or 0):
            piece = self.read(tensor.path, index, buffers)
            if digest is not None:
                digest.add(tensor.path, tuple(axis.start for axis in index), piece)
            piece = piece[0] if leaf.stacked else piece
            piece = piece.T if leaf.transposed else piece
            if leaf.transposed or piece.dtype != dtype:
                rows = buffers.empty(piece.shape, dtype)
                names.convert(rows, piece, f"{self.path}: tensor {leaf.tensors[tensor.layer or 0]}")
                piece = rows
            yield piece

    def check(self, digest: Digest) -> None:
        """Raises UserError where what was read, all of it, is not what was saved."""
        if self.digest not in (None, digest.hexdigest()):
            raise damaged(self.path)
