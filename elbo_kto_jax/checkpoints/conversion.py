"""Conversions between the published form of a model and ours, in pieces of tensors, and their comparison.

Pieces go from file to file, so that memory does not grow with the model. What is written appears when it is whole.
"""

import argparse
import math
import re
import sys
import time
from pathlib import Path

import numpy as np
from jax.typing import DTypeLike
from tqdm import tqdm

from elbo_kto_jax.checkpoints import huggingface, names
from elbo_kto_jax.checkpoints.assets import with_dtype, with_mask
from elbo_kto_jax.checkpoints.buffers import Buffers
from elbo_kto_jax.checkpoints.digest import Digest
from elbo_kto_jax.checkpoints.folders import check_destination, is_checkpoint, locate
from elbo_kto_jax.checkpoints.load import open_source
from elbo_kto_jax.checkpoints.manifest import unsaid_mask
from elbo_kto_jax.checkpoints.model import Source
from elbo_kto_jax.checkpoints.publish import write_folder
from elbo_kto_jax.checkpoints.save import save_model
from elbo_kto_jax.runtime import lock, paths, terminal
from elbo_kto_jax.runtime.errors import UserError

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def from_published(source: str, out: str, *, dtype: str | None, overwrite: bool) -> dict:
    """Writes a published model as a checkpoint; the summary: published tensors, bytes of parameters, seconds.

    Args:
      source: folder of safetensors, or a hub id.
      out: the checkpoint.
      dtype: of every parameter; None: as stored.
      overwrite: whether a checkpoint at `out` is replaced.

    Raises:
      UserError: `source` is no published model, or `out` cannot be written.
    """
    started = time.monotonic()
    paths.refuse_checkpoints(out, "--out")
    check_destination(out, overwrite, is_checkpoint)  # before minutes of reading
    with lock.beside(out, "--out"):
        opened = open_source(source, dtype=dtype, flag="--source")
        if dtype and any(leaf.dtype.name != dtype for leaf in opened.leaves.values()):
            raise UserError(
                f"--dtype={dtype}: --source={source} is a converted checkpoint and is copied as it is "
                "stored; leave --dtype out, or give it to conversion.to_hf"
            )
        save_model(out, opened, overwrite)
    return {"tensors": len(opened.published()), "bytes": opened.nbytes, "seconds": time.monotonic() - started}


def to_published(source: str, out: Path, *, dtype: str | None, shard_size: int, overwrite: bool) -> dict:
    """Writes a checkpoint in the published form of its model; the summary: tensors, bytes of them, seconds.

    Args:
      source: converted checkpoint, step of a training run or its working folder.
      out: the folder.
      dtype: of every tensor; None: as stored.
      shard_size: most bytes of tensors in one file.
      overwrite: whether a published model at `out` is replaced.

    Raises:
      UserError: `source` is no checkpoint, a value is too large for `dtype`, or `out` cannot be written.
    """
    started = time.monotonic()
    with lock.beside(out, "--out"):
        check_destination(out, overwrite, huggingface.is_published)
        opened = open_source(source, dtype=dtype, flag="--source")
        size = write_published(out, opened, shard_size, dtype)
    return {"tensors": len(opened.published()), "bytes": size, "seconds": time.monotonic() - started}


def write_published(out: Path, source: Source, shard_size: int, dtype: DTypeLike | None = None) -> int:
    """Writes a model in its published form, replacing `out` at the end, and returns the bytes of its tensors.

    Args:
      shard_size: most bytes of tensors in one file.
      dtype: of every tensor; None: as `source` has it.

    Raises:
      UserError: what was read is not what was saved, or a value is too large for `dtype`; `out` is as it was.
    """
    tensors, digest = names.published_tensors(source.config), Digest(source.leaves)
    structs = source.published(dtype)
    assets = with_mask(source.assets, unsaid_mask(source.config, source.assets))
    buffers = source.buffers(2, published=True)  # one is written while the next one is read
    write_folder(
        out,
        with_dtype(assets, structs),
        structs,
        lambda name: source.published_pieces(tensors[name], buffers, digest, dtype),
        shard_size,
        check=lambda: source.check(digest),
    )
    return sum(struct.size * struct.dtype.itemsize for struct in structs.values())


def shard_size(text: str) -> int:
    """Bytes in a size such as 5GB or 1.5MB (powers of ten, as in Hugging Face)."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(KB|MB|GB)", text.upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"expected a size such as 5GB, 500MB or 100KB, got {text!r}")
    return size


def compare(source: str, checkpoint: str) -> dict:
    """Compares every tensor, name by name, bit by bit; each difference is a line on stderr.

    Returns:
      the summary: tensors compared, whether all are equal, how many differ.

    Raises:
      UserError: one of the two is not what it should be.
    """
    folder = locate(source, "--source", weights=True)
    if is_checkpoint(folder):
        raise UserError(f"--source={source}: a converted checkpoint; expected a published one (safetensors)")
    published, converted = huggingface.open_folder(paths.at(folder)), open_source(checkpoint, flag="--checkpoint")
    theirs, ours = names.published_tensors(published.config), names.published_tensors(converted.config)
    every = [*theirs, *(ours.keys() - theirs.keys())]
    buffers, different = converted.buffers(1, published=True), 0
    for name in tqdm(every, desc="comparing", unit="tensor", disable=None, leave=False):
        difference = "not in the source"
        if name in theirs:
            difference = "not in the checkpoint"
        if name in theirs and name in ours:
            difference = difference_between(published, converted, name, buffers)
        if difference:
            different += 1
            print(terminal.message(f"{name}: {difference}"), file=sys.stderr)
    return {"tensors": len(every), "equal": not different, "different": different}


def difference_between(source: huggingface.HuggingFaceFolder, checkpoint: Source, name: str, buffers: Buffers) -> str:
    """How the tensor `name` differs, in words; empty if shape, dtype and all bits are equal."""
    theirs, ours = names.published_tensors(source.config)[name], names.published_tensors(checkpoint.config)[name]
    if theirs.shape != ours.shape:
        return f"shape {theirs.shape} in the source, {ours.shape} in the checkpoint"
    dtype = checkpoint.leaves[ours.path].dtype
    if source.dtypes[name] != dtype:
        return f"{source.dtypes[name]} in the source, {dtype} in the checkpoint"
    bits, count, start = np.dtype(f"uint{8 * dtype.itemsize}"), 0, 0
    for piece in checkpoint.published_pieces(ours, buffers):
        stop = start + len(piece)
        expected = source.read(name, (slice(start, stop), *map(slice, theirs.shape[1:])))
        count += int(np.count_nonzero(expected.view(bits) != piece.view(bits)))
        start = stop
    return f"{count} of {math.prod(theirs.shape)} values differ" if count else ""
