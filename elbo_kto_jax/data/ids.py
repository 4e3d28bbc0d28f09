"""Many ids in one array of bytes: a sequence of strings without an object for each."""

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
from jaxtyping import Int64, UInt8


class Ids(Sequence[str]):
    """Ids that stand one after the other, each followed by a line break.

    Attributes:
      text: the bytes of all of them; without the last line break what "\\n".join(ids).encode() gives.
    """

    def __init__(self, text: UInt8[np.ndarray, " total"], ends: Int64[np.ndarray, " num"]):
        """`ends`: where each stops, its line break included."""
        self.text, self._ends = text, ends

    @classmethod
    def of(cls, ids: Sequence[str]) -> "Ids":
        """Ids from strings."""
        parts = [f"{name}\n".encode() for name in ids]
        return cls(np.frombuffer(b"".join(parts), np.uint8), np.cumsum(list(map(len, parts)), dtype=np.int64))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[int(index)]
        start = int(self._ends[index - 1]) if index else 0
        return self.text[start : int(self._ends[index]) - 1].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __repr__(self) -> str:
        return f"Ids({list(self[:3])}{', ...' if len(self) > 3 else ''})"
