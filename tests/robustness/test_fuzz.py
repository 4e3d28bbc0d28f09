"""Random records, configs, flags and metadata: success with exactly what was said, or a UserError that names the place.

Cases come from hypothesis, derandomised, so that every run has the same ones. What a record must become is stated by
the strategy that made it, not by the code under test.
"""

import dataclasses
import json
import random
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from elbo_kto_jax import cli, evaluate, from_hf, generate, precompute, score, to_hf, train, verify
from elbo_kto_jax.checkpoints.tiny import tiny_tokenizer
from elbo_kto_jax.checkpoints.tokenizer import build_tokenizer
from elbo_kto_jax.data.chat import encode_prompt
from elbo_kto_jax.data.examples import load_examples
from elbo_kto_jax.data.packing import Layout
from elbo_kto_jax.data.reading import read_records
from elbo_kto_jax.models.registry import read_config
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.files import trouble
from elbo_kto_jax.runtime.flags import load_config_file
from elbo_kto_jax.runtime.older_configs import with_later_keys
from elbo_kto_jax.training.data import TrainingData
from tests import runs
from tests.published import CONFIG
from tests.robustness.commands import PROJECT_ROOT, environment
from tests.share import share

SPECIAL = ("<|eot_id|>", "<|mdm_mask|>", "<|endoftext|>", "<|startoftext|>", "<|start_header_id|>")
TOKENIZER = tiny_tokenizer()


def cases(bounded: int, whole: int):
    """Settings of a test: its number of cases."""
    return settings(
        max_examples=share(bounded, whole),
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def refused(call, *args, **kwargs) -> tuple[Any, str | None]:
    """(result, None), or (None, the message that the user sees); anything else that is raised fails the test."""
    try:
        return call(*args, **kwargs), None
    except UserError as error:
        message = str(error)
    except OSError as error:  # of these `cli.run` makes a line
        message = trouble(error)
        if not message:
            raise
    assert 1 <= len(message.split("\n")) <= 2, message
    assert len(message) < 2000
    return None, message


# ---- records ----

# What the tiny tokenizer can write: printable ASCII, spaces and newlines, and special tokens written out.
plain_text = st.text(st.sampled_from("abcXYZ019 .,{}<|>\"'\\\n"), min_size=1, max_size=12).filter(str.strip)
text = st.one_of(plain_text, st.tuples(plain_text, st.sampled_from(SPECIAL), plain_text).map("".join))
any_json = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.integers(10**30, 10**40),
        st.floats(),
        st.text(max_size=5),
        st.sampled_from(["\ud800", "", " ", "yes", "true"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a file, and what has to come of it: rows of (prompt, completion, label), or a field to be named."""

    content: bytes
    rows: tuple[tuple[str, str, bool], ...] = ()
    fault: str = ""  # "": good; otherwise what the message must contain


def in_parts(messages: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Messages whose contents are two parts of text."""
    halves = [(m, len(m["content"]) // 2) for m in messages]
    return [
        {**m, "content": [{"type": "text", "text": m["content"][:at]}, {"type": "text", "text": m["content"][at:]}]}
        for m, at in halves
    ]


def with_more(messages: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Messages with fields that say nothing, or nothing of what was said."""
    return [{**m, "tool_calls": None, "name": "Ada", "weight": 1} for m in messages]


FORMS = (list, list, json.dumps, in_parts, with_more)


@st.composite
def good_lines(draw) -> Line:
    prompt, completion, other, label = draw(text), draw(text), draw(text), draw(st.booleans())
    as_messages = draw(st.booleans())
    user = [{"role": "user", "content": prompt}] if as_messages else prompt
    written = draw(st.sampled_from(FORMS))  # of messages
    said = lambda answer: written([{"role": "assistant", "content": answer}]) if as_messages else answer  # noqa: E731
    user = written(user) if as_messages else user
    extra = draw(st.dictionaries(st.sampled_from(["score", "note"]), any_json, max_size=1))
    if draw(st.booleans()):
        row, rows = {"prompt": user, "completion": said(completion), "label": label}, ((prompt, completion, label),)
    else:
        row = {"prompt": user, "chosen": said(completion), "rejected": said(other)}
        rows = ((prompt, completion, True), (prompt, other, False))
    return Line(json.dumps({**extra, **row}, ensure_ascii=draw(st.booleans())).encode(errors="replace"), rows)


WRONG = {  # field -> values that no record may have there
    "label": ["yes", 1, 0, 1.0, [], {}, None],
    "prompt": [None, "", [], 7, {}, [7], [{}], [{"role": "user"}], [{"role": "robot", "content": "a"}], "\ud800"],
    "completion": [
        *(None, 7, [], {}, [{"role": "user", "content": "a"}], [{"role": "assistant"}], "a\udfff"),
        [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}],
        [{"role": "assistant", "content": None}],
        [{"role": "assistant", "content": []}],
        [{"role": "assistant", "content": [{"type": "image_url"}]}],
        [{"role": "assistant", "content": "", "tool_calls": [{"id": "c"}]}],
        "[{'role': 'assistant', 'content': 'a'}]",
        '{"role": "assistant", "content": "a"}',
    ],
    "id": [[], {}, True, 1.5, "", "\ud800"],
    "tools": [[{"type": "function"}], "[1]", 7],
}


@st.composite
def bad_lines(draw) -> Line:
    row = {"prompt": draw(text), "completion": draw(text), "label": draw(st.booleans())}
    kind = draw(
        st.sampled_from(["value", "value", "value", "dropped", "twice", "cut", "bytes", "no object", "deep", "digits"])
    )
    if kind == "value":
        field = draw(st.sampled_from(sorted(WRONG)))
        return Line(json.dumps({**row, field: draw(st.sampled_from(WRONG[field]))}).encode(), fault=f"`{field}")
    if kind == "dropped":
        field = draw(st.sampled_from(sorted(row)))
        del row[field]
        return Line(json.dumps(row).encode(), fault=f"`{field}`")
    if kind == "twice":
        field = draw(st.sampled_from(sorted(row)))
        again = json.dumps({field: draw(st.sampled_from([row[field], "other"]))})
        return Line(f"{json.dumps(row)[:-1]}, {again[1:]}".encode(), fault=f"`{field}`: stands twice")
    if kind == "cut":
        whole = json.dumps(row)
        return Line(whole[: draw(st.integers(1, len(whole) - 1))].encode(), fault="JSON")
    if kind == "bytes":
        place = draw(st.integers(0, 10))
        whole = json.dumps(row).encode()
        return Line(
            whole[:place] + draw(st.sampled_from([b"\xff", b"\xc3(", b"\xed\xa0\x80"])) + whole[place:], (), "UTF-8"
        )
    if kind == "no object":
        return Line(draw(st.sampled_from([b"1", b'"text"', b"[]", b"null", b"true", b"NaN"])), fault="object")
    if kind == "deep":
        return Line(b"[" * 100_000, fault="JSON")
    return Line(json.dumps(row).encode().replace(b"{", b'{"id": ' + b"9" * 5000 + b", ", 1), fault="JSON")


lines_of_a_file = st.lists(st.one_of(good_lines(), good_lines(), bad_lines()), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@cases(300, 20_000)
@given(
    lines_of_a_file,
    st.booleans(),
    st.booleans(),
    st.integers(1, 60),
    st.sampled_from([b"\n", b"\r\n", b"\n\n \n"]),
    st.integers(1, 9),
)
def test_records(folder, lines, skip_bad, exact_window, max_length, newline, batch_size):
    """What was said reaches the tokens, and the first bad line is named; nothing in between."""
    path = folder / "records.jsonl"
    path.write_bytes(newline.join(line.content for line in lines) + newline)
    read = lambda: load_examples(  # noqa: E731
        path,
        TOKENIZER,
        max_length=max_length,
        exact_window=exact_window,
        append_eot=False,
        desirable_fraction=1.0,
        undesirable_fraction=1.0,
        seed=0,
        needs_label=True,
        skip_bad=skip_bad,
        progress=False,
    )
    examples, message = refused(read)
    faults = [(i, line) for i, line in enumerate(lines) if line.fault]
    if faults and not skip_bad:
        (first, line), blank = faults[0], newline.count(b"\n")
        assert message is not None, f"{line.content[:200]} was accepted"
        assert f"{path}:{first * blank + 1}: " in message
        assert line.fault in message
        return
    expected = [row for line in lines if not line.fault for row in line.rows]
    if not expected:
        assert f"no usable record in {path}" in message
        return
    records = read_records(path, skip_bad=True).records
    assert len(records) == len({record.id for record in records}) == len(expected)
    of_record = dict(zip((record.id for record in records), expected, strict=True))
    if message is not None:
        assert "no example is left" in message
        return
    assert len(examples) <= len(expected)
    data = TrainingData(examples, Layout(2, max_length, 1, 2, True), estimator=ESTIMATOR, batch_size=batch_size, seed=0)
    seen = [int(i) for step in range(data.steps_per_epoch) for i in data.indices(step)]
    assert sorted(seen) == list(range(len(examples))), "an epoch is every example once, whatever the batch"
    for i, name in enumerate(examples.ids):
        prompt, completion, label = of_record[name]
        tokens = examples.tokens[examples.offsets[i] : examples.offsets[i + 1]].tolist()
        window = tokens[examples.prompt_length[i] :]
        assert len(tokens) == examples.prompt_length[i] + examples.completion_length[i] <= max_length
        assert bool(examples.is_desirable[i]) == label
        if exact_window:
            assert completion.startswith(decode(window))
            assert len(tokens) == max_length or decode(window) == completion
            assert not set(window) & set(TOKENIZER.all_special_ids)
            assert prompt.strip() in decode(tokens) or prompt in decode(tokens)


ESTIMATOR = Config.from_mapping(load_config_file(str(runs.CONFIG)).to_dict()).estimator


def decode(tokens: list[int]) -> str:
    return TOKENIZER.decode(tokens, clean_up_tokenization_spaces=False)


@cases(40, 500)
@given(st.lists(st.binary(max_size=40), max_size=4), st.sampled_from(["jsonl", "parquet"]))
def test_files_of_bytes(folder, lines, suffix):
    path = folder / f"bytes.{suffix}"
    path.write_bytes(b"\n".join(lines))
    result, message = refused(read_records, path)
    assert result is None
    assert str(path) in message


def test_an_enormous_line(folder):
    """Ten million characters without a space are read and cut in seconds."""
    path = folder / "enormous.jsonl"
    row = {"prompt": "a", "completion": "ab" * 5_000_000, "label": True}
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, "label": "yes" * 1_000_000}) + "\n")
    found = read_records(path, skip_bad=True)
    assert [len(record.completion) for record in found.records] == [10_000_000]
    assert len(found.skipped[0]) < 300


def test_duplicate_ids_are_named_with_the_first(folder):
    rng = random.Random(0)
    for _ in range(share(20, 200)):
        rows = [{"id": rng.randrange(5), "prompt": "p", "completion": "c", "label": True} for _ in range(4)]
        rows = [{**row, "id": str(row["id"])} if rng.random() < 0.5 else row for row in rows]
        path = runs.write_jsonl(folder / "ids.jsonl", rows)
        ids = [str(row["id"]) for row in rows]
        again = next((i for i in range(4) if ids[i] in ids[:i]), None)
        result, message = refused(read_records, path)
        assert (result is None) == (again is not None)
        if again is not None:
            assert f"{path}:{again + 1}: field `id`" in message
            assert message.rstrip(".").find(f"{path}:{ids.index(ids[again]) + 1}") > 0


# ---- configs and flags ----

DEFAULT = load_config_file(str(runs.CONFIG)).to_dict()
LEAVES = {
    f"{group}.{key}": value for group, keys in DEFAULT.items() if isinstance(keys, dict) for key, value in keys.items()
}
LEAVES["seed"] = DEFAULT["seed"]
literal = st.one_of(
    st.integers(-3, 40),
    st.integers(),
    st.sampled_from([10**400, -(10**400), 2**31, 2**63, 1e999, -1e999, float("nan"), 1e-300, "9" * 5000]),
    st.floats(),
    st.booleans(),
    st.sampled_from(
        ["true", "FALSE", "None", "[1]", "{}", "()", "1_0", "0x10", "1e3", "'a'", "-", "(" * 300, "a b", "\n"]
    ),
    st.sampled_from(["elbo_kto", "sft", "uniform", "skip", "float32", "bfloat16", "online", "random", "dual", "int8"]),
    st.text(max_size=8).filter(lambda word: "\0" not in word),
)


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float(int(text, 0))  # 0x10


@cases(300, 20_000)
@given(st.dictionaries(st.sampled_from(sorted(LEAVES)), literal, min_size=1, max_size=4))
def test_config_values(overrides):
    """A setting is what its text says, or it is refused by its name (or that of one that it is at odds with)."""
    flags = cli.Flags("test", "test")
    flags.add_config()
    words = [f"--config.{key}={value}" for key, value in overrides.items()]
    parsed, message = refused(flags.parse, [f"--config={runs.CONFIG}", *words])
    if message is not None:
        groups = {key.split(".")[0] for key in overrides}
        assert any(f"config.{group}" in message for group in groups), message
        return
    config = parsed[1].to_dict()
    for key, value in LEAVES.items():
        group, _, name = key.rpartition(".")
        got = config[group][name] if group else config[key]
        if key not in overrides:
            assert got == value
            continue
        said = str(overrides[key])
        if isinstance(value, str):
            assert got == said
        elif key == "judge.temperature" and said in ("None", "none"):
            assert got is None
        elif isinstance(value, bool):
            assert got is (said.lower() == "true")
            assert said.lower() in ("true", "false")
        else:
            assert got == (_float(said) if isinstance(value, float) else int(said, 0)), (key, said)


@cases(150, 5_000)
@given(
    any_json,
    st.sampled_from([*((group,) for group in DEFAULT), *(tuple(key.split(".")) for key in LEAVES)]),
    st.booleans(),
)
def test_config_mappings(value, path, drop):
    """Whatever a config file returns in the place of a group or a value is refused by its name, or is allowed there."""
    mapping = json.loads(json.dumps(DEFAULT))
    group = mapping
    for name in path[:-1]:
        group = group[name]
    if drop:
        del group[path[-1]]
    else:
        group[path[-1]] = value
    config, message = refused(Config.from_mapping, mapping)
    if message is not None:
        assert "config" in message
        assert path[0] in message
    else:
        complete = found = with_later_keys(mapping)
        assert config.to_dict() == complete
        for name in path:  # what was dropped came later, and means what it meant before it was there
            assert name in found
            found = found[name]


COMMANDS = {
    "train": (train.main, ["--config", "--workdir", "--overwrite", "--skip-bad-records"]),
    "precompute": (precompute.main, ["--config", "--workdir", "--overwrite"]),
    "score": (score.main, ["--config", "--checkpoint", "--data", "--out", "--exact"]),
    "generate": (generate.main, ["--config", "--checkpoint", "--prompts", "--prompt", "--out"]),
    "evaluate": (evaluate.main, ["--config", "--checkpoint", "--baseline", "--prompts", "--out", "--judge"]),
    "from_hf": (from_hf.main, ["--source", "--out", "--dtype", "--overwrite"]),
    "to_hf": (to_hf.main, ["--source", "--out", "--shard-size"]),
    "verify": (verify.main, ["--source", "--checkpoint"]),
}
word = st.one_of(
    st.sampled_from(
        ["", "x", "-", "--", "-1", "x.jsonl", "/dev/null", "a/b", "a/b@main", "../..", "5GB", "1" * 400 + "KB"]
    ),
    st.sampled_from(
        ["9" * 6000, "a" * 6000 + "/b", "\udcff", "line\nbreak", "\x1b[31m", "٣GB", "0.0KB", "~nobody/x", "https://x/y"]
    ),
    st.text(max_size=6).filter(lambda text: "\0" not in text),
)


@cases(150, 5_000)
@given(st.data(), st.sampled_from(sorted(COMMANDS)))
def test_flags(folder, monkeypatch_module, data, name):
    """No command line reaches a traceback; none of these can succeed, since there is no model that they could name."""
    main, known = COMMANDS[name]
    flag = st.one_of(
        st.sampled_from(known), st.sampled_from(["--config.seed", "--config.a.b", "--nope", "-x", "--config.\n"])
    )
    argv = []
    if "--config" in known and data.draw(st.booleans()):
        argv.append(f"--config={runs.CONFIG}")
    for one, value in data.draw(st.lists(st.tuples(flag, word), max_size=4)):
        argv += data.draw(st.sampled_from([[one], [value], [f"{one}={value}"], [one, value]]))
    if "--overwrite" in argv:
        argv.remove("--overwrite")
    result, message = refused(main, argv)
    assert result is None
    assert message


@pytest.fixture(scope="module")
def monkeypatch_module(folder):
    """An empty working directory, no network, and the hub's cache elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        (folder / "empty").mkdir(exist_ok=True)
        patch.chdir(folder / "empty")
        patch.setattr("huggingface_hub.snapshot_download", offline)
        yield patch


def offline(*_, **__):
    raise OSError("there is no network in this test")


# ---- what checkpoints say about themselves ----


@cases(150, 5_000)
@given(st.sampled_from(sorted(CONFIG)), st.one_of(any_json, st.integers(-1, 64), st.floats()), st.booleans())
def test_architectures(key, value, drop):
    mapping = {k: v for k, v in CONFIG.items() if k != key} if drop else {**CONFIG, key: value}
    config, message = refused(read_config, mapping, "there/config.json")
    if message is not None:
        assert "there/config.json: `" in message
    else:
        kinds = {f.name: typing.get_args(f.type) or (f.type,) for f in dataclasses.fields(config)}  # int | None: both
        assert all(type(getattr(config, name)) in kind for name, kind in kinds.items())
        again = {**mapping, **{k: v for k, v in CONFIG.items() if k not in mapping}}
        assert all(np.isclose(getattr(config, k), v) for k, v in again.items() if k in vars(config) and k in mapping)


@cases(40, 2_000)
@given(st.sampled_from(["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]), any_json)
def test_tokenizer_files(folder, name, value):
    scratch = folder / "tokenizer"
    TOKENIZER.save_pretrained(scratch)
    assets = {file.name: file.read_bytes() for file in scratch.iterdir()} | {name: json.dumps(value).encode()}
    tokenizer, message = refused(build_tokenizer, assets, "there")
    assert (tokenizer is None) == message.startswith("there: ") if message else tokenizer is not None
    if tokenizer is not None:
        refused(encode_prompt, tokenizer, [{"role": "user", "content": "a"}])
        assert refused(encode_prompt, tokenizer, "a b")[1] is None


BROKEN = {  # place in tokenizer.json -> what no tokenizer should have there
    "normalizer": [{"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}, {"type": "Sequence"}],
    "pre_tokenizer": [{"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}] * 40}, {"type": "Split"}],
    "decoder": [{"type": "Replace", "pattern": {"String": ""}, "content": "x"}, {"type": "Fuse"}],
    "model": [{"type": "BPE"}, {"type": "BPE", "vocab": {"a": 2**70}, "merges": []}, {"type": "Unigram", "vocab": []}],
    "added_tokens": [[{"id": 10**400, "content": ""}], [{"id": -1, "content": "a"}], {}],
    "post_processor": [{"type": "TemplateProcessing"}],
}


@cases(60, 3_000)
@given(st.sampled_from(sorted(BROKEN)), st.data())
def test_tokenizer_json(folder, place, data):
    """Whatever stands in a tokenizer.json, it is refused in one line or texts can be tokenised."""
    scratch = folder / "tokenizer"
    TOKENIZER.save_pretrained(scratch)
    assets = {file.name: file.read_bytes() for file in scratch.iterdir()}
    value = data.draw(st.one_of(st.sampled_from(BROKEN[place]), any_json))
    assets["tokenizer.json"] = json.dumps({**json.loads(assets["tokenizer.json"]), place: value}).encode()
    tokenizer, message = refused(build_tokenizer, assets, "there")
    if tokenizer is None:
        assert message.startswith("there: unreadable tokenizer")
    else:
        refused(encode_prompt, tokenizer, "a b")


# ---- as the user sees it ----


@pytest.mark.parametrize("number", range(share(2, 60)))
def test_the_real_command(tiny_checkpoint, tmp_path, number):
    """A random file of records through the command itself: exit status, one message, no traceback."""
    rng = random.Random(number)
    rows: list[Any] = runs.records(4)
    field = rng.choice(sorted(WRONG))
    at = rng.randrange(4)
    rows[at] = json.dumps({**rows[at], field: rng.choice(WRONG[field])})
    data = runs.write_jsonl(tmp_path / "data.jsonl", rows)
    argv = runs.flags({"model.path": tiny_checkpoint, "data.train": data}, f"--workdir={tmp_path / 'run'}")
    result = subprocess.run(
        [sys.executable, "-m", "elbo_kto_jax.train", *argv],
        cwd=PROJECT_ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr
    assert f"error: {data}:{at + 1}: " in result.stderr
    assert f"`{field}" in result.stderr
    assert not (tmp_path / "run").exists()


def test_the_strategies_make_what_they_promise():
    """Both kinds of lines, and texts with special tokens, are among the cases."""
    seen = {"good": 0, "bad": 0, "special": 0}

    @cases(100, 100)
    @given(lines_of_a_file)
    def count(lines):
        for line in lines:
            seen["bad" if line.fault else "good"] += 1
            seen["special"] += any(token in part for row in line.rows for part in row[:2] for token in SPECIAL)

    count()
    assert min(seen.values()) > 20, seen
