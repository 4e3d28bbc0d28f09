"""A benchmark as it is asked for: the model is made or read, both implementations are measured, and tables written."""

import dataclasses
import importlib.util
import logging
import tempfile
from pathlib import Path

import jax

from elbo_kto_jax.benchmarking.measure import PEER, Plan, measure
from elbo_kto_jax.benchmarking.tables import as_text, write_report
from elbo_kto_jax.checkpoints import huggingface, random_folder
from elbo_kto_jax.objectives.kto import Kto
from elbo_kto_jax.planning.fit import layers_that_fit
from elbo_kto_jax.runtime import paths, terminal
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.files import atomic_write, to_json
from elbo_kto_jax.training.setup import prepare

log = logging.getLogger(__name__)
FILES = ("benchmark.json", "report.html")


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be measured.

    Attributes:
      records: the first so many of the data; one batch.
      rounds: measurements of everything.
      max_length: tokens of a row.
      size: random weights of this size instead of config.model.path, whose tokenizer they get; "": the model there.
      layers: with `size`: how many; 0: as many as fit.
      with_peer: whether the PyTorch peer is measured beside.
      peer_checkpointing: whether the peer recomputes activations on a CPU, too.
    """

    records: int
    rounds: int
    max_length: int
    size: str = ""
    layers: int = 0
    with_peer: bool = True
    peer_checkpointing: bool = False


def benchmark(request: Request, config: Config, out: Path) -> dict:
    """Measures a training step and a reference pass, and writes FILES into `out`; the summary.

    Raises:
      UserError: the peer cannot run here, or the config, the model or the data has to be mended.
    """
    for name in ("records", "rounds", "max_length"):
        if getattr(request, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(request, name)}")
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, max_length=request.max_length, packing=True),
        train=dataclasses.replace(config.train, global_batch_size=request.records),
    )
    with tempfile.TemporaryDirectory(prefix="elbo_kto_jax_benchmark_") as scratch:
        result = _measured(request, config, Path(scratch))
    atomic_write(out / "benchmark.json", to_json(result))
    write_report(out / "report.html", result)
    terminal.say(as_text(result))
    if result["agrees"] is False:
        log.warning("the two did not compute the same, see the last table: the ratios say nothing")
    log.info("report: %s", out / "report.html")
    keys = ("ratio", "ours", "variants", "peer", "agrees", "memory")
    return {**{key: result[key] for key in keys}, "report": str(out / "report.html")}


def _measured(request: Request, config: Config, scratch: Path) -> dict:
    if request.size:
        config = _with_random_model(config, request, scratch / "model")
    if request.with_peer:
        _check_peer(config)
    setup = prepare(config, skip_bad=False)
    if request.records > len(setup.data.examples):
        raise UserError(f"--records: expected at most {len(setup.data.examples)}, the records of the data set")
    return measure(
        Plan(
            setup,
            request.records,
            request.rounds,
            with_peer=request.with_peer,
            peer_checkpointing=request.peer_checkpointing or jax.default_backend() == "gpu",
            scratch=scratch,
        )
    )


def _with_random_model(config: Config, request: Request, folder: Path) -> Config:
    """The config with a model of random weights in `folder`, of as many layers as asked for or as fit."""
    dimensions = random_folder.dimensions(request.size)
    layers = request.layers or layers_that_fit(
        dimensions, request.max_length, config.model.param_dtype, config.optimizer.moments_dtype
    )
    log.info("writing %d layers of random weights, size %s", layers, request.size)
    base = paths.here(config.model.path, "--config.model.path")
    random_folder.write(folder, base, dimensions | {"n_layers": layers}, dtype=config.model.param_dtype)
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
    if not huggingface.is_published(paths.here(config.model.path, "--config.model.path")):
        path = config.model.path
        raise UserError(f"--config.model.path={path}: the peer reads a Hugging Face folder; give one, {alone}")
