"""Chat templates and tokenizers that take more than they may, crash, or write what is no text; and the usual ones."""

import base64
import contextlib
import copy
import datetime
import json
import random
import re
import resource
import time
from pathlib import Path

import pytest

from elbo_kto_jax.checkpoints.assets import read_assets
from elbo_kto_jax.checkpoints.tokenizer import build_tokenizer
from elbo_kto_jax.data import chat, foreign
from elbo_kto_jax.runtime import sandbox
from elbo_kto_jax.runtime.errors import UserError

MESSAGES = [{"role": "user", "content": "hi"}]
CONVERSATIONS = [
    [{"role": "user", "content": " a <b> & é "}, {"role": "assistant", "content": " Sure: the "}],
    [{"role": "user", "content": "x"}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
]
TEMPLATES = [
    "{% for m in messages %}{{ m['content'] | trim }}{% endfor %}{% if add_generation_prompt %}[answer]{% endif %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% if loop.last %}{% continue %}{% endif %}{{ m | tojson }}{% endfor %}{{ bos_token }}{{ tools is none }}",
    "{%- set ns = namespace(x=1, self='q') -%}\n   {% for m in messages %}\n     {%- set ns.x = ns.x + 1 %}\n"
    "  {{ m['role'] + ': ' + m.content.strip() }}\n{% endfor %}\n{{ ns.x }}{{ dict(a=1) }}{{ '<b>' }}",
]


def with_template(tokenizer, template):
    other = copy.copy(tokenizer)
    other.chat_template = template
    return other


@pytest.mark.parametrize("template", [None, *TEMPLATES])
@pytest.mark.parametrize("is_open", [False, True])
def test_texts_are_those_of_transformers(tokenizer, template, is_open):
    used = with_template(tokenizer, template or tokenizer.chat_template)
    expected = [
        used.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not is_open, continue_final_message=is_open
        )
        for messages in CONVERSATIONS
    ]
    assert foreign.render(used, CONVERSATIONS, [is_open] * len(CONVERSATIONS)) == expected
    assert [chat.render(used, messages, is_open) for messages in CONVERSATIONS] == expected


def test_named_templates(tokenizer):
    named = with_template(tokenizer, {"default": "usual", "tool_use": "x"})
    assert foreign.render(named, [MESSAGES], [False]) == ["usual"]
    with pytest.raises(UserError, match="multiple chat templates with no default"):
        chat.encode_prompt(with_template(tokenizer, {"a": "x"}), MESSAGES)


def test_a_fixed_moment_is_what_a_template_is_told(tokenizer):
    clock = with_template(tokenizer, "{{ strftime_now('%d %b %Y') }}")
    clock.moment = datetime.datetime(2024, 7, 26, 12)
    assert foreign.render(clock, [MESSAGES], [False]) == ["26 Jul 2024"]


HUNGRY = {
    "nested range": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "nested messages": "{% for a in range(9999) %}{% for b in range(9999) %}{% for m in messages %}{{ m }}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "long words": "{{ lipsum(n=100000) }}",
    "repetition": "{{ 'a' * 20000000000 }}",
    "list": "{{ ([0] * 10 ** 10) | length }}",
    "center": "{{ 'a' | center(10 ** 10) }}",
    "ljust": "{{ 'a'.ljust(10 ** 10) }}",
    "indent": "{{ 'a\\nb' | indent(10 ** 10) }}",
    "format": "{{ '%10000000000d' % 1 }}",
    "tojson": "{{ [[1]] | tojson(indent=10 ** 10) }}",
    "doubling": "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "batch": "{{ [1] | batch(10 ** 9, 1) | list | length }}",
    "replace": "{{ ('a' * 10 ** 5) | replace('a', 'b' * 10 ** 5) }}",
    "much": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
}


@pytest.fixture
def small_bounds():
    """The program of `runtime.sandbox` with half a second of processor time and half a gigabyte."""
    source = Path(sandbox.__file__).read_text(encoding="utf-8")
    source = re.sub(r"MOST_SECONDS = [\d.]+", "MOST_SECONDS = 0.5", source)
    source = re.sub(r"MOST_MEMORY_BYTES = .*", "MOST_MEMORY_BYTES = 2**29", source)
    return source


@pytest.mark.parametrize("name", HUNGRY)
def test_a_template_that_takes_too_much_is_refused(tokenizer, tmp_path, monkeypatch, small_bounds, name):
    program = tmp_path / "sandbox.py"
    program.write_text(small_bounds, encoding="utf-8")
    monkeypatch.setattr(sandbox, "__file__", str(program))
    process = foreign._Process()
    monkeypatch.setattr(foreign, "_process", process)
    start = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"^the prompt: field `prompt`: .* template refuses") as error:
        chat.encode_prompt(with_template(tokenizer, HUNGRY[name]), MESSAGES)
    assert len(str(error.value).splitlines()) == 1
    assert time.monotonic() - start < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    assert chat.encode_prompt(tokenizer, MESSAGES)  # the process is there again
    process.close()


@pytest.mark.parametrize("half", ["\\ud800", "a\\udfff", "\\ud83d"])
def test_a_template_that_writes_no_text_is_refused(tokenizer, half):
    with pytest.raises(UserError, match="writes half of a surrogate pair"):
        chat.encode_prompt(with_template(tokenizer, f"{{{{ '{half}' }}}}"), MESSAGES)


@pytest.mark.parametrize("template", ["{{ namespace(_a=1) }}", "{% set n = namespace() %}{% set n._a = 1 %}"])
def test_names_of_python_are_not_stored(tokenizer, template):
    with pytest.raises(UserError, match="stores the name '_a'"):
        chat.encode_prompt(with_template(tokenizer, template), MESSAGES)


def test_a_killed_process_is_started_again(tokenizer):
    expected = chat.encode_prompt(tokenizer, MESSAGES)
    foreign._process._running.kill()
    foreign._process._running.wait()
    assert chat.encode_prompt(tokenizer, MESSAGES) == expected


# Tokenizers.


@pytest.fixture
def assets(golden_dir):
    return read_assets(golden_dir / "tokenizer")


def changed(assets, **changes):
    return {**assets, "tokenizer.json": json.dumps({**json.loads(assets["tokenizer.json"]), **changes}).encode()}


def replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(rules):
    return {"type": "Sequence", "normalizers": rules}


GROWING = {
    "doubling": sequence([replace({"String": "a"}, "aa")] * 40),
    "doubling by expressions": sequence([replace({"Regex": "."}, "bb")] * 40),
    "between characters": sequence([replace({"Regex": "x*"}, "y")] * 40),
    "bytes": sequence([{"type": "ByteLevel"}] * 40),
    "nested": sequence([sequence([replace({"String": "qz"}, "qzqz")] * 20)] * 2),
    "long": replace({"String": "Z"}, "z" * 20_000),
    "prefix": {"type": "Prepend", "prepend": "z" * 20_000},
}


@pytest.mark.parametrize("name", GROWING)
def test_rules_that_lengthen_texts_without_bound_are_refused(assets, name):
    with pytest.raises(UserError, match="may make texts more than 10000 times as long"):
        build_tokenizer(changed(assets, normalizer=GROWING[name]), "there")


def test_a_decoder_that_lengthens_texts_is_refused(assets):
    decoder = {"type": "Sequence", "decoders": [replace({"String": "a"}, "aa")] * 40}
    with pytest.raises(UserError, match="may make texts more than 10000 times as long"):
        build_tokenizer(changed(assets, decoder=decoder), "there")


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "NFKC"},
        sequence([{"type": "Prepend", "prepend": "▁"}, replace({"String": " "}, "▁")]),
        sequence([{"type": "NFD"}, {"type": "StripAccents"}, {"type": "Lowercase"}, replace({"Regex": " {2,}"}, " ")]),
        {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None}
        | {"lowercase": True},
    ],
)
def test_usual_rules_are_not(assets, normalizer):
    build_tokenizer(changed(assets, normalizer=normalizer), "there")


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="},
        {"type": "Precompiled", "precompiled_charsmap": "/w=="},
        {"type": "Precompiled", "precompiled_charsmap": "BAAAAA=="},
        {"type": "Precompiled", "precompiled_charsmap": "no base64"},
        {"type": "Precompiled", "precompiled_charsmap": 7},
        replace({"String": ""}, "x"),
        {"type": "Replace"},
        {"type": "Replace", "pattern": 1, "content": 2},
        {"type": "Sequence"},
        {"type": "No such"},
        [],
        7,
    ],
)
def test_rules_that_crash_or_are_none_are_refused(assets, normalizer):
    with pytest.raises(UserError, match=r"^there: unreadable tokenizer.json \(.*\); copy it again$") as error:
        build_tokenizer(changed(assets, normalizer=normalizer), "there")
    assert len(str(error.value).splitlines()) == 1


def test_a_tokenizer_that_draws_is_refused(assets):
    model = {**json.loads(assets["tokenizer.json"])["model"], "dropout": 0.5}
    with pytest.raises(UserError, match="`dropout` gives other tokens at every start"):
        build_tokenizer(changed(assets, model=model), "there")


def test_truncation_and_padding_of_the_file_are_not_applied(assets, tokenizer):
    padding = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    other = build_tokenizer(changed(assets, padding=padding, truncation=truncation), "there")
    assert chat.encode_prompt(other, MESSAGES) == chat.encode_prompt(tokenizer, MESSAGES)


@pytest.mark.parametrize("length", ["x", None, -5, 3, 10**400, [], {}, 1.5, True])
def test_model_max_length_may_be_anything(assets, tokenizer, length):
    config = {**json.loads(assets["tokenizer_config.json"]), "model_max_length": length}
    other = build_tokenizer({**assets, "tokenizer_config.json": json.dumps(config).encode()}, "there")
    assert chat.encode_prompt(other, MESSAGES) == chat.encode_prompt(tokenizer, MESSAGES)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"\xff", b"7", b"null", b"{"])
def test_files_that_are_no_tokenizer_are_refused(assets, name, content):
    with pytest.raises(UserError, match=r"^there: unreadable tokenizer") as error:
        build_tokenizer({**assets, name: content}, "there")
    assert len(str(error.value)) < 500


def test_a_panic_while_texts_are_read_is_one_line(tokenizer, monkeypatch):
    class PanicException(BaseException):
        pass

    class Backend:
        def no_truncation(self): ...
        def no_padding(self): ...
        def encode_batch_fast(self, *_, **__):
            raise PanicException("index out of bounds")

    monkeypatch.setattr(type(tokenizer), "backend_tokenizer", Backend())
    with pytest.raises(UserError, match="the tokenizer fails on one of 1 texts: index out of bounds"):
        chat.tokenise(tokenizer, ["a"])


def test_damaged_maps_of_characters_end_in_one_line(assets, capfd):
    """Those that look whole are tried in the other process, where Rust's panics are not seen."""
    rng = random.Random(0)
    for _ in range(10):
        content = (64).to_bytes(4, "little") + rng.randbytes(64) + b"ab\0cd\0"
        normalizer = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(content).decode()}
        with contextlib.suppress(UserError):
            build_tokenizer(changed(assets, normalizer=normalizer), "there")
    assert "panicked" not in capfd.readouterr().err
