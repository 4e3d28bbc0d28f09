"""The command `chat`: what it prints, what it remembers, and how an answer forms on a terminal."""

import dataclasses
import io
import json
from types import SimpleNamespace

import numpy as np
import pyte
import pytest

from elbo_kto_jax import chat
from elbo_kto_jax.data.chat import encode_prompt
from elbo_kto_jax.reports.denoising import MASK
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.flags import load_config_file
from elbo_kto_jax.sampling import canvas, commands, conversation
from elbo_kto_jax.sampling.respond import Answers, open_checkpoint

MESH = ["--config.mesh.data=-1", "--config.mesh.tensor=1"]  # the tests have more devices than the model heads


class Terminal(io.StringIO):
    """A terminal of so many columns and lines, which keeps every screen that was flushed."""

    def __init__(self, monkeypatch, columns=80, lines=24):
        super().__init__()
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("LINES", str(lines))
        monkeypatch.setenv("TERM", "xterm")
        self._screen, self.screens = pyte.Screen(columns, lines), []
        self._stream = pyte.Stream(self._screen)

    def isatty(self):
        return True

    def flush(self):
        self._stream.feed(self.getvalue().replace("\n", "\r\n"))
        self.seek(0)
        self.truncate()
        screen = [line.rstrip() for line in self._screen.display]
        if not self.screens or screen != self.screens[-1]:
            self.screens.append(screen)

    @property
    def lines(self):
        """The screens without their empty lines."""
        return [[line for line in screen if line] for screen in self.screens]


@pytest.fixture
def config():
    config = load_config_file("chat")
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    config.sampler.update({"gen_length": 16, "steps": 16, "block_length": 8})
    return Config.from_mapping(config.to_dict())


@pytest.fixture
def checkpoint(tiny_checkpoint, config):
    return open_checkpoint(str(tiny_checkpoint), config, flag="--checkpoint")


@pytest.fixture
def replies(monkeypatch):
    """Answers without a model: "reply 1", "reply 2", ...; the conversations that were asked for."""
    asked = []

    def respond(checkpoint, records, config, watch=None):
        asked.append(records[0].prompt)
        mask = checkpoint.model.config.mask_token_id
        tokens = np.asarray(encode_prompt(checkpoint.tokenizer, f"reply {len(asked)}"), np.int32)
        if watch:
            for shown in (np.full_like(tokens, mask), np.where(np.arange(len(tokens)) % 2, mask, tokens), tokens):
                watch(0, shown)
        responses = SimpleNamespace(written_at=np.zeros((1, 3), int), forward_passes=5, forward_tokens=50)
        return Answers([], responses, [f"reply {len(asked)}"], 0.5)

    monkeypatch.setattr(conversation, "respond", respond)
    return asked


def test_without_a_terminal_only_finished_answers_are_printed(tiny_checkpoint, monkeypatch, capsys):
    """The real thing, on random weights: two messages of one word, an empty line between them."""
    monkeypatch.setattr("sys.stdin", io.StringIO("Capitals abc\n\nagain\n"))
    summary = chat.main([f"--checkpoint={tiny_checkpoint}", *MESH, "--config.sampler.gen_length=32"])
    assert "\x1b" not in capsys.readouterr().out
    assert summary["turns"] == 2
    assert summary["forward_tokens"] > summary["forward_passes"] > 0


def test_what_was_said_is_remembered(checkpoint, config, replies):
    talk = conversation.Conversation(checkpoint, config, io.StringIO())
    for message in ("first", "second", "third"):
        talk.answer(message)
    said = [(message["role"], message["content"]) for message in replies[-1]]
    expected = [("user", "first"), ("assistant", "reply 1"), ("user", "second"), ("assistant", "reply 2")]
    assert said == [*expected, ("user", "third")]
    assert talk.summary == {
        "turns": 3, "tokens_per_second": 6.0, "forward_passes": 15, "forward_tokens": 150, "seconds": 1.5,
    }  # fmt: skip


def test_the_oldest_messages_give_way(checkpoint, config, replies):
    longest = checkpoint.model.config.max_sequence_length - config.sampler.gen_length
    talk = conversation.Conversation(checkpoint, config, io.StringIO())
    for word in "abcdef":
        talk.answer(word * 20)
    assert replies[-1][-1]["content"] == "f" * 20
    assert replies[-1][0]["role"] == "user"
    assert 1 < len(replies[-1]) < 11
    assert len(encode_prompt(checkpoint.tokenizer, replies[-1])) <= longest


def test_a_message_that_is_too_long_does_not_end_the_conversation(tiny_checkpoint, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * 500 + "\nshort\n"))
    assert chat.main([f"--checkpoint={tiny_checkpoint}", *MESH])["turns"] == 1
    assert len(capsys.readouterr().out.splitlines()) >= 1


def test_the_answer_forms_in_place(checkpoint, config, replies, monkeypatch):
    terminal = Terminal(monkeypatch, columns=5)
    talk = conversation.Conversation(checkpoint, config, terminal)
    talk.answer("one")
    forming = ["".join(screen) for screen in terminal.lines]
    assert MASK * config.sampler.gen_length in forming
    masks = [screen.count(MASK) for screen in forming if MASK in screen]
    assert masks[0] > masks[1] > masks[-1] > 0
    assert ["reply", "1"] in [[line.strip() for line in screen] for screen in terminal.lines]  # five columns
    talk.answer("two")
    terminal.flush()
    assert terminal.lines[-1] == ["reply", " 1", "reply", " 2"]  # as the terminal itself breaks lines: nothing is left


def test_a_long_answer_stays_on_the_screen(monkeypatch):
    terminal = Terminal(monkeypatch, lines=4)
    shown = canvas.Canvas(terminal)
    shown.draw("\n".join("abcdefgh"))
    terminal.flush()
    assert terminal.lines[-1] == ["f", "g", "h"]
    shown.draw("x\ty\x1b[2Jz")
    terminal.flush()
    assert terminal.lines[-1] == ["x y[2Jz"]  # nothing that a terminal would obey
    shown.erase()
    terminal.flush()
    assert terminal.lines[-1] == []


def test_an_interrupt_while_an_answer_forms_leaves_the_terminal_as_it_was(checkpoint, config, monkeypatch):
    def respond(*_, watch, **__):
        watch(0, np.zeros(16, np.int32))
        raise KeyboardInterrupt

    monkeypatch.setattr(conversation, "respond", respond)
    terminal = Terminal(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        conversation.Conversation(checkpoint, config, terminal).answer("one")
    terminal.flush()
    assert terminal.lines[-1] == []
    assert not terminal._screen.cursor.hidden


def test_interrupt_ends_it(tiny_checkpoint, monkeypatch, replies):
    lines = iter(["hello"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, None) or (_ for _ in ()).throw(KeyboardInterrupt))
    assert chat.main([f"--checkpoint={tiny_checkpoint}", *MESH])["turns"] == 1


def test_answers_fit_into_the_model(config):
    sampler = dataclasses.replace(config.sampler, gen_length=256, steps=128, block_length=32)
    assert conversation.fit(sampler, 4096) == sampler
    assert conversation.fit(sampler, 200) == dataclasses.replace(sampler, gen_length=96, steps=48)
    assert conversation.fit(sampler, 20) == dataclasses.replace(sampler, gen_length=32, steps=16)


def test_a_model_without_a_template_is_refused(tiny_checkpoint, checkpoint, monkeypatch):
    checkpoint.tokenizer.chat_template = None
    monkeypatch.setattr(conversation, "open_checkpoint", lambda *_, **__: checkpoint)
    with pytest.raises(UserError, match="no chat template"):
        chat.main([f"--checkpoint={tiny_checkpoint}", *MESH])


def test_bytes_that_are_no_text_do_not_end_the_conversation(tiny_checkpoint, monkeypatch, caplog):
    monkeypatch.setattr("sys.stdin", io.StringIO("caf\udce9\nshort\n"))
    assert chat.main([f"--checkpoint={tiny_checkpoint}", *MESH])["turns"] == 1
    assert "not UTF-8" in caplog.text


def test_control_characters_of_an_answer_are_spelt_out(checkpoint, config, monkeypatch):
    hostile = "\x1b[2J\x9bred\r\u202e"
    answers = Answers(
        [], SimpleNamespace(written_at=np.zeros((1, 3), int), forward_passes=1, forward_tokens=1), [hostile], 1
    )
    monkeypatch.setattr(conversation, "respond", lambda *_, **__: answers)
    out = io.StringIO()
    assert conversation.Conversation(checkpoint, config, out).answer("hi") == hostile
    assert out.getvalue() == "\\x1b[2J\\x9bred\\r\\u202e\n"


def chatted(tiny_checkpoint, monkeypatch, *lines) -> dict:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return chat.main([f"--checkpoint={tiny_checkpoint}", *MESH])


def test_commands(tiny_checkpoint, monkeypatch, capsys, replies, tmp_path):
    file = tmp_path / "talk.json"
    lines = ["/help", "/system Be brief.", "one", "two", f"/save {file}", "/reset", "three", "/system", "four"]
    assert chatted(tiny_checkpoint, monkeypatch, *lines)["turns"] == 4
    assert capsys.readouterr().out.startswith(commands.HELP)
    said = [[(message["role"], message["content"]) for message in asked] for asked in replies]
    system = ("system", "Be brief.")
    assert said[:2] == [[system, ("user", "one")], [system, ("user", "one"), ("assistant", "reply 1"), ("user", "two")]]
    assert said[2:] == [[system, ("user", "three")], [("user", "three"), ("assistant", "reply 3"), ("user", "four")]]
    saved = json.loads(file.read_text())
    assert saved["checkpoint"] == str(tiny_checkpoint)
    roles = ["system", *["user", "assistant"] * 2]
    assert [message["role"] for message in saved["messages"]] == roles
    assert saved["messages"][-1]["content"] == "reply 2"


def test_save_never_overwrites_unasked(tiny_checkpoint, monkeypatch, caplog, replies, tmp_path):
    file = tmp_path / "a talk.json"
    file.write_text("precious")
    chatted(tiny_checkpoint, monkeypatch, "one", f"/save {file}", "/save", f"/save {tmp_path}", f"/save {file}/x")
    assert file.read_text() == "precious"
    for words in (f"{file} exists already", "/save: name a file", "is a folder", "is a file, not a folder"):
        assert words in caplog.text
    chatted(tiny_checkpoint, monkeypatch, "/save --overwrite nothing.json", "one", f"/save --overwrite {file}")
    assert "/save: nothing was said yet" in caplog.text
    assert json.loads(file.read_text())["messages"][0] == {"role": "user", "content": "one"}


def test_what_is_no_command(tiny_checkpoint, monkeypatch, caplog, replies):
    assert chatted(tiny_checkpoint, monkeypatch, "/forget", "/reset now", " /forget")["turns"] == 1
    assert replies[0][-1]["content"] == " /forget"
    assert "there is no command '/forget'; /help lists them" in caplog.text
    assert "/reset: takes nothing, got 'now'" in caplog.text


def test_a_template_that_takes_no_system_message(checkpoint, config, replies):
    checkpoint.tokenizer.chat_template = "{{ raise_exception('no system') if messages[0].role == 'system' }}x"
    talk = conversation.Conversation(checkpoint, config, io.StringIO())
    with pytest.raises(UserError, match=r"/system: .*no system"):
        talk.set_system("Be brief.")
    talk.answer("one")
    assert [message["role"] for message in replies[0]] == ["user"]


def test_all_that_was_said_is_saved_though_the_model_takes_less(checkpoint, config, replies):
    talk = conversation.Conversation(checkpoint, config, io.StringIO())
    talk.set_system("s")
    for word in "abcdef":
        talk.answer(word * 20)
    assert len(talk.messages) == 13
    assert len(replies[-1]) < 12
    assert [message["role"] for message in replies[-1][:2]] == ["system", "user"]


def test_an_empty_answer_is_shown_as_such(checkpoint, config, monkeypatch):
    responses = SimpleNamespace(written_at=np.zeros((1, 3), int), forward_passes=1, forward_tokens=1)
    monkeypatch.setattr(conversation, "respond", lambda *_, **__: Answers([], responses, [" \n"], 1))
    out = io.StringIO()
    talk = conversation.Conversation(checkpoint, config, out)
    assert talk.answer("hi") == " \n"
    assert out.getvalue() == "(empty answer)\n"
    assert talk.messages[-1]["content"] == " \n"
