"""TPU generations, the names of their slices, and how fast a collective can be on one.

Peak FLOP/s (bfloat16), HBM bandwidth and the bandwidth of the links between chips are those of Google's documentation
(docs.cloud.google.com/tpu/docs/v5e, v6e, v5p, v4, tpu7x; one direction of a link is the published bidirectional
bandwidth of a chip over twice its ports, for v4 the bisection bandwidth of a pod over its links). Usable HBM is what
the compiler of libtpu 0.0.52 says it has when it refuses a program. Google does not publish the bandwidth between chip
and host: 16 GB/s is that of PCIe 3 with 16 lanes, and v6e has twice as much. Where a chip is two devices (v4 and tpu7x
as libtpu describes them), all figures are those of a device.
"""

import dataclasses
import difflib
import math

from elbo_kto_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device of a generation."""

    flops: float  # bfloat16, per second
    usable_bytes: float  # of HBM
    hbm: float  # bytes per second
    link: float  # bytes per second, one link in one direction
    host: float  # bytes per second between a device and its host, in one direction
    shapes: tuple[str, ...]  # of the slices that are planned for
    devices: int = 1  # per chip


_PLANE = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_GIB = 2**30
CHIPS = {
    "v4": Chip(275e12 / 2, 15.25 * _GIB, 1200e9 / 2, 50e9 / 2, 16e9 / 2, _CUBE, devices=2),
    "v5e": Chip(197e12, 15.75 * _GIB, 819e9, 50e9, 16e9, _PLANE),
    "v5p": Chip(459e12, 95.73 * _GIB, 2765e9, 100e9, 16e9, _CUBE),
    "v6e": Chip(918e12, 31.24 * _GIB, 1638e9, 100e9, 32e9, _PLANE),
    "tpu7x": Chip(2307e12 / 2, 94.74 * _GIB, 7380e9 / 2, 100e9 / 2, 16e9 / 2, _CUBE, devices=2),
}
# What jax calls a device -> its peak, bfloat16. A v4 chip is one device where it runs. GPUs: NVIDIA's data sheets,
# without sparsity.
_PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5e": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v5p": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "TPU v6e": CHIPS["v6e"].flops,
    "TPU7x": CHIPS["tpu7x"].flops,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v6": "v6e", "v5": "v5p", "v7x": "tpu7x", "ironwood": "tpu7x"}
_COUNTED_IN_CORES = ("v4", "v5p", "tpu7x")  # v5p-8 has four chips


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: so many chips along each axis of its torus."""

    name: str
    chip: Chip
    sides: tuple[int, ...]

    @property
    def devices(self) -> int:
        return math.prod(self.sides) * self.chip.devices

    def bandwidth(self, group: int) -> float:
        """Bytes per second that a device of a group of so many can send in a collective, at best.

        A group lies along as few axes of the torus as hold it, the longest first. A closed ring sends both ways; an
        open line is as fast as the one link of its ends.
        """
        total, held = 0.0, self.chip.devices
        for side in sorted(self.sides, reverse=True):
            if held >= group or side == 1:
                break
            held *= side
            total += self.chip.link * (2 if self._is_ring(side) else 1)
        return total or self.chip.link  # two devices of one chip

    def _is_ring(self, side: int) -> bool:
        if len(self.sides) == 2:
            return side == 16  # only the whole pod closes
        return all(side % 4 == 0 for side in self.sides)


def peak_flops(kind: str) -> float | None:
    """The bfloat16 FLOP/s of a device that jax calls `kind`; None: not known."""
    return _PEAKS.get(kind)


def parse_topology(name: str) -> Topology:
    """The slice of a name such as v5e:4x4 or v5p:2x2x1.

    Raises:
      UserError: the name is none, with the one that may have been meant.
    """
    generation, _, shape = name.partition(":")
    if generation in CHIPS and shape in CHIPS[generation].shapes:
        return Topology(name, CHIPS[generation], tuple(map(int, shape.split("x"))))
    raise UserError(f"--topology={name}: {_meant(name)}")


def larger(topology: Topology) -> list[Topology]:
    """The slices of the same generation with more devices, the smallest first."""
    generation = topology.name.partition(":")[0]
    every = [parse_topology(f"{generation}:{shape}") for shape in topology.chip.shapes]
    return [other for other in every if other.devices > topology.devices]


def _meant(name: str) -> str:
    for generation, rest in _readings(name.lower().strip()):
        generation = _ALIASES.get(generation, generation)
        if generation not in CHIPS:
            continue
        shapes = CHIPS[generation].shapes
        if rest.isdigit():
            chips = int(rest) // (2 if generation in _COUNTED_IN_CORES else 1)
            fitting = [shape for shape in shapes if math.prod(map(int, shape.split("x"))) == chips]
            if fitting:
                return f"did you mean {generation}:{fitting[0]}?"
        close = difflib.get_close_matches(rest, shapes, n=1)
        known = f"known slices of {generation}: {', '.join(shapes)}"
        return f"did you mean {generation}:{close[0]}? {known}" if close and rest else known
    return f"expected GENERATION:SHAPE such as v5e:4x4; known generations: {', '.join(CHIPS)}"


def _readings(name: str):
    """(generation, rest) as a name may be cut."""
    for mark in ":-_ ":
        if mark in name:
            yield tuple(part.strip() for part in name.split(mark, 1))
    yield name, ""
