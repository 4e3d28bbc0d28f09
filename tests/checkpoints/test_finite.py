"""NaN and infinite weights: refused by name wherever a model is loaded to compute with, whatever form it is in."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from elbo_kto_jax import from_hf, generate, precompute, score, to_hf, train, verify
from elbo_kto_jax.checkpoints import conversion, names
from elbo_kto_jax.checkpoints.adapters import load_base
from elbo_kto_jax.checkpoints.digest import params_digest
from elbo_kto_jax.checkpoints.load import load_config, load_model
from elbo_kto_jax.checkpoints.manifest import Adaptation
from elbo_kto_jax.checkpoints.model import Source
from elbo_kto_jax.checkpoints.save import save_model
from elbo_kto_jax.checkpoints.training_state import TrainingCheckpoints, TrainingState
from elbo_kto_jax.models import lora, registry
from elbo_kto_jax.runtime.errors import UserError
from tests import runs
from tests.published import DTYPES, read_published, same_bits, write_published

TENSORS = [
    "model.transformer.wte.weight",
    "model.transformer.blocks.0.attn_norm.weight",
    "model.transformer.blocks.1.q_proj.weight",
    "model.transformer.ln_f.weight",
    "model.transformer.ff_out.weight",
]
VALUES = [np.nan, np.inf, -np.inf]


def write_spoilt(folder, tensor: str, value: float, **options) -> None:
    """A published checkpoint with one bad value, the last of the tensor: of the embedding, in a row no token has."""

    def edit(tensors):
        tensors[tensor].flat[-1] = value

    write_published(folder, edit=edit, **options)


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as refused:
        call(*args, **kwargs)
    message = str(refused.value)
    assert "\n" not in message
    assert "NaN or infinite" in message
    return message


@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize(("dtype", "value"), list(zip(DTYPES, VALUES, strict=True)))
def test_the_tensor_is_named_in_the_published_and_in_our_form(tmp_path, tensor, dtype, value):
    write_spoilt(tmp_path / "published", tensor, value, dtype=dtype)
    message = refusal(load_model, tmp_path / "published")
    assert f".safetensors: tensor {tensor}: " in message
    from_hf.main([f"--source={tmp_path / 'published'}", f"--out={tmp_path / 'ours'}"])
    for param_dtype in (None, "bfloat16"):
        message = refusal(load_model, tmp_path / "ours", param_dtype=param_dtype)
        assert f"{tmp_path / 'ours'}: tensor {tensor}: " in message


def test_wherever_the_weights_lie(tmp_path, cpu_devices):
    write_spoilt(tmp_path, TENSORS[2], np.nan)
    mesh = jax.make_mesh((8,), ("fsdp",), devices=cpu_devices)
    model = load_config(tmp_path)[0]
    shardings = names.unflatten(
        {
            path: NamedSharding(mesh, PartitionSpec(*[None] * (len(leaf.shape) - 1), "fsdp"))
            for path, leaf in registry.parameters(model).items()
        }
    )
    assert TENSORS[2] in refusal(load_model, tmp_path, shardings=shardings)


def test_conversions_keep_every_bit(tmp_path):
    write_spoilt(tmp_path / "published", TENSORS[0], np.nan)
    from_hf.main([f"--source={tmp_path / 'published'}", f"--out={tmp_path / 'ours'}"])
    to_hf.main([f"--source={tmp_path / 'ours'}", f"--out={tmp_path / 'theirs'}"])
    assert verify.main([f"--source={tmp_path / 'theirs'}", f"--checkpoint={tmp_path / 'ours'}"])["equal"]
    found, expected = (read_published(tmp_path / name) for name in ("theirs", "published"))
    assert all(same_bits(found[name], expected[name]) for name in expected)


def test_a_value_that_is_infinite_in_the_dtype_of_the_computation(tmp_path):
    write_spoilt(tmp_path / "published", TENSORS[2], 1e6)
    model = load_model(tmp_path / "published")
    save_model(tmp_path / "ours", model)
    assert "in float16" in refusal(load_model, tmp_path / "ours", param_dtype="float16")
    abstract = lora.abstract_base(model.params, jnp.float16, quantized=False)
    here = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), abstract)
    assert TENSORS[2] in refusal(load_base, tmp_path / "ours", abstract, here)


@pytest.mark.parametrize("quantized", [False, True])
def test_the_base_of_adapters(tmp_path, quantized):
    write_published(tmp_path / "whole")
    params = load_model(tmp_path / "whole").params
    abstract = lora.abstract_base(params, jnp.float32, quantized)
    here = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), abstract)
    write_spoilt(tmp_path / "spoilt", TENSORS[2], np.inf)
    assert TENSORS[2] in refusal(load_base, tmp_path / "spoilt", abstract, here)


def test_a_step_of_training_and_adapters(tmp_path):
    write_published(tmp_path / "base")
    model = load_model(tmp_path / "base")
    base = Adaptation(2, 4.0, str(tmp_path / "base"), params_digest(model.params))
    adapters = jax.tree.map(
        lambda shape: jnp.zeros(shape.shape).at[0, 0, 0].set(jnp.nan),
        lora.abstract_adapters(model.params, 2, np.float32),
    )
    spoilt = {**model.params, "ln_f": {"scale": model.params["ln_f"]["scale"].at[0].set(jnp.inf)}}
    for name, params, adaptation in (("full", spoilt, None), ("adapters", adapters, base)):
        state = TrainingState(params, optax.sgd(1.0).init(params), {"step": 1})
        checkpoints = TrainingCheckpoints(tmp_path / name / "checkpoints", adaptation=adaptation)
        checkpoints.save(1, state, model.assets)
        checkpoints.wait()
        assert str(tmp_path / name) in refusal(load_model, tmp_path / name)
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        as_struct = lambda x, s=here: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
        abstract = TrainingState(*(jax.tree.map(as_struct, tree) for tree in state[:2]), {})
        assert str(tmp_path / name) in refusal(checkpoints.restore, 1, abstract)
        checkpoints.close()


@pytest.fixture(scope="module")
def spoilt(tiny_checkpoint, tmp_path_factory):
    """The tiny model with a NaN, and with a weight that no float can be multiplied with; and records."""
    folder = tmp_path_factory.mktemp("spoilt")
    model = load_model(tiny_checkpoint)
    for name, value in (("nan", jnp.nan), ("large", 1e38)):
        scale, kernel = jnp.full_like(model.params["ln_f"]["scale"], value), model.params["head"]["kernel"]
        params = {**model.params, "ln_f": {"scale": scale}, "head": {"kernel": 1e20 * kernel}}
        conversion.write_published(folder / name, Source.of(dataclasses.replace(model, params=params)), 10**9)
    runs.write_jsonl(folder / "records.jsonl", runs.records(4))
    return folder


@pytest.mark.parametrize("command", ["train", "train lora", "train reference", "precompute", "score", "generate"])
def test_commands(spoilt, tiny_checkpoint, tmp_path, command):
    model, data, out = spoilt / "nan", spoilt / "records.jsonl", tmp_path / "out"
    settings = {"model.path": model, "data.train": data}
    if command == "train lora":
        settings["lora.rank"] = 2
    if command == "train reference":
        settings |= {"model.path": tiny_checkpoint, "reference.path": model}
    if command in ("score", "generate"):
        records = "--data" if command == "score" else "--prompts"
        main = score.main if command == "score" else generate.main
        argv = runs.flags({}, f"--checkpoint={model}", f"{records}={data}", f"--out={out}")
    else:
        main = precompute.main if command == "precompute" else train.main
        argv = runs.flags(settings, f"--workdir={out}")
    assert "model.transformer.ln_f.weight" in refusal(main, argv)
    assert not out.is_file()


@pytest.mark.parametrize("exact", [False, True])
def test_an_elbo_that_is_no_number_is_refused_with_its_record(spoilt, tmp_path, exact):
    out = tmp_path / "out"
    argv = runs.flags({}, f"--checkpoint={spoilt / 'large'}", f"--data={spoilt / 'records.jsonl'}", f"--out={out}")
    with pytest.raises(UserError, match=r"large: the ELBO of record 'record .' is NaN or infinite"):
        score.main([*argv, *["--exact"][: int(exact)]])
    assert not out.exists()


def test_an_answer_whose_probability_is_no_number_is_refused_with_its_record(spoilt, tmp_path):
    out = tmp_path / "out"
    argv = runs.flags({}, f"--checkpoint={spoilt / 'large'}", f"--prompts={spoilt / 'records.jsonl'}", f"--out={out}")
    with pytest.raises(UserError, match=r"--checkpoint=.*large: the answer to record 'record .' has a probability"):
        generate.main(argv)
    assert not out.exists()
