"""Small published checkpoints with random bits, for the tests of everything that reads or writes one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from elbo_kto_jax.checkpoints import names
from elbo_kto_jax.checkpoints.training_state import TrainingState
from elbo_kto_jax.models.registry import read_config

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
CONFIG = {
    "model_type": "llada",
    "activation_type": "silu",
    "attention_dropout": 0.0,
    "block_type": "llama",
    "d_model": 16,
    "embedding_dropout": 0.0,
    "embedding_size": 48,
    "eos_token_id": 37,
    "include_bias": False,
    "layer_norm_type": "rms",
    "mask_token_id": 39,
    "max_sequence_length": 32,
    "mlp_hidden_size": 24,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 2,
    "pad_token_id": 37,
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_theta": 500000.0,
    "vocab_size": 40,
    "weight_tying": False,
}


def write_published(
    folder: Path,
    *,
    dtype: str = "float32",
    shards: int = 2,
    bits: bool = False,
    finite: bool = True,
    edit: Callable[[dict[str, np.ndarray]], None] | None = None,
) -> dict[str, np.ndarray]:
    """Writes a published checkpoint and returns its tensors.

    Args:
      shards: number of safetensors files; 1: one file without an index.
      bits: random bits instead of Gaussian values; each tensor starts with -0.0.
      finite: no NaNs and infinities among them.
      edit: changes the dictionary of tensors before it is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    tensors = {}
    for name, tensor in names.published_tensors(read_config(CONFIG, "test")).items():
        if bits:
            word = np.dtype(f"uint{8 * np.dtype(DTYPES[dtype]).itemsize}")
            words = rng.integers(0, np.iinfo(word).max, tensor.shape, word, endpoint=True)
            infinity = np.array(np.inf, DTYPES[dtype]).view(word)
            if finite:
                words[words & infinity == infinity] &= ~infinity
            values = words.view(DTYPES[dtype])
            values[(0,) * values.ndim] = -0.0
        else:
            values = rng.normal(size=tensor.shape).astype(DTYPES[dtype])
        tensors[name] = values
    if edit is not None:
        edit(tensors)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))
    (folder / "tokenizer.json").write_bytes(b'{"not": "read here", "bytes": "\xc3\xa9"}\r\n')
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return tensors
    weight_map = {}
    for i, part in enumerate(np.array_split(list(tensors), shards), start=1):
        file_name = f"model-{i:05d}-of-{shards:05d}.safetensors"
        save_file({str(name): tensors[name] for name in part}, folder / file_name)
        weight_map |= {str(name): file_name for name in part}
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def read_published(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder of safetensors, read without the code under test."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal shape, dtype and bits: NaNs compare by their bits, and -0.0 is not 0.0."""
    a, b = np.asarray(a), np.asarray(b)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def assert_same_trees(a: Any, b: Any) -> None:
    """Equal structure, and `same_bits` of every leaf."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert all(same_bits(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def abstract_state(state: TrainingState, sharding: jax.sharding.Sharding | None = None) -> TrainingState:
    """What to restore `state` as: on one device, or in the sharding."""
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def as_struct(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return TrainingState(jax.tree.map(as_struct, state.params), jax.tree.map(as_struct, state.opt_state), {})


def write_version_1(manifest: Path, *missing: str) -> None:
    """Makes the manifest.json of a checkpoint one of the first version, which had no checksum, without those keys."""
    said = json.loads(manifest.read_text())
    said = {key: value for key, value in said.items() if key not in ("checksum", *missing)}
    manifest.write_text(json.dumps({**said, "version": 1}))
