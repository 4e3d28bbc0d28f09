"""planning/chips.py: names of slices and the bandwidth of collectives."""

import pytest

from elbo_kto_jax.planning.chips import CHIPS, larger, parse_topology
from elbo_kto_jax.runtime.errors import UserError


@pytest.mark.parametrize(
    "name", [f"{generation}:{shape}" for generation in CHIPS for shape in CHIPS[generation].shapes]
)
def test_every_known_name_is_read(name):
    topology = parse_topology(name)
    assert topology.name == name
    chips = 1
    for side in name.partition(":")[2].split("x"):
        chips *= int(side)
    assert topology.devices == chips * CHIPS[name.partition(":")[0]].devices


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("v5e-16", "v5e:4x4"),
        ("v5litepod-16", "v5e:4x4"),
        ("v5p-8", "v5p:2x2x1"),
        ("v6e-8", "v6e:2x4"),
        ("v5e:8x9", "v5e:8x8"),
        ("v5e", "known slices of v5e: 1x1"),
        ("h100:8", "known generations: v4"),
        ("", "known generations: v4"),
    ],
)
def test_other_names_are_refused_with_what_was_meant(name, meant):
    with pytest.raises(UserError) as refused:
        parse_topology(name)
    assert f"--topology={name}:" in str(refused.value)
    assert meant in str(refused.value)


@pytest.mark.parametrize(
    ("name", "group", "links"),
    [
        ("v5e:8x8", 8, 1),  # along one open line
        ("v5e:8x8", 64, 2),
        ("v5e:2x4", 4, 1),
        ("v5e:16x16", 16, 2),  # a ring sends both ways
        ("v5e:16x16", 256, 4),
        ("v5p:4x4x4", 64, 6),
        ("v5p:2x2x1", 4, 2),
        ("tpu7x:2x2x1", 2, 1),
        ("tpu7x:2x2x1", 8, 2),
    ],
)
def test_bandwidth(name, group, links):
    topology = parse_topology(name)
    assert topology.bandwidth(group) == links * topology.chip.link


def test_larger_slices():
    assert [other.name for other in larger(parse_topology("v5e:8x8"))] == ["v5e:8x16", "v5e:16x16"]
