"""Forms of files, what a folder leaves out, columns that hold times, and how far a few bytes may unfold."""

import bz2
import datetime
import gzip
import json
import logging

import pyarrow
import pyarrow.parquet
import pytest

from elbo_kto_jax.data import json_rows, unfold
from elbo_kto_jax.data.forms import form
from elbo_kto_jax.data.reading import read_records
from elbo_kto_jax.runtime.errors import UserError

USER = {"role": "user", "content": "Sky?"}
ROWS = [{"prompt": [USER], "completion": f"answer {i}", "label": i % 2 == 0} for i in range(5)]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
LIST = json.dumps(ROWS, indent=1).encode()


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, "zstd", asbytes=True)


def write(path, content: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def summary(source):
    return [(record.prompt, record.completion, record.label) for record in read_records(source).records]


EXPECTED = [(row["prompt"], row["completion"], row["label"]) for row in ROWS]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.JSONL", LINES),
        ("a.ndjson", LINES),
        ("a.json", LINES),
        ("a.json", LIST),
        ("a.Json", json.dumps(ROWS).encode()),
        ("a.json", b"\xef\xbb\xbf" + LIST),
        ("a.jsonl.gz", gzip.compress(LINES)),
        ("a.jsonl.GZ", gzip.compress(LINES[:200]) + gzip.compress(LINES[200:])),
        ("a.jsonl.zst", zstd(LINES)),
        ("a.jsonl.bz2", bz2.compress(LINES)),
        ("a.json.gz", gzip.compress(LIST)),
        ("a.json.zst", zstd(LINES)),
    ],
)
def test_every_form_has_the_same_records(tmp_path, name, content):
    path = write(tmp_path / "d" / name, content)
    assert summary(path) == summary(tmp_path / "d") == EXPECTED
    assert [record.where for record in read_records(path).records] == [f"{path}:{i}" for i in range(1, 6)]


def test_parquet_of_any_case_is_read(tmp_path):
    path = write_parquet(tmp_path / "d" / "A.PARQUET", ROWS)
    assert summary(path) == summary(tmp_path / "d") == EXPECTED


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", gzip.compress(LINES)[:-9], "cannot be read .*copy it again"),
        ("a.jsonl.gz", LINES, "cannot be read .*copy it again"),
        ("a.jsonl.zst", zstd(LINES)[:-3], "cannot be read .*copy it again"),
        ("a.json", LIST[:-3], r"a.json:\d+: not valid JSON"),
        ("a.json", LIST + b"1", r"a.json:\d+: not valid JSON: expected the end of the file"),
        ("a.json", b'[{"a": 1} {"b": 2}]', "not valid JSON: expected , or ]"),
        ("a.json", b'[{"a": "\xff"}]', "not UTF-8 text"),
        ("a.json", b'[{"a": ' + b"[" * 100_000, "not valid JSON"),
        ("a.json", b'{"data": [1]}', "expected a list of records, or one record a line"),
        ("a.json", b'{\n"prompt": 1}', "expected a list of records, or one record a line"),
        ("a.tar.gz", gzip.compress(LINES), r"expected a file that ends in .jsonl or .parquet"),
        ("a.jsonl.xz", b"", r"expected a file that ends in .jsonl or .parquet"),
    ],
)
def test_damaged_files_and_other_forms_are_refused(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message) as error:
        read_records(write(tmp_path / name, content), skip_bad=True)
    assert len(str(error.value).splitlines()) == 1


def test_rows_of_a_list_are_numbered_and_may_be_skipped(tmp_path):
    bad = '{"prompt": "a", "completion": "b", "label": true, "label": false}'
    path = write(tmp_path / "a.json", f"[{json.dumps(ROWS[0])}, {bad}, 7, {json.dumps(ROWS[1])}]".encode())
    found = read_records(path, skip_bad=True)
    assert [record.where for record in found.records] == [f"{path}:1", f"{path}:4"]
    assert found.skipped == [
        f"{path}:2: field `label`: stands twice in one object",
        f"{path}:3: expected a JSON object, got 7",
    ]


def test_what_a_folder_leaves_out_is_named(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write(tmp_path / "train.jsonl", LINES)
    write(tmp_path / "test.jsonl.gz", gzip.compress(LINES))
    for name in ("b.csv", "dataset_infos.json", "c.jsonl.xz", ".hidden/train-2.jsonl", ".e.jsonl"):
        write(tmp_path / name, json.dumps({"default": {"features": {"prompt": "string"}}}, indent=2).encode())
    assert summary(tmp_path) == EXPECTED
    assert "not read, for they are not of this split: 1 file (test.jsonl.gz)" in caplog.text
    assert "not read from files of their form: 3 files (b.csv, c.jsonl.xz, dataset_infos.json)" in caplog.text
    assert "hidden" not in caplog.text


def test_many_files_are_counted(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write(tmp_path / "train.jsonl", LINES)
    for i in range(30):
        write(tmp_path / f"{i:02}.csv", b"")
    read_records(tmp_path)
    assert "30 files (00.csv, 01.csv, 02.csv, 03.csv, 04.csv, ...)" in caplog.text


def test_a_folder_of_other_forms_says_so(tmp_path):
    write(tmp_path / "a.csv", b"")
    with pytest.raises(UserError, match=r"no .jsonl or .parquet file in .*; it holds 1 file \(a.csv\)"):
        read_records(tmp_path)


@pytest.mark.parametrize(
    ("first", "second"), [("train.jsonl", "train.parquet"), ("train.jsonl", "train.jsonl.gz"), ("a.jsonl", "a.JSON")]
)
@pytest.mark.parametrize("same", [True, False])
def test_one_name_in_two_forms_is_refused(tmp_path, first, second, same):
    contents = {".parquet": None, ".jsonl": LINES, ".jsonl.gz": gzip.compress(LINES), ".json": LIST}
    write(tmp_path / first, LINES if same else LINES * 2)
    path = tmp_path / second
    if form(path) == ".parquet":
        write_parquet(path, ROWS)
    else:
        write(path, contents[form(path)])
    with pytest.raises(UserError, match="have one name in two forms"):
        read_records(tmp_path)


def test_the_same_rows_under_another_name_and_form_are_refused(tmp_path):
    write(tmp_path / "train.jsonl", LINES)
    path = write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", ROWS)
    with pytest.raises(UserError, match="has no other records than"):
        read_records(tmp_path)
    write_parquet(path, [*ROWS[1:], {**ROWS[0], "completion": "another"}])
    assert len(read_records(tmp_path).records) == 10


def test_copies_are_counted(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write(tmp_path / "a.jsonl", LINES)
    write(tmp_path / "b.jsonl", LINES)
    assert len(read_records(tmp_path).records) == 10
    assert "5 records are exact copies of earlier ones" in caplog.text


# Parquet.

FAR = 2**62
TIMES = {
    "timestamp": pyarrow.array([FAR, 1], pyarrow.int64()).view(pyarrow.timestamp("ns")),
    "zoned": pyarrow.array([FAR, 1], pyarrow.int64()).view(pyarrow.timestamp("us", tz="Europe/Berlin")),
    "time": pyarrow.array([1, 2], pyarrow.int64()).view(pyarrow.time64("ns")),
    "short time": pyarrow.array([1, 2], pyarrow.int32()).view(pyarrow.time32("ms")),
    "duration": pyarrow.array([FAR, 1], pyarrow.int64()).view(pyarrow.duration("ns")),
    "date": pyarrow.array([2**30, 1], pyarrow.int32()).view(pyarrow.date32()),
}


@pytest.mark.parametrize("kind", TIMES)
@pytest.mark.parametrize("skip_bad", [True, False])
def test_times_in_messages_are_not_in_the_way(tmp_path, kind, skip_bad):
    texts = pyarrow.array(["a", "b"])
    messages = pyarrow.StructArray.from_arrays(
        [pyarrow.array(["user", "user"]), texts, TIMES[kind]], names=["role", "content", "at"]
    )
    table = pyarrow.table(
        {
            "prompt": pyarrow.ListArray.from_arrays(pyarrow.array([0, 1, 2]), messages),
            "completion": texts,
            "label": pyarrow.array([True, False]),
            "made": TIMES[kind],
        }
    )
    path = tmp_path / "times.parquet"
    pyarrow.parquet.write_table(table, path)
    found = read_records(path, skip_bad=skip_bad)
    assert [(record.prompt[0]["content"], record.label) for record in found.records] == [("a", True), ("b", False)]


@pytest.mark.parametrize("kind", TIMES)
@pytest.mark.parametrize("field", ["prompt", "completion", "label", "id"])
def test_times_in_the_place_of_fields_are_named(tmp_path, kind, field):
    columns = {
        "prompt": pyarrow.array(["a", "b"]),
        "completion": pyarrow.array(["a", "b"]),
        "label": pyarrow.array([True, False]),
    }
    path = tmp_path / "times.parquet"
    pyarrow.parquet.write_table(pyarrow.table({**columns, field: TIMES[kind]}), path)
    if field == "id":
        assert len(read_records(path).records) == 2
        return
    with pytest.raises(UserError, match=f":1: field `{field}`: expected"):
        read_records(path)
    with pytest.raises(UserError, match=f"no usable record in .*2 bad ones were skipped.*field `{field}`"):
        read_records(path, skip_bad=True)


def test_values_that_python_cannot_hold_are_bad_records(tmp_path):
    keys = pyarrow.array(["user", "user"])
    twice = pyarrow.StructArray.from_arrays([keys, keys, keys], names=["role", "content", "content"])
    table = pyarrow.table({"prompt": pyarrow.ListArray.from_arrays(pyarrow.array([0, 1, 2]), twice)})
    path = tmp_path / "twice.parquet"
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(UserError, match=r":1: field `prompt`: a value that cannot be read \(Converting"):
        read_records(path, needs=("prompt",))


@pytest.mark.parametrize("value", [datetime.datetime(2024, 1, 1), b"\xff", 1.5, {"a": 1}])
def test_columns_of_other_kinds_are_named(tmp_path, value):
    path = write_parquet(tmp_path / "a.parquet", [{"prompt": "a", "completion": value, "label": True}])
    with pytest.raises(UserError, match=":1: field `completion`"):
        read_records(path)


def test_a_column_twice_is_refused(tmp_path):
    label = pyarrow.array([True])
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), label, label], names=["prompt", "label", "label"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="column `label` stands there twice"):
        read_records(tmp_path / "a.parquet", skip_bad=True)


def test_row_groups_with_other_texts_are_read(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"{i}" * 50}], "completion": "b", "label": True} for i in range(99)]
    path = tmp_path / "groups.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7, data_page_size=64)
    assert [record.prompt for record in read_records(path).records] == [row["prompt"] for row in rows]


# What a few bytes may claim.


def bomb(column, num_rows, num_parts=1):
    """A table of `num_rows` that repeats `column` (one value) as often, `num_parts` times in each row."""
    flat = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * num_rows * num_parts, pyarrow.int32()), [column])
    fields = {"type": pyarrow.array(["text"] * len(flat)), "text": flat}
    parts = pyarrow.StructArray.from_arrays(list(fields.values()), names=list(fields))
    offsets = pyarrow.array(range(0, len(flat) + 1, num_parts), pyarrow.int32())
    contents = pyarrow.ListArray.from_arrays(offsets, parts)
    messages = pyarrow.StructArray.from_arrays(
        [pyarrow.array(["user"] * num_rows), contents], names=["role", "content"]
    )
    each = pyarrow.array(range(num_rows + 1), pyarrow.int32())
    return pyarrow.table({"prompt": pyarrow.ListArray.from_arrays(each, messages)})


@pytest.mark.parametrize(("size", "num_rows", "num_parts"), [(5_000_000, 2000, 1), (100_000, 10, 100_000)])
def test_a_small_parquet_file_does_not_fill_the_memory(tmp_path, size, num_rows, num_parts):
    path = tmp_path / "bomb.parquet"
    pyarrow.parquet.write_table(bomb("a" * size, num_rows, num_parts), path, compression="zstd")
    assert path.stat().st_size < 10_000
    with pytest.raises(UserError, match=r"bytes unfold to more than \d+; if that is meant, write it as .jsonl"):
        read_records(path, needs=("prompt",), skip_bad=True)


@pytest.mark.parametrize("end", [".gz", ".zst", ".bz2"])
def test_a_small_compressed_file_does_not_fill_the_memory(tmp_path, monkeypatch, end):
    monkeypatch.setattr(unfold, "MOST_UNFOLDED_BYTES", 2**20)
    pack = {".gz": gzip.compress, ".zst": zstd, ".bz2": bz2.compress}[end]
    good = write(tmp_path / f"good.jsonl{end}", pack(LINES * 100))
    assert len(read_records(good).records) == 500
    for name in ("one_line", "lines"):
        content = b"a" * 2**22 if name == "one_line" else b'{"prompt": "a", "completion": "b"}\n' * 40_000
        path = write(tmp_path / f"{name}.jsonl{end}", pack(content))
        with pytest.raises(UserError, match=r"bytes unfold to more than \d+"):
            read_records(path, skip_bad=True)


def test_an_endless_line_is_one_bad_record(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "MOST_LINE_BYTES", 1000)
    path = write(tmp_path / "a.jsonl", LINES + b'{"prompt": "' + b"a" * 5000 + b'"}\n' + LINES[:-1])
    found = read_records(path, skip_bad=True)
    assert [record.where for record in found.records] == [f"{path}:{i}" for i in (*range(1, 6), *range(7, 12))]
    assert found.skipped == [f"{path}:6: a line of more than 1000 bytes"]
