"""A training run: reference pass, steps, checkpoints, samples before and after, report."""

import functools
import itertools
import json
import logging
import shlex
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from elbo_kto_jax import processes
from elbo_kto_jax.checkpoint.digest import params_digest
from elbo_kto_jax.checkpoint.store import TrainingCheckpoints, TrainingState
from elbo_kto_jax.config import Config
from elbo_kto_jax.errors import Interrupted, UserError
from elbo_kto_jax.files import atomic_write, to_json
from elbo_kto_jax.model import lora
from elbo_kto_jax.model.llada import Params
from elbo_kto_jax.report.training import write_training_report
from elbo_kto_jax.sampling.decode import generate, to_text
from elbo_kto_jax.text.chat import EOT_TOKEN
from elbo_kto_jax.train import inputs
from elbo_kto_jax.train import state as train_state
from elbo_kto_jax.train.data import TrainingData
from elbo_kto_jax.train.health import Health
from elbo_kto_jax.train.reference import ReferenceCache
from elbo_kto_jax.train.setup import Setup, prepare
from elbo_kto_jax.train.step import Batch, Weights, batch_loss, build_programs, train_step
from elbo_kto_jax.train.workdir import MetricsLog, Workdir, open_workdir, read_metrics, stop_on_signal

log = logging.getLogger(__name__)
_MOST_SKIPPED_IN_A_ROW = 10  # steps with bad numbers; more are no accident of the data
_INSPECT = "not_finite"  # folder of the working folder for the state before a step with bad numbers


def train(config: Config, workdir: Path, *, overwrite: bool, skip_bad: bool) -> dict:
    """Runs the recipe of `config` in `workdir`, going on from its latest checkpoint, and returns the summary.

    Raises:
      UserError: anything that the user has to mend.
      Interrupted: SIGTERM or SIGINT came; the state is saved and the summary so far is the second argument.
    """
    with open_workdir(workdir, config, overwrite, "train") as folder:
        setup = prepare(config, skip_bad=skip_bad, moment=folder.moment)
        folder.claim(inputs.of_setup(setup), inputs.files_of(setup))
        with stop_on_signal() as stop_requested:
            summary = _Run(setup, folder, stop_requested).run()
        folder.finish()
    return summary


# B_ref precomputed, the reference's parameters or the adapters' base (online), none (SFT)
Reference = ReferenceCache | Params | lora.Base | None


def reference_of(reference: Reference, step: int) -> Params | lora.Base | np.ndarray | None:
    """What `train_step` wants to know of the reference in step `step`."""
    return reference.elbo_ref[step] if isinstance(reference, ReferenceCache) else reference


class _Run:
    """One call of `train`: the state that its parts share."""

    def __init__(self, setup: Setup, folder: Workdir, stop_requested):
        config, workdir = setup.config, folder.path
        self.setup, self.workdir, self.stop_requested = setup, workdir, stop_requested
        self.weights = inputs.Weights(setup, folder)
        self.total_steps = setup.total_steps
        self.tx = train_state.optimizer(config.optimizer, self.total_steps)
        self.learning_rate = train_state.learning_rate(config.optimizer, self.total_steps)
        abstract = train_state.abstract_trained(setup.model, config.lora)
        self.shardings = train_state.state_shardings(self.tx, abstract, setup.mesh)
        self.abstract = train_state.abstract_state(self.tx, abstract, self.shardings)
        self.programs = build_programs(
            setup.scorer(), setup.objective, draws=config.estimator.draws, tx=self.tx, shardings=self.shardings
        )
        self.base, self.adaptation = setup.load_base()
        self.noise_scale = jax.jit(
            functools.partial(
                train_state.gradient_noise_scale, options=config.optimizer, batch_size=setup.data.batch_size
            )
        )
        self.checkpoints = TrainingCheckpoints(workdir / "checkpoints", adaptation=self.adaptation)
        self.progress = {"step": 0, "examples": 0, "tokens": 0, "seconds": 0.0}
        self.skipped = self.skipped_in_a_row = 0  # steps with bad numbers
        self.health = Health()
        self.samples: list[dict] = []

    def run(self) -> dict:
        setup, config = self.setup, self.setup.config
        start = self.checkpoints.latest_step()
        if start is None:
            params = self.weights.load(inputs.MODEL) if self.base is None else setup.init_adapters()
            state = train_state.init_state(self.tx, params, self.shardings)
        else:
            restored = self.checkpoints.restore_latest(TrainingState(*self.abstract, progress={}))
            state = train_state.TrainState(restored.params, restored.opt_state)
            self.progress = restored.progress
            self.skipped = self.progress.pop("skipped", 0)
            log.info("going on from step %d", start)
        if self.adaptation is not None:
            self.weights.check(inputs.MODEL, self.adaptation.base_digest)
        log.info(
            "%s on %s: %d steps of %d examples, %d draws each; %d rows of %d tokens at once",
            config.objective.name,
            ", ".join(f"{axis} {size}" for axis, size in setup.mesh.shape.items()),
            self.total_steps,
            setup.data.batch_size,
            config.estimator.draws,
            setup.data.layout.rows,
            setup.data.layout.length,
        )
        try:
            self.sample("before", self.policy(state.params))
            reference, eval_reference = self.prepare_reference(state.params, fresh=start is None)
            self.weights.verify(inputs.MODEL)
            state = self.steps(state, reference, eval_reference)
            self.sample("after", self.policy(state.params))
        except Interrupted as stop:
            raise Interrupted(*stop.args, self.finish(interrupted=True)) from None
        return self.finish(interrupted=False)

    def policy(self, trained: Params) -> Weights:
        """The whole model of which `trained` is what the optimizer moves."""
        return trained if self.base is None else self.base.policy(trained)

    def prepare_reference(self, trained: Params, fresh: bool) -> tuple[Reference, Reference]:
        """What the rewards of the training and of the held-out batches are measured against.

        `trained` is what the optimizer moves; where it is `fresh`, that which training starts from, it mostly is the
        reference.
        """
        config = self.setup.config
        if not self.setup.objective.needs.reference:
            return None, None
        online, key = config.reference.mode == "online", inputs.reference_key(config)

        @functools.cache  # loaded once, and only where something is not scored yet
        def reference() -> Params | lora.Base:
            if self.base is not None:
                return self.base if online else self.base.reference(trained)
            if not fresh or key != inputs.MODEL:
                return self.weights.load(key)
            return jax.tree.map(jnp.copy, trained) if online else trained  # the first step donates the originals

        if online:
            return reference(), reference()
        if self.weights.known(key) is None:
            reference()
        digest = self.weights.known(key) if self.base is None else params_digest(self.base.params)

        def cache(folder: str, data: TrainingData | None, steps: int) -> ReferenceCache | None:
            if data is None:
                return None
            cache = ReferenceCache(self.workdir / folder, self.setup.fingerprint(digest, data), data, steps)
            if not cache.known.all():
                cache.complete(self.programs.scorer, reference(), self.stop_requested)
            return cache

        held_out = self.setup.eval_data if config.train.eval_every else None
        caches = (
            cache("reference", self.setup.data, self.total_steps),
            cache("reference_eval", held_out, held_out.steps_per_epoch if held_out else 0),
        )
        self.weights.verify(key)
        return caches

    def steps(
        self, state: train_state.TrainState, reference: Reference, eval_reference: Reference
    ) -> train_state.TrainState:
        """Takes the remaining steps. Metrics are read one step late, so that the device never waits for the host."""
        config, data = self.setup.config, self.setup.data
        first = self.progress["step"]
        metrics_log = MetricsLog(self.workdir, first)
        began = time.monotonic() - self.progress["seconds"]
        late: tuple[dict, dict] | None = None
        go = None
        bar = tqdm(total=self.total_steps, initial=first, desc="train", unit="step")
        try:
            for step, batch in zip(itertools.count(first), data.batches(first, self.total_steps)):
                state, metrics = train_step(
                    self.programs, state, batch, reference_of(reference, step), base=self.base, go=go
                )
                metrics["gradient_noise_scale"] = self.noise_scale(state.opt_state)
                if config.train.on_bad_numbers == "stop":
                    go = metrics["applied"]  # the host hears of bad numbers one step late; until then nothing moves
                if config.train.eval_every and self.setup.eval_data and (step + 1) % config.train.eval_every == 0:
                    metrics |= self.evaluate(state.params, eval_reference)
                if late is not None:
                    self.log_step(metrics_log, bar, state, *late)
                late = (self.count(step, batch, time.monotonic() - began), metrics)
                last, stopping = step + 1 == self.total_steps, self.stop_requested()
                if last or stopping or (step + 1) % config.train.checkpoint_every == 0:
                    self.log_step(metrics_log, bar, state, *late)
                    late = None
                    self.progress["seconds"] = time.monotonic() - began
                    progress = {**self.progress, "skipped": self.skipped}
                    self.checkpoints.save(step + 1, TrainingState(*state, progress), self.setup.assets)
                if stopping and not last:
                    raise Interrupted(
                        f"saved at step {step + 1} of {self.total_steps}; the same command goes on from there"
                    )
        finally:
            bar.close()
            metrics_log.close()
            self.checkpoints.wait()  # whatever ends the run, a save that was started is finished
        return state

    def evaluate(self, params: Params, reference: Reference) -> dict:
        """Loss on the held-out data (mean over its examples), and what the objective tells of all of it."""
        data, programs, policy = self.setup.eval_data, self.programs, self.policy(params)
        if isinstance(reference, lora.Base):
            reference = reference.reference(params)
        losses, counts, values, labels = [], [], [], []
        for step, batch in enumerate(data.batches(0, data.steps_per_epoch)):
            scores = programs.scorer(policy, batch.micro_batches)
            _, metrics = batch_loss(programs, scores, reference_of(reference, step), batch)
            here = batch.feedback.is_example
            losses.append(float(metrics["loss"]))
            counts.append(int(here.sum()))
            (of_each,) = (metric for metric in metrics.values() if np.ndim(metric))
            values.append(np.asarray(of_each)[here])
            labels.append(batch.feedback.is_desirable[here])
        found = self.setup.objective.held_out(np.concatenate(values), np.concatenate(labels))
        loss = float(np.average(losses, weights=counts))
        return {"eval_loss": loss, **{f"eval_{name}": value for name, value in found.items()}}

    def count(self, step: int, batch: Batch, seconds: float) -> dict:
        """Advances the totals by one step, and returns them with what else is known of the step beforehand."""
        self.progress = {
            "step": step + 1,
            "examples": self.progress["examples"] + int(batch.feedback.is_example.sum()),
            "tokens": self.progress["tokens"] + batch.real_tokens,
            "seconds": seconds,
        }
        positions = sum(rows.tokens.size for rows in batch.micro_batches)
        return {
            **self.progress,
            "learning_rate": float(self.learning_rate(step)),
            "real_token_fraction": batch.real_tokens / positions,
        }

    def log_step(
        self, metrics_log: MetricsLog, bar: tqdm, state: train_state.TrainState, figures: dict, metrics: dict
    ) -> None:
        """Writes what is known of a step; `state` is the present one, which bad numbers in that step left as it was."""
        applied = bool(metrics.pop("applied"))
        values = {name: float(value) for name, value in metrics.items() if not np.ndim(value)}
        step = figures["step"]
        for warning in self.health.warnings(step, values):
            log.warning("%s", warning)
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1
        if not applied:
            self.skip_or_stop(state, step, values, metrics)
        margin = {"margin": f"{values['reward_margin']:.3f}"} if "reward_margin" in values else {}
        bar.set_postfix(loss=f"{values['loss']:.4f}", **margin, refresh=False)
        bar.update()
        if step % self.setup.config.train.log_every == 0 or step in (1, self.total_steps):
            metrics_log.write({"step": step, **values, **{k: v for k, v in figures.items() if k != "step"}})

    def skip_or_stop(self, state: train_state.TrainState, step: int, values: dict, metrics: dict) -> None:
        """Counts a step whose loss or gradient is not finite, as the config says, or ends the run.

        Raises:
          UserError: the run stops; the state before the step and the step's examples are saved.
        """
        indices = self.setup.data.indices(step - 1)
        (name,) = (name for name, metric in metrics.items() if np.ndim(metric))
        numbers = np.asarray(metrics[name])[: len(indices)]
        examples = self.setup.data.examples
        rows = [
            {"id": examples.ids[i], "label": bool(examples.is_desirable[i]), name: number}
            for i, number in zip(indices, numbers, strict=True)
        ]
        bad = [row["id"] for row in rows if not np.isfinite(row[name])] or [row["id"] for row in rows]
        shown = ", ".join(map(repr, bad[:5])) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        what = f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}, from the examples {shown}"
        if self.setup.config.train.on_bad_numbers == "skip" and self.skipped_in_a_row <= _MOST_SKIPPED_IN_A_ROW:
            self.skipped += 1
            log.warning("%s: left out, the state stays as it was (%d such steps so far)", what, self.skipped)
            return
        folder = self.workdir / _INSPECT
        if processes.is_first():
            atomic_write(folder / f"{step}.jsonl", "".join(f"{to_json(row)}\n" for row in rows))
        inspected = TrainingCheckpoints(folder, adaptation=self.adaptation)
        if inspected.latest_step() != step:
            inspected.save(step, TrainingState(*state, {**self.progress, "step": step - 1}), self.setup.assets)
        inspected.close()
        raise UserError(
            f"{what}: training diverged; the state before the step is in {folder / str(step)}, its examples beside it\n"
            "Drop those examples, lower --config.optimizer.learning_rate or set --config.train.on_bad_numbers=skip, "
            "with another --workdir"
        )

    def sample(self, when: str, weights: Weights) -> None:
        """Answers a few prompts with the present parameters; kept in samples.json for the report."""
        count, file = self.setup.config.train.samples, self.workdir / "samples.json"
        if file.is_file():
            try:
                self.samples = [dict(sample) for sample in json.loads(file.read_bytes())]
            except (ValueError, TypeError):
                raise UserError(f"{file}: damaged; remove it (the report will lack the answers before)") from None
        if not count or (self.samples and when in self.samples[0]):
            return
        examples = (self.setup.eval_data or self.setup.data).examples
        chosen = range(min(count, len(examples)))
        prompts = [examples.tokens[examples.offsets[i] :][: examples.prompt_length[i]] for i in chosen]
        tokenizer, options = self.setup.tokenizer, self.setup.config.sampler
        eot = tokenizer.get_added_vocab().get(EOT_TOKEN)
        log.info("sampling %d answers %s training", len(prompts), when)
        responses = generate(
            self.setup.model,
            lora.parameters(weights),
            prompts,
            options,
            seed=self.setup.config.seed,
            prompt_ids=[examples.ids[i] for i in chosen],
            eot_id=eot,
            mesh=self.setup.mesh,
        )
        stops = [self.setup.model.config.eos_token_id] + ([] if eot is None else [eot])
        if not self.samples:
            self.samples = [{"prompt": prompt} for prompt in examples.prompts[: len(prompts)]]
        for sample, response in zip(self.samples, responses.tokens, strict=True):
            sample[when] = to_text(response, tokenizer, stops)
        if processes.is_first():
            atomic_write(file, json.dumps(self.samples, ensure_ascii=False, indent=1))

    def finish(self, interrupted: bool) -> dict:
        """Writes report.html and returns the summary."""
        rows = read_metrics(self.workdir)
        last = rows[-1] if rows else {}
        seconds = max(self.progress["seconds"], 1e-9)
        step = self.checkpoints.latest_step()
        summary = {
            "steps": self.progress["step"],
            "examples": self.progress["examples"],
            "loss": last.get("loss"),
            "reward_margin": last.get("reward_margin"),
            "examples_per_second": self.progress["examples"] / seconds,
            "tokens_per_second": self.progress["tokens"] / seconds,
            "checkpoint": None if step is None else str(self.workdir / "checkpoints" / str(step)),
            "interrupted": interrupted,
            "skipped_steps": self.skipped,
            "report": str(self.workdir / "report.html"),
        }
        if not processes.is_first():
            return summary
        write_training_report(
            self.workdir / "report.html",
            title=f"{self.setup.config.objective.name}: {self.workdir.name}",
            config=self.setup.config.to_dict(),
            metrics=rows,
            samples=[s for s in self.samples if "after" in s],
            summary=summary,
        )
        if not interrupted:
            log.info("report: %s", summary["report"])
            words = [f"--source={summary['checkpoint']}", f"--out={self.workdir / 'huggingface'}"]
            log.info("next: python -m conversion.to_hf %s", shlex.join(words))
        return summary
