"""Publishing a checkpoint: its published form with a card in a local folder, and that folder on the hub."""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elbo_kto_jax.checkpoints import huggingface
from elbo_kto_jax.checkpoints.conversion import to_peft, to_published
from elbo_kto_jax.checkpoints.load import manifest_digest
from elbo_kto_jax.publishing import hub
from elbo_kto_jax.publishing.card import CARD, kept, model_card
from elbo_kto_jax.publishing.facts import gather
from elbo_kto_jax.runtime import lock
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.files import atomic_write

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What is to be published.

    Attributes:
      source: converted checkpoint, step of a training run or its working folder.
      out: the local folder.
      dtype: of every tensor; None: as stored.
      shard_size: most bytes of tensors in one file.
      overwrite: whether a published model at `out` is replaced.
      evaluation, base, licence: for the card (facts.py, card.py); None: what is found.
      push: where on the hub; None: the folder alone.
      adapter: whether adapters are published alone, for PEFT.
    """

    source: str
    out: Path
    dtype: str | None
    shard_size: int
    overwrite: bool
    evaluation: str | None = None
    base: str | None = None
    licence: str | None = None
    push: hub.Place | None = None
    adapter: bool = False


def publish(request: Request) -> dict[str, Any]:
    """Writes the folder and pushes it; the summary: tensors, bytes, seconds, card, and repository, commit, private.

    A push whose folder is there already, of the same checkpoint, goes on without converting again. README.md is written
    anew unless somebody edited it.

    Raises:
      UserError: the checkpoint, the folder or the hub is not as it should be. What was written before a push fails is
        whole.
    """
    if request.push is not None:
        hub.check(request.push)
    facts = gather(request.source, evaluation=request.evaluation, base=request.base)
    facts = dataclasses.replace(facts, alone=request.adapter)
    name = request.push.repository if request.push else request.out.absolute().name
    files = model_card(facts, name, request.licence)
    if (edited := kept(request.out)) is not None:
        log.info("%s stays: it was edited; remove it to have a new one written", request.out / CARD)
        files[CARD] = edited
    summary: dict[str, Any] = {}
    if request.adapter:
        summary = to_peft(
            request.source,
            request.out,
            base=request.base,
            dtype=request.dtype,
            overwrite=request.overwrite,
            beside=files,
        )
    elif request.push is not None and not request.overwrite and _is_of(request):
        log.info("%s is of this checkpoint already: it is pushed as it is, with its card as of now", request.out)
        with lock.beside(request.out, "--out"):
            for file, content in files.items():
                atomic_write(request.out / file, content)
    else:
        summary = to_published(
            request.source,
            request.out,
            dtype=request.dtype,
            shard_size=request.shard_size,
            overwrite=request.overwrite,
            beside=files,
            metadata=_made_of(request),
        )
    summary["card"] = str(request.out / CARD)
    return summary if request.push is None else summary | hub.push(request.out, request.push)


def _made_of(request: Request) -> dict[str, str]:
    """Of which checkpoint a folder is, for the metadata of its index."""
    digest = manifest_digest(request.source, "--source")
    return {"elbo_kto_jax": f"{digest} {request.dtype or 'as stored'}"} if digest else {}


def _is_of(request: Request) -> bool:
    """Whether the folder has what converting would write.

    Raises:
      UserError: it has something else.
    """
    if not huggingface.is_published(request.out):
        return False
    made = _made_of(request)
    if not made or not made.items() <= huggingface.index_metadata(request.out).items():
        raise UserError(
            f"--out={request.out}: exists already and was not made from --source={request.source} this way; name "
            "another folder or pass --overwrite to replace it"
        )
    return True
