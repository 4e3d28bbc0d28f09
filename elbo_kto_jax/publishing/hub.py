"""Pushing a folder to the Hugging Face hub. The token is the client's own: HF_TOKEN, or that of `hf auth login`."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elbo_kto_jax import __version__
from elbo_kto_jax.publishing.facts import HUB_ID
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.messages import Secrets, reason

log = logging.getLogger(__name__)
_MAIN = "main"
_REMEDIES = {
    401: "the token is not valid (any more): set HF_TOKEN to one that is, or run `hf auth login`",
    403: "the token may not write there: take one with the right to write, or another --push=ORG/NAME",
    404: "there is no such repository or organisation, or the token may not see it",
    409: "the repository changed meanwhile",
    413: "a file is larger than the hub takes: a smaller --shard-size with --overwrite",
    429: "too many requests: wait a few minutes",
}


@dataclass(frozen=True)
class Place:
    """Where a model is pushed to.

    Attributes:
      repository: ORG/NAME; it is made if there is none.
      revision: a branch, which is made if there is none.
      public: whether everybody may see it.
    """

    repository: str
    revision: str = _MAIN
    public: bool = False

    @property
    def where(self) -> str:
        return f"--push={self.repository}"


def check(place: Place) -> None:
    """Checks, before minutes of converting, what can be checked without a network.

    Raises:
      UserError: the name is none, or nobody is logged in.
    """
    import huggingface_hub  # here: it takes a second

    if not HUB_ID.fullmatch(place.repository):
        raise UserError(f"{place.where}: expected ORG/NAME, the name of a repository on the Hugging Face hub")
    try:
        huggingface_hub.utils.validate_repo_id(place.repository)
    except ValueError as error:
        raise UserError(f"{place.where}: {reason(error)}") from None
    if not huggingface_hub.get_token():
        raise UserError(f"{place.where}: not logged in to the hub; run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, place: Place) -> dict[str, Any]:
    """Uploads all files of the folder in one commit, and returns repository, commit and private.

    Raises:
      UserError: the hub cannot be reached or refuses, or the repository is public and was not to be.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="elbo_kto_jax", library_version=__version__)
    try:
        private = _prepare(api, place)
        commit = api.upload_folder(
            folder_path=folder,
            repo_id=place.repository,
            revision=place.revision,
            commit_message=f"Upload with elbo_kto_jax {__version__}",
        )
        address = f"{api.endpoint}/{place.repository}" + (f"/tree/{place.revision}" if place.revision != _MAIN else "")
    except UserError:
        raise
    except Exception as error:  # the hub's own errors, and those of an HTTP library that changes between its versions
        raise _refused(error, folder, place) from error
    log.info("pushed to %s (%s)", address, "private" if private else "public")
    return {"repository": address, "commit": commit.oid, "private": private}


def _prepare(api: Any, place: Place) -> bool:
    """Makes the repository and the branch where they are not there; whether the repository is private."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        private = bool(api.repo_info(place.repository).private)
    except RepositoryNotFoundError:
        private = not place.public
        api.create_repo(place.repository, private=private, exist_ok=True)
    if not private and not place.public:
        raise UserError(
            f"{place.where}: that repository is public; pass --public to push there, make it private on its page, or "
            "name another"
        )
    if private and place.public:
        log.warning("%s: that repository is private, and stays so", place.where)
    if place.revision != _MAIN:
        api.create_branch(place.repository, branch=place.revision, exist_ok=True)
    return private


def _refused(error: Exception, folder: Path, place: Place) -> UserError:
    """The error in one line, without the token, with what to do."""
    import huggingface_hub

    innermost: BaseException = error
    status = None
    for cause in _causes(error):
        innermost, status = cause, getattr(getattr(cause, "response", None), "status_code", None)
        if status is not None:
            break
    said = Secrets([huggingface_hub.get_token() or ""]).one_line(reason(innermost), 200)
    is_network = isinstance(innermost, OSError) or type(innermost).__module__.startswith("http")
    unknown = "try again later" if status else "the hub cannot be reached" if is_network else "the push failed"
    remedy = _REMEDIES.get(status or 0, unknown)
    return UserError(
        f"{place.where}: {remedy} ({said})\n{folder} is whole: the same command again only pushes what is missing"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
