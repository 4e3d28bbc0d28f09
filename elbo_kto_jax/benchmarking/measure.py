"""The measurements: two workers, each in a process of its own, on the same records, weights, masks and draws.

On a CPU the workers alternate within every round, so that a machine whose speed drifts does not matter. A GPU holds
one of them at a time: all rounds of ours, then all of the peer's.
"""

import contextlib
import dataclasses
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from elbo_kto_jax.benchmarking import agreement
from elbo_kto_jax.models.flops import forward_flops
from elbo_kto_jax.runtime.config import Config, Estimator
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.scoring.scorer import Kept
from elbo_kto_jax.training.data import TrainingData
from elbo_kto_jax.training.setup import Setup

log = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[2]
PEER = ROOT / "tests" / "peer" / "torch_elbo_kto.py"
MEMORY_DRAWS = (1, 4, 8)
PADDED_RECORDS = 2  # that the padded peer runs a round: each costs it the same
# Where our training step may keep its residuals; the ways that are not configured are measured beside it.
VARIANTS: tuple[Kept, ...] = ("device", "host", "recompute")
EQUAL_VARIANCE = (Estimator(4, "balanced"), Estimator(8, "uniform"))  # docs/estimators.md
_WHOLE_GPU = {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}  # in one piece
REWARD_SPREAD = 3.0  # nats: rewards that a loss can be compared at, though policy and reference are one model


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured: a set-up, its first `records`, how often, and beside which peer."""

    setup: Setup
    records: int
    rounds: int
    with_peer: bool
    peer_checkpointing: bool
    scratch: Path

    @property
    def config(self) -> Config:
        return self.setup.config

    def passes(self) -> dict[str, dict]:
        """Our kinds of training step, and what asks the worker for them: "ours" is as configured.

        All are asked for by name, so that each is of one kind whatever the number of draws.
        """
        micro_batches = len(self.setup.data.micro_batches(np.arange(self.records)))
        if micro_batches == 1:
            return {"ours": {}}
        ours = self.setup.residuals
        here = [way for way in VARIANTS if way != "host" or jax.default_backend() != "cpu"]  # there it is one memory
        others: dict[str, dict] = {way: {"residuals": way} for way in here if way != ours}
        return {"ours": {"residuals": ours}, **others}

    def rewards(self) -> tuple[np.ndarray, float]:
        """What is added to a side's own B_ref, so that its rewards are minus this, and their reference point."""
        noise = np.random.default_rng(0).normal(0, REWARD_SPREAD, self.records)
        return noise, -float(noise.mean()) if self.config.objective.reference_point == "global_mean" else 0.0

    def compares_variance(self) -> bool:
        """Whether the peer also runs with the draws and the scheme that give the same variance of the gradient."""
        return self.config.estimator == EQUAL_VARIANCE[0]

    def data(self, estimator: Estimator) -> TrainingData:
        of = self.setup.data
        seed, size = self.config.seed, self.records
        return TrainingData(of.examples, of.layout, estimator=estimator, batch_size=size, seed=seed)

    def start(self, side: str, draws: int) -> "Worker":
        """A worker of "ours" with so many draws, or of the "peer"."""
        if side == "ours":
            estimator = dataclasses.replace(self.config.estimator, draws=draws)
            changed = dataclasses.replace(self.config, estimator=estimator).to_dict()
            return Worker(
                "-m", "elbo_kto_jax.benchmarking.worker", setting={"config": changed, "records": self.records}
            )
        setting = {
            "model": self.config.model.path,
            "max_length": self.config.data.max_length,
            "beta": self.config.objective.beta,
            "learning_rate": self.config.optimizer.learning_rate,
            "activation_checkpointing": self.peer_checkpointing,
            "dtype": self.config.model.dtype,
        }
        return Worker(str(PEER), setting=setting)

    def examples(self, estimator: Estimator) -> str:
        """The file of the records' masks for the peer; it is written on first use."""
        file = self.scratch / f"{estimator.scheme}-{estimator.draws}.npz"
        if not file.exists():
            write_examples(file, self.data(estimator), self.records)
        return str(file)


class Worker:
    """A process that answers one JSON line with another."""

    def __init__(self, *command: str, setting: dict):
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  # closed in __exit__; a pipe would fill up
        self.command = [sys.executable, *command]
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            encoding="utf-8",
            env={**os.environ, **_WHOLE_GPU, "PYTHONPATH": path},
        )
        self.ready = self.ask(**setting)

    def ask(self, **request) -> dict:
        """The answer to a request.

        Raises:
          UserError: the worker stopped, out of memory for instance; the message is the last line that it printed.
        """
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline() if self.process.stdout else ""
        except BrokenPipeError:
            line = ""
        if not line:
            status = self.process.wait()
            self.errors.seek(0)
            lines = [line.strip() for line in self.errors.read().splitlines() if line.strip()]
            errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)] or lines
            reason = errors[-1][:300] if errors else f"exit status {status}"
            raise UserError(f"the benchmark's worker {self.command[-1]} stopped: {reason}")
        return json.loads(line)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(BrokenPipeError):  # what was not sent to a worker that has stopped
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()


def write_examples(file: Path, data: TrainingData, records: int) -> None:
    """What the peer is given: tokens, windows, labels and the very masks that we draw."""
    examples = data.examples
    arrays: dict[str, Any] = {"count": np.array(records)}
    for i in range(records):
        masks = data.masks(i)
        arrays |= {
            f"{i}.tokens": examples.tokens[examples.offsets[i] : examples.offsets[i + 1]],
            f"{i}.start": examples.prompt_length[i],
            f"{i}.desirable": examples.is_desirable[i],
            f"{i}.masks": masks.mask,
            f"{i}.weights": masks.weight,
        }
    np.savez(file, **arrays)


def measure(plan: Plan) -> dict:
    """Everything that the report shows; seconds are medians over the rounds, per record."""
    draws, sides = plan.config.estimator.draws, ["ours", *(["peer"] if plan.with_peer else [])]
    passes = plan.passes()
    runs = 2 + len(passes) + (5 + plan.compares_variance()) * plan.with_peer
    bar = tqdm(
        total=(plan.rounds + 1) * runs + len(MEMORY_DRAWS) * (len(passes) + plan.with_peer),
        desc="benchmark",
        unit="run",
    )
    found: dict[str, list[dict]] = {}
    versions: dict[str, str] = {}
    for group in [[side] for side in sides] if jax.default_backend() == "gpu" else [sides]:
        with contextlib.ExitStack() as stack:
            workers = {side: stack.enter_context(plan.start(side, draws)) for side in group}
            requests = [run for side, worker in workers.items() for run in _requests(plan, side, worker)]
            _run_rounds(requests, plan, found, bar)
            versions |= {key: value for worker in workers.values() for key, value in worker.ready.items()}
    differences = _compare(plan, found) if plan.with_peer else []
    memory = _memory(plan, passes, bar)
    bar.close()
    return _summarise(plan, found, memory, differences, versions)


Request = tuple[str, Worker, dict]  # name of what is measured, who does it, and what it is asked


def _requests(plan: Plan, side: str, worker: Worker) -> list[Request]:
    """What one round asks of a side."""
    noise, z0 = plan.rewards()
    everything = {"count": plan.records}
    if side == "ours":
        elbo = worker.ask(do="reference")["elbo"]
        train = {"do": "train", "elbo_ref": (np.array(elbo) + noise).tolist(), **everything}
        steps = [(f"{name}.train", worker, train | how) for name, how in plan.passes().items()]
        return [
            ("peak", worker, {"do": "peak"}),
            *steps,
            ("ours.reference", worker, {"do": "reference", **everything}),
        ]
    file, few = plan.examples(plan.config.estimator), {"count": min(PADDED_RECORDS, plan.records)}
    reference = {"do": "reference", "examples": file}
    elbo = worker.ask(**reference, **everything, true_length=True)["elbo"]
    train = {"do": "train", "examples": file, "elbo_ref": (np.array(elbo) + noise).tolist(), "z0": z0}
    equal = {"examples": plan.examples(EQUAL_VARIANCE[1])} if plan.compares_variance() else {}
    return [
        ("peer.peak", worker, {"do": "peak"}),
        ("padded.train", worker, {**train, **few}),
        ("padded.reference", worker, {**reference, **few}),
        ("true.train", worker, {**train, **everything, "true_length": True}),
        ("true.reference", worker, {**reference, **everything, "true_length": True}),
        *([("equal.train", worker, {**train, **few, **equal})] if equal else []),
    ]


def _run_rounds(requests: Iterable[Request], plan: Plan, found: dict[str, list[dict]], bar: tqdm) -> None:
    """Adds every round's answers to `found`, but for those of the first round, which warms up.

    A way of ours for which there is not enough memory is left out.
    """
    too_large = set()
    for number in range(plan.rounds + 1):
        for name, worker, request in requests:
            answer = {} if name in too_large else worker.ask(**request)
            if "too_large" in answer and name.removesuffix(".train") not in VARIANTS:
                raise UserError(f"{name}: not enough memory ({answer['too_large'][:300]}); choose fewer --layers")
            if "too_large" in answer:
                log.warning("%s does not fit: %s", name, answer["too_large"][:300])
                too_large.add(name)
            if name in too_large:
                bar.update()
                continue
            if "count" in request:
                answer["per_record"] = answer["seconds"] / request["count"]
            if number:
                found.setdefault(name, []).append(answer)
            bar.update()


def _compare(plan: Plan, found: dict[str, list[dict]]) -> list[agreement.Difference]:
    """Ours, in whatever passes, against the peer at true length, in the last round."""
    hidden = _hidden(plan)
    last = {name: runs[-1] for name, runs in found.items()}
    peer = last["true.train"] | {"elbo": last["true.reference"]["elbo"]}
    elbo, beta, dtype = last["ours.reference"]["elbo"], plan.config.objective.beta, plan.config.model.dtype
    return [
        difference
        for side in plan.passes()
        if f"{side}.train" in last
        for difference in agreement.compare(
            side, last[f"{side}.train"] | {"elbo": elbo}, peer, hidden, beta=beta, dtype=dtype
        )
    ]


def _hidden(plan: Plan) -> np.ndarray:
    """Hidden tokens of a draw of each record, on average."""
    data = plan.data(plan.config.estimator)
    return np.array([data.masks(i).mask.sum() for i in range(plan.records)]) / plan.config.estimator.draws


def _memory(plan: Plan, passes: dict[str, dict], bar: tqdm) -> dict[str, dict[str, int | None]]:
    """Peak memory of a training step in bytes, by side and number of draws, each in a fresh process.

    None: it needs more memory than there is, which it said, or at which it stopped.
    """
    noise, z0 = plan.rewards()
    train = {"do": "train", "elbo_ref": noise.tolist(), "z0": z0}
    memory: dict[str, dict[str, int | None]] = {}
    for k in MEMORY_DRAWS:
        asked = {side: ("ours", train | how) for side, how in passes.items()}
        if plan.with_peer:
            file = plan.examples(dataclasses.replace(plan.config.estimator, draws=k))
            asked["peer"] = ("peer", {**train, "count": 1, "examples": file})
        for side, (who, request) in asked.items():
            try:
                with plan.start(who, k) as worker:
                    answer = worker.ask(**request)
                peak = answer.get("peak_bytes")
            except UserError as error:
                log.warning("%s, K = %d: %s", side, k, error)
                peak = None
            memory.setdefault(side, {})[f"K={k}"] = peak
            bar.update()
    return memory


def _summarise(plan: Plan, found: dict, memory: dict, differences: list[agreement.Difference], versions: dict) -> dict:
    draws, examples = plan.config.estimator.draws, plan.setup.data.examples
    lengths = np.diff(examples.offsets)[: plan.records]
    flops = draws * forward_flops(plan.setup.model.config, lengths, _hidden(plan)) / plan.records
    tokens = draws * float(lengths.mean())
    per_record = {name: [run["per_record"] for run in runs] for name, runs in found.items() if "peak" not in name}
    seconds = {name: float(np.median(values)) for name, values in per_record.items()}
    peak, *peer_peak = (
        float(np.median([run["flops"] for run in found[name]])) for name in ("peak", "peer.peak") if name in found
    )

    def figures(side: str, more_draws: float = 1.0) -> dict:
        return {
            work: {
                "seconds_per_example": seconds[f"{side}.{work}"],
                "tokens_per_second": more_draws * tokens / seconds[f"{side}.{work}"],
                "flops": more_draws * passes * flops / seconds[f"{side}.{work}"],
                "fraction_of_peak": more_draws * passes * flops / seconds[f"{side}.{work}"] / peak,
            }
            for work, passes in (("train", 3), ("reference", 1))
            if f"{side}.{work}" in found
        }

    def ratio(ours: str, side: str, work: str) -> dict:
        """Of each round by itself, so that a machine whose speed drifts does not matter."""
        each = [b / a for a, b in zip(per_record[f"{ours}.{work}"], per_record[f"{side}.{work}"], strict=True)]
        return {"median": float(np.median(each)), "low": min(each), "high": max(each)}

    peers = [side for side in ("padded", "true") if f"{side}.train" in found]
    equal = ["equal"] if "equal.train" in found else []
    variants = [side for side in VARIANTS if f"{side}.train" in found]
    ratios = {side: {"train": ratio("ours", side, "train")} for side in (*variants, *equal)}
    ratios |= {side: {work: ratio("ours", side, work) for work in ("train", "reference")} for side in peers}
    of_variant = {
        variant: {side: {"train": ratio(variant, side, "train")} for side in (*peers, *equal)} for variant in variants
    }
    return {
        "ratio": ratios["padded"]["train"]["median"] if peers else None,
        "ours": figures("ours"),
        "variants": {variant: {**figures(variant), "ratios": of_variant[variant]} for variant in variants},
        "peer": {side: figures(side) for side in peers}
        | {side: figures(side, EQUAL_VARIANCE[1].draws / draws) for side in equal},
        "ratios": ratios,
        "agrees": all(difference.agrees for difference in differences) if peers else None,
        "differences": [difference._asdict() for difference in differences],
        "memory": memory,
        "setting": _setting(plan, tokens / draws, peak, peer_peak[0] if peer_peak else None) | versions,
    }


def _setting(plan: Plan, mean_tokens: float, peak: float, peer_peak: float | None) -> dict:
    """What the figures depend on."""
    config, model = plan.config, plan.setup.model.config
    return {
        "model": config.model.path,
        "layers": model.n_layers,
        "width": model.d_model,
        "head_size": model.head_dim,
        "dtype": config.model.dtype,
        "param_dtype": config.model.param_dtype,
        "records": plan.records,
        "rounds": plan.rounds,
        "draws": config.estimator.draws,
        "scheme": config.estimator.scheme,
        "max_length": config.data.max_length,
        "mean_tokens": mean_tokens,
        "microbatch_tokens": config.train.microbatch_tokens,
        "residuals": plan.setup.residuals,
        "remat": config.model.remat,
        "peer_checkpointing": plan.peer_checkpointing,
        "matrix_peak_flops": peak,
        "peer_matrix_peak_flops": peer_peak,
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
    }
