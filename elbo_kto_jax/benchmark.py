"""python -m elbo_kto_jax.benchmark --config=... : seconds, FLOP/s and memory on this machine, beside a peer's.

The same records, weights, masks and K for both, each in a process of its own. The peer is the authors' scheme in
PyTorch (tests/peer/torch_elbo_kto.py): example by example, rows padded to --max-length, the graphs of K draws kept
until the backward pass; and, stronger than theirs, the same at each example's own length. Our training step is measured
as configured and, where the batch is several micro-batches, with the other number of passes over them as well. All must
give the same estimates, rewards, loss and gradient norm, as far as rounding allows, or the table says that they do not.
With K = 4 `balanced` draws the peer also runs with K = 8 `uniform` ones, the authors' setting, whose gradient has no
less variance (docs/estimators.md).
"""

import os

from elbo_kto_jax import cli
from elbo_kto_jax.benchmarking.run import FILES, Request, benchmark
from elbo_kto_jax.checkpoints import random_folder
from elbo_kto_jax.models import registry
from elbo_kto_jax.runtime import paths
from elbo_kto_jax.runtime.flags import refuse_existing


def main(argv: list[str]) -> dict:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the workers need the memory of the GPU
    options, config = _flags().parse(argv)
    for name in FILES:
        refuse_existing(paths.at(options.out) / name, options.overwrite)
    request = Request(
        records=options.records,
        rounds=options.rounds,
        max_length=options.max_length,
        size=options.size or "",
        layers=options.layers,
        with_peer=not options.no_peer,
        peer_checkpointing=options.peer_checkpointing,
    )
    return benchmark(request, config, paths.at(options.out))


def _flags() -> cli.Flags:
    flags = cli.Flags("elbo_kto_jax.benchmark", "Measure a training step and a reference pass, beside a PyTorch peer.")
    flags.add_config()
    flags.add_argument("--max-length", type=int, default=4096, help="tokens of a row (default: %(default)s)")
    flags.add_argument("--records", type=int, default=24, help="the first so many of the data (default: %(default)s)")
    flags.add_argument("--rounds", type=int, default=5, help="measurements of everything (default: %(default)s)")
    flags.add_argument(
        "--size",
        choices=(random_folder.SMALL, *registry.architectures()["llada"].sizes),
        help="random weights of this size, with the tokenizer in config.model.path, instead of the model there",
    )
    flags.add_argument("--layers", type=int, default=0, help="with --size: how many (default: as many as fit)")
    flags.add_argument("--no-peer", action="store_true", help="measure this implementation alone; needs no PyTorch")
    flags.add_argument(
        "--peer-checkpointing", action="store_true", help="the peer recomputes activations, as it always does on a GPU"
    )
    flags.add_argument("--out", default="runs/benchmark", help="folder for benchmark.json, report.html")
    flags.add_argument("--overwrite", action="store_true", help="replace what --out holds")
    return flags


if __name__ == "__main__":
    cli.run(main)
