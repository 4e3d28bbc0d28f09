"""python -m launch.plan: what it refuses, and one small model compiled for a TPU slice where libtpu is installed."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

from elbo_kto_jax import cli, plan
from elbo_kto_jax.models import registry
from elbo_kto_jax.planning import programs, request
from elbo_kto_jax.planning.programs import DoesNotFit
from elbo_kto_jax.runtime.errors import UserError
from tests import runs
from tests.conftest import PROJECT_ROOT
from tests.published import CONFIG

KTO_MIX = runs.CONFIG.with_name("kto_mix.py")


def _parsed(*words):
    flags = cli.Flags("launch.plan", "")
    flags.add_config()
    return flags.parse([f"--config={KTO_MIX}", *words])


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--topology=v5e-16"], "did you mean v5e:4x4"),
        (["--topology=v5e:2x2", "--tokens=0"], "--tokens: expected at least 1"),
        (["--topology=v5e:2x2", "--candidates=0"], "--candidates: expected at least 1"),
        ([], "--topology"),
    ],
)
def test_flags(flags, named):
    with pytest.raises(UserError, match=named):
        plan.main([f"--config={KTO_MIX}", *flags])


def test_an_existing_plan_is_kept(tmp_path):
    (tmp_path / "plan.json").write_text("precious")
    with pytest.raises(UserError, match="--overwrite"):
        plan.main([f"--config={KTO_MIX}", "--topology=v5e:2x2", f"--out={tmp_path}"])


def test_without_libtpu_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"elbo_kto_jax\[tpu\]"):
        plan.main([f"--config={KTO_MIX}", "--topology=v5e:2x2", f"--out={tmp_path / 'out'}"])


def test_what_does_not_fit_is_said_with_what_would(monkeypatch, tmp_path):
    def refuse(*_):
        raise DoesNotFit("grad: needs 20.90G of 15.75G HBM")

    monkeypatch.setattr(plan, "_use_libtpu", lambda: None)
    monkeypatch.setattr(request.planning, "plan", refuse)
    arguments = [f"--config={KTO_MIX}", f"--config.model.path={tmp_path / 'none'}", f"--out={tmp_path / 'out'}"]
    with pytest.raises(UserError) as refused:
        plan.main([*arguments, "--topology=v5e:2x2"])
    message = str(refused.value)
    assert re.match(r"v5e:2x2: does not fit, says libtpu [\w. ]+: grad: needs 20\.90G", message)
    assert "--topology=v5e:4x4" in message
    assert not (tmp_path / "out").exists()


def test_data_on_disk_is_counted(tiny_checkpoint, tmp_path):
    data = runs.write_jsonl(tmp_path / "data.jsonl", runs.records(6))
    _, config = _parsed(f"--config.model.path={tiny_checkpoint}", f"--config.data.train={data}")
    model, tokenizer = request._model(config)
    assert model.n_layers == json.loads((tiny_checkpoint / "config.json").read_text())["n_layers"]
    examples, tokens = request._data(config, tokenizer, None, None)
    assert examples == 6
    assert 5 < tokens < 60
    assert request._data(config, tokenizer, 10, None) == (10, tokens)


def test_without_model_and_data_it_plans_for_the_published_ones(tmp_path):
    _, config = _parsed(f"--config.model.path={tmp_path / 'none'}")
    assert request._model(config) == (registry.architectures()["llada"].sizes["8b"], None)
    assert request._data(config, None, None, 300.0) == (request.EXAMPLES, 300.0)


@pytest.mark.parametrize(
    ("path", "architecture"),
    [
        ("GSAI-ML/LLaDA-1.5", "llada"),
        ("GSAI-ML/iLLaDA-8B-Instruct", "illada"),
        ("Dream-org/Dream-Coder-v0-Instruct-7B", "dream"),
        ("apple/DiffuCoder-7B-Instruct", "dream"),
        ("someone/Qwen3-0.6B-diffusion", "a2d_qwen3"),
        ("someone/else", "llada"),
    ],
)
def test_a_hub_id_says_which_published_model_is_meant(path, architecture):
    assert request._published(path).architecture == architecture


def compiled(tmp_path, topology: str = "v5e:2x2", **more) -> tuple[dict, dict]:
    """The summary and plan.json of a small model, from a process of its own, since libtpu stays in the one it is in."""
    small = {"d_model": 256, "n_heads": 2, "n_kv_heads": 2, "mlp_hidden_size": 512, "embedding_size": 1024}
    (tmp_path / "model").mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text(json.dumps({**CONFIG, **small}))
    flags = {
        "model.path": tmp_path / "model",
        "data.max_length": 256,
        "train.global_batch_size": 4,
        "train.microbatch_tokens": 256,
        "sampler.gen_length": 16,
        "sampler.steps": 16,
        **more,
    }
    command = [sys.executable, "-m", "launch.plan", f"--config={KTO_MIX}", f"--topology={topology}"]
    command += ["--tokens=100", "--price=2", f"--out={tmp_path / 'out'}"]
    command += [f"--config.{key}={value}" for key, value in flags.items()]
    done = subprocess.run(
        command, cwd=PROJECT_ROOT, env={**os.environ, "XLA_FLAGS": ""}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]), json.loads((tmp_path / "out" / "plan.json").read_text())


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra `tpu`)"
)


LONG_ROWS = {"data.max_length": 4096, "train.microbatch_tokens": 4096, "train.global_batch_size": 160}


@pytest.fixture(scope="module")
def two_passes(tmp_path_factory):
    """Where it is written, summary and plan of two passes on a slice whose chips form a square."""
    folder = tmp_path_factory.mktemp("two_passes")
    return folder, *compiled(folder, "v5e:4x4", **{"train.residuals": "recompute", **LONG_ROWS})


@needs_libtpu
def test_a_small_model(two_passes):
    folder, summary, found = two_passes
    assert summary["fits"] is True
    assert summary["mesh"] == {"data": 1, "fsdp": 16, "tensor": 1}
    assert 0 < summary["bytes_per_chip"] < summary["usable_bytes_per_chip"] == int(15.75 * 2**30)
    assert 0 < summary["text_mfu_bound"] < summary["mfu_bound"] < 1
    assert summary["cost_bound"] == 2 * summary["chip_hours_bound"] > 0
    assert summary["versions"] == found["versions"] == programs.versions()
    assert found["versions"]["libtpu"][0].isdigit()
    assert set(found["programs"]) == {"score", "grad", "update", "sampler"}
    assert found["programs"]["grad"]["flops"] > 3 * found["programs"]["score"]["flops"]
    assert "bound, not measured" in (folder / "out" / "report.html").read_text()


@needs_libtpu
def test_gradients_are_summed_beside_products(two_passes):
    """In single sends, since this libtpu runs no reduce-scatter of a v5e in the background: half of the bytes are
    hidden; a tenth, where all of a layer's products come before the first send (sharding/gather.py)."""
    collectives = two_passes[2]["programs"]["grad"]["collectives"]
    sends = collectives["collective-permute"]
    assert sends["overlapped_bytes"] > sends["exposed_bytes"]
    sums = sum(collectives.get(kind, {}).get("exposed_bytes", 0) for kind in ("reduce-scatter", "all-reduce"))
    assert sums < sends["overlapped_bytes"] / 10


@needs_libtpu
def test_one_pass_of_a_small_model(tmp_path):
    """Beside a micro-batch lies what others hand out: three, and all four while the online reference is scored."""
    _, found = compiled(tmp_path, **{"reference.mode": "online"})  # "auto" takes the device's memory, where they fit
    assert found["settings"]["residuals"] == "device"
    assert found["step"]["micro_batches"] == 4
    forward, backward, update = (found["programs"][name] for name in ("forward", "backward", "update"))
    handed_out = forward["outputs"] - forward["aliased"]
    assert handed_out > 256 * 256 * 2 * 2  # at least the inputs of two layers, bfloat16
    always = forward["resident"] - 4 * handed_out
    assert always == backward["resident"] - 3 * handed_out
    assert always == pytest.approx(3 * update["resident"], rel=1e-3)  # Adam's moments, and the reference
    assert backward["aliased"] == pytest.approx(update["resident"], rel=0.1)  # the gradient is added up in place


@needs_libtpu
def test_residuals_on_the_host_take_no_memory_of_the_device(two_passes, tmp_path):
    """One pass in the memory of two, with four fifths of their work."""
    flags = {"train.residuals": "host", **LONG_ROWS}
    kept, again = compiled(tmp_path, "v5e:4x4", **flags)[1]["programs"], two_passes[2]["programs"]
    inputs = 2 * 4096 * 256 * 2  # of two layers: a row of 4,096 tokens, in bfloat16
    assert kept["forward"]["transferred"] == kept["backward"]["transferred"] > inputs
    assert kept["forward"]["outputs"] - kept["forward"]["aliased"] < inputs / 8
    assert kept["forward"]["host"] > kept["forward"]["transferred"]  # of several micro-batches
    assert kept["backward"]["bytes_per_chip"] <= 1.05 * again["grad"]["bytes_per_chip"]
    work = {name: found["flops"] for name, found in {**again, **kept}.items()}
    assert work["forward"] + work["backward"] == pytest.approx(0.8 * (work["score"] + work["grad"]), rel=0.05)


@needs_libtpu
def test_adapters_of_a_small_model(tmp_path):
    """On one chip: of the base only the forward pass and the gradient of the activations, none of its own size."""
    flags = {"lora.rank": 8, "lora.alpha": 8.0, "lora.base_quantization": "int8", "train.residuals": "recompute"}
    summary, found = compiled(tmp_path, "v5e:1x1", **flags)
    score, grad = found["programs"]["score"], found["programs"]["grad"]
    assert summary["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1}
    assert 2 < grad["flops"] / score["flops"] < 3.2  # 2 passes, the layers' recomputation, the adapters
    assert grad["outputs"] < score["arguments"] / 2  # float32 gradients of the int8 base would be larger than all of it
