"""Writing a model as a checkpoint of ours, piece by piece.

Each leaf goes to its place in chunks that a mesh need not share, so that whatever reads it later reads what it owns,
and the digest of the manifest is of the bits that were written. A step of training is written by Orbax as it stands on
its devices (training_state.py).
"""

import contextlib
import dataclasses
import glob
import math
import os
import time
from collections.abc import Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from tqdm import tqdm

from elbo_kto_jax.checkpoints import names
from elbo_kto_jax.checkpoints.arrays import ListsSizes, kvstore
from elbo_kto_jax.checkpoints.digest import Digest
from elbo_kto_jax.checkpoints.folders import absolute, check_destination, is_checkpoint
from elbo_kto_jax.checkpoints.manifest import AssetsSave, StoredTree, unsaid_mask
from elbo_kto_jax.checkpoints.model import Model, Source
from elbo_kto_jax.models import registry
from elbo_kto_jax.models.table import TreePath
from elbo_kto_jax.runtime import paths
from elbo_kto_jax.runtime.files import ahead, atomic_write, is_unfinished, unfinished_mark, writing

_SETTLED = 0.2  # seconds without a new file after which an interrupted save is over
_PATIENCE = 10.0  # seconds after which it is not waited for any longer

# Largest sizes of a chunk of a converted model by logical axis: meshes split `model` most finely, 4096 up to 64 times
# before two devices share a chunk. The others as long as the pieces in which conversions read, names.ROWS.
_CHUNK = {"layers": 1, "model": 64}


def save_model(path: str | os.PathLike, model: Model | Source, overwrite: bool = False) -> None:
    """Writes a model as a checkpoint folder, piece by piece.

    Args:
      path: the new folder.
      overwrite: replace a checkpoint that is already there.

    Raises:
      UserError: `path` exists and may not be replaced.
    """
    folder = absolute(path)
    paths.refuse_checkpoints(folder, "--out")
    check_destination(folder, overwrite, is_checkpoint)
    source = Source.of(model) if isinstance(model, Model) else model
    digest = Digest(source.leaves)
    bar = tqdm(total=source.nbytes, desc="writing parameters", unit="B", unit_scale=True, disable=None, leave=False)

    def manifest() -> dict[str, StoredTree]:
        source.check(digest)
        return {"params": StoredTree.of(source.leaves, digest.hexdigest())}

    tree = names.unflatten({path: _Streamed(source, path, digest, bar) for path in source.leaves})
    mask_token_id = unsaid_mask(source.config, source.assets)
    items = {
        "assets": AssetsSave(source.assets, manifest, mask_token_id=mask_token_id),
        "params": _StreamedTreeSave(tree),
    }
    _remove_unfinished(folder)  # of a save that was killed
    try:
        with (
            _marked(folder),
            writing(folder),
            bar,
            contextlib.closing(ocp.Checkpointer(ocp.CompositeCheckpointHandler())) as checkpointer,
        ):
            checkpointer.save(folder, args=ocp.args.Composite(**items), force=True)
    except BaseException:  # a full disk, a signal: what there is of the checkpoint only takes room
        _remove_interrupted(folder)
        raise


@contextlib.contextmanager
def _marked(folder: epath.Path) -> Iterator[None]:
    """Within it, a folder in a bucket is marked as not whole; Orbax writes it where it will stay."""
    if not paths.is_remote(folder):
        yield
        return
    mark = unfinished_mark(folder)
    atomic_write(mark, "this folder is not whole: run again the command that writes it\n")
    folder.rmtree(missing_ok=True)  # what --overwrite replaces, or an earlier try left
    yield
    mark.unlink()


def _remove_unfinished(folder: epath.Path) -> None:
    if paths.is_remote(folder):
        if is_unfinished(folder):
            folder.rmtree(missing_ok=True)
            unfinished_mark(folder).unlink()
        return
    for left in _unfinished(folder):
        if os.path.islink(left):
            os.unlink(left)
        else:
            left.rmtree()


def _unfinished(folder: epath.Path) -> list[epath.Path]:
    return list(folder.parent.glob(f"{glob.escape(folder.name)}.orbax-checkpoint-tmp*"))


def _remove_interrupted(folder: epath.Path) -> None:
    """Removes what an exception left, again until nothing comes back: threads of Orbax go on for a moment."""
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            _remove_unfinished(folder)
        except OSError:  # a thread wrote into a folder that was being emptied
            if time.monotonic() > until:
                raise
        time.sleep(_SETTLED)
        if not _unfinished(folder) or time.monotonic() > until:
            return


def chunk_shape(axes: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the chunks of a converted model's array, by its logical axes."""
    return tuple(min(size, _CHUNK.get(axis, names.ROWS)) for size, axis in zip(shape, axes, strict=True))


@dataclasses.dataclass(frozen=True)
class _Streamed:
    """The leaf `path` of `source`, in the place of an array in a tree that is saved."""

    source: Source
    path: TreePath
    digest: Digest
    bar: tqdm

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.leaves[self.path].shape

    @property
    def dtype(self) -> np.dtype:
        return self.source.leaves[self.path].dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def write(self, array: tensorstore.TensorStore) -> None:
        """Writes every piece; one is read, one is added to the digest and two are written at a time."""
        leaf = registry.parameters(self.source.config)[self.path]
        indices = (index for layer in range(len(leaf.tensors)) for index in names.pieces(leaf, layer))
        buffers = self.source.buffers(3, published=False)
        writing: tensorstore.WriteFutures | None = None
        for index, piece in ahead((index, self.source.read(self.path, index, buffers)) for index in indices):
            before, writing = writing, array[index].write(piece, can_reference_source_data_indefinitely=True)
            self.digest.add(self.path, tuple(axis.start for axis in index), piece)
            if before is not None:
                before.result()
            self.bar.update(piece.nbytes)
        if writing is not None:
            writing.result()


class _StreamedHandler(ocp.type_handlers.NumpyHandler):
    """Writes _Streamed leaves as Orbax writes numpy arrays, but in pieces, uncompressed and in finer chunks."""

    async def serialize(self, values, infos, args=None):
        for value, info in zip(values, infos, strict=True):
            axes = registry.parameters(value.source.config)[value.path].axes
            array = tensorstore.open(
                {
                    "driver": "zarr",
                    # Where Orbax has each process write; it merges these folders when it is done.
                    "kvstore": kvstore(absolute(info.parent_dir) / "ocdbt.process_0", info.name),
                    "metadata": {"compressor": None, "chunks": chunk_shape(axes, value.shape)},
                    "store_data_equal_to_fill_value": True,
                },
                dtype=value.dtype.name,
                shape=value.shape,
                create=True,
            ).result()
            value.write(array)
        return []


class _StreamedTreeHandler(ListsSizes, ocp.PyTreeCheckpointHandler):
    """Trees of _Streamed leaves."""

    def __init__(self):
        registry = ocp.type_handlers.create_type_handler_registry(
            (_Streamed, _StreamedHandler()),
            (jax.Array, ocp.type_handlers.ArrayHandler()),  # there are none, but without it Orbax warns
        )
        super().__init__(type_handler_registry=registry)


@ocp.args.register_with_handler(_StreamedTreeHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _StreamedTreeSave(ocp.args.PyTreeSave):
    """Saves a tree of _Streamed leaves through _StreamedTreeHandler."""
