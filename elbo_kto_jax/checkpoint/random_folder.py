"""A published folder of random weights: the architecture and the tensors' names are real, the numbers say nothing.

For benchmarks and for trying out commands. Tensors are made and written in pieces, so that memory does not grow with
the model.
"""

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from transformers import PreTrainedTokenizerBase

from elbo_kto_jax.checkpoint import huggingface, names, store
from elbo_kto_jax.errors import UserError
from elbo_kto_jax.model.config import ModelConfig

SIZES = {  # heads of 128, as in every model that users have
    "23m": {
        "d_model": 512,
        "n_layers": 6,
        "n_heads": 4,
        "n_kv_heads": 4,
        "mlp_hidden_size": 1536,
        "max_sequence_length": 4096,
        "embedding_size": 2048,
    },
    "8b": {
        "d_model": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 32,
        "mlp_hidden_size": 12288,
        "max_sequence_length": 4096,
        "embedding_size": 126464,
    },
}
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
EOS, MASK = "<|endoftext|>", "<|mdm_mask|>"
SHARD_SIZE = 5 * 10**9  # bytes of a file


def write(
    out: Path,
    tokenizer: Path,
    dimensions: Mapping[str, int],
    *,
    dtype: str = "float32",
    seed: int = 0,
    shard_size: int = SHARD_SIZE,
) -> dict[str, int]:
    """Writes the folder `out` with the tokenizer of another folder, and returns the bytes of each tensor.

    A tensor is a function of the seed and its name.

    Args:
      dimensions: keys of config.json, such as a value of SIZES.
      dtype: a key of DTYPES.

    Raises:
      UserError: the tokenizer's folder is missing or holds none.
    """
    if not tokenizer.is_dir():
        raise UserError(f"{tokenizer}: no such folder; name one with LLaDA's tokenizer files")
    assets = {
        name: data for name, data in huggingface.read_assets(tokenizer).items() if name != huggingface.CONFIG_FILE
    }
    config = published_config(store.build_tokenizer(assets, str(tokenizer)), torch_dtype=dtype, **dimensions)
    assets[huggingface.CONFIG_FILE] = json.dumps(config, indent=1).encode()
    tensors = names.published_tensors(ModelConfig.from_hf(config, str(out)))

    def read(name: str) -> Iterator[np.ndarray]:
        rng, (rows, *columns) = np.random.default_rng([seed, zlib.crc32(name.encode())]), tensors[name].shape
        for start in range(0, rows, names.ROWS):
            shape = (min(names.ROWS, rows - start), *columns)
            values = 0.02 * rng.standard_normal(shape, np.float32) if columns else np.ones(shape, np.float32)
            yield values.astype(DTYPES[dtype])

    structs = {name: jax.ShapeDtypeStruct(tensor.shape, DTYPES[dtype]) for name, tensor in tensors.items()}
    huggingface.write_folder(out, assets, structs, read, shard_size)
    return {name: struct.size * DTYPES[dtype].itemsize for name, struct in structs.items()}


def published_config(tokenizer: PreTrainedTokenizerBase, **dimensions) -> dict[str, Any]:
    """LLaDA-8B-Instruct's config.json with other dimensions."""
    token_id = tokenizer.convert_tokens_to_ids
    return {
        "model_type": "llada",
        "architectures": ["LLaDAModelLM"],
        "block_type": "llama",
        "activation_type": "silu",
        "layer_norm_type": "rms",
        "rms_norm_eps": 1e-5,
        "rope": True,
        "rope_theta": 500000.0,
        "include_bias": False,
        "include_qkv_bias": False,
        "weight_tying": False,
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "residual_dropout": 0.0,
        "vocab_size": len(tokenizer),
        "mask_token_id": token_id(MASK),
        "eos_token_id": token_id(EOS),
        "pad_token_id": token_id(EOS),
        "torch_dtype": "float32",
        **dimensions,
    }
