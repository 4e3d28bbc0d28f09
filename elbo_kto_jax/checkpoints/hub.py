"""The Hugging Face hub: the only way by which a checkpoint comes over a network."""

import logging
from pathlib import Path

from elbo_kto_jax.checkpoints.assets import ADAPTERS, ASSETS, CODE
from elbo_kto_jax.checkpoints.safetensors_file import INDEX_FILE
from elbo_kto_jax.runtime.errors import UserError

log = logging.getLogger(__name__)


def download(hub_id: str, flag: str, weights: bool) -> Path:
    """The local snapshot of a hub model, from the Hugging Face cache or downloaded into it.

    Only safetensors, configuration and tokenizer are fetched, and none of it is ever executed.

    Args:
      hub_id: ORGANISATION/NAME, or ORGANISATION/NAME@REVISION with a branch, tag or commit.
      flag: the flag that named the model, for the error.
      weights: also the safetensors files; otherwise only the configuration and the tokenizer,
        and adapters, which are small.

    Raises:
      UserError: it is neither in the cache nor can it be downloaded.
    """
    from huggingface_hub import snapshot_download  # here: a local folder does not need the second that it takes

    name, _, revision = hub_id.partition("@")
    patterns = [*ASSETS, *CODE, *ADAPTERS, *([INDEX_FILE, "*.safetensors"] if weights else [])]
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # the hub's own errors, and those of an HTTP library that changes between its versions
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        local = name.rpartition("/")[2]
        pin = f" --revision {revision}" if revision else ""
        raise UserError(
            f"{flag}={hub_id}: no such folder here, and not available from the Hugging Face hub ({reason})\n"
            f"Where there is a network: `hf download {name}{pin} --local-dir {local}`; then set {flag}={local}"
        ) from error
    log.info("%s: revision %s", name, folder.name)  # the commit, by which the cache names the folder
    return folder
