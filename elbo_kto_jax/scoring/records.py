"""The ELBO of records under a checkpoint, estimated with config.estimator or enumerated."""

import dataclasses
import datetime
import logging
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from elbo_kto_jax.data.draws import DrawnExamples, segment_of
from elbo_kto_jax.data.examples import Examples, load_examples
from elbo_kto_jax.data.packing import Segment, pack
from elbo_kto_jax.diffusion import masks
from elbo_kto_jax.diffusion.exact import MAX_LENGTH, all_masks, exact_weights
from elbo_kto_jax.models.network import Params
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.scoring.layout import layout_of
from elbo_kto_jax.scoring.opened import Opened, open_model
from elbo_kto_jax.scoring.scorer import Scorer
from elbo_kto_jax.sharding import rules

log = logging.getLogger(__name__)


class Names(NamedTuple):
    """What the user calls the parts of a request, for messages."""

    checkpoint: str = "--checkpoint"
    data: str = "--data"
    exact: str = "--exact"


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be scored.

    Attributes:
      checkpoint: Hugging Face folder, converted checkpoint or training run.
      data: records; labels are not needed, and subsets are not taken.
      exact: enumerate every mask (completions of up to MAX_LENGTH tokens) instead of drawing config.estimator.draws.
      skip_bad: count and list bad records instead of stopping.
      limit: score the first so many records; 0: all.
      names: see `Names`.
    """

    checkpoint: str
    data: str
    exact: bool = False
    skip_bad: bool = False
    limit: int = 0
    names: Names = dataclasses.field(default_factory=Names)


def check_records(request: Request, config: Config, moment: datetime.datetime | None = None) -> tuple[Opened, Examples]:
    """The model without its weights, and the records that it is to score; see `score_records`.

    Raises:
      UserError: something about them or the estimator has to be mended.
    """
    masks.check_scheme(config.estimator.scheme)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=request.checkpoint))
    opened = open_model(config, request.names.checkpoint, moment)
    return opened, _read(request, config, opened)


def score_records(
    request: Request, config: Config, params: Params | None = None, moment: datetime.datetime | None = None
) -> Iterator[dict]:
    """One result per record, in the order of the records: id, elbo and stderr (nats), tokens.

    Args:
      request: what is scored.
      config: its `model`, `data`, `estimator`, `mesh` and `seed`.
      params: those of request.checkpoint, if they are loaded.
      moment: see `open_model`.

    Raises:
      UserError: something about the checkpoint, the records or the estimator has to be mended.
    """
    opened, examples = check_records(request, config, moment)
    layout = layout_of(config, opened.model.config, opened.mesh)
    data = DrawnExamples(
        examples,
        layout,
        estimator=config.estimator,
        seed=config.seed,
        own=rules.own_rows(opened.mesh, layout.rows),
    )
    params = opened.load_params(request.checkpoint, request.names.checkpoint) if params is None else params
    with tqdm(total=len(examples), desc="score", unit="record") as bar:
        for result in (_exact if request.exact else _estimated)(request, config, opened, data, params):
            bar.update()
            yield result


def _read(request: Request, config: Config, opened: Opened) -> Examples:
    examples = load_examples(
        request.data,
        opened.tokenizer,
        max_length=config.data.max_length,
        exact_window=config.data.packing,
        append_eot=config.data.append_eot,
        desirable_fraction=1.0,
        undesirable_fraction=1.0,
        seed=config.seed,
        needs_label=False,
        skip_bad=request.skip_bad,
        progress=True,
        flag=request.names.data,
        limit=request.limit,
    )
    log.info("%s: %s", request.data, examples.report)
    if loss := examples.counts.warning(config.data.max_length):
        log.warning("%s: %s", request.data, loss)
    if request.exact and examples.completion_length.max() > MAX_LENGTH:
        i = int(np.argmax(examples.completion_length))
        raise UserError(
            f"{request.names.exact}: {request.data}: record {examples.ids[i]!r} has a completion of "
            f"{examples.completion_length[i]} tokens, at most {MAX_LENGTH} can be enumerated; drop it, or leave "
            f"{request.names.exact} out"
        )
    return examples


def _exact(request: Request, config: Config, opened: Opened, data: DrawnExamples, params: Params) -> Iterator[dict]:
    scorer = Scorer(opened.model, opened.mesh, size=2**MAX_LENGTH)
    for i in range(len(data.examples)):
        segments, weight = exact_segments(data.examples, i)
        values = np.asarray(scorer(params, pack(segments, data.layout)), np.float64)[: len(weight)]
        _check_finite(values, request.checkpoint, data.examples.ids[i])
        yield _result(data.examples, i, float(np.sum(weight * values)), 0.0)


def _estimated(request: Request, config: Config, opened: Opened, data: DrawnExamples, params: Params) -> Iterator[dict]:
    count, size, draws = len(data.examples), config.train.global_batch_size, config.estimator.draws
    scorer = Scorer(opened.model, opened.mesh, size=size * draws)
    for start in range(0, count, size):
        micro_batches = data.micro_batches(np.arange(start, min(start + size, count)))
        values = np.asarray(scorer(params, micro_batches), np.float64)
        for i, row in enumerate(values.reshape(size, draws)[: count - start], start):
            _check_finite(row, request.checkpoint, data.examples.ids[i])
            stderr = float(np.std(row, ddof=1) / np.sqrt(draws)) if draws > 1 else None
            yield _result(data.examples, i, float(np.mean(row)), stderr)


def exact_segments(examples: Examples, i: int) -> tuple[list[Segment], np.ndarray]:
    """Every mask of example i as a segment of weight 1, and the weights whose sum with the results is the ELBO."""
    masks = all_masks(int(examples.completion_length[i]))
    return [segment_of(examples, i, mask, 1.0, m) for m, mask in enumerate(masks)], exact_weights(masks)


def _check_finite(values: np.ndarray, checkpoint: str, record: str) -> None:
    """Checks the ELBOs of a record under single masks; the weights are finite, or they would not have been loaded."""
    if not np.isfinite(values).all():
        raise UserError(
            f"--checkpoint={checkpoint}: the ELBO of record {record!r} is NaN or infinite: numbers overflow; "
            "its weights are damaged, or config.model.dtype has no numbers as large (float16: choose bfloat16)"
        )


def _result(examples: Examples, i: int, elbo: float, stderr: float | None) -> dict:
    return {"id": examples.ids[i], "elbo": elbo, "stderr": stderr, "tokens": int(examples.completion_length[i])}
