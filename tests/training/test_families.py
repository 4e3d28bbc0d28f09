"""Training and scoring of the architectures beside LLaDA: exactness, gradients, meshes, adapters, whole runs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elbo_kto_jax import cli, from_hf, generate, objectives, to_hf, train
from elbo_kto_jax.checkpoints.load import load_config, load_model
from elbo_kto_jax.checkpoints.tiny import write_untrained
from elbo_kto_jax.diffusion.masks import draw_masks
from elbo_kto_jax.models import axes, lora
from elbo_kto_jax.models.network import abstract_params
from elbo_kto_jax.runtime import config
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.scoring.likelihood import log_likelihoods
from elbo_kto_jax.scoring.scorer import Scorer
from elbo_kto_jax.sharding import rules
from elbo_kto_jax.training import state as train_state
from elbo_kto_jax.training import step
from elbo_kto_jax.training.data import TrainingData
from elbo_kto_jax.training.setup import prepare
from tests import families, runs, tiny
from tests.families import FAMILIES, Plain

ESTIMATOR, NUM, DRAWS, SCALE = config.Estimator(2, "uniform"), 6, 2, 0.7
ONE, EIGHT = config.Mesh(1, 1, 1), config.Mesh(2, 2, 2)


@pytest.fixture(params=FAMILIES)
def family(request, monkeypatch):
    """The name of an architecture; tests/tiny.py makes models of it."""
    monkeypatch.setattr(tiny, "MODEL", families.config(request.param))
    return request.param


def mesh_of(sizes: config.Mesh):
    return rules.make_mesh(sizes, jax.devices()[: sizes.data * sizes.fsdp * sizes.tensor])


def placed(tree, mesh):
    return jax.device_put(tree, axes.param_shardings(tree, mesh, tiny.MODEL))


def scorer(sizes=ONE, dtype="float32", residuals="recompute") -> Scorer:
    return Scorer(tiny.model(dtype), mesh_of(sizes), size=NUM * DRAWS, residuals=residuals)


def batch(rows: int):
    """Packed rows: several segments in most."""
    data = TrainingData(tiny.examples(NUM), tiny.layout(rows), estimator=ESTIMATOR, batch_size=NUM, seed=0)
    return data.batch(0), data.indices(0)


def adapters(seed: int):
    """Adapters that matter."""
    abstract = lora.abstract_adapters(abstract_params(tiny.model()), 3, jnp.float32)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / np.sqrt(x.shape[1]), x.dtype), abstract)


def int8(params):
    """The base with int8 matrices; biases beside them stay."""
    blocks = {}
    for name, group in params["blocks"].items():
        rest = {leaf: value for leaf, value in group.items() if leaf != "kernel"}
        blocks[name] = rest | (lora.quantize(group["kernel"]) if "kernel" in group else {})
    return {**params, "blocks": blocks}


def merged(base, tree, scale: float):
    """The whole model as one plain tree."""
    blocks = {}
    for name, group in base["blocks"].items():
        kernel = lora.dequantize(group["kernel"], group["kernel_scale"]) if "kernel_scale" in group else None
        rest = {leaf: value for leaf, value in group.items() if leaf not in ("kernel", "kernel_scale")}
        if "kernel" in group:
            w = group["kernel"] if kernel is None else kernel
            a, b = tree["blocks"][name]["lora_a"], tree["blocks"][name]["lora_b"]
            rest["kernel"] = w + scale * jnp.matmul(a, b, precision="highest")
        blocks[name] = rest
    return {**base, "blocks": blocks}


# ---- estimates ----


def test_estimates_of_packed_rows_are_those_of_the_plain_network(family):
    """Each draw alone, in numpy and float64: nothing of a segment, a shift by one included, reaches the next."""
    params, examples, (drawn, indices) = tiny.params(0), tiny.examples(NUM), batch(2)
    assert max(rows.segment_ids.max() for rows in drawn.micro_batches) > 1
    plain = Plain(tiny.MODEL, params)
    expected = [plain_draws(plain, examples, int(i)) for i in indices]
    found = np.asarray(scorer()(placed(params, mesh_of(ONE)), drawn.micro_batches)).reshape(NUM, DRAWS)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def plain_draws(plain: Plain, examples, i: int) -> list[float]:
    start, tokens = int(examples.prompt_length[i]), examples.tokens[examples.offsets[i] : examples.offsets[i + 1]]
    draws = draw_masks(
        "uniform", seed=0, id_words=examples.id_words[i], epoch=0, draws=DRAWS, length=len(tokens) - start
    )
    return [plain_elbo(plain, tokens, start, *draw) for draw in zip(draws.mask, draws.weight, strict=True)]


def plain_elbo(plain: Plain, tokens, start: int, mask, weight) -> float:
    hidden = np.zeros(len(tokens), bool)
    hidden[start:] = mask
    logits = plain.logits(np.where(hidden, tiny.MODEL.mask_token_id, tokens))
    log_probs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return float(weight * log_probs[np.arange(len(tokens)), tokens][hidden].sum())


def test_the_likelihood_of_an_answer_of_one_token_is_that_of_the_plain_network(family):
    """One mask, no chance: also after an empty prompt, and several pairs in one row."""
    params, plain = tiny.params(0), Plain(tiny.MODEL, tiny.params(0))
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 36, size).astype(np.int32) for size in (4, 0, 7, 1)]
    answers = [np.array([token], np.int32) for token in (5, 6, 7, 8)]
    found = log_likelihoods(
        tiny.model(),
        placed(params, mesh_of(ONE)),
        prompts,
        answers,
        draws=2,
        batch=2,
        seed=0,
        layout=tiny.layout(2),
        mesh=mesh_of(ONE),
    )
    for value, prompt, answer in zip(found, prompts, answers, strict=True):
        tokens = np.concatenate([prompt, answer])
        assert value == pytest.approx(plain_elbo(plain, tokens, len(prompt), [True], 1.0), rel=1e-5)


def test_rewards_are_exactly_zero_in_bfloat16_while_policy_and_reference_are_equal(family):
    """Of the whole model, by SCORE on one device and by FORWARD on eight; of new adapters on an int8 base."""
    drawn, _ = batch(8)

    def assert_equal(score, policy, reference):
        found = [np.asarray(score(weights, drawn.micro_batches)) for weights in (policy, reference)]
        np.testing.assert_array_equal(found[0] - found[1], 0)
        assert np.isfinite(found[0]).all()
        assert (found[0] < 0).all()

    for sizes, residuals in ((ONE, "recompute"), (EIGHT, "host")):
        score = scorer(sizes, "bfloat16", residuals)
        params = [placed(jax.tree.map(jnp.copy, tiny.params(0)), score.mesh) for _ in range(2)]
        assert_equal(score, *params)
    if family == "dream":  # the one with a bias beside its int8 matrices
        score = scorer(ONE, "bfloat16")
        base = lora.Base(placed(int8(tiny.params(0)), score.mesh), SCALE)
        new = jax.tree_util.tree_map_with_path(lambda p, x: x * (p[-1].key == "lora_a"), adapters(1))
        assert_equal(score, base.policy(placed(new, score.mesh)), base.reference(placed(adapters(2), score.mesh)))


# ---- gradients ----


def gradient(weights, sizes=ONE, residuals="recompute"):
    """(estimates, d sum_b c_b B_b / d weights) for fixed c_b, as `train_step` works it out."""
    score, (drawn, _) = scorer(sizes, residuals=residuals), batch(8)
    trained, _ = lora.split_trained(weights)
    shardings = axes.param_shardings(trained, score.mesh, tiny.MODEL)
    keep = train_state.TrainState(shardings, shardings)
    programs = step.build_programs(score, objectives.build(tiny.KTO), draws=DRAWS, shardings=keep)
    cotangent = score.place_everywhere(COTANGENT)
    if score.takes_one_pass:
        estimates, residuals = score.keeping_residuals(weights, drawn.micro_batches)
        grads = None
        for kept, rows_ in zip(residuals, score.place(drawn.micro_batches), strict=True):
            grads = programs.backward(kept, weights, grads, rows_, cotangent)
    else:
        grads, estimates = programs.zero_grads(trained), score.no_estimates()
        for rows_ in score.place(drawn.micro_batches):
            grads, estimates = score.pace(programs.grad(weights, grads, estimates, rows_, cotangent))
    for leaf, sharding in zip(jax.tree.leaves(grads), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    return np.asarray(estimates), jax.device_get(grads)


COTANGENT = np.linspace(-1, 1, NUM).astype(np.float32)


def assert_same(found, expected, tolerance=1e-5):
    """Relative Euclidean distance: over all leaves, and ten times as much of each."""
    norm = lambda tree: float(np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(tree))))  # noqa: E731
    distance = lambda x, y: norm(jax.tree.map(np.subtract, x, y)) / norm(y)  # noqa: E731
    assert distance(found, expected) <= tolerance
    assert max(jax.tree.leaves(jax.tree.map(distance, found, expected))) <= 10 * tolerance


def plain_gradient(of, tree):
    """Autodiff of the same sum, each draw alone in a row (tests/tiny.py)."""
    examples, (_, indices) = tiny.examples(NUM), batch(8)

    def total(tree):
        estimates = tiny.plain_estimates(of(tree), examples, indices, ESTIMATOR, seed=0)
        return jnp.sum(COTANGENT * estimates.mean(axis=1))

    return jax.device_get(jax.jit(jax.grad(total))(tree))


def test_gradients_are_plain_autodiff_s_whatever_the_devices_and_the_passes(family):
    """With a tied head its parameter's is that of both uses (tests/models/test_architectures.py)."""
    params = tiny.params(0)
    estimates, one = gradient(placed(params, mesh_of(ONE)))
    assert_same(one, plain_gradient(lambda tree: tree, params))
    assert not [leaf for leaf in jax.tree.leaves(one) if not leaf.any()]
    found, spread = gradient(placed(params, mesh_of(EIGHT)), EIGHT, residuals="host")
    np.testing.assert_allclose(found, estimates, rtol=1e-5)
    assert_same(spread, one)


@pytest.mark.parametrize("family", ["dream"], indirect=True)
def test_adapters_on_an_int8_base_are_the_merged_model(family):
    """Biases are added to what the scaled matrices and the adapters give, not scaled themselves."""
    base, tree = int8(tiny.params(0)), adapters(1)
    assert "bias" in base["blocks"]["q_proj"]
    assert base["blocks"]["q_proj"]["kernel"].dtype == jnp.int8
    examples, (_, indices) = tiny.examples(NUM), batch(8)
    expected = tiny.plain_estimates(merged(base, tree, SCALE), examples, indices, ESTIMATOR, seed=0)
    plain = plain_gradient(lambda t: merged(base, t, SCALE), tree)
    mesh = mesh_of(EIGHT)
    found, grads = gradient(lora.Base(placed(base, mesh), SCALE).policy(placed(tree, mesh)), EIGHT)
    np.testing.assert_allclose(found.reshape(NUM, DRAWS), expected, rtol=1e-5)
    assert_same(grads, plain)
    without = tiny.plain_estimates(merged(base, tree, 0.0), examples, indices, ESTIMATOR, seed=0)
    assert np.abs(expected - without).max() > 0.1


@pytest.mark.parametrize("family", ["dream"], indirect=True)
def test_neither_norms_nor_biases_decay(family):
    options = config.Optimizer(1e-2, "cosine", 0.0, 0.9, 0.95, 0.5, 1.0, "float32")
    tx, params = train_state.optimizer(options, 10), tiny.params(0)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        assert bool(np.any(update)) == (path[-1].key in ("kernel", "embedding")), path


# ---- whole runs ----

LORA = {"lora.rank": 2, "lora.alpha": 4.0, "lora.base_quantization": "int8", "optimizer.learning_rate": 1e-2}
SMALL = {"d_model": 16, "n_heads": 2, "n_kv_heads": 1, "mlp_hidden_size": 24}


@pytest.fixture(scope="module", params=["dream"])
def run(request, tmp_path_factory):
    """(settings, workdir) of a run with adapters on an int8 base, whose config.json names no mask token."""
    folder = tmp_path_factory.mktemp(request.param)
    write_untrained(folder / "base", 0, request.param, **SMALL)
    mapping = json.loads((folder / "base" / "config.json").read_text())
    mask_id = mapping.pop("mask_token_id")
    (folder / "base" / "config.json").write_text(json.dumps(mapping))
    settings = {
        "model.path": folder / "base",
        "data.train": runs.write_jsonl(folder / "train.jsonl", runs.records(4)),
        "train.steps": 3,
        **LORA,
    }
    with pytest.raises(UserError, match=r"config\.model\.mask_token_id"):
        train.main(runs.flags(settings, f"--workdir={folder / 'run'}"))
    settings["model.mask_token_id"] = mask_id
    train.main(runs.flags(settings, f"--workdir={folder / 'run'}"))
    return settings, folder / "run"


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_with_adapters_starts_at_its_base(run):
    first, second, last = rows_of(run[1])
    assert first["reward_margin"] == second["reward_margin"] == 0  # the first step has rate 0
    assert last["reward_margin"] != 0


def test_a_run_s_checkpoint_needs_no_flag_for_the_mask_that_it_was_trained_with(run, tmp_path):
    """It stands in the manifest, adapters or not."""
    settings, workdir = run
    manifest = json.loads((workdir / "checkpoints" / "3" / "assets" / "manifest.json").read_text())
    assert manifest["mask_token_id"] == settings["model.mask_token_id"]
    assert load_config(workdir)[0].mask_token_id == settings["model.mask_token_id"]
    out = tmp_path / "out.jsonl"
    generate.main(runs.flags({}, f"--checkpoint={workdir}", f"--prompts={settings['data.train']}", f"--out={out}"))
    for row in runs.read_jsonl(out):
        assert len(row["response_ids"]) == runs.SMALL["sampler.gen_length"]


def test_the_export_is_the_adapted_model_and_loads_again(run, tmp_path):
    settings, workdir = run
    base, ours = load_model(settings["model.path"]), load_model(workdir)
    to_hf.main([f"--source={workdir}", f"--out={tmp_path / 'hf'}"])
    exported = load_model(tmp_path / "hf")
    jax.tree.map(np.testing.assert_array_equal, exported.params, ours.params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(exported.params):
        before = base.params
        for key in path:
            before = before[key.key]
        assert np.array_equal(leaf, before) == (path[-1].key != "kernel" or path[0].key != "blocks"), path
    from_hf.main([f"--source={tmp_path / 'hf'}", f"--out={tmp_path / 'again'}"])
    jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path / "again").params, ours.params)


def test_estimates_of_another_mask_token_are_not_taken_for_the_runs(run):
    """What a reference was scored with is part of what its cache is called."""
    settings, _ = run
    whole = {**settings, "lora.rank": 0, "lora.base_quantization": "none", "train.steps": 1}
    found = []
    for mask_id in (settings["model.mask_token_id"], 3):
        flags = cli.Flags("test", "test")
        flags.add_config()
        setup = prepare(flags.parse(runs.flags({**whole, "model.mask_token_id": mask_id}))[1], skip_bad=False)
        found.append(setup.fingerprint("digest", setup.data))
    assert found[0] != found[1]
    assert found[0]["mask_token_id"] == settings["model.mask_token_id"]
