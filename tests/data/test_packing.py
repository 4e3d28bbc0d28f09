"""data/packing.py: every draw once, where its targets say, and few gaps on the real records."""

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from elbo_kto_jax.data.examples import load_examples
from elbo_kto_jax.data.packing import NO_SEGMENT, Layout, Segment, pack
from elbo_kto_jax.runtime import config
from elbo_kto_jax.training.data import TrainingData

MASK, PAD = 901, 900


def random_segments(num, longest, seed=0):
    rng, segments = np.random.default_rng(seed), []
    for index in rng.permutation(num):
        length = int(rng.integers(1, longest + 1))
        start = int(rng.integers(0, length))
        hidden = rng.random(length - start) < 0.5
        segments.append(
            Segment(rng.integers(0, 800, length).astype(np.int32), start, hidden, rng.uniform(1, 9), int(index))
        )
    return segments


def layout(packed, rows=3, length=64):
    return Layout(rows, length, MASK, PAD, packed)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "authors"])
def test_every_segment_once_and_in_place(packed):
    segments = {segment.index: segment for segment in random_segments(40, 64)}
    micro_batches = pack(list(segments.values()), layout(packed))
    found = []
    for batch in micro_batches:
        assert batch.tokens.shape == (3, 64)
        for r in range(3):
            at = targets = 0
            for g, index in enumerate(batch.slot_index[r]):
                if index == NO_SEGMENT:
                    continue
                found.append(int(index))
                tokens, start, hidden, weight, _ = segments[int(index)]
                here = slice(at, at + len(tokens))
                shown = tokens.copy()
                shown[start:][hidden] = MASK
                np.testing.assert_array_equal(batch.tokens[r, here], shown)
                np.testing.assert_array_equal(batch.positions[r, here], np.arange(len(tokens)))
                np.testing.assert_array_equal(batch.segment_ids[r, here], g + 1)
                new = slice(targets, targets + hidden.sum())
                np.testing.assert_array_equal(batch.target_position[r, new], at + start + np.flatnonzero(hidden))
                np.testing.assert_array_equal(batch.target_token[r, new], tokens[start:][hidden])
                np.testing.assert_array_equal(batch.target_slot[r, new], g)
                np.testing.assert_array_equal(batch.target_weight[r, new], np.float32(weight))
                at, targets = here.stop, new.stop
            assert batch.num_targets[r] == targets
            np.testing.assert_array_equal(batch.tokens[r, at:], PAD)
            if packed:
                np.testing.assert_array_equal(batch.segment_ids[r, at:], 0)
    assert sorted(found) == list(range(40))


def test_authors_padding():
    """One segment a row, in the order given; attention sees the padding, whose positions go on."""
    segments = random_segments(4, 20)
    first, second = pack(segments, layout(False))
    assert [*first.slot_index[:, 0], second.slot_index[0, 0]] == [segment.index for segment in segments]
    np.testing.assert_array_equal(first.segment_ids, 1)
    np.testing.assert_array_equal(first.positions, np.tile(np.arange(64), (3, 1)))
    np.testing.assert_array_equal(second.num_targets[1:], 0)
    np.testing.assert_array_equal(second.slot_index[1:], NO_SEGMENT)


def test_the_rows_are_a_function_of_the_lengths():
    """Other tokens and other masks, the same places."""
    segments = random_segments(30, 64)
    others = [segment._replace(tokens=segment.tokens + 1, mask=~segment.mask) for segment in segments]
    for a, b in zip(pack(segments, layout(True)), pack(others, layout(True)), strict=True):
        for name in ("slot_index", "segment_ids", "positions"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_a_micro_batch_of_shorter_rows_is_that_of_a_shorter_layout():
    segments = random_segments(9, 24, seed=2)
    assert 96 < sum(len(segment.tokens) for segment in segments) < 135
    (found,) = pack(segments, layout(True)._replace(shorter=((32, 48),)))
    assert found.tokens.shape == (3, 48)
    (expected,) = pack(segments, layout(True, length=48))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "authors"])
def test_refuses_a_segment_longer_than_a_row(packed):
    segment = Segment(np.zeros(65, np.int32), 0, np.ones(65, bool), 1.0, 0)
    with pytest.raises(ValueError, match="at most 64 tokens, got 65"):
        pack([segment], layout(packed))


@pytest.mark.parametrize("max_length", [1024, 4096])
def test_at_least_95_percent_of_real_batches_is_text(golden_dir, max_length):
    records = golden_dir.parent / "data"
    if not records.is_dir():
        pytest.skip(f"no records in {records}")
    examples = load_examples(
        records,
        PreTrainedTokenizerFast.from_pretrained(golden_dir / "tokenizer"),
        max_length=max_length,
        exact_window=True,
        append_eot=False,
        desirable_fraction=0.1,
        undesirable_fraction=0.1,
        seed=0,
        needs_label=True,
        skip_bad=False,
        progress=False,
    )
    data = TrainingData(
        examples,
        Layout(1, max_length, MASK, PAD, packed=True),
        estimator=config.Estimator(8, "uniform"),
        batch_size=32,
        seed=0,
    )
    batches = [data.batch(step) for step in range(2)]
    positions = sum(rows.tokens.size for batch in batches for rows in batch.micro_batches)
    visible = sum(int((rows.segment_ids > 0).sum()) for batch in batches for rows in batch.micro_batches)
    assert visible == sum(batch.real_tokens for batch in batches)
    assert visible / positions >= 0.95
