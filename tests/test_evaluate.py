"""The command `evaluate`, on a tiny random model against itself and with prompts that it cannot use."""

import logging
import re
import sys
from collections import Counter
from types import SimpleNamespace

import pytest

from elbo_kto_jax import evaluate
from elbo_kto_jax.errors import UserError
from tests.evaluation.chat_server import serve
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


# ---- a chat model as the judge ----

KEY = "sk-secret-0123456789"


@pytest.fixture
def chat(command, monkeypatch):
    """Runs the command with known answers, the judge's model being `verdict_of(first, second)`; what it was asked."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    texts = {"--checkpoint": ["a long answer", "short", "same"], "--baseline": ["brief", "rather long", "same"]}
    answers = lambda source, records, config, flag: SimpleNamespace(texts=texts[flag])  # noqa: E731
    monkeypatch.setattr(evaluate, "answer", answers)

    def run(verdict_of, *more: str):
        def behave(prompt: str, number: int):
            return verdict_of(*re.findall(r"\[Answer [AB]\]\n(.*)\n\[End of answer [AB]\]", prompt))

        server.behave, server.requests = behave, []
        summary = command([{"prompt": f"p{i}"} for i in range(3)], "--judge=chat", "--judge-model=m", *more)
        return summary, server.prompts

    with serve(lambda prompt, number: "") as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        yield run


def longer(first: str, second: str) -> str:
    return "[[A]]" if len(first) > len(second) else "[[B]]"


def test_chat_judge_sees_both_orders(chat, tmp_path):
    summary, asked = chat(longer)
    assert len(asked) == 4  # equal answers are not asked about
    assert (summary["wins"], summary["ties"], summary["losses"], summary["comparisons"]) == (2, 2, 2, 6)
    assert (summary["adjusted_win_rate"], summary["unparsable"]) == (0.5, 0)
    rows = read_jsonl(tmp_path / "out" / "comparisons.jsonl")
    assert [(row["first"], row["verdict"]) for row in rows] == [
        *[("A", "A"), ("B", "A")],
        *[("A", "B"), ("B", "B")],
        *[("A", "tie"), ("B", "tie")],
    ]
    assert chat(longer, "--overwrite") == (summary, [])  # nothing is asked twice


def test_verdicts_that_cannot_be_read_are_counted_and_never_guessed(chat, tmp_path):
    summary, _ = chat(lambda first, second: "hm" if first == "short" else longer(first, second))
    assert (summary["wins"], summary["ties"], summary["losses"], summary["comparisons"]) == (2, 2, 0, 4)
    assert (summary["unparsable"], summary["left_out"]) == (1, 1)
    assert summary["adjusted_win_rate"] == 0.75
    assert "1 replies of the judge state no verdict" in (tmp_path / "out" / "report.html").read_text()
    rows = read_jsonl(tmp_path / "out" / "comparisons.jsonl")
    assert Counter(row["verdict"] for row in rows) == {"A": 2, "B": 1, "tie": 2, "unparsable": 1}


def test_a_judge_without_any_verdict(chat, tmp_path, monkeypatch):
    answers = lambda source, records, config, flag: SimpleNamespace(texts=[flag] * len(records))  # noqa: E731
    monkeypatch.setattr(evaluate, "answer", answers)
    with pytest.raises(UserError, match=r"none of the 3 prompts a verdict that can be read .*comparisons\.jsonl"):
        chat(lambda first, second: "hm")
    assert not (tmp_path / "out" / "report.html").exists()


def test_the_key_is_written_nowhere(chat, tmp_path, caplog, capfd):
    """Not in results, replies, logs or messages, even where the endpoint echoes it."""
    caplog.set_level(logging.DEBUG)
    chat(lambda first, second: f"{longer(first, second)} {KEY}")
    with pytest.raises(UserError) as refused:
        chat(lambda first, second: {"status": 401, "body": f"bad key {KEY}"}, "--overwrite", "--judge-model=n")
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert any(file.suffix == ".html" for file in files)
    out, err = capfd.readouterr()
    for text in (*(file.read_text() for file in files), caplog.text, out, err, str(refused.value)):
        assert KEY not in text


@pytest.mark.parametrize(
    ("unset", "more", "message"),
    [
        ("OPENAI_API_KEY OPENAI_BASE_URL", [], "OPENAI_API_KEY: not set"),
        ("JUDGE_MODEL", ["--judge-model="], "--judge-model: missing"),
        ("", ["--judge-prompt=nowhere.txt"], r"--judge-prompt=nowhere\.txt: cannot be read"),
        ("", ["--judge-parallel=0"], "--judge-parallel: expected a number of at least 1, got '0'"),
        ("", ["--judge-timeout=nan"], "--judge-timeout: expected a number of at least 0.01"),
        ("", ["--judge=oracle"], "oracle"),
    ],
)
def test_wrong_judges_are_refused_before_anything_is_generated(command, tmp_path, monkeypatch, unset, more, message):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    for name in unset.split():
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=message) as refused:
        command(PROMPTS, "--judge=chat", "--judge-model=m", *more, baseline=tmp_path / "is never looked for")
    assert KEY not in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to evaluate"),
        (["--baseline=b"], "--baseline and --prompts"),
        (["--prompts=p.jsonl"], "--baseline and --prompts"),
    ],
)
def test_what_to_evaluate_has_to_be_said(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        evaluate.main([f"--config={CONFIG}", "--checkpoint=a", f"--out={tmp_path}", *words])


def test_tasks_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "elbo_kto_jax.evaluation.harness", raising=False)
    with pytest.raises(UserError, match=r"--config\.tasks: needs lm-evaluation-harness .*pip install") as refused:
        evaluate.main([f"--config={CONFIG}", "--checkpoint=a", f"--out={tmp_path}", "--config.tasks=gsm8k"])
    assert len(str(refused.value).splitlines()) == 1


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
