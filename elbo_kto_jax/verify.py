"""python -m conversion.verify --source=HF_FOLDER --checkpoint=DIR: compares every tensor, name by name, bit by bit.

A tensor differs if its shape, its dtype or any bit of it does: -0.0 is not 0.0, and two NaNs are equal only if their
bits are. So a checkpoint that was converted to another dtype differs from its source.
"""

import jax

from elbo_kto_jax import cli
from elbo_kto_jax.checkpoints.conversion import compare
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
    flags = parser.parse_flags(argv)
    jax.config.update("jax_platforms", "cpu")
    summary = compare(flags.source, flags.checkpoint)
    if summary["different"]:
        terminal.say_json(to_json(summary))
        raise UserError(
            f"{summary['different']} of {summary['tensors']} tensors of {flags.checkpoint} differ from {flags.source}; "
            "convert it again"
        )
    return summary


if __name__ == "__main__":
    cli.run(main)
