"""python -m elbo_kto_jax.benchmark --config=... : seconds, FLOP/s and memory on this machine, beside a peer's.

The same records, weights, masks and K for both, each in a process of its own. The peer is the authors' scheme in
PyTorch (tests/peer/torch_elbo_kto.py): example by example, rows padded to --max-length, the graphs of K draws kept
until the backward pass; and, stronger than theirs, the same at each example's own length. Our training step is measured
as configured and, where the batch is several micro-batches, with the other number of passes over them as well. All must
give the same estimates, rewards, loss and gradient norm, as far as rounding allows, or the table says that they do not.
With K = 4 `balanced` draws the peer also runs with K = 8 `uniform` ones, the authors' setting, whose gradient has no
less variance (docs/estimators.md).
"""

import argparse
import dataclasses
import importlib.util
import logging
import os
import tempfile
from pathlib import Path

import jax

from elbo_kto_jax import cli
from elbo_kto_jax.benchmarking.measure import PEER, Plan, measure
from elbo_kto_jax.benchmarking.tables import as_text, write_report
from elbo_kto_jax.checkpoints import random_folder
from elbo_kto_jax.checkpoints.huggingface import is_published
from elbo_kto_jax.models import registry
from elbo_kto_jax.objectives.kto import Kto
from elbo_kto_jax.planning.fit import layers_that_fit
from elbo_kto_jax.runtime import terminal
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.files import atomic_write, to_json
from elbo_kto_jax.training.setup import prepare

log = logging.getLogger(__name__)


def main(argv: list[str]) -> dict:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the workers need the memory of the GPU
    options, config = _flags().parse(argv)
    out = Path(options.out)
    for file in (out / "benchmark.json", out / "report.html"):
        cli.refuse_existing(file, options.overwrite)
    for flag in ("records", "rounds", "max_length"):
        if getattr(options, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')}: expected at least 1, got {getattr(options, flag)}")
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, max_length=options.max_length, packing=True),
        train=dataclasses.replace(config.train, global_batch_size=options.records),
    )
    with tempfile.TemporaryDirectory(prefix="elbo_kto_jax_benchmark_") as scratch:
        if options.size:
            config = _with_random_model(config, options, Path(scratch) / "model")
        if not options.no_peer:
            _check_peer(config)
        setup = prepare(config, skip_bad=False)
        if options.records > len(setup.data.examples):
            raise UserError(f"--records: expected at most {len(setup.data.examples)}, the records of the data set")
        result = measure(
            Plan(
                setup,
                options.records,
                options.rounds,
                with_peer=not options.no_peer,
                peer_checkpointing=options.peer_checkpointing or jax.default_backend() == "gpu",
                scratch=Path(scratch),
            )
        )
    atomic_write(out / "benchmark.json", to_json(result))
    write_report(out / "report.html", result)
    terminal.say(as_text(result))
    if result["agrees"] is False:
        log.warning("the two did not compute the same, see the last table: the ratios say nothing")
    log.info("report: %s", out / "report.html")
    keys = ("ratio", "ours", "variants", "peer", "agrees", "memory")
    return {**{key: result[key] for key in keys}, "report": str(out / "report.html")}


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


def _with_random_model(config: Config, options: argparse.Namespace, folder: Path) -> Config:
    """The config with a model of random weights in `folder`, of as many layers as asked for or as fit."""
    dimensions = random_folder.dimensions(options.size)
    layers = options.layers or layers_that_fit(dimensions, options.max_length, config.model.param_dtype)
    log.info("writing %d layers of random weights, size %s", layers, options.size)
    random_folder.write(
        folder, Path(config.model.path), dimensions | {"n_layers": layers}, dtype=config.model.param_dtype
    )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(folder)))


def _check_peer(config: Config) -> None:
    alone = "or pass --no-peer"
    if not PEER.is_file():
        raise UserError(f"the peer {PEER} is part of a checkout, not of an installation; clone the project, {alone}")
    if importlib.util.find_spec("torch") is None:
        raise UserError(f"the peer needs PyTorch: pip install -e '.[bench]', {alone}")
    expected = {"cpu": "float32", "gpu": "bfloat16"}.get(jax.default_backend())
    if expected is None:
        raise UserError(
            f"the peer runs on CPUs and GPUs, not on {jax.default_backend()}; set JAX_PLATFORMS=cpu, {alone}"
        )
    for key in ("dtype", "param_dtype"):
        if getattr(config.model, key) != expected:
            raise UserError(f"config.model.{key}: the peer computes in {expected} here; set it to {expected}, {alone}")
    if config.objective.name != Kto.name:
        raise UserError(f"config.objective.name: the peer computes {Kto.name}; set it to that, {alone}")
    for name in ("desirable_weight", "undesirable_weight"):
        if getattr(config.objective, name) != 1.0:
            raise UserError(f"config.objective.{name}: the peer's is 1; set it to 1.0, {alone}")
    if not is_published(Path(config.model.path)):
        path = config.model.path
        raise UserError(f"--config.model.path={path}: the peer reads a Hugging Face folder; give one, {alone}")


if __name__ == "__main__":
    cli.run(main)
