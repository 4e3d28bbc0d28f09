"""Every form of a record, every way in which one can be wrong, and every place where records can be."""

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError

from elbo_kto_jax.data.reading import read_records
from elbo_kto_jax.data.sources import find_files
from elbo_kto_jax.runtime.errors import UserError

USER = {"role": "user", "content": "Which colour is the sky?"}
BLUE = {"role": "assistant", "content": "Blue."}
GREEN = {"role": "assistant", "content": "Green."}
GOOD = {"id": "good", "prompt": [USER], "completion": [BLUE], "label": True}


def summary(path, **kwargs):
    return [(r.id, r.prompt, r.completion, r.label) for r in read_records(path, **kwargs).records]


# Forms.


def test_unpaired_messages_and_strings_keep_their_form_and_place(write_jsonl):
    path = write_jsonl([GOOD, "", {"id": 7, "prompt": "The sky is", "completion": " blue.", "label": False}, "  \r"])
    first, second = read_records(path).records
    assert (first.id, first.prompt, first.completion, first.label) == ("good", [USER], [BLUE], True)
    assert (second.id, second.prompt, second.completion, second.label) == ("7", "The sky is", " blue.", False)
    assert (first.where, second.where) == (f"{path}:1", f"{path}:3")


def test_extra_fields_and_keys_of_messages_are_left_out(write_jsonl):
    path = write_jsonl([{**GOOD, "score": 3, "prompt": [{**USER, "name": "Ann"}], "chosen": None}])
    assert summary(path) == [("good", [USER], [BLUE], True)]


def test_empty_completions_are_read(write_jsonl):
    empty = {"role": "assistant", "content": ""}
    path = write_jsonl([{**GOOD, "completion": [empty]}, {**GOOD, "id": "b", "completion": ""}])
    assert [completion for _, _, completion, _ in summary(path)] == [[empty], ""]


def test_byte_order_mark_is_not_part_of_the_first_record(write_jsonl):
    assert len(read_records(write_jsonl([b"\xef\xbb\xbf" + json.dumps(GOOD).encode()])).records) == 1


@pytest.mark.parametrize(
    "pair",
    [
        {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]},
        {"chosen": [USER, BLUE], "rejected": [USER, GREEN]},
        {"prompt": [USER], "chosen": [USER, BLUE], "rejected": [USER, GREEN]},
        {"prompt": f" {USER['content']}\n", "chosen": [USER, BLUE], "rejected": [USER, GREEN]},
    ],
    ids=["explicit", "conversations", "conversations-and-messages", "conversations-and-string"],
)
def test_pair_becomes_two_records(write_jsonl, pair):
    path = write_jsonl([{"id": 3, **pair}])
    assert summary(path) == [("3-chosen", [USER], [BLUE], True), ("3-rejected", [USER], [GREEN], False)]


def test_pair_of_strings(write_jsonl):
    path = write_jsonl([{"id": "p", "prompt": "The sky is", "chosen": " blue", "rejected": " green"}])
    assert summary(path) == [("p-chosen", "The sky is", " blue", True), ("p-rejected", "The sky is", " green", False)]


def test_pair_with_string_prompt_and_chat_answers_keeps_both_forms(write_jsonl):
    path = write_jsonl([{"id": "p", "prompt": "The sky?", "chosen": [BLUE], "rejected": [GREEN]}])
    assert [row[1:3] for row in summary(path)] == [("The sky?", [BLUE]), ("The sky?", [GREEN])]


def test_conversations_that_answer_alike_do_not_lose_the_answer(write_jsonl):
    turns = [USER, BLUE, {"role": "user", "content": "And grass?"}]
    path = write_jsonl([{"id": "p", "chosen": [*turns, GREEN], "rejected": [*turns, GREEN]}])
    assert summary(path) == [("p-chosen", turns, [GREEN], True), ("p-rejected", turns, [GREEN], False)]


def test_pair_is_one_record_where_only_the_prompt_is_needed(write_jsonl):
    path = write_jsonl([{"id": "p", "prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]}])
    assert summary(path, needs=("prompt",)) == [("p", [USER], None, None)]


def test_fields_that_are_not_needed_may_be_missing(write_jsonl):
    path = write_jsonl([{"id": 1, "prompt": "a"}])
    assert summary(path, needs=("prompt",)) == [("1", "a", None, None)]
    path = write_jsonl([{"id": 1, "prompt": "a", "completion": "b"}])
    assert summary(path, needs=("prompt", "completion")) == [("1", "a", "b", None)]


# Names.


def test_missing_id_depends_on_the_content_only(write_jsonl):
    rows = [{"prompt": [USER], "completion": [BLUE], "label": True}, {"prompt": "a", "completion": "b", "label": True}]
    ids = [row[0] for row in summary(write_jsonl(rows))]
    reordered = [dict(reversed(row.items())) for row in reversed(rows)]
    assert [row[0] for row in summary(write_jsonl(reordered, "other.jsonl"))] == ids[::-1]
    changed = [{**rows[0], "label": False}, {**rows[1], "completion": "B"}]
    assert not set(ids) & {row[0] for row in summary(write_jsonl(changed))}


def test_missing_id_of_a_pair_is_that_of_its_unpaired_records(write_jsonl):
    pair = write_jsonl([{"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]}])
    unpaired = write_jsonl(
        [
            {"prompt": [USER], "completion": [BLUE], "label": True},
            {"prompt": [USER], "completion": [GREEN], "label": False},
        ],
        "unpaired.jsonl",
    )
    assert summary(pair) == summary(unpaired)


def test_exact_copies_without_id_are_numbered(write_jsonl):
    first, second, third = (
        row[0] for row in summary(write_jsonl([{"prompt": "a", "completion": "b", "label": True}] * 3))
    )
    assert (second, third) == (f"{first}#2", f"{first}#3")


@pytest.mark.parametrize("again", [GOOD, {**GOOD, "completion": [GREEN]}], ids=["same", "other"])
def test_explicit_id_twice_is_a_bad_record(write_jsonl, again):
    path = write_jsonl([GOOD, again])
    with pytest.raises(UserError) as error:
        read_records(path)
    assert f'{path}:2: field `id`: "good" is already the id of {path}:1;' in str(error.value)


def test_integer_and_string_id_are_the_same_and_so_are_ids_across_files(write_jsonl, tmp_path):
    write_jsonl([{**GOOD, "id": 1}], "d/a.jsonl")
    write_jsonl([{**GOOD, "id": "1"}], "d/b.jsonl")
    with pytest.raises(UserError, match="already the id of"):
        read_records(tmp_path / "d")


def test_half_of_a_pair_with_a_used_id_drops_the_whole_pair(write_jsonl):
    path = write_jsonl([{**GOOD, "id": "p-rejected"}, {"id": "p", "prompt": "a", "chosen": "b", "rejected": "c"}])
    result = read_records(path, skip_bad=True)
    assert [record.id for record in result.records] == ["p-rejected"]
    assert len(result.skipped) == 1


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_an_id_that_is_the_name_of_other_content_leaves_no_id_twice(write_jsonl, order):
    unnamed = {"prompt": "Say a", "completion": "ab", "label": True}
    ((name, *_),) = summary(write_jsonl([unnamed]))
    rows = [unnamed, {**unnamed, "completion": "other", "id": name}]
    path = write_jsonl([rows[i] for i in order])
    result = read_records(path, skip_bad=True)
    if order == (0, 1):
        assert result.skipped == [f'{path}:2: field `id`: "{name}" is already the id of {path}:1']
    assert len({record.id for record in result.records}) == len(result.records) == 1 + (order == (1, 0))


TOOL_CALL = {"id": "c1", "type": "function", "function": {"name": "get_tide", "arguments": "{}"}}
PARTS = [{"type": "text", "text": "What colour "}, {"type": "text", "text": "is the sky?"}]


@pytest.mark.parametrize("as_text", [False, True])
def test_text_parts_are_joined(write_jsonl, as_text):
    prompt, completion = [{"role": "user", "content": PARTS}], [{"role": "assistant", "content": PARTS[:1]}]
    if as_text:
        prompt, completion = json.dumps(prompt), f" {json.dumps(completion, indent=1)}\n"
    ((_, *found),) = summary(write_jsonl([{"prompt": prompt, "completion": completion, "label": True}]))
    content = "".join(part["text"] for part in PARTS)
    assert found == [[{"role": "user", "content": content}], [{**BLUE, "content": PARTS[0]["text"]}], True]


def test_messages_as_json_text_are_messages(write_jsonl, caplog):
    caplog.set_level("INFO")
    conversations = {"chosen": [USER, BLUE], "rejected": [USER, GREEN]}
    rows = [
        {"prompt": json.dumps([USER]), "completion": json.dumps([BLUE]), "label": True},
        {"prompt": json.dumps([USER]), "completion": BLUE["content"], "label": True},
        {name: json.dumps(messages, indent=2) for name, messages in conversations.items()},
        conversations,
    ]
    found = [row[1:] for row in summary(write_jsonl(rows))]
    assert found[0] == ([USER], [BLUE], True)
    assert found[1] == ([USER], BLUE["content"], True)
    assert found[2:4] == found[4:]
    assert "3 records write messages as JSON text" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]",
        "{}",
        '{"role": "king"}',
        '[{"name": "Ada", "role": 1}] is a list',
        'Messages look like [{"role": "user", "content": "a"}]',
        "f({'role': 'user'})",
        '{"a": {"role": "x"}}',
    ],
)
def test_other_texts_with_braces_stay_texts(write_jsonl, text):
    ((_, *found),) = summary(write_jsonl([{"prompt": text, "completion": text, "label": True}]))
    assert found == [text, text, True]


def test_what_is_not_used_is_counted(write_jsonl, caplog):
    caplog.set_level("INFO")
    named = {**USER, "name": "Ada", "tool_calls": None, "timestamp": 5}
    part = {"type": "text", "text": "a", "cache_control": {}}
    rows = [
        {**GOOD, "id": "a", "prompt": [named, named], "score": 1, "source": ""},
        {**GOOD, "id": "b", "prompt": [{"role": "user", "content": [part]}], "score": 0},
    ]
    read_records(write_jsonl(rows))
    (line,) = [line for line in caplog.messages if "not used" in line]
    assert line.endswith(
        "fields that are not used, with their records: prompt[].content[].cache_control (1), prompt[].name (1), "
        "prompt[].timestamp (1), score (2)"
    )


def test_many_unused_fields_make_one_short_line(write_jsonl, caplog):
    caplog.set_level("INFO")
    read_records(write_jsonl([{**GOOD, **{f"{i:04}{'x' * 1000}": 1 for i in range(1000)}}]))
    (line,) = [line for line in caplog.messages if "not used" in line]
    assert line.endswith(" and 990 more")
    assert len(line) < 1200


# Bad records.

BAD = {
    "invalid JSON": ('{"prompt": ', "not valid JSON: "),
    "two objects": (json.dumps(GOOD) * 2, "not valid JSON: Extra data"),
    "nested": ("[" * 100_000, "not valid JSON: "),
    "long integer": ('{"id": ' + "1" * 5000 + "}", "not valid JSON: "),
    "not UTF-8": (b'{"prompt": "caf\xe9"}', "not UTF-8 text (byte 16 of the line)"),
    "list": ([1], "expected a JSON object, got [1]"),
    "string": ('"text"', 'expected a JSON object, got "text"'),
    "no prompt": ({"completion": "b", "label": True}, "field `prompt`: missing"),
    "null prompt": ({**GOOD, "prompt": None}, "field `prompt`: missing"),
    "empty prompt": ({**GOOD, "prompt": ""}, "field `prompt`: empty"),
    "no messages": ({**GOOD, "prompt": []}, "field `prompt`: empty"),
    "prompt type": ({**GOOD, "prompt": 3}, "field `prompt`: expected a string or a list of messages, got 3"),
    "one message": ({**GOOD, "prompt": USER}, "field `prompt`: expected a string or a list of messages, got {"),
    "message type": (
        {**GOOD, "prompt": ["hi"]},
        'field `prompt[0]`: expected an object with role and content, got "hi"',
    ),
    "role": (
        {**GOOD, "prompt": [USER, {"role": "bot", "content": ""}]},
        'field `prompt[1].role`: expected one of system, user, assistant, got "bot"',
    ),
    "role type": ({**GOOD, "prompt": [{"role": ["user"], "content": ""}]}, "field `prompt[0].role`: expected one of"),
    "no role": ({**GOOD, "prompt": [{"content": "hi"}]}, "field `prompt[0].role`: expected one of"),
    "content": (
        {**GOOD, "prompt": [{"role": "user", "content": 1}]},
        "field `prompt[0].content`: expected a string, got 1",
    ),
    "no content": ({**GOOD, "prompt": [{"role": "user"}]}, "field `prompt[0].content`: expected a string, got null"),
    "surrogate": (json.dumps({**GOOD, "prompt": "\ud83d"}), "field `prompt`: character 1 is half of a surrogate pair"),
    "no completion": ({"prompt": "a", "label": True}, "field `completion`: missing"),
    "completion list": ({**GOOD, "completion": []}, "field `completion`: empty"),
    "completion type": ({**GOOD, "completion": 1.5}, "field `completion`: expected a string or a list of messages"),
    "completion role": ({**GOOD, "completion": [USER]}, 'field `completion[0].role`: expected "assistant", got "user"'),
    "completions": ({**GOOD, "completion": [BLUE, GREEN]}, "field `completion`: expected one assistant message, got 2"),
    "no label": ({"prompt": "a", "completion": "b"}, "field `label`: missing; expected true or false"),
    "label text": ({**GOOD, "label": "yes"}, 'field `label`: expected true or false, got "yes"'),
    "label 1": ({**GOOD, "label": 1}, "field `label`: expected true or false, got 1 (write true)"),
    "label 0": ({**GOOD, "label": 0}, "field `label`: expected true or false, got 0 (write false)"),
    "label twice": (
        '{"prompt": "a", "completion": "b", "label": true, "label": false}',
        "field `label`: stands twice in one object",
    ),
    "same label twice": (
        '{"prompt": "a", "completion": "b", "label": true, "label": true}',
        "field `label`: stands twice in one object",
    ),
    "content twice": (
        '{"prompt": [{"role": "user", "content": "a", "content": "b"}], "completion": "b", "label": true}',
        "field `content`: stands twice in one object",
    ),
    "label of a pair": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "label": False},
        "field `label`: a record has either a label or chosen and rejected, not both",
    ),
    "tools": ({**GOOD, "tools": [{"type": "function"}]}, "field `tools`: tools are not supported"),
    "tools as text": ({**GOOD, "tools": '[{"type": "function"}]'}, "field `tools`: tools are not supported"),
    "tool calls": (
        {**GOOD, "completion": [{**BLUE, "tool_calls": [TOOL_CALL]}]},
        "field `completion[0].tool_calls`: not supported, and without it the message is another one",
    ),
    "tool call in the prompt": (
        {**GOOD, "prompt": [USER, {**BLUE, "content": None, "tool_calls": [TOOL_CALL]}, USER]},
        "field `prompt[1].tool_calls`: not supported",
    ),
    "call of a function": (
        {"prompt": "a", "chosen": [{**BLUE, "function_call": {"name": "f"}}], "rejected": [GREEN]},
        "field `chosen[0].function_call`: not supported",
    ),
    "reasoning": (
        {**GOOD, "completion": [{**BLUE, "reasoning_content": "Hm."}]},
        "field `completion[0].reasoning_content`: not supported",
    ),
    "role of a tool": (
        {**GOOD, "prompt": [{"role": "tool", "content": "1 m"}]},
        'field `prompt[0].role`: expected one of system, user, assistant, got "tool"',
    ),
    "image": (
        {**GOOD, "prompt": [{"role": "user", "content": [*PARTS, {"type": "image_url", "image_url": {"url": "x"}}]}]},
        'field `prompt[0].content[2].type`: expected "text", got "image_url"',
    ),
    "no parts": ({**GOOD, "prompt": [{"role": "user", "content": []}]}, "field `prompt[0].content`: empty"),
    "part without text": (
        {**GOOD, "prompt": [{"role": "user", "content": [{"type": "text"}]}]},
        "field `prompt[0].content[0].text`: expected a string, got null",
    ),
    "part type": (
        {**GOOD, "prompt": [{"role": "user", "content": ["a"]}]},
        'field `prompt[0].content[0]`: expected an object with type and text, got "a"',
    ),
    "messages as Python prints them": (
        {**GOOD, "prompt": "[{'role': 'user', 'content': 'a'}]"},
        "field `prompt`: messages as text, \"[{'role': 'user', 'content': 'a'}]\"; write a list of objects",
    ),
    "messages as NumPy prints them": (
        {**GOOD, "completion": "[{'content': 'a', 'role': 'user'}\n {'content': 'b', 'role': 'assistant'}]"},
        "field `completion`: messages as text",
    ),
    "messages as arrays": (
        {**GOOD, "prompt": "array([{'content': 'a', 'role': 'user'}], dtype=object)"},
        "field `prompt`: messages as text",
    ),
    "one message as text": ({**GOOD, "prompt": json.dumps(USER)}, "field `prompt`: messages as text"),
    "wrong role in JSON text": (
        {**GOOD, "prompt": json.dumps([{**USER, "role": "human"}])},
        "field `prompt[0].role`: expected one of system, user, assistant",
    ),
    "deep label": ('{"label": ' + "[" * 900 + "]" * 900 + "}", "field `prompt`: missing"),
    "id type": ({**GOOD, "id": 1.5}, "field `id`: expected a string or an integer, got 1.5"),
    "id bool": ({**GOOD, "id": True}, "field `id`: expected a string or an integer, got true"),
    "empty id": ({**GOOD, "id": ""}, 'field `id`: expected a string or an integer, got ""'),
    "half pair": ({"prompt": "a", "chosen": "b"}, "field `rejected`: missing"),
    "both forms": ({**GOOD, "chosen": "b", "rejected": "c"}, "field `completion`: a record has either a completion or"),
    "pair of strings": (
        {"chosen": "ab", "rejected": "ac"},
        "field `prompt`: missing; without it chosen and rejected must",
    ),
    "pair of answers": ({"chosen": [BLUE], "rejected": [GREEN]}, "field `prompt`: missing; without it"),
    "pair text type": ({"prompt": "a", "chosen": 1, "rejected": "c"}, "field `chosen`: expected a string or a list"),
    "other prompts": (
        {"chosen": [USER, BLUE], "rejected": [{**USER, "content": "Grass?"}, GREEN]},
        "field `chosen`: shares no first message with `rejected`",
    ),
    "whole and part": (
        {"prompt": [USER], "chosen": [USER, BLUE], "rejected": [GREEN]},
        "field `chosen`: shares no first",
    ),
    "several answers": (
        {"chosen": [USER, BLUE, USER, BLUE], "rejected": [USER, GREEN, USER, BLUE]},
        "field `chosen`: expected one assistant message after the 1 that chosen and rejected share, got assistant, u",
    ),
    "ends with user": (
        {"chosen": [USER, BLUE], "rejected": [USER, USER]},
        "field `rejected`: expected one assistant message after the 1 that chosen and rejected share, got user",
    ),
    "prompt differs": (
        {"prompt": "Grass?", "chosen": [USER, BLUE], "rejected": [USER, GREEN]},
        "field `prompt`: differs from the messages that chosen and rejected share",
    ),
    "prompt messages differ": (
        {"prompt": [USER, USER], "chosen": [USER, BLUE], "rejected": [USER, GREEN]},
        "field `prompt`: differs from the messages that chosen and rejected share",
    ),
}


@pytest.mark.parametrize(("row", "message"), BAD.values(), ids=BAD.keys())
def test_bad_record_is_named_or_skipped(write_jsonl, row, message):
    good = {**GOOD, "id": "first"}
    path = write_jsonl([good, row, {**good, "id": "last"}])
    with pytest.raises(UserError) as error:
        read_records(path)
    text = str(error.value)
    assert text.startswith(f"{path}:2: {message}")
    assert text.endswith("; fix or drop the record, or pass --skip-bad-records")
    assert len(text.splitlines()) == 1

    result = read_records(path, skip_bad=True)
    assert [record.id for record in result.records] == ["first", "last"]
    assert len(result.skipped) == 1
    assert result.skipped[0].startswith(f"{path}:2: {message}")


def test_long_values_are_shortened_in_messages(write_jsonl):
    with pytest.raises(UserError) as error:
        read_records(write_jsonl([{**GOOD, "label": "x" * 10_000}]))
    assert len(str(error.value)) < 400


def test_only_bad_records_is_an_error_even_when_they_are_skipped(write_jsonl):
    with pytest.raises(
        UserError, match=r"no usable record in .*; 2 bad ones were skipped, the first: .*:1: field `label`"
    ):
        read_records(write_jsonl([{**GOOD, "label": 1}] * 2), skip_bad=True)


# Files, folders, the Hub.


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("records.jsonl", "\n \n", "no usable record in"),
        ("records.csv", "prompt,completion\n", "expected a file that ends in .jsonl or .parquet"),
        ("records.parquet", "no Parquet", "not a readable Parquet file"),
    ],
)
def test_files_without_records(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_records(path)


@pytest.mark.parametrize("name", ["absent.jsonl", "no/such/folder", "data/absent.parquet"])
def test_missing_path_names_the_flag(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"--config.data.eval: no file or folder {name}"):
        read_records(name, flag="--config.data.eval")


def test_folder_without_records(tmp_path):
    with pytest.raises(UserError, match=r"no .jsonl or .parquet file in"):
        read_records(tmp_path)


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


def test_parquet_reads_like_jsonl(write_jsonl, tmp_path):
    rows = [{**GOOD, "id": i, "label": i % 2 == 0, "score": 0.5} for i in range(5)]
    path = write_parquet(tmp_path / "records.parquet", rows)
    assert summary(path) == summary(write_jsonl(rows))
    assert [record.where for record in read_records(path).records] == [f"{path}:{i}" for i in range(1, 6)]


def test_parquet_pairs_and_nulls(tmp_path):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b", "rejected": None}]
    path = write_parquet(tmp_path / "pairs.parquet", rows)
    result = read_records(path, skip_bad=True)
    assert [(record.completion, record.label) for record in result.records] == [("b", True), ("c", False)]
    assert result.skipped == [f"{path}:2: field `rejected`: missing"]


def test_parquet_integer_labels_are_refused(tmp_path):
    path = write_parquet(tmp_path / "records.parquet", [{**GOOD, "label": 1}])
    with pytest.raises(UserError, match=r":1: field `label`: expected true or false, got 1 \(write true\)"):
        read_records(path)


def test_file_stem_gives_label_and_qualifies_ids(write_jsonl, tmp_path):
    row = {"id": 1, "prompt": [USER]}
    write_jsonl([{**row, "completion": [BLUE]}], "d/chosen.jsonl")
    write_jsonl([{**row, "completion": [GREEN]}, {**GOOD, "id": 2, "label": True}], "d/rejected.jsonl")
    expected = [
        ("chosen-1", [USER], [BLUE], True),
        ("rejected-1", [USER], [GREEN], False),
        ("rejected-2", [USER], [BLUE], True),
    ]
    assert summary(tmp_path / "d") == expected
    assert summary(tmp_path / "d" / "rejected.jsonl") == expected[1:]


def test_folder_is_read_in_the_order_of_names_without_hidden_files(write_jsonl, tmp_path):
    for name in ("b.jsonl", "a.jsonl", ".hidden.jsonl", "notes.txt"):
        write_jsonl([{**GOOD, "id": name}], f"d/{name}")
    assert [row[0] for row in summary(tmp_path / "d")] == ["a.jsonl", "b.jsonl"]


SPLITS = [
    (("train.jsonl", "test.jsonl"), "", ["train.jsonl"]),
    (("train.jsonl", "test.jsonl"), ":test", ["test.jsonl"]),
    (
        ("data/train-00001-of-00002.jsonl", "data/train-00000-of-00002.jsonl", "data/test-00000-of-00001.jsonl"),
        "",
        ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"],
    ),
    (("train/0000.jsonl", "validation/0000.jsonl"), "", ["train/0000.jsonl"]),
    (("test-suite/train/0.jsonl", "test-suite/test/0.jsonl"), "", ["test-suite/train/0.jsonl"]),
    (("train_prefs.jsonl", "test_prefs.jsonl"), "", ["train_prefs.jsonl"]),
    (("train_prefs.jsonl", "train_sft.jsonl"), ":train_sft", ["train_sft.jsonl"]),
    (("train.jsonl", "train_sft.jsonl"), "", ["train.jsonl"]),
    (("a.jsonl", "test.jsonl"), "", ["a.jsonl"]),
    (("test.jsonl",), "", ["test.jsonl"]),
]


@pytest.mark.parametrize(("names", "split", "expected"), SPLITS)
def test_training_split_of_a_folder(write_jsonl, tmp_path, names, split, expected):
    for name in names:
        write_jsonl([{**GOOD, "id": name}], f"d/{name}")
    assert [row[0] for row in summary(f"{tmp_path / 'd'}{split}")] == expected


def test_split_that_is_missing_or_ambiguous(write_jsonl, tmp_path):
    for name in ("train_gen", "train_prefs", "test"):
        write_jsonl([GOOD], f"d/{name}.jsonl")
    with pytest.raises(UserError, match=r"several training splits \(train_gen, train_prefs\); name one: .*d:train_gen"):
        read_records(tmp_path / "d")
    with pytest.raises(UserError, match=r"has no split 'dev'; it has test, train_gen, train_prefs"):
        read_records(f"{tmp_path / 'd'}:dev")


def test_hub_data_set_is_downloaded_and_its_training_split_read(monkeypatch, write_jsonl, tmp_path):
    for name in ("train", "test"):
        write_jsonl([{**GOOD, "id": name}], f"snapshot/data/{name}-00000-of-00001.jsonl")
    asked = []

    def download(repo_id, *, repo_type, **kwargs):
        asked.append((repo_id, repo_type))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert [row[0] for row in summary("trl-lib/kto-mix-14k")] == ["train"]
    assert [row[0] for row in summary("trl-lib/kto-mix-14k:test")] == ["test"]
    assert asked == [("trl-lib/kto-mix-14k", "dataset")] * 2


def test_a_revision_is_read_at_its_commit_and_at_the_known_one(monkeypatch, write_jsonl, tmp_path):
    """A branch may move while a run is stopped."""
    commits = {"main": "1" * 40, "refs/convert/parquet": "2" * 40}
    for commit in (*commits.values(), "3" * 40):
        write_jsonl([{**GOOD, "id": commit}], f"snapshots/{commit}/train.jsonl")

    def download(repo_id, *, revision, **_):
        commit = commits.get(revision or "main", revision)
        if not (tmp_path / "snapshots" / commit).is_dir():
            raise RevisionNotFoundError("404", response=SimpleNamespace(headers={}, request=None))
        return str(tmp_path / "snapshots" / commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for name, commit in (
        ("o/n", "1" * 40),
        ("o/n@main", "1" * 40),
        ("o/n@refs/convert/parquet", "2" * 40),
        (f"o/n@{'3' * 40}", "3" * 40),
    ):
        found = find_files(f"{name}:train", "--config.data.train")
        assert found.revisions == {name: commit}
        assert [file.parent.name for file in found.files] == [commit]
        commits["main"] = "3" * 40  # it moves
        assert find_files(name, "--data", found.revisions).files == found.files
        commits["main"] = "1" * 40
    with pytest.raises(UserError) as error:
        find_files("o/n@v9:train", "--config.data.train")
    assert str(error.value).splitlines() == [
        "--config.data.train: o/n has no revision 'v9' on the Hugging Face Hub; name one of its branches, tags or "
        "commits, as o/n@main"
    ]
    with pytest.raises(UserError, match=r"^--data: o/n has no revision 'gone' .* any more, with which the run began"):
        find_files("o/n@main", "--data", {"o/n@main": "gone"})
    with pytest.raises(UserError, match=r"^--data: o/n@main has no split 'dev'; it has train$"):
        find_files("o/n@main:dev", "--data")


def test_hub_data_set_without_network_says_what_to_do(monkeypatch):
    def download(*args, **kwargs):
        raise LocalEntryNotFoundError("Cannot reach the Hub.\nSecond line.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError) as error:
        read_records("trl-lib/kto-mix-14k", flag="--config.data.eval")
    first, second = str(error.value).splitlines()
    assert "trl-lib/kto-mix-14k" in first
    assert "Cannot reach the Hub." in first
    assert "hf download --repo-type dataset trl-lib/kto-mix-14k" in second
    assert "--config.data.eval" in second


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    file = tmp_path / "data.jsonl"
    file.write_text("{}")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"data\.jsonl: cannot be read \(Permission denied\)"):
        read_records(file)


# The real records.


def test_kto_mix_pairs(golden_dir):
    folder: Path = golden_dir.parent / "data"
    if not (folder / "chosen.jsonl").is_file():
        pytest.skip(f"no kto-mix records in {folder}")
    result = read_records(folder)
    num_lines = sum(len((folder / f"{stem}.jsonl").read_bytes().splitlines()) for stem in ("chosen", "rejected"))
    assert len(result.records) == num_lines
    by_id = {record.id: record for record in result.records}
    assert len(by_id) == num_lines
    for name, record in by_id.items():
        stem, number = name.split("-")
        assert record.label is (stem == "chosen")
        assert record.prompt == by_id[f"chosen-{number}"].prompt
