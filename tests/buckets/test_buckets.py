"""Paths in buckets: reading, writing, listing; what goes wrong is told in one line; nothing half-written appears."""

import asyncio
import contextlib
import io
import json

import gcsfs.retry
import jax
import numpy as np
import pytest

from elbo_kto_jax.checkpoints import publish
from elbo_kto_jax.checkpoints.assets import read_assets
from elbo_kto_jax.checkpoints.tokenizer import build_tokenizer
from elbo_kto_jax.data import prepare
from elbo_kto_jax.data.examples import load_examples
from elbo_kto_jax.data.prepared import Cache
from elbo_kto_jax.data.reading import read_records
from elbo_kto_jax.runtime import bucket_errors, buckets, files, paths
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.flags import load_config_file, refuse_existing
from tests import runs
from tests.buckets.gcs_server import Fault
from tests.data.test_examples import DEFAULTS


@pytest.fixture
def impatient(monkeypatch):
    """The library tries again at once."""

    async def no_sleep(_seconds):
        return None

    monkeypatch.setattr(gcsfs.retry.asyncio, "sleep", no_sleep, raising=True)
    yield
    assert asyncio.sleep is no_sleep


@pytest.fixture(params=["gs", "s3"])
def place(request):
    """An empty folder of a bucket, in each kind of store."""
    if request.param == "gs":
        yield paths.at(f"gs://{request.getfixturevalue('bucket')}/run")
    else:
        folder = paths.at(f"{request.getfixturevalue('s3')}/run")
        yield folder
        folder.rmtree(missing_ok=True)


def test_reading_writing_and_listing(place):
    file = place / "a b" / "c#d[1].txt"
    assert not file.exists()
    assert not place.is_dir()
    files.atomic_write(file, "one\ntwo é\n")
    assert file.read_text() == "one\ntwo é\n"
    assert file.open().readlines() == ["one\n", "two é\n"]
    assert (file.is_file(), file.is_dir(), file.parent.is_dir(), file.parent.is_file()) == (True, False, True, False)
    assert file.stat().st_size == file.stat().length == 11
    assert file.read_range(4, 7) == b"two"
    files.atomic_write(place / "config.json", b"{}")
    assert sorted(path.name for path in place.iterdir()) == ["a b", "config.json"]
    assert [str(path.relative_to(place)) for path in files.files_below(place)] == ["a b/c#d[1].txt", "config.json"]
    assert list(place.glob("*/c*.txt")) == [file]
    assert list(place.glob("config.json")) == [place / "config.json"]
    assert list((place / "none").glob("*")) == []
    assert list((place / "none").iterdir()) == []
    with pytest.raises(FileNotFoundError):
        (place / "none").read_bytes()
    with pytest.raises(FileExistsError):
        file.create(b"another")
    assert file.read_bytes().startswith(b"one")
    files.remove_tree(file.parent)
    assert [path.name for path in place.iterdir()] == ["config.json"]
    file.unlink(missing_ok=True)


def test_what_is_written_piece_by_piece_appears_at_the_end_or_not_at_all(server, bucket):
    file = paths.at(f"gs://{bucket}/large")
    with file.open("wb") as opened:
        for _ in range(3):
            opened.write(b"x" * 2**22)
        assert server.names(bucket) == []
    assert file.stat().st_size == 3 * 2**22
    with contextlib.suppress(KeyError), file.open("wb") as opened:
        opened.write(b"y" * 2**23)
        raise KeyError
    assert file.read_range(0, 1) == b"x"


def test_a_large_file_is_read_as_it_is_asked_for(server, bucket):
    server.put(bucket, "large.jsonl", b"".join(b'{"prompt": "%07d"}\n' % i for i in range(10**6)))
    with paths.at(f"gs://{bucket}/large.jsonl").open("rb") as opened:
        assert opened.readline() == b'{"prompt": "0000000"}\n'
        opened.seek(22 * 999_999)
        assert opened.readline() == b'{"prompt": "0999999"}\n'
    assert isinstance(opened, io.BufferedReader)
    media = [one for one in server.asked if one.name == "large.jsonl" and one.query.get("alt") == "media"]
    assert 0 < len(media) <= 4  # of 22 MB, pieces of 5


def test_a_folder_is_replaced_as_a_whole(place):
    files.atomic_write(place / "out" / "old.txt", "old")
    partial = place / ".out.1.partial"
    files.atomic_write(partial / "new" / "a.txt", "a")
    files.atomic_write(partial / "config.json", "{}")
    files.replace_folder(partial, place / "out")
    assert sorted(str(path.relative_to(place)) for path in files.files_below(place)) == [
        "out/config.json",
        "out/new/a.txt",
    ]
    assert not files.is_unfinished(place / "out")


def test_a_folder_that_was_being_replaced_is_known_as_such(server, bucket):
    out = paths.at(f"gs://{bucket}/out")
    files.atomic_write(out.with_name("part") / "config.json", "{}")
    no_copies = server.failing(lambda asked: Fault(status=403) if _copies(asked) else None)
    with no_copies, pytest.raises(UserError, match="do not have the right"):
        files.replace_folder(out.with_name("part"), out)
    assert files.is_unfinished(out)
    files.replace_folder(out.with_name("part"), out)
    assert not files.is_unfinished(out)
    assert (out / "config.json").read_text() == "{}"


def _copies(asked):
    return asked.method == "POST" and asked.name.startswith("part/")


def test_a_failed_export_leaves_what_was_there(server, bucket):
    out = paths.at(f"gs://{bucket}/hf")
    files.atomic_write(out / "config.json", "old")
    tensors = {"x": jax.ShapeDtypeStruct((3,), np.float32)}
    with pytest.raises(UserError, match="gs://"):
        publish.write_folder(
            out, {"config.json": b"new"}, tensors, lambda name: [np.ones(3, np.float32)], 10**6, check=_refuse
        )
    assert server.content(bucket, "hf/config.json") == b"old"
    assert server.names(bucket) == ["hf/config.json"]


def _refuse():
    raise UserError("gs://: other bits")


def test_records_and_configs(server, bucket, place):
    lines = "".join(json.dumps(row) + "\n" for row in runs.records(6)).encode()
    for name in ("train.jsonl", "data/train.jsonl", "data/test/0.jsonl"):
        files.atomic_write(place / name, lines)
    assert len(read_records(f"{place}/train.jsonl").records) == 6
    found = read_records(f"{place}/data:test")
    assert [str(file) for file in found.files] == [f"{place}/data/test/0.jsonl"]
    assert found.records[0].where == f"{place}/data/test/0.jsonl:1"
    assert [str(file) for file in read_records(f"{place}/data").files] == [f"{place}/data/train.jsonl"]
    with pytest.raises(UserError, match="no file or folder"):
        read_records(f"{place}/none.jsonl")
    text = "from ml_collections import ConfigDict\ndef get_config(x=1): return ConfigDict({'x': x})\n"
    files.atomic_write(place / "recipe.py", text)
    assert load_config_file(f"{place}/recipe.py").x == 1
    assert load_config_file(f"{place}/recipe.py:2").x == "2"


@pytest.mark.parametrize("end", ["parquet", "jsonl.gz"])
def test_other_forms_of_records(bucket, end, tmp_path):
    import gzip

    import pyarrow.parquet

    rows = [{"prompt": f"{i}", "completion": "x", "label": True} for i in range(4)]
    if end == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x")
    else:
        (tmp_path / "x").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    file = paths.at(f"gs://{bucket}/x.{end}")
    files.atomic_write(file, (tmp_path / "x").read_bytes())
    assert [record.prompt for record in read_records(str(file)).records] == ["0", "1", "2", "3"]


def test_many_records_are_prepared_from_a_bucket(bucket, tmp_path, monkeypatch, tiny_checkpoint):
    """By as many processes as there are cores, and kept on this machine."""
    monkeypatch.setattr(prepare, "LARGE", 0)
    runs.write_jsonl(tmp_path / "here.jsonl", runs.records(40))
    address = f"gs://{bucket}/records.jsonl"
    paths.at(address).write_bytes((tmp_path / "here.jsonl").read_bytes())
    options = {**DEFAULTS, "cache": Cache(tmp_path / "cache", is_shared=False), "processes": 2}
    tokenizer = build_tokenizer(read_assets(tiny_checkpoint), "tokenizer")

    def prepared(path):
        return load_examples(path, tokenizer, **options)

    here, first, again = prepared(str(tmp_path / "here.jsonl")), prepared(address), prepared(address)
    for found in (first, again):
        np.testing.assert_array_equal(found.tokens, here.tokens)
        assert [str(file) for file in found.files] == [address]


def test_nothing_is_overwritten_unasked(place):
    files.atomic_write(place / "out.jsonl", "old")
    refuse_existing(f"{place}/new.jsonl", overwrite=False)
    refuse_existing(f"{place}/out.jsonl", overwrite=True)
    with pytest.raises(UserError, match=r"^--out=.*out.jsonl exists already"):
        refuse_existing(f"{place}/out.jsonl", overwrite=False)
    with pytest.raises(UserError, match="a folder"):
        refuse_existing(str(place), overwrite=True)


# What goes wrong.


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "gcloud auth application-default login"), (403, "Storage Object Admin"), (404, "there is no bucket")],
)
def test_credentials_rights_and_buckets(server, bucket, status, words, capfd):
    with server.failing(lambda asked: Fault(status=status)), pytest.raises(UserError) as refused:
        files.check_writable(f"gs://{bucket}/run", "--workdir")
    assert str(refused.value).startswith(f"--workdir=gs://{bucket}/run: ")
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("fault", [Fault(status=503), Fault(status=429), Fault(cut=True)])
def test_a_server_that_fails_for_a_while(server, bucket, fault, impatient):
    """What failed a few times is tried again; what fails for good ends in one line."""
    left = [3]

    def some(_):
        left[0] -= 1
        return fault if left[0] >= 0 else None

    file = paths.at(f"gs://{bucket}/x")
    with server.failing(some):
        files.atomic_write(file, b"content" * 1000)
    assert left[0] < 0
    left[0] = 3
    with server.failing(some):
        assert file.read_bytes() == b"content" * 1000
    with server.failing(lambda asked: fault):
        for action in (lambda: files.atomic_write(file, "new"), file.read_bytes, lambda: list(file.parent.iterdir())):
            with pytest.raises(UserError, match=r"^gs://.*: the server of the bucket cannot be reached or fails"):
                action()
    assert file.read_bytes() == b"content" * 1000


def test_a_server_that_is_slow(server, bucket, impatient, monkeypatch):
    """It is waited for; what stays silent for too long is asked again, and is an error of one line in the end."""
    monkeypatch.setattr(buckets, "_SECONDS_OF_SILENCE", 0.2)
    buckets.filesystem.cache_clear()
    gcsfs.GCSFileSystem.clear_instance_cache()
    file = paths.at(f"gs://{bucket}/x")
    with server.failing(lambda asked: Fault(delay=0.05)):
        files.atomic_write(file, "content")
        assert file.read_text() == "content"
    silent = [2]

    def twice(_):
        silent[0] -= 1
        return Fault(delay=0.5) if silent[0] >= 0 else None

    with server.failing(twice):
        assert file.read_text() == "content"
    assert silent[0] < 0
    with (
        server.failing(lambda asked: Fault(delay=0.5)),
        pytest.raises(UserError, match=r"^gs://.*: the server of the bucket cannot be reached or fails"),
    ):
        file.read_bytes()
    buckets.filesystem.cache_clear()
    gcsfs.GCSFileSystem.clear_instance_cache()


def test_an_answer_that_is_lost(server, bucket, impatient):
    """The write took effect, and is done again."""
    left = [1]

    def once(asked):
        left[0] -= asked.writes
        return Fault(cut=True, applied=True) if asked.writes and left[0] >= 0 else None

    with server.failing(once):
        files.atomic_write(f"gs://{bucket}/x", "content")
    assert server.content(bucket, "x") == b"content"


def test_errors_of_other_libraries():
    told = {
        "PERMISSION_DENIED: Error writing": "do not have the right",
        "UNAUTHENTICATED: no": "credentials",
        "Error opening: UNAVAILABLE: CURL error": "",
        "UNAVAILABLE: CURL error": "cannot be reached",
        "Error reading: HTTP response code: 403": "do not have the right",
        "Project was not passed and could not be determined": "GOOGLE_CLOUD_PROJECT",
        "Error opening: Error writing gs://b/x: Malformed StorageGeneration": "does not answer as Google",
        "shape (3,) does not fit": "",
    }
    for text, words in told.items():
        found = bucket_errors.trouble(ValueError(text))
        assert bool(found) == bool(words)
        assert words in found


def test_a_missing_library_is_named(monkeypatch):
    import fsspec

    from elbo_kto_jax.runtime import buckets

    def missing(*_args, **_options):
        raise ImportError("Please install gcsfs")

    buckets.filesystem.cache_clear()
    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(UserError, match=r"pip install 'elbo_kto_jax\[gcs\]'"):
        paths.at("gs://bucket/x").exists()
    with pytest.raises(UserError, match=r"pip install 'elbo_kto_jax\[s3\]'"):
        paths.at("s3://bucket/x").exists()


def test_checkpoints_go_to_gs_alone():
    paths.refuse_checkpoints("gs://bucket/run", "--workdir")
    paths.refuse_checkpoints("/tmp/run", "--workdir")
    with pytest.raises(UserError, match=r"^--workdir=s3://b/run: checkpoints cannot be written to s3://"):
        paths.refuse_checkpoints("s3://b/run", "--workdir")
