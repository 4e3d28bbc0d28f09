"""The tables of the architectures beside LLaDA, and the network that follows them (docs/method.md 10)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elbo_kto_jax.checkpoints import names
from elbo_kto_jax.models import axes, memory, network, registry
from elbo_kto_jax.models.flops import forward_flops, layer_matrices
from elbo_kto_jax.models.lora import abstract_adapters
from elbo_kto_jax.models.network import MaskPredictor, abstract_params
from elbo_kto_jax.models.table import bias, scale
from elbo_kto_jax.runtime.config import Mesh
from elbo_kto_jax.sharding import rules
from tests import families, tiny
from tests.families import FAMILIES, Plain

TOKENS = np.random.default_rng(0).integers(0, 48, 20)


@pytest.fixture(params=FAMILIES)
def family(request, monkeypatch):
    """The name of an architecture; tests/tiny.py makes models of it."""
    monkeypatch.setattr(tiny, "MODEL", families.config(request.param))
    return request.param


def logits(params, tokens, positions=None, segment_ids=None, model=None):
    batched = [None if x is None else jnp.asarray(x)[None] for x in (tokens, positions, segment_ids)]
    return np.asarray((model or tiny.model()).apply({"params": params}, *batched, method="logits")[0])


# ---- tables ----

ALWAYS = {
    "wte/embedding": (48, 16),
    "blocks/attn_norm/scale": (2, 16),
    "blocks/ff_norm/scale": (2, 16),
    "blocks/ff_proj/kernel": (2, 16, 24),
    "blocks/up_proj/kernel": (2, 16, 24),
    "blocks/ff_out/kernel": (2, 24, 16),
    "ln_f/scale": (16,),
}
SHAPES = {
    "illada": ALWAYS
    | {
        "blocks/q_proj/kernel": (2, 16, 16),
        "blocks/k_proj/kernel": (2, 16, 8),
        "blocks/v_proj/kernel": (2, 16, 8),
        "blocks/attn_out/kernel": (2, 16, 16),
    },
    "dream": ALWAYS
    | {
        "blocks/q_proj/kernel": (2, 16, 16),
        "blocks/q_proj/bias": (2, 16),
        "blocks/k_proj/kernel": (2, 16, 8),
        "blocks/k_proj/bias": (2, 8),
        "blocks/v_proj/kernel": (2, 16, 8),
        "blocks/v_proj/bias": (2, 8),
        "blocks/attn_out/kernel": (2, 16, 16),
        "head/kernel": (16, 48),
    },
    "a2d_qwen3": ALWAYS
    | {
        "blocks/q_proj/kernel": (2, 16, 32),
        "blocks/k_proj/kernel": (2, 16, 16),
        "blocks/v_proj/kernel": (2, 16, 16),
        "blocks/q_norm/scale": (2, 8),
        "blocks/k_norm/scale": (2, 8),
        "blocks/attn_out/kernel": (2, 32, 16),
    },
}


def test_the_parameters_are_those_that_are_published(family):
    tree = abstract_params(tiny.model())
    found = {"/".join(k.key for k in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    assert found == SHAPES[family]


def test_published_names(family):
    layer = "self_attn.{0}_proj.weight"
    expected = {"model.embed_tokens.weight", "model.norm.weight"}
    for n in range(2):
        of_layer = {layer.format(x) for x in "qkvo"} | {f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")}
        of_layer |= {"input_layernorm.weight", "post_attention_layernorm.weight"}
        of_layer |= {f"self_attn.{x}_proj.bias" for x in "qkv"} if family == "dream" else set()
        of_layer |= {f"self_attn.{x}_norm.weight" for x in "qk"} if family == "a2d_qwen3" else set()
        expected |= {f"model.layers.{n}.{name}" for name in of_layer}
    expected |= {"lm_head.weight"} if family == "dream" else set()
    tensors = names.published_tensors(tiny.MODEL)
    assert tensors.keys() == expected
    assert next(iter(tensors)) == "model.embed_tokens.weight"
    assert tensors["model.layers.1.self_attn.k_proj.weight"].shape == (16 if family == "a2d_qwen3" else 8, 16)
    assert tensors["model.layers.1.mlp.down_proj.weight"].shape == (16, 24)
    duplicates = names.published_duplicates(tiny.MODEL)
    assert duplicates == ({} if family == "dream" else {"lm_head.weight": "model.embed_tokens.weight"})


@pytest.fixture
def edited(monkeypatch):
    """edited(family, change) -> its model, whose table of parameters `change` has changed."""

    def edit(family, change):
        known = registry.architectures()[family]
        changed = dataclasses.replace(known, parameters=lambda config: change(dict(known.parameters(config))))
        monkeypatch.setattr(registry, "architectures", lambda: {**ORIGINAL, family: changed})
        # Tables are kept by the model's numbers: these are of no other test.
        return families.config(family, n_layers=3, max_sequence_length=next(_fresh))

    return edit


ORIGINAL = registry.architectures()
_fresh = iter(range(10**6, 2 * 10**6))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_without_a_parameter_is_an_error(family, edited):
    row = scale("blocks/extra_norm", "model.layers.{}.extra", layers=3, norm=16)
    model = edited(family, lambda table: table | {row.path: row})
    with pytest.raises(ValueError, match=rf"models/{family}\.py: parameter blocks/extra_norm/scale .*\(3, 16\).*None"):
        abstract_params(MaskPredictor(model))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("path", ["blocks/attn_norm/scale", "blocks/ff_norm/scale", "ln_f/scale"])
def test_a_parameter_without_a_row_is_an_error(family, path, edited):
    model = edited(family, lambda table: {key: row for key, row in table.items() if "/".join(key) != path})
    with pytest.raises(ValueError, match=f"models/{family}.py: parameter {path} has the shape None in the table"):
        abstract_params(MaskPredictor(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_another_shape_is_an_error(family, edited):
    row = scale("ln_f", "model.norm", norm=17)
    model = edited(family, lambda table: table | {row.path: row})
    with pytest.raises(ValueError, match="parameter ln_f/scale has the shape"):
        abstract_params(MaskPredictor(model))


def test_a_bias_needs_its_kernel_to_be_used(edited):
    """A bias of a norm is a row that no part of the network takes."""
    row = bias("blocks/attn_norm", "model.layers.{}.input_layernorm", layers=3, norm=16)
    model = edited("illada", lambda table: table | {row.path: row})
    with pytest.raises(ValueError, match="blocks/attn_norm/bias"):
        abstract_params(MaskPredictor(model))


def test_shapes_are_traced_once_and_the_tree_is_the_caller_s_own(monkeypatch):
    traced, init = [], network.init_params
    monkeypatch.setattr(network, "init_params", lambda *a: traced.append(1) or init(*a))
    network._shapes.cache_clear()
    abstract_params(tiny.model("bfloat16", "full")).clear()
    assert abstract_params(tiny.model())["wte"]
    assert len(traced) == 1


def test_every_parameter_and_what_lora_adds_is_laid_out_over_a_mesh(family, cpu_devices):
    mesh = rules.make_mesh(Mesh(2, 2, 2), cpu_devices)
    tree = abstract_params(tiny.model())
    adapters = abstract_adapters(tree, 3, jnp.float32)
    shardings = axes.param_shardings(tree, mesh, tiny.MODEL)
    axes.param_shardings(adapters, mesh, tiny.MODEL)
    spec = lambda *path: tuple(names.get(shardings, path).spec)  # noqa: E731
    assert spec("wte", "embedding") == ("tensor", "fsdp")
    assert spec("blocks", "q_proj", "kernel") == (None, "fsdp", "tensor")
    if family == "dream":
        assert spec("blocks", "q_proj", "bias") == (None, "tensor")
        assert spec("head", "kernel") == ("fsdp", "tensor")
    if family == "a2d_qwen3":
        assert spec("blocks", "q_norm", "scale") == (None, None)


def test_counts_agree_with_the_tree(family):
    model, tree = tiny.MODEL, abstract_params(tiny.model())
    assert memory.parameters(model) == sum(leaf.size for leaf in jax.tree.leaves(tree))
    adapters = abstract_adapters(tree, 3, jnp.float32)
    assert memory.adapters(model, 3) == sum(leaf.size for leaf in jax.tree.leaves(adapters))
    kernels = sum(group["kernel"].size for group in tree["blocks"].values() if "kernel" in group)
    assert layer_matrices(model) * model.n_layers == kernels
    # One sequence of 21 tokens, of which 5 are scored, written out: a tied head is multiplied with as any other.
    expected = 2 * 21 * kernels + 2 * 2 * 21 * 21 * 4 * model.head_dim * 2 + 2 * 5 * 16 * 48
    assert forward_flops(model, np.array([21]), np.array([5.0])) == expected


# ---- the network ----


@pytest.mark.parametrize(("family", "tied"), [("illada", True), ("dream", False), ("dream", True), ("a2d_qwen3", True)])
def test_logits_are_those_of_the_network_written_down_plainly(monkeypatch, family, tied):
    monkeypatch.setattr(tiny, "MODEL", families.config(family, tied_head=tied))
    params = tiny.params(0)
    assert ("head" in params) != tied
    np.testing.assert_allclose(logits(params, TOKENS), Plain(tiny.MODEL, params).logits(TOKENS), rtol=1e-4, atol=2e-4)


def test_every_parameter_matters(family):
    """Otherwise a network that forgets one, as the plain one may, would agree with it."""
    params = tiny.params(0)
    before = Plain(tiny.MODEL, params).logits(TOKENS)
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        turned = jax.tree_util.tree_map_with_path(
            lambda p, x, path=path: np.roll(x, 1, axis=-1) if p == path else x, params
        )
        assert np.abs(Plain(tiny.MODEL, turned).logits(TOKENS) - before).max() > 0.1, path


def test_logits_are_shifted_by_one_where_the_network_predicts_the_next_token():
    """aligned[i] = logits[i - 1], aligned[0] = logits[0], of the same network without the shift."""
    aligned, raw = (families.config("dream", predicts_next=shifts) for shifts in (True, False))
    params = jax.tree.map(lambda x: x, _params_of(raw))
    aligned, raw = (logits(params, TOKENS, model=MaskPredictor(config)) for config in (aligned, raw))
    np.testing.assert_array_equal(aligned[1:], raw[:-1])
    np.testing.assert_array_equal(aligned[0], raw[0])


def _params_of(config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "MODEL", config)
        return tiny.params(0)


def test_packed_segments_are_each_alone(family):
    """What one predicts comes from no other, whatever follows or precedes it; padding is no segment's."""
    params, lengths = tiny.params(0), (7, 1, 9)
    segment_ids = np.repeat([1, 2, 3, 0], [*lengths, 3])
    positions = np.concatenate([np.arange(n) for n in (*lengths, 3)])
    packed = logits(params, TOKENS, positions, segment_ids)
    for g in (1, 2, 3):
        alone = Plain(tiny.MODEL, params).logits(TOKENS[segment_ids == g])
        np.testing.assert_allclose(packed[segment_ids == g], alone, rtol=1e-4, atol=2e-4)


def test_the_gradient_of_a_tied_head_is_the_sum_of_both_uses(monkeypatch):
    """Against an untied network whose head is the transpose of its embedding."""
    monkeypatch.setattr(tiny, "MODEL", families.config("illada"))
    params = tiny.params(0)
    untied = {**params, "head": {"kernel": params["wte"]["embedding"].T}}
    model = MaskPredictor(dataclasses.replace(tiny.MODEL, tied_head=False))
    loss = lambda p, m: jnp.sum(jnp.tanh(m.apply({"params": p}, jnp.asarray(TOKENS)[None], method="logits")))  # noqa: E731
    found = jax.jit(jax.grad(lambda p: loss(p, tiny.model())))(params)
    parts = jax.jit(jax.grad(lambda p: loss(p, model)))(untied)
    expected = parts["wte"]["embedding"] + parts["head"]["kernel"].T
    np.testing.assert_allclose(found["wte"]["embedding"], expected, rtol=1e-4, atol=1e-4)
    assert min(np.abs(parts["wte"]["embedding"]).max(), np.abs(parts["head"]["kernel"]).max()) > 0.1
