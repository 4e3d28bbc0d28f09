"""models/config.py: what a config.json may carry along, what it may not ask for, and how both are told."""

import json

import pytest

from elbo_kto_jax.models.registry import read_config
from elbo_kto_jax.runtime.errors import UserError
from tests.published import CONFIG

MOE = {
    "architectures": ["LLaDAMoEModelLM"],
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "model_type": "llada",
    "vocab_size": 1088,
}


def refusal(mapping) -> str:
    with pytest.raises(UserError) as refused:
        read_config(mapping, "here")
    assert len(str(refused.value)) < 500
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_attn_implementation_autoset", True),
        ("_attn_implementation", "sdpa"),
        ("_attn_implementation_internal", "eager"),
        ("_commit_hash", "0123abc"),
        ("_name_or_path", "somebody/LLaDA"),
        ("attn_implementation", "flash_attention_2"),
        ("unsloth_version", "2025.3.19"),
        ("unsloth_fixed", True),
        ("id2label", {"0": "LABEL_0", "1": "LABEL_1"}),
        ("label2id", {"LABEL_0": 0, "LABEL_1": 1}),
        ("max_length", 20),
        ("temperature", 1.0),
        ("top_k", 50),
        ("num_beams", 1),
        ("repetition_penalty", 1.0),
        ("torchscript", True),
        ("output_attentions", True),
        ("tokenizer_class", "PreTrainedTokenizerFast"),
        ("transformers.js_config", {"dtype": "q4"}),
        ("dtype", "bfloat16"),
        ("is_decoder", False),
        ("pruned_heads", {}),
    ],
)
def test_bookkeeping_changes_nothing(key, value):
    assert read_config(CONFIG | {key: value}, "here") == read_config(CONFIG, "here")


def test_what_transformers_writes_for_every_model_is_bookkeeping():
    from transformers import PretrainedConfig

    class LLaDAConfig(PretrainedConfig):
        model_type = "llada"

    mapping = json.loads(LLaDAConfig(**{k: v for k, v in CONFIG.items() if k != "model_type"}).to_json_string(False))
    assert mapping.keys() > CONFIG.keys()
    assert read_config(mapping, "here") == read_config(CONFIG, "here")


@pytest.mark.parametrize("key", ["is_encoder_decoder", "is_decoder", "add_cross_attention", "quantization", "sparse"])
def test_what_changes_the_network_is_no_bookkeeping(key):
    assert f"`{key}`" in refusal(CONFIG | {key: {"bits": 4} if key == "quantization" else True})


@pytest.mark.parametrize(
    ("mapping", "named"),
    [
        (MOE, "num_experts"),
        (MOE | {"model_type": "llada_moe"}, "num_experts"),
        (MOE | {"num_experts": None}, "architectures"),
        (MOE | {"architectures": None}, "num_experts"),
        ({"model_type": "llada2_moe", "num_hidden_layers": 3}, "model_type"),
        (CONFIG | {"num_experts": 64}, "num_experts"),
    ],
)
def test_a_mixture_of_experts_is_called_by_its_name(mapping, named):
    message = refusal(mapping)
    assert f"`{named}`" in message
    assert "LLaDA-MoE" in message
    assert "not supported" in message


def test_a_key_that_is_not_in_the_file_is_not_shown_as_if_it_were():
    message = refusal({key: value for key, value in CONFIG.items() if key != "activation_type"})
    assert message.startswith("here: `activation_type` is missing, which means 'swiglu'")


@pytest.mark.parametrize("key", [key for key, value in CONFIG.items() if type(value) in (int, float)])
@pytest.mark.parametrize("value", [2**63, 2**64, 10**400, -(10**400), 1e308, -1, float("nan"), float("inf")])
def test_a_dimension_that_no_network_has_is_refused(key, value):
    assert f"`{key}`" in refusal(CONFIG | {key: value})


@pytest.mark.parametrize("key", ["n_layers", "d_model", "mlp_hidden_size", "max_sequence_length", "vocab_size"])
def test_two_to_the_31_is_too_large_for_anything_that_is_counted(key):
    assert f"`{key}`" in refusal(CONFIG | {key: 2**31})


@pytest.mark.parametrize("value", ["x" * 10**6, [[0] * 10**5] * 3, {str(i): i for i in range(10**5)}, 10**4000])
@pytest.mark.parametrize("key", ["d_model", "model_type", "block_type", "sliding_window", "n_layers"])
def test_a_large_value_is_not_shown_whole(key, value):
    assert f"`{key}`" in refusal(CONFIG | {key: value})


def test_a_deep_value_is_shown_flat():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert "`sliding_window`: [[[" in refusal(CONFIG | {"sliding_window": deep})


def test_a_long_key_is_not_shown_whole():
    assert "xxx" in refusal(CONFIG | {"x" * 10**6: 1})
    assert "\x1b" not in refusal(CONFIG | {"\x1b[31m": 1})
