"""Reading and writing the published form of a checkpoint: a folder of safetensors, config.json and tokenizer.

Nothing is read before it is asked for: opening a folder reads the headers of its safetensors files, and every tensor is
then read slice by slice, so that each process of a mesh reads only what it owns. Written, too, a tensor is never whole
in memory unless it is small.
"""

import collections
import dataclasses
import functools
import glob
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # importing it makes numpy and safetensors know bfloat16
import numpy as np
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from elbo_kto_jax.checkpoints import names
from elbo_kto_jax.checkpoints.buffers import Buffers
from elbo_kto_jax.checkpoints.finite import check_finite
from elbo_kto_jax.models import registry
from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.models.registry import read_config
from elbo_kto_jax.models.table import Parameter, TreePath
from elbo_kto_jax.runtime.errors import UserError, shown
from elbo_kto_jax.runtime.files import ahead, from_json, writing

log = logging.getLogger(__name__)
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
DTYPE_NAMES = tuple(dtype.name for dtype in DTYPES.values())
_DTYPE_KEYS = ("torch_dtype", "dtype")  # of config.json: transformers 4 and 5

# What a checkpoint carries besides its weights: the configuration, the tokenizer, and the Python files to which the
# `auto_map` of config.json points (copied so that an exported folder is complete; never executed here).
_ASSETS = (
    CONFIG_FILE,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
_CODE = ("configuration_*.py", "modeling_*.py", "tokenization_*.py", "generation_utils.py")


@dataclasses.dataclass(frozen=True)
class HuggingFaceFolder:
    """An opened folder whose tensors have all been found, with the expected names and shapes.

    Attributes:
      path: the folder.
      config: the architecture, from config.json.
      files: published tensor name -> safetensors file that holds it.
      dtypes: published tensor name -> stored dtype.
      offsets: published tensor name -> where its bytes start in the file.
    """

    path: Path
    config: ModelConfig
    files: Mapping[str, Path]
    dtypes: Mapping[str, np.dtype]
    offsets: Mapping[str, int]

    def read(self, name: str, index: tuple[slice, ...], buffers: Buffers | None = None) -> np.ndarray:
        """The slice `index` of the published tensor `name`, in its stored dtype.

        It is a view of the file or, where `index` asks for whole rows, in one of `buffers`: pages that are mapped are
        read from a disk as they are touched, which for a transposed copy is in no good order.
        """
        original = names.published_duplicates(self.config).get(name, name)
        file, dtype, shape = self.files[name], self.dtypes[name], names.published_tensors(self.config)[original].shape
        try:
            view = np.memmap(file, dtype, "r", self.offsets[name], shape)[index]
            if buffers is None or view.shape[1:] != shape[1:]:
                return view
            rows = buffers.empty(view.shape, dtype)
            with file.open("rb") as opened:
                opened.seek(self.offsets[name] + (index[0].start or 0) * rows[:1].nbytes)
                if opened.readinto(rows.view(np.uint8)) != rows.nbytes:
                    raise ValueError(f"it ends within tensor {name}")
            return rows
        except (ValueError, OSError) as error:
            raise _damaged(file, error) from error

    def read_leaf(
        self, leaf: Parameter, index: tuple[slice, ...], dtype: np.dtype, buffers: Buffers | None = None
    ) -> np.ndarray:
        """The slice `index` of a leaf of our tree, filled layer by layer into one array of type `dtype`.

        `buffers` has the array, and one more for each layer; None: it is a new one.

        Raises:
          UserError: a value is too large for `dtype`.
        """
        index = tuple(slice(*axis.indices(size)) for axis, size in zip(index, leaf.shape, strict=True))
        out = (np if buffers is None else buffers).empty(tuple(axis.stop - axis.start for axis in index), dtype)
        within_layer = index[1:] if leaf.stacked else index
        published_index = within_layer[::-1] if leaf.transposed else within_layer
        rows = zip(leaf.tensors[index[0]], out, strict=True) if leaf.stacked else [(leaf.tensors[0], out)]
        for name, row in rows:
            tensor = self.read(name, published_index, buffers)
            names.convert(row, tensor.T if leaf.transposed else tensor, f"{self.files[name]}: tensor {name}")
        return out


def is_published(folder: os.PathLike) -> bool:
    """Whether `folder` looks like a published checkpoint."""
    return (Path(folder) / CONFIG_FILE).is_file() and any(Path(folder).glob("*.safetensors"))


def read_assets(folder: Path) -> dict[str, bytes]:
    """The configuration and tokenizer files of a published folder, byte for byte.

    Raises:
      UserError: one is a link to a file of somebody else's.
    """
    named = [folder / name for name in _ASSETS if (folder / name).is_file()]
    found = named + sorted(file for pattern in _CODE for file in folder.glob(pattern) if file.is_file())
    for file in found:
        check_link(file, folder)
    return {file.name: file.read_bytes() for file in found}


def check_link(file: Path, folder: Path) -> None:
    """Checks that a file of the checkpoint `folder` is not a link out of it: what it holds would be published with it.

    In the hub's cache the files of snapshots/COMMIT are links to ../../blobs.

    Raises:
      UserError: it is one.
    """
    target, home = file.resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs"
    if target.is_relative_to(home) or (home.parent.name == "snapshots" and target.parent == blobs):
        return
    raise UserError(f"{file}: a link to {target}, outside of the checkpoint; it is not read: put a copy in its place")


def parse_config(assets: Mapping[str, bytes], where: str) -> ModelConfig:
    """The architecture in the config.json among `assets`; `where` names that file in errors.

    Raises:
      UserError: it is missing, is not JSON, or describes a network that is not implemented.
    """
    if CONFIG_FILE not in assets:
        raise UserError(f"{where}: no such file; a model needs its config.json")
    try:
        mapping = from_json(assets[CONFIG_FILE])
    except ValueError as error:
        raise UserError(f"{where}: not readable as JSON ({error}); download or copy the file again") from error
    if not isinstance(mapping, dict):
        raise UserError(f"{where}: expected a JSON object with the keys of a config.json")
    return read_config(mapping, where)


def with_dtype(assets: Mapping[str, bytes], tensors: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, bytes]:
    """`assets` whose config.json names the dtype of `tensors` (of several: of the most bytes).

    Where it names that one or none, it stays as it is, byte for byte.
    """
    mapping = from_json(assets[CONFIG_FILE])
    sizes: collections.Counter[str] = collections.Counter()
    for tensor in tensors.values():
        sizes[tensor.dtype.name] += tensor.size * tensor.dtype.itemsize
    ((dtype, _),) = sizes.most_common(1)
    named = [key for key in _DTYPE_KEYS if mapping.get(key) is not None]
    if all(str(mapping[key]).removeprefix("torch.") == dtype for key in named):
        return dict(assets)
    return _with_keys(assets, dict.fromkeys(named, dtype))


def with_mask(assets: Mapping[str, bytes], mask_token_id: int | None) -> dict[str, bytes]:
    """`assets` whose config.json says the mask token; None: whatever it says, it stays as it is, byte for byte."""
    return dict(assets) if mask_token_id is None else _with_keys(assets, {"mask_token_id": mask_token_id})


def _with_keys(assets: Mapping[str, bytes], changes: Mapping[str, Any]) -> dict[str, bytes]:
    mapping = from_json(assets[CONFIG_FILE]) | changes
    return {**assets, CONFIG_FILE: (json.dumps(mapping, indent=2, ensure_ascii=False) + "\n").encode()}


def download(hub_id: str, flag: str, weights: bool) -> Path:
    """The local snapshot of a hub model, from the Hugging Face cache or downloaded into it.

    Only safetensors, configuration and tokenizer are fetched, and none of it is ever executed.

    Args:
      hub_id: ORGANISATION/NAME, or ORGANISATION/NAME@REVISION with a branch, tag or commit.
      flag: the flag that named the model, for the error.
      weights: also the safetensors files; otherwise only the configuration and the tokenizer.

    Raises:
      UserError: it is neither in the cache nor can it be downloaded.
    """
    from huggingface_hub import snapshot_download  # here: a local folder does not need the second that it takes

    name, _, revision = hub_id.partition("@")
    patterns = [*_ASSETS, *_CODE, *([INDEX_FILE, "*.safetensors"] if weights else [])]
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # the hub's own errors, and those of an HTTP library that changes between its versions
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        folder = name.rpartition("/")[2]
        pin = f" --revision {revision}" if revision else ""
        raise UserError(
            f"{flag}={hub_id}: no such folder here, and not available from the Hugging Face hub ({reason})\n"
            f"Where there is a network: `hf download {name}{pin} --local-dir {folder}`; then set {flag}={folder}"
        ) from error
    log.info("%s: revision %s", name, folder.name)  # the commit, by which the cache names the folder
    return folder


def open_folder(folder: Path) -> HuggingFaceFolder:
    """Opens a published folder and checks that it holds exactly the tensors that its config.json asks for.

    Raises:
      UserError: a file is missing or damaged, or a tensor is missing, unknown, mis-shaped or of an unsupported dtype.
    """
    config = parse_config(read_assets(folder), str(folder / CONFIG_FILE))
    expected, duplicates = names.published_tensors(config), names.published_duplicates(config)
    files, shapes, dtypes, offsets = {}, {}, {}, {}
    for shard, listed in _shards(folder).items():
        with _open(shard) as file:
            found = set(file.keys())
            for name in sorted(listed - found):
                raise UserError(
                    f"{shard}: tensor {_name(name)} is missing, {folder / INDEX_FILE} says it is in this file"
                )
            for name in sorted(found):
                header = file.get_slice(name)
                if name not in expected | duplicates or name in files:
                    what = (
                        "twice in this checkpoint" if name in files else "not a tensor of the model of its config.json"
                    )
                    raise UserError(
                        f"{shard}: tensor {_name(name)} is {what}; remove it or correct {folder / CONFIG_FILE}"
                    )
                if header.get_dtype() not in DTYPES:
                    raise UserError(
                        f"{shard}: tensor {name} is stored as {header.get_dtype()}; expected one of {', '.join(DTYPES)}"
                    )
                files[name], shapes[name] = shard, tuple(header.get_shape())
                dtypes[name] = DTYPES[header.get_dtype()]
        offsets |= _data_offsets(shard)
    for name in expected:
        if name not in files:
            raise UserError(f"{folder}: tensor {name} is missing; its config.json asks for {config.n_layers} layers")
    for name in files:
        shape = expected[duplicates.get(name, name)].shape
        if shapes[name] != shape:
            raise UserError(
                f"{files[name]}: tensor {name}: expected shape {shape} by {folder / CONFIG_FILE}, got {shapes[name]}"
            )
    opened = HuggingFaceFolder(folder, config, files, dtypes, offsets)
    for name, original in duplicates.items():
        if name in files and not _same_values(opened, name, original):
            raise UserError(
                f"{files[name]}: tensor {name} differs from {original}, and {folder / CONFIG_FILE} says that the two "
                "are one (`tie_word_embeddings`); remove the wrong one, or set the key to false if both are meant"
            )
    return opened


def _same_values(folder: HuggingFaceFolder, name: str, other: str) -> bool:
    """Whether two tensors of one shape have the same dtype and values."""
    rows = names.published_tensors(folder.config)[other].shape[0]
    parts = [(slice(start, min(start + names.ROWS, rows)),) for start in range(0, rows, names.ROWS)]
    return folder.dtypes[name] == folder.dtypes[other] and all(
        np.array_equal(folder.read(name, part), folder.read(other, part)) for part in parts
    )


def load_params(
    folder: HuggingFaceFolder,
    dtype: np.dtype | None,
    sharding_of: Callable[[TreePath], jax.sharding.Sharding],
) -> dict:
    """The parameter tree of an opened folder; each process reads only the slices that its devices hold.

    Args:
      dtype: dtype of every leaf; None keeps the stored one.
      sharding_of: path of a leaf -> its sharding.

    Raises:
      UserError: a value is NaN or infinite, or layers of one leaf are stored in different dtypes and `dtype` is None.
    """
    params = {}
    leaves = registry.parameters(folder.config)
    for path, leaf in tqdm(leaves.items(), desc="reading weights", unit="leaf", disable=None, leave=False):
        leaf_dtype = stored_dtype(folder, leaf) if dtype is None else dtype
        read = functools.partial(folder.read_leaf, leaf, dtype=leaf_dtype)
        params[path] = jax.make_array_from_callback(leaf.shape, sharding_of(path), read)
        check_finite(params[path], [f"{folder.files[name]}: tensor {name}" for name in leaf.tensors])
    return names.unflatten(params)


def write_folder(
    out: Path,
    assets: Mapping[str, bytes],
    tensors: Mapping[str, jax.ShapeDtypeStruct],
    read: Callable[[str], Iterable[np.ndarray]],
    shard_size: int,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Writes a published folder beside `out` and puts it in the place of `out` once it is whole.

    Args:
      assets: config.json and the tokenizer's files. They are written last, since nothing loads a folder without them.
      tensors, read, shard_size: see `write_shards`.
      check: called when everything has been read; what it raises undoes the folder.
    """
    for left in out.parent.glob(f".{glob.escape(out.name)}.*.partial"):  # by one that was killed
        shutil.rmtree(left, ignore_errors=True)  # not what a link points to
    partial = out.with_name(f".{out.name}.{secrets.token_hex(8)}.partial")  # mkdir makes it: nobody can have put a link
    try:
        with writing(out):
            partial.mkdir(parents=True)
            write_shards(partial, tensors, read, shard_size)
            check()
            for name, content in assets.items():
                (partial / name).write_bytes(content)
            if out.exists():
                shutil.rmtree(out)
            partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_shards(
    folder: Path,
    tensors: Mapping[str, jax.ShapeDtypeStruct],
    read: Callable[[str], Iterable[np.ndarray]],
    shard_size: int,
) -> None:
    """Writes safetensors files of at most `shard_size` bytes of tensors (or one larger tensor) each, and the index.

    Args:
      folder: existing folder to write into.
      tensors: published name -> shape and dtype, in the order of writing.
      read: published name -> the tensor, in pieces along its first axis; called once per tensor, in that order.
    """
    sizes = {name: tensor.size * tensor.dtype.itemsize for name, tensor in tensors.items()}
    shards: list[list[str]] = []
    used = shard_size
    for name, size in sizes.items():
        if used + size > shard_size:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    # A single file keeps the name that Hugging Face gives it, and has an index too: readers that go by either find it.
    file_names = [SINGLE_FILE]
    if len(shards) > 1:
        file_names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    weight_map = {name: file for file, shard in zip(file_names, shards, strict=True) for name in shard}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
    with tqdm(total=sum(sizes.values()), desc="writing weights", unit="B", unit_scale=True, disable=None) as bar:
        for file_name, shard in zip(file_names, shards, strict=True):
            with (folder / file_name).open("wb") as file:
                file.write(_safetensors_header({name: tensors[name] for name in shard}))
                for piece in ahead(piece for name in shard for piece in read(name)):
                    file.write(np.ascontiguousarray(piece).view(np.uint8).data)
                    bar.update(piece.nbytes)
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _safetensors_header(tensors: Mapping[str, jax.ShapeDtypeStruct]) -> bytes:
    """What stands before the data of a safetensors file: the length of a JSON object, and where each tensor lies."""
    dtypes, header, end = {dtype: name for name, dtype in DTYPES.items()}, {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.size * tensor.dtype.itemsize
        header[name] = {"dtype": dtypes[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data is aligned
    return len(text).to_bytes(8, "little") + text


def stored_dtype(folder: HuggingFaceFolder, leaf: Parameter) -> np.dtype:
    """The one dtype in which every layer of `leaf` is stored.

    Raises:
      UserError: the layers differ.
    """
    first = leaf.tensors[0]
    for name in leaf.tensors:
        if folder.dtypes[name] != folder.dtypes[first]:
            raise UserError(
                f"{folder.files[name]}: tensor {name} is {folder.dtypes[name]} but {first} is {folder.dtypes[first]}; "
                "layers are stacked and need one dtype: name it (--dtype, model.param_dtype)"
            )
    return folder.dtypes[first]


def _name(tensor: str) -> str:
    """A name from a file as it stands in a message: printable and not long."""
    return shown(tensor)[1:-1]


def _open(file: Path):
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> UserError:
    return UserError(f"{file}: damaged or incomplete safetensors file ({error}); download or copy it again")


def _data_offsets(file: Path) -> dict[str, int]:
    """Where the bytes of each tensor start in a safetensors file that has been opened, and so checked, before.

    The library tells neither this nor lets one read into memory that is there already.
    """
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    return {name: 8 + length + tensor["data_offsets"][0] for name, tensor in header.items() if name != "__metadata__"}


def _shards(folder: Path) -> dict[Path, set[str]]:
    """Safetensors file -> the names that the index promises in it (none promised for a single file)."""
    if (folder / SINGLE_FILE).is_file():
        return {folder / SINGLE_FILE: set()}
    index = folder / INDEX_FILE
    if not index.is_file():
        if any(folder.glob("*.bin")):
            raise UserError(
                f"{folder}: only PyTorch .bin weights, which are not read; "
                f"save the model with safe_serialization=True to get {SINGLE_FILE}"
            )
        raise UserError(f"{folder}: no weights; expected {SINGLE_FILE} or {INDEX_FILE} with the files that it lists")
    try:
        weight_map = from_json(index.read_bytes())["weight_map"]
        shards: dict[Path, set[str]] = {}
        for name, file_name in weight_map.items():
            if Path(file_name).name != file_name or file_name in ("", ".."):
                raise UserError(f"{index}: {shown(file_name)} is not the name of a file in this folder; it is not read")
            shards.setdefault(folder / file_name, set()).add(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not a safetensors index ({error!r}); download or copy it again") from error
    for shard, listed in shards.items():
        if not shard.is_file():
            raise UserError(
                f"{shard}: no such file; {INDEX_FILE} lists it for tensor {_name(min(listed))}: download it"
            )
    return shards
