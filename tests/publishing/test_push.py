"""`to_hf --push`: what arrives at a hub on this machine, what is said where it refuses, and that no token is told."""

import json
import re
import shutil

import huggingface_hub
import pytest
from huggingface_hub import _commit_api, constants, hf_api

from elbo_kto_jax import to_hf
from elbo_kto_jax.checkpoints import conversion
from elbo_kto_jax.from_hf import main as from_hf
from elbo_kto_jax.runtime.errors import UserError
from tests.published import write_published
from tests.publishing.hub_server import TOKEN, Hub, hub_server

NAME = "me/tiny-kto"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_published(folder / "published")
    from_hf([f"--source={folder / 'published'}", f"--out={folder / 'ours'}"])
    return folder / "ours"


@pytest.fixture
def hub(monkeypatch):
    with hub_server() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        for module in (hf_api, _commit_api):  # Xet has a protocol of its own, and a server elsewhere
            monkeypatch.setattr(module, "is_xet_available", lambda: False)
        yield server


@pytest.fixture
def converted(monkeypatch) -> list:
    """Grows by one with each conversion."""
    calls, real = [], conversion.write_published
    monkeypatch.setattr(conversion, "write_published", lambda *a, **k: calls.append(a) or real(*a, **k))
    return calls


def contents(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_everything_arrives_in_a_private_repository(checkpoint, hub: Hub, tmp_path, capsys, caplog):
    caplog.set_level("DEBUG")
    out = tmp_path / "out"
    summary = to_hf.main([f"--source={checkpoint}", f"--out={out}", f"--push={NAME}"])
    assert hub.repositories == {NAME: True}
    assert hub.files[NAME, "main"] == contents(out)
    assert {"README.md", "config.json", "model.safetensors"} <= contents(out).keys()
    assert summary["repository"] == f"{hub.url}/{NAME}"
    assert (summary["commit"], summary["private"], hub.commits) == (f"{1:040x}", True, 1)
    said = "".join([*capsys.readouterr(), caplog.text, str(summary)])
    assert TOKEN not in said + "".join(map(str, contents(out).values()))


def test_public_and_a_branch(checkpoint, hub: Hub, tmp_path):
    out = tmp_path / "out"
    summary = to_hf.main([f"--source={checkpoint}", f"--out={out}", f"--push={NAME}", "--public", "--revision=v0.1"])
    assert hub.repositories == {NAME: False}
    assert ("POST", f"/api/models/{NAME}/branch/v0.1") in hub.requests
    assert hub.files[NAME, "v0.1"] == contents(out)
    assert (summary["repository"], summary["private"]) == (f"{hub.url}/{NAME}/tree/v0.1", False)


def test_a_public_repository_is_not_pushed_to_unasked(checkpoint, hub: Hub, tmp_path):
    hub.repositories[NAME] = False
    arguments = [f"--source={checkpoint}", f"--out={tmp_path / 'out'}", f"--push={NAME}"]
    with pytest.raises(UserError, match=r"--push=me/tiny-kto: that repository is public; pass --public"):
        to_hf.main(arguments)
    assert hub.commits == 0
    assert to_hf.main([*arguments, "--public"])["private"] is False
    assert hub.commits == 1


@pytest.mark.parametrize(
    ("part", "status", "remedy"),
    [
        ("/api/models", 401, "the token is not valid"),
        ("/api/repos/create", 403, "the token may not write there"),
        ("/preupload", 404, "there is no such repository or organisation, or the token may not see it"),
        ("/commit", 409, "the repository changed meanwhile"),
        ("/store", 403, "the token may not write there"),
        ("/store", 413, "a smaller --shard-size"),
    ],
)
def test_a_refusal_says_what_to_do_and_the_same_command_goes_on(
    checkpoint, hub: Hub, tmp_path, converted, part, status, remedy
):
    out = tmp_path / "out"
    arguments = [f"--source={checkpoint}", f"--out={out}", f"--push={NAME}"]
    hub.refuses[part] = status
    with pytest.raises(UserError) as refused:
        to_hf.main(arguments)
    first, second = str(refused.value).split("\n")
    assert first.startswith(f"--push={NAME}: ")
    assert remedy in first
    assert second == f"{out} is whole: the same command again only pushes what is missing"
    assert TOKEN not in str(refused.value)
    hub.refuses.clear()
    (out / "LICENSE").write_text("as you like")  # what somebody added goes along
    to_hf.main(arguments)
    assert hub.files[NAME, "main"] == contents(out)
    assert len(converted) == 1


def test_a_hub_that_cannot_be_reached(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(UserError, match=r"^--push=me/tiny-kto: the hub cannot be reached \(.*\)\n.*out is whole"):
        to_hf.main([f"--source={checkpoint}", f"--out={tmp_path / 'out'}", f"--push={NAME}"])


def test_what_is_wrong_is_said_before_converting(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    for push, message in ((NAME, "not logged in to the hub"), ("tiny", "expected ORG/NAME"), ("a/b--c", "Cannot have")):
        with pytest.raises(UserError, match=rf"^--push={push}: .*{message}"):
            to_hf.main([f"--source={checkpoint}", f"--out={tmp_path / 'out'}", f"--push={push}"])
    for flag in ("--public", "--revision=v1"):
        with pytest.raises(UserError, match="add --push=ORG/NAME"):
            to_hf.main([f"--source={checkpoint}", f"--out={tmp_path / 'out'}", flag])
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_not_pushed(checkpoint, hub: Hub, tmp_path):
    out = tmp_path / "out"
    write_published(out)
    with pytest.raises(UserError, match=r"out: exists already and was not made from --source="):
        to_hf.main([f"--source={checkpoint}", f"--out={out}", f"--push={NAME}"])
    shutil.rmtree(out)
    to_hf.main([f"--source={checkpoint}", f"--out={out}", "--dtype=bfloat16"])
    with pytest.raises(UserError, match="pass --overwrite"):
        to_hf.main([f"--source={checkpoint}", f"--out={out}", f"--push={NAME}"])
    assert hub.commits == 0


def test_a_card_that_was_edited_stays(checkpoint, hub: Hub, tmp_path):
    out = tmp_path / "out"
    arguments = [f"--source={checkpoint}", f"--out={out}"]
    to_hf.main(arguments)
    card = out / "README.md"
    card.write_text(card.read_text().replace("## Use", "## How to use"))
    for more in (["--overwrite"], [f"--push={NAME}"]):
        to_hf.main([*arguments, *more])
        assert "## How to use" in card.read_text()
    assert hub.files[NAME, "main"]["README.md"] == card.read_bytes()
    card.unlink()
    to_hf.main([*arguments, f"--push={NAME}"])
    assert "## Use" in hub.files[NAME, "main"]["README.md"].decode()


def test_the_index_says_of_which_checkpoint_it_is(checkpoint, tmp_path):
    to_hf.main([f"--source={checkpoint}", f"--out={tmp_path / 'out'}"])
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert re.fullmatch("[0-9a-f]{32} as stored", index["metadata"]["elbo_kto_jax"])
