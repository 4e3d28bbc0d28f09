"""What is wrong with a bucket or the way to it, in words, from the errors of fsspec, Orbax and TensorStore."""

import contextlib
import os
import re
from collections.abc import Iterator

from elbo_kto_jax.runtime.errors import UserError


@contextlib.contextmanager
def trouble_as_user_error(path: str | os.PathLike) -> Iterator[None]:
    """Within it, what the server or the way to it is to blame for becomes a UserError of one line about `path`."""
    try:
        yield
    except Exception as error:
        reason = trouble(error)
        if not reason:
            raise
        raise UserError(f"{path}: {reason}") from error


def trouble(error: BaseException | None) -> str:
    """What the user can do something about, if `error` or what it came from tells of it; otherwise an empty string."""
    while error is not None:
        reason = "" if isinstance(error, UserError) else _reason(error)
        if reason:
            return reason
        error = error.__cause__ or error.__context__
    return ""


_CREDENTIALS = (
    "no valid credentials for the bucket; on Google Cloud give the machine's service account the scope, elsewhere run "
    "`gcloud auth application-default login` or set GOOGLE_APPLICATION_CREDENTIALS (s3: `aws configure` or "
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
)
_RIGHTS = (
    "the credentials do not have the right to do this; ask for the roles Storage Object Admin and, for checkpoints, "
    "Storage Legacy Bucket Reader (s3: Get, Put, List and DeleteObject)"
)
_NO_BUCKET = "there is no such bucket; create it or correct the name"
_NO_PROJECT = "the Google Cloud project is not known; set GOOGLE_CLOUD_PROJECT"
_SERVER = (
    "the server of the bucket cannot be reached or fails ({}), also after trying again for half a minute or more; run "
    "the same command again when it is back"
)
_STRANGE = "the server of the bucket does not answer as Google Cloud Storage does, which checkpoints need ({})"
_NAMES = {
    **dict.fromkeys(("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"), _CREDENTIALS),
    **dict.fromkeys(
        ("RefreshError", "CredentialRetrievalError", "ProfileNotFound", "TokenRetrievalError"), _CREDENTIALS
    ),
    "PermissionError": _RIGHTS,
}
_AWAY = {"TransportError", "EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "HTTPClientError"}
_AWAY |= {"ConnectionClosedError", "ProxyConnectionError", "FSTimeoutError", "ChecksumError", "IncompleteRead"}


def _reason(error: BaseException) -> str:
    kind, text = type(error), str(error)
    if kind.__name__ in _NAMES and (kind is not PermissionError or not error.errno):  # type: ignore[attr-defined]
        return _NAMES[kind.__name__]
    first = (text.strip().splitlines() or [kind.__name__])[0][:200]
    if kind.__name__ in _AWAY or any(base.__module__.startswith(("aiohttp", "requests")) for base in kind.__mro__):
        return _SERVER.format(first)
    if isinstance(error, TimeoutError | ConnectionError):
        return _SERVER.format(first or kind.__name__)
    if text.startswith("Project was not passed"):
        return _NO_PROJECT
    status = _status(error, text)
    if status == 401:
        return _CREDENTIALS
    if status == 403:
        return _CREDENTIALS if re.search("anonymous|InvalidAccessKey|Signature|ExpiredToken", text, re.I) else _RIGHTS
    if status == 404 and "bucket" in text.lower():
        return _NO_BUCKET
    if "Malformed StorageGeneration" in text:  # of an emulator without generations
        return _STRANGE.format(first)
    return _SERVER.format(first) if status in (408, 429) or 500 <= status < 600 else ""


def _status(error: BaseException, text: str) -> int:
    """The status of the server's answer in the errors of gcsfs, botocore and TensorStore; 0: there is none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    code = getattr(error, "code", None)
    if isinstance(code, int | str) and str(code).isdecimal():
        return int(code)
    if isinstance(error, OSError) and text.startswith("Forbidden:"):
        return 403
    named = {"UNAUTHENTICATED": 401, "PERMISSION_DENIED": 403, "UNAVAILABLE": 503, "DEADLINE_EXCEEDED": 503}
    found = re.match(rf"({'|'.join(named)})\b", text) or re.search(r"HTTP response code: (\d{3})\b", text)
    return 0 if found is None else named.get(found[1]) or int(found[1])
