"""A tiny model of any architecture with random weights and a tokenizer of its own, for the quickstart and tests."""

import json
import tempfile
from pathlib import Path
from typing import Any

import jax
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from elbo_kto_jax.checkpoints.assets import CONFIG_FILE
from elbo_kto_jax.checkpoints.conversion import shard_size, write_published
from elbo_kto_jax.checkpoints.model import Model, Source
from elbo_kto_jax.checkpoints.random_folder import EOS, MASK, published_config
from elbo_kto_jax.models import registry
from elbo_kto_jax.models.network import MaskPredictor, init_params

BOS, START_HEADER, END_HEADER, EOT = "<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
CHAT_TEMPLATE = (  # the published one
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)

_DIMENSIONS = {
    "d_model": 64,
    "n_layers": 2,
    "n_heads": 2,
    "n_kv_heads": 2,
    "mlp_hidden_size": 128,
    "max_sequence_length": 128,
    "embedding_size": 128,  # rows beyond vocab_size are not used, as in the published models
}


def write_untrained(folder: Path, seed: int, architecture: str = "llada", **dimensions: int) -> None:
    """Writes a tiny model with random weights and its tokenizer as a Hugging Face folder; `dimensions` are fields of
    its ModelConfig that differ from the quickstart's."""
    tokenizer = tiny_tokenizer()
    fields: dict[str, Any] = _DIMENSIONS | dimensions
    config = published_config(tokenizer, architecture, **fields)
    assets = {CONFIG_FILE: json.dumps(config, indent=1).encode()}
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        assets |= {file.name: file.read_bytes() for file in Path(scratch).iterdir()}
    model_config = registry.read_config(config, str(folder))
    params = init_params(MaskPredictor(model_config), jax.random.key(seed))
    model = Model(model_config, params, assets, str(folder))
    write_published(folder, Source.of(model), shard_size("5GB"))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: ASCII, the words of the chat template, LLaDA's special tokens and template."""
    vocabulary = {token: i for i, token in enumerate(["Ċ", "Ġ", *map(chr, range(ord("!"), ord("~") + 1))])}
    merges = []
    for word in ("user", "assistant", "Capitals", "ĊĊ"):
        for end in range(2, len(word) + 1):
            merges.append((word[: end - 1], word[end - 1]))
            vocabulary[word[:end]] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = (BOS, EOS, MASK, START_HEADER, END_HEADER, EOT)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
