"""The name table covers the published names and our leaves, one to one, with the right shapes."""

import math

from elbo_kto_jax.checkpoints import names
from elbo_kto_jax.models import registry
from elbo_kto_jax.models.registry import read_config
from tests.published import CONFIG, read_published


def test_fewer_key_value_heads_than_query_heads_narrow_only_keys_and_values():
    config = read_config(CONFIG, "test")
    leaves = registry.parameters(config)
    assert config.n_kv_heads < config.n_heads
    assert leaves["blocks", "q_proj", "kernel"].shape == (2, 16, 16)
    assert leaves["blocks", "k_proj", "kernel"].shape == leaves["blocks", "v_proj", "kernel"].shape == (2, 16, 8)
    assert leaves["blocks", "attn_out", "kernel"].shape == (2, 16, 16)


def test_every_leaf_is_filled_by_the_published_tensors_exactly_once():
    config = read_config(CONFIG, "test")
    leaves, tensors = registry.parameters(config), names.published_tensors(config)
    slots = [(tensor.path, tensor.layer) for tensor in tensors.values()]
    assert len(set(slots)) == len(slots) == 9 * config.n_layers + 3
    for path, leaf in leaves.items():
        mine = [tensor for tensor in tensors.values() if tensor.path == path]
        assert sum(math.prod(tensor.shape) for tensor in mine) == math.prod(leaf.shape)
        assert [tensor.layer for tensor in mine] == (list(range(config.n_layers)) if leaf.stacked else [None])


def test_names_and_shapes_are_those_of_a_published_checkpoint(golden):
    published = {name: tensor.shape for name, tensor in read_published(golden.folder / "policy").items()}
    found = {name: tensor.shape for name, tensor in names.published_tensors(golden.config).items()}
    assert found == {
        name: shape for name, shape in published.items() if name not in names.published_duplicates(golden.config)
    }


def test_unflatten_and_get_are_inverse():
    tree = names.unflatten({("a", "b"): 1, ("a", "c", "d"): 2, ("e",): 3})
    assert tree == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert names.get(tree, ("a", "c", "d")) == 2
