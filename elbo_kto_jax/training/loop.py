"""A training run, in the order of events: inputs, samples before, reference pass, steps, samples after, report.

What looks at the steps without taking them (metrics, held-out data, bad numbers, checkpoints, stopping) is a list of
hooks (training/hooks.py); `hooks_of` says which, and in what order.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxtyping import Array, Bool

from elbo_kto_jax.checkpoints.training_state import TrainingCheckpoints
from elbo_kto_jax.runtime import paths
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.runtime.errors import Interrupted
from elbo_kto_jax.runtime.workdir import MetricsLog, Workdir, open_workdir, read_metrics, stop_on_signal
from elbo_kto_jax.training import hooks, inputs, tracking
from elbo_kto_jax.training.hooks import Hook, Step
from elbo_kto_jax.training.progress import Progress
from elbo_kto_jax.training.references import RunReference, prepare_references
from elbo_kto_jax.training.samples import Samples
from elbo_kto_jax.training.setup import Setup, check_held_out
from elbo_kto_jax.training.state import TrainState
from elbo_kto_jax.training.step import train_step
from elbo_kto_jax.training.summary import finish
from elbo_kto_jax.training.tracking import Tracking
from elbo_kto_jax.training.trainer import Trainer


def train(config: Config, workdir: Path, *, overwrite: bool, skip_bad: bool) -> dict:
    """Runs the recipe of `config` in `workdir`, going on from its latest checkpoint, and returns the summary.

    Raises:
      UserError: anything that the user has to mend.
      Interrupted: SIGTERM or SIGINT came; the state is saved and the summary so far is the second argument.
    """
    check_held_out(config)
    tracking.check(config.trackers)
    paths.refuse_checkpoints(workdir, "--workdir")
    with open_workdir(workdir, config, overwrite, "train") as folder:
        setup = inputs.prepare_in(config, folder, skip_bad=skip_bad)
        with stop_on_signal() as stop_requested:
            summary = run(setup, folder, stop_requested)
        folder.finish()
    return summary


def run(setup: Setup, folder: Workdir, stop_requested: Callable[[], bool]) -> dict:
    """Does what is left of a run in its working folder, and returns the summary."""
    trainer, weights = Trainer.of(setup), inputs.Weights(setup, folder)
    checkpoints = TrainingCheckpoints(
        folder.path / "checkpoints", adaptation=trainer.adaptation, model=trainer.setup.model.config
    )
    state, progress = trainer.start(weights, checkpoints)
    told = Tracking(
        setup.config.trackers,
        folder.path,
        setup.config.to_dict(),
        progress.step,
        read_metrics(folder.path),
        folder.spool.root,
    )
    samples = Samples(setup, folder.path / "samples.json", told)
    if progress.step < setup.total_steps and not progress.is_out_of(setup.config.train.patience):
        samples.forget("after")

    def finished(interrupted: bool) -> dict:
        summary = finish(setup, folder.path, progress, samples.found, checkpoints, interrupted=interrupted)
        told.report(progress.step, paths.at(summary["report"]))
        return summary

    summary = None
    try:
        samples.take("before", trainer.policy(state.params), progress.step)
        references = prepare_references(
            trainer, state.params, weights, folder.path, stop_requested, fresh=progress.step == 0
        )
        weights.verify(inputs.MODEL)
        folder.go_on()
        journal = hooks.Journal(setup, MetricsLog(folder.path, progress.step, folder.spool), told)
        watching = hooks_of(trainer, folder.path, journal, checkpoints, references.held_out, progress, stop_requested)
        state = take_steps(trainer, state, references.training, watching, progress)
        samples.take("after", trainer.policy(state.params), progress.step)
        summary = finished(interrupted=False)
    except Interrupted as stop:
        raise Interrupted(*stop.args, finished(interrupted=True)) from None
    finally:
        told.close(finished=summary is not None)
    return summary


def hooks_of(
    trainer: Trainer,
    workdir: Path,
    journal: hooks.Journal,
    checkpoints: TrainingCheckpoints,
    held_out: RunReference,
    progress: Progress,
    stop_requested: Callable[[], bool],
) -> list[Hook]:
    """What watches the steps, in the order in which each of them is told."""
    setup = trainer.setup
    return [
        hooks.NoiseScale(setup.config.optimizer, setup.data.most_examples),
        hooks.HeldOut(setup, trainer.programs, trainer.policy, held_out),
        hooks.BestSoFar(setup.config.train, progress),
        hooks.HealthWarnings(),
        hooks.BadNumbers(setup, workdir, trainer.adaptation, progress),
        hooks.Divergence(setup, checkpoints),
        hooks.Bar(setup.total_steps, progress.step),
        journal,
        hooks.Checkpoints(setup.config.train, setup.assets, checkpoints, progress),
        hooks.Stop(setup.total_steps, stop_requested),
    ]


def take_steps(
    trainer: Trainer, state: TrainState, reference: RunReference, watching: Sequence[Hook], progress: Progress
) -> TrainState:
    """Takes the remaining steps. Metrics are read one step late, so that the devices never wait for the host."""
    data, total, options = trainer.setup.data, trainer.setup.total_steps, trainer.setup.config.train
    first, end = progress.step, progress.step if progress.is_out_of(options.patience) else total
    stops_on_bad_numbers = options.on_bad_numbers == "stop"
    began = time.monotonic() - progress.seconds
    go: Bool[Array, ""] | None = None
    late: Step | None = None
    with contextlib.ExitStack() as stack:
        for hook in watching:
            stack.callback(hook.close)
        for index, batch in zip(itertools.count(first), data.batches(first, end)):
            state, metrics = train_step(
                trainer.programs, state, batch, reference.of_step(index), base=trainer.base, go=go
            )
            if stops_on_bad_numbers:
                go = metrics["applied"]  # the host hears of bad numbers one step late; until then nothing moves
            progress.advance(batch, time.monotonic() - began)
            step = Step(index + 1, batch, {**metrics}, progress.figures(), is_last=index + 1 == total)
            for hook in watching:
                step.metrics.update(hook.measure(step, state))
            tell(watching, late, state)
            late = step
            if any([hook.wants_rest(step) for hook in watching]):  # each is asked: the processes agree by asking
                tell(watching, late, state)
                late = None
                for hook in watching:
                    hook.rest(step, state)
            if step.is_last:
                break
    return state


def tell(watching: Sequence[Hook], step: Step | None, state: TrainState) -> None:
    """Reads the metrics of a step, which waits for it, and tells all; `state` is the present one."""
    if step is None:
        return
    values = step.read()
    for hook in watching:
        hook.tell(step, values, state)
