"""The end of a start of a run: report.html, and the summary that the command prints."""

import dataclasses
import logging
import shlex
from pathlib import Path

from elbo_kto_jax.checkpoints.training_state import TrainingCheckpoints
from elbo_kto_jax.reports.training import write_training_report
from elbo_kto_jax.runtime import processes
from elbo_kto_jax.runtime.flags import command_line
from elbo_kto_jax.runtime.workdir import read_metrics
from elbo_kto_jax.training.progress import Progress
from elbo_kto_jax.training.setup import Setup

log = logging.getLogger(__name__)


def finish(
    setup: Setup,
    workdir: Path,
    progress: Progress,
    samples: list[dict],
    checkpoints: TrainingCheckpoints,
    *,
    interrupted: bool,
) -> dict:
    """Writes report.html and returns the summary."""
    latest, best = checkpoints.latest_step(), progress.best_step
    is_best = bool(best) and progress.best_metric == setup.config.train.keep_best and checkpoints.has(best)
    patience = setup.config.train.patience
    stopped_early = progress.is_out_of(patience) and progress.step < setup.total_steps
    rows = read_metrics(workdir)
    last, seconds = rows[-1] if rows else {}, max(progress.seconds, 1e-9)
    summary = {
        "steps": progress.step,
        "examples": progress.examples,
        "epochs": progress.examples / len(setup.data.examples),
        "loss": last.get("loss"),
        "reward_margin": last.get("reward_margin"),
        "examples_per_second": progress.examples / seconds,
        "tokens_per_second": progress.tokens / seconds,
        "checkpoint": None if latest is None else str(workdir / "checkpoints" / str(latest)),
        "best_checkpoint": str(workdir / "checkpoints" / str(best)) if is_best else None,
        "best_step": best if is_best else None,
        "best_metric": progress.best_metric if is_best else None,
        "best_value": progress.best_value if is_best else None,
        "stopped_early": stopped_early,
        "interrupted": interrupted,
        "skipped_steps": progress.skipped,
        "report": str(workdir / "report.html"),
        "data": dataclasses.asdict(setup.data.examples.counts),
    }
    if setup.eval_data is not None:
        summary["eval_data"] = dataclasses.asdict(setup.eval_data.examples.counts)
    if not processes.is_first():
        return summary
    write_training_report(
        workdir / "report.html",
        title=f"{setup.config.objective.name}: {workdir.name}",
        config=setup.config.to_dict(),
        metrics=rows,
        samples=[sample for sample in samples if "after" in sample],
        summary=summary,
    )
    if not interrupted:
        if stopped_early:
            why = f"{progress.waited} evaluations without a better {progress.best_metric}"
            log.info("stopped early, at step %d of %d, after %s", progress.step, setup.total_steps, why)
        if is_best:
            what = f"{progress.best_metric} {progress.best_value:.4g}"
            log.info("best held-out figure: %s at step %d, %s", what, best, summary["best_checkpoint"])
        log.info("report: %s", summary["report"])
        source = summary["best_checkpoint"] if stopped_early and is_best else summary["checkpoint"]
        words = [f"--source={source}", f"--out={workdir / 'huggingface'}"]
        log.info("next: %s %s", command_line("conversion.to_hf"), shlex.join(words))
    return summary
