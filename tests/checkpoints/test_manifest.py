"""manifest.json: no edit of it goes unnoticed but that of a base's place, and no form of it is a traceback."""

import copy
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from elbo_kto_jax.checkpoints import names
from elbo_kto_jax.checkpoints.digest import params_digest
from elbo_kto_jax.checkpoints.folders import MANIFEST_FILE
from elbo_kto_jax.checkpoints.load import load_config, load_model, open_source
from elbo_kto_jax.checkpoints.manifest import Adaptation
from elbo_kto_jax.checkpoints.training_state import TrainingCheckpoints, TrainingState
from elbo_kto_jax.models import lora
from elbo_kto_jax.runtime.errors import UserError
from tests.published import same_bits, write_published, write_version_1
from tests.share import share

DEEP = "[" * 100_000
VALUES = [
    *(None, [], {}, "", 0, -1, 2, 40.0, True, 2**63, 10**400, 1e308, float("nan"), float("inf")),
    *("x", "complex64", "object", "float64", "../..", "/", "\0", "x" * 10_000, [[]], {"a": 1}),
]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> Path:
    """A step of adapters on a base beside it."""
    folder = tmp_path_factory.mktemp("adapters")
    write_published(folder / "base")
    model = load_model(folder / "base")
    abstract = lora.abstract_adapters(model.params, 2, np.float32)
    params = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), abstract)
    adaptation = Adaptation(2, 4.0, str(folder / "base"), params_digest(model.params))
    state = TrainingState(params, optax.adamw(1e-3).init(params), {"step": 1, "tokens": 7})
    checkpoints = TrainingCheckpoints(folder / "run" / "checkpoints", adaptation=adaptation)
    checkpoints.save(1, state, model.assets)
    checkpoints.close()
    return folder


@pytest.fixture
def step(adapters, tmp_path) -> Path:
    """A copy of it, to damage."""
    return Path(shutil.copytree(adapters / "run" / "checkpoints" / "1", tmp_path / "step"))


def manifest_of(step: Path) -> Path:
    return step / "assets" / MANIFEST_FILE


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as refused:
        call(*args, **kwargs)
    message = str(refused.value)
    assert len(message.splitlines()) <= 2
    assert len(message) < 2000
    return message


def places(value, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value in a JSON object, outermost first."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inner:
        yield from places(child, (*path, key))


def edited(manifest: dict, path: tuple, *value) -> dict:
    """The manifest with another value at that path, or without what is there."""
    manifest = copy.deepcopy(manifest)
    *above, last = path
    node = manifest
    for key in above:
        node = node[key]
    if value:
        node[last] = value[0]
    else:
        del node[last]
    return manifest


def edits(manifest: dict, seed: int, bounded: int) -> Iterator[tuple[tuple, dict]]:
    """A share of all edits of one value, and each of a value that is not deep inside."""
    every = [path for path in places(manifest) if path != ("lora", "base_path")]
    pairs = [(path, value) for path in every for value in ((), *((value,) for value in VALUES))]
    shallow = [pair for pair in pairs if len(pair[0]) < 3]
    for path, value in random.Random(seed).sample(pairs, share(bounded, len(pairs))) + shallow:
        edit = edited(manifest, path, *value)
        if json.dumps(edit) != json.dumps(manifest):
            yield path, edit


def test_every_edit_is_refused(step):
    file = manifest_of(step)
    manifest = json.loads(file.read_text())
    for path, edit in edits(manifest, 0, 500):
        file.write_text(json.dumps(edit))
        assert str(file) in refusal(load_config, step), path
    file.write_text(json.dumps(manifest, indent=3))  # which says the same
    load_model(step)


def test_every_edit_of_a_manifest_without_checksum_is_read_or_refused(step):
    file = manifest_of(step)
    write_version_1(file)
    before = load_model(step).params
    manifest, refused = json.loads(file.read_text()), []
    for _, edit in edits(manifest, 1, 100):
        file.write_text(json.dumps(edit))
        try:
            load_config(step)
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > 100
    assert all(str(file) in message and len(message) < 2000 for message in refused)
    file.write_text(json.dumps(manifest))
    assert jax.tree.all(jax.tree.map(same_bits, before, load_model(step).params))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("lora", "alpha"), None),
        (("lora", "alpha"), float("nan")),
        (("lora", "alpha"), 1e308),
        (("lora", "alpha"), 10**400),
        (("lora", "rank"), 0),
        (("lora", "rank"), 2.0),
        (("lora", "base_digest"), None),
        (("lora", "base_quantization"), "int4"),
        (("lora", "targets"), [1]),
        (("lora", "targets"), None),
        (("trees", "params", "digest"), None),
        (("trees", "params", "digest"), ""),
        (("trees", "opt_state", "digest"), 0),
        (("checksums", "config.json"), None),
        (("trees", "params", "arrays", "blocks/q_proj/lora_a"), [[2, 16, 2], "complex64"]),
        (("trees", "params", "arrays", "blocks/q_proj/lora_a"), [[2, 16, 2], None]),
        (("trees", "params", "arrays", "blocks/q_proj/lora_a"), [[2, 16, -1], "float32"]),
        (("trees", "params", "arrays", "blocks/q_proj/lora_a"), [[2, 16, 2**63], "float32"]),
        (("trees", "params", "arrays", "blocks/q_proj/lora_a"), [[2, 16, 2.0], "float32"]),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_what_switches_a_check_off_or_cannot_be_is_refused(step, path, value, version):
    file = manifest_of(step)
    if version == 1:
        write_version_1(file)
    file.write_text(json.dumps(edited(json.loads(file.read_text()), path, value)))
    assert f"{file}: " in refusal(load_model, step)
    assert str(file) in refusal(open_source, step)


def test_a_checksum_is_not_got_rid_of(step):
    file = manifest_of(step)
    manifest = json.loads(file.read_text())
    without = {key: value for key, value in manifest.items() if key != "checksum"}
    for edit in (without, {**manifest, "checksum": None}, {**manifest, "version": 1}, {**without, "version": 2}):
        file.write_text(json.dumps(edit))
        assert "damaged" in refusal(load_model, step)


def test_a_base_may_be_moved_and_nothing_else_takes_its_place(adapters, step):
    file = manifest_of(step)
    before = load_model(step).params
    manifest = json.loads(file.read_text())
    moved = step.parent / "moved"
    shutil.copytree(adapters / "base", moved)
    file.write_text(json.dumps(edited(manifest, ("lora", "base_path"), str(moved))))
    assert jax.tree.all(jax.tree.map(same_bits, before, load_model(step).params))
    others = [str(step), str(adapters / "run"), str(step.parent), str(file), "/dev/null", "/proc/self/mem"]
    for path in (*others, None, [], {}, 1, "", "\0", "x" * 200, "a/../b", "no scheme://a"):
        file.write_text(json.dumps(edited(manifest, ("lora", "base_path"), path)))
        assert str(file) in refusal(load_model, step), path


@pytest.mark.parametrize("version", [1, 2])
def test_adapters_do_not_stand_on_adapters(adapters, step, version):
    """Two folders, each the base of the other."""
    second = shutil.copytree(step, step.parent / "second")
    for folder, base in ((step, second), (second, step)):
        file = manifest_of(folder)
        if version == 1:
            write_version_1(file)
        file.write_text(json.dumps(edited(json.loads(file.read_text()), ("lora", "base_path"), str(base))))
    assert f"{second} holds adapters itself" in refusal(load_model, step)


def abstract(step: Path) -> TrainingState:
    arrays = json.loads(manifest_of(step).read_text())["trees"]["params"]["arrays"]
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    leaves = {tuple(path.split("/")): jnp.zeros(shape, dtype) for path, (shape, dtype) in arrays.items()}
    params = names.unflatten(leaves)
    as_struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)  # noqa: E731
    return TrainingState(*(jax.tree.map(as_struct, x) for x in (params, optax.adamw(1e-3).init(params))), {})


@pytest.mark.parametrize("progress", [{"step": 9, "tokens": 7}, {}, [], None, {"step": "x"}, 10**400])
def test_progress_that_is_edited_in_both_its_places_is_refused(adapters, tmp_path, progress):
    run = tmp_path / "run"
    shutil.copytree(adapters / "run", run)
    file = manifest_of(run / "checkpoints" / "1")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"progress": progress}))
    (run / "checkpoints" / "1" / "progress" / "metadata").write_text(json.dumps(progress))
    checkpoints = TrainingCheckpoints(run / "checkpoints")
    assert str(run) in refusal(checkpoints.restore, 1, abstract(run / "checkpoints" / "1"))
    checkpoints.close()


def test_a_run_does_not_go_on_with_another_rank_or_alpha(adapters, tmp_path):
    """Which a manifest of version 1 may say without a checksum that knows better."""
    run = Path(shutil.copytree(adapters / "run", tmp_path / "run"))
    file = manifest_of(run / "checkpoints" / "1")
    write_version_1(file)
    manifest = json.loads(file.read_text())
    adaptation = Adaptation(**manifest["lora"])
    file.write_text(json.dumps(edited(manifest, ("lora", "alpha"), 40.0)))
    checkpoints = TrainingCheckpoints(run / "checkpoints", adaptation=adaptation)
    message = refusal(checkpoints.restore, 1, abstract(run / "checkpoints" / "1"))
    assert "alpha 40, the config asks for rank 2 and alpha 4" in message
    checkpoints.close()


@pytest.mark.parametrize(
    "content", [DEEP, DEEP.replace("[", '{"a":'), "1" * 5000, "[[1, 2]]", '{"\\u0000": 1}', "\xff"]
)
@pytest.mark.parametrize(
    "name", ["assets/manifest.json", "params/sizes.json", "progress/metadata", "assets/config.json"]
)
def test_json_that_is_no_object_or_too_deep(adapters, tmp_path, name, content):
    run = Path(shutil.copytree(adapters / "run", tmp_path / "run"))
    step = run / "checkpoints" / "1"
    expected = abstract(step)
    (step / name).write_bytes(content.encode("latin-1"))
    checkpoints = TrainingCheckpoints(run / "checkpoints")
    assert str(step / name) in refusal(checkpoints.restore, 1, expected)
    checkpoints.close()
    if name != "progress/metadata":
        assert str(step / name) in refusal(load_model, run)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", [DEEP, '{"weight_map":' + DEEP, "1" * 5000, '{"weight_map": {"a": "\\u0000"}}'])
def test_json_of_a_published_folder(tmp_path, name, content):
    write_published(tmp_path)
    (tmp_path / name).write_text(content)
    assert name in refusal(load_model, tmp_path)
