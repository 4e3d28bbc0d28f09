"""data/pairs.py: which records are pairs, what is left out, and what is refused; and pairs as training sees them."""

import numpy as np
import pytest

from elbo_kto_jax.data.examples import load_examples
from elbo_kto_jax.runtime import config
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.training.data import TrainingData
from tests import runs, tiny
from tests.data.test_examples import DEFAULTS

PAIRED = {"needs_label": False, "needs_pairs": True}


def pair(index, chosen=" yes", rejected=" no", **more):
    return {"prompt": f"Question {index}:", "chosen": chosen, "rejected": rejected, **more}


@pytest.fixture
def load(tokenizer, tmp_path):
    def of(rows, name="pairs.jsonl", **changes):
        runs.write_jsonl(tmp_path / "data" / name, rows)
        return load_examples(tmp_path / "data", tokenizer, **{**DEFAULTS, **PAIRED, **changes})

    return of


def test_the_two_sides_are_neighbours(load):
    found = load([pair(i, id=f"p{i}") for i in range(3)])
    assert found.ids == [f"p{i}-{side}" for i in range(3) for side in ("chosen", "rejected")]
    np.testing.assert_array_equal(found.is_desirable, [True, False] * 3)


@pytest.mark.parametrize("form", ["messages", "whole conversations"])
def test_forms(load, form):
    said = (("user", "Say yes."), ("assistant", "yes"), ("assistant", "no"))
    question, good, bad = ({"role": role, "content": text} for role, text in said)
    if form == "messages":
        rows = [{"prompt": [question], "chosen": [good], "rejected": [bad]}]
    else:
        rows = [{"prompt": "Say yes.", "chosen": [question, good], "rejected": [question, bad]}]
    found = load(rows)
    assert len(found) == 2
    start, end = found.prompt_length[0], found.prompt_length[1]
    assert start == end
    np.testing.assert_array_equal(found.tokens[:start], found.tokens[found.offsets[1] :][:end])


def test_halves_in_two_files_are_pairs_by_their_ids(load):
    """As chosen.jsonl and rejected.jsonl of one folder; records without a partner are left out and counted."""
    row = {"prompt": "Question:", "completion": " yes"}
    halves = [{**row, "id": i, "completion": " no"} for i in (1, 2, 9)]
    with pytest.raises(UserError, match="has no pairs"):
        load(halves, "rejected.jsonl")
    found = load([{**row, "id": i} for i in (3, 1, 2)], "chosen.jsonl")
    assert found.ids == ["chosen-1", "rejected-1", "chosen-2", "rejected-2"]
    assert "WARNING: 2 records left out that are no half of a pair" in found.report


def test_halves_with_other_prompts_are_refused(load):
    with pytest.raises(UserError, match="has no pairs"):
        load([{"prompt": "A:", "completion": " yes", "id": 1}], "chosen.jsonl")
    with pytest.raises(UserError, match=r"rejected.jsonl:1: it is the other half of .*chosen.jsonl:1, and has another"):
        load([{"prompt": "B:", "completion": " no", "id": 1}], "rejected.jsonl")


def test_what_is_left_out_is_said(load):
    rows = [
        pair(0),
        pair(1, rejected=""),
        pair(2, chosen=" same", rejected=" same"),
        {"prompt": "Q:", "completion": " a", "label": True},
    ]
    found = load(rows)
    assert len(found) == 4
    for line in (
        "WARNING: 1 records left out that are no half of a pair",
        "WARNING: 1 pairs left out of which one side has no token within max_length",
        "WARNING: 1 pairs have two equal sides, which say nothing",
    ):
        assert line in found.report


def test_data_without_pairs_is_refused_in_one_line(load):
    with pytest.raises(UserError) as error:
        load([{"prompt": "Q:", "completion": " a", "label": label} for label in (True, False)])
    assert "has no pairs (records with prompt, chosen and rejected)" in str(error.value)
    with pytest.raises(UserError, match="of none of the 1 pairs"):
        load([pair(0, rejected="")])


@pytest.mark.parametrize("fraction", [0.5, 0.25])
def test_subsets_keep_pairs_whole(load, fraction):
    rows = [pair(i, id=f"p{i}") for i in range(20)]
    found = load(rows, desirable_fraction=fraction, undesirable_fraction=fraction)
    names = [name.rpartition("-")[0] for name in found.ids]
    assert names[::2] == names[1::2]
    assert len(found) == 2 * round(20 * fraction)
    less = load(rows, desirable_fraction=fraction / 2, undesirable_fraction=fraction / 2)
    assert set(less.ids) < set(found.ids)


def test_other_objectives_see_two_records(load):
    found = load([pair(0), pair(1, rejected="")], needs_label=True, needs_pairs=False)
    np.testing.assert_array_equal(found.is_desirable, [True, False, True])


def test_batches_are_of_whole_pairs_in_an_order_of_their_own():
    examples, estimator = tiny.examples(14), config.Estimator(2, "uniform")
    data = TrainingData(examples, tiny.layout(4), estimator=estimator, batch_size=6, seed=0, group=2)
    assert data.steps_per_epoch == 3
    seen = [data.indices(step) for step in range(6)]
    for indices in seen:
        np.testing.assert_array_equal(indices[1::2], indices[::2] + 1)
        assert (indices[::2] % 2 == 0).all()
    for epoch in (seen[:3], seen[3:]):
        assert sorted(np.concatenate(epoch)) == list(range(14))
    assert [len(indices) for indices in seen[:3]] == [6, 6, 2]
    assert not np.array_equal(np.concatenate(seen[:3]), np.concatenate(seen[3:]))
    batch = data.batch(2)
    np.testing.assert_array_equal(batch.feedback.is_example, [True, True, False, False, False, False])
