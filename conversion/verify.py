"""python -m conversion.verify --source=HF_FOLDER --checkpoint=DIR: compares every tensor, name by name, bit by bit.

A tensor differs if its shape, its dtype or any bit of it does: -0.0 is not 0.0, and two NaNs are equal only if their
bits are. So a checkpoint that was converted to another dtype differs from its source.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from elbo_kto_jax import cli
from elbo_kto_jax.checkpoint import huggingface, names, store
from elbo_kto_jax.errors import UserError
from elbo_kto_jax.files import to_json


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
    folder = store.locate(flags.source, "--source", weights=True)
    if store.is_checkpoint(folder):
        raise UserError(f"--source={flags.source}: a converted checkpoint; expected a published one (safetensors)")
    source = huggingface.open_folder(Path(folder))
    model = store.load_model(flags.checkpoint, flag="--checkpoint")
    theirs, ours = names.published_tensors(source.config), names.published_tensors(model.config)
    every = [*theirs, *(ours.keys() - theirs.keys())]
    different = 0
    for name in tqdm(every, desc="comparing", unit="tensor", disable=None, leave=False):
        difference = "not in the source"
        if name in theirs:
            difference = "not in the checkpoint"
        if name in theirs and name in ours:
            expected = source.read(name, tuple(slice(0, size) for size in theirs[name].shape))
            difference = difference_between(expected, huggingface.published_tensor(model.params, ours[name]))
        if difference:
            different += 1
            print(f"{name}: {difference}", file=sys.stderr)
    summary = {"tensors": len(every), "equal": not different, "different": different}
    if different:
        print(to_json(summary))
        raise UserError(
            f"{different} of {len(every)} tensors of {flags.checkpoint} differ from {flags.source}; convert it again"
        )
    return summary


def difference_between(source: np.ndarray, checkpoint: np.ndarray) -> str:
    """How two tensors differ, in words; empty if shape, dtype and all bits are equal."""
    if source.shape != checkpoint.shape:
        return f"shape {source.shape} in the source, {checkpoint.shape} in the checkpoint"
    if source.dtype != checkpoint.dtype:
        return f"{source.dtype} in the source, {checkpoint.dtype} in the checkpoint"
    bits = np.dtype(f"uint{8 * source.dtype.itemsize}")
    count = np.count_nonzero(source.view(bits) != checkpoint.view(bits))
    return f"{count} of {source.size} values differ" if count else ""


if __name__ == "__main__":
    cli.run(main)
