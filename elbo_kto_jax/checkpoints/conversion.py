"""Conversions between the published form of a model and ours, in pieces of tensors, and their comparison.

Pieces go from file to file, so that memory does not grow with the model. What is written appears when it is whole.
"""

import argparse
import logging
import math
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax.typing import DTypeLike
from tqdm import tqdm

from elbo_kto_jax.checkpoints import huggingface, names, peft
from elbo_kto_jax.checkpoints.adapters import StoredAdapters, find_adapters
from elbo_kto_jax.checkpoints.arrays import by_path
from elbo_kto_jax.checkpoints.assets import tokenizer_of, with_dtype, with_mask
from elbo_kto_jax.checkpoints.buffers import Buffers
from elbo_kto_jax.checkpoints.digest import Digest
from elbo_kto_jax.checkpoints.folders import absolute, check_destination, is_checkpoint, locate
from elbo_kto_jax.checkpoints.load import open_source
from elbo_kto_jax.checkpoints.manifest import unsaid_mask
from elbo_kto_jax.checkpoints.model import Source
from elbo_kto_jax.checkpoints.publish import replacing, write_folder
from elbo_kto_jax.checkpoints.safetensors_file import header_of
from elbo_kto_jax.checkpoints.save import save_model
from elbo_kto_jax.runtime import lock, paths, terminal
from elbo_kto_jax.runtime.errors import UserError

log = logging.getLogger(__name__)
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


def to_published(
    source: str,
    out: Path,
    *,
    dtype: str | None,
    shard_size: int,
    overwrite: bool,
    beside: Mapping[str, bytes] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> dict:
    """Writes a checkpoint in the published form of its model; the summary: tensors, bytes of them, seconds.

    Args:
      source: converted checkpoint, step of a training run or its working folder.
      out: the folder.
      dtype: of every tensor; None: as stored.
      shard_size: most bytes of tensors in one file.
      overwrite: whether a published model at `out` is replaced.
      beside: more files, by name.
      metadata: more of the index.

    Raises:
      UserError: `source` is no checkpoint, a value is too large for `dtype`, or `out` cannot be written.
    """
    started = time.monotonic()
    with lock.beside(out, "--out"):
        check_destination(out, overwrite, huggingface.is_published)
        opened = open_source(source, dtype=dtype, flag="--source")
        size = write_published(out, opened, shard_size, dtype, beside=beside, metadata=metadata)
    return {"tensors": len(opened.published()), "bytes": size, "seconds": time.monotonic() - started}


def write_published(
    out: Path,
    source: Source,
    shard_size: int,
    dtype: DTypeLike | None = None,
    *,
    beside: Mapping[str, bytes] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Writes a model in its published form, replacing `out` at the end, and returns the bytes of its tensors.

    Args:
      shard_size: most bytes of tensors in one file.
      dtype: of every tensor; None: as `source` has it.
      beside: more files, by name.
      metadata: more of the index.

    Raises:
      UserError: what was read is not what was saved, or a value is too large for `dtype`; `out` is as it was.
    """
    tensors, digest = names.published_tensors(source.config), Digest(source.leaves)
    structs = source.published(dtype)
    assets = with_mask(source.assets, unsaid_mask(source.config, source.assets))
    buffers = source.buffers(2, published=True)  # one is written while the next one is read
    write_folder(
        out,
        {**(beside or {}), **with_dtype(assets, structs)},
        structs,
        lambda name: source.published_pieces(tensors[name], buffers, digest, dtype),
        shard_size,
        metadata or {},
        check=lambda: source.check(digest),
    )
    return sum(struct.size * struct.dtype.itemsize for struct in structs.values())


def to_peft(
    source: str,
    out: Path,
    *,
    base: str | None,
    dtype: str | None,
    overwrite: bool,
    beside: Mapping[str, bytes] | None = None,
) -> dict:
    """Writes adapters in the form of the library PEFT (peft.py); the summary: tensors, bytes of them, seconds.

    Args:
      source: checkpoint of adapters, working folder of a run that trained them, or folder of PEFT's.
      out: the folder.
      base: the published model that PEFT is to put them on, a folder or a hub id; None: the one of the run.
      dtype: of every tensor; None: as stored.
      overwrite: whether PEFT's adapters at `out` are replaced.
      beside: more files, by name.

    Raises:
      UserError: `source` holds no adapters, PEFT cannot read their base, a value is too large for `dtype`, or `out`
        cannot be written.
    """
    started = time.monotonic()
    with lock.beside(out, "--out"):
        check_destination(out, overwrite, peft.is_peft)
        adapters = find_adapters(locate(source, "--source", weights=True))
        if adapters is None:
            raise UserError(f"--source={source}: a whole model without adapters; leave --adapter out")
        base = base or _base_for_peft(adapters)
        if adapters.adaptation.base_quantization != "none":
            log.warning(
                "%s: these adapters were trained on an int8 base; PEFT adds them to the base as it is published, which "
                "rounds differently. Without --adapter the export is the model that was trained",
                source,
            )
        size, count = _write_peft(out, adapters, base, dtype, beside or {})
    return {"tensors": count, "bytes": size, "seconds": time.monotonic() - started}


def _base_for_peft(adapters: StoredAdapters) -> str:
    """Where the base of adapters is.

    Raises:
      UserError: PEFT cannot read it.
    """
    base = adapters.adaptation.base_path
    if is_checkpoint(absolute(base)):
        raise UserError(
            f"{adapters.folder}: its base {base} is a converted checkpoint, which PEFT does not read; name the model "
            "that it was converted from: --base=HUB_ID_OR_FOLDER"
        )
    return base


def _write_peft(
    out: Path, adapters: StoredAdapters, base: str, dtype: str | None, beside: Mapping[str, bytes]
) -> tuple[int, int]:
    """Writes adapters and what is to lie beside them, replacing `out` at the end; bytes and number of their tensors."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for path, x in adapters.leaves.items()}
    arrays = {path: np.asarray(x) for path, x in by_path(adapters.read(names.unflatten(abstract))).items()}
    tensors = {}
    for name, (matrix, leaf, layer) in peft.slots(adapters.config).items():
        if ("blocks", matrix, leaf) in arrays:
            values = arrays["blocks", matrix, leaf][layer].T
            tensors[name] = np.empty(values.shape, dtype or values.dtype)
            names.convert(tensors[name], values, f"{adapters.folder}: {name}")
    said = peft.metadata(adapters.adaptation, unsaid_mask(adapters.config, adapters.assets))
    structs = {name: jax.ShapeDtypeStruct(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    matrices = {path[1] for path in adapters.leaves}
    with replacing(out) as partial:
        with (partial / peft.WEIGHTS_FILE).open("wb") as file:
            file.write(header_of(structs, said))
            for tensor in tensors.values():
                file.write(tensor.view(np.uint8).data)
        files = {**beside, **tokenizer_of(adapters.assets)}
        files[peft.CONFIG_FILE] = peft.config_text(adapters.config, adapters.adaptation, matrices, base)
        for name, content in files.items():
            (partial / name).write_bytes(content)
    return sum(tensor.nbytes for tensor in tensors.values()), len(tensors)


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
