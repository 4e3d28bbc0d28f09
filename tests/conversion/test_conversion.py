"""The conversion commands: there and back is byte for byte, and verify finds and names a single flipped bit."""

import json
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elbo_kto_jax import from_hf, to_hf, verify
from elbo_kto_jax.checkpoints import conversion, names, publish
from elbo_kto_jax.checkpoints.load import load_model, open_source
from elbo_kto_jax.checkpoints.model import Source
from elbo_kto_jax.checkpoints.save import save_model
from elbo_kto_jax.checkpoints.training_state import TrainingCheckpoints, TrainingState
from elbo_kto_jax.runtime.errors import UserError
from tests.published import CONFIG, DTYPES, read_published, same_bits, write_published


def round_trip(source, folder, shard_size="5GB") -> tuple[dict, dict]:
    forth = from_hf.main([f"--source={source}", f"--out={folder / 'ours'}"])
    back = to_hf.main([f"--source={folder / 'ours'}", f"--out={folder / 'theirs'}", f"--shard-size={shard_size}"])
    return forth, back


def assert_same_checkpoint(source, result) -> None:
    expected, got = read_published(source), read_published(result)
    assert expected.keys() == got.keys()
    assert all(same_bits(expected[name], got[name]) for name in expected)
    index = json.loads((result / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert index["weight_map"].keys() == expected.keys()
    assert set(index["weight_map"].values()) == {file.name for file in result.glob("*.safetensors")}
    for file in source.glob("*.json"):
        if not file.name.startswith("model"):
            assert (result / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("which", ["policy", "reference"])
def test_golden_checkpoints_go_there_and_back(golden, tmp_path, which):
    forth, back = round_trip(golden.folder / which, tmp_path, shard_size="400KB")
    assert_same_checkpoint(golden.folder / which, tmp_path / "theirs")
    assert forth.keys() >= {"tensors", "bytes", "seconds"} <= back.keys()
    assert forth["tensors"] == back["tensors"] == len(read_published(golden.folder / which))
    assert forth["bytes"] == back["bytes"] == sum(t.nbytes for t in read_published(golden.folder / which).values())
    verified = verify.main([f"--source={golden.folder / which}", f"--checkpoint={tmp_path / 'ours'}"])
    assert verified["tensors"] == forth["tensors"]
    assert verified["equal"] is True


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_dtype_goes_there_and_back_bit_by_bit(tmp_path, dtype, shards):
    write_published(tmp_path / "source", dtype=dtype, shards=shards, bits=True, finite=False)
    round_trip(tmp_path / "source", tmp_path)
    assert_same_checkpoint(tmp_path / "source", tmp_path / "theirs")
    assert verify.main([f"--source={tmp_path / 'theirs'}", f"--checkpoint={tmp_path / 'ours'}"])["equal"]


def test_shards_respect_the_size_unless_one_tensor_is_larger(tmp_path):
    tensors = write_published(tmp_path / "source")
    round_trip(tmp_path / "source", tmp_path, shard_size="2KB")
    files = sorted((tmp_path / "theirs").glob("*.safetensors"))
    sizes = [[tensors[name].nbytes for name in read_published_file(file)] for file in files]
    assert [file.name for file in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert all(sum(shard) <= 2000 or len(shard) == 1 for shard in sizes)
    assert max(len(shard) for shard in sizes) > 1


def read_published_file(file) -> list[str]:
    index = json.loads((file.parent / "model.safetensors.index.json").read_text())
    return [name for name, shard in index["weight_map"].items() if shard == file.name]


def test_dtype_rounds_once_and_verify_says_so(tmp_path, capsys):
    tensors = write_published(tmp_path / "source")
    summary = from_hf.main([f"--source={tmp_path / 'source'}", f"--out={tmp_path / 'ours'}", "--dtype=bfloat16"])
    assert summary["bytes"] == sum(tensor.nbytes for tensor in tensors.values()) // 2
    to_hf.main([f"--source={tmp_path / 'ours'}", f"--out={tmp_path / 'theirs'}"])
    for name, tensor in read_published(tmp_path / "theirs").items():
        assert same_bits(tensor, tensors[name].astype(jnp.bfloat16))
    with pytest.raises(UserError, match="differ"):
        verify.main([f"--source={tmp_path / 'source'}", f"--checkpoint={tmp_path / 'ours'}"])
    assert "float32 in the source, bfloat16 in the checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("said", [{"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}, {}])
@pytest.mark.parametrize("dtype", [None, *DTYPES])
@pytest.mark.parametrize("form", ["published", "ours", "step"])
def test_an_export_has_the_dtype_that_was_asked_for_and_says_so(tmp_path, form, dtype, said):
    """By default that in which the values are stored: float32, here, of a model that was published in bfloat16."""
    source = tmp_path / "published"
    tensors = write_published(source)
    (source / "config.json").write_text(json.dumps(CONFIG | said))
    if form == "ours":
        from_hf.main([f"--source={source}", f"--out={tmp_path / 'ours'}"])
    if form == "step":
        model = load_model(source)
        checkpoints = TrainingCheckpoints(tmp_path / "step" / "checkpoints")
        checkpoints.save(1, TrainingState(model.params, {"n": jnp.zeros(1)}, {}), model.assets)
        checkpoints.close()
    more = [] if dtype is None else [f"--dtype={dtype}"]
    summary = to_hf.main([f"--source={tmp_path / form}", f"--out={tmp_path / 'out'}", "--shard-size=1KB", *more])
    found, wanted = read_published(tmp_path / "out"), np.dtype(DTYPES[dtype or "float32"])
    assert all(same_bits(found[name], tensors[name].astype(wanted)) for name in tensors)
    assert summary["bytes"] == sum(tensor.nbytes for tensor in found.values())
    expected = dict.fromkeys(said, wanted.name)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == CONFIG | expected
    assert load_model(tmp_path / "out").params["head"]["kernel"].dtype == wanted


def test_a_value_that_the_dtype_of_the_export_does_not_have(tmp_path):
    def edit(tensors):
        tensors["model.transformer.blocks.1.q_proj.weight"][2, 3] = 1e6

    write_published(tmp_path / "source", edit=edit)
    from_hf.main([f"--source={tmp_path / 'source'}", f"--out={tmp_path / 'ours'}"])
    with pytest.raises(UserError, match=r"blocks\.1\.q_proj.weight: a value is too large for float16"):
        to_hf.main([f"--source={tmp_path / 'ours'}", f"--out={tmp_path / 'theirs'}", "--dtype=float16"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "source"]


def test_from_hf_does_not_pass_over_the_dtype_of_what_is_converted_already(tmp_path):
    write_published(tmp_path / "source")
    from_hf.main([f"--source={tmp_path / 'source'}", f"--out={tmp_path / 'ours'}"])
    again = [f"--source={tmp_path / 'ours'}", f"--out={tmp_path / 'again'}"]
    with pytest.raises(UserError, match="--dtype=bfloat16"):
        from_hf.main([*again, "--dtype=bfloat16"])
    from_hf.main([*again, "--dtype=float32"])


@pytest.mark.parametrize("rows", [3, 4096])
def test_published_folders_are_compared_with_each_other_and_copied(tmp_path, monkeypatch, rows):
    """Every piece is still what was read when it is looked at, whatever the source takes of its buffers."""
    monkeypatch.setattr(names, "ROWS", rows)
    write_published(tmp_path / "source", bits=True, finite=False)
    write_published(tmp_path / "same", bits=True, finite=False, shards=1)
    verified = verify.main([f"--source={tmp_path / 'source'}", f"--checkpoint={tmp_path / 'same'}"])
    assert verified == {"tensors": 21, "equal": True, "different": 0}
    to_hf.main([f"--source={tmp_path / 'source'}", f"--out={tmp_path / 'copy'}"])
    assert_same_checkpoint(tmp_path / "source", tmp_path / "copy")
    for folder in ("source", "copy"):
        source = open_source(tmp_path / folder)
        for pieces in (1, 2, 3):
            buffers, kept = source.buffers(pieces, published=True), []
            for tensor in names.published_tensors(source.config).values():
                for piece in source.published_pieces(tensor, buffers):
                    kept = [*kept, (piece, piece.tobytes())][-pieces:]
                    assert all(array.tobytes() == content for array, content in kept)


@pytest.mark.parametrize(
    ("place", "before", "after"), [((1, 2, 3), 1.0, np.nextafter(np.float32(1), np.float32(2))), ((0, 0, 0), 0.0, -0.0)]
)
def test_verify_names_the_one_tensor_with_a_flipped_bit(tmp_path, capsys, place, before, after):
    layer, row, column = place
    name = f"model.transformer.blocks.{layer}.k_proj.weight"

    def edit(tensors):
        tensors[name][column, row] = before

    write_published(tmp_path / "source", edit=edit)
    model = load_model(tmp_path / "source")
    k_proj = model.params["blocks"]["k_proj"]
    k_proj["kernel"] = k_proj["kernel"].at[place].set(after)
    save_model(tmp_path / "ours", model)
    with pytest.raises(UserError, match="1 of 21"):
        verify.main([f"--source={tmp_path / 'source'}", f"--checkpoint={tmp_path / 'ours'}"])
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [f"{name}: 1 of 128 values differ"]
    assert json.loads(printed.out.splitlines()[-1]) == {"tensors": 21, "equal": False, "different": 1}


def test_a_training_step_becomes_a_published_checkpoint(tmp_path):
    tensors = write_published(tmp_path / "source")
    model = load_model(tmp_path / "source")
    checkpoints = TrainingCheckpoints(tmp_path / "work" / "checkpoints")
    opt_state = jax.tree.map(jnp.zeros_like, model.params)
    checkpoints.save(1, TrainingState(model.params, opt_state, {}), model.assets)
    checkpoints.close()
    summary = to_hf.main([f"--source={tmp_path / 'work'}", f"--out={tmp_path / 'theirs'}"])
    assert summary["tensors"] == len(tensors)
    assert_same_checkpoint(tmp_path / "source", tmp_path / "theirs")


def test_only_a_checkpoint_of_the_same_kind_is_replaced_and_only_on_request(tmp_path):
    write_published(tmp_path / "source")
    round_trip(tmp_path / "source", tmp_path)
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "letter").touch()
    for command, source, same, others in (
        (from_hf, "source", "ours", ("theirs", "home")),
        (to_hf, "ours", "theirs", ("ours", "home")),
    ):
        arguments = [f"--source={tmp_path / source}", f"--out={tmp_path / same}"]
        with pytest.raises(UserError, match="--overwrite"):
            command.main(arguments)
        command.main([*arguments, "--overwrite"])
        for other in others:
            with pytest.raises(UserError, match=other):
                command.main([f"--source={tmp_path / source}", f"--out={tmp_path / other}", "--overwrite"])
    assert (precious / "letter").exists()
    assert_same_checkpoint(tmp_path / "source", tmp_path / "theirs")


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    write_published(tmp_path / "source")
    model = load_model(tmp_path / "source")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(publish, "write_shards", fail)
    with pytest.raises(OSError, match="disk full"):
        conversion.write_published(tmp_path / "theirs", Source.of(model), 10**9)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_export_follows_no_link_that_somebody_put_there(tmp_path, monkeypatch):
    write_published(tmp_path / "source")
    source = Source.of(load_model(tmp_path / "source"))
    victim = tmp_path / "victim"
    victim.mkdir()
    (tmp_path / ".out.0.partial").symlink_to(victim)  # as if a killed export had left it
    conversion.write_published(tmp_path / "out", source, 10**9)
    monkeypatch.setattr(publish.secrets, "token_hex", lambda size: "guessed")
    (tmp_path / ".other.guessed.partial").symlink_to(victim)
    with pytest.raises(UserError, match="File exists"):
        conversion.write_published(tmp_path / "other", source, 10**9)
    assert not list(victim.iterdir())


@pytest.mark.parametrize("name", ["x[1]", "a*b", "a b"])
def test_a_killed_export_s_folder_is_removed_whatever_its_name(tmp_path, name):
    write_published(tmp_path / "source")
    source = Source.of(load_model(tmp_path / "source"))
    (tmp_path / f".{name}.0.partial").mkdir()
    (tmp_path / ".x1.0.partial").mkdir()  # of another
    conversion.write_published(tmp_path / name, source, 10**9)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([".x1.0.partial", name, "source"])


def test_an_export_of_a_damaged_checkpoint_leaves_nothing(tmp_path):
    write_published(tmp_path / "source")
    from_hf.main([f"--source={tmp_path / 'source'}", f"--out={tmp_path / 'ours'}"])
    largest = max((tmp_path / "ours" / "params").rglob("d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged|cannot be read"):
        to_hf.main([f"--source={tmp_path / 'ours'}", f"--out={tmp_path / 'theirs'}"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "source"]


@pytest.mark.parametrize("command", ["from_hf", "to_hf"])
def test_a_killed_conversion_leaves_nothing_that_loads_and_the_same_command_starts_again(tmp_path, command):
    """It is killed when half of the pieces have been read."""
    write_published(tmp_path / "source")
    source, out = tmp_path / "source", tmp_path / "out"
    if command == "to_hf":
        source = tmp_path / "ours"
        from_hf.main([f"--source={tmp_path / 'source'}", f"--out={source}"])
    arguments = [f"--source={source}", f"--out={out}"]
    program = (
        "import os, signal, sys\n"
        f"from elbo_kto_jax import {command}\n"
        "from elbo_kto_jax.checkpoints.digest import Digest\n"
        "add, calls = Digest.add, []\n"
        "def killed(*arguments):\n"
        "    calls.append(1)\n"
        "    len(calls) == 10 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "    add(*arguments)\n"
        "Digest.add = killed\n"
        f"{command}.main(sys.argv[1:])\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = [path for path in tmp_path.iterdir() if "out" in path.name]
    assert left
    assert out not in left
    for folder in left:
        with pytest.raises(UserError):
            load_model(folder)
    {"from_hf": from_hf, "to_hf": to_hf}[command].main(arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({"source", source.name, "out"})
    assert jax.tree.all(jax.tree.map(same_bits, load_model(out).params, load_model(tmp_path / "source").params))


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5mb", 1_500_000), ("2 KB", 2000)])
def test_shard_sizes(text, size):
    assert conversion.shard_size(text) == size


@pytest.mark.parametrize("argument", ["5", "GB", "0GB", "-1GB", "5TB", "nanGB"])
def test_a_bad_shard_size_is_refused(tmp_path, argument):
    with pytest.raises(UserError, match="shard-size"):
        to_hf.main(["--source=nowhere", f"--out={tmp_path / 'out'}", f"--shard-size={argument}"])


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", *map(str, arguments)], capture_output=True, text=True)


def test_exit_statuses_and_the_last_line(tmp_path):
    write_published(tmp_path / "source")
    done = run("conversion.from_hf", f"--source={tmp_path / 'source'}", f"--out={tmp_path / 'ours'}")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["tensors"] == 21
    (tmp_path / "source" / "model-00001-of-00002.safetensors").write_bytes(b"cut")
    refused = run("conversion.verify", f"--source={tmp_path / 'source'}", f"--checkpoint={tmp_path / 'ours'}")
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert "model-00001-of-00002.safetensors" in refused.stderr
    assert "Traceback" not in refused.stderr
