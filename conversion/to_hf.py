"""python -m conversion.to_hf --source=CHECKPOINT --out=DIR: our checkpoint to published safetensors.

Tensors keep the dtype in which they are stored, so that nothing is lost, or get that of --dtype; where the config.json
of the model that was converted or trained says another one, DIR's says what its tensors are. It also says with which
mask token the model was trained, where that of the published model did not.
Pieces of tensors go from file to file, so that memory does not grow with the model. DIR appears when it is whole: an
interrupted conversion leaves a folder .DIR.*.partial without a config.json, and the same command starts again.
"""

import argparse
import re
import time
from pathlib import Path

import jax
from jax.typing import DTypeLike

from elbo_kto_jax import cli
from elbo_kto_jax.checkpoints import names
from elbo_kto_jax.checkpoints.assets import with_dtype, with_mask
from elbo_kto_jax.checkpoints.digest import Digest
from elbo_kto_jax.checkpoints.folders import check_destination
from elbo_kto_jax.checkpoints.huggingface import is_published
from elbo_kto_jax.checkpoints.load import open_source
from elbo_kto_jax.checkpoints.manifest import unsaid_mask
from elbo_kto_jax.checkpoints.model import Source
from elbo_kto_jax.checkpoints.publish import write_folder
from elbo_kto_jax.checkpoints.safetensors_file import DTYPE_NAMES
from elbo_kto_jax.runtime import lock

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(argv: list[str]) -> dict:
    """Converts and returns the summary: published tensors, bytes of tensors written, seconds."""
    parser = cli.Flags("conversion.to_hf", "Converts a checkpoint into the published form of its model.")
    parser.add_argument("--source", required=True, help="converted checkpoint, step of a training run or its workdir")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="of every tensor (default: as stored)")
    parser.add_argument(
        "--shard-size", type=shard_size, default="5GB", help="bytes per file: a number and KB, MB or GB (default: 5GB)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the published checkpoint at --out")
    flags, _ = parser.parse(argv)

    started = time.monotonic()
    jax.config.update("jax_platforms", "cpu")
    out = Path(flags.out)
    with lock.beside(out, "--out"):
        check_destination(out, flags.overwrite, is_published)
        source = open_source(flags.source, dtype=flags.dtype, flag="--source")
        size = write(out, source, flags.shard_size, flags.dtype)
    return {"tensors": len(source.published()), "bytes": size, "seconds": time.monotonic() - started}


def write(out: Path, source: Source, shard_size: int, dtype: DTypeLike | None = None) -> int:
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


if __name__ == "__main__":
    cli.run(main)
