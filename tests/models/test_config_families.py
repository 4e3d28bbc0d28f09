"""Which architecture a config.json describes, and what each of them refuses or passes over (docs/method.md 10)."""

import math

import pytest

from elbo_kto_jax.checkpoints.assets import parse_config
from elbo_kto_jax.models.registry import architectures, parameters, read_config
from elbo_kto_jax.runtime.errors import UserError
from tests import families
from tests.families import CONFIGS, FAMILIES
from tests.published import CONFIG as LLADA

EVERY = {"llada": LLADA, **CONFIGS}
OWN_HEADS = ("illada", "dream")  # heads share the model's width


def refusal(mapping) -> str:
    """The message, which is one or two short lines and names the file."""
    with pytest.raises(UserError) as refused:
        read_config(mapping, "some/config.json")
    message = str(refused.value)
    assert message.startswith("some/config.json: ")
    assert message.count("\n") <= 1
    assert len(message) < 600
    return message


def without(family: str, key: str) -> dict:
    return {name: value for name, value in EVERY[family].items() if name != key}


# ---- which architecture ----


@pytest.mark.parametrize("family", EVERY)
def test_an_architecture_is_recognised_by_its_model_type(family):
    assert read_config(EVERY[family], "x").architecture == family
    assert read_config(EVERY[family] | {"architectures": ["SomethingElse"]}, "x").architecture == family


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("said", ["absent", None])
def test_an_architecture_is_recognised_by_its_class_where_there_is_no_model_type(family, said):
    mapping = without(family, "model_type") if said == "absent" else CONFIGS[family] | {"model_type": None}
    assert read_config(mapping, "x") == read_config(CONFIGS[family], "x")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model_type": "qwen3"}, "model_type"),
        ({"model_type": "dream"}, "model_type"),
        ({"model_type": ["Dream"]}, "model_type"),
        ({"model_type": 3}, "model_type"),
        ({"model_type": "\x1b[31m" + "x" * 10**5}, "model_type"),
        ({"model_type": None, "architectures": ["Qwen3ForCausalLM"]}, "architectures"),
        ({"model_type": None, "architectures": None}, "model_type"),
        ({"model_type": None, "architectures": "DreamModel"}, "model_type"),
        ({"model_type": None, "architectures": [["DreamModel"]]}, "model_type"),
    ],
    ids=repr,
)
def test_an_unknown_architecture_is_refused_with_the_list_of_those_that_are_supported(changes, key):
    message = refusal(CONFIGS["dream"] | changes)
    assert f"`{key}`" in message
    for known in architectures().values():
        assert repr(known.model_type) in message
    assert "\x1b" not in message


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_of_experts_of_the_family_is_refused(family):
    assert "num_experts" in refusal(CONFIGS[family] | {"num_experts": 64, "num_experts_per_tok": 8})


def test_llada_moe_is_refused_by_its_name():
    for changes in ({"num_experts": 64}, {"architectures": ["LLaDAMoEModelLM"]}, {"model_type": "llada_moe"}):
        assert "LLaDA-MoE" in refusal(CONFIGS["illada"] | {"model_type": "llada"} | changes)


# ---- what is read ----


def test_the_numbers_of_each():
    illada, dream, a2d = (read_config(CONFIGS[family], "x") for family in FAMILIES)
    assert (illada.head_dim, dream.head_dim, a2d.head_dim) == (4, 4, 8)
    assert (illada.tied_head, dream.tied_head, a2d.tied_head) == (True, False, True)
    assert (illada.predicts_next, dream.predicts_next, a2d.predicts_next) == (False, True, False)
    assert (illada.mask_token_id, dream.mask_token_id, a2d.mask_token_id) == (None, 39, None)
    for found in (illada, dream, a2d):
        assert (found.d_model, found.n_layers, found.n_heads, found.n_kv_heads) == (16, 2, 4, 2)
        assert (found.mlp_hidden_size, found.embedding_size, found.vocab_size) == (24, 48, 48)
        assert (found.eos_token_id, found.pad_token_id, found.max_sequence_length) == (37, 37, 128)
    assert (illada.rope_theta, dream.rope_theta, a2d.rope_theta) == (5e5, 1e6, 1e6)
    assert (illada.rms_norm_eps, dream.rms_norm_eps, a2d.rms_norm_eps) == (1e-5, 1e-6, 1e-6)


@pytest.mark.parametrize("architecture", architectures().values(), ids=lambda known: known.name)
def test_published_is_the_inverse_of_read_for_all_sizes(architecture):
    assert architecture.sizes
    for model in [*architecture.sizes.values(), read_config(EVERY[architecture.name], "x")]:
        assert model.architecture == architecture.name
        mapping = architecture.published(model)
        assert architecture.read(mapping, "x") == model
        assert read_config(mapping, "x") == model


# LLaDA-8B's own count, Qwen2.5-7B's (of which Dream is made) and Qwen3-0.6B's; iLLaDA's is 32 layers of 218.1 million
# and 155136 rows of 4096.
@pytest.mark.parametrize(
    ("family", "size", "billions"),
    [("llada", "8b", 8.02), ("dream", "7b", 7.62), ("a2d_qwen3", "0.6b", 0.596), ("illada", "8b", 7.62)],
)
def test_the_sizes_have_the_published_numbers_of_parameters(family, size, billions):
    model = architectures()[family].sizes[size]
    assert sum(row.size for row in parameters(model).values()) / 1e9 == pytest.approx(billions, rel=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_tied_where_the_file_says_so(family, tied):
    mapping = CONFIGS[family] | {"tie_word_embeddings": tied}
    found = read_config(mapping, "x")
    assert found.tied_head == tied
    assert (("head", "kernel") in parameters(found)) != tied


@pytest.mark.parametrize(("family", "tied"), [("illada", True), ("dream", False), ("a2d_qwen3", False)])
def test_a_missing_tie_word_embeddings_has_the_default_of_the_published_class(family, tied):
    assert read_config(without(family, "tie_word_embeddings"), "x").tied_head == tied


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "sdpa"},
        {"_attn_implementation": "eager"},
        {"_name_or_path": "somewhere/else"},
        {"max_window_layers": 70},
        {"use_sliding_window": False, "sliding_window": 4096},
        {"use_sliding_window": False, "sliding_window": None},
        {"layer_types": ["full_attention"] * 2},
        {"layer_types": None},
        {"rope_parameters": {"rope_type": "default"}},
        {"rope_parameters": None},
        {"dtype": "bfloat16"},
        {"torch_dtype": "bfloat16"},
        {"dtype": "bfloat16", "torch_dtype": "float32"},
        {"transformers_version": "5.24.0"},
        {"quantization_config": None},
        {"mlp_bias": False},
        {"attention_bias": False},
        {"use_mrope": False},
        {"partial_rotary_factor": 1},
        {"is_causal": False},
        {"use_cache": False},
        {"unsloth_version": "2025.3.19"},
    ],
    ids=repr,
)
def test_what_changes_nothing_is_passed_over(family, changes):
    assert read_config(CONFIGS[family] | changes, "x") == read_config(CONFIGS[family], "x")


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_5_writes_the_base_of_rope_among_its_parameters(family):
    inner = {"rope_type": "default", "rope_theta": 12345.0}
    found = read_config(without(family, "rope_theta") | {"rope_parameters": inner}, "x")
    assert found.rope_theta == 12345.0


@pytest.mark.parametrize("family", OWN_HEADS)
def test_a_head_dim_that_says_the_same_is_passed_over(family):
    assert read_config(CONFIGS[family] | {"head_dim": 4}, "x") == read_config(CONFIGS[family], "x")


def test_a_missing_head_dim_is_that_of_the_published_class():
    assert read_config(without("a2d_qwen3", "head_dim"), "x").head_dim == 128


def test_what_transformers_writes_for_a_qwen3_is_read():
    """All keys that its class has, defaults included; only the name of the kind is another."""
    from transformers import Qwen3Config

    keys = "head_dim hidden_size intermediate_size num_attention_heads num_hidden_layers num_key_value_heads vocab_size"
    said = {key: CONFIGS["a2d_qwen3"][key] for key in keys.split()}
    mapping = Qwen3Config(**said, tie_word_embeddings=True, rms_norm_eps=1e-6).to_dict()
    found = read_config(mapping | {"model_type": "a2d-qwen3"}, "x")
    expected = families.config("a2d_qwen3", rope_theta=found.rope_theta, max_sequence_length=32768)
    assert found.rope_theta in (10000.0, 1000000.0)
    assert (found.head_dim, found.tied_head, found.d_model) == (8, True, expected.d_model)


# ---- what is refused ----

SWITCHED_ON = [
    ("attention_bias", True),
    ("mlp_bias", True),
    ("rope_scaling", {"type": "linear", "factor": 2.0}),
    ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
    ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}),
    ("rope_parameters", {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}),
    ("rope_parameters", {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}),
    ("rope_parameters", [1]),
    ("use_sliding_window", True),
    ("use_sliding_window", "yes"),
    ("layer_types", ["full_attention", "sliding_attention"]),
    ("layer_types", "full_attention"),
    ("layer_types", [["full_attention"]]),
    ("layer_norm_eps", 1e-5),
    ("hidden_act", "gelu"),
    ("hidden_act", None),
    ("use_mrope", True),
    ("attention_dropout", 0.1),
    ("resid_pdrop", 0.1),
    ("embd_pdrop", 0.1),
    ("partial_rotary_factor", 0.5),
    ("quantization_config", {"quant_method": "awq", "bits": 4}),
    ("tie_word_embeddings", "yes"),
    ("tie_word_embeddings", 1),
    ("tie_word_embeddings", 0),
    ("something_new", True),
    ("logit_softcapping", 30.0),
    ("\x1b[31m", 1),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("key", "value"), SWITCHED_ON, ids=repr)
def test_a_feature_that_is_not_implemented_is_refused_by_its_key(family, key, value):
    message = refusal(CONFIGS[family] | {key: value})
    assert ("\\x1b[31m" if key.startswith("\x1b") else f"`{key}`") in message


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_without_a_switch_is_refused(family):
    message = refusal(without(family, "use_sliding_window") | {"sliding_window": 512})
    assert "`sliding_window`: 512" in message


NUMBERS = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 48,
    "max_position_embeddings": 128,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("key", NUMBERS)
def test_a_missing_number_is_named(family, key):
    assert f"`{key}` is missing" in refusal(without(family, key))
    assert f"`{key}` is missing" in refusal(CONFIGS[family] | {key: None})


BAD = (-1, -0.5, math.nan, math.inf, -math.inf, "16", "", [16], {}, True, False, 10**400, 1e308, 2**63)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_that_is_none_or_no_network_has_is_refused(family, key):
    may_be_zero = ("max_position_embeddings", "rms_norm_eps")
    for value in BAD if key in may_be_zero else (0, *BAD):
        assert f"`{key}`" in refusal(CONFIGS[family] | {key: value}), value


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("key", ["mask_token_id", "eos_token_id", "pad_token_id"])
def test_a_token_outside_of_the_embedding_is_refused(family, key):
    for value in (48, 2**40, -1, 1.5, "37", True, [37], math.nan):
        assert f"`{key}`" in refusal(CONFIGS[family] | {key: value}), value


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("theta", [0, -1.0, math.nan, "1e6", 1e300])
def test_the_base_of_rope_is_a_number_wherever_it_stands(family, theta):
    inner = {"rope_type": "default", "rope_theta": theta}
    assert "`rope_theta`" in refusal(without(family, "rope_theta") | {"rope_parameters": inner})
    assert "`rope_theta` is missing" in refusal(without(family, "rope_theta") | {"rope_parameters": {}})


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_must_fit(family):
    assert "`num_key_value_heads`: 3 does not divide num_attention_heads 4" in refusal(
        CONFIGS[family] | {"num_key_value_heads": 3}
    )
    assert "`num_key_value_heads`" in refusal(CONFIGS[family] | {"num_key_value_heads": 8})


@pytest.mark.parametrize("family", OWN_HEADS)
def test_heads_that_share_the_width_must_split_it(family):
    assert "`num_attention_heads`: 3 heads must split hidden_size 16" in refusal(
        CONFIGS[family] | {"num_attention_heads": 3}
    )
    assert "even head_dim" in refusal(CONFIGS[family] | {"hidden_size": 20})  # heads of 5
    for value in (8, "4", [4], math.nan, 0):
        assert "`head_dim`" in refusal(CONFIGS[family] | {"head_dim": value})


def test_a_head_dim_of_its_own_must_be_even():
    for value in (7, 0, -2, 1.5, "8", math.nan, 2**30):
        assert "`head_dim`" in refusal(CONFIGS["a2d_qwen3"] | {"head_dim": value})


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b'"x"', b"null", b"\xff\xfe", b'{"a": 1' * 10])
def test_what_is_no_config_json_is_refused(content):
    with pytest.raises(UserError, match=r"some/config\.json") as refused:
        parse_config({"config.json": content}, "some/config.json")
    assert str(refused.value).count("\n") <= 1
