"""From the name of a data set to its columns: where its files are, who converts them, and whether that was done before.

Small data sets are prepared in this process and in memory. For larger ones there is a process for each core, and the
columns are written to files as they come, so that memory does not grow with the texts. What comes out is the same.
"""

import contextlib
import dataclasses
import importlib.metadata
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import elbo_kto_jax
from elbo_kto_jax.data import forms, portable, prepared, sources
from elbo_kto_jax.data.chat import CLOCK
from elbo_kto_jax.data.columns import Part
from elbo_kto_jax.data.convert import Text, convert_records
from elbo_kto_jax.data.portable import TextTokenizer
from elbo_kto_jax.data.prepared import Cache, Digests, Prepared, Sink
from elbo_kto_jax.data.reading import Notes, bad_record, no_record, read_records
from elbo_kto_jax.data.rows import blocks
from elbo_kto_jax.data.settle import settle
from elbo_kto_jax.data.workers import Placed, convert_all, cores
from elbo_kto_jax.runtime import paths
from elbo_kto_jax.runtime.errors import UserError

log = logging.getLogger(__name__)
LARGE = 2**24  # bytes of files, from which on other processes and a cache are worth their while
_SHARE = 2**23  # bytes of files for which a further process is
_PACKAGES = ("jinja2", "pyarrow", "tokenizers")  # that texts go through
_BATCH = 256  # records that are converted at once


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be prepared.

    Attributes:
      path, skip_bad, flag, limit: see `read_records`.
      text: how records become tokens.
      progress: show a bar on stderr.
      cache: where large data sets are kept; None: nowhere.
      revisions: of data sets of the Hub, see `sources.find_files`.
      processes: that prepare a large data set; 0: one for each core.
    """

    path: str
    text: Text
    skip_bad: bool
    flag: str
    limit: int
    progress: bool
    cache: Cache | None
    revisions: Mapping[str, str]
    processes: int = 0


def prepare(request: Request, tokenizer: TextTokenizer) -> Prepared:
    """The columns of a data set.

    Raises:
      UserError: see `read_records` and `encode_batch`; or a file changes while it is read.
    """
    if request.limit:
        return _first_records(request, tokenizer)
    source = sources.find_files(request.path, request.flag, request.revisions)
    return dataclasses.replace(_prepare(request, source, tokenizer), revisions=source.revisions)


def _prepare(request: Request, source: sources.Source, tokenizer: TextTokenizer) -> Prepared:
    if _size(source.files) < LARGE:
        return _logged(request, _convert(request, source, tokenizer, 1, None))
    if request.cache is None or _depends_on_the_day(tokenizer) or not request.cache.is_usable():
        with prepared.scratch() as folder:
            return _logged(request, _convert(request, source, tokenizer, _processes(request, source), folder))
    digests = prepared.digest_files(source.files)

    def make(folder: Path) -> Prepared:
        before = _stamps(source.files)
        made = _convert(request, source, tokenizer, _processes(request, source), folder)
        _refuse_changes(source.files, before, digests)
        return dataclasses.replace(made, digests=digests)

    return _logged(request, request.cache.get(_about(request, source, tokenizer, digests), make))


def _logged(request: Request, found: Prepared) -> Prepared:
    for note in found.notes:
        log.info("%s: %s", request.path, note)
    return found


def _about(request: Request, source: sources.Source, tokenizer: TextTokenizer, digests: Digests) -> dict[str, Any]:
    """Everything that the columns of a data set depend on."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {
        "files": digests,
        "notes": source.notes,
        "text": dataclasses.asdict(request.text),
        "skip_bad": request.skip_bad,
        "tokenizer": portable.describe(tokenizer),
        "versions": {**versions, "elbo_kto_jax": elbo_kto_jax.__version__},
    }


def _depends_on_the_day(tokenizer: TextTokenizer) -> bool:
    """Whether the chat template asks for the time, and nobody has said which it is."""
    return CLOCK in str(tokenizer.chat_template) and getattr(tokenizer, "moment", None) is None


def _size(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _processes(request: Request, source: sources.Source) -> int:
    return request.processes or max(1, min(cores(), _size(source.files) // _SHARE))


def _stamps(files: Sequence[Path]) -> list[tuple[int, int, int]]:
    """Size and times of files; in a bucket, where an object is replaced as a whole, the size."""
    stats = [file.stat() for file in files]
    return [(stat.st_size, getattr(stat, "st_mtime_ns", 0), getattr(stat, "st_ctime_ns", 0)) for stat in stats]


def _refuse_changes(files: Sequence[Path], before: list[tuple[int, int, int]], digests: Digests) -> None:
    """Raises UserError where a file is no longer the one of which the digest was made."""
    for file, old, new in zip(files, before, _stamps(files), strict=True):
        if old != new or old[0] != digests[str(file)][0]:
            raise UserError(f"{file}: it was changed while it was read; run the same command again when it is complete")


def _first_records(request: Request, tokenizer: TextTokenizer) -> Prepared:
    """The first records of a data set, of which all are checked."""
    found = read_records(
        request.path, needs=request.text.needs, skip_bad=request.skip_bad, flag=request.flag, limit=request.limit
    )
    sink = Sink(None)
    refusals: list[tuple[int, str]] = []
    for start in range(0, len(found.records), _BATCH):
        records = found.records[start : start + _BATCH]
        files = [found.files.index(paths.at(record.where.rpartition(":")[0])) for record in records]
        rows = [int(record.where.rpartition(":")[2]) for record in records]
        part = convert_records(records, rows, 0, tokenizer, request.text)
        sink.add({**part.columns, "file": np.array(files, part.columns["file"].dtype)})
        refusals += part.refused
    if refusals:
        raise UserError(refusals[0][1])
    columns = {**sink.columns(), "kept": np.ones(len(found.records), np.bool_)}
    return Prepared(columns, tuple(found.files), found.skipped, [], {})


def _convert(
    request: Request, source: sources.Source, tokenizer: TextTokenizer, processes: int, folder: Path | None
) -> Prepared:
    """The columns of all records, written to a folder or kept in memory."""
    reading = _Reading(Sink(folder), source.files)
    with contextlib.closing(reading.sink):
        placed = _placed(source.files)
        parts = convert_all(placed, tokenizer, request.text, processes)
        failure = None
        try:
            with contextlib.closing(parts), _bar(request) as bar:
                for part in parts:
                    reading.add(part)
                    bar.update(len(part))
                    if reading.bad and not request.skip_bad:
                        break
        except UserError as error:  # about what comes after the rows that were read
            failure = error
        columns = reading.sink.columns()
    settled = settle(columns, source.files)
    bad = [f"{source.files[file]}:{row}: {what}" for file, row, what in sorted([*reading.bad, *settled.bad])]
    if bad and not request.skip_bad:
        raise bad_record(bad[0])
    if failure is not None:
        raise failure
    if not settled.columns["kept"].any():
        raise no_record(request.path, request.flag, bad)
    settled.ids.check_copies(request.flag)
    for index, why in reading.refused:
        if settled.columns["kept"][index]:
            raise UserError(why)
    columns |= reading.sink.replace(settled.columns)
    notes = [*source.notes, *reading.notes.lines(), *settled.ids.notes()]
    return Prepared(columns, tuple(source.files), bad, notes, {})


class _Reading:
    """What has been read of a data set so far."""

    def __init__(self, sink: Sink, files: Sequence[Path]):
        self.sink, self.notes = sink, Notes()
        self.bad: list[tuple[int, int, str]] = []  # file, row, what is wrong
        self.refused: list[tuple[int, str]] = []  # index of a record, why it has no tokens
        self._count = 0

    def add(self, part: Part) -> None:
        self.sink.add(part.columns)
        self.notes.add(part.unused, part.texts)
        self.bad += [(part.file, row, what) for row, what in part.bad]
        self.refused += [(self._count + index, why) for index, why in part.refused]
        self._count += len(part)


def _bar(request: Request) -> tqdm:
    return tqdm(desc="tokenise", unit="record", disable=not request.progress, file=sys.stderr)


def _placed(files: Sequence[Path]) -> Iterator[Placed]:
    for index, file in enumerate(files):
        for block in blocks(file):
            yield block, (str(file), forms.stem(file), index)
