"""What comes with a checkpoint and is not data, kept within bounds: chat templates and tokenizers.

A chat template is a program in a language with loops and powers; a tokenizer's Rust code panics on some files, and its
rules may make a short text long. Templates run in a process of their own, and tokenizers are tried there before they
are used here; `runtime.sandbox` is that process and states what time and memory it may take. How much the rules of a
tokenizer may lengthen a text is computed from its file: at most MOST_GROWTH times.
"""

import atexit
import base64
import binascii
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elbo_kto_jax.data.portable import TextTokenizer
from elbo_kto_jax.runtime import sandbox

Message = dict[str, str]

MOST_GROWTH = 10_000
_TEXTS = (
    'The quick brown fox, 0123456789 times!\n\n\t- "It\'s" (a) [b] {c} <d> #e $f %g &h *i +j /k =l @m ^o _p `q |r ~s',
    "Grüße, Ελλάδα, Привет, שלום, مرحبا, नमस्ते, 你好, こんにちは, 안녕 \U0001f600\u200d\u2642\ufe0f ﷺ e\u0301 ½",
    "",
    " ",
)


class ForeignError(Exception):
    """A template or tokenizer fails or takes too much.

    Attributes:
      index: of the conversation at which it did, where there are several.
    """

    def __init__(self, reason: str, index: int = 0):
        super().__init__(reason)
        self.index = index


def render(tokenizer: TextTokenizer, conversations: Sequence[list[Message]], are_open: Sequence[bool]) -> list[str]:
    """The texts that the chat template of `tokenizer` makes of conversations.

    Args:
      tokenizer: has a chat template.
      conversations: messages.
      are_open: whether a text ends with the content of its last message, to be continued; otherwise it ends with the
        header of an answer.

    Raises:
      ForeignError: the template refuses a conversation, takes more than it may, or writes what is no text.
    """
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:  # several, and none is the default
        raise ForeignError(str(error)) from error
    moment = getattr(tokenizer, "moment", None)  # at which the clock of the template stands, where a run has fixed it
    request = {
        "template": template,
        "variables": tokenizer.special_tokens_map,
        "conversations": [
            {"messages": messages, "open": is_open} for messages, is_open in zip(conversations, are_open, strict=True)
        ],
        "moment": moment and moment.isoformat(),
    }
    texts = []
    for index, answer in enumerate(_process.ask(request, len(conversations))):
        if "error" in answer:
            raise ForeignError(answer["error"], index)
        texts.append(answer["text"])
        try:
            texts[-1].encode()
        except UnicodeEncodeError:
            raise ForeignError("writes half of a surrogate pair, which no tokenizer can read", index) from None
    return texts


def check_tokenizer_file(content: bytes) -> None:
    """Checks a tokenizer.json before it is used.

    Raises:
      ForeignError: it is damaged, crashes, lengthens texts too much, or depends on chance.
    """
    try:
        text = content.decode()
        mapping = json.loads(text)
        parts = [mapping.get("normalizer"), mapping.get("pre_tokenizer")]
        if mapping["model"].get("dropout"):
            raise ValueError("its `dropout` gives other tokens at every start; set it to null")
        growth = max(math.prod(map(_growth, parts)), _growth(mapping.get("decoder")))
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
        raise ForeignError(failure(error)) from error
    if growth > MOST_GROWTH:
        raise ForeignError(f"its rules may make texts more than {MOST_GROWTH} times as long")
    (answer,) = _process.ask({"tokenizer": text, "texts": _TEXTS}, 1)
    if "error" in answer:
        raise ForeignError(answer["error"])


def failure(error: BaseException) -> str:
    """Why a tokenizer failed, in a line; "" where `error` is not its fault, such as Ctrl-C.

    A panic of Rust is no Exception for Python.
    """
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        return ""
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__


def _growth(rule: Any) -> float:
    """How many times as long a normalizer, pre-tokenizer or decoder may make a text, at most."""
    if not isinstance(rule, dict):
        return 1.0
    kind: Any = rule.get("type")
    if kind == "Sequence":
        (inner,) = (rule[name] for name in ("normalizers", "pretokenizers", "decoders") if name in rule)
        return math.prod(map(_growth, inner))
    if kind == "Replace":
        string = rule["pattern"].get("String")
        if string == "":
            raise ValueError("it replaces the empty text")
        # A regular expression may match a single character, or none between any two.
        return max(1.0, len(rule["content"]) / len(string)) if string else 1.0 + len(rule["content"])
    if kind == "Prepend":
        return 1.0 + len(rule["prepend"])
    if kind == "Precompiled":
        return _longest_replacement(rule["precompiled_charsmap"])
    # Bytes as characters; spaces around words.
    return {"ByteLevel": 2.0, "Metaspace": 2.0, "BertNormalizer": 3.0}.get(kind, 1.0)


def _longest_replacement(charsmap: str) -> float:
    """Bytes of the longest text that a map of SentencePiece puts in the place of a character.

    The map is the length of a trie (four bytes), the trie, and texts that end with a zero byte.
    """
    try:
        content = base64.b64decode(charsmap, validate=True)
    except binascii.Error as error:
        raise ValueError(f"its map of characters is damaged ({error})") from None
    length = int.from_bytes(content[:4], "little")
    if length == 0 or length % 4 or 4 + length > len(content):
        raise ValueError("its map of characters is damaged")
    return float(max(1, *map(len, content[4 + length :].split(b"\0"))))


class _Process:
    """The process of `runtime.sandbox`, started at the first request and again where it was ended."""

    def __init__(self) -> None:
        self._running: subprocess.Popen | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    def ask(self, request: dict[str, Any], num_answers: int) -> list[dict[str, str]]:
        """The answers; the last one is an error where the process ended before it had given all."""
        line = json.dumps(request, default=str).encode() + b"\n"
        with self._lock:
            running = self._running
            if running is None or running.poll() is not None:
                running = self._running = self._start()
            if running.stdin is None or running.stdout is None:
                raise RuntimeError("the process of the sandbox was started without pipes")
            answers: list[dict[str, str]] = []
            try:
                running.stdin.write(line)
                running.stdin.flush()
                while len(answers) < num_answers:
                    answers.append(json.loads(running.stdout.readline()))
            except (OSError, ValueError):  # it is gone, or going
                answers.append({"error": self._why_it_ended(running)})
            except BaseException:  # Ctrl-C: answers of this request must not be taken for those of the next
                self.close()
                raise
        return answers

    def _why_it_ended(self, running: subprocess.Popen) -> str:
        self.close()
        status = running.returncode
        if status == -sandbox.ENDED_BY:
            return f"takes more than {sandbox.MOST_SECONDS:g} seconds"
        return f"crashes, or takes more than {sandbox.MOST_MEMORY_BYTES} bytes of memory (status {status})"

    @staticmethod
    def _start() -> subprocess.Popen:
        # -P: the folder of the program is none to import from. One thread, for each takes its share of the memory.
        return subprocess.Popen(
            [sys.executable, "-P", str(Path(sandbox.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )

    def close(self) -> None:
        if self._running is not None:
            self._running.kill()
            self._running.wait()
            self._running = None


_process = _Process()
