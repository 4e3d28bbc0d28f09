"""A published folder of random weights: the architecture and the tensors' names are real, the numbers say nothing.

For benchmarks and for trying out commands. Tensors are made and written in pieces, so that memory does not grow with
the model.
"""

import dataclasses
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from transformers import PreTrainedTokenizerBase

from elbo_kto_jax.checkpoints import names
from elbo_kto_jax.checkpoints.assets import CONFIG_FILE, read_assets
from elbo_kto_jax.checkpoints.publish import write_folder
from elbo_kto_jax.checkpoints.tokenizer import build_tokenizer
from elbo_kto_jax.models import registry
from elbo_kto_jax.runtime.errors import UserError

_SMALL = {  # heads of 128, as in every model that users have
    "d_model": 512,
    "n_layers": 6,
    "n_heads": 4,
    "n_kv_heads": 4,
    "head_dim": 128,
    "mlp_hidden_size": 1536,
    "max_sequence_length": 4096,
    "embedding_size": 2048,
}
SMALL = "23m"
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
EOS, MASK = "<|endoftext|>", "<|mdm_mask|>"
_MASKS = (MASK, "<|mask|>")  # of LLaDA's tokenizer, and of Dream's
SHARD_SIZE = 5 * 10**9  # bytes of a file


def dimensions(size: str, architecture: str = "llada") -> dict[str, int]:
    """The dimensions of a model: SMALL, or the name of a published size (models/registry.py).

    Raises:
      UserError: the architecture has no model of that size.
    """
    if size == SMALL:
        return dict(_SMALL)
    sizes = registry.architectures()[architecture].sizes
    if size not in sizes:
        raise UserError(f"--size={size}: {architecture} has {', '.join([SMALL, *sizes])}")
    return {name: getattr(sizes[size], name) for name in _SMALL}


def write(
    out: Path,
    tokenizer: Path,
    dimensions: Mapping[str, int],
    *,
    architecture: str = "llada",
    dtype: str = "float32",
    seed: int = 0,
    shard_size: int = SHARD_SIZE,
) -> dict[str, int]:
    """Writes the folder `out` with the tokenizer of another folder, and returns the bytes of each tensor.

    A tensor is a function of the seed and its name.

    Args:
      dimensions: fields of a ModelConfig, such as a value of `dimensions`.
      architecture: a file of models/.
      dtype: a key of DTYPES.

    Raises:
      UserError: the tokenizer's folder is missing or holds none.
    """
    if not tokenizer.is_dir():
        raise UserError(f"{tokenizer}: no such folder; name one with the model's tokenizer files")
    assets = {name: data for name, data in read_assets(tokenizer).items() if name != CONFIG_FILE}
    built = build_tokenizer(assets, str(tokenizer))
    config = published_config(built, architecture, torch_dtype=dtype, **dimensions)
    assets[CONFIG_FILE] = json.dumps(config, indent=1).encode()
    model = registry.read_config(config, str(out))
    tensors = names.published_tensors(model)
    rows = {name: row for row in registry.parameters(model).values() for name in row.tensors}

    def read(name: str) -> Iterator[np.ndarray]:
        rng, (size, *columns) = np.random.default_rng([seed, zlib.crc32(name.encode())]), tensors[name].shape
        for start in range(0, size, names.ROWS):
            shape = (min(names.ROWS, size - start), *columns)
            if rows[name].init == "normal":
                values = 0.02 * rng.standard_normal(shape, np.float32)
            else:
                values = np.full(shape, 1.0 if rows[name].init == "ones" else 0.0)
            yield values.astype(DTYPES[dtype])

    structs = {name: jax.ShapeDtypeStruct(tensor.shape, DTYPES[dtype]) for name, tensor in tensors.items()}
    write_folder(out, assets, structs, read, shard_size)
    return {name: struct.size * DTYPES[dtype].itemsize for name, struct in structs.items()}


def published_config(
    tokenizer: PreTrainedTokenizerBase, architecture: str = "llada", torch_dtype: str = "float32", **dimensions: int
) -> dict[str, Any]:
    """The config.json of the architecture's published model, with other dimensions and the tokenizer's tokens."""
    described = registry.architectures()[architecture]
    published = next(iter(described.sizes.values()))
    tokens = tokenizer.get_vocab()
    mask_id = next((tokens[token] for token in (tokenizer.mask_token, *_MASKS) if token in tokens), None)
    eos_id = tokens.get(EOS) if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if "d_model" in dimensions and "head_dim" not in dimensions:
        dimensions["head_dim"] = dimensions["d_model"] // dimensions["n_heads"]
    rows = max(dimensions.get("embedding_size", 0), len(tokenizer))
    fields: dict[str, Any] = {**dimensions, "embedding_size": rows}
    config = dataclasses.replace(
        published,
        **fields,
        vocab_size=len(tokenizer),
        mask_token_id=mask_id,
        eos_token_id=eos_id,
        pad_token_id=eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    return {**described.published(config), "torch_dtype": torch_dtype}
