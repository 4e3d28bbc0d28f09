"""Forms of the files that records are read from; the end of a file's name says which one it has.

    .jsonl .ndjson   one JSON object a line
    .json            a list of objects, or one object a line
    .parquet         rows with columns of the fields' names

The JSON forms may be compressed (.gz, .zst, .bz2); upper and lower case are the same.
"""

import re
from pathlib import Path

LINES = (".jsonl", ".ndjson")
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
FORMS = (".jsonl", ".parquet", *(f"{end}{more}" for end in (*LINES, ".json") for more in ("", *COMPRESSED)))
EXPECTED = "a file that ends in .jsonl or .parquet (or .ndjson, .json; these also with .gz, .zst or .bz2)"
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


def form(file: Path) -> str:
    """The end of a file's name that says how it is read, in lower case, such as ".jsonl.gz"; "" if it is not read."""
    name = file.name.lower()
    return max((end for end in FORMS if name.endswith(end) and name != end), key=len, default="")


def stem(file: Path) -> str:
    """The file's name without its form and shard number."""
    return _SHARD.sub("", plain_name(file))


def plain_name(file: Path) -> str:
    """The file's name without its form."""
    return file.name[: len(file.name) - len(form(file))]
