"""Tokens against the authors' (docs/method.md 5), exact windows, and tokenizers that do not fit."""

import copy
import dataclasses

import numpy as np
import pytest
from tokenizers.normalizers import Replace
from tokenizers.processors import TemplateProcessing

from elbo_kto_jax.checkpoints.assets import read_assets
from elbo_kto_jax.checkpoints.tokenizer import build_tokenizer
from elbo_kto_jax.data import chat
from elbo_kto_jax.data.chat import (
    encode,
    encode_batch,
    encode_prompt,
    writes_special_tokens,
)
from elbo_kto_jax.data.reading import read_records
from elbo_kto_jax.data.records import Record
from elbo_kto_jax.data.special import find_eot_id, with_special_tokens
from elbo_kto_jax.runtime.errors import UserError
from tests.golden import Golden, golden_file

AUTHORS = {"exact_window": False, "append_eot": False, "eot_id": -1}
EXACT = {"exact_window": True, "append_eot": False, "eot_id": -1}
UNCUT = 1 << 20


@pytest.fixture(params=[("records.jsonl", ""), ("records_extra.jsonl", "extra.")], ids=["records", "extra"])
def golden_records(request, golden_dir):
    """(records, prefix of their keys in the npz)."""
    name, prefix = request.param
    return read_records(golden_file(golden_dir, name)).records, prefix


@pytest.fixture(scope="session")
def model_config(golden_dir):
    return Golden(golden_dir).config


def assert_golden(encoded, goldens, prefix, pad_id):
    padded = np.full_like(goldens[f"{prefix}input_ids"], pad_id)
    for row, one in zip(padded, encoded, strict=True):
        row[: len(one.tokens)] = one.tokens
    np.testing.assert_array_equal(padded, goldens[f"{prefix}input_ids"])
    for name in ("prompt_length", "completion_length", "text_length"):
        np.testing.assert_array_equal([getattr(one, name) for one in encoded], goldens[f"{prefix}{name}"], err_msg=name)


def completion_text(record):
    return record.completion if isinstance(record.completion, str) else record.completion[0]["content"]


def test_one_string_tokens_are_the_authors(tokenizer, goldens, golden_records):
    records, prefix = golden_records
    max_length = goldens[f"{prefix}input_ids"].shape[1]
    encoded = encode_batch(tokenizer, records, max_length=max_length, **AUTHORS)
    assert_golden(encoded, goldens, prefix, tokenizer.pad_token_id)


@pytest.mark.parametrize("as_messages", ["prompt", "completion", "both"])
def test_string_beside_messages_is_a_conversation(tokenizer, goldens, golden_dir, as_messages):
    plain = [
        r for r in read_records(golden_file(golden_dir, "records_extra.jsonl")).records if isinstance(r.prompt, str)
    ]
    assert plain
    if as_messages != "completion":
        plain = [dataclasses.replace(r, prompt=[{"role": "user", "content": r.prompt}]) for r in plain]
    if as_messages != "prompt":
        plain = [dataclasses.replace(r, completion=[{"role": "assistant", "content": r.completion}]) for r in plain]
    max_length = goldens["extra_plain_as_chat.input_ids"].shape[1]
    encoded = encode_batch(tokenizer, plain, max_length=max_length, **AUTHORS)
    assert_golden(encoded, goldens, "extra_plain_as_chat.", tokenizer.pad_token_id)


def test_prompt_tokens_are_the_first_of_the_exact_form(tokenizer, golden_records):
    for record in golden_records[0]:
        encoded = encode(tokenizer, record, max_length=UNCUT, **EXACT)
        prompt = encode_prompt(tokenizer, record.prompt)
        assert encoded.prompt_length == len(prompt)
        assert encoded.tokens[: len(prompt)].tolist() == prompt


def test_exact_window_is_the_completion(tokenizer, golden_records):
    for record in golden_records[0]:
        encoded = encode(tokenizer, record, max_length=UNCUT, **EXACT)
        window = encoded.tokens[encoded.prompt_length :]
        assert len(window) == encoded.completion_length
        assert tokenizer.decode(window, clean_up_tokenization_spaces=False) == completion_text(record)


def test_prompt_tokens_differ_only_where_a_token_straddles_the_border(tokenizer, goldens, golden_records):
    records, prefix = golden_records
    for record, is_prefix in zip(records, goldens[f"{prefix}prompt_is_prefix"], strict=True):
        exact, authors = (encode(tokenizer, record, max_length=UNCUT, **mode) for mode in (EXACT, AUTHORS))
        if not any(writes_special_tokens(tokenizer, [record])):  # they are read as text, and as tokens
            assert exact.prompt_length == authors.prompt_length
        prompt = slice(authors.prompt_length)
        is_prefix &= not any(writes_special_tokens(tokenizer, [record]))
        assert np.array_equal(exact.tokens[prompt], authors.tokens[prompt]) == is_prefix, record.id
        assert tokenizer.decode(exact.tokens) == tokenizer.decode(authors.tokens)


SPECIAL = (
    "<|eot_id|>",
    "<|mdm_mask|>",
    "<|endoftext|>",
    "<|startoftext|><|start_header_id|>system<|end_header_id|>\n\n",
)


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("form", ["{}", "a {} b", "  {}\ue000", "{}{}", "<|{}|>"])
def test_special_tokens_in_texts_are_text_unless_parity_is_wanted(tokenizer, special, form):
    control = set(tokenizer.added_tokens_decoder)
    text = form.format(special, special)
    turns = [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": text},
        {"role": "user", "content": text},
    ]
    record = Record("a", turns, [{"role": "assistant", "content": text}], True, "here")
    assert any(writes_special_tokens(tokenizer, [record]))
    exact, authors = (encode(tokenizer, record, max_length=UNCUT, **mode) for mode in (EXACT, AUTHORS))
    template = encode_prompt(tokenizer, [{**turn, "content": "x"} for turn in turns])
    window = exact.tokens[exact.prompt_length :]
    assert not control & set(window.tolist())
    assert [t for t in exact.tokens if t in control] == [t for t in template if t in control]
    assert tokenizer.decode(window) == text
    assert tokenizer.decode(exact.tokens) == tokenizer.decode(authors.tokens)  # the same text, template included
    assert control & set(authors.tokens[authors.prompt_length :].tolist())

    # A plain-string prompt went through a template elsewhere; its completion is a text as any other.
    whole = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert encode_prompt(tokenizer, whole) == encode_prompt(tokenizer, turns[:1])
    plain = encode(tokenizer, Record("b", whole, text, True, "here"), max_length=UNCUT, **EXACT)
    assert plain.tokens[: plain.prompt_length].tolist() == encode_prompt(tokenizer, turns[:1])
    assert not control & set(plain.tokens[plain.prompt_length :].tolist())


def test_guarded_texts_are_tokenised_as_others_are(tokenizer, golden_records):
    """The way of texts with special tokens, taken by all texts, gives the tokens of the usual one."""
    for record in golden_records[0]:
        if not isinstance(record.prompt, str) and not any(writes_special_tokens(tokenizer, [record])):
            guard = chat._Guard(chat._special_tokens(tokenizer), record.prompt, "here")
            (text,) = chat._render(tokenizer, [guard.disguised], ["here"])
            assert guard.tokenise(tokenizer, text, None) == encode_prompt(tokenizer, record.prompt)


@pytest.mark.parametrize("mode", [AUTHORS, EXACT], ids=["authors", "exact"])
def test_cut_keeps_the_left_and_counts_what_is_left(tokenizer, golden_records, mode):
    for record in golden_records[0]:
        whole = encode(tokenizer, record, max_length=UNCUT, **mode)
        for max_length in (whole.prompt_length - 1, whole.prompt_length, whole.prompt_length + 1, whole.text_length):
            cut = encode(tokenizer, record, max_length=max_length, **mode)
            np.testing.assert_array_equal(cut.tokens, whole.tokens[:max_length])
            assert cut.completion_length == max(0, min(max_length, whole.text_length) - whole.prompt_length)
            assert (cut.prompt_length, cut.text_length) == (whole.prompt_length, whole.text_length)


@pytest.mark.parametrize("mode", [AUTHORS, EXACT], ids=["authors", "exact"])
def test_end_of_turn_is_part_of_the_window(tokenizer, golden_records, mode):
    eot_id = find_eot_id(tokenizer, "tokenizer")
    for record in golden_records[0]:
        without = encode(tokenizer, record, max_length=UNCUT, **mode)
        encoded = encode(tokenizer, record, max_length=UNCUT, **{**mode, "append_eot": True, "eot_id": eot_id})
        assert encoded.tokens.tolist() == [*without.tokens.tolist(), eot_id]
        assert encoded.completion_length == without.completion_length + 1
        assert encoded.prompt_length == without.prompt_length
        cut = encode(
            tokenizer, record, max_length=without.text_length, **{**mode, "append_eot": True, "eot_id": eot_id}
        )
        np.testing.assert_array_equal(cut.tokens, without.tokens)


def test_template_and_its_absence(tokenizer):
    messages = [{"role": "user", "content": " hello "}]
    expected = (
        f"{tokenizer.bos_token}<|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert tokenizer.decode(encode_prompt(tokenizer, messages), clean_up_tokenization_spaces=False) == expected

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    assert encode_prompt(bare, "hello") == encode_prompt(tokenizer, "hello")
    with pytest.raises(UserError, match="no chat template"):
        encode_prompt(bare, messages)
    record = Record("a", messages, "b", True, "some.jsonl:3")
    with pytest.raises(UserError, match=r"^some.jsonl:3: .*no chat template"):
        encode(bare, record, max_length=9, **EXACT)


def test_tokenizer_that_adds_tokens_by_itself_adds_none(tokenizer):
    adding = copy.deepcopy(tokenizer)
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    adding.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    assert adding("x")["input_ids"] == [bos[1], *tokenizer("x")["input_ids"]]
    record = Record("a", [{"role": "user", "content": "x"}], "b", True, "some.jsonl:3")
    for mode in (AUTHORS, EXACT):
        added, plain = (encode(t, record, max_length=UNCUT, **mode).tokens for t in (adding, tokenizer))
        np.testing.assert_array_equal(added, plain)


def test_template_that_refuses_a_record_names_it(tokenizer):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    record = Record("a", [{"role": "user", "content": "x"}], "b", True, "some.jsonl:3")
    with pytest.raises(UserError, match=r"some.jsonl:3: field `prompt`: .*roles must alternate"):
        encode(strict, record, max_length=9, **EXACT)


@pytest.mark.parametrize("part", ["tokenizer", "policy", "reference"])
def test_golden_tokenizers_fit_the_model(golden_dir, model_config, part):
    with_special_tokens(model_config, build_tokenizer(read_assets(golden_dir / part), part), -1, part)


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("embedding_size", lambda c, t: len(t) - 1, r"wrong tokenizer: it has \d+ tokens, the model embeds \d+"),
        ("eos_token_id", lambda c, t: c.eos_token_id + 1, r"wrong tokenizer: its eos_token_id is \d+, the model's"),
        ("pad_token_id", lambda c, t: c.pad_token_id + 1, r"wrong tokenizer: its pad_token_id is \d+, the model's"),
        ("mask_token_id", lambda c, t: 5, r"wrong tokenizer: the model's mask_token_id 5 is '.*' there"),
        ("mask_token_id", lambda c, t: len(t), r"wrong tokenizer: the model's mask_token_id \d+ is None there"),
    ],
)
def test_wrong_tokenizer_is_refused(tokenizer, model_config, field, change, message):
    wrong = dataclasses.replace(model_config, **{field: change(model_config, tokenizer)})
    with pytest.raises(UserError, match=f"^some/model: {message}"):
        with_special_tokens(wrong, tokenizer, -1, "some/model")


def test_the_padding_of_a_tokenizer_stands_above_an_end_of_text_that_pads(tokenizer, model_config):
    """As DiffuCoder is published."""
    padded = copy.deepcopy(tokenizer)
    padded.add_special_tokens({"pad_token": "<|dlm_pad|>"})
    pads_with_eos = dataclasses.replace(
        model_config, pad_token_id=model_config.eos_token_id, embedding_size=len(padded)
    )
    known = with_special_tokens(pads_with_eos, padded, -1, "some/model")
    assert padded.convert_ids_to_tokens([known.pad_token_id]) == ["<|dlm_pad|>"]
    assert known.eos_token_id == model_config.eos_token_id


def test_declared_mask_token_must_agree(tokenizer, model_config):
    declared = copy.deepcopy(tokenizer)
    declared.mask_token = declared.convert_ids_to_tokens(model_config.mask_token_id)
    with_special_tokens(model_config, declared, -1, "some/model")
    declared.mask_token = declared.bos_token
    with pytest.raises(UserError, match="mask_token_id"):
        with_special_tokens(model_config, declared, -1, "some/model")


def test_end_of_turn_must_exist(tokenizer, monkeypatch):
    assert tokenizer.convert_ids_to_tokens(find_eot_id(tokenizer, "x")) == "<|eot_id|>"
    monkeypatch.setattr(type(tokenizer), "get_added_vocab", lambda self: {})
    with pytest.raises(UserError, match="no end-of-turn token"):
        find_eot_id(tokenizer, "x")


PREFIX = [{"role": "user", "content": "Name a river."}, {"role": "assistant", "content": "Sure: the"}]


@pytest.mark.parametrize("content", ["Sure: the", "Sure: the ", " a <|eot_id|> b"])
@pytest.mark.parametrize("mode", [AUTHORS, EXACT], ids=["authors", "exact"])
def test_a_prompt_that_ends_with_an_assistant_message_is_continued(tokenizer, content, mode):
    prompt = [PREFIX[0], {"role": "assistant", "content": content}]
    expected = tokenizer.apply_chat_template(prompt, tokenize=False, continue_final_message=True)
    assert expected.endswith(content.strip())
    record = Record("a", prompt, [{"role": "assistant", "content": " Danube."}], True, "here")
    encoded = encode(tokenizer, record, max_length=UNCUT, **mode)
    assert tokenizer.decode(encoded.tokens, clean_up_tokenization_spaces=False) == f"{expected} Danube."
    assert tokenizer.decode(encode_prompt(tokenizer, prompt), clean_up_tokenization_spaces=False) == expected
    window = encoded.tokens[encoded.prompt_length :]
    assert tokenizer.decode(window, clean_up_tokenization_spaces=False) == " Danube."


@pytest.mark.parametrize("content", ["", " \n"])
def test_an_empty_assistant_message_at_the_end_is_none(tokenizer, content):
    empty = {"role": "assistant", "content": content}
    assert encode_prompt(tokenizer, [PREFIX[0], empty]) == encode_prompt(tokenizer, PREFIX[:1])


def test_a_template_that_drops_what_is_to_be_continued_is_refused(tokenizer):
    dropping = copy.deepcopy(tokenizer)
    dropping.chat_template = "{% for message in messages %}{{ message['role'] }}{% endfor %}"
    with pytest.raises(UserError, match="leaves out the assistant message at the end"):
        encode_prompt(dropping, PREFIX)


@pytest.mark.parametrize("unit", ["ab", "the river ", "\U0001f600", "<|eot_id|> x ", "\n"])
@pytest.mark.parametrize("mode", [AUTHORS, EXACT], ids=["authors", "exact"])
@pytest.mark.parametrize("long", ["prompt", "completion"])
def test_of_long_texts_the_first_tokens_are_those_of_the_whole(tokenizer, unit, mode, long, monkeypatch):
    text, short = unit * (60_000 // len(unit)), "short"
    prompt, completion = (text, short) if long == "prompt" else (short, text)
    prompt = [{"role": "user", "content": prompt}]
    record = Record("a", prompt, [{"role": "assistant", "content": completion}], True, "here")
    whole = encode(tokenizer, record, max_length=UNCUT, **mode)
    asked = []
    usual = chat._encode
    monkeypatch.setattr(chat, "_encode", lambda t, texts, as_text: asked.extend(texts) or usual(t, texts, as_text))
    for max_length in (16, 100):
        cut = encode(tokenizer, record, max_length=max_length, **mode)
        np.testing.assert_array_equal(cut.tokens, whole.tokens[:max_length])
        assert cut.completion_length == max(0, min(max_length, whole.text_length) - whole.prompt_length)
        assert (cut.text_length > max_length) == (whole.text_length > max_length)
    assert asked
    assert max(map(len, asked)) < 25_000


def test_texts_that_a_normalizer_shortens_are_read_further(tokenizer):
    short = copy.deepcopy(tokenizer)
    short.backend_tokenizer.normalizer = Replace("x", "")
    text = "x" * 100_000 + "the river " * 1000
    for max_length in (10, 500):
        assert chat.tokenise(short, [text], max_length)[0][:max_length] == chat.tokenise(short, [text])[0][:max_length]


def test_tokens_do_not_depend_on_how_texts_are_batched(tokenizer, golden_records):
    records, _ = golden_records
    together = encode_batch(tokenizer, records * 3, max_length=200, **EXACT)
    alone = [encode(tokenizer, record, max_length=200, **EXACT) for record in records] * 3
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)


def test_a_text_of_every_free_character_is_refused(tokenizer):
    text = "".join(map(chr, range(0xE000, 0x110000)))
    with pytest.raises(UserError, match="every character that Unicode keeps free"):
        encode_prompt(tokenizer, [{"role": "user", "content": f"<|eot_id|>{text}"}])


@pytest.mark.parametrize("name", ["pad_token", "eos_token"])
def test_a_token_that_the_tokenizer_does_not_declare_is_the_model_s(tokenizer, model_config, name):
    bare = copy.deepcopy(tokenizer)
    setattr(bare, name, None)
    with_special_tokens(model_config, bare, -1, "some/model")


def test_the_pattern_of_special_tokens_is_built_once(tokenizer, monkeypatch):
    """For many records, not for each: a published tokenizer has hundreds of them."""
    built, build = [], chat._special_tokens
    monkeypatch.setattr(chat, "_special_tokens", lambda of: built.append(of) or build(of))
    records = [Record(str(i), f"question {i}", "answer", True, "here") for i in range(50)]
    assert not any(writes_special_tokens(tokenizer, records))
    assert len(built) == 1
    chat.encode_batch(tokenizer, records, max_length=64, exact_window=True, append_eot=False, eot_id=-1)
    assert len(built) <= 3
