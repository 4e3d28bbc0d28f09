"""python -m launch.random_llada --size=6m --tokenizer=FOLDER --out=DIR: a published folder of random weights.

For benchmarks and for trying out commands: the architecture and the tensors' names are the published ones, the numbers
say nothing. Tensors are made and written in pieces, so that memory does not grow with the model.
"""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from transformers import PreTrainedTokenizerBase

from conversion.to_hf import shard_size
from elbo_kto_jax import cli
from elbo_kto_jax.checkpoint import huggingface, names, store
from elbo_kto_jax.errors import UserError
from elbo_kto_jax.model.config import ModelConfig

SIZES = {
    "6m": {
        "d_model": 256,
        "n_layers": 6,
        "n_heads": 8,
        "n_kv_heads": 8,
        "mlp_hidden_size": 768,
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
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
EOS, MASK = "<|endoftext|>", "<|mdm_mask|>"


def main(argv: list[str]) -> dict:
    parser = cli.Flags("launch.random_llada", "Writes a LLaDA with random weights as a Hugging Face folder.")
    parser.add_argument("--size", choices=SIZES, default="6m", help="of the model (default: %(default)s)")
    parser.add_argument("--tokenizer", required=True, help="folder with LLaDA's tokenizer files")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="of the weights (default: %(default)s)")
    parser.add_argument("--shard-size", type=shard_size, default="5GB", help="bytes per file (default: 5GB)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace the published checkpoint at --out")
    flags, _ = parser.parse(argv)
    out = Path(flags.out)
    store.check_destination(out, flags.overwrite, huggingface.is_published)
    folder = Path(flags.tokenizer)
    if not folder.is_dir():
        raise UserError(f"--tokenizer={folder}: no such folder")
    assets = {name: data for name, data in huggingface.read_assets(folder).items() if name != huggingface.CONFIG_FILE}
    tokenizer = store.build_tokenizer(assets, str(folder))
    config = published_config(tokenizer, torch_dtype=flags.dtype, **SIZES[flags.size])
    assets[huggingface.CONFIG_FILE] = json.dumps(config, indent=1).encode()
    sizes = write(out, config, assets, _DTYPES[flags.dtype], flags.seed, flags.shard_size)
    return {"tensors": len(sizes), "bytes": sum(sizes.values()), "out": str(out)}


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


def write(out: Path, config: dict, assets: dict[str, bytes], dtype: np.dtype, seed: int, shard: int) -> dict[str, int]:
    """Writes the folder and returns the bytes of each tensor; a tensor is a function of the seed and its name."""
    tensors = names.published_tensors(ModelConfig.from_hf(config, str(out)))

    def read(name: str) -> Iterator[np.ndarray]:
        rng, (rows, *columns) = np.random.default_rng([seed, zlib.crc32(name.encode())]), tensors[name].shape
        for start in range(0, rows, names.ROWS):
            shape = (min(names.ROWS, rows - start), *columns)
            values = 0.02 * rng.standard_normal(shape, np.float32) if columns else np.ones(shape, np.float32)
            yield values.astype(dtype)

    structs = {name: jax.ShapeDtypeStruct(tensor.shape, dtype) for name, tensor in tensors.items()}
    huggingface.write_folder(out, assets, structs, read, shard)
    return {name: struct.size * dtype.itemsize for name, struct in structs.items()}


if __name__ == "__main__":
    cli.run(main)
