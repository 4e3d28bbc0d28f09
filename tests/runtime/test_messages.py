"""Foreign text in messages."""

import pytest

from elbo_kto_jax.runtime.messages import Secrets, one_line, shown


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\r\n\tb  c", "a b c"),
        ("\x1b[31mred\x07\u202e", "\ufffd[31mred\ufffd\ufffd"),
        ("x" * 300, "x" * 300),
        ("x" * 301, "x" * 299 + "…"),
        ("x" * 10 + " " * 10_000 + "y", "x" * 10 + "…"),
        ("", ""),
    ],
)
def test_one_line(text, line):
    assert one_line(text) == line


@pytest.mark.parametrize("value", ["x" * 1_000_000, ["y" * 1_000_000], 10**10_000, {"a": "z" * 1000}], ids=type)
def test_values_are_cut(value):
    assert len(shown(value)) <= 100


def test_short_values_are_whole():
    assert shown(["a", 1]) == "['a', 1]"


@pytest.mark.parametrize(
    ("secret", "text", "message"),
    [
        ("sk-0123456789", "key sk-0123456789!", "key [key]!"),
        ("sk-0123456789", "key sk-01234", "key [key]"),  # as an endpoint cuts it
        ("sk-0123456789", "…456789 sk-0123", "…456789 sk-0123"),  # less than eight characters of it
        ("p@ss/word", "p%40ss%2Fword", "[key]"),
        ("p%40ss%2Fword", "p@ss/word", "[key]"),
        ('qu"ote-d', '{"key": "qu\\"ote-d"}', '{"key": "[key]"}'),
        ("pass", "a pass", "a [key]"),
        ("", "nothing", "nothing"),
        ("-", "a-b", "a-b"),
    ],
)
def test_secrets_are_not_in_messages(secret, text, message):
    assert Secrets([secret]).one_line(text) == message


def test_placeholders_stay_in_replies():
    secrets = Secrets(["A", "EMPTY", "sk-0123456789"])
    assert secrets.cut_out("[[A]] EMPTY sk-0123456789") == "[[A]] EMPTY [key]"
