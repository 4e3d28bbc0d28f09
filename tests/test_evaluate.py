"""The command `evaluate`, on a tiny random model against itself and with prompts that it cannot use."""

import functools
import json
import logging
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from elbo_kto_jax import evaluate, sweep
from elbo_kto_jax.evaluation import comparison, kept
from elbo_kto_jax.evaluation.judges.chat import OPENAI_URL
from elbo_kto_jax.runtime.errors import UserError
from tests import runs
from tests.evaluation.chat_server import serve
from tests.reports.seen import Seen
from tests.robustness import commands
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


def known_answers(texts: dict, folder, model, records, prompts, config, opened) -> list[str]:
    """In place of `kept.answers`: the texts by the flag that names the model."""
    return texts[model.flag]


def test_output_files(command, tmp_path, monkeypatch):
    """With answers that are known: the verdicts of each line, their sum, and a report that shows them."""
    texts = {"--checkpoint": ["0", "1", "x"], "--baseline": ["0", "x", "2"]}
    monkeypatch.setattr(kept, "answers", functools.partial(known_answers, texts))
    summary = command(PROMPTS)
    rows = read_jsonl(tmp_path / "out" / "comparisons.jsonl")
    keys = {"id", "prompt", "answer_a", "answer_b", "verdict", "expected", "correct_a", "correct_b"}
    assert [set(row) for row in rows] == [keys] * 3
    assert [(row["correct_a"], row["correct_b"]) for row in rows] == [(True, True), (True, False), (False, True)]
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
    assert report.count("<h3>Expected answer</h3>") == 3
    assert "66.7% / 66.7%" in report


def test_the_results_are_in_one_file(command, tmp_path, monkeypatch, tiny_checkpoint):
    """Everything that the summary says, and what it depends on; what another command found there stays."""
    monkeypatch.setattr(kept, "answers", functools.partial(known_answers, {"--checkpoint": "01x", "--baseline": "0xx"}))
    file = tmp_path / "out" / "results.json"
    summary = command(PROMPTS)
    found = json.loads(file.read_text())
    assert summary["results_file"] == str(file)
    files = {"comparisons_file", "report", "results_file"}
    assert {key: found[key] for key in summary.keys() - files} == {
        key: value if key != "ci95" else list(value) for key, value in summary.items() if key not in files
    }
    assert (found["checkpoint"], found["baseline"]) == (str(tiny_checkpoint), str(tiny_checkpoint))
    assert (found["prompts"], found["accuracy_a"], found["accuracy_b"]) == (
        3,
        pytest.approx(2 / 3),
        pytest.approx(1 / 3),
    )
    assert found["judge"] == {"name": "verifiable"}
    assert found["settings"]["sampler"]["temperature"] == 1.0
    assert {"elbo_kto_jax", "jax", "python"} <= found["versions"].keys()
    file.write_text(json.dumps({**found, "tasks": {"other": {"metrics": {"acc": 1.0}}}}))
    command(PROMPTS, "--overwrite")
    assert json.loads(file.read_text()) == {**found, "tasks": {"other": {"metrics": {"acc": 1.0}}}}


def test_a_results_file_of_somebody_else_stays(command, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("mine")
    with pytest.raises(UserError, match=r"results\.json exists already.*--overwrite"):
        command(PROMPTS)
    assert (tmp_path / "out" / "results.json").read_text() == "mine"


# ---- a chat model as the judge ----

KEY = "sk-secret-0123456789"


@pytest.fixture
def chat(command, monkeypatch):
    """Runs the command with known answers, the judge's model being `verdict_of(first, second)`; what it was asked."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    texts = {"--checkpoint": ["a long answer", "short", "same"], "--baseline": ["brief", "rather long", "same"]}
    monkeypatch.setattr(kept, "answers", functools.partial(known_answers, texts))

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
    assert (summary["order_agreement"], summary["judged_twice"]) == (1.0, 2)  # equal answers say nothing
    rows = read_jsonl(tmp_path / "out" / "comparisons.jsonl")
    assert [(row["first"], row["verdict"]) for row in rows] == [
        *[("A", "A"), ("B", "A")],
        *[("A", "B"), ("B", "B")],
        *[("A", "tie"), ("B", "tie")],
    ]
    assert chat(longer, "--overwrite") == (summary, [])  # nothing is asked twice


def test_the_reasons_of_the_judge_are_shown(chat, tmp_path):
    chat(lambda first, second: f"<think>Hm.</think>It is <longer>.\n{longer(first, second)}")
    rows = read_jsonl(tmp_path / "out" / "comparisons.jsonl")
    assert [row.get("reason") for row in rows[:2]] == ["It is <longer>.\n[[A]]", "It is <longer>.\n[[B]]"]
    assert "reason" not in rows[-1]  # equal answers, which nobody judged
    report = (tmp_path / "out" / "report.html").read_text()
    assert report.count("It is &lt;longer&gt;.") == 4
    assert "Hm." not in report


def test_how_often_the_orders_agree_is_reported(chat, tmp_path):
    """This judge always picks the first of the answers to one prompt, and says nothing of the other in one order."""
    verdicts = {"a long answer": "[[A]]", "brief": "[[A]]", "short": "hm", "rather long": "[[B]]"}
    summary, _ = chat(lambda first, second: verdicts[first])
    assert (summary["order_agreement"], summary["judged_twice"]) == (0.0, 1)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["order_agreement"] == 0.0
    tiles = Seen(tmp_path / "out" / "report.html").key_numbers
    assert tiles["Orders agree"] == "0.0%"


def test_help_names_the_variables_of_the_judge(capsys):
    for command in (evaluate, sweep):
        with pytest.raises(SystemExit):
            command.main(["--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert all(f" {name} " in text for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "JUDGE_MODEL"))
        assert OPENAI_URL in text


def test_verdicts_that_cannot_be_read_are_counted_and_never_guessed(chat, tmp_path):
    summary, _ = chat(lambda first, second: "hm" if first == "short" else longer(first, second))
    assert (summary["wins"], summary["ties"], summary["losses"], summary["comparisons"]) == (2, 2, 0, 4)
    assert (summary["unparsable"], summary["left_out"]) == (1, 1)
    assert summary["adjusted_win_rate"] == 0.75
    assert "1 replies of the judge state no verdict" in (tmp_path / "out" / "report.html").read_text()
    rows = read_jsonl(tmp_path / "out" / "comparisons.jsonl")
    assert Counter(row["verdict"] for row in rows) == {"A": 2, "B": 1, "tie": 2, "unparsable": 1}


def test_a_judge_without_any_verdict(chat, tmp_path, monkeypatch):
    """Of three prompts one has equal answers, a tie that nobody judged: no win rate comes of it."""
    with pytest.raises(UserError, match=r"none of the 2 prompts a verdict that can be read .*comparisons\.jsonl"):
        chat(lambda first, second: "hm")
    assert not (tmp_path / "out" / "report.html").exists()


def test_few_verdicts_are_warned_of(chat, caplog):
    chat(lambda first, second: "hm" if first == "short" else longer(first, second))
    assert "1 of 2 prompts have no verdict that can be read in both orders" in caplog.text


def test_equal_answers_are_counted_as_not_judged(chat, tmp_path, monkeypatch, caplog):
    summary, _ = chat(longer)
    assert summary["not_judged"] == 2
    assert "In 2 of the 6 comparisons the two answers are equal" in (tmp_path / "out" / "report.html").read_text()
    same = {"--checkpoint": ["a"] * 3, "--baseline": ["a"] * 3}
    monkeypatch.setattr(kept, "answers", functools.partial(known_answers, same))
    summary, asked = chat(longer, "--overwrite")
    assert (asked, summary["not_judged"], summary["comparisons"]) == ([], 6, 6)
    assert "nothing was judged" in caplog.text


def test_reasoning_is_no_verdict(chat):
    summary, _ = chat(lambda first, second: f"<think>[[A]] or [[B]]?</think>{longer(first, second)}")
    assert (summary["unparsable"], summary["wins"], summary["losses"]) == (0, 2, 2)


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
        ("", ["--judge-parallel=0"], "--judge-parallel: expected a number at least 1, got 0"),
        ("", ["--judge-timeout=nan"], "--judge-timeout: expected float, got 'nan'"),
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


def test_the_chat_judge_without_the_extra(command, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setitem(sys.modules, "openai", None)
    for module in ("endpoint", "session", "client"):
        monkeypatch.delitem(sys.modules, f"elbo_kto_jax.evaluation.{module}", raising=False)
    with pytest.raises(UserError, match=r"--judge=chat: needs .*pip install 'elbo_kto_jax\[judge\]'") as refused:
        command(PROMPTS, "--judge=chat", "--judge-model=m", baseline=tmp_path / "is never looked for")
    assert len(str(refused.value).splitlines()) == 1


def test_earlier_results_stay_unless_asked(command, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.html").write_text("earlier")
    with pytest.raises(UserError, match=r"report\.html.*--overwrite"):
        command(PROMPTS)
    assert (tmp_path / "out" / "report.html").read_text() == "earlier"
    assert not (tmp_path / "out" / "comparisons.jsonl").exists()


# ---- going on ----


@pytest.fixture
def answered(monkeypatch):
    """The ids of the prompts that a model answers, in order."""
    ids, respond = [], kept.respond

    def note(checkpoint, records, config):
        ids.extend(record.id for record in records)
        return respond(checkpoint, records, config)

    monkeypatch.setattr(kept, "respond", note)
    return ids


def ends(command, monkeypatch, where, name: str, call: int, error: type[BaseException], *more: str) -> None:
    """Runs the command, which ends in the call of this number (from 1) of `where`.`name`."""
    calls, original = [], getattr(where, name)

    def end(*arguments, **options):
        calls.append(name)
        if len(calls) == call:
            raise error("the end")
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(where, name, end)
        with pytest.raises(error):
            command(PROMPTS, *more)


ENDS = {  # where, the call that ends, and how many answers are missing then
    "before the first answer": (kept, "respond", 1, 6),
    "within a model": (kept, "respond", 2, 4),
    "between the models": (kept, "respond", 3, 3),
    "before the judge": (comparison, "_comparison_rows", 1, 0),
    "between the outputs": (comparison, "write_winrate_report", 1, 0),
    "after the outputs": (kept.Progress, "finish", 1, 0),
}


@pytest.mark.parametrize(("error", "more"), [(KeyboardInterrupt, []), (UserError, ["--overwrite"])])
@pytest.mark.parametrize(("where", "name", "call", "left"), ENDS.values(), ids=ENDS)
def test_the_same_command_goes_on(
    command, whole, tmp_path, monkeypatch, answered, other_checkpoint, where, name, call, left, error, more
):
    """Two answers are written down at a time: what was answered before is not answered again."""
    monkeypatch.setattr(kept, "_BATCHES", 2)
    settings = ["--config.sampler.batch_size=1", *more]
    command = functools.partial(command, baseline=other_checkpoint)
    if more:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "report.html").write_text("earlier")
    ends(command, monkeypatch, where, name, call, error, *settings)
    answered.clear()
    summary = command(PROMPTS, *settings)
    assert len(answered) == left
    names = ("comparisons_file", "report", "results_file")
    assert {key: value for key, value in summary.items() if key not in names} == whole[0]
    assert (tmp_path / "out" / "comparisons.jsonl").read_text() == whole[1]
    assert "earlier" not in (tmp_path / "out" / "report.html").read_text()


@pytest.fixture(scope="module")
def whole(tiny_checkpoint, other_checkpoint, tmp_path_factory):
    """What the command gives that runs to its end: its figures and comparisons.jsonl."""
    folder = tmp_path_factory.mktemp("whole")
    prompts = write_jsonl(folder / "prompts.jsonl", PROMPTS)
    flags = [f"--checkpoint={tiny_checkpoint}", f"--baseline={other_checkpoint}", f"--prompts={prompts}"]
    summary = evaluate.main([f"--config={CONFIG}", "--config.sampler.batch_size=1", *flags, f"--out={folder / 'out'}"])
    del summary["report"], summary["results_file"]
    return summary, Path(summary.pop("comparisons_file")).read_text()


def test_what_is_finished_is_refused_and_what_is_overwritten_is_not_answered_again(command, tmp_path, answered):
    summary = command(PROMPTS)
    with pytest.raises(UserError, match=r"comparisons\.jsonl exists already.*--overwrite"):
        command(PROMPTS)
    answered.clear()
    assert command(PROMPTS, "--overwrite") == summary
    assert answered == []


def test_a_judge_that_failed_may_be_another_the_next_time(chat, tmp_path):
    """Its remedy is another model or prompt: neither needs --overwrite, and the answers are the same."""
    with pytest.raises(UserError, match="none of the 2 prompts a verdict"):
        chat(lambda first, second: "hm")
    with pytest.raises(UserError, match="HTTP 401"):
        chat(lambda first, second: {"status": 401, "body": ""}, "--judge-model=n")
    summary, asked = chat(longer, "--judge-model=o")
    assert (summary["wins"], len(set(asked))) == (2, 4)


@pytest.mark.parametrize("change", ["seed", "prompts", "weights"])
def test_another_evaluation_does_not_go_on(command, tmp_path, monkeypatch, answered, other_checkpoint, change):
    mine = shutil.copytree(other_checkpoint, tmp_path / "mine")
    command = functools.partial(command, baseline=mine)
    ends(command, monkeypatch, comparison, "write_winrate_report", 1, KeyboardInterrupt)
    rows, more = PROMPTS, []
    if change == "seed":
        more = ["--config.seed=7"]
    elif change == "prompts":
        rows = [{**PROMPTS[0], "answer": "7"}, *PROMPTS[1:]]
    else:
        change_a_weight(mine)
    with pytest.raises(UserError, match=r"comparisons\.jsonl exists already, of another evaluation \(win_rate\."):
        command(rows, *more)
    answered.clear()
    command(rows, "--overwrite", *more)
    assert len(answered) == (3 if change == "weights" else 6)


def change_a_weight(checkpoint) -> None:
    """Another number in a published folder, which has the same size and age as before."""
    file = checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    runs.replace_keeping_age(file, bytes(content))


def test_a_signal_ends_the_command_while_the_judge_trickles(tiny_checkpoint, other_checkpoint, tmp_path):
    """SIGTERM: within seconds status 75, and the same command goes on with the answers that it has."""
    prompts = write_jsonl(tmp_path / "prompts.jsonl", PROMPTS)
    over = threading.Event()
    flags = [f"--checkpoint={tiny_checkpoint}", f"--baseline={other_checkpoint}", f"--prompts={prompts}"]
    flags += [f"--config={CONFIG}", f"--out={tmp_path / 'out'}", "--judge=chat", "--judge-model=m"]
    with serve(lambda prompt, number: {"wait": over}) as server:
        variables = {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": KEY, "no_proxy": "127.0.0.1"}
        process = commands.start(["elbo_kto_jax.evaluate", *flags], tmp_path / "log", variables)
        while process.poll() is None and not server.requests:
            time.sleep(0.05)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert commands.finish(process, 60) == 75, (tmp_path / "log").read_text()
        assert time.monotonic() - began < 10  # a second or two, and the machine is busy
        over.set()
    log = (tmp_path / "log").read_text()
    assert "interrupted: 0 of" in log
    assert "Traceback" not in log
    (first, second) = [json.loads(file.read_text()) for file in sorted((tmp_path / "out" / "answers").iterdir())]
    assert len(first["answers"]) == len(second["answers"]) == 3


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
