"""The command `score`: exact enumeration against goldens, and the estimator against that."""

import json

import numpy as np
import pytest

from elbo_kto_jax import score
from elbo_kto_jax.checkpoints.load import load_config
from elbo_kto_jax.checkpoints.tokenizer import build_tokenizer
from elbo_kto_jax.runtime.errors import UserError
from tests import runs

DRAWS = 16


@pytest.fixture(scope="module")
def exact_record(golden) -> dict:
    """The record of the goldens' `exact.*`, as plain strings that tokenise to its tokens."""
    tokenizer = build_tokenizer(load_config(golden.folder / "policy")[1], "golden")
    record = {"id": "exact"}
    for field, name in (("prompt", "exact.prompt"), ("completion", "exact.answer")):
        tokens = golden.arrays[name].tolist()
        record[field] = tokenizer.decode(tokens)
        if tokenizer(record[field], add_special_tokens=False)["input_ids"] != tokens:
            pytest.skip(f"{name} of these goldens is not what its text tokenises to")
    return record


def run(checkpoint, data, out, *more: str, **settings) -> tuple[dict, list[dict]]:
    settings = {"data.max_length": 256, "train.microbatch_tokens": 256, "data.append_eot": False, **settings}
    summary = score.main(runs.flags(settings, f"--checkpoint={checkpoint}", f"--data={data}", f"--out={out}", *more))
    return summary, runs.read_jsonl(out)


def test_golden_records(golden, tmp_path):
    """Every record has its line, whatever the batches; lengths as in the goldens, where the border is no problem."""
    arrays, draws = golden.arrays, golden.arrays["l_values"].shape[1]
    settings = {"data.max_length": golden.max_length, "train.microbatch_tokens": golden.max_length, **golden.flags}
    summary, rows = run(
        golden.folder / "policy",
        golden.folder / "records.jsonl",
        tmp_path / "out",
        **settings,
        **{"estimator.draws": draws},
    )
    assert summary["records"] == len(rows) == len(arrays["label"])
    assert summary["mean_elbo"] == pytest.approx(np.mean([row["elbo"] for row in rows]))
    assert all(row.keys() == {"id", "elbo", "stderr", "tokens"} for row in rows)
    assert [row["id"] for row in rows] == [row["id"] for row in runs.read_jsonl(golden.folder / "records.jsonl")]
    tokens = np.array([row["tokens"] for row in rows])
    clean = arrays["prompt_is_prefix"]
    np.testing.assert_array_equal(tokens[clean], arrays["completion_length"][clean])
    # Other masks than the goldens', so within the spread of both estimates.
    stderr = np.std(arrays["unpadded.B_theta_draws"], axis=1, ddof=1) / np.sqrt(draws)
    spread = stderr + np.array([row["stderr"] for row in rows])
    difference = np.array([row["elbo"] for row in rows]) - golden.elbo("unpadded", "theta")
    assert np.all(np.abs(difference[clean]) < 6 * spread[clean])


@pytest.mark.parametrize("which", ["policy", "reference"])
def test_exact_is_the_golden_enumeration(golden, exact_record, tmp_path, which):
    data = runs.write_jsonl(tmp_path / "data.jsonl", [exact_record])
    _, (row,) = run(golden.folder / which, data, tmp_path / "out", "--exact", **golden.flags)
    assert row["id"] == "exact"
    assert row["tokens"] == len(golden.arrays["exact.answer"])
    assert row["elbo"] == pytest.approx(float(golden.arrays[f"exact.{which}.elbo"]), abs=1e-4)
    assert row["stderr"] == 0


@pytest.mark.parametrize("scheme", ["uniform", "complementary"])
def test_the_estimate_is_within_its_error_of_the_exact_value(golden, exact_record, tmp_path, scheme):
    """Copies of a record have other ids, hence other masks; `stderr` is that of one of them."""
    copies = [{**exact_record, "id": i} for i in range(8)]
    data = runs.write_jsonl(tmp_path / "data.jsonl", copies)
    settings = {"estimator.draws": DRAWS, "estimator.scheme": scheme, **golden.flags}
    _, rows = run(golden.folder / "policy", data, tmp_path / "out", **settings)
    exact = float(golden.arrays["exact.policy.elbo"])
    elbo, stderr = (np.array([row[key] for row in rows]) for key in ("elbo", "stderr"))
    assert len(set(elbo)) == len(rows)
    assert np.all(np.abs(elbo - exact) < 4 * stderr)
    assert abs(elbo.mean() - exact) < 4 * np.sqrt(np.mean(stderr**2) / len(rows))
    if scheme == "uniform":
        variance = golden.described["exact.policy"]["var_over_fixed_l"]
        assert np.mean(stderr**2) * DRAWS == pytest.approx(variance, rel=0.5)


def test_one_draw_has_no_standard_error(tiny_checkpoint, tmp_path):
    data = runs.write_jsonl(tmp_path / "data.jsonl", runs.records(3))
    settings = {"data.max_length": 32, "train.microbatch_tokens": 32, "estimator.draws": 1}
    _, rows = run(tiny_checkpoint, data, tmp_path / "out", **settings)
    assert [row["stderr"] for row in rows] == [None] * 3


def test_exact_refuses_a_long_completion_before_loading(golden, tmp_path):
    with pytest.raises(UserError, match=r"--exact.*at most 12") as refused:
        run(golden.folder / "policy", golden.folder / "records.jsonl", tmp_path / "out", "--exact", **golden.flags)
    assert str(refused.value).count("\n") <= 1
    assert not (tmp_path / "out").exists()


def test_labels_and_fractions_do_not_matter(tiny_checkpoint, tmp_path):
    records = runs.records(5)
    found = []
    for name, rows, fraction in (
        ("labelled", records, 1.0),
        ("bare", [{key: r[key] for key in ("id", "prompt", "completion")} for r in records], 0.0),
    ):
        data = runs.write_jsonl(tmp_path / f"{name}.jsonl", rows)
        settings = {"data.max_length": 32, "train.microbatch_tokens": 32, "data.desirable_fraction": fraction}
        found.append(run(tiny_checkpoint, data, tmp_path / name, **settings)[1])
    assert json.dumps(found[0]) == json.dumps(found[1])
    assert len(found[0]) == 5
