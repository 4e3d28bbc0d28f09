"""python -m conversion.verify --source=HF_FOLDER --checkpoint=DIR: compares every tensor, name by name, bit by bit.

A tensor differs if its shape, its dtype or any bit of it does: -0.0 is not 0.0, and two NaNs are equal only if their
bits are. So a checkpoint that was converted to another dtype differs from its source.
"""

import math
import sys
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from elbo_kto_jax import cli
from elbo_kto_jax.checkpoints import names
from elbo_kto_jax.checkpoints.buffers import Buffers
from elbo_kto_jax.checkpoints.folders import is_checkpoint, locate
from elbo_kto_jax.checkpoints.huggingface import HuggingFaceFolder, open_folder
from elbo_kto_jax.checkpoints.load import open_source
from elbo_kto_jax.checkpoints.model import Source
from elbo_kto_jax.runtime import terminal
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.files import to_json


def main(argv: list[str]) -> dict:
    """Compares and returns the summary: tensors compared, whether all are equal, how many differ.

    Raises:
      UserError: a tensor differs; the summary has been printed, and each difference is a line on stderr.
    """
    parser = cli.Flags("conversion.verify", "Compares a checkpoint of ours with a published one, bit by bit.")
    parser.add_argument("--source", required=True, help="folder of safetensors, or a Hugging Face hub id")
    parser.add_argument("--checkpoint", required=True, help="converted checkpoint, training step or workdir")
    flags, _ = parser.parse(argv)

    jax.config.update("jax_platforms", "cpu")
    folder = locate(flags.source, "--source", weights=True)
    if is_checkpoint(folder):
        raise UserError(f"--source={flags.source}: a converted checkpoint; expected a published one (safetensors)")
    source, checkpoint = open_folder(Path(folder)), open_source(flags.checkpoint, flag="--checkpoint")
    theirs, ours = names.published_tensors(source.config), names.published_tensors(checkpoint.config)
    every = [*theirs, *(ours.keys() - theirs.keys())]
    buffers, different = checkpoint.buffers(1, published=True), 0
    for name in tqdm(every, desc="comparing", unit="tensor", disable=None, leave=False):
        difference = "not in the source"
        if name in theirs:
            difference = "not in the checkpoint"
        if name in theirs and name in ours:
            difference = difference_between(source, checkpoint, name, buffers)
        if difference:
            different += 1
            print(terminal.message(f"{name}: {difference}"), file=sys.stderr)
    summary = {"tensors": len(every), "equal": not different, "different": different}
    if different:
        terminal.say_json(to_json(summary))
        raise UserError(
            f"{different} of {len(every)} tensors of {flags.checkpoint} differ from {flags.source}; convert it again"
        )
    return summary


def difference_between(source: HuggingFaceFolder, checkpoint: Source, name: str, buffers: Buffers) -> str:
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
        count += np.count_nonzero(expected.view(bits) != piece.view(bits))
        start = stop
    return f"{count} of {math.prod(theirs.shape)} values differ" if count else ""


if __name__ == "__main__":
    cli.run(main)
