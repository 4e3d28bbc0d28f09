"""Where a checkpoint is: which folder a user's path means, and which folders a checkpoint may be written to.

A checkpoint is one Orbax step folder, the same for a converted model and for a step of training:

    params/       the parameter tree, in Orbax's array format (arrays.py)
    assets/       config.json and tokenizer files as published, byte for byte, and manifest.json, which marks the format
                  (manifest.py)
    opt_state/    training only: optimizer state
    progress/     training only: JSON, where training stands

It refers to nothing outside, so it can be moved; only adapters refer to their base. Orbax writes it under a temporary
name and renames it when complete; in a bucket, which renames nothing, it writes commit_success.txt into the folder
last. Beside these there are published folders (huggingface.py) and names on the hub.
"""

import glob
import logging
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import orbax.checkpoint as ocp
from etils import epath
from etils.epath import stat_utils

from elbo_kto_jax.checkpoints import hub
from elbo_kto_jax.runtime import lock, paths
from elbo_kto_jax.runtime.buckets import COMMIT
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.files import check_writable, from_json, is_unfinished

log = logging.getLogger(__name__)
MANIFEST_FILE = "manifest.json"
SIZES_FILE = "sizes.json"
STEPS_FOLDER = "checkpoints"
_BEST = "best"  # of the steps, by a held-out metric; no folder has that name


def is_checkpoint(folder: epath.Path) -> bool:
    """Whether `folder` is a checkpoint of ours: a converted model or a step of training, perhaps damaged."""
    return (folder / "assets" / MANIFEST_FILE).is_file() or (folder / "params" / SIZES_FILE).is_file()


def locate(path: str | os.PathLike, flag: str, weights: bool) -> epath.Path:
    """The folder that `path` means: a checkpoint of ours or a published folder, downloaded if need be.

    Args:
      path: see load_model.
      flag: the flag or config key that named `path`, for errors.
      weights: False: a download may leave out the weights.

    Raises:
      UserError: there is no such folder, or no finished step in it.
    """
    folder = absolute(path)
    if means_best(folder):
        return _best(folder.parent, f"{flag}={path}")
    if paths.is_remote(folder):
        return _locate_remote(folder, flag)
    if ocp.utils.is_tmp_checkpoint(folder):
        raise UserError(f"{flag}={path}: an incomplete checkpoint of an interrupted save; choose a finished one")
    if folder.is_dir():
        steps = folder / STEPS_FOLDER
        if steps.is_dir() and not any(folder.glob("*.safetensors")):
            return _latest(steps, f"{flag}={path}")
        if folder.parent.name != STEPS_FOLDER or lock.read(folder):
            return folder
    if folder.exists():
        raise UserError(f"{flag}={path}: a file; expected the folder that holds config.json and the weights")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w.-]+)?", str(path)):
        raise UserError(f"{flag}={path}: no such folder; expected a Hugging Face folder, a hub id or a checkpoint")
    return absolute(hub.download(str(path), flag, weights))


def _locate_remote(folder: epath.Path, flag: str) -> epath.Path:
    """`locate` of an address in a bucket."""
    if folder.is_file():
        raise UserError(f"{flag}={folder}: a file; expected the folder that holds config.json and the weights")
    if not folder.is_dir():
        raise UserError(f"{flag}={folder}: no such folder; expected a Hugging Face folder or a checkpoint")
    if (folder / STEPS_FOLDER).is_dir() and not any(folder.glob("*.safetensors")):
        return _latest(folder / STEPS_FOLDER, f"{flag}={folder}")
    of_orbax = folder.parent.name == STEPS_FOLDER or (folder / "params").is_dir()
    if is_unfinished(folder) or (of_orbax and not is_complete(folder)):
        raise UserError(f"{flag}={folder}: incomplete: its writer was interrupted, or is still at work; write it again")
    if of_orbax:
        paths.refuse_checkpoints(folder, flag)
    return folder


def is_complete(folder: epath.Path) -> bool:
    """Whether the folder of a checkpoint, which is there, was written to its end."""
    return not paths.is_remote(folder) or (folder / COMMIT).is_file()


def remove_incomplete(steps: epath.Path) -> None:
    """Removes what interrupted saves left among the steps in a bucket."""
    for folder in list(steps.iterdir()) if steps.is_dir() else []:
        if folder.is_dir() and not is_complete(folder):
            folder.rmtree()


def _latest(steps: epath.Path, said: str) -> epath.Path:
    """The last finished step. Until this process ends, a run that is still going on does not remove it."""
    while True:
        complete = finished_steps(steps)
        if not complete:
            raise UserError(f"{said}: a training folder without a finished step in {steps}; train it further")
        latest = max(complete, key=lambda step: int(step.name))
        if lock.read(latest):
            return latest


def finished_steps(steps: epath.Path) -> list[epath.Path]:
    """The steps of a run that are complete, in no particular order."""
    found = steps.iterdir() if steps.is_dir() else []
    return [step for step in found if step.name.isdecimal() and is_complete(step)]


def means_best(folder: str | os.PathLike) -> bool:
    """Whether `folder` is WORKDIR/checkpoints/best, which stands for the best step of the run."""
    found = absolute(folder)
    return found.name == _BEST and found.parent.name == STEPS_FOLDER and found.parent.is_dir() and not found.exists()


def _best(steps: epath.Path, said: str) -> epath.Path:
    """The best step, as the latest one says; it stays as the latest one does."""
    while True:
        progress = progress_of(_latest(steps, said))
        step = progress.get("best_step", 0)
        if not isinstance(step, int) or step < 1:
            raise UserError(f"{said}: no step is known as the best; train with data.eval, eval_every and keep_best")
        if lock.read(steps / str(step)):
            return steps / str(step)
        if progress_of(_latest(steps, said)) == progress:  # no better one has come meanwhile
            raise UserError(f"{said}: the checkpoint of the best step, {step}, is gone; name another step")


def progress_of(step: epath.Path) -> dict:
    """Where training stood at a step.

    Raises:
      UserError: the step does not say so, or is damaged.
    """
    file = step / "progress" / "metadata"
    try:
        return dict(from_json(file.read_bytes()))
    except (OSError, ValueError, TypeError):
        raise UserError(f"{file}: missing or damaged; name a step of {step.parent} that is whole") from None


def remove_step(steps: epath.Path, step: int) -> None:
    """Removes a step from the folder of a run's steps, unless another command reads it or it is a link.

    What is being removed has the name of an unfinished save: nobody loads it, and the next start clears it away.
    """
    folder = steps / str(step)
    try:
        if not os.path.islink(folder) and not lock.remove(folder, f"{folder}{ocp.utils.TMP_DIR_SUFFIX}.removed"):
            log.info("%s: another command reads it, so it is not removed yet", folder)
    except OSError as error:
        log.warning("%s: cannot be removed (%s)", folder, error.strerror)


def check_destination(path: str | os.PathLike, overwrite: bool, same_kind: Callable[[epath.Path], bool]) -> None:
    """Refuses to write a checkpoint over anything but a checkpoint of the same kind, and over that unless asked to.

    Args:
      path: the folder to write.
      overwrite: the user allowed to replace what is there.
      same_kind: whether a folder is of the kind that would replace it.

    Raises:
      UserError: naming `path` and what to do.
    """
    folder = absolute(path)
    check_writable(folder, "--out")
    if paths.is_remote(folder) and len(folder.parts) == 3:
        raise UserError(f"{path}: a bucket; name a folder in it")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if is_unfinished(folder):  # by a command that was killed
        return
    if not overwrite:
        raise UserError(f"{path}: exists already; name another folder or pass --overwrite to replace it")
    if not same_kind(folder):
        raise UserError(f"{path}: not a checkpoint that could be replaced; name another folder or remove it")


def files_in(directory: epath.Path) -> Iterator[epath.Path]:
    """Every file below `directory`, in no particular order."""
    if paths.is_remote(directory):
        yield from absolute(directory).files()
        return
    for child in directory.iterdir():
        if child.is_dir():
            yield from files_in(child)
        else:
            yield child


_Path: Any = type(epath.Path())  # of paths on this machine


class _LocalPath(_Path):
    """A path on this machine for Orbax, whatever its name is; paths that are derived from it are of this kind, too.

    epath itself takes /gs/NAME, /s3/NAME and /hf/NAME for buckets and, in `glob`, a folder's name for a pattern; its
    `stat` fails for owners without a name, which containers and network file systems have.
    """

    _uri_scheme = None

    def glob(self, pattern: str) -> Iterator["_LocalPath"]:
        return map(type(self), glob.glob(os.path.join(glob.escape(str(self)), pattern)))

    def stat(self) -> stat_utils.StatResult:
        found = os.stat(self)
        return stat_utils.StatResult(self.is_dir(), found.st_size, int(found.st_mtime), mode=found.st_mode)


def absolute(path: str | os.PathLike) -> epath.Path:
    """`path` in the form that Orbax wants."""
    return paths.at(path) if paths.is_remote(path) else _LocalPath(os.path.abspath(path))
