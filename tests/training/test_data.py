"""training/data.py: a batch is a pure function of the data, the config and the step."""

import jax
import numpy as np
import pytest

from elbo_kto_jax.runtime import config
from elbo_kto_jax.training.data import TrainingData
from tests import tiny

NUM, DRAWS = 11, 3


def training_data(
    batch_size: int = 4, seed: int = 0, scheme: str = "uniform", shorter: tuple = (), **options
) -> TrainingData:
    return TrainingData(
        tiny.examples(NUM),
        tiny.layout(2)._replace(shorter=shorter),
        estimator=config.Estimator(DRAWS, scheme),
        batch_size=batch_size,
        seed=seed,
        **options,
    )


def assert_equal_batches(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def hidden_tokens(batch) -> dict[int, list[tuple[int, float]]]:
    """By index of the draw: which positions of the example are hidden, with their weight."""
    found = {}
    for rows in batch.micro_batches:
        for r, slots in enumerate(rows.slot_index):
            for g, index in enumerate(slots):
                if index < np.iinfo(np.int32).max:
                    here = np.flatnonzero(rows.target_slot[r, : rows.num_targets[r]] == g)
                    where = rows.positions[r, rows.target_position[r, here]]
                    found[int(index)] = list(zip(where.tolist(), rows.target_weight[r, here].tolist(), strict=True))
    return found


def test_a_step_is_the_same_batch_for_every_reader():
    assert_equal_batches(training_data().batch(5), training_data().batch(5))


@pytest.mark.parametrize("shorter", [(), ((16, 24),)], ids=["one length", "several lengths"])
def test_a_process_lays_out_its_own_rows_only_and_they_are_those_of_the_whole(monkeypatch, shorter):
    whole, made = training_data(shorter=shorter).batch(1), []
    assert len({rows.tokens.shape for rows in whole.micro_batches}) == 1 + len(shorter)
    masks = TrainingData.masks
    monkeypatch.setattr(TrainingData, "masks", lambda self, i, epoch: made.append(i) or masks(self, i, epoch))
    for row in (0, 1):
        made.clear()
        part = training_data(own=np.arange(2) == row, shorter=shorter).batch(1)
        assert_equal_batches(part.feedback, whole.feedback)
        assert part.real_tokens == whole.real_tokens
        for own, rows in zip(part.micro_batches, whole.micro_batches, strict=True):
            assert_equal_batches([leaf[row] for leaf in own], [leaf[row] for leaf in rows])
            assert own.num_targets[1 - row] == 0
        draws = {index // DRAWS for rows in whole.micro_batches for index in rows.slot_index[row] if index < 4 * DRAWS}
        assert sorted(made) == sorted(training_data().indices(1)[list(draws)])  # each example's masks once, if at all


@pytest.mark.parametrize("shorter", [(), ((16, 24),)], ids=["one length", "several lengths"])
@pytest.mark.parametrize("packed", [True, False])
def test_the_size_of_a_step_is_that_of_its_batch(shorter, packed):
    data = training_data(shorter=shorter)
    data.layout = data.layout._replace(packed=packed)
    for step in range(data.steps_per_epoch):
        batch, size = data.batch(step), data.size(step)
        positions = sum(rows.tokens.size for rows in batch.micro_batches)
        expected = (int(batch.feedback.is_example.sum()), batch.real_tokens, positions, len(batch.micro_batches))
        assert size == expected


def test_batches_are_those_of_the_steps_from_any_start():
    data = training_data()
    found = list(data.batches(2, 7))
    assert len(found) == 5
    for step, batch in enumerate(found, start=2):
        assert_equal_batches(batch, data.batch(step))


def test_every_epoch_has_each_example_once_in_its_own_order():
    data = training_data()
    epochs = []
    for epoch in range(3):
        first = epoch * data.steps_per_epoch
        order = np.concatenate([data.indices(step) for step in range(first, first + data.steps_per_epoch)])
        assert sorted(order) == list(range(NUM))
        epochs.append(tuple(order))
    assert len({tuple(range(NUM)), *epochs}) == 4


@pytest.mark.parametrize("what", ["seed", "epoch"])
def test_masks_and_order_depend_on_seed_and_epoch(what):
    data = training_data(batch_size=NUM)
    other, step = (training_data(batch_size=NUM, seed=1), 0) if what == "seed" else (data, 1)
    assert not np.array_equal(data.indices(0), other.indices(step))
    everything = np.arange(NUM)
    mine = data.batch_of(everything, epoch=0)
    assert hidden_tokens(mine) != hidden_tokens(other.batch_of(everything, epoch=step))
    assert hidden_tokens(data.batch(step)) == hidden_tokens(data.batch_of(data.indices(step), epoch=step))


def test_the_last_batch_of_an_epoch_holds_the_remainder():
    data = training_data()
    assert data.steps_per_epoch == -(-NUM // 4)
    last = data.batch(data.steps_per_epoch - 1)
    indices = data.indices(data.steps_per_epoch - 1)
    assert len(indices) == NUM % 4
    np.testing.assert_array_equal(last.feedback.is_example, np.arange(4) < len(indices))
    np.testing.assert_array_equal(last.feedback.is_desirable[: len(indices)], data.examples.is_desirable[indices])
    np.testing.assert_array_equal(
        last.feedback.completion_length[: len(indices)], data.examples.completion_length[indices]
    )
    assert hidden_tokens(last).keys() == set(range(len(indices) * DRAWS))
    lengths = np.diff(data.examples.offsets)[indices]
    assert last.real_tokens == DRAWS * lengths.sum()


@pytest.mark.parametrize("scheme", ["uniform", "stratified", "complementary", "bernoulli"])
def test_masks_do_not_depend_on_the_batch_size_or_the_place_in_the_batch(scheme):
    def by_example(batch_size: int) -> dict:
        data, found = training_data(batch_size, scheme=scheme), {}
        for step in range(data.steps_per_epoch, 2 * data.steps_per_epoch):
            hidden = hidden_tokens(data.batch(step))
            for b, i in enumerate(data.indices(step)):
                found[int(i)] = [hidden[b * DRAWS + k] for k in range(DRAWS)]
        return found

    assert by_example(4) == by_example(3) == by_example(NUM)


def test_hidden_tokens_are_what_the_model_is_asked_for():
    """Targets lie in the completion, are replaced by the mask token, and nothing else is."""
    data = training_data(batch_size=NUM)
    for rows in data.batch(0).micro_batches:
        for r, count in enumerate(rows.num_targets):
            where = rows.target_position[r, :count]
            np.testing.assert_array_equal(np.flatnonzero(rows.tokens[r] == tiny.MODEL.mask_token_id), np.sort(where))
    examples, indices = data.examples, data.indices(0)
    for index, hidden in hidden_tokens(data.batch(0)).items():
        i = indices[index // DRAWS]
        start, length = examples.prompt_length[i], examples.completion_length[i]
        assert all(start <= position < start + length for position, _ in hidden)
        assert all(weight == np.float32(length / len(hidden)) for _, weight in hidden)
