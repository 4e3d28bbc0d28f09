"""publishing/card.py, facts.py: the card says what the run, the manifest and the evaluation say, and nothing else."""

import json
import re
from pathlib import Path

import pytest
import yaml

from elbo_kto_jax.publishing import facts as facts_of
from elbo_kto_jax.publishing.card import is_edited, kept, model_card
from elbo_kto_jax.publishing.facts import Facts, gather, licence
from elbo_kto_jax.runtime.errors import UserError
from tests.published import write_published
from tests.tiny import MODEL

HUB = "https://huggingface.co"
RUN = {
    "model": {"path": "GSAI-ML/LLaDA-8B-Instruct@abc"},
    "data": {"train": "trl-lib/kto-mix-14k", "max_length": 4096},
    "objective": {"name": "elbo_kto", "beta": 0.1},
    "estimator": {"draws": 8, "scheme": "uniform"},
    "optimizer": {"learning_rate": 1e-6, "schedule": "cosine"},
    "train": {"global_batch_size": 32},
    "seed": 0,
}
START = {
    "command": "elbo-kto train --config=kto_mix --config.data.train=https://me:password@host/x",
    "commit": "0123abc",
    "versions": {"elbo_kto_jax": "0.1.0", "jax": "0.10.2", "libtpu": None},
    "devices": {"number": 64, "kind": "TPU v5e", "platform": "tpu", "processes": 16},
}
METRICS = [
    {"step": i, "loss": 0.5 / i, "reward_margin": 0.1 * i, "reward_desirable": 0.2 * i, "reward_undesirable": 0.1 * i}
    for i in range(1, 21)
]
EVALUATION = {
    **{"adjusted_win_rate": 0.6625, "ci95": [0.61, 0.715], "wins": 300, "ties": 60, "losses": 140, "comparisons": 500},
    **{"baseline": "/home/me/llada-8b", "judge": {"name": "chat", "model": "a judge"}},
    "tasks": {"gsm8k": {"metrics": {"exact_match": 0.7031}}},
}


def facts(**known) -> Facts:
    nothing = {"licences": {}, "record": {}, "progress": {}, "adapters": {}, "metrics": [], "evaluation": {}}
    return Facts(**{"family": "llada", "needs_code": True, "base": "", "data": [], **nothing, **known})


def whole() -> Facts:
    return facts(
        base="GSAI-ML/LLaDA-8B-Instruct@abc",
        data=["trl-lib/kto-mix-14k"],
        licences={"base": "mit", "data": "apache-2.0"},
        record={"config": RUN, "provenance": [START, START]},
        progress={"step": 20, "examples": 13_500},
        adapters={"rank": 16, "alpha": 32.0},
        metrics=METRICS,
        evaluation=EVALUATION,
    )


def card_of(known: Facts, **options) -> tuple[dict, str]:
    """The front matter as the hub reads it, and the text."""
    text = model_card(known, "me/tiny", **options)["README.md"].decode()
    _, header, body = re.split("^---$", text, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(header), body


def test_what_is_known_is_said():
    header, text = card_of(whole())
    assert header == {
        "license": "mit",
        "base_model": "GSAI-ML/LLaDA-8B-Instruct",
        "base_model_relation": "finetune",
        "datasets": ["trl-lib/kto-mix-14k"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["elbo_kto_jax", "masked-diffusion", "llada", "elbo_kto"],
    }
    for line in (
        f"| base | [`GSAI-ML/LLaDA-8B-Instruct@abc`]({HUB}/GSAI-ML/LLaDA-8B-Instruct) (licence: `mit`) |",
        f"| data | [`trl-lib/kto-mix-14k`]({HUB}/datasets/trl-lib/kto-mix-14k) (licence: `apache-2.0`) |",
        "| objective | `elbo_kto` |",
        "| beta (1/nats) | 0.1 |",
        "| masks per example (K) | 8 |",
        "| mask scheme | `uniform` |",
        "| steps | 20 |",
        "| examples | 13,500 |",
        "| adapters | rank 16, alpha 32, merged into these weights |",
        "The command (its last start of 2):",
        "    elbo-kto train --config=kto_mix --config.data.train=https://host/x",
        "| reward margin | 1.95 nats | the last 2 logged |",  # of the last tenth
        "![Rewards](rewards.svg)",
        "- `jax` `0.10.2`",
        "- commit `0123abc`",
        "- devices: `64 x TPU v5e`",
        "| `gsm8k` | `exact_match` | 0.703 |",
    ):
        assert f"\n{line}\n" in text, line
    words = " ".join(text.split())
    assert "Adjusted win rate against `llada-8b`: **66.2%**, 95% interval 61.0% to 71.5%" in words
    assert "500 comparisons: 300 won, 60 tied, 140 lost; ties count half; judge: `chat, a judge`" in words
    assert not [word for word in ("password", "/home/me", "libtpu", "None", "\n\n\n") if word in text]


def test_what_is_not_known_is_left_out():
    header, text = card_of(facts(needs_code=False))
    assert header.keys() == {"library_name", "pipeline_tag", "tags"}
    assert header["library_name"] == "elbo_kto_jax"
    assert re.findall("^#+ .*", text, flags=re.MULTILINE) == ["# me/tiny", "## Use", "## Versions"]


def test_a_local_base_is_called_by_its_name_and_a_licence_can_be_given():
    header, text = card_of(facts(base="llada-8b", data=["feedback.jsonl"], record={"config": RUN}), licence="cc-by-4.0")
    assert not {"base_model", "datasets"} & header.keys()
    assert header["license"] == "cc-by-4.0"
    assert "| base | `llada-8b` |\n| data | `feedback.jsonl` |" in text


def test_several_data_sets():
    header, text = card_of(facts(data=["trl-lib/kto-mix-14k@v1:train", "feedback.jsonl"], record={"config": RUN}))
    assert header["datasets"] == ["trl-lib/kto-mix-14k"]
    link = f"[`trl-lib/kto-mix-14k@v1:train`]({HUB}/datasets/trl-lib/kto-mix-14k)"
    assert f"\n| data | {link}, `feedback.jsonl` |\n" in text


def test_foreign_text_stays_in_its_place():
    wild = "a|b`c\n---\n<script>"
    header, text = card_of(facts(base=wild, record={"config": RUN}, evaluation={**EVALUATION, "baseline": wild}))
    assert header["tags"][0] == "elbo_kto_jax"
    assert "| base | `` a¦b`c --- <script> `` |" in text


def test_plots_are_drawings_of_their_own():
    files = model_card(whole(), "me/tiny")
    assert files.keys() == {"README.md", "rewards.svg", "reward_margin.svg", "loss.svg"}
    assert all(content.startswith(b"<svg xmlns") for name, content in files.items() if name.endswith(".svg"))


def test_an_edited_card_is_recognised(tmp_path):
    card = model_card(whole(), "me/tiny")["README.md"]
    assert card == model_card(whole(), "me/tiny")["README.md"]  # the same each time
    assert not is_edited(card)
    assert all(map(is_edited, (card.replace(b"Use", b"use"), card + b"More.", b"# My model\n")))
    assert kept(tmp_path) is None
    (tmp_path / "README.md").write_bytes(card)
    assert kept(tmp_path) is None
    (tmp_path / "README.md").write_bytes(b"mine")
    assert kept(tmp_path) == b"mine"


@pytest.mark.parametrize(
    ("card", "found"),
    [
        ("---\nlicense: mit\ntags: [a]\n---\n# A", "mit"),
        ("---\r\ntags: [a]\r\nlicense: 'cc-by-4.0'\r\n---\r\n", "cc-by-4.0"),
        ("# license: mit", ""),
        ("---\nlicense_name: x\n---\n", ""),
    ],
)
def test_the_licence_that_a_card_names(tmp_path, card, found):
    (tmp_path / "README.md").write_bytes(card.encode())
    assert licence(str(tmp_path), "model") == found


def test_a_licence_of_the_hub_comes_from_its_cache_alone(tmp_path, monkeypatch):
    import huggingface_hub

    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    asked = []

    def cached(name, file, **options):
        asked.append((name, file, options))
        return str(tmp_path / file) if name == "a/b" else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    assert [licence("a/b@v1", "model"), licence("a/c", "dataset"), licence("", "model")] == ["mit", "", ""]
    assert asked[0] == ("a/b", "README.md", {"repo_type": "model", "revision": "v1"})


# ---- where it is found ----


@pytest.fixture
def workdir(tmp_path, monkeypatch) -> Path:
    """The folder of a run of two steps, of which all is known but the weights."""
    folder = tmp_path / "run"
    for step in (10, 20):
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"config": RUN, "provenance": [START]}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in METRICS))
    monkeypatch.setattr(facts_of, "is_checkpoint", lambda _: True)
    monkeypatch.setattr(facts_of, "load_config", lambda *_: (MODEL, {"config.json": b"{}"}))
    monkeypatch.setattr(facts_of, "read_manifest", lambda step: Manifest(int(step.name)))
    return folder


class Manifest:
    lora = None

    def __init__(self, step):
        self.progress = {"step": step, "examples": 32 * step}


def results(folder: Path, checkpoint: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps({**EVALUATION, "checkpoint": str(checkpoint)}))


def test_a_step_of_a_run(workdir):
    found = gather(str(workdir / "checkpoints" / "10"))
    assert (found.base, found.data) == ("GSAI-ML/LLaDA-8B-Instruct@abc", ["trl-lib/kto-mix-14k"])
    assert (found.family, found.progress["examples"], found.metrics) == ("llada", 320, METRICS[:10])
    assert found.evaluation == {}


def test_the_evaluation_of_this_checkpoint_alone(workdir, tmp_path):
    last, first = workdir / "checkpoints" / "20", workdir / "checkpoints" / "10"
    results(tmp_path / "evaluation", last)
    assert gather(str(last)).evaluation["wins"] == 300
    assert gather(str(first)).evaluation == {}
    results(tmp_path / "evaluation", workdir)  # whose last step it is
    assert gather(str(last)).evaluation["wins"] == 300
    assert gather(str(first)).evaluation == {}
    results(tmp_path / "other", first)
    assert gather(str(last), evaluation=str(tmp_path / "other")).evaluation["wins"] == 300  # as it was told
    with pytest.raises(UserError, match=r"--evaluation=.*: no results\.json; name the folder that `evaluate` wrote"):
        gather(str(last), evaluation=str(tmp_path))


def test_a_checkpoint_that_is_of_no_run(tmp_path):
    write_published(tmp_path / "published")
    found = gather(str(tmp_path / "published"), base="me/base")
    assert (found.base, found.record, found.metrics, found.evaluation) == ("me/base", {}, [], {})
