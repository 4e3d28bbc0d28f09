"""Whole commands in a bucket: wherever one is killed, the same command again ends with the same bits.

A kill leaves in the bucket what it held after one of the changes that the command made. So every kill is tried by
putting the bucket into that state and starting the command again, without a process and without chance.
"""

import json
import random
import signal
import subprocess
import sys

import numpy as np
import pytest

from elbo_kto_jax import evaluate, from_hf, generate, precompute, sweep, to_hf, train, verify
from elbo_kto_jax.checkpoints.load import open_source
from elbo_kto_jax.checkpoints.tiny import write_untrained
from elbo_kto_jax.runtime.errors import UserError
from tests import runs
from tests.buckets.conftest import NAME
from tests.buckets.gcs_server import Bucket, Fault
from tests.share import WHOLE, share

SETTINGS = {"train.steps": 4, "train.checkpoint_every": 2, "train.keep_checkpoints": 1}
IN, OUT = f"gs://{NAME}/in", f"gs://{NAME}/out"


@pytest.fixture(scope="module")
def inputs(server, tmp_path_factory):
    """A model and records in a bucket."""
    folder = tmp_path_factory.mktemp("inputs")
    write_untrained(folder / "model", seed=0)
    runs.write_jsonl(folder / "train.jsonl", runs.records(8))
    server.buckets[NAME] = Bucket()
    for file in folder.rglob("*"):
        if file.is_file():
            server.put(NAME, f"in/{file.relative_to(folder)}", file.read_bytes())
    return dict(server.buckets[NAME].objects)


@pytest.fixture
def empty(server, inputs):
    server.buckets[NAME].objects = dict(inputs)


def words(*more, config=runs.CONFIG):
    names = {"model.path": f"{IN}/model", "data.train": f"{IN}/train.jsonl"}
    return runs.flags({**SETTINGS, **names}, *more, config=config)


def run(command=train):
    return command.main(words(f"--workdir={OUT}"))


def of_run(server):
    """All that a run leaves, but for times and an earlier step that a kill at the very end kept it from removing."""
    found = {}
    for name in server.names(NAME, "out/"):
        if name.startswith("out/checkpoints/2/"):
            continue
        content = server.content(NAME, name)
        if name == "out/metrics.jsonl":
            rows = map(json.loads, content.splitlines())
            found[name] = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
        elif name.endswith("manifest.json"):
            manifest = json.loads(content)
            progress = {key: value for key, value in manifest["progress"].items() if key != "seconds"}
            found[name] = ({key: tree["digest"] for key, tree in manifest["trees"].items()}, progress)
        elif name.startswith("out/reference"):
            found[name] = content
    return found


def states(history, count):
    """Some of the states, by chance the same ones every time."""
    return [history[i] for i in sorted(random.Random(0).sample(range(len(history)), min(count, len(history))))]


@pytest.fixture(scope="module")
def whole(server, inputs):
    """What a run that nobody stops leaves, and the states of the bucket on the way."""
    server.buckets[NAME].objects = dict(inputs)
    with server.recording() as history:
        run()
    return of_run(server), history


def test_nothing_that_is_not_whole_is_left(server, whole):
    found, history = whole
    assert {"out/metrics.jsonl", "out/checkpoints/4/assets/manifest.json"} <= found.keys()
    assert [name for name in history[-1] if ".lock" in name or "unfinished" in name or name.endswith(".tmp")] == []
    assert not any(name.startswith("out/checkpoints/2/") for name in history[-1])  # train.keep_checkpoints
    assert any(name.startswith("out/tensorboard/") for name in history[-1])
    assert "out/report.html" in history[-1]
    assert b"start: " in history[-1]["out/log.txt"].content
    lines = [
        state["out/metrics.jsonl"].content.count(b"\n")
        for state in history
        if "out/checkpoints/4/commit_success.txt" in state
    ]
    assert lines[0] >= 4  # no line is lacking when the checkpoint is complete


def test_train_goes_on_after_a_kill_at_any_moment(server, whole):
    found, history = whole
    middle = [state for state in history if "out/config.json" in state]
    for state in states(middle, share(1, 60)):
        server.buckets[NAME].objects = dict(state)
        run()
        assert of_run(server) == found


@pytest.mark.skipif(not WHOLE, reason="the states above are those that a kill leaves")
@pytest.mark.parametrize("number", [5, 40, 120])
def test_a_process_that_is_killed_in_the_middle_of_a_write(server, whole, inputs, number):
    server.buckets[NAME].objects = dict(inputs)
    command = [sys.executable, "-m", "elbo_kto_jax.train", *words(f"--workdir={OUT}")]
    started = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    writes = [number]

    def kill(asked):
        writes[0] -= asked.writes
        if writes[0] <= 0:
            started.kill()
            return Fault(status=500)
        return None

    with server.failing(kill):
        assert started.wait() == -signal.SIGKILL
    assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
    assert of_run(server) == whole[0]


def test_a_step_that_is_not_whole_is_no_model(server, whole):
    _, history = whole
    half = next(state for state in history if "out/checkpoints/4/params/manifest.ocdbt" in state)
    assert "out/checkpoints/4/commit_success.txt" not in half
    server.buckets[NAME].objects = dict(half)
    with pytest.raises(UserError, match=r"checkpoints/4: incomplete: its writer was interrupted"):
        open_source(f"{OUT}/checkpoints/4")
    assert open_source(OUT).path == f"{OUT}/checkpoints/2"


def test_other_inputs_are_refused(server, whole):
    server.buckets[NAME].objects = dict(whole[1][-1])
    with pytest.raises(UserError, match="holds a run of another config"):
        train.main(words(f"--workdir={OUT}", "--config.seed=3"))
    server.put(NAME, "in/train.jsonl", server.content(NAME, "in/train.jsonl").replace(b"Sort", b"Turn"))
    with pytest.raises(UserError, match=rf"--workdir={OUT} holds a run that began with other inputs .*texts"):
        run()


@pytest.mark.skipif(not WHOLE, reason="train goes on from parts of the reference pass, too")
def test_precompute_goes_on_after_a_kill(server, empty):
    with server.recording() as history:
        run(precompute)
    found = of_run(server)
    for state in states(history, 10):
        server.buckets[NAME].objects = dict(state)
        run(precompute)
        assert of_run(server) == found


def test_conversions_after_a_kill_at_any_moment(server, empty):
    ours, published = (
        [f"--source={IN}/model", f"--out={OUT}"],
        [f"--source={OUT}", f"--out={OUT}-hf", "--shard-size=99KB"],
    )
    with server.recording() as history:
        from_hf.main(ours)
    digest, done = open_source(OUT).digest, history[-1]
    for state in [history[0], *states(history[:-2], share(1, 30))]:
        server.buckets[NAME].objects = dict(state)
        if "out/params/manifest.ocdbt" in state:
            with pytest.raises(UserError, match="incomplete"):
                open_source(OUT)
        from_hf.main(ours)
        assert open_source(OUT).digest == digest
    with pytest.raises(UserError, match="exists already"):
        from_hf.main(ours)
    assert {name.split("/")[0] for name in server.names(NAME)} == {"in", "out"}

    server.buckets[NAME].objects = dict(done)
    with server.recording() as history:
        to_hf.main(published)
    content = {name: server.content(NAME, name) for name in server.names(NAME, "out-hf/")}
    for state in states(history[:-1], share(1, 30)):
        server.buckets[NAME].objects = dict(state)
        to_hf.main(published)
        assert {name: server.content(NAME, name) for name in server.names(NAME, "out-hf/")} == content
        assert [name for name in server.names(NAME) if name.startswith(".out")] == []
    assert verify.main([f"--source={OUT}-hf", f"--checkpoint={OUT}"])["equal"]
    changed = bytearray(server.content(NAME, "out-hf/model-00001-of-00004.safetensors"))
    changed[-1] ^= 1
    server.put(NAME, "out-hf/model-00001-of-00004.safetensors", bytes(changed))
    with pytest.raises(UserError, match="1 of 21 tensors"):
        verify.main([f"--source={OUT}-hf", f"--checkpoint={OUT}"])


def test_a_model_of_s3_is_read_and_checkpoints_there_are_refused_first(server, s3, inputs):
    from elbo_kto_jax.runtime import paths

    for name, stored in inputs.items():
        paths.at(f"{s3}/{name}").write_bytes(stored.content)
    theirs, ours = (open_source(f"{place}/in/model") for place in (s3, f"gs://{NAME}"))
    for path in ours.leaves:
        index = tuple(map(slice, [0] * len(ours.leaves[path].shape), ours.leaves[path].shape))
        np.testing.assert_array_equal(theirs.read(path, index, None), ours.read(path, index, None))
    with pytest.raises(UserError, match=r"^--out=s3://.*checkpoints cannot be written to s3://"):
        from_hf.main([f"--source={s3}/in/model", f"--out={s3}/out"])
    with pytest.raises(UserError, match=r"^--workdir=s3://.*checkpoints cannot be written to s3://"):
        train.main(words(f"--workdir={s3}/run"))


@pytest.mark.skipif(not WHOLE, reason="each of their files is written like those above")
@pytest.mark.parametrize("command", [generate, evaluate, sweep], ids=lambda command: command.__name__)
def test_commands_that_answer_prompts_go_on(server, empty, command):
    rows = [{"id": row["id"], "prompt": row["prompt"], "answer": "1"} for row in runs.records(4)]
    server.put(NAME, "in/prompts.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows).encode())
    model, prompts = f"{IN}/model", f"{IN}/prompts.jsonl"
    given = {
        generate: words(f"--checkpoint={model}", f"--prompts={prompts}", f"--out={OUT}/out.jsonl"),
        evaluate: words(f"--checkpoint={model}", f"--baseline={model}", f"--prompts={prompts}", f"--out={OUT}"),
        sweep: words(f"--workdir={OUT}", config=f"{IN}/grid.py"),
    }
    lists = {"checkpoints": [model], "tasks": ["win_rate", "elbo"], "sampler": [{}], "draws": [1], "limit": 0}
    lists |= {"baseline": model, "prompts": prompts, "data": f"{IN}/train.jsonl"}
    server.put(NAME, "in/grid.py", runs.grid_text(lists).encode())
    begun = dict(server.buckets[NAME].objects)
    with server.recording() as history:
        command.main(given[command])
    results = of_answers(server)
    for state in [begun, *states(history[:-2], 8)]:
        if any(name in state for name in ("out/out.jsonl", "out/results.json")):
            continue  # it was finished
        server.buckets[NAME].objects = dict(state)
        command.main(given[command])
        assert of_answers(server) == results
    assert [name for name in server.names(NAME) if "unfinished" in name or ".lock" in name] == []


def of_answers(server):
    return {
        name: server.content(NAME, name)
        for name in server.names(NAME, "out/")
        if name.endswith(("out.jsonl", "comparisons.jsonl", "elbo.jsonl")) or "/answers/" in name
    }
