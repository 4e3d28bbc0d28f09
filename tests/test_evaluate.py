"""The command `evaluate`, on a tiny random model against itself and with prompts that it cannot use."""

from collections import Counter
from types import SimpleNamespace

import pytest

from elbo_kto_jax import evaluate
from elbo_kto_jax.errors import UserError
from tests.runs import CONFIG, read_jsonl, write_jsonl

PROMPTS = [
    {"id": f"prompt {i}", "prompt": [{"role": "user", "content": f"Capitals {i}"}], "answer": str(i)} for i in range(3)
]


@pytest.fixture
def command(tiny_checkpoint, tmp_path):
    """Runs the command with the prompts `rows`; returns its summary."""

    def run(rows: list, *more: str, baseline=tiny_checkpoint) -> dict:
        prompts = write_jsonl(tmp_path / "prompts.jsonl", rows)
        return evaluate.main(
            [
                f"--config={CONFIG}",
                f"--checkpoint={tiny_checkpoint}",
                f"--baseline={baseline}",
                f"--prompts={prompts}",
                f"--out={tmp_path / 'out'}",
                *more,
            ]
        )

    return run


def test_a_model_ties_with_itself_under_identical_decoding(command, tmp_path):
    """At temperature 1 only equal random draws make the answers equal."""
    summary = command([*PROMPTS, {"prompt": "As it is", "answer": ".", "match": "regex"}])
    rows = read_jsonl(tmp_path / "out" / "comparisons.jsonl")
    assert [row["answer_a"] for row in rows] == [row["answer_b"] for row in rows]
    assert len({row["answer_a"] for row in rows}) > 1
    assert summary["adjusted_win_rate"] == 0.5
    assert (summary["ties"], summary["comparisons"]) == (4, 4)


def test_output_files(command, tmp_path, monkeypatch):
    """With answers that are known: the verdicts of each line, their sum, and a report that shows them."""
    texts = {"--checkpoint": ["0", "1", "x"], "--baseline": ["0", "x", "2"]}
    answers = lambda source, records, config, flag: SimpleNamespace(texts=texts[flag])  # noqa: E731
    monkeypatch.setattr(evaluate, "answer", answers)
    summary = command(PROMPTS)
    rows = read_jsonl(tmp_path / "out" / "comparisons.jsonl")
    assert [set(row) for row in rows] == [{"id", "prompt", "answer_a", "answer_b", "verdict", "expected"}] * 3
    assert [(row["id"], row["prompt"], row["expected"], row["verdict"]) for row in rows] == [
        ("prompt 0", "Capitals 0", "0", "tie"),
        ("prompt 1", "Capitals 1", "1", "A"),
        ("prompt 2", "Capitals 2", "2", "B"),
    ]
    verdicts = Counter(row["verdict"] for row in rows)
    assert (summary["wins"], summary["ties"], summary["losses"]) == (verdicts["A"], verdicts["tie"], verdicts["B"])
    assert summary["comparisons_file"] == str(tmp_path / "out" / "comparisons.jsonl")
    report = (tmp_path / "out" / "report.html").read_text()
    assert summary["report"] == str(tmp_path / "out" / "report.html")
    assert "Capitals 2" in report
    assert "of 3 comparisons" in report
    assert "Judge as expected" not in report  # `expected` of a prompt is its answer, not a verdict


def test_earlier_results_stay_unless_asked(command, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.html").write_text("earlier")
    with pytest.raises(UserError, match=r"report\.html.*--overwrite"):
        command(PROMPTS)
    assert (tmp_path / "out" / "report.html").read_text() == "earlier"
    assert not (tmp_path / "out" / "comparisons.jsonl").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([PROMPTS[0], {"prompt": "p"}], r"prompts\.jsonl:2: field `answer`"),
        ([PROMPTS[0], "", {**PROMPTS[1], "answer": 1}], r"prompts\.jsonl:3: field `answer`"),  # blank lines count
        ([PROMPTS[0], {"answer": "1"}], r"prompts\.jsonl:2: field `prompt`"),
        ([PROMPTS[0], "{"], r"prompts\.jsonl:2: "),
        ([], r"prompts\.jsonl"),
    ],
)
def test_bad_prompts_are_refused_before_anything_is_generated(command, tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        command(rows, baseline=tmp_path / "is never looked for")
    assert not (tmp_path / "out").exists()


def test_prompts_of_another_kind(command, tmp_path):
    with pytest.raises(UserError, match=r"--prompts=.*\.json: expected a file that ends in \.jsonl"):
        command(PROMPTS, f"--prompts={tmp_path / 'prompts.json'}")
