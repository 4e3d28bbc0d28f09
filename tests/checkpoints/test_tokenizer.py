"""The tokenizer of a checkpoint comes back, or is refused with the checkpoint's name."""

import pytest

from elbo_kto_jax.checkpoints.load import load_model
from elbo_kto_jax.checkpoints.save import save_model
from elbo_kto_jax.checkpoints.tokenizer import build_tokenizer
from elbo_kto_jax.runtime.errors import UserError


def test_the_tokenizer_survives(golden_dir, tmp_path):
    model = load_model(golden_dir / "policy")
    save_model(tmp_path / "saved", model)
    tokenizer = load_model(tmp_path / "saved").tokenizer()
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Grüß dich"}], tokenize=False)
    ids = tokenizer(text)["input_ids"]
    assert text.count("<|start_header_id|>") == 2
    assert tokenizer.decode(ids) == text
    assert ids.count(tokenizer.convert_tokens_to_ids("<|start_header_id|>")) == 2


def test_a_missing_or_damaged_tokenizer_is_refused_with_its_checkpoint(model):
    with pytest.raises(UserError, match="published"):
        model.tokenizer()
    with pytest.raises(UserError, match="here: no tokenizer"):
        build_tokenizer({}, "here")


@pytest.mark.parametrize("content", [None, b"{", b'{"model": {}}'], ids=["absent", "not-json", "not-a-tokenizer"])
def test_unreadable_tokenizer(content):
    assets = {} if content is None else {"tokenizer.json": content}
    with pytest.raises(UserError, match=r"^some/model: .*tokenizer"):
        build_tokenizer(assets, "some/model")
