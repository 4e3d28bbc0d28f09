"""Large data sets: processes give what one process gives, the cache is never stale, and ids are those of one by one."""

import bz2
import gzip
import json
import logging
import os
import random
import signal
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from elbo_kto_jax.data import columns, foreign, gather, json_rows, portable, prepare, prepared, workers
from elbo_kto_jax.data import rows as rows_module
from elbo_kto_jax.data.chat import encode_batch
from elbo_kto_jax.data.columns import Part, columns_of
from elbo_kto_jax.data.examples import load_examples
from elbo_kto_jax.data.ids import Ids
from elbo_kto_jax.data.prepared import Cache
from elbo_kto_jax.data.reading import read_records
from elbo_kto_jax.data.rows import blocks, from_bytes, to_bytes
from elbo_kto_jax.runtime.errors import UserError
from tests.data.test_examples import DEFAULTS

SAID = "Say <|eot_id|> twice. Grüße 你好"


@pytest.fixture
def load(tokenizer, monkeypatch):
    """`load_examples`, for which every data set is a large one."""

    def of(path, processes=1, **changes):
        with monkeypatch.context() as patch:
            patch.setattr(prepare, "LARGE", 0)
            patch.setattr(gather, "_IN_MEMORY", -1)
            return load_examples(path, tokenizer, **{**DEFAULTS, "processes": processes, **changes})

    return of


def row(i, **more):
    return {"prompt": f"Question {i}:", "completion": f" yes {i}", "label": i % 2 == 0, **more}


def conversation(i):
    return {
        "prompt": [{"role": "user", "content": f"{SAID} {i}"}],
        "chosen": [{"role": "assistant", "content": f"yes {i}"}],
        "rejected": [{"role": "assistant", "content": "" if i % 7 == 0 else f"no {i}"}],
    }


def write_forms(folder: Path) -> Path:
    """The same kinds of records in every form, with bad ones, copies, long ones and ids that are given twice."""
    rows = [row(i, id=f"a{i % 90}") for i in range(100)] + [conversation(i) for i in range(30)]
    rows += [row(i) for i in (1, 2, 1, 1)] + [row(3, label=None), row(4, completion=" long" * 99), row(5, more="x")]
    lines = [json.dumps(one) for one in rows]
    bad = [*lines[:40], "no json", "", *lines[40:], '{"prompt": "\\ud800", "completion": "b", "label": true}']
    folder.mkdir()
    (folder / "a.jsonl").write_text("\n".join(bad))
    (folder / "b.json").write_text(json.dumps([row(i) for i in range(300, 320)] + [7], indent=1))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress("\n".join([*lines[100:125], json.dumps(row(500))]).encode()))
    (folder / "d.ndjson.bz2").write_bytes(bz2.compress(json.dumps(row(600)).encode()))
    table = pyarrow.Table.from_pylist([{**row(i), "id": i, "source": "web"} for i in range(330)])
    pyarrow.parquet.write_table(table, folder / "e.parquet", row_group_size=300)
    chosen = [{"prompt": "Q:", "completion": " y", "id": i} for i in range(5)]
    (folder / "chosen.jsonl").write_text("\n".join(map(json.dumps, chosen)))
    (folder / "rejected.jsonl").write_text("\n".join(map(json.dumps, chosen[::-1])))
    return folder


def facts(examples):
    """Everything that must be equal."""
    return (
        examples.digest(),
        examples.report,
        list(examples.ids),
        examples.prompts,
        examples.counts,
        examples.files,
        {name: str(getattr(examples, name).dtype) for name in ("tokens", "offsets", "id_words", "prompt_length")},
    )


def test_processes_give_what_one_process_gives_and_the_cache_gives_it_again(load, tmp_path, tokenizer, caplog):
    caplog.set_level(logging.INFO)
    folder, cache = write_forms(tmp_path / "d"), Cache(tmp_path / "cache", is_shared=False)
    options = {"skip_bad": True, "prompts": 3}
    small = load_examples(folder, tokenizer, **{**DEFAULTS, **options})  # all in memory
    told = [line for line in caplog.messages if "copies" in line or "not used" in line]
    assert len(told) == 2
    for i, one in enumerate(
        [
            load(folder, processes=2, cache=cache, **options),
            load(folder, cache=cache, **options),
            load(folder, **options),
        ]
    ):
        assert facts(one) == facts(small), i
    assert [line for line in caplog.messages if "copies" in line or "not used" in line] == told * 4
    assert sum("prepared records are read from" in line for line in caplog.messages) == 1
    assert "11 bad records skipped" not in small.report
    assert "a.jsonl:41: not valid JSON" in small.report
    assert 'field `id`: "a0" is already the id of' in small.report
    # And those are the records one by one, with their tokens.
    records = read_records(folder, skip_bad=True).records
    how = {"max_length": 64, "exact_window": True, "append_eot": False, "eot_id": -1}
    expected = [
        (r, e) for r, e in zip(records, encode_batch(tokenizer, records, **how), strict=True) if e.completion_length
    ]
    assert list(small.ids) == [record.id for record, _ in expected]
    np.testing.assert_array_equal(small.tokens, np.concatenate([one.tokens for _, one in expected]))


def test_pairs_and_subsets_are_the_same_from_files(load, tmp_path, tokenizer):
    folder, cache = write_forms(tmp_path / "d"), Cache(tmp_path / "cache", is_shared=False)
    for options in (
        {"needs_label": False, "needs_pairs": True, "desirable_fraction": 0.5, "undesirable_fraction": 0.5},
        {"needs_label": False, "desirable_fraction": 0.5, "seed": 3},
        {"needs_label": False, "limit": 9},
    ):
        options = {**options, "skip_bad": True, "prompts": 2}
        small = load_examples(folder, tokenizer, **{**DEFAULTS, **options, "processes": 1, "cache": None})
        assert facts(load(folder, cache=cache, **options)) == facts(small)
    assert len(list((tmp_path / "cache").glob("*/description.json"))) == 1  # neither seed nor fractions make another


# The cache.


def kept(cache) -> list[str]:
    return sorted(path.parent.name for path in cache.folder.glob("*/description.json"))


@pytest.fixture
def count(monkeypatch):
    """How often records were converted."""
    made = []
    usual = prepare.convert_all
    monkeypatch.setattr(prepare, "convert_all", lambda *args: made.append(1) or usual(*args))
    return made


def test_a_cache_is_of_the_bytes_the_text_settings_and_the_tokenizer(load, tmp_path, tokenizer, count, monkeypatch):
    file, cache = tmp_path / "a.jsonl", Cache(tmp_path / "cache", is_shared=False)
    file.write_text("\n".join(json.dumps(row(i)) for i in range(9)))
    stat, text = file.stat(), file.read_text()
    first = load(file, cache=cache)
    assert load(file, cache=cache, seed=5, desirable_fraction=0.5).digest() != first.digest()
    assert len(count) == 1
    assert dict(first.digests) == prepared.digest_files([file])

    file.write_text(text.replace("Question 3:", "Question 8:"))  # of the same size
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert load(file, cache=cache).digest() != first.digest()
    assert len(count) == 2
    file.write_text(text)
    assert load(file, cache=cache).digest() == first.digest()
    assert len(count) == 2
    load(file, cache=cache, max_length=9)
    load(file, cache=cache, append_eot=True)
    load(file, cache=cache, skip_bad=True)
    monkeypatch.setattr(prepared, "FORMAT", 2)
    load(file, cache=cache)
    assert len(count) == 6
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0].content }}")
    load(file, cache=cache)
    assert len(count) == len(kept(cache)) == 7
    later = Cache(tmp_path / "cache", is_shared=False)
    load(file, cache=later)
    later.remove_others()
    assert len(kept(later)) == 1


def test_a_template_that_asks_for_the_time_is_cached_for_its_moment_only(load, tmp_path, tokenizer, count, monkeypatch):
    file, cache = tmp_path / "a.jsonl", Cache(tmp_path / "cache", is_shared=True)
    file.write_text(json.dumps(conversation(1)))
    monkeypatch.setattr(tokenizer, "chat_template", "{{ strftime_now('%Y') }}{{ messages[0].content }}")
    load(file, cache=cache)
    assert not cache.folder.exists()


@pytest.mark.parametrize("name", ["tokens", "kept", "description.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_cache_is_made_anew(load, tmp_path, count, caplog, name, damage):
    file, cache = tmp_path / "a.jsonl", Cache(tmp_path / "cache", is_shared=False)
    file.write_text("\n".join(json.dumps(row(i)) for i in range(9)))
    first = facts(load(file, cache=cache))
    (place,) = cache.folder.glob(f"*/{name}")
    content = bytearray(place.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "gone":
        place.unlink()
    else:
        place.write_bytes(content if damage == "flip" else content[:-1])
    again = load(file, cache=Cache(tmp_path / "cache", is_shared=False))
    assert facts(again) == first
    assert len(count) == 2
    assert "damaged" in caplog.text or name == "description.json"
    assert len(kept(cache)) == 1


def test_what_a_killed_process_left_is_never_read_and_removed(load, tmp_path, count, monkeypatch):
    file, cache = tmp_path / "a.jsonl", Cache(tmp_path / "cache", is_shared=False)
    file.write_text("\n".join(json.dumps(row(i)) for i in range(9)))
    with monkeypatch.context() as patch:
        patch.setattr(prepared.shutil, "rmtree", lambda *_, **__: None)  # as if nothing could be cleaned up
        patch.setattr(prepared, "_describe", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            load(file, cache=cache)
    assert [path for path in cache.folder.iterdir() if path.name.endswith(".tmp")]
    assert kept(cache) == []
    load(file, cache=cache)
    assert not [path for path in cache.folder.iterdir() if path.name.endswith(".tmp")]
    assert len(kept(cache)) == 1


def test_a_file_that_changes_while_it_is_read_is_refused(load, tmp_path, monkeypatch):
    file, cache = tmp_path / "a.jsonl", Cache(tmp_path / "cache", is_shared=False)
    file.write_text("\n".join(json.dumps(row(i)) for i in range(9)))
    usual = prepare.settle

    def change(*args):
        file.write_text(json.dumps(row(1)))
        return usual(*args)

    monkeypatch.setattr(prepare, "settle", change)
    with pytest.raises(UserError, match=r"a.jsonl: it was changed while it was read"):
        load(file, cache=cache)
    assert kept(cache) == []


def test_a_place_where_nothing_can_be_written_is_no_obstacle(load, tmp_path, caplog):
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps(row(i)) for i in range(9)))
    first = load(file)
    assert load(file, cache=Cache(file / "cache", is_shared=False)).digest() == first.digest()
    assert "prepared records cannot be kept there (Not a directory); set config.data.cache" in caplog.text


# Errors are those of one process, in the order of the records.


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([row(0), "no json", row(1)], r"a.jsonl:2: not valid JSON.*--skip-bad-records"),
        ([row(0, id="a"), row(1, id="a"), "no json"], r'a.jsonl:2: field `id`: "a" is already the id of .*a.jsonl:1;'),
        ([row(0, id="a"), "no json", row(1, id="a")], r"a.jsonl:2: not valid JSON"),
        ([{"prompt": "a", "completion": "b"}], r"a.jsonl:1: field `label`: missing"),
    ],
)
def test_the_first_bad_record_is_named(load, tmp_path, tokenizer, lines, said):
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines))
    for found in (load, lambda path: load_examples(path, tokenizer, **DEFAULTS), read_records):
        with pytest.raises(UserError, match=said):
            found(file)


def test_a_bad_record_comes_before_a_damaged_file(load, tmp_path, monkeypatch):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.jsonl").write_text("\n".join([json.dumps(row(0)), "no json"]))
    (tmp_path / "d" / "b.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match=r"a.jsonl:2: not valid JSON"):
        load(tmp_path / "d")
    with pytest.raises(UserError, match=r"b.jsonl.gz: cannot be read"):
        load(tmp_path / "d", skip_bad=True)


def test_a_record_that_the_template_refuses_counts_only_if_it_is_kept(load, tmp_path, tokenizer, monkeypatch):
    template = (
        "{% if 'bad' in messages[0].content %}{{ raise_exception('not this') }}{% endif %}{{ messages[0].content }}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    file = tmp_path / "a.jsonl"

    def write(second_id):
        said = [("good", "a"), ("bad", second_id), ("good", "c")]
        rows = [
            {**row(i), "id": name, "prompt": [{"role": "user", "content": text}]} for i, (text, name) in enumerate(said)
        ]
        file.write_text("\n".join(map(json.dumps, rows)))

    write("b")
    with pytest.raises(
        UserError, match=r"a.jsonl:2: field `prompt`: the tokenizer's chat template refuses it: not this"
    ):
        load(file, skip_bad=True)
    write("a")
    assert list(load(file, skip_bad=True).ids) == ["a", "c"]


def test_a_process_that_is_killed_is_told_in_one_line(load, tmp_path, monkeypatch):
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps(row(i)) for i in range(9)))
    usual = workers.to_bytes

    def kill(block):
        for one in workers_of(os.getpid()):
            os.kill(one, signal.SIGKILL)
        return usual(block)

    monkeypatch.setattr(workers, "to_bytes", kill)
    with pytest.raises(UserError, match=r"^a process that prepares records was ended \(status -9\)"):
        load(file, processes=2)


@pytest.mark.parametrize(
    ("text", "count"), [("max 100000", 64), ("350000 100000", 4), ("9900000 100000", 64), ("", 64)]
)
def test_a_container_may_have_fewer_cores_than_the_machine(tmp_path, monkeypatch, text, count):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    monkeypatch.setattr(workers, "_QUOTA", tmp_path / "cpu.max")
    (tmp_path / "cpu.max").write_text(text)
    assert workers.cores() == count
    (tmp_path / "cpu.max").unlink()
    assert workers.cores() == 64


def workers_of(pid: int) -> list[int]:
    """The processes of data/worker.py that `pid` has started."""
    children = Path(f"/proc/{pid}/task").glob("*/children")
    found = [int(child) for file in children for child in file.read_text().split()]
    return [one for one in found if b"data.worker" in Path(f"/proc/{one}/cmdline").read_bytes()]


# Ids.


def settled_ids(rows, tmp_path):
    """Ids, or what is said of those given twice, by `settle`."""
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_ids_are_those_that_records_get_one_by_one(load, tmp_path):
    """Also where given ids are those that others would get for their content, or for being copies."""
    rng = random.Random(0)
    plain = [row(i) for i in range(3)]
    names = [record.id for record in read_records(settled_ids(plain, tmp_path)).records]
    names += [f"{name}#{k}" for name in names for k in (2, 3)]
    for _ in range(8):
        rows = [rng.choice(plain) for _ in range(5)]
        rows += [row(9, id=rng.choice([*names, "a", "b", "c"])) for _ in range(4)]
        rows += [{**conversation(1), **({"id": "a"} if rng.random() < 0.5 else {})}]
        rng.shuffle(rows)
        file = settled_ids(rows, tmp_path)
        one_by_one = read_records(file, skip_bad=True)
        found = load(file, skip_bad=True)
        assert list(found.ids) == [record.id for record in one_by_one.records]
        assert found.report.splitlines()[-len(one_by_one.skipped) :] == one_by_one.skipped or not one_by_one.skipped
        assert found.counts.skipped == len(one_by_one.skipped)


def test_a_sequence_of_ids():
    names = ["a", "", "Grüße\n2", "你"]
    ids = Ids.of(names)
    assert ids == names
    assert len(ids) == 4
    assert ids[-1] == ids[np.int64(3)] == "你"
    assert ids[1:3] == names[1:3]
    assert ids.text[:-1].tobytes() == "\n".join(names).encode()
    assert ids != names[:3]
    with pytest.raises(IndexError):
        ids[4]


# What goes from process to process.


def decoded(block):
    found = []
    for number, decode in block.rows():
        try:
            value = decode()
            found.append((number, {**value, "source": ""} if isinstance(value, dict) and "source" in value else value))
        except Exception as error:  # what is wrong must be the same
            found.append((number, str(error)))
    return found


def test_blocks_and_parts_survive_the_way(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(json_rows, "MOST_LINE_BYTES", 5000)
    monkeypatch.setattr(rows_module, "_BYTES", 3000)
    folder = write_forms(tmp_path / "d")
    (folder / "f.jsonl").write_bytes(
        b'{"prompt": "' + b"a" * 9000 + b'"}\n{"a": "\xff"}\n' + json.dumps(row(1)).encode()
    )
    seen = 0
    for file in sorted(folder.iterdir()):
        for block in blocks(file):
            header, content = to_bytes(block)
            assert decoded(from_bytes(json.loads(json.dumps(header)), content)) == decoded(block)
            seen += 1
    assert seen > 10
    records = read_records(folder / "c.jsonl.gz").records
    how = {"max_length": 64, "exact_window": True, "append_eot": False, "eot_id": -1}
    rows = list(range(len(records)))
    part = Part(
        columns_of(records, encode_batch(tokenizer, records, **how), [False] * len(rows), rows, 2), 2, [(1, "é")]
    )
    header, content = part.to_bytes()
    again = Part.from_bytes(json.loads(json.dumps(header)), content)
    assert (again.file, again.refused, len(again)) == (2, [], len(rows))
    for name in columns.DTYPES:
        np.testing.assert_array_equal(again.columns[name], part.columns[name])


def test_a_described_tokenizer_gives_the_same_tokens_and_texts(tokenizer, tmp_path):
    other = portable.Portable(json.loads(json.dumps(portable.describe(tokenizer))))
    records = read_records(write_forms(tmp_path / "d") / "c.jsonl.gz").records
    how = {"max_length": 64, "exact_window": True, "append_eot": False, "eot_id": -1}
    for a, b in zip(encode_batch(tokenizer, records, **how), encode_batch(other, records, **how), strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
    messages = [[{"role": "user", "content": SAID}]]
    assert foreign.render(tokenizer, messages, [False]) == foreign.render(other, messages, [False])
    assert portable.describe(other) == portable.describe(tokenizer)
