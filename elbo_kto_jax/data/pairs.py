"""Pairs of records: which two belong together, and which pairs can be trained on (docs/method.md 9)."""

from collections.abc import Sequence

from elbo_kto_jax.data.chat import Encoded
from elbo_kto_jax.data.records import Record
from elbo_kto_jax.runtime.errors import UserError

Row = tuple[Record, Encoded]


def whole_pairs(rows: Sequence[Row], flag: str, path: object) -> tuple[list[Row], list[str]]:
    """The rows of the pairs of which both completions have a token to score, the chosen one before the rejected one.

    Pairs stand in the order in which they are complete. What is left out is said in lines for the log.

    Args:
      rows: records and their tokens, in reading order.
      flag: the command-line flag that gave the data set at `path`, for messages.

    Raises:
      UserError: there is no pair, none with two completions, or the two records of one have different prompts.
    """
    halves: dict[str, Row] = {}
    pairs: list[tuple[Row, Row]] = []
    for row in rows:
        record = row[0]
        if not record.pair:
            continue
        other = halves.pop(record.pair, None)
        if other is None:
            halves[record.pair] = row
            continue
        if other[0].prompt != record.prompt:
            raise UserError(
                f"{record.where}: it is the other half of {other[0].where}, and has another prompt; "
                "give records that belong together the same prompt, and others another id"
            )
        pairs.append((row, other) if record.label else (other, row))
    if not pairs:
        raise UserError(
            f"{flag}: {path} has no pairs (records with prompt, chosen and rejected), which this config.objective.name "
            "needs; give pairs, or choose an objective on single completions"
        )
    kept = [pair for pair in pairs if all(encoded.completion_length for _, encoded in pair)]
    if not kept:
        raise UserError(
            f"{flag}: of none of the {len(pairs)} pairs in {path} have both completions a token within "
            "--config.data.max_length; raise it"
        )
    unpaired, cut = len(rows) - 2 * len(pairs), len(pairs) - len(kept)
    equal = sum(chosen[1].tokens.tolist() == rejected[1].tokens.tolist() for chosen, rejected in kept)
    notes = []
    if unpaired:
        notes.append(f"WARNING: {unpaired} records left out that are no half of a pair")
    if cut:
        notes.append(f"WARNING: {cut} pairs left out of which one side has no token within max_length")
    if equal:
        notes.append(f"WARNING: {equal} pairs have two equal sides, which say nothing")
    return [row for pair in kept for row in pair], notes
