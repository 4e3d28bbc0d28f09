"""What watches the steps of a run without taking them: each is one class, and `loop.hooks_of` lists them.

measure      right after a step, on the devices: more metrics of it; nothing may be read that would wait
tell         a step later: the metrics as numbers on the host
wants_rest   whether the host is to catch up with the devices after this step
rest         where one hook wanted it, after all were told of the step
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array
from tqdm import tqdm

from elbo_kto_jax.checkpoints.manifest import Adaptation
from elbo_kto_jax.checkpoints.training_state import TrainingCheckpoints, TrainingState
from elbo_kto_jax.models.network import Params
from elbo_kto_jax.runtime import config, processes
from elbo_kto_jax.runtime.errors import Interrupted, UserError
from elbo_kto_jax.runtime.files import atomic_write, to_json
from elbo_kto_jax.runtime.metric_names import EVAL
from elbo_kto_jax.runtime.workdir import MetricsLog
from elbo_kto_jax.scoring.scorer import Weights
from elbo_kto_jax.training import state as train_state
from elbo_kto_jax.training.health import Health, divergence
from elbo_kto_jax.training.progress import Progress
from elbo_kto_jax.training.references import RunReference
from elbo_kto_jax.training.setup import Setup
from elbo_kto_jax.training.state import TrainState
from elbo_kto_jax.training.step import Batch, Programs, batch_loss
from elbo_kto_jax.training.tracking import Tracking

log = logging.getLogger(__name__)
_MOST_SKIPPED_IN_A_ROW = 10  # steps with bad numbers; more are no accident of the data
Measured = dict[str, Array | float]
_INSPECT = "not_finite"  # folder of the working folder for the state before a step with bad numbers


@dataclasses.dataclass
class Step:
    """A step that was taken.

    Attributes:
      number: counted from 1.
      batch: what it was taken on.
      metrics: on the devices; hooks add to them.
      figures: what was known of the run right after it.
      is_last: of the run; a hook that ends the run says so in `measure`.
    """

    number: int
    batch: Batch
    metrics: Measured
    figures: dict[str, Any]
    is_last: bool

    def read(self) -> dict[str, float]:
        """The metrics that are numbers, on the host."""
        return {name: float(value) for name, value in self.metrics.items() if not np.ndim(value)}


def of_each(metrics: Mapping[str, Array | float]) -> tuple[str, np.ndarray]:
    """The name and values of the metric that has one number for each completion."""
    ((name, values),) = ((name, value) for name, value in metrics.items() if np.ndim(value))
    return name, np.asarray(values)


class Hook:
    """A hook that does nothing."""

    def measure(self, step: Step, state: TrainState) -> Measured:
        return {}

    def tell(self, step: Step, values: dict[str, float], state: TrainState) -> None:
        """`state` is the present one; bad numbers in `step` have left it as it was."""

    def wants_rest(self, step: Step) -> bool:
        return False

    def rest(self, step: Step, state: TrainState) -> None:
        pass

    def close(self) -> None:
        """Called once, however the steps end."""


class NoiseScale(Hook):
    """The gradient's noise scale, from the optimizer's moments."""

    def __init__(self, options: config.Optimizer, batch_size: int):
        scale = functools.partial(train_state.gradient_noise_scale, options=options, batch_size=batch_size)
        self._scale = jax.jit(scale)

    def measure(self, step: Step, state: TrainState) -> Measured:
        return {"gradient_noise_scale": self._scale(state.opt_state)}


class HeldOut(Hook):
    """Loss on the held-out data (mean over its examples), and what the objective tells of all of it."""

    def __init__(self, setup: Setup, programs: Programs, policy: Callable[[Params], Weights], reference: RunReference):
        self._every = setup.config.train.eval_every if setup.eval_data else 0
        self._data, self._programs, self._policy, self._reference = setup.eval_data, programs, policy, reference

    def measure(self, step: Step, state: TrainState) -> Measured:
        data = self._data
        if data is None or not self._every or step.number % self._every:
            return {}
        programs, policy = self._programs, self._policy(state.params)
        losses, counts, values, labels = [], [], [], []
        for index, batch in enumerate(data.batches(0, data.steps_per_epoch)):
            reference = self._reference.of_step(index, state.params)
            _, metrics = batch_loss(programs, programs.scorer(policy, batch.micro_batches), reference, batch)
            here = batch.feedback.is_example
            losses.append(float(metrics["loss"]))
            counts.append(int(here.sum()))
            values.append(of_each(metrics)[1][here])
            labels.append(batch.feedback.is_desirable[here])
        found = programs.objective.held_out(np.concatenate(values), np.concatenate(labels))
        loss = float(np.average(losses, weights=counts))
        return {f"{EVAL}{name}": value for name, value in {"loss": loss, **found}.items()}


class BestSoFar(Hook):
    """Notices which step is the best by a held-out metric, and ends the run where none has been for too long.

    An evaluation has its numbers on the host already, so nothing waits for this.
    """

    def __init__(self, options: config.Train, progress: Progress):
        self._options, self._progress = options, progress

    def measure(self, step: Step, state: TrainState) -> Measured:
        value = step.metrics.get(self._options.keep_best)
        if value is not None:
            agreed = processes.json_of_first(float(value))
            self._progress.notice_best(self._options.keep_best, step.number, agreed)
            step.is_last |= self._progress.is_out_of(self._options.patience)
        return {}


class HealthWarnings(Hook):
    """Says in the log what looks wrong."""

    def __init__(self) -> None:
        self._health = Health()

    def tell(self, step: Step, values: dict[str, float], state: TrainState) -> None:
        for warning in self._health.warnings(step.number, values):
            log.warning("%s", warning)


class BadNumbers(Hook):
    """Counts steps whose loss or gradient is not finite, as the config says, or ends the run."""

    def __init__(self, setup: Setup, workdir: Path, adaptation: Adaptation | None, progress: Progress):
        self._setup, self._workdir, self._adaptation, self._progress = setup, workdir, adaptation, progress
        self._in_a_row = 0

    def tell(self, step: Step, values: dict[str, float], state: TrainState) -> None:
        """Raises UserError where the run stops; the state before the step and the step's examples are saved."""
        self._in_a_row = 0 if values["applied"] else self._in_a_row + 1
        if values["applied"]:
            return
        rows = self._rows(step)
        name, _ = of_each(step.metrics)
        bad = [row["id"] for row in rows if not np.isfinite(row[name])] or [row["id"] for row in rows]
        shown = ", ".join(map(repr, bad[:5])) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        what = (
            f"step {step.number}: loss {values['loss']}, gradient norm {values['grad_norm']}, from the examples {shown}"
        )
        if self._setup.config.train.on_bad_numbers == "skip" and self._in_a_row <= _MOST_SKIPPED_IN_A_ROW:
            self._progress.skipped += 1
            log.warning("%s: left out, the state stays as it was (%d such steps so far)", what, self._progress.skipped)
            return
        folder = self._save(step.number, rows, state)
        raise UserError(
            f"{what}: training diverged; the state before the step is in {folder}, its examples beside it\n"
            "Drop those examples, lower --config.optimizer.learning_rate or set --config.train.on_bad_numbers=skip, "
            "with another --workdir"
        )

    def _rows(self, step: Step) -> list[dict[str, Any]]:
        data, (name, values) = self._setup.data, of_each(step.metrics)
        examples, indices = data.examples, data.indices(step.number - 1)
        return [
            {"id": examples.ids[i], "label": bool(examples.is_desirable[i]), name: number}
            for i, number in zip(indices, values[: len(indices)], strict=True)
        ]

    def _save(self, number: int, rows: list[dict[str, Any]], state: TrainState) -> Path:
        folder = self._workdir / _INSPECT
        if processes.is_first():
            atomic_write(folder / f"{number}.jsonl", "".join(f"{to_json(row)}\n" for row in rows))
        inspected = TrainingCheckpoints(folder, adaptation=self._adaptation, model=self._setup.model.config)
        if inspected.latest_step() != number:
            inspected.save(
                number, TrainingState(*state, dataclasses.asdict(self._progress) | {"step": number}), self._setup.assets
            )
        inspected.close()
        return folder / str(number)


class Divergence(Hook):
    """Ends a run that has plainly diverged, before its state is saved."""

    def __init__(self, setup: Setup, checkpoints: TrainingCheckpoints):
        self._rate, self._checkpoints, needs = setup.config.optimizer.learning_rate, checkpoints, setup.objective.needs
        self._knows_good, self._vocab_size = needs.labels or needs.pairs, setup.model.config.vocab_size
        self._rms = jax.jit(train_state.root_mean_square)

    def measure(self, step: Step, state: TrainState) -> Measured:
        return {"weights_rms": self._rms(state.params)}

    def tell(self, step: Step, values: dict[str, float], state: TrainState) -> None:
        """Raises UserError where the run has diverged."""
        feedback, (_, each) = step.batch.feedback, of_each(step.metrics)
        good = feedback.is_example & (feedback.is_desirable | (not self._knows_good))
        per_token = each[good] / np.maximum(feedback.completion_length[good], 1)
        what = divergence(per_token, values["weights_rms"], self._vocab_size) if values["applied"] else ""
        if what:
            self._checkpoints.wait()
            latest = self._checkpoints.latest_step()
            saved = "none yet" if latest is None else f"the last one, of step {latest}, may have suffered already"
            raise UserError(
                f"step {step.number}: training diverged: {what}; its checkpoints are as they were ({saved})\n"
                f"Lower --config.optimizer.learning_rate ({self._rate:g}) and train again with another --workdir"
            )


class Bar(Hook):
    """The progress bar."""

    def __init__(self, total: int, first: int):
        self._bar = tqdm(total=total, initial=first, desc="train", unit="step")

    def tell(self, step: Step, values: dict[str, float], state: TrainState) -> None:
        margin = {"margin": f"{values['reward_margin']:.3f}"} if "reward_margin" in values else {}
        self._bar.set_postfix(loss=f"{values['loss']:.4f}", **margin, refresh=False)
        self._bar.update()

    def close(self) -> None:
        self._bar.close()


class Journal(Hook):
    """metrics.jsonl, and what trackers are told of it."""

    def __init__(self, setup: Setup, metrics_log: MetricsLog, tracking: Tracking):
        self._log, self._tracking, self._every = metrics_log, tracking, setup.config.train.log_every
        self._learning_rate = train_state.learning_rate(setup.config.optimizer, setup.total_steps)
        self._num_examples, self._counts = len(setup.data.examples), setup.data.examples.counts

    def tell(self, step: Step, values: dict[str, float], state: TrainState) -> None:
        is_evaluated = any(name.startswith(EVAL) for name in values)
        if step.number % self._every and step.number != 1 and not step.is_last and not is_evaluated:
            return
        positions = sum(rows.tokens.size for rows in step.batch.micro_batches)
        row = {
            "step": step.number,
            **{name: value for name, value in values.items() if name != "applied"},
            **step.figures,
            "epoch": step.figures["examples"] / self._num_examples,
            "batch_examples": int(step.batch.feedback.is_example.sum()),
            "records_dropped": self._counts.dropped + self._counts.skipped,
            "examples_cut": self._counts.cut,
            "learning_rate": float(self._learning_rate(step.number - 1)),
            "real_token_fraction": step.batch.real_tokens / positions,
        }
        self._log.write(row)
        self._tracking.metrics(row)

    def rest(self, step: Step, state: TrainState) -> None:
        self._log.save()  # before the checkpoint: a run that goes on from it lacks no line

    def close(self) -> None:
        self._log.close()


class Checkpoints(Hook):
    """Saves the state every few steps, where it is the best so far, and at the end; also where a hook wants a rest.

    Of those before, it keeps as many as the config says, and the best. They go once the one after them is complete.
    """

    def __init__(
        self,
        options: config.Train,
        assets: Mapping[str, bytes],
        checkpoints: TrainingCheckpoints,
        progress: Progress,
    ):
        self._options, self._assets = options, assets
        self._checkpoints, self._progress = checkpoints, progress
        self._best = self._best_so_far()  # of those that were saved

    def wants_rest(self, step: Step) -> bool:
        is_best = self._best_so_far() == step.number
        return step.is_last or step.number % self._options.checkpoint_every == 0 or is_best

    def rest(self, step: Step, state: TrainState) -> None:
        self._checkpoints.keep_latest(self._options.keep_checkpoints, self._best)
        self._checkpoints.save(step.number, TrainingState(*state, dataclasses.asdict(self._progress)), self._assets)
        self._best = self._best_so_far()
        if step.is_last:
            self._checkpoints.keep_latest(self._options.keep_checkpoints, self._best)

    def close(self) -> None:
        self._checkpoints.wait()  # whatever ends the run, a save that was started is finished

    def _best_so_far(self) -> int:
        return self._progress.best_step if self._progress.best_metric == self._options.keep_best else 0


class Stop(Hook):
    """Ends the run where it is asked to, after its state was saved."""

    def __init__(self, total: int, stop_requested: Callable[[], bool]):
        self._total, self._stop_requested, self._stopping = total, stop_requested, False

    def wants_rest(self, step: Step) -> bool:
        self._stopping = self._stop_requested()
        return self._stopping

    def rest(self, step: Step, state: TrainState) -> None:
        if self._stopping and not step.is_last:
            raise Interrupted(f"saved at step {step.number} of {self._total}; the same command goes on from there")
