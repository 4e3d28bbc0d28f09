"""Pairs of records: which two belong together, and which pairs can be trained on (docs/method.md 9)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from elbo_kto_jax.data.columns import Columns
from elbo_kto_jax.runtime.errors import UserError


def whole_pairs(
    columns: Columns, records: Int64[np.ndarray, " n"], files: Sequence[Path], flag: str, path: object
) -> tuple[Int64[np.ndarray, " m"], list[str]]:
    """The records of the pairs of which both completions have a token to score, the chosen one before the rejected one.

    Pairs stand in the order in which they are complete. What is left out is said in lines for the log.

    Args:
      records: which of those in `columns`, in reading order.
      files: where they stand.
      flag: the command-line flag that gave the data set at `path`, for messages.

    Raises:
      UserError: there is no pair, none with two completions, or the two records of one have different prompts.
    """
    first, second = _halves(columns["pair"], records)
    others = np.flatnonzero(columns["prompt"][first] != columns["prompt"][second])
    if len(others):
        here, there = (
            f"{files[columns['file'][i]]}:{columns['row'][i]}" for i in (second[others[0]], first[others[0]])
        )
        raise UserError(
            f"{here}: it is the other half of {there}, and has another prompt; "
            "give records that belong together the same prompt, and others another id"
        )
    if not len(first):
        raise UserError(
            f"{flag}: {path} has no pairs (records with prompt, chosen and rejected), which this config.objective.name "
            "needs; give pairs, or choose an objective on single completions"
        )
    is_chosen = (columns["label"][second] == 1)[:, None]
    pairs = np.where(is_chosen, np.stack([second, first], 1), np.stack([first, second], 1))
    kept = pairs[(columns["length"][pairs] > 0).all(axis=1)]
    if not len(kept):
        raise UserError(
            f"{flag}: of none of the {len(pairs)} pairs in {path} have both completions a token within "
            "--config.data.max_length; raise it"
        )
    unpaired, cut = len(records) - 2 * len(pairs), len(pairs) - len(kept)
    equal = np.sum(columns["text"][kept[:, 0]] == columns["text"][kept[:, 1]])
    notes = []
    if unpaired:
        notes.append(f"WARNING: {unpaired} records left out that are no half of a pair")
    if cut:
        notes.append(f"WARNING: {cut} pairs left out of which one side has no token within max_length")
    if equal:
        notes.append(f"WARNING: {equal} pairs have two equal sides, which say nothing")
    return kept.ravel(), notes


def _halves(
    pair: np.ndarray, records: Int64[np.ndarray, " n"]
) -> tuple[Int64[np.ndarray, " p"], Int64[np.ndarray, " p"]]:
    """The first and the second half of every pair, in the order of the second ones.

    Of several records of one pair, the first two are one, the next two another.
    """
    halves = records[pair[records] != 0]
    ordered = halves[np.argsort(pair[halves], kind="stable")]
    keys = pair[ordered]
    begins = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(keys) else np.zeros(0, np.int64)
    sizes = np.diff(begins, append=len(keys))
    place = np.arange(len(keys)) - np.repeat(begins, sizes)  # within the records of one pair
    is_second = place % 2 == 1
    second = np.flatnonzero(is_second)
    order = np.argsort(ordered[second])
    return ordered[second - 1][order], ordered[second][order]
