"""Text for people: control characters, long messages, and standard streams that are closed, broken or full."""

import ast
import json
import logging
import subprocess
import sys

import pytest

from elbo_kto_jax.runtime import terminal
from elbo_kto_jax.runtime.errors import UserError
from tests.robustness.commands import PROJECT_ROOT, environment

ESCAPES = "\x1b]0;title\x07\x1b[2J\r\x9b31m\x7f\u202eabc\u2066"
OBEYED = ("\x1b", "\x07", "\r", "\x9b", "\x7f", "\u202e", "\u2066", "\ud800")


def test_control_characters_are_spelt_out():
    text = terminal.printable(f"{ESCAPES}\ud800 é 日本 👍\tx\r\ny\n")
    assert not any(character in text for character in OBEYED)
    assert text.endswith(" é 日本 👍\tx\ny\n")
    assert "\\x1b]0;title\\x07" in text


def test_json_says_the_same_without_them(capsys):
    value = {"name": f"{ESCAPES}\ud800 é"}
    terminal.say_json(json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace").decode())
    line = capsys.readouterr().out
    assert not any(character in line for character in OBEYED)
    assert json.loads(line) == value


@pytest.mark.parametrize("value", ["x" * 1_000_000, "a\n" * 100_000, "\x1b" * 100_000])
def test_messages_of_users_errors_stay_short(value):
    message = str(UserError(f"--flag={value}: no such thing; choose another"))
    assert len(message) < 2 * terminal.LONGEST_LINE
    assert message.count("\n") <= 1
    assert message.startswith("--flag=")
    assert message.endswith("no such thing; choose another")


def test_log_lines():
    line = terminal.Formatter("%(message)s").format(
        logging.LogRecord("", logging.INFO, "", 0, f"{ESCAPES}{'x' * 10_000}\nsecond", None, None)
    )
    assert not any(character in line for character in OBEYED)
    assert len(line) < 2 * terminal.LONGEST_LINE
    assert line.endswith("\nsecond")


def test_text_reaches_stdout_in_one_way():
    """`print` to stdout, but for empty lines, only in terminal.py, and in the process that speaks JSON to another."""
    for folder in ("elbo_kto_jax", "launch", "conversion"):
        for path in sorted((PROJECT_ROOT / folder).rglob("*.py")):
            if path.name in ("terminal.py", "worker.py"):
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
                    assert not node.args or "file" in {word.arg for word in node.keywords}, f"{path}:{node.lineno}"


# ---- the streams of real processes ----

COMMAND = """
import logging, sys
from elbo_kto_jax import cli
from elbo_kto_jax.runtime import terminal
from elbo_kto_jax.runtime.errors import UserError
def main(argv):
    for logger in (third, cli.log):
        logger.warning("log \\x1b[31m")
    print("bar\\r\\x1b[31m", file=sys.stderr)
    terminal.say("caf\\xe9 \\x1b[31m" * int(argv[0]))
    if argv[1:]:
        raise UserError(argv[1])
    return {"done": "\\x9b\\xe9"}
third = logging.getLogger("third")  # of a library that was imported before
third.addHandler(logging.StreamHandler())
third.propagate = False
cli.run(main)
"""


def run(redirection: str, *words: str, **more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" "${{@:2}}" {redirection}', sys.executable, COMMAND, *(words or "1")],
        cwd=PROJECT_ROOT,
        env=environment(PYTHONPATH=str(PROJECT_ROOT), **more),
        capture_output=True,
        timeout=120,
    )


def test_no_control_characters_leave():
    found = run("")
    assert found.returncode == 0
    assert b"\x1b" not in found.stdout + found.stderr
    *_, last = found.stdout.decode().splitlines()
    assert json.loads(last) == {"done": "\x9bé"}
    assert "\x9b" not in last
    assert found.stderr.decode().count("log \\x1b[31m") == 2


@pytest.mark.parametrize(
    "redirection",
    [
        ">&-",
        "2>&-",
        "<&- >&- 2>&-",
        "2>/dev/full",
        "| true; exit ${PIPESTATUS[0]}",
        "2>&1 >/dev/null | true; exit ${PIPESTATUS[0]}",
    ],
)
def test_streams_that_are_closed_broken_or_full_fail_nothing(redirection):
    found = run(redirection, "10000")
    assert found.returncode == 0
    assert b"Traceback" not in found.stderr + found.stdout


def test_a_closed_stdout_is_no_file_of_the_command(tmp_path):
    """The next file that is opened would get its number, and with it whatever is printed."""
    file = tmp_path / "out.txt"
    script = COMMAND.replace("    if argv[1:]", f"    open({str(file)!r}, 'w').write('mine')\n    if argv[1:]")
    found = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" 1 >&- 2>&-', sys.executable, script],
        cwd=PROJECT_ROOT,
        env=environment(PYTHONPATH=str(PROJECT_ROOT)),
        timeout=120,
    )
    assert found.returncode == 0
    assert file.read_text() == "mine"


def test_what_a_full_disk_took_from_stdout_is_said():
    found = run(">/dev/full")
    assert found.returncode == 2
    assert found.stderr.decode().splitlines()[-1].startswith("error: stdout: No space left on device")


def test_users_errors_on_the_command_line():
    found = run("", "1", "\x1b[2J" + "x" * 100_000)
    assert found.returncode == 2
    assert found.stderr.splitlines()[-1].startswith(b"error: \\x1b[2Jxxx")
    assert len(found.stderr) < 3000


@pytest.mark.parametrize("utf8", ["0", "1"])
def test_text_is_utf8_in_every_locale(utf8):
    found = run("", "1", "é", LC_ALL="C", PYTHONUTF8=utf8, PYTHONCOERCECLOCALE="0")
    assert found.stderr.decode().splitlines()[-1] == "error: é"
    assert found.stdout.decode().startswith("café")


def test_text_files_name_their_encoding():
    """Files that are opened as text without one are read and written in that of the locale."""
    for folder in ("elbo_kto_jax", "launch", "conversion", "configs"):
        for path in sorted((PROJECT_ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call):
                    continue
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                words = {word.arg for word in node.keywords}
                where = f"{path}:{node.lineno}"
                if name in ("read_text", "write_text"):
                    assert "encoding" in words, where
                if name in ("open", "fdopen", "TemporaryFile", "NamedTemporaryFile") and _owner(node) != "os":
                    modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
                    binary = any("b" in mode for mode in modes)
                    assert (
                        binary or "encoding" in words or _owner(node) in ("tensorstore", "KvStore", "_OPENER", "_files")
                    ), where


def _owner(call: ast.Call) -> str:
    owner = getattr(call.func, "value", None)
    return getattr(owner, "attr", getattr(owner, "id", ""))
