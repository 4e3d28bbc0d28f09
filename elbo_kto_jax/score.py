"""python -m elbo_kto_jax.score --config=... --checkpoint=DIR --data=FILE.jsonl --out=FILE.jsonl: the ELBO of records.

With --exact every mask of a completion is enumerated instead of drawn (completions of up to 12 tokens).
"""

import dataclasses
import datetime
import logging
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from elbo_kto_jax import cli
from elbo_kto_jax.data.examples import Examples
from elbo_kto_jax.data.packing import Segment, pack
from elbo_kto_jax.diffusion.exact import MAX_LENGTH, all_masks, exact_weights
from elbo_kto_jax.models.network import Params
from elbo_kto_jax.objectives.protocol import NOTHING
from elbo_kto_jax.runtime import processes
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.files import atomic_write, to_json
from elbo_kto_jax.scoring.scorer import Scorer
from elbo_kto_jax.training.data import segment_of
from elbo_kto_jax.training.setup import prepare

log = logging.getLogger(__name__)


def main(argv: list[str]) -> dict:
    flags = cli.Flags("elbo_kto_jax.score", "Estimate, or enumerate, the ELBO of records under a checkpoint, in nats.")
    flags.add_config()
    flags.add_argument("--checkpoint", required=True, help="Hugging Face folder, converted checkpoint or training run")
    flags.add_argument("--data", required=True, help="records; labels are not needed")
    flags.add_argument("--out", required=True, help="JSON lines: id, elbo, stderr (nats), tokens")
    flags.add_argument("--exact", action="store_true", help=f"enumerate every mask (up to {MAX_LENGTH} tokens)")
    flags.add_argument("--overwrite", action="store_true", help="replace --out")
    flags.add_argument("--skip-bad-records", action="store_true", help="count and list bad records instead of stopping")
    options, config = flags.parse(argv)
    cli.refuse_existing(options.out, options.overwrite)
    rows = list(score_records(config, options))
    if processes.is_first():
        atomic_write(options.out, "".join(to_json(row) + "\n" for row in rows))
    log.info("written: %s", options.out)
    return {"records": len(rows), "mean_elbo": float(np.mean([row["elbo"] for row in rows])), "out": options.out}


def score_records(
    config: Config, options, params: Params | None = None, moment: datetime.datetime | None = None
) -> Iterator[dict]:
    """One result per record, in the order of the records.

    `params`: those of options.checkpoint, if they are loaded; `moment`: see `prepare`.
    """
    # Labels and subsets belong to training; every record is scored.
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=options.checkpoint),
        data=dataclasses.replace(
            config.data, train=options.data, eval="", desirable_fraction=1.0, undesirable_fraction=1.0
        ),
    )
    flags = ("--checkpoint", "--data")
    setup = prepare(config, skip_bad=options.skip_bad_records, flags=flags, needs=NOTHING, moment=moment)
    data, examples, draws = setup.data, setup.data.examples, config.estimator.draws
    if options.exact and examples.completion_length.max() > MAX_LENGTH:
        i = int(np.argmax(examples.completion_length))
        raise UserError(
            f"--exact: {options.data}: record {examples.ids[i]!r} has a completion of {examples.completion_length[i]} "
            f"tokens, at most {MAX_LENGTH} can be enumerated; drop it, or leave --exact out"
        )
    size = 2**MAX_LENGTH if options.exact else data.batch_size
    scorer = Scorer(setup.model, setup.mesh, size=size if options.exact else size * draws)
    params = setup.load_params(options.checkpoint, "--checkpoint") if params is None else params

    def estimates(micro_batches) -> np.ndarray:
        return np.asarray(scorer(params, micro_batches), np.float64)

    bar = tqdm(total=len(examples), desc="score", unit="record")
    if options.exact:
        for i in range(len(examples)):
            segments, weight = exact_segments(examples, i)
            values = estimates(pack(segments, data.layout))[: len(weight)]
            _check_finite(values, options.checkpoint, examples.ids[i])
            bar.update()
            yield _result(examples, i, float(np.sum(weight * values)), 0.0)
        return
    for start in range(0, len(examples), size):
        micro_batches = data.micro_batches(np.arange(start, min(start + size, len(examples))))
        for i, row in enumerate(estimates(micro_batches).reshape(size, draws)[: len(examples) - start], start):
            bar.update()
            _check_finite(row, options.checkpoint, examples.ids[i])
            stderr = float(np.std(row, ddof=1) / np.sqrt(draws)) if draws > 1 else None
            yield _result(examples, i, float(np.mean(row)), stderr)


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


if __name__ == "__main__":
    cli.run(main)
