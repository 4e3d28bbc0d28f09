"""python -m launch.plan --config=configs/kto_mix.py --topology=v5e:8x8: does it fit, and how fast can it be?

Compiles every program of the run for a slice of TPUs that need not be there (libtpu, extra `tpu`), on the CPU: minutes
for the 8B model. What it prints of time and cost are bounds, not measurements; the formulas and what they assume stand
in elbo_kto_jax/planning/.
"""

import dataclasses
import importlib.util
import logging
import os
import shlex
from pathlib import Path

import jax

from elbo_kto_jax import cli
from elbo_kto_jax.checkpoints import store
from elbo_kto_jax.data.examples import load_examples
from elbo_kto_jax.models import registry
from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.planning import plan as planning
from elbo_kto_jax.planning.chips import Topology, parse_topology
from elbo_kto_jax.planning.programs import DoesNotFit
from elbo_kto_jax.planning.search import search, would_fit
from elbo_kto_jax.reports.plan import as_text, write_plan_report
from elbo_kto_jax.runtime import terminal
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.files import atomic_write, to_json

log = logging.getLogger("elbo_kto_jax.plan")
# kto-mix-14k: its published size; 2,964 characters of text per record (mean of 1,500 of its records) at about 4.3
# characters per token, and the template's tokens.
EXAMPLES, TOKENS = 14_000, 700


def main(argv: list[str]) -> dict:
    flags = cli.Flags("launch.plan", "Compile a run for a TPU slice without one: does it fit, how fast can it be?")
    flags.add_config()
    flags.add_argument("--topology", type=str, required=True, help="GENERATION:SHAPE of the slice, such as v5e:8x8")
    flags.add_argument("--search", action="store_true", help="find mesh, micro-batch, remat and dtype that are fastest")
    flags.add_argument("--candidates", type=int, default=3, help="that --search compiles (default: %(default)s)")
    flags.add_argument("--examples", type=int, help=f"in the data, where it is not on disk (default: {EXAMPLES})")
    flags.add_argument("--tokens", type=float, help=f"of an example, on average (default: {TOKENS})")
    flags.add_argument("--price", type=float, default=0.0, help="of a chip for an hour, to turn chip-hours into a cost")
    flags.add_argument("--out", default="", help="folder for plan.json and report.html (default: runs/plan/TOPOLOGY)")
    flags.add_argument("--overwrite", action="store_true", help="replace what --out holds")
    options, config = flags.parse(argv)
    topology = parse_topology(options.topology)
    for flag in ("candidates", "examples", "tokens"):
        if getattr(options, flag) is not None and getattr(options, flag) < 1:
            raise UserError(f"--{flag}: expected at least 1, got {getattr(options, flag)}")
    out = Path(options.out or Path("runs", "plan", topology.name.replace(":", "-")))
    for file in (out / "plan.json", out / "report.html"):
        cli.refuse_existing(file, options.overwrite)
    _use_libtpu()
    model, tokenizer = _model(config)
    examples, tokens = _data(config, tokenizer, options.examples, options.tokens)

    tried = []
    try:
        if options.search:
            found, config, tried = search(config, model, topology, examples, tokens, options.candidates)
            if found is None:
                raise DoesNotFit("no candidate of the search")
        else:
            found = planning.plan(config, model, topology, examples, tokens)
        if not found["fits"]:
            needed, usable = found["bytes_per_chip"] / 2**30, found["usable_bytes_per_chip"] / 2**30
            raise DoesNotFit(f"the run as a whole needs {needed:.2f} of {usable:.2f} GiB on each chip")
    except DoesNotFit as refusal:
        raise UserError(_does_not_fit(refusal, config, model, topology, examples, tokens)) from None
    if options.price:
        found["cost_bound"] = found["chip_hours_bound"] * options.price
    found["tried"] = tried
    found["model"] = dataclasses.asdict(model)
    atomic_write(out / "plan.json", to_json(found))
    write_plan_report(out / "report.html", found)
    terminal.say(as_text(found))
    log.info("report: %s", out / "report.html")
    if tried:
        best = [attempt for attempt in tried if attempt["fits"]]
        chosen = max(best, key=lambda attempt: attempt["tokens_per_second_bound"])["flags"]
        log.info("next: the same settings in training: %s", shlex.join(chosen) or "the config as it is")
    keys = ("fits", "bytes_per_chip", "usable_bytes_per_chip", "mfu_bound", "tokens_per_second_bound")
    keys += ("chip_hours_bound", "cost_bound", "compile_seconds", "topology", "mesh", "settings")
    return {key: found[key] for key in keys if key in found} | {"report": str(out / "report.html")}


def _use_libtpu() -> None:
    """Lets libtpu compile on a machine without TPUs, beside another process that does."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("launch.plan compiles with libtpu, which is not installed: pip install 'elbo_kto_jax[tpu]'")
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_STDERR_LOG_LEVEL", "3"),
        ("TPU_MIN_LOG_LEVEL", "3"),
    ):
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # what it holds cannot be asked for its memory


def _model(config: Config):
    """The architecture, and the tokenizer where there is one."""
    path = Path(config.model.path)
    if not path.exists():
        return _published(config.model.path), None
    model, assets = store.load_config(path)
    try:
        return model, store.build_tokenizer(assets, str(path))
    except UserError:  # a config.json is enough for a plan
        return model, None


def _published(path: str) -> ModelConfig:
    """The dimensions of the published model which the hub id or folder `path` may mean; otherwise LLaDA-8B's."""
    words = {word: known for known in registry.architectures().values() for word in _words(known)}
    # The longest one that fits: there is a LLaDA in iLLaDA.
    family = words[max((word for word in words if word in path.lower()), key=len, default="llada")]
    size, model = next(iter(family.sizes.items()))
    log.info("config.model.path=%s is not on this machine: planning for %s, %s, as published", path, family.name, size)
    return model


def _words(known: registry.Architecture) -> set[str]:
    """What the names of the models of an architecture begin with."""
    return {known.name.partition("_")[0], *(model.partition("-")[0].lower() for model in known.example.split(", "))}


def _data(config: Config, tokenizer, examples: int | None, tokens: float | None) -> tuple[int, float]:
    """Number and mean length of the examples: the flags', else the data's, else those of kto-mix."""
    if (examples is None or tokens is None) and tokenizer is not None and Path(config.data.train).exists():
        found = load_examples(
            config.data.train,
            tokenizer,
            max_length=config.data.max_length,
            exact_window=config.data.packing,
            append_eot=config.data.append_eot,
            desirable_fraction=config.data.desirable_fraction,
            undesirable_fraction=config.data.undesirable_fraction,
            seed=config.seed,
            needs_label=False,
            skip_bad=True,
            progress=True,
            flag="--config.data.train",
        )
        return examples or len(found), tokens or float(found.offsets[-1] / len(found))
    if examples is None or tokens is None:
        log.info(
            "config.data.train=%s cannot be read here: the size of kto-mix, or --examples, --tokens", config.data.train
        )
    return examples or EXAMPLES, tokens or float(TOKENS)


def _does_not_fit(
    refusal: DoesNotFit, config: Config, model: ModelConfig, topology: Topology, examples: int, tokens: float
) -> str:
    return f"{topology.name}: does not fit: {refusal}; {would_fit(config, model, topology, examples, tokens)}"


if __name__ == "__main__":
    cli.run(main)
