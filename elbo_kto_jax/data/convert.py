"""From rows to columns: rows are checked, become records, go through the chat template and the tokenizer.

It depends on nothing but the rows, the tokenizer and `Text`, so any process may do it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from elbo_kto_jax.data.bad_records import BadRecordError
from elbo_kto_jax.data.chat import Encoded, encode_batch, writes_special_tokens
from elbo_kto_jax.data.columns import Part, columns_of
from elbo_kto_jax.data.portable import TextTokenizer
from elbo_kto_jax.data.reading import Notes
from elbo_kto_jax.data.records import Record, parse_row
from elbo_kto_jax.data.rows import Block
from elbo_kto_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Text:
    """How records become tokens.

    Attributes:
      needs: the fields that every record must have, see `read_records`.
      max_length, exact_window, append_eot, eot_id: see `chat.encode_batch`.
    """

    needs: tuple[str, ...]
    max_length: int
    exact_window: bool
    append_eot: bool
    eot_id: int

    def encode(self, tokenizer: TextTokenizer, records: Sequence[Record]) -> list[Encoded]:
        """The tokens of records."""
        how: dict[str, Any] = {name: value for name, value in dataclasses.asdict(self).items() if name != "needs"}
        return encode_batch(tokenizer, records, **how)


def convert_rows(block: Block, place: tuple[str, str, int], tokenizer: TextTokenizer, text: Text) -> Part:
    """The records of rows.

    Args:
      block: the rows.
      place: of their file the path, the stem (`forms.stem`) and which of the files it is.
    """
    path, stem, file = place
    notes = Notes()
    records: list[Record] = []
    rows: list[int] = []
    bad: list[tuple[int, str]] = []
    for number, decode in block.rows():
        try:
            found = parse_row(notes.see(decode()), stem, text.needs, f"{path}:{number}")
        except BadRecordError as error:
            bad.append((number, str(error)))
            continue
        records += found
        rows += [number] * len(found)
    part = convert_records(records, rows, file, tokenizer, text)
    return dataclasses.replace(part, bad=bad, unused=dict(notes.unused), texts=notes.texts)


def convert_records(
    records: Sequence[Record], rows: Sequence[int], file: int, tokenizer: TextTokenizer, text: Text
) -> Part:
    """Records that stand at `rows` of file number `file`."""
    refused: list[tuple[int, str]] = []
    try:
        encoded: list[Encoded | None] = list(text.encode(tokenizer, records))
    except UserError:  # which record it was is found one by one: an earlier one may be left out for its id
        encoded = []
        for index, record in enumerate(records):
            try:
                encoded += text.encode(tokenizer, [record])
            except UserError as error:
                encoded.append(None)
                refused.append((index, str(error)))
    special = writes_special_tokens(tokenizer, records)
    return Part(columns_of(records, encoded, special, rows, file), file, refused=refused)
