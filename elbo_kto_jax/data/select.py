"""Which records of a prepared data set become examples, and what is said of the others (docs/method.md 2, 5)."""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64

from elbo_kto_jax.data.columns import SPECIAL, Columns
from elbo_kto_jax.data.counts import Counts
from elbo_kto_jax.data.pairs import whole_pairs
from elbo_kto_jax.data.prepared import Prepared
from elbo_kto_jax.runtime.errors import UserError

_RARE = 0.05  # share of a label below which a warning says so: most batches of 8 have none then


class Rule(NamedTuple):
    """What is kept of a data set; see `load_examples`."""

    max_length: int
    exact_window: bool
    desirable_fraction: float
    undesirable_fraction: float
    seed: int
    needs_pairs: bool


@dataclasses.dataclass(frozen=True)
class Selection:
    """The examples of a data set.

    Attributes:
      found: the data set.
      indices: which of its records they are, in their order.
      lines: what became of the records, for the log.
      counts: the same in numbers.
    """

    found: Prepared
    indices: Int64[np.ndarray, " num"]
    lines: list[str]
    counts: Counts

    def skipped(self) -> list[str]:
        """The bad records that were left out, for the log."""
        lines = self.found.skipped
        return [f"{len(lines)} bad records skipped:", *lines] if lines else []


def select(found: Prepared, rule: Rule, flag: str, path: object) -> Selection:
    """The examples of the data set at `path`, which `flag` named.

    Raises:
      UserError: `whole_pairs`, or none is left.
    """
    columns = found.columns
    records = np.flatnonzero(columns["kept"])
    whole, notes = whole_pairs(columns, records, found.files, flag, path) if rule.needs_pairs else (records, [])
    scorable = whole[columns["length"][whole] > 0]
    is_desirable = columns["label"][scorable] != 0
    kept = _kept(is_desirable, rule)
    if not kept.any():
        raise UserError(
            f"{flag}: no example is left of the {len(records)} records in {path}: {len(kept)} have a completion token "
            f"within --config.data.max_length {rule.max_length}, and the fractions of the two labels keep 0 of these"
        )
    indices = scorable[kept]
    lines = [
        *_dropped(columns, records, rule.max_length),
        f"{np.sum(kept & is_desirable)} of {np.sum(is_desirable)} desirable and "
        f"{np.sum(kept & ~is_desirable)} of {np.sum(~is_desirable)} undesirable examples kept",
        *notes,
        *_special(columns, records, rule.exact_window),
    ]
    counts = Counts(
        records=len(records),
        skipped=len(found.skipped),
        dropped=len(records) - len(scorable),
        left_out=len(scorable) - len(indices),
        cut=int(np.sum(columns["text_length"][indices] > rule.max_length)),
        examples=len(indices),
    )
    return Selection(found, indices, lines, counts)


def _dropped(columns: Columns, records: Int64[np.ndarray, " n"], max_length: int) -> list[str]:
    """How many records are read, dropped and cut."""
    has_tokens = columns["length"][records] > 0
    fills = columns["prompt_length"][records] >= max_length
    dropped = {
        f"whose prompt fills max_length {max_length}": int(np.sum(~has_tokens & fills)),
        "without a completion": int(np.sum(~has_tokens & ~fills)),
    }
    return [
        f"{len(records)} records read",
        *(f"{count} dropped {reason}" for reason, count in dropped.items() if count),
        f"{np.sum(has_tokens & (columns['text_length'][records] > max_length))} completions cut at "
        f"max_length {max_length}",
    ]


def _special(columns: Columns, records: Int64[np.ndarray, " n"], exact_window: bool) -> list[str]:
    """A note where records write special tokens out."""
    num_special = int(np.sum((columns["flags"][records] & SPECIAL) > 0))
    if num_special:
        reading = "text" if exact_window else "those tokens, as by the authors (config.data.packing=True: as text)"
        return [f"{num_special} records write special tokens out in their texts, which are read as {reading}"]
    return []


def _kept(is_desirable: Bool[np.ndarray, " n"], rule: Rule) -> Bool[np.ndarray, " n"]:
    """Which examples the fractions of the desirable and of the undesirable ones keep."""
    kept = np.zeros(len(is_desirable), np.bool_)
    for label, fraction in ((True, rule.desirable_fraction), (False, rule.undesirable_fraction)):
        positions = np.flatnonzero(is_desirable == label)
        if fraction == 1.0:
            kept[positions] = True
        else:
            kept[positions[_subset(len(positions), fraction, rule.seed, label and not rule.needs_pairs)]] = True
    return kept


def _subset(count: int, fraction: float, seed: int, label: bool) -> Int64[np.ndarray, "kept"]:
    """Which round(fraction * count) of `count` rows to keep.

    Ranked by raw Philox words: numpy promises those streams never to change, unlike `Generator.permutation`.
    """
    words = np.random.Philox(np.random.SeedSequence([seed, label])).random_raw(count)
    return np.argsort(words, kind="stable")[: round(fraction * count)]


def label_warnings(
    is_desirable: Bool[np.ndarray, " num"], text: np.ndarray, often: Float64[np.ndarray, " num"]
) -> list[str]:
    """What is odd about the labels of examples, in lines for the log.

    Args:
      text: a hash of what each example says.
      often: how many times an epoch has each example.
    """
    found = []
    share = {
        "desirable": float(np.sum(often[is_desirable]) / np.sum(often)),
        "undesirable": float(np.sum(often[~is_desirable]) / np.sum(often)),
    }
    rare, other = sorted(share, key=lambda name: share[name])
    count = round(share[rare] * len(is_desirable))
    if is_desirable.all() or not is_desirable.any():
        found.append("WARNING: all examples have the same label, so there are no good and bad answers to tell apart")
    elif share[rare] < _RARE:
        found.append(
            f"WARNING: only {count} of {len(is_desirable)} examples {'is' if count == 1 else 'are'} {rare}; in every "
            f"batch without one, that label's reward and the margin are NaN, and little is learned from it: "
            f"collect more, or lower config.data.{other}_fraction"
        )
    both = len(np.intersect1d(text[is_desirable], text[~is_desirable]))
    if both:
        found.append(f"WARNING: {both} texts are labelled both desirable and undesirable; all of them count")
    return found
