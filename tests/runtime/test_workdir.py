"""runtime/workdir.py, inputs.py: a run goes on with what it began with or not at all, and what --overwrite replaces."""

import datetime
import json
import os
import shutil
import signal
import types
from pathlib import Path

import jax
import pytest

from elbo_kto_jax import from_hf, precompute, train
from elbo_kto_jax.checkpoints.load import load_model, read_digest
from elbo_kto_jax.checkpoints.tiny import write_untrained
from elbo_kto_jax.data import chat, prepare
from elbo_kto_jax.runtime import workdir
from elbo_kto_jax.runtime.errors import Interrupted, UserError
from elbo_kto_jax.scoring import opened
from elbo_kto_jax.scoring.scorer import Scorer
from elbo_kto_jax.training import inputs, loop
from elbo_kto_jax.training import reference as reference_module
from tests import runs

pytestmark = pytest.mark.usefixtures("shared_programs")
STEPS = 3


@pytest.fixture
def stop_at(monkeypatch):
    return stopper(monkeypatch)


def stopper(monkeypatch):
    """What lets a SIGTERM come in the n-th call of a function of a module."""

    def arrange(number: int, module=loop, name: str = "train_step") -> None:
        calls, real = [], getattr(module, name)

        def call(*args, **options):
            calls.append(1)
            if len(calls) == number:
                signal.raise_signal(signal.SIGTERM)
            return real(*args, **options)

        monkeypatch.setattr(module, name, call)

    return arrange


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models of one size."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("model", "other")):
        write_untrained(folder / name, seed)
    return folder


@pytest.fixture
def folder(models, tmp_path):
    """Everything that a run reads, to be changed: a model, another one, and records."""
    return fill(models, tmp_path)


def fill(models: Path, folder: Path) -> Path:
    shutil.copytree(models, folder, dirs_exist_ok=True)
    runs.write_jsonl(folder / "train.jsonl", runs.records(6))
    runs.write_jsonl(folder / "eval.jsonl", runs.records(4, first=6))
    return folder


@pytest.fixture(scope="module")
def once(models, tmp_path_factory):
    """A folder with a run that was stopped, a copy of it, and the command line."""
    folder = fill(models, tmp_path_factory.mktemp("once"))
    with pytest.MonkeyPatch.context() as patch:
        argv = stopped(folder, stopper(patch), **{"data.eval": folder / "eval.jsonl"})
    return folder, shutil.copytree(folder, tmp_path_factory.mktemp("copy") / "of"), argv


def put_back(folder: Path, before: Path) -> None:
    shutil.rmtree(folder / "model")
    shutil.copytree(before, folder, dirs_exist_ok=True)


def flags(folder: Path, *more: str, **settings) -> list[str]:
    values = {
        "model.path": folder / "model",
        "data.train": folder / "train.jsonl",
        "train.steps": STEPS,
        "train.checkpoint_every": 1,
        **settings,
    }
    return runs.flags(values, f"--workdir={folder / 'run'}", *more)


def stopped(folder: Path, stop_at, *more: str, **settings) -> list[str]:
    """A run that was stopped after its first step; returns its command line."""
    argv = flags(folder, *more, **settings)
    stop_at(1)
    with pytest.raises(Interrupted):
        train.main(argv)
    return argv


def refusal(argv: list[str], main=train.main) -> str:
    with pytest.raises(UserError) as refused:
        main(argv)
    message = str(refused.value)
    assert len(message.split("\n")) <= 2
    return message


def rewrite(file: Path, change) -> None:
    """Changes a JSONL file record by record; size and time may stay as they were."""
    before = file.stat()
    runs.write_jsonl(file, [change(row) for row in runs.read_jsonl(file)])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def append(folder: Path) -> None:
    with (folder / "train.jsonl").open("a") as file:
        file.write(json.dumps(runs.records(1, first=50)[0]) + "\n")


def flip(folder: Path) -> None:
    rewrite(folder / "train.jsonl", lambda row: {**row, "label": not row["label"]})


def edit(folder: Path) -> None:
    rewrite(folder / "train.jsonl", lambda row: {**row, "completion": "0"})


def rename(folder: Path) -> None:
    rewrite(folder / "train.jsonl", lambda row: {**row, "id": row["id"].upper()})


def reorder(folder: Path) -> None:
    file = folder / "train.jsonl"
    runs.write_jsonl(file, runs.read_jsonl(file)[::-1])


def hold_out_others(folder: Path) -> None:
    runs.write_jsonl(folder / "eval.jsonl", runs.records(4, first=7))


def replace_weights(folder: Path, name: str = "model") -> None:
    """Equally many bytes of the same age."""
    file = folder / name / "model.safetensors"
    before = file.stat()
    shutil.copyfile(folder / "other" / "model.safetensors", file)
    assert file.stat().st_size == before.st_size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_template(folder: Path) -> None:
    set_template(folder, "{{ 'Hi. ' }}{% for m in messages %}{{ m['content'] }}{% endfor %}")


def change_architecture(folder: Path) -> None:
    file = folder / "model" / "config.json"
    found = json.loads(file.read_text())
    file.write_text(json.dumps({**found, "rope_theta": 2 * found["rope_theta"]}))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (append, "config.data.train: 6 examples -> 7"),
        (flip, "config.data.train: labels"),
        (edit, "config.data.train: texts"),
        (rename, "config.data.train: ids"),
        (reorder, "config.data.train: ids"),
        (hold_out_others, "config.data.eval: ids, "),
        (replace_weights, "config.model.path: weights"),
        (replace_template, "config.model.path: chat template"),
        (change_architecture, "config.model.path: config.json"),
    ],
)
def test_a_restart_with_other_inputs_is_refused_and_named(once, monkeypatch, change, named):
    folder, before, argv = once
    monkeypatch.setattr(loop, "train_step", lambda *_, **__: pytest.fail("a step was taken"))
    change(folder)
    try:
        message = refusal(argv)
        assert named in message
        assert str(folder / "run") in message
        for file in ("metrics.jsonl", "config.json"):
            assert (folder / "run" / file).read_bytes() == (before / "run" / file).read_bytes()
    finally:
        put_back(folder, before)


def test_it_goes_on_once_everything_is_put_back(once):
    folder, before, argv = once
    for change in (flip, replace_weights, replace_template):
        change(folder)
    message = refusal(argv)
    assert "(config.data.train: labels, texts; config.data.eval: texts; config.model.path: chat template, " in message
    put_back(folder, before)
    assert train.main(argv)["steps"] == STEPS


@pytest.mark.parametrize("mode", ["precomputed", "online"])
def test_another_reference_is_refused(folder, stop_at, mode):
    shutil.copytree(folder / "other", folder / "reference")
    argv = stopped(folder, stop_at, **{"reference.path": folder / "reference", "reference.mode": mode})
    write_untrained(folder / "other", 2)
    replace_weights(folder, "reference")
    assert "config.reference.path: weights" in refusal(argv)


@pytest.mark.parametrize("settings", [{"objective.name": "sft"}, {"reference.mode": "online"}, {"lora.rank": 2}])
def test_other_weights_are_refused_however_the_run_uses_them(folder, stop_at, settings):
    argv = stopped(folder, stop_at, **settings)
    replace_weights(folder)
    message = refusal(argv)
    assert "config.model.path: weights" in message or "another base" in message


READERS = [(opened, "load_model"), (inputs, "read_digest")]  # of weights, where training calls them


def test_a_converted_model_is_known_by_its_manifest(folder, stop_at, monkeypatch):
    """Its weights are not read again, and others in their place are refused, of whatever form."""
    for name in ("model", "other"):
        from_hf.main([f"--source={folder / name}", f"--out={folder / f'our {name}'}"])
    argv = stopped(folder, stop_at, **{"model.path": folder / "our model"})
    shutil.move(folder / "our model", folder / "kept")
    for other in (folder / "our other", folder / "model"):
        shutil.copytree(other, folder / "our model")
        assert "config.model.path: stored weights" in refusal(argv)
        shutil.rmtree(folder / "our model")
    shutil.move(folder / "kept", folder / "our model")
    for module, name in READERS:
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("weights were read"))
    assert train.main(argv)["steps"] == STEPS


def test_weights_are_read_once_a_start(folder, stop_at, monkeypatch):
    reads: list[str] = []
    for module, name in READERS:
        real = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            lambda path, *args, real=real, name=name, **more: reads.append(name) or real(path, *args, **more),
        )
    argv = stopped(folder, stop_at)
    assert reads == ["load_model"]
    train.main(argv)
    assert reads == ["load_model", "read_digest"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_streamed_digest_is_that_of_the_loaded_parameters(folder, dtype):
    from elbo_kto_jax.checkpoints.digest import params_digest

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: here, load_model(folder / "model").params)
    loaded = load_model(folder / "model", param_dtype=dtype, shardings=shardings).params
    assert read_digest(folder / "model", dtype, shardings) == params_digest(loaded)


def test_the_files_are_named_with_their_digests(folder):
    import hashlib

    train.main(flags(folder, **{"train.steps": 1, "data.eval": folder / "eval.jsonl"}))
    record = json.loads((folder / "run" / "config.json").read_text())
    for name in ("train.jsonl", "eval.jsonl"):
        content = (folder / name).read_bytes()
        digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        assert record["files"][str(folder / name)] == {"bytes": len(content), "blake2b": digest}
    assert str(folder / "model" / "model.safetensors") in record["files"]
    assert record["inputs"].keys() == {"config.data.train", "config.data.eval", "config.model.path"}
    assert record["inputs"]["config.model.path"].keys() >= {"chat template", "config.json", "tokenizer.json", "weights"}


def test_what_changes_nothing_is_no_difference(folder, stop_at):
    """Other bytes of the same records, and another place of the working folder."""
    argv = stopped(folder, stop_at)
    rewrite(folder / "train.jsonl", lambda row: dict(reversed(row.items())))
    (folder / "run").rename(folder / "elsewhere")
    assert train.main([*argv, f"--workdir={folder / 'elsewhere'}"])["steps"] == STEPS


def test_a_mixture_that_was_prepared_is_found_beside_the_working_folder(folder, stop_at, monkeypatch):
    more = runs.write_jsonl(folder / "more.jsonl", runs.records(3, first=20))
    mixture = {"data.train": [str(folder / "train.jsonl"), str(more)], "data.weights": [0.4, 0.6]}
    monkeypatch.setattr(prepare, "LARGE", 0)
    monkeypatch.setattr(prepare, "cores", lambda: 1)
    argv = stopped(folder, stop_at, **mixture)
    prepared = sorted((folder / "run.data").glob("*/description.json"))
    assert len(prepared) == 2
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "convert_all", lambda *_: pytest.fail("it is prepared again"))
        assert train.main(argv)["steps"] == STEPS
    refused = refusal([word for word in argv if "weights" not in word])
    assert "config.data.weights: [0.4, 0.6] -> []" in refused
    assert sorted((folder / "run.data").glob("*/description.json")) == prepared
    edit(folder)
    assert "config.data.train: texts" in refusal(argv)
    assert set((folder / "run.data").glob("*/description.json")) > set(prepared)


def test_inputs_may_change_until_there_are_results(folder, monkeypatch):
    argv = flags(folder)
    with monkeypatch.context() as patch:
        patch.setattr(inputs.Weights, "load", lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
        with pytest.raises(RuntimeError, match="no memory"):
            train.main(argv)
    append(folder)
    assert train.main(argv)["steps"] == STEPS


def test_precompute_and_train_have_the_same_inputs(folder, stop_at):
    argv = flags(folder)
    precompute.main(argv)
    replace_weights(folder)
    assert "config.model.path: weights" in refusal(argv)
    assert "config.model.path: weights" in refusal(argv, precompute.main)
    flip(folder)
    assert "config.data.train: labels" in refusal(argv, precompute.main)


def test_a_folder_of_an_earlier_version_goes_on_with_a_warning(folder, stop_at, caplog):
    argv = stopped(folder, stop_at)
    file = folder / "run" / "config.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({"config": record["config"], "versions": record["versions"]}))
    stop_at(1)
    with pytest.raises(Interrupted):
        train.main(argv)
    assert "has no digests" in caplog.text
    flip(folder)
    assert "config.data.train: labels" in refusal(argv)


@pytest.mark.parametrize("change", [{"moment": "noon"}, {"inputs": {"a": 1}}, {"versions": "x"}], ids=str)
def test_a_damaged_record_is_refused_and_can_be_overwritten(folder, stop_at, change):
    argv = stopped(folder, stop_at, "--overwrite")
    file = folder / "run" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    message = refusal(argv[:-1])
    assert f"{file}: damaged" in message
    stop_at(1)
    with pytest.raises(Interrupted):
        train.main(argv)
    assert json.loads(file.read_text())["unfinished"] == "train"


def test_another_version_is_told(folder, stop_at, caplog):
    argv = stopped(folder, stop_at)
    file = folder / "run" / "config.json"
    file.write_text(file.read_text().replace(jax.__version__, "0.0.1"))
    assert train.main(argv)["steps"] == STEPS
    assert "version.jax: '0.0.1' -> " in caplog.text


# ---- templates ----


def set_template(folder: Path, template: str) -> None:
    (folder / "model" / "chat_template.jinja").unlink(missing_ok=True)
    file = folder / "model" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))


CLOCK = "{% for m in messages %}{{ strftime_now('%f %S %d ') + m['content'] }}{% endfor %}"


class Tomorrow(datetime.datetime):
    """A clock that is a day and a bit ahead."""

    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(days=1, seconds=7)


def test_a_template_that_reads_the_clock_is_told_when_the_run_began(folder, stop_at, monkeypatch):
    set_template(folder, CLOCK)
    argv = stopped(folder, stop_at)
    digests = json.loads((folder / "run" / "config.json").read_text())["inputs"]["config.data.train"]
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    monkeypatch.setattr(workdir, "datetime", types.SimpleNamespace(datetime=Tomorrow))
    assert train.main(argv)["steps"] == STEPS
    other = flags(folder, f"--workdir={folder / 'new'}")
    train.main(other)
    new = json.loads((folder / "new" / "config.json").read_text())["inputs"]["config.data.train"]
    assert new["texts"] != digests["texts"]  # the template does read the clock
    assert new["labels"] == digests["labels"]


@pytest.mark.parametrize("template", ["{{ ['a', 'b'] | random }}", "{{ lipsum(n=1) }}"])
def test_a_template_that_draws_is_refused(folder, template):
    set_template(folder, template)
    message = refusal(flags(folder))
    assert "chat template uses" in message
    assert not (folder / "run").exists()


def test_every_use_of_the_template_is_told_the_moment(folder):
    set_template(folder, CLOCK)
    tokenizer = load_model(folder / "model").tokenizer()
    moment = datetime.datetime(2024, 2, 3, 4, 5, 6)
    chat.make_repeatable(tokenizer, moment, "here")
    messages = [{"role": "user", "content": "hi"}]
    ids = chat.encode_prompt(tokenizer, messages)
    assert tokenizer.decode(ids) == "000000 06 03 hi"
    assert chat.render(tokenizer, messages, is_open=False) == "000000 06 03 hi"


# ---- --overwrite ----


def checkpoints(folder: Path) -> dict[str, int]:
    """Step -> when it was written."""
    steps = (folder / "run" / "checkpoints").iterdir()
    return {step.name: (step / "assets" / "manifest.json").stat().st_mtime_ns for step in steps}


def test_overwrite_goes_on_with_its_own_run_until_it_is_finished(folder, stop_at, caplog):
    train.main(flags(folder, **{"train.steps": 1}))  # what it replaces
    argv = stopped(folder, stop_at, "--overwrite")
    first = checkpoints(folder)
    assert first.keys() == {"1"}
    caplog.set_level("INFO")
    stop_at(1)
    with pytest.raises(Interrupted):
        train.main(argv)
    assert "going on with the run that this command began" in caplog.text
    second = checkpoints(folder)
    assert second.keys() == {"1", "2"}
    assert second["1"] == first["1"]
    assert train.main(argv)["steps"] == STEPS
    assert checkpoints(folder)["1"] == first["1"]
    stop_at(1)
    with pytest.raises(Interrupted):  # it was finished: now it starts again
        train.main(argv)
    assert checkpoints(folder).keys() == {"1"}


def test_overwrite_replaces_the_run_of_another_command(folder, stop_at):
    argv = stopped(folder, stop_at)
    before = checkpoints(folder)
    stop_at(1)
    with pytest.raises(Interrupted):  # the same, but for the flag
        train.main([*argv, "--overwrite"])
    assert checkpoints(folder).keys() == before.keys() == {"1"}
    assert checkpoints(folder) != before
    before = checkpoints(folder)
    assert train.main([*argv, "--overwrite", "--config.objective.beta=0.5"])["steps"] == STEPS
    assert checkpoints(folder)["1"] != before["1"]


def test_overwrite_does_not_delete_its_own_run_over_other_inputs(folder, stop_at):
    argv = stopped(folder, stop_at, "--overwrite")
    before = checkpoints(folder)
    flip(folder)
    message = refusal(argv)
    assert "config.data.train: labels" in message
    assert "delete the folder" in message
    assert checkpoints(folder) == before


def test_overwrite_of_precompute_goes_on(folder, stop_at, monkeypatch):
    argv = flags(folder, "--overwrite")
    monkeypatch.setattr(reference_module, "_SAVE_EVERY", 0.0)
    stop_at(2, Scorer, "__call__")
    with pytest.raises(Interrupted):
        precompute.main(argv)
    parts = {file: file.stat().st_mtime_ns for file in (folder / "run").rglob("*.npy")}
    assert parts
    precompute.main(argv)
    assert parts.items() <= {file: file.stat().st_mtime_ns for file in (folder / "run").rglob("*.npy")}.items()


def test_a_run_that_is_half_deleted_is_not_gone_on_with(folder, stop_at, monkeypatch):
    argv = stopped(folder, stop_at)

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(workdir, "remove_tree", killed)
        with pytest.raises(KeyboardInterrupt):
            train.main([*argv, "--overwrite"])
    assert "--overwrite" in refusal(argv)
    assert train.main([*argv, "--overwrite"])["steps"] == STEPS


def test_nothing_is_deleted_before_the_new_run_is_known_to_be_right(folder, stop_at):
    argv = stopped(folder, stop_at)
    before = checkpoints(folder)
    (folder / "train.jsonl").write_text("{\n")
    refusal([*argv, "--overwrite"])
    assert checkpoints(folder) == before


def test_what_no_result_depends_on_may_change(folder, stop_at):
    """The log, the checkpoints between, the devices, the judge: the run goes on, and config.json tells with what."""
    stopped(folder, stop_at)
    free = {
        "train.log_every": 2,
        "train.checkpoint_every": 2,
        "train.keep_checkpoints": 1,
        "mesh.tensor": 2,
        "judge.name": "chat",
        "benchmarks.limit": 3,
        "tasks": "gsm8k",
    }
    assert train.main(flags(folder, "--config.trackers=()", **free))["steps"] == STEPS
    found = json.loads((folder / "run" / "config.json").read_text())["config"]
    assert (found["train"]["log_every"], found["judge"]["name"], found["trackers"]) == (2, "chat", [])
    message = refusal(flags(folder, **free, **{"optimizer.learning_rate": 0.5}))
    changed, may_change = message.split("\n")
    assert "optimizer.learning_rate" in changed
    assert "log_every" not in changed
    assert "a run may go on with other train.steps or train.epochs (upward), train.{eval_every, log_every" in may_change


def test_a_run_without_trackers_writes_metrics_alone(folder):
    train.main(flags(folder, "--config.trackers=()"))
    assert (folder / "run" / "metrics.jsonl").is_file()
    assert not (folder / "run" / "tensorboard").exists()
