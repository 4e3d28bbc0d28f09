"""A plan as it is asked for: the model and the data that the config names, or their published sizes."""

import dataclasses
import logging
import shlex
from pathlib import Path

from elbo_kto_jax.checkpoints.load import load_config
from elbo_kto_jax.checkpoints.tokenizer import build_tokenizer
from elbo_kto_jax.data.examples import load_examples
from elbo_kto_jax.models import registry
from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.planning import plan as planning
from elbo_kto_jax.planning import search as searching
from elbo_kto_jax.planning.chips import Topology
from elbo_kto_jax.planning.programs import DoesNotFit, versions
from elbo_kto_jax.reports.plan import as_text, write_plan_report
from elbo_kto_jax.runtime import paths, terminal
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.files import atomic_write, to_json

log = logging.getLogger(__name__)
# kto-mix-14k: its published size; 2,964 characters of text per record (mean of 1,500 of its records) at about 4.3
# characters per token, and the template's tokens.
EXAMPLES, TOKENS = 14_000, 700
FILES = ("plan.json", "report.html")


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be planned.

    Attributes:
      topology: the slice.
      examples: in the data; None: as many as the data has where it is on disk, else EXAMPLES.
      tokens: of an example, on average; None: likewise, else TOKENS.
      candidates: settings that a search compiles; 0: no search.
      price: of a chip for an hour; 0: no cost is told.
    """

    topology: Topology
    examples: int | None = None
    tokens: float | None = None
    candidates: int = 0
    price: float = 0.0


def plan(request: Request, config: Config, out: Path) -> dict:
    """Compiles the run for the topology, writes FILES into `out` and prints the table; the summary.

    Raises:
      UserError: the run does not fit, or the config has to be mended.
    """
    model, tokenizer = _model(config)
    examples, tokens = _data(config, tokenizer, request.examples, request.tokens)
    try:
        found, tried = _found(request, config, model, examples, tokens)
    except DoesNotFit as refusal:
        raise UserError(_does_not_fit(refusal, config, model, request.topology, examples, tokens)) from None
    if request.price:
        found["cost_bound"] = found["chip_hours_bound"] * request.price
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
    keys: tuple[str, ...] = ("fits", "bytes_per_chip", "usable_bytes_per_chip", "mfu_bound", "text_mfu_bound")
    keys += (
        "tokens_per_second_bound",
        "chip_hours_bound",
        "cost_bound",
        "compile_seconds",
        "versions",
        "topology",
        "mesh",
        "settings",
    )
    return {key: found[key] for key in keys if key in found} | {"report": str(out / "report.html")}


def _found(request: Request, config: Config, model: ModelConfig, examples: int, tokens: float) -> tuple[dict, list]:
    """The plan, and what a search has tried.

    Raises:
      DoesNotFit: nothing does.
    """
    tried: list = []
    if request.candidates:
        found, config, tried = searching.search(config, model, request.topology, examples, tokens, request.candidates)
        if found is None:
            raise DoesNotFit("no candidate of the search")
    else:
        found = planning.plan(config, model, request.topology, examples, tokens)
    if not found["fits"]:
        needed, usable = found["bytes_per_chip"] / 2**30, found["usable_bytes_per_chip"] / 2**30
        raise DoesNotFit(
            f"the run as a whole needs {needed:.2f} of {usable:.2f} GiB on each chip, while {found['tallest']} runs"
        )
    return found, tried


def _model(config: Config):
    """The architecture, and the tokenizer where there is one."""
    path = paths.at(config.model.path)
    if not path.exists():
        return _published(config.model.path), None
    model, assets = load_config(path)
    try:
        return model, build_tokenizer(assets, str(path))
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
    if (examples is None or tokens is None) and tokenizer is not None and _is_here(config.data.train):
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


def _is_here(sources: str | list[str]) -> bool:
    """Whether data sets can be read without a network."""
    return all(paths.at(source).exists() for source in ([sources] if isinstance(sources, str) else sources))


def _does_not_fit(
    refusal: DoesNotFit, config: Config, model: ModelConfig, topology: Topology, examples: int, tokens: float
) -> str:
    advice = searching.would_fit(config, model, topology, examples, tokens)
    return f"{topology.name}: does not fit, says libtpu {versions()['libtpu']}: {refusal}; {advice}"
