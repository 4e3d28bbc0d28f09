"""data/special.py: who says which token is the mask, the end of text and the end of a turn.

Also what a checkpoint's manifest keeps of it, and tokenizers that are published in two files.
"""

import dataclasses
import json
import logging
import tempfile
from pathlib import Path

import pytest
from tokenizers import Regex, pre_tokenizers

from elbo_kto_jax import cli, to_hf
from elbo_kto_jax.checkpoints import random_folder
from elbo_kto_jax.checkpoints.assets import read_assets
from elbo_kto_jax.checkpoints.load import load_config, load_model
from elbo_kto_jax.checkpoints.manifest import manifest_checksum
from elbo_kto_jax.checkpoints.save import save_model
from elbo_kto_jax.checkpoints.tiny import tiny_tokenizer, write_untrained
from elbo_kto_jax.checkpoints.tokenizer import build_tokenizer
from elbo_kto_jax.data import chat
from elbo_kto_jax.data.special import MASK_KEY, end_of_turn, find_eot_id, with_special_tokens
from elbo_kto_jax.models.registry import architectures, read_config
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.sampling import respond
from tests import families, runs
from tests.families import FAMILIES
from tests.published import read_published

QWEN_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def tokenizer():
    """That of the quickstart: it has <|mdm_mask|>, and declares no mask token."""
    return tiny_tokenizer()


def mask_of(tokenizer) -> int:
    return tokenizer.get_vocab()[random_folder.MASK]


def model(family: str, tokenizer, **changes):
    """A model that fits the tokenizer and says no mask token, unless in `changes`."""
    eos = tokenizer.eos_token_id
    said = {"embedding_size": 256, "vocab_size": 256, "mask_token_id": None, "eos_token_id": eos, "pad_token_id": eos}
    return families.config(family, **said | changes)


def refusal(*arguments) -> str:
    with pytest.raises(UserError) as refused:
        with_special_tokens(*arguments)
    assert str(refused.value).count("\n") <= 1
    return str(refused.value)


# ---- the mask token ----


@pytest.mark.parametrize("family", FAMILIES)
def test_the_users_word_is_above_config_json_above_the_tokenizers(tokenizer, family):
    mask_id, other = mask_of(tokenizer), tokenizer.bos_token_id

    def found(chosen, said):
        described = model(family, tokenizer, mask_token_id=said)
        return with_special_tokens(described, tokenizer, chosen, "here").mask_token_id

    assert found(other, mask_id) == other
    assert found(-1, mask_id) == mask_id
    assert found(0, mask_id) == 0  # 0 is a token, not "nothing"
    tokenizer.mask_token = random_folder.MASK
    assert found(-1, None) == mask_id
    assert found(other, None) == other
    with pytest.raises(UserError, match="wrong tokenizer"):
        found(-1, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_where_nobody_says_the_mask_the_error_names_the_key(tokenizer, family):
    message = refusal(model(family, tokenizer), tokenizer, -1, "some/model")
    assert message.startswith("some/model: ")
    assert f"--{MASK_KEY}" in message


@pytest.mark.parametrize(("family", "rows", "mask_id"), [("illada", 155136, 5), ("dream", 152064, 151666)])
def test_what_the_authors_published_is_known_by_the_size_of_the_vocabulary(tokenizer, caplog, family, rows, mask_id):
    bare = model(family, tokenizer, embedding_size=rows, vocab_size=rows)
    with caplog.at_level(logging.WARNING):
        assert with_special_tokens(bare, tokenizer, -1, "here").mask_token_id == mask_id
    assert f"the mask token {mask_id}" in caplog.text  # an ordinary token of this tokenizer, or none
    tokenizer.mask_token = random_folder.MASK  # above the authors'
    assert with_special_tokens(bare, tokenizer, -1, "here").mask_token_id == mask_of(tokenizer)
    assert with_special_tokens(bare, tokenizer, 7, "here").mask_token_id == 7
    for other in (rows - 1, rows + 1):
        near = model(family, tokenizer, embedding_size=other, vocab_size=other)
        tokenizer.mask_token = None
        assert MASK_KEY in refusal(near, tokenizer, -1, "here")


def test_the_published_facts_stand_beside_the_published_sizes():
    facts = {name: dict(known.mask_ids) for name, known in architectures().items()}
    assert facts == {"llada": {}, "illada": {155136: 5}, "dream": {152064: 151666}, "a2d_qwen3": {}}
    for known in architectures().values():
        for size in known.sizes.values():
            assert known.mask_ids.get(size.vocab_size, size.mask_token_id) == size.mask_token_id


@pytest.mark.parametrize("chosen", [256, 10**6])
def test_a_mask_outside_of_the_embedding_is_refused_by_the_key(tokenizer, chosen):
    assert refusal(model("dream", tokenizer), tokenizer, chosen, "here").startswith(f"{MASK_KEY}: {chosen} is outside")


def test_an_ordinary_token_is_taken_from_the_user_with_a_warning_and_not_from_config_json(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        assert with_special_tokens(model("illada", tokenizer), tokenizer, 3, "here").mask_token_id == 3
    assert "no special token" in caplog.text
    message = refusal(model("illada", tokenizer, mask_token_id=3), tokenizer, -1, "here")
    assert "wrong tokenizer" in message
    assert f"--{MASK_KEY}" in message


# ---- the end of a text and of a turn ----


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokenizer_says_what_config_json_leaves_open(tokenizer, family):
    tokenizer.pad_token = tokenizer.bos_token
    bare = model(family, tokenizer, eos_token_id=None, pad_token_id=None)
    found = with_special_tokens(bare, tokenizer, mask_of(tokenizer), "here")
    assert (found.eos_token_id, found.pad_token_id) == (tokenizer.eos_token_id, tokenizer.bos_token_id)
    tokenizer.pad_token = None  # without one, as in the published LLaDA
    found = with_special_tokens(bare, tokenizer, mask_of(tokenizer), "here")
    assert found.pad_token_id == found.eos_token_id == tokenizer.eos_token_id
    tokenizer.eos_token = None
    assert "`eos_token_id`" in refusal(bare, tokenizer, 0, "here")
    said = dataclasses.replace(bare, eos_token_id=9)
    assert with_special_tokens(said, tokenizer, 0, "here").eos_token_id == 9


@pytest.mark.parametrize("name", ["eos_token_id", "pad_token_id"])
def test_a_tokenizer_that_contradicts_config_json_is_refused(tokenizer, name):
    wrong = model("a2d_qwen3", tokenizer, **{name: 3})
    assert f"wrong tokenizer: its {name} is" in refusal(wrong, tokenizer, 0, "here")


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(tokenizer):
    wrong = model("dream", tokenizer, embedding_size=len(tokenizer) - 1)
    assert "wrong tokenizer" in refusal(wrong, tokenizer, 0, "here")


@pytest.mark.parametrize("token", ["<|im_end|>", "<|eot_id|>"])
def test_either_template_s_end_of_turn_is_found(tokenizer, token):
    eot_id = tokenizer.get_vocab()["<|eot_id|>"]
    if token == "<|im_end|>":
        tokenizer = renamed(tokenizer, {"<|eot_id|>": "<|im_end|>"})
    assert end_of_turn(tokenizer) == find_eot_id(tokenizer, "x") == eot_id == tokenizer.convert_tokens_to_ids(token)


def test_without_an_end_of_turn_the_error_lists_both(tokenizer):
    tokenizer = renamed(tokenizer, {"<|eot_id|>": "<|other|>"})
    assert end_of_turn(tokenizer) is None
    with pytest.raises(UserError, match=r"<\|eot_id\|> or <\|im_end\|>"):
        find_eot_id(tokenizer, "x")


def renamed(tokenizer, tokens: dict[str, str]):
    """The tokenizer with other names of some tokens."""
    assets = files_of(tokenizer)
    for old, new in tokens.items():
        assets = {name: content.replace(old.encode(), new.encode()) for name, content in assets.items()}
    return build_tokenizer(assets, "renamed")


def files_of(tokenizer) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


# ---- what a checkpoint keeps ----


@pytest.fixture(scope="module")
def bare_folder(tmp_path_factory):
    """An iLLaDA whose config.json says no mask token."""
    folder = tmp_path_factory.mktemp("bare") / "model"
    write_untrained(folder, 0, "illada", d_model=16, n_layers=1, mlp_hidden_size=16)
    mapping = json.loads((folder / "config.json").read_text())
    del mapping["mask_token_id"]
    (folder / "config.json").write_text(json.dumps(mapping))
    return folder


def saved(bare_folder, out, mask_id):
    """A checkpoint of a run that was told this mask token."""
    loaded = load_model(bare_folder)
    told = with_special_tokens(loaded.config, loaded.tokenizer(), mask_id, "x")
    save_model(out, dataclasses.replace(loaded, config=told))
    return out


def opened(path):
    """The mask token that `generate` would use, without a flag."""
    parser = cli.Flags("test", "test")
    parser.add_config()
    config = parser.parse(runs.flags({}))[1]
    return respond.open_checkpoint(str(path), config, flag="--checkpoint").model.config.mask_token_id


@pytest.mark.parametrize("mask", ["special", "ordinary"])
def test_a_checkpoint_keeps_the_mask_that_it_was_trained_with(bare_folder, tmp_path, mask):
    """Also one that a config.json could not say: the user said it, and it is above all."""
    mask_id = mask_of(tiny_tokenizer()) if mask == "special" else 3
    ours = saved(bare_folder, tmp_path / "ours", mask_id)
    assert load_config(ours)[0].mask_token_id == mask_id
    assert opened(ours) == mask_id


def test_what_config_json_says_is_not_repeated(tiny_checkpoint, tmp_path):
    save_model(tmp_path / "ours", load_model(tiny_checkpoint))
    manifest = json.loads((tmp_path / "ours" / "assets" / "manifest.json").read_text())
    assert "mask_token_id" not in manifest


@pytest.mark.parametrize("value", [-1, 2**31, 1.5, "3", True, [3], {}])
def test_a_damaged_mask_in_a_manifest_is_refused(bare_folder, tmp_path, value):
    """With a checksum that fits, as whoever edits it by hand may write."""
    ours = saved(bare_folder, tmp_path / "ours", 3)
    file = ours / "assets" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["mask_token_id"] = value
    with_checksum = manifest | {"checksum": manifest_checksum(manifest)}
    for content, reason in ((manifest, "checksum"), (with_checksum, "damaged")):
        file.write_text(json.dumps(content))
        with pytest.raises(UserError, match=reason) as refused:
            load_config(ours)
        assert str(file) in str(refused.value)


def test_a_mask_in_a_manifest_that_is_outside_of_the_embedding_is_refused(bare_folder, tmp_path):
    ours = saved(bare_folder, tmp_path / "ours", 3)
    file = ours / "assets" / "manifest.json"
    manifest = json.loads(file.read_text()) | {"mask_token_id": 10**6}
    file.write_text(json.dumps(manifest | {"checksum": manifest_checksum(manifest)}))
    with pytest.raises(UserError, match="1000000 is outside"):
        opened(ours)


def test_an_export_says_the_mask_that_config_json_did_not(bare_folder, tmp_path):
    """It has no manifest, and whoever uses it must not have to know; nothing else of config.json changes."""
    ours = saved(bare_folder, tmp_path / "ours", mask_of(tiny_tokenizer()))
    to_hf.main([f"--source={ours}", f"--out={tmp_path / 'hf'}"])
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (bare_folder, tmp_path / "hf"))
    assert after == before | {"mask_token_id": mask_of(tiny_tokenizer())}
    assert opened(tmp_path / "hf") == after["mask_token_id"]
    assert read_published(tmp_path / "hf").keys() == read_published(bare_folder).keys()


# ---- random folders ----


def test_a_random_folder_has_the_tokens_of_its_tokenizer():
    """Qwen3's ends a text with <|im_end|> and fills with <|endoftext|>."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token, tokenizer.pad_token = "<|eot_id|>", "<|endoftext|>"
    for family in FAMILIES:
        config = random_folder.published_config(tokenizer, family, d_model=16, n_heads=2, n_kv_heads=1)
        found = read_config(config, "x")
        assert (found.eos_token_id, found.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
        with_special_tokens(found, tokenizer, -1, "x")


# ---- a tokenizer without tokenizer.json ----

TEXTS = (
    "Capitals abc",
    "user assistant",
    "  two  spaces\n\nand lines\n",
    "it's 1 + 2 = 3.",
    "<|mdm_mask|> a <|eot_id|>",
)


def two_files(template_file: bool = False) -> dict[str, bytes]:
    """vocab.json and merges.txt of the quickstart's tokenizer, with its added tokens in tokenizer_config.json."""
    tokenizer = tiny_tokenizer()
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    settings = {
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in whole["added_tokens"]
        },
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "mask_token": random_folder.MASK,
        "model_max_length": 131072,
        "pad_token": tokenizer.pad_token,
        "tokenizer_class": "DreamTokenizer",
        "unk_token": None,
    }
    assets = {
        "vocab.json": json.dumps(whole["model"]["vocab"], ensure_ascii=False).encode(),
        "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, whole["model"]["merges"])]).encode(),
    }
    if template_file:
        assets["chat_template.jinja"] = QWEN_TEMPLATE.encode()
    else:
        settings["chat_template"] = QWEN_TEMPLATE
    return assets | {"tokenizer_config.json": json.dumps(settings).encode()}


def one_file():
    """The quickstart's tokenizer with Qwen's rules of where a text is split, as its tokenizer.json states them."""
    tokenizer = tiny_tokenizer()
    pattern = (  # of Qwen2.5
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return build_tokenizer(files_of(tokenizer), "one file")


def test_two_files_give_the_tokens_of_one():
    one, two = one_file(), build_tokenizer(two_files(), "some/model")
    assert len(two) == len(one)
    assert two.get_vocab() == one.get_vocab()
    for text in TEXTS:
        assert two(text)["input_ids"] == one(text)["input_ids"], text
        assert two.decode(two(text)["input_ids"]) == text
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert [getattr(two, name) for name in names] == [getattr(one, name) for name in names]
    assert two.mask_token_id == mask_of(one)
    assert end_of_turn(two) == end_of_turn(one)


@pytest.mark.parametrize("template_file", [False, True], ids=["in the settings", "in a file"])
def test_the_chat_template_of_two_files(template_file):
    tokenizer = build_tokenizer(two_files(template_file), "some/model")
    tokens = chat.encode_prompt(tokenizer, [{"role": "user", "content": "Capitals <|mdm_mask|>"}])
    text = "<|im_start|>user\nCapitals <|mdm_mask|><|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokens) == text
    assert tokenizer.mask_token_id not in tokens  # in a text it is text


def damage(name: str, content: bytes):
    return lambda assets: assets | {name: content}


DAMAGE = {
    "no merges": lambda assets: {name: content for name, content in assets.items() if name != "merges.txt"},
    "no vocabulary": lambda assets: {name: content for name, content in assets.items() if name != "vocab.json"},
    "no JSON": damage("vocab.json", b"{"),
    "a list": damage("vocab.json", b"[1, 2]"),
    "ids that are text": damage("vocab.json", b'{"a": "b"}'),
    "negative ids": damage("vocab.json", b'{"a": -1}'),
    "huge ids": damage("vocab.json", b'{"a": 99999999999999999999}'),
    "no text": damage("merges.txt", b"\xff\xfe\x00"),
    "three words": damage("merges.txt", b"#version: 0.2\na b c"),
    "unknown words": damage("merges.txt", b"#version: 0.2\nzz qq"),
    "settings that are no JSON": damage("tokenizer_config.json", b"{"),
    "settings that are a list": damage("tokenizer_config.json", b"[]"),
    "added tokens that are none": damage("tokenizer_config.json", b'{"added_tokens_decoder": {"x": 3}}'),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files_are_refused_in_a_line(case):
    with pytest.raises(UserError, match=r"^some/model: ") as refused:
        build_tokenizer(DAMAGE[case](two_files()), "some/model")
    assert str(refused.value).count("\n") <= 1
    assert "tokenizer" in str(refused.value)


def test_a_folder_of_two_files_is_read_whole(tmp_path):
    for name, content in two_files(template_file=True).items():
        (tmp_path / name).write_bytes(content)
    assets = read_assets(tmp_path)
    assert assets == two_files(template_file=True)
    assert len(build_tokenizer(assets, "x")) == len(tiny_tokenizer())
