"""The address and the key of a judge's endpoint, as the environment gives them."""

from urllib.parse import unquote, urlsplit

from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.messages import basic_credentials


def credentials(url: str) -> tuple[str, ...]:
    """(user, password, both as the header Authorization has them) of an address; nothing where it has none."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return ()
    if parts.username is None and parts.password is None:
        return ()
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    return user, password, basic_credentials(user, password)


def check_url(url: str, where: str) -> None:
    """Raises UserError, which does not show it, where `url`, which `where` named, is no http or https address."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        sound = False
    if not sound or any(ord(character) <= 32 or ord(character) > 126 for character in url):
        raise UserError(f"{where}: expected an address such as https://api.openai.com/v1")
    if parts.fragment or "@" in f"{parts.path}{parts.query}":
        raise UserError(
            f"{where}: has an @ or # after the host; in a user or password, write / ? # @ as %2F %3F %23 %40"
        )


def check_key(key: str, where: str) -> None:
    """Raises UserError, which does not show it, where `key` cannot be sent in a header."""
    if any(ord(character) <= 32 or ord(character) > 126 for character in key):
        raise UserError(f"{where}: contains white space or characters that no key has; copy the key again")
