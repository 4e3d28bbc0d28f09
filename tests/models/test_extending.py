"""docs/extending.md: its example of a backbone works as it is printed."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from elbo_kto_jax import from_hf, verify
from elbo_kto_jax.checkpoints import random_folder
from elbo_kto_jax.checkpoints.load import load_model
from elbo_kto_jax.checkpoints.tiny import write_untrained
from elbo_kto_jax.models import registry
from elbo_kto_jax.models.network import MaskPredictor, abstract_params
from elbo_kto_jax.runtime.errors import UserError
from launch import random_llada
from tests.conftest import PROJECT_ROOT


@pytest.fixture
def heron(monkeypatch):
    """What the page's example defines; the architecture is known only within the test."""
    page = (PROJECT_ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    (example,) = (code for code in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "Heron" in code)
    found: dict = {}
    exec(example, found)
    known = {**registry.architectures(), "heron": found["ARCHITECTURE"]}
    monkeypatch.setattr(registry, "architectures", lambda: known)
    return found["ARCHITECTURE"]


def test_a_folder_of_the_example_loads_and_every_row_is_a_parameter(heron, tmp_path):
    write_untrained(tmp_path / "heron", 0, "heron", n_kv_heads=1)
    model = load_model(tmp_path / "heron")
    assert (model.config.architecture, model.config.n_kv_heads, model.config.tied_head) == ("heron", 1, False)
    network = MaskPredictor(model.config)
    assert abstract_params(network)["blocks"]["q_norm"]["scale"].shape == (2, 32)
    logits = network.apply({"params": model.params}, jnp.arange(6)[None], method="logits")
    assert np.isfinite(logits).all()
    (size,) = heron.sizes.values()
    assert heron.read(heron.published(size), "here") == size
    with pytest.raises(UserError, match=r"`attn_logit_softcapping`: 30.0 is not implemented"):
        heron.read(heron.published(size) | {"attn_logit_softcapping": 30.0}, "here")


def test_the_commands_of_the_page(heron, tiny_checkpoint, tmp_path, monkeypatch):
    small = {"d_model": 32, "head_dim": 8, "mlp_hidden_size": 48, "embedding_size": 128}
    monkeypatch.setattr(random_folder, "_SMALL", random_folder._SMALL | small)
    published, converted = tmp_path / "heron", tmp_path / "heron-converted"
    flags = ["--architecture=heron", "--layers=2", f"--tokenizer={tiny_checkpoint}", f"--out={published}"]
    tensors = random_llada.main(flags)["tensors"]
    assert tensors == 2 * 11 + 3
    from_hf.main([f"--source={published}", f"--out={converted}"])
    assert verify.main([f"--source={published}", f"--checkpoint={converted}"])["tensors"] == tensors
