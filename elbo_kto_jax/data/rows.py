"""The rows of a file of any form; a row is what JSON has for it."""

from collections.abc import Iterator
from pathlib import Path

from elbo_kto_jax.data.bad_records import Decode
from elbo_kto_jax.data.forms import COMPRESSED, LINES, form
from elbo_kto_jax.data.json_rows import json_rows, line_rows
from elbo_kto_jax.data.parquet_rows import parquet_rows
from elbo_kto_jax.runtime.errors import UserError


def rows(file: Path) -> Iterator[tuple[int, Decode]]:
    """(number from 1, function that decodes the row or raises BadRecordError) for every row that is not blank.

    Raises:
      UserError: the file cannot be read, or unfolds to too much.
    """
    try:
        if form(file) == ".parquet":
            yield from parquet_rows(file)
        elif form(file).startswith(LINES):
            yield from line_rows(file)
        else:
            yield from json_rows(file)
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        hint = "copy it again" if Path(form(file)).suffix in COMPRESSED else "check its permissions"
        raise UserError(f"{file}: cannot be read ({reason}); {hint}") from None
