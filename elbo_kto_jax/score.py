"""python -m elbo_kto_jax.score --checkpoint=DIR --data=FILE.jsonl --out=FILE.jsonl: the ELBO of records.

Without --config the settings are those of the run to which the checkpoint belongs, or those that suit the model.

With --exact every mask of a completion is enumerated instead of drawn (completions of up to 12 tokens).
"""

import numpy as np

from elbo_kto_jax import cli
from elbo_kto_jax.diffusion.exact import MAX_LENGTH
from elbo_kto_jax.runtime import processes
from elbo_kto_jax.runtime.files import atomic_write, to_json
from elbo_kto_jax.runtime.flags import refuse_existing
from elbo_kto_jax.scoring.records import Request, score_records


def main(argv: list[str]) -> dict:
    flags = cli.Flags("elbo_kto_jax.score", "Estimate, or enumerate, the ELBO of records under a checkpoint, in nats.")
    flags.add_config_of_model()
    flags.add_argument("--checkpoint", required=True, help="Hugging Face folder, converted checkpoint or training run")
    flags.add_argument("--data", required=True, help="records; labels are not needed")
    flags.add_argument("--out", required=True, help="JSON lines: id, elbo, stderr (nats), tokens")
    flags.add_argument("--exact", action="store_true", help=f"enumerate every mask (up to {MAX_LENGTH} tokens)")
    flags.add_argument("--overwrite", action="store_true", help="replace --out")
    flags.add_argument("--skip-bad-records", action="store_true", help="count and list bad records instead of stopping")
    options, config = flags.parse(argv)
    refuse_existing(options.out, options.overwrite)
    request = Request(options.checkpoint, options.data, options.exact, options.skip_bad_records)
    rows = list(score_records(request, config))
    if processes.is_first():
        atomic_write(options.out, "".join(to_json(row) + "\n" for row in rows))
    cli.log.info("written: %s", options.out)
    return {"records": len(rows), "mean_elbo": float(np.mean([row["elbo"] for row in rows])), "out": options.out}


if __name__ == "__main__":
    cli.run(main)
