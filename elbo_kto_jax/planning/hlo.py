"""What a compiled program does, read from its HLO text: FLOPs and collectives, every loop body times its trips.

XLA's own cost analysis counts the body of a loop once and a Pallas kernel not at all. Here a loop is counted as often
as the constant in its condition says. Loops that end by data (the output head's chunks) have no such constant; the
caller says how often those run, and what a kernel's call costs.

Async collectives are recognised in their four forms: `x-start` and `x-done`; `async-start` of a computation;
`call-start` of one, on a TPU's SparseCores; and TPU's fusions, of which one begins the collective
(AsyncCollectiveStart) and the others, which name it again, carry it on beside a matrix product. Everything else waits,
and is exposed.

An async collective is hidden only as far as the products between its start and its end take that long: the text is in
the order of the schedule, and the links serve what is under way in turn. The rest of it is exposed, too. Sends along
one axis of a mesh leave the links of the other axis free.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BOTH = frozenset({"major", "minor"})  # axes of a torus
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "c64": 8, "c128": 16}  # others: by the digits
_COMPUTATION = re.compile(r"(?:ENTRY )?%([^\s(]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%(\S+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")
_LAYOUT = re.compile(r"\{[^{}]*\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """What one instruction sends; `bytes` of one chip and one execution, by the usual ring algorithms."""

    kind: str
    bytes: float
    group: int  # chips that take part together
    overlapped: bool  # runs beside other work
    times: float
    axes: frozenset[str] = BOTH  # of the torus, whose links it uses


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one chip, one run of the program."""

    flops: float  # two for each multiplication of a matrix product
    collectives: tuple[Collective, ...]

    def sent(self, kinds: Iterable[str] = KINDS, overlapped: bool | None = None) -> float:
        """Bytes sent by one chip in collectives of these kinds."""
        return sum(
            c.bytes * c.times
            for c in self.collectives
            if c.kind in kinds and (overlapped is None or c.overlapped == overlapped)
        )


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str


def program_cost(
    text: str,
    *,
    kernels: Mapping[str, float],
    dynamic_trips: float,
    chips: int,
    flops_per_byte: Callable[[int], float],
) -> Cost:
    """The cost of the entry computation of an optimized HLO module.

    Args:
      text: `compiled.as_text()`.
      kernels: FLOPs of one call of a Pallas kernel, by the beginning of its name.
      dynamic_trips: of loops whose condition has no constant.
      chips: that run the program, for collectives over all of them.
      flops_per_byte: the work that a chip does at its peak while it sends a byte in a collective of so many chips.

    Raises:
      ValueError: the text has no entry computation, or calls a kernel that is not in `kernels`.
    """
    computations, entry = _parse(text)
    if entry is None:
        raise ValueError("text: expected an HLO module with an ENTRY computation")
    flops, collectives = _Walk(computations, kernels, dynamic_trips, chips, flops_per_byte).cost(entry)
    return Cost(flops, tuple(collectives))


def _called_as(role: str, attributes: str) -> str:
    """The computation that an instruction calls as its `role`."""
    found = re.search(rf"{role}=%([^\s,)}}]+)", attributes)
    if found is None:
        raise ValueError(f"{role}: expected a computation in {attributes}")
    return found[1]


def trip_count(condition: Iterable[_Instruction]) -> int | None:
    """How often a loop runs whose counter starts at 0 and is compared with a constant; None where it is not."""
    constants = {}
    for instruction in condition:
        if instruction.opcode == "constant" and instruction.operands and instruction.operands[0].isdigit():
            constants[instruction.name] = int(instruction.operands[0])
        if instruction.opcode == "compare":
            limits = [constants[name] for name in instruction.operands if name in constants]
            if limits:
                return limits[0] + ("direction=LE" in instruction.attributes)
    return None


def array_bytes(shape: str) -> float:
    """Bytes of all arrays in a shape, tuples included."""
    return sum(_elements(dims) * _item_bytes(dtype) for dtype, dims in _ARRAY.findall(_LAYOUT.sub("", shape)))


class _UnderWay:
    """The async collectives of one computation: the links serve them one after another beside the chip's work."""

    def __init__(self, flops_per_byte: Callable[[int], float]):
        self._flops_per_byte = flops_per_byte
        self._waiting: dict[str, list[tuple[Collective, float]]] = {}  # by the start's name; FLOPs still needed

    def begin(self, name: str, collectives: Iterable[Collective]) -> None:
        self._waiting[name] = [(c, self._work(c)) for c in collectives]

    def compute(self, flops: float) -> None:
        """Work of the chip, during which the links go on."""
        left = dict.fromkeys(BOTH, flops)
        for name, waiting in self._waiting.items():
            for i, (collective, needed) in enumerate(waiting):
                served = min(needed, *(left[axis] for axis in collective.axes))
                self._waiting[name][i] = collective, needed - served
                left |= {axis: left[axis] - served for axis in collective.axes}

    def end(self, name: str, by_name: Mapping[str, _Instruction]) -> list[Collective]:
        """The collective that the instruction `name` ends, in what was hidden and what was not."""
        start = self._start_of(name, by_name)
        return self._split(self._waiting.pop(start)) if start else []

    def rest(self) -> list[Collective]:
        """What nothing in this computation ended."""
        return [part for waiting in self._waiting.values() for part in self._split(waiting)]

    def _work(self, c: Collective) -> float:
        return c.bytes * c.times * self._flops_per_byte(c.group)

    def _split(self, waiting: Iterable[tuple[Collective, float]]) -> list[Collective]:
        parts = []
        for c, needed in waiting:
            exposed = c.bytes * needed / self._work(c) if needed else 0.0
            parts += [dataclasses.replace(c, bytes=c.bytes - exposed, overlapped=True)] if exposed < c.bytes else []
            parts += [dataclasses.replace(c, bytes=exposed, overlapped=False)] if exposed else []
        return parts

    def _start_of(self, name: str, by_name: Mapping[str, _Instruction]) -> str | None:
        """The start whose result comes to an instruction, through the fusions that carry the collective on."""
        for operand in by_name[name].operands:
            if operand in self._waiting:
                return operand
            through = by_name.get(operand)
            carries = through is not None and (
                through.opcode in ("get-tuple-element", "async-update")
                or "%async_collective_fusion" in through.attributes
            )
            if carries and (found := self._start_of(operand, by_name)):
                return found
        return None


class _Walk:
    def __init__(self, computations, kernels, dynamic_trips, chips, flops_per_byte):
        self.computations, self.kernels, self.chips = computations, kernels, chips
        self.dynamic_trips, self.flops_per_byte = dynamic_trips, flops_per_byte
        self.done: dict[str, tuple[float, list[Collective]]] = {}

    def cost(self, name: str) -> tuple[float, list[Collective]]:
        if name not in self.done:
            self.done[name] = self._cost(name)
        return self.done[name]

    def _cost(self, name: str) -> tuple[float, list[Collective]]:
        by_name = {instruction.name: instruction for instruction in self.computations.get(name, ())}
        total, found, under_way = 0.0, [], _UnderWay(self.flops_per_byte)
        repeats = self._role(name) in ("goes on", "ends")
        for instruction in by_name.values():
            flops, collectives = self._of(instruction, by_name, name)
            role = self._role_of(instruction)
            if role == "starts":
                under_way.begin(instruction.name, collectives)
            elif role == "ends":
                found += under_way.end(instruction.name, by_name)
            elif not repeats:
                found += collectives
            under_way.compute(flops)
            total += flops
        return total, found + under_way.rest()

    def _role_of(self, instruction: _Instruction) -> str:
        """What an instruction has to do with an async collective: "starts", "goes on", "ends" or ""."""
        opcode = instruction.opcode
        for ending, role in (("-start", "starts"), ("-done", "ends")):
            if opcode.endswith(ending) and opcode.removesuffix(ending) in (*KINDS, "async", "call"):
                return role
        return self._role(_called_as("calls", instruction.attributes)) if opcode == "fusion" else ""

    def _role(self, name: str) -> str:
        """The same of a computation."""
        targets = " ".join(instruction.attributes for instruction in self.computations.get(name, ()))
        for target, role in (("Start", "starts"), ("Done", "ends")):
            if f'custom_call_target="AsyncCollective{target}"' in targets:
                return role
        return "goes on" if name.startswith("async_collective_fusion") else ""

    def _of(
        self, instruction: _Instruction, by_name: Mapping[str, _Instruction], computation: str
    ) -> tuple[float, list[Collective]]:
        """One instruction's cost."""
        opcode, attributes = instruction.opcode, instruction.attributes
        if opcode in ("convolution", "dot"):
            return _product_flops(instruction, by_name), []
        if opcode.removesuffix("-start") in KINDS:
            return 0.0, [self._collective(opcode.removesuffix("-start"), instruction, by_name, computation)]
        if opcode == "while":
            condition, loop = (_called_as(role, attributes) for role in ("condition", "body"))
            trips = trip_count(self.computations.get(condition, ()))
            return self._sum([loop], self.dynamic_trips if trips is None else trips)
        if opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", attributes)
            names = re.findall(r"%([^\s,]+)", branches[1]) if branches else []
            names += re.findall(r"(?:true|false)_computation=%([^\s,)}]+)", attributes)
            return self._sum(sorted(names, key=lambda branch: self.cost(branch)[0])[-1:])
        if opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in attributes:
            return self._kernel_flops(instruction), []
        if opcode in ("fusion", "call", "async-start", "call-start"):
            return self._sum(re.findall(r"(?:calls|to_apply)=%([^\s,)}]+)", attributes))
        return 0.0, []

    def _sum(self, names: Iterable[str], times: float = 1.0) -> tuple[float, list[Collective]]:
        """The cost of some computations, each run so often."""
        costs = [self.cost(name) for name in names]
        found = [dataclasses.replace(c, times=c.times * times) for _, inner in costs for c in inner]
        return times * sum(flops for flops, _ in costs), found

    def _kernel_flops(self, instruction: _Instruction) -> float:
        """By the name of the instruction; in a loop over rows it has another, and op_name has that of the kernel."""
        op_name = re.search(r'op_name="([^"]*)"', instruction.attributes)
        for prefix, flops in self.kernels.items():
            if instruction.name.startswith(prefix) or (op_name and f"/{prefix}" in op_name[1]):
                return flops
        raise ValueError(f"kernels: expected an entry for {instruction.name}, got {list(self.kernels)}")

    def _collective(self, kind, instruction, by_name, computation) -> Collective:
        group = group_size(instruction.attributes, self.chips)
        size = sum(array_bytes(by_name[operand].shape) for operand in instruction.operands if operand in by_name)
        if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # TPU's fusion that keeps a part of the sum as it is made
        share = (group - 1) / group
        sent = {
            "all-gather": size * (group - 1),
            "all-reduce": 2 * size * share,
            "reduce-scatter": size * share,
            "all-to-all": size * share,
            "collective-permute": size,
        }[kind]
        return Collective(kind, sent, group, False, 1.0, axes_of(instruction.attributes, group, self.chips))


def group_size(attributes: str, chips: int) -> int:
    """How many chips take part in a collective together, in any of the notations of replica groups."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", named[2]))
    if pairs := _pairs(attributes):
        return _ring({int(source): int(target) for source, target in re.findall(r"(\d+),(\d+)", pairs)})
    if listed := re.search(r"replica_groups=\{\{([^}]*)\}", attributes):
        return len(listed[1].split(","))
    if regular := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(regular[1])
    return chips


def axes_of(attributes: str, group: int, chips: int) -> frozenset[str]:
    """Whose links a collective uses: of one axis those that go around rings of neighbours, or across such rings."""
    pairs = [(int(source), int(target)) for source, target in re.findall(r"\{(\d+),(\d+)\}", _pairs(attributes))]
    if not pairs or group == chips:
        return BOTH
    within = all(source // group == target // group for source, target in pairs)
    return frozenset({"minor" if within else "major"})


def _pairs(attributes: str) -> str:
    """The pairs of a permutation: {{0,1},{1,0}}."""
    found = re.search(r"source_target_pairs=(\{(?:\{\d+,\d+\},?)*\})", attributes)
    return found[1] if found else ""


def _ring(targets: dict[int, int]) -> int:
    """How many chips a permutation leads through before it comes back, or ends."""
    first = at = next(iter(targets))
    size = 1
    while (at := targets.get(at, first)) != first:
        size += 1
    return size


def _product_flops(instruction: _Instruction, by_name: Mapping[str, _Instruction]) -> float:
    """2 M N K of a matrix product, which is 2 sqrt(MK KN MN): no notation of the dimensions matters."""
    sizes = [by_name[name].shape for name in instruction.operands[:2] if name in by_name] + [instruction.shape]
    elements = [math.prod(_elements(dims) for _, dims in _ARRAY.findall(_LAYOUT.sub("", size))) for size in sizes]
    return 2.0 * math.sqrt(math.prod(elements))


def _elements(dims: str) -> int:
    return math.prod(int(size) for size in dims.split(",") if size)


def _item_bytes(dtype: str) -> float:
    if dtype in _BYTES:
        return _BYTES[dtype]
    bits = re.match(r"[a-z]+(\d+)", dtype)
    return int(bits[1]) / 8 if bits else 0  # tokens and tuples take none


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str | None]:
    computations: dict[str, list[_Instruction]] = {}
    entry = current = None
    for line in text.splitlines():
        if (header := _COMPUTATION.match(line)) and not line.startswith(" "):
            current = header[1]
            computations[current] = []
            entry = current if line.startswith("ENTRY") else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            computations[current].append(_instruction(*found.groups()))
        elif current is not None and computations[current] and line != "}":
            # The metadata of a kernel have line breaks, and its name may stand after them.
            last = computations[current][-1]
            computations[current][-1] = last._replace(attributes=f"{last.attributes}\n{line}")
    return computations, entry


def _instruction(name: str, rest: str) -> _Instruction:
    """`SHAPE opcode(operands), attributes`, where a tuple's shape has brackets of its own."""
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    close = _closing(rest, opening)
    operands = re.sub(r"/\*.*?\*/", "", rest[opening + 1 : close])
    names = re.findall(r"%([^\s,()]+)", operands) or ([operands.strip()] if operands.strip() else [])
    return _Instruction(name, shape, rest[:opening], tuple(names), rest[close + 1 :])


def _closing(text: str, opening: int) -> int:
    depth = 0
    for at in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at
    return len(text) - 1
