"""evaluation/harness.py through the real lm_eval, on a tiny random model and task files that need no network."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
pytest.importorskip("datasets", reason="the extra `eval` is not installed")

from lm_eval.api.instance import Instance

from elbo_kto_jax import evaluate
from elbo_kto_jax.checkpoints.tiny import write_untrained
from elbo_kto_jax.cli import Flags
from elbo_kto_jax.data.records import Record
from elbo_kto_jax.diffusion.exact import all_masks, exact_weights
from elbo_kto_jax.evaluation import benchmarks, harness
from elbo_kto_jax.runtime.config import Config, Task
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.sampling.respond import open_checkpoint, respond
from elbo_kto_jax.scoring import likelihood
from tests import runs

WRITE = """
task: local_write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "Capitals {{{{q}}}}"
doc_to_target: "{{{{a}}}}"
generation_kwargs: {{until: ["{stop}"], do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
CHOOSE = """
task: local_choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Capitals {{{{q}}}} are"
doc_to_target: "{{{{gold}}}}"
doc_to_choice: ["AB", "CDE"]
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
{more}
"""
DOCS = [{"q": q, "a": q.upper(), "gold": i % 2} for i, q in enumerate(("abc", "de", "fgh"))]
TABLE = """
from ml_collections import ConfigDict
def get_config():
    sampler = {"gen_length": 8, "steps": 8, "block_length": 8, "temperature": 1.0}
    row = {"num_fewshot": 0, "chat_template": True, "sampler": sampler, "draws": 64, "executes_code": False}
    return ConfigDict({"local_write": row, "local_choose": {**row, "chat_template": False, "sampler": {}}})
"""


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.fixture
def task(tmp_path):
    """Writes a task file over DOCS; returns its path."""

    def write(name: str, text: str, **fields: str) -> str:
        data = runs.write_jsonl(tmp_path / "docs.jsonl", DOCS)
        path = tmp_path / f"{name}.yaml"
        path.write_text(text.format(data=data, **{"stop": "###", "more": "", **fields}))
        return str(path)

    return write


@pytest.fixture(params=["llada", "dream"])
def published(request, tmp_path):
    """A folder of a tiny random model; Dream's logits are shifted by one."""
    write_untrained(tmp_path / "model", 0, request.param)
    return tmp_path / "model"


def config(**overrides) -> Config:
    flags = Flags("evaluate", "test")
    flags.add_config()
    return flags.parse(runs.flags({"sampler.temperature": 0.0, "sampler.remasking": "low_confidence", **overrides}))[1]


def command(checkpoint, tmp_path, tasks: str, *more: str) -> dict:
    table = tmp_path / "table.py"
    table.write_text(TABLE)
    argv = [f"--checkpoint={checkpoint}", f"--out={tmp_path / 'out'}", f"--task-table={table}", *more]
    return evaluate.main(runs.flags({"tasks": tasks}, *argv))


def test_generated_and_compared_answers(published, tmp_path, task):
    """Both kinds of task through the command: the metrics are those of the answers that the sampler writes."""
    tasks = [task("local_write", WRITE), task("local_choose", CHOOSE)]
    summary = command(published, tmp_path, ",".join(tasks))
    assert set(summary["tasks"]) == {"local_write", "local_choose"}
    assert summary["tasks"]["local_choose"]["acc,none"] in [pytest.approx(n / 3) for n in range(4)]
    found = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]
    assert {name: of_task["metrics"] for name, of_task in found.items()} == summary["tasks"]
    assert found["local_write"]["checkpoint"] == str(published)
    assert {"sampler", "row", "limit"} <= found["local_write"]["settings"].keys()

    written = json.loads((tmp_path / "out" / "tasks" / "local_write.json").read_text())
    assert {"results", "configs", "versions", "n-shot", "n-samples", "config", "task_hashes", "chat_template"} <= set(
        written
    )
    assert written["results"]["local_write"]["exact_match,none"] == summary["tasks"]["local_write"]["exact_match,none"]
    assert written["config"]["model_args"]["path"] == str(published)
    assert written["n-samples"]["local_write"]["effective"] == 3

    rows = runs.read_jsonl(tmp_path / "out" / "tasks" / "local_write.samples.jsonl")
    sampler = {"gen_length": 8, "steps": 8, "block_length": 8, "temperature": 1.0, "remasking": "random"}
    settings = config().with_sampler(sampler, "test")
    checkpoint = open_checkpoint(str(published), settings, flag="")
    messages = [[{"role": "user", "content": f"Capitals {doc['q']}"}] for doc in DOCS]
    contexts = [harness.DiffusionLM(checkpoint, settings, 1).apply_chat_template(chat) for chat in messages]
    assert [row["arguments"][0][0] for row in rows] == contexts
    records = [Record(f"{harness._hash(context)}#1", context, None, None, "") for context in contexts]
    texts = respond(checkpoint, records, settings).texts
    assert [row["resps"][0][0] for row in rows] == texts
    assert len(set(texts)) > 1


def test_answers_end_at_the_first_stop_string(tiny_checkpoint, tmp_path, task):
    whole = command(tiny_checkpoint, tmp_path, task("local_write", WRITE))
    first = runs.read_jsonl(tmp_path / "out" / "tasks" / "local_write.samples.jsonl")[0]["resps"][0][0]
    stop = first[2]
    command(tiny_checkpoint, tmp_path, task("local_write", WRITE, stop=stop), "--overwrite")
    rows = runs.read_jsonl(tmp_path / "out" / "tasks" / "local_write.samples.jsonl")
    assert rows[0]["resps"][0][0] == first[: first.index(stop)]
    assert whole["tasks"]["local_write"]["exact_match,none"] == 0.0


@pytest.mark.parametrize(
    ("stops", "cut"), [(["c", "bc"], "a"), (["d", ""], "abc"), (["x"], "abcd"), ([], "abcd"), (["abcd"], "")]
)
def test_cut_at(stops, cut):
    assert harness.cut_at("abcd", stops) == cut


def request(context: str, answer: object) -> Instance:
    return Instance("loglikelihood", {}, (context, answer), 0, ("task", 7, 1))


def test_likelihood_estimates_the_exact_elbo(published):
    """Against the enumeration of all masks: within 4.5 standard errors (two-sided false alarms: 7e-6 each)."""
    settings = config()
    checkpoint = open_checkpoint(str(published), settings, flag="")
    pairs = [("Capitals abc are ", "XYZ"), ("Capitals", " Q12w"), ("", "user")]
    draws = 512
    found = harness.DiffusionLM(checkpoint, settings, draws).loglikelihood([request(*pair) for pair in pairs])
    for (context, answer), (value, is_greedy) in zip(pairs, found, strict=True):
        assert is_greedy is False
        text = checkpoint.tokenizer(context + answer, add_special_tokens=False)["input_ids"]
        length = len(text) - len(checkpoint.tokenizer(context.rstrip(), add_special_tokens=False)["input_ids"])
        masks = all_masks(length)
        hidden = np.concatenate([np.zeros((len(masks), len(text) - length), bool), masks], axis=1)
        tokens = jnp.asarray(np.where(hidden, checkpoint.model.config.mask_token_id, text))
        logits = np.asarray(checkpoint.model.apply({"params": checkpoint.params}, tokens, method="logits"), np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        sums = (log_probs[:, np.arange(len(text)), text] * hidden).sum(axis=1)
        weights = exact_weights(masks)
        exact = np.sum(weights * sums)
        counts = masks.sum(axis=1)
        of_draw, probability = sums * length / counts, weights * counts / length
        assert probability.sum() == pytest.approx(1)
        spread = np.sqrt(np.sum(probability * (of_draw - exact) ** 2))
        assert value == pytest.approx(exact, abs=4.5 * spread / np.sqrt(draws) + 1e-4)


def test_likelihood_does_not_depend_on_the_other_requests(tiny_checkpoint, monkeypatch):
    """Masks are a function of seed and text, whatever is scored beside it and however it is split."""
    settings = config()
    model = harness.DiffusionLM(open_checkpoint(str(tiny_checkpoint), settings, flag=""), settings, 6)
    requests = [request("Capitals", f" {answer}") for answer in ("abc", "q", "uvwxyz")]
    together = model.loglikelihood(requests)
    monkeypatch.setattr(likelihood, "_AT_ONCE", 4)
    split = model.loglikelihood(requests[::-1])[::-1]
    np.testing.assert_allclose([v for v, _ in split], [v for v, _ in together], rtol=1e-5)


def test_several_answers_to_one_question_differ(tiny_checkpoint):
    """repeats > 1 clones the request; at temperature 1 each copy has its own noise."""
    settings = config(**{"sampler.temperature": 1.0})
    model = harness.DiffusionLM(open_checkpoint(str(tiny_checkpoint), settings, flag=""), settings, 1)
    texts = model.generate_until([request("Capitals abc", {"until": []})] * 4)
    assert len(set(texts)) > 1
    assert model.generate_until([request("Capitals abc", {"until": "\n"})] * 4) == [t.split("\n")[0] for t in texts]


def test_an_open_message_goes_on(tiny_checkpoint):
    """gen_prefix (humaneval_instruct): the assistant's message is begun, and no new one is opened."""
    settings = config()
    model = harness.DiffusionLM(open_checkpoint(str(tiny_checkpoint), settings, flag=""), settings, 1)
    chat = [{"role": "user", "content": "Capitals"}, {"role": "assistant", "content": "They are"}]
    assert model.apply_chat_template(chat, add_generation_prompt=False).endswith("<|end_header_id|>\n\nThey are")
    assert model.apply_chat_template(chat[:1]).endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("humaneval_instruct", r"--config\.tasks: task humaneval_instruct executes .*--confirm-run-unsafe-code"),
        ("nowhere.yaml", r"task 'nowhere\.yaml' cannot be loaded"),
    ],
)
def test_tasks_that_cannot_be_run(tiny_checkpoint, tmp_path, tasks, message):
    argv = [f"--checkpoint={tiny_checkpoint}", f"--out={tmp_path / 'out'}"]
    with pytest.raises(UserError, match=message) as refused:
        evaluate.main(runs.flags({"tasks": tasks}, *argv))
    assert len(str(refused.value).splitlines()) <= 2
    assert not (tmp_path / "out").exists()


def test_a_file_that_executes_code_is_refused_too(tiny_checkpoint, tmp_path, task):
    path = task("local_choose", CHOOSE, more="unsafe_code: true")
    with pytest.raises(UserError, match="--confirm-run-unsafe-code"):
        command(tiny_checkpoint, tmp_path, path)
    command(tiny_checkpoint, tmp_path, path, "--confirm-run-unsafe-code", "--limit=1")


def test_contexts_that_do_not_fit_are_cut_from_the_left(tiny_checkpoint, caplog):
    """As the harness does: the last tokens stay, and a word says so."""
    settings = config()
    checkpoint = open_checkpoint(str(tiny_checkpoint), settings, flag="")
    model = harness.DiffusionLM(checkpoint, settings, 4)
    longest = checkpoint.model.config.max_sequence_length
    answer = "b" * 20
    context = "c" * 7 + "a" * (longest - len(checkpoint.tokenizer(answer, add_special_tokens=False)["input_ids"]))
    cut, fits = model.loglikelihood([request(context, answer), request(context[7:], answer)])
    assert "task task: 1 of 2 contexts are longer than the model takes" in caplog.text
    assert cut[0] == pytest.approx(fits[0], rel=1e-5)
    caplog.clear()
    context = "c" * 7 + "a" * (longest - settings.sampler.gen_length)
    prompts = [Record(name, context[start:], None, None, "") for start, name in ((0, "same"), (7, "same"))]
    texts = [respond(checkpoint, [prompt], settings, cut_prompts=True).texts for prompt in prompts]
    assert texts[0] == texts[1]
    assert len(model.generate_until([request(context, {})])) == 1
    assert "1 of 1 prompts have more than" in caplog.text
    assert "cut from the left, by up to 7 tokens" in caplog.text


def test_answers_that_do_not_fit(tiny_checkpoint):
    settings = config()
    model = harness.DiffusionLM(open_checkpoint(str(tiny_checkpoint), settings, flag=""), settings, 1)
    with pytest.raises(UserError, match=r"task task, document 7: an answer of \d+ tokens, but the model takes 128"):
        model.loglikelihood([request("a", "b" * 200)])
    settings = config(**{"sampler.gen_length": 128, "sampler.steps": 128, "sampler.block_length": 128})
    whole = harness.DiffusionLM(model._checkpoint, settings, 1)
    with pytest.raises(UserError, match=r"document 7: sampler\.gen_length 128 leaves no room.*\n.*--task-table"):
        whole.generate_until([request("a", {})])
    with pytest.raises(UserError, match="loglikelihood_rolling"):
        model.loglikelihood_rolling([request("a", "b")])


def test_tasks_go_on(tiny_checkpoint, tmp_path, task, monkeypatch):
    """Ended in the second task: the same command runs that one only, and gives the metrics of both."""
    tasks = ",".join([task("local_write", WRITE), task("local_choose", CHOOSE)])
    ran, run = [], harness.run

    def ends(benchmark, *arguments, **options):
        ran.append(benchmark.name)
        if ran == ["local_write", "local_choose"]:
            raise KeyboardInterrupt
        return run(benchmark, *arguments, **options)

    monkeypatch.setattr(harness, "run", ends)
    with pytest.raises(KeyboardInterrupt):
        command(tiny_checkpoint, tmp_path, tasks)
    summary = command(tiny_checkpoint, tmp_path, tasks)
    assert ran == ["local_write", "local_choose", "local_choose"]
    assert set(summary["tasks"]) == {"local_write", "local_choose"}
    with pytest.raises(UserError, match=r"local_write\.json exists already"):
        command(tiny_checkpoint, tmp_path, tasks)


def test_the_content_of_a_task_is_that_of_its_file_and_documents(tmp_path, task):
    """The same in every process, and another where a document or the question's form is, whatever the names."""

    def content(text=WRITE, **fields) -> str:
        path = task("local_write", text, **fields)
        return harness.load_benchmarks([path], {}, allow_code=False, flag="--config.tasks")[0].content

    first = content()
    assert content() == first
    assert content(stop="####") != first
    assert content(WRITE.replace("Capitals", "In capitals")) != first
    changed = [{**DOCS[0], "a": "XYZ"}, *DOCS[1:]]
    path = task("local_write", WRITE)
    runs.write_jsonl(tmp_path / "docs.jsonl", changed)
    assert harness.load_benchmarks([path], {}, allow_code=False, flag="--config.tasks")[0].content != first


def test_metrics_are_those_of_a_group_or_of_each_task_of_a_tag():
    row = {"alias": "x", "sample_len": 4, "acc,none": np.float64(0.25), "acc_stderr,none": "N/A"}
    group = {"results": {"part": {**row, "acc,none": 0.5}, "whole": row}, "groups": {"whole": row}}
    assert harness._metrics(group, "whole") == {"acc,none": 0.25}
    assert harness._metrics({"results": {"one": row, "two": row}}, "tag") == {
        "one: acc,none": 0.25,
        "two: acc,none": 0.25,
    }


def test_the_table_of_the_project():
    """Every row is complete, sets keys that the sampler has, and names a task that lm_eval knows by its file."""
    table = benchmarks.table("tasks")
    assert {"gsm8k", "mmlu_generative", "humaneval_instruct", "arc_challenge", "hellaswag"} <= set(table)
    sampler = lambda name: [table[name].sampler[key] for key in ("gen_length", "block_length")]  # noqa: E731
    assert sampler("gsm8k") == [256, 8]
    assert sampler("mmlu_generative") == [3, 3]
    assert sampler("humaneval_instruct") == [512, 32]
    assert table["hellaswag"].draws == 128
    for name, row in table.items():
        assert isinstance(row, Task)
        config().with_sampler(row.sampler, name)
