"""Training adapters: the step against plain autodiff, and whole runs of the commands."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from elbo_kto_jax import generate, objectives, precompute, score, to_hf, train
from elbo_kto_jax.checkpoints import conversion, names
from elbo_kto_jax.checkpoints.load import load_model
from elbo_kto_jax.checkpoints.model import Model, Source
from elbo_kto_jax.models import axes, lora
from elbo_kto_jax.models.network import MaskPredictor, abstract_params
from elbo_kto_jax.runtime import config
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.scoring.scorer import Scorer
from elbo_kto_jax.sharding import rules
from elbo_kto_jax.training import state as train_state
from elbo_kto_jax.training import step
from elbo_kto_jax.training.data import TrainingData
from tests import runs, tiny
from tests.models.test_lora import adapters, merged, quantized
from tests.share import cases
from tests.training.steps import KEEP_GRADIENT, ONE_DEVICE, assert_same_gradient, plain_kto_loss, relative_distance

pytestmark = pytest.mark.usefixtures("shared_programs")

SCALE, NUM = 0.7, 6
ESTIMATOR = config.Estimator(2, "uniform")


def setup(
    tx,
    *,
    dtype: str = "float32",
    quantize: bool = False,
    sizes: config.Mesh = ONE_DEVICE,
    random_b: bool = False,
    residuals: str = "recompute",
):
    """Programs, the state before the first step and the base, over as many devices as the mesh has."""
    model, mesh = tiny.model(dtype), rules.make_mesh(sizes, jax.devices()[: sizes.data * sizes.fsdp * sizes.tensor])
    params = jax.tree.map(lambda x: x.astype(dtype), tiny.params(0))
    params = quantized(params) if quantize else params
    tree = adapters(1, random_b=random_b)
    shardings = train_state.state_shardings(tx, tree, mesh, tiny.MODEL)
    scorer = Scorer(model, mesh, size=NUM * 2, residuals=residuals)
    programs = step.build_programs(scorer, objectives.build(tiny.KTO), draws=2, tx=tx, shardings=shardings)
    base = lora.Base(jax.device_put(params, axes.param_shardings(params, mesh, tiny.MODEL)), SCALE)
    state = train_state.init_state(tx, jax.tree.map(jnp.array, jax.device_put(tree, shardings.params)), shardings)
    return programs, state, base


def batch_of(rows: int):
    layout = tiny.layout(rows, False)
    return TrainingData(tiny.examples(NUM), layout, estimator=ESTIMATOR, batch_size=NUM, seed=0).batch(0)


def scored(programs, weights, batch) -> np.ndarray:
    return np.asarray(programs.scorer(weights, batch.micro_batches))


@pytest.mark.parametrize(
    ("dtype", "quantize", "rows", "residuals"),  # 3 micro-batches, and one
    cases(
        [
            ("float32", False, 4, "recompute"),
            ("bfloat16", True, 4, "recompute"),
            ("float32", True, 4, "device"),
            ("bfloat16", False, 4, "device"),
            ("bfloat16", True, 12, "recompute"),
        ],
        [
            ("float32", True, 4, "recompute"),
            ("bfloat16", False, 4, "recompute"),
            ("float32", False, 4, "device"),
            ("bfloat16", True, 4, "device"),
            ("float32", False, 12, "recompute"),
            ("float32", True, 12, "recompute"),
            ("bfloat16", False, 12, "recompute"),
        ],
    ),
)
def test_rewards_are_exactly_zero_at_the_start(dtype, quantize, rows, residuals):
    """Online, and precomputed with other adapters."""
    programs, state, base = setup(KEEP_GRADIENT, dtype=dtype, quantize=quantize, residuals=residuals)
    batch = batch_of(rows)
    precomputed = scored(programs, base.reference(adapters(3, random_b=True)), batch)
    for reference in (base, precomputed):
        _, metrics = step.train_step(programs, jax.tree.map(jnp.copy, state), batch, reference, base)
        np.testing.assert_array_equal(metrics["reward"], np.zeros(NUM))
        assert metrics["grad_norm"] > 0
    assert np.abs(scored(programs, base.policy(adapters(3, random_b=True)), batch) - precomputed).max() > 0.1


@pytest.mark.parametrize(
    ("quantize", "rows", "residuals"),  # 3 micro-batches, and one
    cases(
        [(False, 2, "recompute"), (True, 2, "host"), (True, 12, "recompute")],
        [(True, 2, "recompute"), (False, 2, "host"), (False, 12, "recompute")],
    ),
)
def test_the_gradient_is_autodiff_of_the_merged_model(quantize, rows, residuals):
    programs, state, base = setup(KEEP_GRADIENT, quantize=quantize, random_b=True, residuals=residuals)
    tree, examples = jax.device_get(state.params), tiny.examples(NUM)
    data = TrainingData(examples, tiny.layout(rows), estimator=ESTIMATOR, batch_size=NUM, seed=0)

    @jax.jit
    @jax.value_and_grad
    def plain(tree):
        estimates, reference = (
            tiny.plain_estimates(merged(base.params, tree, scale), examples, data.indices(0), ESTIMATOR, seed=0)
            for scale in (SCALE, 0.0)
        )
        return plain_kto_loss(estimates, reference, examples.is_desirable[data.indices(0)], tiny.KTO)

    loss, expected = plain(tree)
    state, metrics = step.train_step(programs, state, data.batch(0), base, base)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert np.abs(metrics["reward"]).max() > 0.1
    assert_same_gradient(state.opt_state, expected)


def trajectory(sizes: config.Mesh):
    tx = train_state.optimizer(config.Optimizer(1e-2, "cosine", 0.0, 0.9, 0.95, 0.01, 1.0, "float32"), 100)
    programs, state, base = setup(tx, quantize=True, sizes=sizes)
    start, found = jax.device_get(state.params), []
    for _ in range(3):
        state, metrics = step.train_step(programs, state, batch_of(8), base, base)
        found.append([float(metrics[name]) for name in ("loss", "grad_norm", "reward_margin", "reference_point")])
    return np.array(found), jax.tree.map(lambda x, y: x - y, jax.device_get(state.params), start), state, base


def test_on_eight_devices_as_on_one_and_nothing_but_adapters_is_kept_or_lost(cpu_devices):
    metrics, update, state, base = trajectory(ONE_DEVICE)
    spread, spread_update, *_ = trajectory(config.Mesh(2, 2, 2))
    np.testing.assert_allclose(spread, metrics, rtol=1e-5, atol=2e-4)  # nats, of estimates of about 50
    assert relative_distance(spread_update, update) <= 1e-3
    # The optimizer's moments have the adapters' shapes, and the base is still there after three donated states.
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree) if x.ndim)  # noqa: E731
    assert count(state.opt_state) == 2 * count(state.params)
    assert count(state.params) < 0.5 * count(base.params)
    assert not any(x.is_deleted() for x in jax.tree.leaves(base.params))


def test_no_gradient_of_the_base_is_computed():
    """BACKWARD could give one, and the compiler leaves it out: no product has the shape of a matrix of the base."""
    programs, state, base = setup(KEEP_GRADIENT, residuals="device")
    scorer, policy = programs.scorer, base.policy(state.params)
    (rows,) = scorer.place(batch_of(12).micro_batches)
    cotangent = scorer.place_everywhere(np.ones(NUM, np.float32))

    def products(weights) -> set[str]:
        _, residuals = scorer.forward(weights, scorer.no_estimates(), rows)
        text = backward.lower(residuals, weights, None, rows, cotangent).compile().as_text()
        return set(re.findall(r"= f32\[([\d,]+)\]\S* dot\(", text))

    backward = jax.jit(step.gradient_programs(scorer, draws=2)[1])
    matrices = {",".join(map(str, leaf.shape[1:])) for leaf in jax.tree.leaves(base.params["blocks"]) if leaf.ndim > 2}
    assert products(base.params) & matrices
    assert not products(policy) & matrices


# ---- whole runs ----

LORA = {
    "lora.rank": 4,
    "lora.alpha": 8.0,
    "optimizer.learning_rate": 1e-2,
    "train.steps": 6,
    "train.checkpoint_every": 3,
}
INT8 = {"lora.base_quantization": "int8", "lora.targets": ["q_proj", "ff_out"], "model.dtype": "bfloat16"}


@pytest.fixture(scope="module")
def settings(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {
        "model.path": tiny_checkpoint,
        "data.train": runs.write_jsonl(folder / "train.jsonl", runs.records(4)),
        **LORA,
    }


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "whole"
    return workdir, train.main(runs.flags({**settings, "train.samples": 1}, f"--workdir={workdir}"))


def refusal(main, argv) -> str:
    with pytest.raises(UserError) as refused:
        main(argv)
    return str(refused.value)


def metrics_of(workdir) -> list[dict]:
    return [
        {key: value for key, value in row.items() if key != "seconds"}
        for row in runs.read_jsonl(workdir / "metrics.jsonl")
    ]


def test_a_run_learns_from_its_base_on(whole):
    workdir, summary = whole
    first, second, *_, last = metrics_of(workdir)
    assert first["reward_margin"] == second["reward_margin"] == 0  # the first step has rate 0
    assert first["loss"] == 0.5
    assert last["loss"] < 0.499
    assert last["reward_margin"] > 0
    assert summary["steps"] == 6
    (sample,) = json.loads((workdir / "samples.json").read_text())
    assert sample.keys() == {"prompt", "before", "after"}


def test_a_checkpoint_holds_adapters_alone_and_names_their_base(whole, settings):
    folder = whole[0] / "checkpoints" / "6"
    manifest = json.loads((folder / "assets" / "manifest.json").read_text())
    for tree, leaves in (("params", 14), ("opt_state", 28)):
        arrays = [path for path, (shape, _) in manifest["trees"][tree]["arrays"].items() if shape]
        assert len(arrays) == leaves
        assert all("lora_" in path for path in arrays)
    assert manifest["lora"]["base_path"] == str(settings["model.path"])
    assert (manifest["lora"]["rank"], manifest["lora"]["alpha"]) == (4, 8.0)


def trained_of(folder) -> dict:
    """The adapters in a checkpoint, as Orbax reads them."""
    arrays = json.loads((folder / "assets" / "manifest.json").read_text())["trees"]["params"]["arrays"]
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {
        tuple(path.split("/")): jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=here)
        for path, (shape, dtype) in arrays.items()
    }
    return ocp.StandardCheckpointHandler().restore(
        epath.Path(folder / "params"), args=ocp.args.StandardRestore(names.unflatten(abstract))
    )


def test_the_export_is_the_adapted_model_in_the_dtype_of_the_base(whole, settings, tmp_path):
    trained = trained_of(whole[0] / "checkpoints" / "6")
    base = load_model(settings["model.path"])

    summary = to_hf.main([f"--source={whole[0]}", f"--out={tmp_path / 'hf'}"])
    exported = load_model(tmp_path / "hf")
    assert summary["tensors"] == len(names.published_tensors(base.config))
    expected = merged(base.params, trained, 2.0)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), exported.params, expected)
    same = jax.tree.map(lambda x, y: np.array_equal(x, y), exported.params, base.params)
    for path, unchanged in names_and_leaves(same):
        assert unchanged == (not lora.is_matrix(path)), path

    # The same in another dtype, over devices.
    spread = axes.param_shardings(
        abstract_params(MaskPredictor(base.config)), rules.make_mesh(config.Mesh(2, 2, 2)), base.config
    )
    again = load_model(whole[0], param_dtype=jnp.bfloat16, shardings=spread).params
    close = lambda x, y: np.testing.assert_allclose(np.float32(x), y, rtol=2**-8, atol=1e-6)  # noqa: E731
    jax.tree.map(close, again, exported.params)


def names_and_leaves(tree) -> list:
    return [(tuple(key.key for key in path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def test_commands_take_adapters_as_they_take_a_model(whole, settings, tmp_path):
    data, out = settings["data.train"], [tmp_path / f"{i}.jsonl" for i in range(3)]
    for checkpoint, file in ((whole[0], out[0]), (settings["model.path"], out[1])):
        score.main(runs.flags({}, f"--checkpoint={checkpoint}", f"--data={data}", f"--out={file}"))
    adapted, base = (np.array([row["elbo"] for row in runs.read_jsonl(file)]) for file in out[:2])
    assert np.abs(adapted - base).max() > 1e-3
    summary = generate.main(runs.flags({}, f"--checkpoint={whole[0]}", f"--prompts={data}", f"--out={out[2]}"))
    assert summary["prompts"] == 4


def test_a_run_goes_on_bit_by_bit(whole, settings, tmp_path):
    workdir = tmp_path / "again"
    shutil.copytree(whole[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "6")
    train.main(runs.flags({**settings, "train.samples": 1}, f"--workdir={workdir}"))
    assert metrics_of(workdir) == metrics_of(whole[0])
    digests = [
        json.loads((folder / "checkpoints" / "6" / "assets" / "manifest.json").read_text())["trees"]
        for folder in (workdir, whole[0])
    ]
    assert digests[0] == digests[1]


def params_digest_of(step) -> str:
    return json.loads((step / "assets" / "manifest.json").read_text())["trees"]["params"]["digest"]


def test_a_run_starts_from_adapters_of_peft_s(whole, settings, tmp_path):
    """The first step has rate 0, so that its checkpoint holds what the run began with; the reference is the base."""
    peft, workdir = tmp_path / "peft", tmp_path / "run"
    to_hf.main([f"--source={whole[0]}", f"--out={peft}", "--adapter"])
    values = {**settings, "lora.path": peft, "train.steps": 1, "train.checkpoint_every": 1}
    train.main(runs.flags(values, f"--workdir={workdir}"))
    assert params_digest_of(workdir / "checkpoints" / "1") == params_digest_of(whole[0] / "checkpoints" / "6")
    assert metrics_of(workdir)[0]["reward_margin"] > metrics_of(whole[0])[-1]["reward_margin"] / 2
    record = json.loads((workdir / "config.json").read_text())
    assert record["inputs"]["config.lora.path"]["weights"]
    assert str(peft / "adapter_model.safetensors") in record["files"]


def test_adapters_to_start_from_are_those_of_the_config(whole, int8_run, other_base, settings, tmp_path):
    def message(changes) -> str:
        workdir = tmp_path / ",".join(changes)
        return refusal(train.main, runs.flags({**settings, **changes}, f"--workdir={workdir}"))

    assert "--config.lora.rank=4 --config.lora.alpha=8.0" in message({"lora.path": whole[0], "lora.rank": 2})
    assert "--config.lora.alpha=8.0" in message({"lora.path": whole[0], "lora.alpha": 4.0})
    assert "--config.lora.targets=['ff_out', 'q_proj']" in message({"lora.path": int8_run})
    assert "whole model" in message({"lora.path": settings["model.path"]})
    assert "config.lora.rank" in message({"lora.path": whole[0], "lora.rank": 0})
    assert "another base" in message({"lora.path": whole[0], "model.path": other_base})
    to_hf.main([f"--source={whole[0]}", f"--out={tmp_path / 'peft'}", "--adapter"])
    assert "conversion.to_hf" in message({"model.path": tmp_path / "peft"})


@pytest.fixture(scope="module")
def int8_run(settings, tmp_path_factory):
    """A run with adapters of two matrices on an int8 base, and an online reference."""
    workdir = tmp_path_factory.mktemp("run") / "int8"
    train.main(runs.flags({**settings, **INT8, "reference.mode": "online"}, f"--workdir={workdir}"))
    return workdir


def test_an_int8_base_with_an_online_reference_and_a_precomputed_one(int8_run, settings, tmp_path):
    values, workdir = {**settings, **INT8, "reference.mode": "precomputed"}, tmp_path / "precomputed"
    precompute.main(runs.flags(values, f"--workdir={workdir}"))
    parts = [part.stat().st_mtime_ns for part in workdir.rglob("*.npy")]
    train.main(runs.flags(values, f"--workdir={workdir}"))
    assert [part.stat().st_mtime_ns for part in workdir.rglob("*.npy")] == parts  # what precompute wrote was used
    found = metrics_of(workdir)
    assert found == metrics_of(int8_run)
    assert found[0]["reward_margin"] == found[1]["reward_margin"] == 0
    assert found[-1]["reward_margin"] != 0


def test_the_export_of_an_int8_run_is_the_model_that_was_trained(int8_run, settings, tmp_path):
    """The adapters on the int8 values of the base, and not on the base as it is published."""
    to_hf.main([f"--source={int8_run}", f"--out={tmp_path / 'hf'}"])
    exported, base = load_model(tmp_path / "hf").params, load_model(settings["model.path"])
    adapters_alone = trained_of(int8_run / "checkpoints" / "6")
    assert adapters_alone["blocks"].keys() == set(INT8["lora.targets"])
    int8 = quantized(base.params)
    close = lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6)  # noqa: E731
    jax.tree.map(close, exported, merged(int8, adapters_alone, 2.0))
    model, tokens = MaskPredictor(base.config), jnp.arange(16).reshape(2, 8)
    logits = lambda params: model.apply({"params": params}, tokens, method=MaskPredictor.logits)  # noqa: E731
    as_trained = logits(lora.parameters(lora.Base(int8, 2.0).policy(adapters_alone)))
    distance = lambda params: float(jnp.abs(logits(params) - as_trained).max())  # noqa: E731
    assert distance(exported) < 1e-4
    assert distance(merged(base.params, adapters_alone, 2.0)) > 10 * distance(exported)


@pytest.fixture
def other_base(settings, tmp_path):
    """The run's base with other values in one norm."""
    model = load_model(settings["model.path"])
    params = {**model.params, "ln_f": {"scale": model.params["ln_f"]["scale"] + 1}}
    source = Source.of(Model(model.config, params, model.assets, ""))
    conversion.write_published(tmp_path / "other", source, 10**9)
    return tmp_path / "other"


def moved(whole, settings, file: str, base, workdir):
    """A copy of the run in which one file names another place of the base."""
    shutil.copytree(whole[0], workdir)
    text = (workdir / file).read_text()
    assert str(settings["model.path"]) in text
    (workdir / file).write_text(text.replace(str(settings["model.path"]), str(base)))
    return workdir


def test_adapters_find_their_base_and_no_other(whole, settings, other_base, tmp_path):
    file, copy = "checkpoints/6/assets/manifest.json", tmp_path / "copy"
    shutil.copytree(settings["model.path"], copy)
    model = load_model(moved(whole, settings, file, copy, tmp_path / "same"))
    jax.tree.map(np.testing.assert_array_equal, model.params, load_model(whole[0]).params)
    for base, named in ((other_base, "another base"), (tmp_path / "nowhere", "manifest.json")):
        workdir = moved(whole, settings, file, base, tmp_path / f"run of {base.name}")
        message = refusal(lambda argv: load_model(argv[0]), [workdir])
        assert named in message
        assert str(base) in message


def test_a_run_does_not_go_on_with_another_base(whole, settings, other_base, tmp_path):
    workdir = moved(whole, settings, "config.json", other_base, tmp_path / "run")
    argv = runs.flags({**settings, "model.path": other_base, "train.samples": 1}, f"--workdir={workdir}")
    assert "another base" in refusal(train.main, argv)
    # The same where the step does not say it, since none was saved.
    shutil.rmtree(workdir / "checkpoints")
    assert "config.model.path: weights" in refusal(train.main, argv)


def test_adapters_are_no_base_for_adapters(whole, settings, tmp_path):
    message = refusal(train.main, runs.flags({**settings, "model.path": whole[0]}, f"--workdir={tmp_path / 'run'}"))
    assert "conversion.to_hf" in message
