"""Unpaired feedback, pairs, or good answers alone? python -m launch.compare_objectives --workdir=DIR

The quickstart's alignment with each objective, from the quickstart's base model of each seed, and the win rate of each
against that base. All see the same number of completions, in batches of the same size, with the same draws and steps:

    kto    each prompt has one answer, good or bad
    dpo    each prompt has a good and a bad answer, so there are half as many prompts
    sft    each prompt has a good answer

Settings that are not the objective's own are equal; rates and betas were chosen for none of them in particular, and
--rates and --betas try others. A step of SFT takes one pass over its draws, the others score them first.
launch/comparison.py has the files.
"""

from pathlib import Path
from typing import Any

import numpy as np

from elbo_kto_jax import cli
from elbo_kto_jax.data import capitals
from elbo_kto_jax.objectives import dpo, kto, sft
from elbo_kto_jax.runtime import paths
from elbo_kto_jax.runtime.files import atomic_write, to_json
from launch import comparison

OBJECTIVES = {"kto": kto.Kto.name, "dpo": dpo.Dpo.name, "sft": sft.Sft.name}


def main(argv: list[str]) -> dict[str, Any]:
    flags = cli.Flags("launch.compare_objectives", "Win rates of the quickstart by objective.")
    flags.add_argument("--workdir", default="runs/objectives", help="working folder (default: %(default)s)")
    flags.add_argument("--seeds", type=str, default="0,1,2,3,4", help="of data, model and masks (default: %(default)s)")
    flags.add_argument("--rates", type=str, default="1e-4", help="optimizer.learning_rate (default: %(default)s)")
    flags.add_argument("--betas", type=str, default="1.0", help="objective.beta of kto and dpo (default: %(default)s)")
    options = flags.parse_flags(argv)
    workdir, seeds = paths.here(options.workdir, "--workdir"), comparison.numbers(options.seeds, "--seeds")
    settings = {
        f"{name}-rate-{rate}" + ("" if name == "sft" else f"-beta-{beta}"): (name, rate, beta)
        for name in OBJECTIVES
        for rate in options.rates.split(",")
        for beta in options.betas.split(",")
    }

    def arguments(home: Path, cell: str) -> list[str]:
        name, rate, beta = settings[cell]
        return [
            f"--config.data.train={write_data(home / 'data', name)}",
            f"--config.objective.name={OBJECTIVES[name]}",
            f"--config.objective.beta={beta}",
            f"--config.optimizer.learning_rate={rate}",
        ]

    results, ran = comparison.run_cells(workdir, seeds, list(settings), arguments)
    rows = []
    for cell, (name, rate, beta) in settings.items():
        found = np.array([results[seed, cell]["adjusted_win_rate"] for seed in seeds])
        row = {"objective": name, "learning_rate": rate, "beta": beta if name != "sft" else "", "seeds": len(seeds)}
        rows.append(row | comparison.interval("adjusted_win_rate", found))
    cells = [{"seed": seed, "cell": cell, **result} for (seed, cell), result in results.items()]
    file = comparison.write_tables(workdir, rows, cells)
    return {"cells": len(results), "run": ran, "table": str(file), "rows": rows}


def write_data(folder: Path, name: str) -> Path:
    """The feedback of a quickstart in the form that an objective takes: as many completions as that has."""
    if name == "kto":
        return folder / "feedback.jsonl"
    words = capitals.feedback_words(folder)
    if name == "dpo":
        records = [
            {
                "prompt": capitals.question(word),
                "chosen": [{"role": "assistant", "content": capitals.good_answer(word)}],
                "rejected": [{"role": "assistant", "content": capitals.bad_answer(word)}],
            }
            for word in words[: len(words) // 2]
        ]
    else:
        records = [capitals.demonstration(word, label=True) for word in words]
    file = folder / f"feedback-{name}.jsonl"
    atomic_write(file, "".join(f"{to_json(record)}\n" for record in records))
    return file


if __name__ == "__main__":
    cli.run(main)
