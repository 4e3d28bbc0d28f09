"""The flat arrays against the records they come from, the n_D / n_U subsets, and what is reported as left out."""

import copy
import dataclasses
import hashlib

import numpy as np
import pytest

from elbo_kto_jax.data.chat import encode
from elbo_kto_jax.data.counts import Counts
from elbo_kto_jax.data.examples import load_examples
from elbo_kto_jax.data.reading import read_records
from elbo_kto_jax.data.special import find_eot_id
from elbo_kto_jax.runtime.errors import UserError
from tests.golden import golden_file

DEFAULTS = {
    "max_length": 64,
    "exact_window": True,
    "append_eot": False,
    "desirable_fraction": 1.0,
    "undesirable_fraction": 1.0,
    "seed": 0,
    "needs_label": True,
    "skip_bad": False,
    "progress": False,
}


@pytest.fixture
def load(tokenizer):
    return lambda path, **changes: load_examples(path, tokenizer, **{**DEFAULTS, **changes})


def row(index, label=True, completion=" yes"):
    return {"id": f"row-{index}", "prompt": f"Question {index}:", "completion": completion, "label": label}


@pytest.mark.parametrize("exact_window", [True, False])
@pytest.mark.parametrize("append_eot", [True, False])
def test_rows_are_the_encoded_records_in_order(load, tokenizer, golden_dir, goldens, exact_window, append_eot):
    path = golden_file(golden_dir, "records_extra.jsonl")
    text = {"max_length": goldens["input_ids"].shape[1], "exact_window": exact_window, "append_eot": append_eot}
    examples = load(path, **text)
    records = read_records(path).records
    encoded = [encode(tokenizer, record, eot_id=find_eot_id(tokenizer, "x"), **text) for record in records]
    expected = [(r, e) for r, e in zip(records, encoded, strict=True) if e.completion_length]
    assert 0 < len(expected) < len(records), "the golden extras hold rows without a scorable token"
    assert examples.ids == [record.id for record, _ in expected]
    assert examples.is_desirable.tolist() == [record.label for record, _ in expected]
    assert len(examples) == len(expected)
    assert len(examples.offsets) == len(expected) + 1
    for i, (_, one) in enumerate(expected):
        np.testing.assert_array_equal(examples.tokens[examples.offsets[i] : examples.offsets[i + 1]], one.tokens)
        assert examples.prompt_length[i] == one.prompt_length
        assert examples.completion_length[i] == one.completion_length
    np.testing.assert_array_equal(np.diff(examples.offsets), examples.prompt_length + examples.completion_length)
    assert examples.offsets[-1] == len(examples.tokens)


def test_more_records_than_one_batch(load, write_jsonl, tokenizer):
    examples = load(write_jsonl([row(i) for i in range(600)]))
    assert examples.ids == [f"row-{i}" for i in range(600)]
    last = tokenizer.decode(examples.tokens[examples.offsets[-2] :], clean_up_tokenization_spaces=False)
    assert last == "Question 599: yes"


def test_id_words_depend_on_the_id_only(load, write_jsonl):
    one = load(write_jsonl([row(1), row(2)]))
    other = load(write_jsonl([row(2, label=False, completion=" no"), row(3), row(1)], "other.jsonl"))
    np.testing.assert_array_equal(one.id_words, other.id_words[[2, 0]])
    assert len({tuple(words) for words in other.id_words}) == 3
    expected = hashlib.blake2b(b"row-1", digest_size=8).digest()
    assert b"".join(int(word).to_bytes(4, "little") for word in one.id_words[0]) == expected


def test_dropped_and_cut_rows_are_counted(load, write_jsonl):
    rows = [row(0), row(1, completion=""), {**row(2), "prompt": "word " * 100}, row(3, completion=" word" * 100)]
    examples = load(write_jsonl(rows))
    assert examples.ids == ["row-0", "row-3"]
    assert examples.offsets[2] - examples.offsets[1] == DEFAULTS["max_length"]
    lines = examples.report.splitlines()
    assert "4 records read" in lines
    assert "1 dropped without a completion" in lines
    assert "1 dropped whose prompt fills max_length 64" in lines
    assert "1 completions cut at max_length 64" in lines
    assert examples.counts == Counts(records=4, dropped=2, cut=1, examples=2)
    assert examples.counts.warning(64) == (
        "WARNING: dropped 2 of 4 records, cut 1 of 2 examples at config.data.max_length 64; "
        "what is missing counts nowhere: mend the records or raise max_length"
    )
    few = load(write_jsonl([row(i) for i in range(4)], "few.jsonl"), desirable_fraction=0.5)
    assert few.counts == Counts(records=4, left_out=2, examples=2)
    assert few.counts.warning(64) == ""  # it was asked for


def test_bad_records_are_counted_and_listed(load, write_jsonl):
    path = write_jsonl([row(0), {**row(1), "label": "yes"}])
    with pytest.raises(UserError, match="--skip-bad-records"):
        load(path)
    examples = load(path, skip_bad=True)
    report = examples.report
    assert (examples.counts.skipped, examples.counts.records) == (1, 1)
    assert "WARNING: skipped 1 bad records;" in examples.counts.warning(64)
    assert "1 bad records skipped:" in report
    assert f'{path}:2: field `label`: expected true or false, got "yes"' in report


def test_fractions_keep_exact_counts_in_order(load, write_jsonl):
    path = write_jsonl([row(i, label=i % 3 > 0) for i in range(60)])
    examples = load(path, desirable_fraction=0.34, undesirable_fraction=0.5)
    assert examples.is_desirable.sum() == 14  # 13.6 rounded
    assert (~examples.is_desirable).sum() == 10
    numbers = [int(name.removeprefix("row-")) for name in examples.ids]
    assert numbers == sorted(numbers)
    assert [number % 3 > 0 for number in numbers] == examples.is_desirable.tolist()
    assert "14 of 40 desirable and 10 of 20 undesirable examples kept" in examples.report


def test_subset_depends_on_the_seed_and_grows_with_the_fraction(load, write_jsonl):
    path = write_jsonl([row(i, label=i % 2 > 0) for i in range(80)])
    half = load(path, desirable_fraction=0.5)
    assert half.digest() == load(path, desirable_fraction=0.5).digest()
    assert half.ids != load(path, desirable_fraction=0.5, seed=1).ids
    assert set(load(path, desirable_fraction=0.25).ids) < set(half.ids)
    renamed = write_jsonl([{**row(i, label=i % 2 > 0), "id": i} for i in range(80)], "renamed.jsonl")
    assert load(renamed, desirable_fraction=0.5).ids == [name.removeprefix("row-") for name in half.ids]


def test_subset_never_changes(load, write_jsonl):
    path = write_jsonl([row(i, label=i % 2 > 0) for i in range(12)])
    assert load(path, desirable_fraction=0.5, undesirable_fraction=0.0, seed=3).ids == ["row-1", "row-7", "row-11"]


def test_rows_without_a_token_do_not_count_in_a_fraction(load, write_jsonl):
    path = write_jsonl([row(i, completion="" if i < 10 else " yes") for i in range(20)])
    assert len(load(path, desirable_fraction=0.5)) == 5


def test_one_label_may_be_left_out(load, write_jsonl):
    path = write_jsonl([row(i, label=i % 2 > 0) for i in range(10)])
    assert load(path, undesirable_fraction=0.0).is_desirable.all()


def test_nothing_left_is_an_error(load, write_jsonl):
    path = write_jsonl([row(0), row(1, completion="")])
    with pytest.raises(UserError, match="no example is left of the 2 records"):
        load(path, desirable_fraction=0.0)
    with pytest.raises(
        UserError, match=r"--config.data.eval: no example is left .*: 0 have .* --config.data.max_length 2,"
    ):
        load(path, max_length=2, flag="--config.data.eval")


def test_labels_may_be_missing_where_they_are_not_needed(load, write_jsonl):
    path = write_jsonl([{"id": 1, "prompt": "a", "completion": "b"}, row(2, label=False)])
    assert load(path, needs_label=False).is_desirable.tolist() == [True, False]
    with pytest.raises(UserError, match=":1: field `label`: missing"):
        load(path)


def test_digest_sees_every_array_and_the_ids_but_not_the_report(load, write_jsonl):
    examples = load(write_jsonl([row(0), row(1, label=False)]))
    for name in ("tokens", "offsets", "prompt_length", "completion_length", "is_desirable", "id_words"):
        array = getattr(examples, name).copy()
        array.flat[-1] = ~array.flat[-1] if array.dtype == np.bool_ else array.flat[-1] + 1
        assert dataclasses.replace(examples, **{name: array}).digest() != examples.digest(), name
    assert dataclasses.replace(examples, ids=["row-0", "row-2"]).digest() != examples.digest()
    assert dataclasses.replace(examples, report="").digest() == examples.digest()


def test_bar_goes_to_stderr(load, write_jsonl, capsys):
    path = write_jsonl([row(0)])
    load(path, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "tokenise" in err
    load(path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("exact_window", "reading"), [(True, "read as text"), (False, "read as those tokens")])
def test_special_tokens_and_a_single_label_are_reported(load, write_jsonl, exact_window, reading):
    path = write_jsonl([row(0), row(1, completion=" no<|eot_id|>")])
    report = load(path, exact_window=exact_window).report
    assert "1 records write special tokens" in report
    assert reading in report
    assert "the same label" in report
    assert "the same label" not in load(write_jsonl([row(0), row(1, label=False)])).report
    assert "the same label" not in load(path, needs_label=False).report


@pytest.mark.parametrize(("rare", "other"), [(True, "undesirable"), (False, "desirable")])
def test_a_label_that_hardly_occurs_is_warned_of(load, write_jsonl, rare, other):
    rows = [row(i, label=not rare) for i in range(99)]
    report = load(write_jsonl([*rows, row(99, label=rare)])).report
    name = "desirable" if rare else "undesirable"
    assert f"WARNING: only 1 of 100 examples is {name}; in every batch without one" in report
    assert f"lower config.data.{other}_fraction" in report
    balanced = load(write_jsonl([*rows, *(row(100 + i, label=rare) for i in range(20))])).report
    assert "WARNING" not in balanced


def test_one_text_with_both_labels_is_warned_of(load, write_jsonl):
    both = [row(0), {**row(0, label=False), "id": "again"}, row(1)]
    assert "WARNING: 1 texts are labelled both desirable and undesirable" in load(write_jsonl(both)).report


def test_the_first_record_that_a_template_refuses_is_named(tokenizer, write_jsonl):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{% if 'bad' in messages[0]['content'] %}{{ raise_exception('no') }}{% endif %}ok"
    rows = [{**row(i), "prompt": [{"role": "user", "content": f"{i}"}]} for i in range(600)]
    for i in (300, 599):
        rows[i]["prompt"] = [{"role": "user", "content": "bad"}]
    path = write_jsonl(rows)
    with pytest.raises(UserError, match=f"{path}:301: field `prompt`: .*refuses it: no"):
        load_examples(path, strict, **DEFAULTS)
