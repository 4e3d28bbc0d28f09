"""python -m elbo_kto_jax.benchmark on a tiny model: the files and figures, not their size."""

import importlib.util
import io
import json
import sys

import jax
import numpy as np
import pytest

from elbo_kto_jax import benchmark as command
from elbo_kto_jax import cli
from elbo_kto_jax.benchmarking import agreement, measure, run, worker
from elbo_kto_jax.checkpoints import random_folder
from elbo_kto_jax.data import capitals
from elbo_kto_jax.planning import fit
from elbo_kto_jax.runtime.errors import UserError
from tests import runs
from tests.share import QUICK_COMPILATION, WHOLE, cases

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch is not installed (extra `bench`)"
)


@pytest.fixture(scope="module")
def feedback(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    capitals.write_data(folder, seed=0)
    return folder / "feedback.jsonl"


@pytest.fixture
def arguments(tiny_checkpoint, feedback, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", " ".join(QUICK_COMPILATION))  # of the workers, which need one device
    settings = {"model.path": tiny_checkpoint, "data.train": feedback}
    return runs.flags(
        settings, "--records=12", "--rounds=1", "--max-length=32", f"--out={tmp_path / 'out'}", "--overwrite"
    )


@pytest.mark.parametrize(
    ("flag", "variant", "labels", "with_peer"),
    cases(
        [
            ("train.residuals=device", "recompute", ["ours, one pass", "ours, two passes"], False),
            pytest.param(
                "train.residuals=recompute",
                "device",
                ["ours, two passes", "ours, one pass"],
                True,
                marks=needs_torch,
            ),
        ],
        [("train.microbatch_tokens=2048", None, ["ours"], False)],  # the batch is one micro-batch
    ),
)
def test_summary_and_files(arguments, tmp_path, capsys, monkeypatch, flag, variant, labels, with_peer):
    """As configured and, where a batch is several micro-batches, in the other number of passes."""
    draws = (4,) if variant else measure.MEMORY_DRAWS  # each takes a process of its own, which is what takes time
    monkeypatch.setattr(measure, "MEMORY_DRAWS", draws)
    summary = command.main([*arguments, f"--config.{flag}", *([] if with_peer else ["--no-peer"])])
    result = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert summary.items() >= {key: result[key] for key in ("ratio", "ours", "variants", "peer", "memory")}.items()
    assert (summary["ratio"] is not None) == with_peer
    variants = {variant} if variant else set()
    peers = {"padded", "true"} if with_peer else set()
    assert result["variants"].keys() == variants
    assert result["ratios"].keys() == variants | peers
    assert result["memory"].keys() == {"ours", *variants, *({"peer"} if with_peer else ())}
    assert all(set(sizes) == {f"K={k}" for k in draws} for sizes in result["memory"].values())
    for found in result["variants"].values():
        assert found["ratios"].keys() == peers
    for found in (*result["ours"].values(), *(found["train"] for found in result["variants"].values())):
        np.testing.assert_allclose(found["flops"] / result["setting"]["matrix_peak_flops"], found["fraction_of_peak"])
        np.testing.assert_allclose(
            found["tokens_per_second"] * found["seconds_per_example"],
            result["setting"]["mean_tokens"] * result["setting"]["draws"],
        )
    text, page = capsys.readouterr().out, (tmp_path / "out" / "report.html").read_text()
    steps = [line for line in text.splitlines() if line.startswith("training step, ours")]
    for label, step in zip(labels, steps, strict=True):
        assert step.startswith(f"training step, {label}  ")
        assert f"peak memory, {label}  " in text
        assert f"{label}, K=4" in page
    assert "reference pass, ours  " in text


@pytest.mark.parametrize("configured", ["recompute", "host"])
def test_the_worker_keeps_residuals_where_it_is_asked_to(tiny_checkpoint, tmp_path, monkeypatch, capsys, configured):
    """As configured, and as each request says; what does not fit is told."""
    settings = {
        "model.path": tiny_checkpoint,
        "data.train": runs.write_jsonl(tmp_path / "data.jsonl", runs.records(20)),
        "train.global_batch_size": 20,
        "train.residuals": configured,
    }
    flags = cli.Flags("test", "")
    flags.add_config()
    _, config = flags.parse(runs.flags(settings))
    ways = []

    def train_step(programs, state, batch, reference):
        assert len(batch.micro_batches) > 1
        ways.append(programs.scorer.residuals)
        if len(ways) == 3:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return state, {"reward": np.zeros(20)}

    train = {"do": "train", "elbo_ref": [0.0] * 20}
    requests = [
        {"config": config.to_dict(), "records": 20},
        train,
        {**train, "residuals": "device"},
        {**train, "residuals": "recompute"},
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(json.dumps(request) + "\n" for request in requests)))
    monkeypatch.setattr(worker, "train_step", train_step)
    worker.main()
    assert ways == [configured, "device", "recompute"]
    *_, fits, too_large = map(json.loads, capsys.readouterr().out.splitlines())
    assert "seconds" in fits
    assert too_large == {"too_large": "RESOURCE_EXHAUSTED: Out of memory"}


@pytest.mark.parametrize(
    ("flag", "named"),
    [("--records=0", "--records"), ("--records=99999", "--records"), ("--rounds=0", "--rounds")],
)
def test_flags(arguments, flag, named):
    with pytest.raises(UserError, match=named):
        command.main([*arguments, flag, "--no-peer"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounding_agrees_and_other_work_does_not(dtype):
    """4,096 tokens: sums of 8,000 nats in float32, whose rounding alone changes the seventh digit of the loss."""
    hidden, beta = np.array([2000.0, 300.0]), 0.1
    peer = {"elbo": [-8000.0, -2400.0], "rewards": [1.0, -2.0], "loss": 0.4999993, "grad_norm": 20.0}
    nats = agreement.allowed_nats(peer["elbo"], hidden, dtype)
    rounded = {
        "elbo": (np.array(peer["elbo"]) + 0.9 * nats).tolist(),
        "rewards": (np.array(peer["rewards"]) - 0.9 * nats).tolist(),
        "loss": 0.5000074,
        "grad_norm": peer["grad_norm"] * (1 + 1e-4),
    }
    found = agreement.compare("ours", rounded, peer, hidden, beta=beta, dtype=dtype)
    assert [difference.agrees for difference in found] == [True] * 4
    assert {(difference.ours, difference.peer) for difference in found} >= {(0.5000074, 0.4999993)}
    for key, wrong in {"elbo": -8800.0, "rewards": 900.0, "loss": 3.0, "grad_norm": 22.5}.items():
        for value in (wrong, float("nan")):
            answer = rounded | {key: [value, rounded[key][1]] if key in ("elbo", "rewards") else value}
            found = agreement.compare("ours", answer, peer, hidden, beta=beta, dtype=dtype)
            assert sum(not difference.agrees for difference in found) == 1


def test_a_disagreement_is_marked_and_no_traceback(arguments, tmp_path, capsys, monkeypatch):
    """The times are printed; the summary and the page say that they are of different work."""
    same = {"elbo": [1.0] * 12, "rewards": [1.0] * 12, "loss": 0.5, "grad_norm": 1.0, "peak_bytes": 1, "flops": 1.0}

    class Worker(measure.Worker):
        def __init__(self, *command, setting):
            self.ready = {"jax": "0"}
            self.wrong = 0.1 if command[-1] == str(measure.PEER) else 0.0

        def ask(self, **request):
            return {**same, "loss": 0.5 + self.wrong, "seconds": 1.0}

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(measure, "Worker", Worker)
    monkeypatch.setattr(run, "_check_peer", lambda config: None)
    assert command.main(arguments)["agrees"] is False
    printed = capsys.readouterr().out
    assert "training step, peer, padded (NOT THE SAME WORK)" in printed
    assert "DIFFERS" in printed
    assert "did not compute the same" in (tmp_path / "out" / "report.html").read_text()


def test_a_worker_that_stops_is_one_line(tmp_path):
    """And where only its memory was to be measured, the table says that it does not fit."""
    script = tmp_path / "worker.py"
    script.write_text("print('{}', flush=True)\ninput()\nraise MemoryError('no room')\n")
    worker = measure.Worker(str(script), setting={})
    with worker, pytest.raises(UserError, match=r"worker.py stopped: MemoryError: no room"):
        worker.ask(do="peak")


@pytest.mark.parametrize(("memory", "layers"), [(80e9, 7), (150e9, 22), (1e9, 1), (1e15, 32)])
def test_layers_that_fit(monkeypatch, memory, layers):
    device = type("Device", (), {"memory_stats": lambda _: {"bytes_limit": memory}})()
    monkeypatch.setattr(fit.jax, "local_devices", lambda: [device])
    assert fit.layers_that_fit(random_folder.dimensions("8b"), 4096, "bfloat16", "bfloat16") == layers


@pytest.mark.skipif(not WHOLE, reason="takes a minute: ROBUSTNESS=whole runs it")
def test_random_weights_of_a_size(arguments, tmp_path, monkeypatch):
    """--size: the tokenizer of the model that the config names, and as many layers as asked for."""
    monkeypatch.setattr(measure, "MEMORY_DRAWS", (1,))
    command.main([*arguments, "--no-peer", "--size=23m", "--layers=1"])
    setting = json.loads((tmp_path / "out" / "benchmark.json").read_text())["setting"]
    assert (setting["layers"], setting["width"], setting["head_size"]) == (1, 512, 128)
