"""Where the files of a data set are: a file, a folder or a data set of the Hub, of which one split is read.

What a folder holds besides is named as left out.
"""

import dataclasses
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from elbo_kto_jax.data.forms import EXPECTED, FORMS, LINES, form, plain_name, stem
from elbo_kto_jax.data.json_rows import layout
from elbo_kto_jax.data.unfold import open_bounded
from elbo_kto_jax.runtime import paths
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.files import files_below

log = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@\w[\w.-]*(/\w[\w.-]*)*)?")
_HELD_OUT = ("test", "validation", "valid", "val", "dev", "eval")
_HUB_TIMEOUT_SECONDS = 5
_NAMED = 5  # files that a note names; of the others it tells the number


@dataclasses.dataclass(frozen=True)
class Source:
    """The files of a data set.

    Attributes:
      files: in the order in which they are read.
      notes: a line about each kind that is left out.
      revisions: of a data set of the Hub, "OWNER/NAME@REVISION" as it was given -> the commit that was read.
    """

    files: list[Path]
    notes: list[str]
    revisions: Mapping[str, str] = dataclasses.field(default_factory=dict)


def find_files(source: str, flag: str, revisions: Mapping[str, str] = MappingProxyType({})) -> Source:
    """The record files that `source` stands for; `reading.read_records` says how.

    `revisions`: see `Source`; a data set that is among them is read at that commit.

    Raises:
      UserError: there are none, or two hold the same rows in two forms.
    """
    if not source:
        raise UserError(f"{flag}: no data set is given; name a JSONL or Parquet file, a folder or a hub data set id")
    path = paths.at(source)
    if path.is_file():
        if not form(path):
            raise UserError(f"{flag}: {path}: expected {EXPECTED}")
        return Source([path], [])
    scheme, mark, rest = source.rpartition("://") if paths.is_remote(source) else ("", "", source)
    name, _, split = (rest, "", "") if path.is_dir() else rest.partition(":")
    name = f"{scheme}{mark}{name}"
    folder = paths.at(name)
    if folder.is_dir():
        return _select_split(folder, name, split, flag)
    if not _HUB_ID.fullmatch(name) or form(folder):
        raise UserError(f"{flag}: no file or folder {source}; check the path")
    folder = _download(name, flag, revisions.get(name, ""))
    # The cache of the Hub names its folders after commits.
    return dataclasses.replace(_select_split(folder, name, split, flag), revisions={name: folder.name})


def _download(hub_id: str, flag: str, commit: str) -> Path:
    """The folder of a Hub data set in the local cache, fetched first if the Hub can be reached.

    With a `commit`, that one is meant, whatever `hub_id` says.
    """
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, RevisionNotFoundError

    name, _, revision = hub_id.partition("@")
    revision = commit or revision
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision or None,
            repo_type="dataset",
            allow_patterns=[f"*{end}" for end in dict.fromkeys(FORMS)],
            etag_timeout=_HUB_TIMEOUT_SECONDS,
        )
    except RevisionNotFoundError:
        since = " any more, with which the run began" if commit else ""
        raise UserError(
            f"{flag}: {name} has no revision {revision!r} on the Hugging Face Hub{since}; name one of its branches, "
            f"tags or commits, as {name}@main"
        ) from None
    except (OSError, RuntimeError, HFValidationError) as error:  # RuntimeError: there is no home folder for its cache
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{flag}: {hub_id} is no file or folder here, and the Hugging Face Hub gave no such data set ({reason})\n"
            f"Run `hf download --repo-type dataset {name}` where there is a network, or set {flag} to a local copy."
        ) from error
    log.info("%s: revision %s", name, Path(folder).name)
    return Path(folder)


def _select_split(folder: Path, source: str, split: str, flag: str) -> Source:
    """The record files of one split of a folder: the named one, else the training split, else what is not held out."""
    found, others = _list(folder)
    split_of = {file: _split_name(file.relative_to(folder)) for file in found}
    if not split_of:
        raise UserError(f"{flag}: no .jsonl or .parquet file in {source}{_listed('; it holds ', others, folder)}")
    names = sorted(set(split_of.values()) - {""})
    if split:
        if split not in names:
            raise UserError(f"{flag}: {source} has no split {split!r}; it has {', '.join(names) or 'no named splits'}")
        chosen = split
    else:
        training = [name for name in names if name.startswith("train")]
        if "train" in training:
            training = ["train"]
        if len(training) > 1:
            raise UserError(
                f"{flag}: {source} has several training splits ({', '.join(training)}); "
                f"name one: {source}:{training[0]}"
            )
        chosen = training[0] if training else ""
    files = [file for file, name in split_of.items() if name == chosen] or list(split_of)
    _check_forms(files, flag)
    unread = [file for file in found if file not in files]
    notes = []
    if unread:
        notes.append(f"{_listed('not read, for they are not of this split: ', unread, folder)}")
    if others:
        notes.append(f"{_listed('left out, for records are not read from files of their form: ', others, folder)}")
    return Source(files, notes)


def _list(folder: Path) -> tuple[list[Path], list[Path]]:
    """(files of records, other files) below a folder, sorted; none that is hidden or in a hidden folder."""
    files = sorted(
        file
        for file in files_below(folder)
        if (paths.is_remote(file) or file.is_file())
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    records = [file for file in files if form(file) and _has_rows(file)]
    return records, [file for file in files if file not in records]


def _has_rows(file: Path) -> bool:
    """Whether a file in a folder is one of records; some of .json describe the data set instead."""
    if form(file).startswith((*LINES, ".parquet")):
        return True
    try:
        with open_bounded(file) as content:
            return layout(content.read(2**16)) != ""
    except (OSError, UserError):
        return True  # reading it says what is wrong


def _listed(before: str, files: list[Path], folder: Path) -> str:
    """`before` and the names of the first files, with the number of all."""
    if not files:
        return ""
    names = ", ".join(str(file.relative_to(folder)) for file in files[:_NAMED])
    more = ", ..." if len(files) > _NAMED else ""
    return f"{before}{len(files)} file{'s' if len(files) > 1 else ''} ({names}{more})"


def _check_forms(files: list[Path], flag: str) -> None:
    """Raises UserError where a folder has a name in two forms: the rows would count twice."""
    first: dict[tuple[Path, str], Path] = {}
    for file in files:
        other = first.setdefault((file.parent, plain_name(file)), file)
        if other != file:
            raise UserError(
                f"{flag}: {other} and {file.name} have one name in two forms, so their rows would count twice; "
                "remove one, or rename it if its rows are others"
            )


def _split_name(relative: Path) -> str:
    """The split that a file's stem or else one of its folders names ("train-00000-of-00002", "test/0000"), or ""."""
    for name in (stem(relative), *reversed(relative.parent.parts)):
        if re.split(r"[-_.]", name)[0] in ("train", *_HELD_OUT):
            return name
    return ""
