"""What became of the records of a data set: how many are used, and how many are not, or not whole."""

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Counts:
    """Numbers for the summary, the report and a warning; none of them changes what is trained.

    Attributes:
      records: read and well formed; a pair is two of them.
      skipped: bad ones, which --skip-bad-records left out.
      dropped: records without a token to score (no completion, or a prompt that fills max_length) and, where the
        objective needs pairs, those that are half of no whole pair.
      left_out: what the fractions of the two labels do not keep.
      cut: examples that are used, but longer than max_length, so that their end is missing.
      examples: that are used.
    """

    records: int = 0
    skipped: int = 0
    dropped: int = 0
    left_out: int = 0
    cut: int = 0
    examples: int = 0

    @classmethod
    def sum(cls, counts: Iterable["Counts"]) -> "Counts":
        """Of several data sets together."""
        return cls(*map(sum, zip(*map(dataclasses.astuple, counts), strict=True)))

    def warning(self, max_length: int) -> str:
        """What is lost without having been asked for, in one line; "" where nothing is."""
        lost = []
        if self.skipped:
            lost.append(f"skipped {self.skipped} bad records")
        if self.dropped:
            lost.append(f"dropped {self.dropped} of {self.records} records")
        if self.cut:
            lost.append(f"cut {self.cut} of {self.examples} examples at config.data.max_length {max_length}")
        if not lost:
            return ""
        return f"WARNING: {', '.join(lost)}; what is missing counts nowhere: mend the records or raise max_length"
