"""python -m conversion.to_hf --source=CHECKPOINT --out=DIR: our checkpoint to published safetensors.

Pieces of tensors go from file to file, so that memory does not grow with the model. DIR appears when it is whole: an
interrupted conversion leaves a folder .DIR.*.partial without a config.json, and the same command starts again.
"""

import argparse
import re
import time
from pathlib import Path

import jax

from elbo_kto_jax import cli, lock
from elbo_kto_jax.checkpoint import huggingface, names, store
from elbo_kto_jax.checkpoint.buffers import Buffers
from elbo_kto_jax.checkpoint.digest import Digest

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(argv: list[str]) -> dict:
    """Converts and returns the summary: published tensors, bytes of tensors written, seconds."""
    parser = cli.Flags("conversion.to_hf", "Converts a checkpoint of ours into the published form.")
    parser.add_argument("--source", required=True, help="converted checkpoint, step of a training run or its workdir")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument(
        "--shard-size", type=shard_size, default="5GB", help="bytes per file: a number and KB, MB or GB (default: 5GB)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the published checkpoint at --out")
    flags, _ = parser.parse(argv)

    started = time.monotonic()
    jax.config.update("jax_platforms", "cpu")
    out = Path(flags.out)
    with lock.beside(out, "--out"):
        store.check_destination(out, flags.overwrite, huggingface.is_published)
        source = store.open_source(flags.source, flag="--source")
        write(out, source, flags.shard_size)
    return {"tensors": len(source.published()), "bytes": source.nbytes, "seconds": time.monotonic() - started}


def write(out: Path, source: store.Source, shard_size: int) -> None:
    """Writes a model in its published form, replacing `out` at the end.

    Args:
      shard_size: most bytes of tensors in one file.

    Raises:
      UserError: what was read is not what was saved; `out` is as it was.
    """
    tensors, digest = names.published_tensors(source.config), Digest(source.leaves)
    buffers = Buffers(4)  # two pieces: one is written while the next one is read
    huggingface.write_folder(
        out,
        source.assets,
        source.published(),
        lambda name: source.published_pieces(tensors[name], buffers, digest),
        shard_size,
        check=lambda: source.check(digest),
    )


def shard_size(text: str) -> int:
    """Bytes in a size such as 5GB or 1.5MB (powers of ten, as in Hugging Face)."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(KB|MB|GB)", text.upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"expected a size such as 5GB, 500MB or 100KB, got {text!r}")
    return size


if __name__ == "__main__":
    cli.run(main)
