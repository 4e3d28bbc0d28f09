"""data/fitting.py: every segment in a row, no more micro-batches than of full rows, and short rows."""

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from elbo_kto_jax.data.examples import load_examples
from elbo_kto_jax.data.fitting import best_fit, fit, shorter_lengths, slots_of, text_fraction
from elbo_kto_jax.planning.workload import spread_lengths, visited_fraction

LONGEST = 4096
SHORTER = shorter_lengths(LONGEST)


def test_the_lengths_of_rows():
    """Few, none below a fourth of the longest, and multiples of the tiles in which a TPU computes attention."""
    assert SHORTER == ((1024, 2048, 3072), (1024, 1536, 2048, 2560, 3072, 3584, 3840))
    assert shorter_lengths(2048) == ((512, 1024, 1536), (512, 768, 1024, 1280, 1536, 1792, 1920))
    assert shorter_lengths(1000) == ((256, 512, 768), (256, 384, 512, 640, 768, 896))
    assert shorter_lengths(256) == ()
    assert shorter_lengths(8192)[0] == (2048, 4096, 6144)


def test_best_fit_keeps_to_capacities_and_slots():
    lengths = np.random.default_rng(0).integers(1, 30, 200).tolist()
    capacities = np.random.default_rng(1).integers(30, 60, 120).tolist()
    bins = best_fit(lengths, capacities, [4] * 120)
    assert sorted(i for row in bins for i in row) == list(range(200))
    assert all(sum(lengths[i] for i in row) <= capacity for row, capacity in zip(bins, capacities, strict=True))
    assert max(map(len, bins)) <= 4


def test_best_fit_takes_the_fullest_bin():
    assert best_fit([1, 3, 2, 3], [4] * 3, [2] * 3) == [[1, 0], [3], [2]]
    assert best_fit([1] * 5, [30] * 3, [2] * 3) == [[0, 1], [2, 3], [4]]
    assert best_fit([2, 5, 3], [9, 6, 3], [9] * 3) == [[0], [1], [2]]
    assert best_fit([2, 5, 3], [9, 6, 3], [1] * 3) == [[0], [1], [2]]
    assert best_fit([4, 4], [6, 3], [9] * 2) is None


def random_batches(number: int, examples: int, *, mean: float, draws: int = 8):
    rng = np.random.default_rng(0)
    for _ in range(number):
        lengths = np.clip(rng.lognormal(np.log(mean) - 0.3, 0.8, examples), 1, LONGEST).astype(int)
        yield np.repeat(lengths, draws).tolist()


@pytest.mark.parametrize("rows", [2, 5, 16, 64])
@pytest.mark.parametrize("mean", [200, 700])
def test_fitted_micro_batches_hold_every_segment_and_no_more_of_them_are_needed(rows, mean):
    for lengths in random_batches(4, 8, mean=mean):
        full, found = fit(lengths, rows, LONGEST), fit(lengths, rows, LONGEST, SHORTER)
        assert sorted(i for _, bins in found for row in bins for i in row) == list(range(len(lengths)))
        for length, bins in found:
            assert length in {LONGEST, *SHORTER[0], *SHORTER[1]}
            assert len(bins) <= rows
            assert all(sum(lengths[i] for i in row) <= length for row in bins)
            assert max(map(len, bins)) <= slots_of(length)
        assert len(found) == len(full)
        assert text_fraction(lengths, found, rows) >= text_fraction(lengths, full, rows)
        assert len({length for length, _ in found[:-1]}) <= 1
        assert found == fit(list(lengths), rows, LONGEST, SHORTER)


def test_full_rows_are_left_as_they_are():
    """Where few positions are empty, another length would be compiled for little."""
    lengths = [2048] * 64 + [1000] * 12
    assert 0.95 < text_fraction(lengths, fit(lengths, 4, LONGEST), 4) < 0.98
    assert fit(lengths, 4, LONGEST, SHORTER) == fit(lengths, 4, LONGEST)


def test_the_coarse_lengths_come_first():
    assert [length for length, _ in fit([1000] * 12, 4, LONGEST, SHORTER)] == [3072]
    assert [length for length, _ in fit([1100] * 8, 4, LONGEST, SHORTER)] == [2560]
    assert [length for length, _ in fit([4000] + [900] * 8, 4, LONGEST, SHORTER)] == [
        LONGEST
    ]  # a segment that needs it
    assert [length for length, _ in fit([3300] * 2 + [900] * 6, 2, LONGEST, SHORTER)] == [3584, 3072]
    assert fit([], 4, LONGEST, SHORTER) == []


@pytest.fixture(scope="module")
def kto_mix(golden_dir):
    """Tokens of real records of kto-mix."""
    records = golden_dir.parent / "data"
    if not records.is_dir():
        pytest.skip(f"no records in {records}")
    examples = load_examples(
        records,
        PreTrainedTokenizerFast.from_pretrained(golden_dir / "tokenizer"),
        max_length=LONGEST,
        exact_window=True,
        append_eot=False,
        desirable_fraction=0.5,
        undesirable_fraction=0.5,
        seed=0,
        needs_label=True,
        skip_bad=False,
        progress=False,
    )
    return np.diff(examples.offsets)


# A vocabulary of the size of LLaDA's makes fewer tokens of a text than that of the tests: 700 of a record, on average.
@pytest.mark.parametrize("mean", [None, 700], ids=["the tests' tokens", "700 tokens"])
@pytest.mark.parametrize("shards", [4, 16, 64])
def test_at_least_90_percent_of_the_positions_of_kto_mix_are_text(kto_mix, shards, mean):
    """In the recipe's batches, 32 examples of 8 draws a row a shard; rows of one length: 61 to 67% on 64."""
    lengths = kto_mix if mean is None else np.maximum(1, kto_mix * mean / kto_mix.mean()).astype(int)
    rng, tokens, positions = np.random.default_rng(0), 0, 0
    for _ in range(20):
        batch = np.repeat(rng.choice(lengths, 32, replace=False), 8).tolist()
        tokens += sum(batch)
        positions += shards * sum(length for length, _ in fit(batch, shards, LONGEST, SHORTER))
    assert tokens / positions >= 0.9


@pytest.mark.parametrize("shards", [4, 16, 64])
def test_attention_visits_as_many_blocks_as_a_plan_says(kto_mix, shards):
    """Of rows of kto-mix, beside those of the typical batch that a plan packs: 49, 52 and 60%, and 49, 52 and 65%."""
    lengths = np.maximum(1, kto_mix * 700 / kto_mix.mean()).astype(int)
    rng = np.random.default_rng(0)

    def visited(examples) -> tuple[float, float]:
        """Blocks that are visited, and blocks."""
        batch = np.repeat(examples, 8).tolist()
        found = [
            (visited_fraction([batch[i] for i in row], length), (length / 512) ** 2)
            for length, rows in fit(batch, shards, LONGEST, SHORTER)
            for row in rows
        ]
        return sum(part * blocks for part, blocks in found), sum(blocks for _, blocks in found)

    real = np.sum([visited(rng.choice(lengths, 32, replace=False)) for _ in range(20)], axis=0)
    typical = visited(spread_lengths(32, 700, LONGEST))
    assert real[0] / real[1] == pytest.approx(typical[0] / typical[1], abs=0.07)
