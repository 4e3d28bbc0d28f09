"""Writing the published form of a checkpoint: a folder of safetensors, config.json and tokenizer.

A tensor is never whole in memory unless it is small, and the folder appears in its place once it is whole.
"""

import contextlib
import glob
import json
import secrets
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from elbo_kto_jax.checkpoints.safetensors_file import INDEX_FILE, SINGLE_FILE, header_of
from elbo_kto_jax.runtime.files import ahead, remove_tree, replace_folder, writing


def write_folder(
    out: Path,
    assets: Mapping[str, bytes],
    tensors: Mapping[str, jax.ShapeDtypeStruct],
    read: Callable[[str], Iterable[np.ndarray]],
    shard_size: int,
    metadata: Mapping[str, str] = types.MappingProxyType({}),
    check: Callable[[], None] = lambda: None,
) -> None:
    """Writes a published folder beside `out` and puts it in the place of `out` once it is whole.

    Args:
      assets: config.json and the tokenizer's files. They are written last, since nothing loads a folder without them.
      tensors, read, shard_size, metadata: see `write_shards`.
      check: called when everything has been read; what it raises undoes the folder.
    """
    with replacing(out) as partial:
        write_shards(partial, tensors, read, shard_size, metadata)
        check()
        for name, content in assets.items():
            (partial / name).write_bytes(content)


@contextlib.contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, which takes the place of `out` at the end of the block; an error undoes it."""
    for left in out.parent.glob(f".{glob.escape(out.name)}.*.partial"):  # by one that was killed
        remove_tree(left, ignore_errors=True)
    partial = out.with_name(f".{out.name}.{secrets.token_hex(8)}.partial")  # mkdir makes it: nobody can have put a link
    try:
        with writing(out):
            partial.mkdir(parents=True)
            yield partial
            replace_folder(partial, out)
    finally:
        remove_tree(partial, ignore_errors=True)


def write_shards(
    folder: Path,
    tensors: Mapping[str, jax.ShapeDtypeStruct],
    read: Callable[[str], Iterable[np.ndarray]],
    shard_size: int,
    metadata: Mapping[str, str] = types.MappingProxyType({}),
) -> None:
    """Writes safetensors files of at most `shard_size` bytes of tensors (or one larger tensor) each, and the index.

    Args:
      folder: existing folder to write into.
      tensors: published name -> shape and dtype, in the order of writing.
      read: published name -> the tensor, in pieces along its first axis; called once per tensor, in that order.
      metadata: of the index, besides the size.
    """
    sizes = {name: tensor.size * tensor.dtype.itemsize for name, tensor in tensors.items()}
    shards: list[list[str]] = []
    used = shard_size
    for name, size in sizes.items():
        if used + size > shard_size:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    # A single file keeps the name that Hugging Face gives it, and has an index too: readers that go by either find it.
    file_names = [SINGLE_FILE]
    if len(shards) > 1:
        file_names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    weight_map = {name: file for file, shard in zip(file_names, shards, strict=True) for name in shard}
    index = {
        "metadata": {"total_size": sum(sizes.values()), **metadata},
        "weight_map": dict(sorted(weight_map.items())),
    }
    with tqdm(total=sum(sizes.values()), desc="writing weights", unit="B", unit_scale=True, disable=None) as bar:
        for file_name, shard in zip(file_names, shards, strict=True):
            with (folder / file_name).open("wb") as file:
                file.write(header_of({name: tensors[name] for name in shard}))
                for piece in ahead(piece for name in shard for piece in read(name)):
                    file.write(np.ascontiguousarray(piece).view(np.uint8).data)
                    bar.update(piece.nbytes)
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
