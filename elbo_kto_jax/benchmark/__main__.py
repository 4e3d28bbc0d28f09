"""python -m elbo_kto_jax.benchmark --config=... : seconds, FLOP/s and memory on this machine, beside a peer's.

The same records, weights, masks and K for both, in alternating rounds of one run, each in a process of its own. The
peer is the authors' scheme in PyTorch (tests/peer/torch_elbo_kto.py): example by example, rows padded to --max-length,
the graphs of K draws kept until the backward pass; and, stronger than theirs, the same at each example's own length.
Our training step is measured as configured and, where the batch is several micro-batches, with the other number of
passes over them as well (train.one_pass_microbatches). All must give the same estimates, rewards, loss and gradient
norm, or the command fails.
"""

import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from elbo_kto_jax import cli, terminal
from elbo_kto_jax.checkpoint import huggingface
from elbo_kto_jax.config import Config, Estimator
from elbo_kto_jax.errors import UserError
from elbo_kto_jax.files import atomic_write, to_json
from elbo_kto_jax.model.flops import forward_flops
from elbo_kto_jax.report import page
from elbo_kto_jax.report.svg import Bar, bar_chart
from elbo_kto_jax.train.data import TrainingData
from elbo_kto_jax.train.setup import Setup, prepare

log = logging.getLogger(__name__)
PEER = Path(__file__).resolve().parents[2] / "tests" / "peer" / "torch_elbo_kto.py"
MEMORY_DRAWS = (1, 4, 8)
_PADDED_RECORDS = 2  # that the padded peer runs a round: each costs it the same
_VARIANTS = {"one_pass": "ours, one pass", "two_passes": "ours, two passes"}  # of a training step
_REWARD_SPREAD = 3.0  # nats: rewards that a loss can be compared at, though policy and reference are one model


def main(argv: list[str]) -> dict:
    flags = cli.Flags("elbo_kto_jax.benchmark", "Measure a training step and a reference pass, beside a PyTorch peer.")
    flags.add_config()
    flags.add_argument("--max-length", type=int, default=4096, help="tokens of a row (default: %(default)s)")
    flags.add_argument("--records", type=int, default=24, help="the first so many of the data (default: %(default)s)")
    flags.add_argument("--rounds", type=int, default=5, help="measurements of everything (default: %(default)s)")
    flags.add_argument("--no-peer", action="store_true", help="measure this implementation alone; needs no PyTorch")
    flags.add_argument("--peer-checkpointing", action="store_true", help="the peer recomputes activations, too")
    flags.add_argument("--out", default="runs/benchmark", help="folder for benchmark.json, report.html")
    flags.add_argument("--overwrite", action="store_true", help="replace what --out holds")
    options, config = flags.parse(argv)
    out = Path(options.out)
    for file in (out / "benchmark.json", out / "report.html"):
        cli.refuse_existing(file, options.overwrite)
    for flag in ("records", "rounds", "max_length"):
        if getattr(options, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')}: expected at least 1, got {getattr(options, flag)}")
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, max_length=options.max_length, packing=True),
        train=dataclasses.replace(config.train, global_batch_size=options.records),
    )
    if not options.no_peer:
        _check_peer(config)
    setup = prepare(config, skip_bad=False)
    if options.records > len(setup.data.examples):
        raise UserError(f"--records: expected at most {len(setup.data.examples)}, the records of the data set")
    result = measure(
        setup,
        options.records,
        options.rounds,
        with_peer=not options.no_peer,
        peer_checkpointing=options.peer_checkpointing,
    )
    atomic_write(out / "benchmark.json", to_json(result))
    write_report(out / "report.html", result)
    terminal.say(as_text(result))
    log.info("report: %s", out / "report.html")
    keys = ("ratio", "ours", "variants", "peer", "memory")
    return {**{key: result[key] for key in keys}, "report": str(out / "report.html")}


def _check_peer(config: Config) -> None:
    alone = "or pass --no-peer"
    if not PEER.is_file():
        raise UserError(f"the peer {PEER} is part of a checkout, not of an installation; clone the project, {alone}")
    if importlib.util.find_spec("torch") is None:
        raise UserError(f"the peer needs PyTorch: pip install -e '.[bench]', {alone}")
    if jax.default_backend() != "cpu":
        raise UserError(f"the peer runs on CPUs; set JAX_PLATFORMS=cpu, {alone}")
    if config.model.dtype != "float32":
        raise UserError(f"config.model.dtype: the peer computes in float32; set it to float32, {alone}")
    if config.objective.name != "elbo_kto":
        raise UserError(f"config.objective.name: the peer computes elbo_kto; set it to elbo_kto, {alone}")
    for name in ("desirable_weight", "undesirable_weight"):
        if getattr(config.objective, name) != 1.0:
            raise UserError(f"config.objective.{name}: the peer's is 1; set it to 1.0, {alone}")
    if not huggingface.is_published(Path(config.model.path)):
        path = config.model.path
        raise UserError(f"--config.model.path={path}: the peer reads a Hugging Face folder; give one, {alone}")


class Worker:
    """A process that answers one JSON line with another."""

    def __init__(self, *command: str, setting: dict):
        root = Path(__file__).resolve().parents[2]
        path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  # closed in __exit__; a pipe would fill up
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": path},
        )
        self.ready = self.ask(**setting)

    def ask(self, **request) -> dict:
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self.process.wait()
            self.errors.seek(0)
            reason = self.errors.read().strip().splitlines() or [f"exit status {status}"]
            raise RuntimeError(f"benchmark worker stopped: {reason[-1]}")
        return json.loads(line)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()


def measure(setup: Setup, records: int, rounds: int, *, with_peer: bool, peer_checkpointing: bool) -> dict:
    """Everything that the report shows; seconds are medians over the rounds, per record."""
    config, draws = setup.config, setup.config.estimator.draws
    passes = _passes(setup, records)
    with tempfile.TemporaryDirectory() as scratch:

        def estimator(draws: int) -> Estimator:
            return dataclasses.replace(config.estimator, draws=draws)

        def start_ours(draws: int) -> Worker:
            changed = dataclasses.replace(config, estimator=estimator(draws)).to_dict()
            return Worker("-m", "elbo_kto_jax.benchmark.worker", setting={"config": changed, "records": records})

        def start_peer(draws: int) -> Worker:
            file = Path(scratch) / f"{draws}.npz"
            data = setup.data
            write_examples(
                file,
                TrainingData(
                    data.examples, data.layout, estimator=estimator(draws), batch_size=records, seed=config.seed
                ),
                records,
            )
            setting = {
                "model": config.model.path,
                "examples": str(file),
                "max_length": config.data.max_length,
                "beta": config.objective.beta,
                "learning_rate": config.optimizer.learning_rate,
                "activation_checkpointing": peer_checkpointing,
            }
            return Worker(str(PEER), setting=setting)

        steps = (rounds + 1) * (2 + len(passes) + 5 * with_peer) + len(MEMORY_DRAWS) * (len(passes) + with_peer)
        bar = tqdm(total=steps, desc="benchmark", unit="run")

        def timed(worker: Worker, count: int = records, **request) -> dict:
            answer = worker.ask(count=count, **request)
            bar.update()
            return answer | ({"per_record": answer["seconds"] / count} if "seconds" in answer else {})

        found: dict[str, list[dict]] = {}
        with start_ours(draws) as ours, start_peer(draws) if with_peer else contextlib.nullcontext() as peer:
            elbo = ours.ask(do="reference")["elbo"]
            elbo_ref = (np.array(elbo) + np.random.default_rng(0).normal(0, _REWARD_SPREAD, records)).tolist()
            z0 = ours.ask(do="train", elbo_ref=elbo_ref)["reference_point"]
            asked = {"elbo_ref": elbo_ref, "z0": z0}
            runs = {
                "peak": (ours, {"do": "peak"}),
                **{f"{side}.train": (ours, {"do": "train", **asked, **how}) for side, how in passes.items()},
                "ours.reference": (ours, {"do": "reference"}),
            }
            if with_peer:
                few = min(_PADDED_RECORDS, records)
                runs |= {
                    "peer.peak": (peer, {"do": "peak"}),
                    "padded.train": (peer, {"do": "train", "count": few, **asked}),
                    "padded.reference": (peer, {"do": "reference", "count": few}),
                    "true.train": (peer, {"do": "train", "true_length": True, **asked}),
                    "true.reference": (peer, {"do": "reference", "true_length": True}),
                }
            for number in range(rounds + 1):
                for name, (worker, request) in runs.items():
                    answer = timed(worker, **request)
                    if number:  # the first round warms up
                        found.setdefault(name, []).append(answer)
            if with_peer:
                _check_equal({name: runs[-1] for name, runs in found.items()})
        memory: dict[str, dict[int, int]] = {side: {} for side in (*passes, "peer")}
        for k in MEMORY_DRAWS:
            for side, how in passes.items():
                with start_ours(k) as ours:
                    memory[side][k] = timed(ours, do="train", elbo_ref=elbo_ref, **how)["peak_bytes"]
            if with_peer:
                with start_peer(k) as peer:
                    memory["peer"][k] = timed(peer, 1, do="train", **asked)["peak_bytes"]
        bar.close()
    versions = ours.ready | (peer.ready if with_peer else {})
    return _summarise(setup, records, rounds, found, memory, versions)


def _passes(setup: Setup, records: int) -> dict[str, dict]:
    """Our kinds of training step, and what asks the worker for them: "ours" is as configured.

    Both are asked for by name, so that each is of one kind whatever the number of draws.
    """
    micro_batches = len(setup.data.batch_of(np.arange(records)).micro_batches)
    if micro_batches == 1:
        return {"ours": {}}
    one_pass = micro_batches <= setup.config.train.one_pass_microbatches
    return {"ours": {"one_pass": one_pass}, "two_passes" if one_pass else "one_pass": {"one_pass": not one_pass}}


def write_examples(file: Path, data: TrainingData, records: int) -> None:
    """What the peer is given: tokens, windows, labels and the very masks that we draw."""
    examples, arrays = data.examples, {"count": np.array(records)}
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


def _check_equal(found: dict[str, dict]) -> None:
    """Raises RuntimeError where we, in whatever passes, and the peer at true length did not compute the same."""
    for name, work, key, relative, absolute in (
        ("ELBO of the reference (nats)", "reference", "elbo", 1e-5, 0.0),
        ("reward (nats)", "train", "rewards", 1e-4, 1e-2),
        ("loss", "train", "loss", 1e-5, 0.0),
        ("gradient norm", "train", "grad_norm", 1e-3, 0.0),
    ):
        for side in ("ours", *_VARIANTS):
            ours, peer = found.get(f"{side}.{work}"), found[f"true.{work}"]
            if ours and not np.allclose(ours[key], peer[key], rtol=relative, atol=absolute):
                label = side.replace("_", " ")
                raise RuntimeError(
                    f"{name}: {label} {ours[key]} differs from the peer's {peer[key]}: they do not do the same work"
                )


def _summarise(setup: Setup, records: int, rounds: int, found: dict, memory: dict, versions: dict) -> dict:
    draws, model, examples = setup.config.estimator.draws, setup.model.config, setup.data.examples
    hidden = np.array([setup.data.masks(i).mask.sum() for i in range(records)]) / draws
    flops = draws * forward_flops(model, np.diff(examples.offsets)[:records], hidden) / records
    tokens = draws * float(np.diff(examples.offsets)[:records].mean())
    per_record = {name: [run["per_record"] for run in runs] for name, runs in found.items() if "peak" not in name}
    seconds = {name: float(np.median(values)) for name, values in per_record.items()}
    peak, *peer_peak = (
        float(np.median([run["flops"] for run in found[name]])) for name in ("peak", "peer.peak") if name in found
    )

    def figures(side: str) -> dict:
        return {
            work: {
                "seconds_per_example": seconds[f"{side}.{work}"],
                "tokens_per_second": tokens / seconds[f"{side}.{work}"],
                "flops": passes * flops / seconds[f"{side}.{work}"],
                "fraction_of_peak": passes * flops / seconds[f"{side}.{work}"] / peak,
            }
            for work, passes in (("train", 3), ("reference", 1))
            if f"{side}.{work}" in found
        }

    def ratio(ours: str, side: str, work: str) -> dict:
        """Of each round by itself, so that a machine whose speed drifts does not matter."""
        each = [b / a for a, b in zip(per_record[f"{ours}.{work}"], per_record[f"{side}.{work}"], strict=True)]
        return {"median": float(np.median(each)), "low": min(each), "high": max(each)}

    peers = [side for side in ("padded", "true") if f"{side}.train" in found]
    variants = [side for side in _VARIANTS if f"{side}.train" in found]
    ratios = {variant: {"train": ratio("ours", variant, "train")} for variant in variants}
    ratios |= {side: {work: ratio("ours", side, work) for work in ("train", "reference")} for side in peers}
    return {
        "ratio": ratios["padded"]["train"]["median"] if peers else None,
        "ours": figures("ours"),
        "variants": {
            variant: {**figures(variant), "ratios": {side: {"train": ratio(variant, side, "train")} for side in peers}}
            for variant in variants
        },
        "peer": {side: figures(side) for side in peers},
        "ratios": ratios,
        "memory": {side: {f"K={k}": size for k, size in sizes.items()} for side, sizes in memory.items() if sizes},
        "setting": {
            "model": setup.config.model.path,
            "records": records,
            "rounds": rounds,
            "draws": draws,
            "max_length": setup.config.data.max_length,
            "mean_tokens": tokens / draws,
            "microbatch_tokens": setup.config.train.microbatch_tokens,
            "one_pass_microbatches": setup.config.train.one_pass_microbatches,
            "remat": setup.config.model.remat,
            "matrix_peak_flops": peak,
            "peer_matrix_peak_flops": peer_peak[0] if peer_peak else None,
            "platform": jax.default_backend(),
            "cores": os.cpu_count(),
            **versions,
        },
    }


_WORK = {"train": "training step", "reference": "reference pass"}


def _labels(result: dict) -> dict[str, str]:
    """What the sides are called; our step as configured by its passes, where the other kind stands beside it."""
    other = {"two_passes": "one_pass", "one_pass": "two_passes"}
    ours = [_VARIANTS[other[variant]] for variant in result["variants"]] or ["ours"]
    return {"ours": ours[0], **_VARIANTS, "padded": "peer, padded", "true": "peer, true length", "peer": "peer, padded"}


def _figures(result: dict, work: str) -> dict[str, tuple[str, dict]]:
    """Side -> its label and figures, of all that did the work."""
    sides = {"ours": result["ours"], **result["variants"], **result["peer"]}
    labels = _labels(result) | ({} if work == "train" else {"ours": "ours"})
    return {side: (labels[side], found[work]) for side, found in sides.items() if work in found}


def _header(result: dict) -> tuple[str, ...]:
    faster = (f"{_VARIANTS[side]}, is faster by" for side in result["variants"])
    return "", "s/example", "real tokens/s", "useful GFLOP/s", "of matrix peak", "ours is faster by", *faster


def _rows(result: dict) -> list[tuple[str, ...]]:
    ratios = [result["ratios"], *(found["ratios"] for found in result["variants"].values())]
    return [
        (
            f"{_WORK[work]}, {label}",
            f"{found['seconds_per_example']:.3f}",
            f"{found['tokens_per_second']:,.0f}",
            f"{found['flops'] / 1e9:.0f}",
            f"{found['fraction_of_peak']:.0%}",
            *(_times(ratio.get(side, {}).get(work)) for ratio in ratios),
        )
        for work in _WORK
        for side, (label, found) in _figures(result, work).items()
    ]


def _times(ratio: dict | None) -> str:
    return "" if ratio is None else f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _memory(result: dict) -> dict[str, dict]:
    """Label -> bytes by number of draws."""
    labels = _labels(result)
    return {labels[side]: sizes for side, sizes in result["memory"].items()}


def _memory_rows(result: dict) -> list[tuple[str, ...]]:
    return [
        (f"peak memory, {label}", *(f"{size / 1e6:,.0f} MB" for size in sizes.values()))
        for label, sizes in _memory(result).items()
    ]


def as_text(result: dict) -> str:
    """The tables for a terminal."""
    lines = []
    for table in ([_header(result), *_rows(result)], [("", *result["memory"]["ours"]), *_memory_rows(result)]):
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        for row in table:
            lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        lines.append("")
    return "\n".join(lines)


def _in_one_sentence(result: dict) -> str:
    setting, seconds = result["setting"], result["ours"]["train"]["seconds_per_example"]
    what = (
        f"{setting['records']} records, K = {setting['draws']}, rows of {setting['max_length']} tokens, "
        f"{setting['cores']} cores"
    )
    if result["ratio"] is None:
        return f"A training step takes {seconds:.3f} s per example ({what})."
    times = f"{result['ratio']:.1f} times as long"
    return f"A training step takes {seconds:.3f} s per example, the padded peer {times} ({what})."


def write_report(path: Path, result: dict) -> None:
    """One self-contained page."""
    charts = []
    for work, name in _WORK.items():
        bars = [Bar(label, found["seconds_per_example"]) for label, found in _figures(result, work).values()]
        chart = bar_chart(name, bars, x_label="seconds per example")
        charts.append((name.capitalize(), chart, "Medians; shorter is better."))
    bars = [Bar(f"{label}, {k}", size / 1e6) for label, sizes in _memory(result).items() for k, size in sizes.items()]
    chart = bar_chart("Peak memory", bars, x_label="MB of the whole process")
    charts.append(("Peak memory", chart, "Of one training step."))
    note = (
        "Useful FLOPs: real tokens and hidden positions only, three forward passes' worth for a training step. "
        "In brackets: lowest and highest ratio of the rounds."
    )
    speed = page.table(_header(result), _rows(result), caption=note, numeric=True)
    memory = page.table(("", *result["memory"]["ours"]), _memory_rows(result), numeric=True)
    parts = [
        page.section("Speed and memory", page.figures(charts)),
        page.section("Figures", speed, memory),
        page.settings_table(result["setting"]),
    ]
    atomic_write(path, page.render_page(title="Benchmark", summary=_in_one_sentence(result), parts=parts))


if __name__ == "__main__":
    cli.run(main)
