"""training/order.py: which examples a step uses, alone and in a mixture of data sets."""

import collections
import json

import numpy as np
import pytest

from elbo_kto_jax.data.examples import load_examples
from elbo_kto_jax.runtime import config
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.flags import Flags
from elbo_kto_jax.training import inputs
from elbo_kto_jax.training.data import TrainingData
from elbo_kto_jax.training.order import Mixed, Shuffled, shares
from tests import runs, tiny


def epoch_of(order, epoch=0):
    """(groups, passes) of a whole epoch."""
    steps = [order.step(epoch * order.steps_per_epoch + step) for step in range(order.steps_per_epoch)]
    return np.concatenate([step.chosen for step in steps]), np.concatenate([step.passes for step in steps])


def set_of(chosen, sizes):
    return np.searchsorted(np.cumsum(sizes), chosen, side="right")


@pytest.mark.parametrize(
    ("sizes", "weights", "bound"),
    [
        ((70, 30), (0.5, 0.5), 0.5),
        ((3, 97), (0.7, 0.3), 0.5),
        ((50, 20, 30), (5, 2, 1), 1.0),
        ((9, 9, 9, 9, 9), (1, 1, 1, 1, 1), 1.0),
        ((40, 3, 5, 2, 60), (0.5, 0.1, 0.1, 0.1, 0.2), 2.5),
    ],
)
def test_the_proportions_hold_at_every_point_of_an_epoch(sizes, weights, bound):
    order = Mixed(sizes, weights, batch=8, seed=0)
    for epoch in (0, 3):
        chosen, _ = epoch_of(order, epoch)
        assert len(chosen) == sum(sizes)
        sets = set_of(chosen, sizes)
        for i, share in enumerate(shares(sum(sizes), weights)):
            so_far = np.cumsum(sets == i)
            assert so_far[-1] == share
            due = np.arange(1, len(sets) + 1) * share / sum(sizes)
            assert np.max(np.abs(so_far - due)) <= bound + 1e-9


@pytest.mark.parametrize("sizes", [(7, 5), (1, 10, 4), (33, 34, 33)])
def test_weights_like_the_sizes_have_each_record_once(sizes):
    order = Mixed(sizes, [size / 7 for size in sizes], batch=4, seed=1)
    for epoch in range(2):
        chosen, passes = epoch_of(order, epoch)
        assert sorted(chosen) == list(range(sum(sizes)))
        assert (passes == epoch).all()


def test_a_small_set_is_used_up_before_it_begins_again_in_another_order():
    sizes = (5, 45)
    order = Mixed(sizes, (1, 1), batch=7, seed=0)
    chosen, passes = map(np.concatenate, zip(epoch_of(order), epoch_of(order, 1), strict=True))
    few, times = chosen[chosen < 5], passes[chosen < 5]
    assert len(few) == 50
    rounds = few.reshape(10, 5)
    assert (np.sort(rounds, axis=1) == np.arange(5)).all()
    np.testing.assert_array_equal(times, np.repeat(np.arange(10), 5))
    assert len({tuple(one) for one in rounds}) > 5
    many = chosen[chosen >= 5]
    assert len(set(many[:45])) == 45  # across the end of an epoch, too


def test_a_step_depends_on_seed_and_step_only():
    def order(seed=0):
        return Mixed((9, 14), (0.6, 0.4), batch=4, seed=seed)

    for step in (0, 5, 6, 17):
        for a, b in zip(order().step(step), order().step(step), strict=True):
            np.testing.assert_array_equal(a, b)
    assert not np.array_equal(epoch_of(order())[0], epoch_of(order(1))[0])
    assert not np.array_equal(epoch_of(order())[0], epoch_of(order(), 1)[0])


def test_without_weights_each_group_comes_once_an_epoch():
    chosen, passes = epoch_of(Shuffled(11, batch=4, seed=0), 2)
    assert sorted(chosen) == list(range(11))
    assert set(passes) == {2}


def test_shares_add_up():
    assert shares(10, [1, 1, 1]) == [4, 3, 3]
    assert shares(7, [0.7, 0.3]) == [5, 2]
    assert shares(3, [1e-9, 1]) == [0, 3]


def mixture(tmp_path, tokenizer, weights=(), **changes):
    """Two files: 4 good records, and 16 of which one is good."""
    rows = [{"id": i, "prompt": f"Q{i}:", "completion": f" {i}", "label": i < 5} for i in range(20)]
    files = {"a,b.jsonl": rows[:4], "c.jsonl": rows[4:]}
    paths = [str(runs.write_jsonl(tmp_path / name, part)) for name, part in files.items()]
    settings = {"max_length": 64, "exact_window": True, "append_eot": False, "seed": 0, "needs_label": True}
    settings |= {"desirable_fraction": 1.0, "undesirable_fraction": 1.0, "skip_bad": False, "progress": False}
    return paths, load_examples(paths, tokenizer, weights=weights, **{**settings, **changes})


@pytest.fixture(scope="module")
def tokenizer():
    from elbo_kto_jax.checkpoints.tiny import tiny_tokenizer

    return tiny_tokenizer()


def test_examples_of_a_mixture(tmp_path, tokenizer):
    paths, examples = mixture(tmp_path, tokenizer, prompts=2)
    assert examples.sizes == (4, 16)
    assert list(examples.ids) == list(map(str, range(20)))
    assert [str(file) for file in examples.files] == paths
    assert examples.counts.examples == 20
    assert examples.prompts == ["Q0:", "Q1:"]
    assert mixture(tmp_path, tokenizer)[1].digest() == examples.digest()
    assert f"{paths[0]}: 20% of every epoch" in examples.report
    assert f"{paths[1]}: 50% of every epoch" in mixture(tmp_path, tokenizer, (1, 1))[1].report


def test_where_one_set_ends_and_the_next_begins_is_an_input_of_a_run():
    examples = tiny.examples(20)
    found = [
        inputs.of_examples(type(examples)(**{**vars(examples), "sizes": sizes})) for sizes in ((20,), (4, 16), (5, 15))
    ]
    assert [one.pop("sizes", "") for one in found] == ["", "4, 16", "5, 15"]
    assert found[0] == found[1] == found[2] == inputs.of_examples(examples)


def test_the_balance_of_labels_is_that_of_the_mixture(tmp_path, tokenizer):
    """Neither file alone: of the first all are good, and of the second 1 of 16."""
    assert "WARNING" not in mixture(tmp_path, tokenizer)[1].report
    assert "WARNING" not in mixture(tmp_path, tokenizer, (1, 1))[1].report
    rare = mixture(tmp_path, tokenizer, (1, 24), desirable_fraction=0.25)[1].report
    assert "WARNING: only 1 of 16 examples is desirable" in rare


def test_masks_of_a_record_that_comes_twice_in_an_epoch_differ():
    examples = tiny.examples(20)
    examples = type(examples)(**{**vars(examples), "sizes": (2, 18)})
    data = TrainingData(
        examples,
        tiny.layout(4),
        estimator=config.Estimator(1, "uniform"),
        batch_size=10,
        seed=0,
        weights=(0.5, 0.5),
    )
    assert data.steps_per_epoch == 2
    indices = data.indices(0)
    assert collections.Counter((indices < 2).tolist()) == {True: 5, False: 5}
    made = []
    data.masks, masks = lambda i, epoch: made.append((i, epoch)) or masks(i, epoch), data.masks
    data.batch(0)
    data.batch(1)
    assert len(set(made)) == len(made) == 20
    assert {epoch for i, epoch in made if i < 2} == set(range(5))


def parse(*words):
    flags = Flags("elbo_kto_jax.train", "test")
    flags.add_config()
    return flags.parse([f"--config={runs.CONFIG}", *words])[1].data


def test_several_data_sets_on_the_command_line(tmp_path):
    found = parse("--config.data.train=['a,b.jsonl', 'org/name@main:train']", "--config.data.weights=[0.7, 0.3]")
    assert found.train == ["a,b.jsonl", "org/name@main:train"]
    assert found.weights == [0.7, 0.3]
    assert parse("--config.data.train=['gs://b/x', 'a']").train == ["gs://b/x", "a"]
    assert parse("--config.data.train=('a.jsonl',)").train == "a.jsonl"
    assert parse("--config.data.train=a,b.jsonl").train == "a,b.jsonl"
    assert parse("--config.data.train=[draft] a.jsonl").train == "[draft] a.jsonl"
    for words, said in (
        (["train=['a', 3]"], "config.data.train: expected the name of a data set, or a list of such names, got"),
        (["train=[]"], "config.data.train: expected the name of a data set"),
        (["train=['a', 'xyz://b/x']"], "xyz:// addresses are not supported"),
        (["train=['a', 'b']", "weights=[1, 2, 3]"], "config.data.weights: 3 weights for 2 data sets"),
        (["train=a", "weights=[1]"], "config.data.weights: 1 weights for one data set, which needs none"),
        (["train=['a', 'b']", "weights=[1, 0]"], "config.data.weights[1]: expected a number more than 0"),
    ):
        with pytest.raises(UserError) as error:
            parse(*(f"--config.data.{word}" for word in words))
        assert said in str(error.value)


def test_a_run_keeps_the_commits_of_its_data_sets(tmp_path):
    from elbo_kto_jax.runtime.config import Config
    from elbo_kto_jax.runtime.flags import load_config_file
    from elbo_kto_jax.runtime.workdir import open_workdir

    tree = load_config_file(str(runs.CONFIG)).to_dict()
    tree["data"]["train"] = ["a.jsonl", "o/n@main"]
    resolved = Config.from_mapping(tree)
    with open_workdir(tmp_path / "w", resolved, False, "train") as folder:
        assert folder.revisions == {}
        folder.claim({"config.data.train": {"examples": 3}}, {}, {"o/n@main": "1" * 40})
        (tmp_path / "w" / "checkpoints").mkdir()
        (tmp_path / "w" / "checkpoints" / "x").touch()
    with open_workdir(tmp_path / "w", resolved, False, "train") as folder:
        assert folder.revisions == {"o/n@main": "1" * 40}
        folder.claim({"config.data.train": {"examples": 3}}, {}, {"o/n@main": "1" * 40})
    stored = json.loads((tmp_path / "w" / "config.json").read_text())
    assert stored["revisions"] == {"o/n@main": "1" * 40}
    assert stored["config"]["data"]["train"] == ["a.jsonl", "o/n@main"]
