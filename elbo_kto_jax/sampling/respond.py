"""From a checkpoint and records to answers in text: loading, chat template, decoding (METHOD 5, 6)."""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from elbo_kto_jax.checkpoint import store
from elbo_kto_jax.config import Config
from elbo_kto_jax.errors import UserError
from elbo_kto_jax.model.llada import LLaDA, Params, abstract_params
from elbo_kto_jax.sampling import decode
from elbo_kto_jax.sharding import rules
from elbo_kto_jax.text import chat
from elbo_kto_jax.text.records import Record


class Answers(NamedTuple):
    """The answers to n records, in their order.

    Attributes:
      prompts: tokens of each prompt.
      responses: what the sampler made of them.
      texts: each response up to its first end-of-text or end-of-turn token.
      seconds: the time that decoding took, its compilation included.
    """

    prompts: list[Int32[np.ndarray, "_"]]
    responses: decode.Responses
    texts: list[str]
    seconds: float


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint that answers: its weights are read when they are first needed, and once."""

    source: str
    flag: str  # the flag or config key that named `source`, for messages
    model: LLaDA
    tokenizer: PreTrainedTokenizerBase
    mesh: jax.sharding.Mesh

    @functools.cached_property
    def params(self) -> Params:
        """The parameters over the devices of `mesh`, in the dtype that the model computes in: all that it has to keep.

        Raises:
          UserError: they are missing, damaged or cannot be split as the mesh asks.
        """
        shardings = rules.param_shardings(abstract_params(self.model), self.mesh)
        dtype = self.model.param_dtype
        return store.load_model(self.source, param_dtype=dtype, shardings=shardings, flag=self.flag).params


def open_checkpoint(source: str, config: Config, *, flag: str) -> Checkpoint:
    """The checkpoint `source` in `config.model.dtype` on `config.mesh`; its weights are not read yet.

    Raises:
      UserError: the checkpoint or its tokenizer is not usable, or does not fit on the mesh.
    """
    model_config, assets = store.load_config(source, flag)
    tokenizer = store.build_tokenizer(assets, source)
    chat.check_tokenizer(tokenizer, model_config, source)
    mesh = rules.make_mesh(config.mesh)
    rules.check_heads(model_config, mesh)
    dtype = jnp.dtype(config.model.dtype)
    return Checkpoint(source, flag, LLaDA(model_config, dtype=dtype, param_dtype=dtype), tokenizer, mesh)


def answer(source: str, records: Sequence[Record], config: Config, *, flag: str) -> Answers:
    """`respond` with the checkpoint `source`, which the flag or config key `flag` named."""
    return respond(open_checkpoint(source, config, flag=flag), records, config)


def respond(checkpoint: Checkpoint, records: Sequence[Record], config: Config) -> Answers:
    """Answers the prompts of `records` with the options `config.sampler`.

    The random draws of an answer depend on `config.seed` and the record's id alone: two checkpoints get the same.

    Raises:
      UserError: the weights are not usable, or a prompt does not fit into the model.
    """
    decode.check_options(config.sampler)
    tokenizer, model_config = checkpoint.tokenizer, checkpoint.model.config
    needs_eot = config.sampler.confidence_eos_eot_inf or chat.EOT_TOKEN in tokenizer.get_added_vocab()
    eot_id = chat.find_eot_id(tokenizer, checkpoint.source) if needs_eot else None
    longest = model_config.max_sequence_length - config.sampler.gen_length
    prompts = [_encode(tokenizer, record, longest) for record in records]
    params = checkpoint.params

    start = time.perf_counter()
    with tqdm(total=len(prompts), desc="generate", unit="prompt") as bar:
        responses = decode.generate(
            checkpoint.model,
            params,
            prompts,
            config.sampler,
            seed=config.seed,
            prompt_ids=[record.id for record in records],
            eot_id=eot_id,
            mesh=checkpoint.mesh,
            progress=bar.update,
        )
    seconds = time.perf_counter() - start
    stop_ids = [model_config.eos_token_id] + ([] if eot_id is None else [eot_id])
    texts = [decode.to_text(response, tokenizer, stop_ids) for response in responses.tokens]
    return Answers(prompts, responses, texts, seconds)


def _encode(tokenizer: PreTrainedTokenizerBase, record: Record, longest: int) -> Int32[np.ndarray, "_"]:
    """The tokens of a record's prompt.

    Raises:
      UserError: there are more than `longest`, or the chat template refuses the record.
    """
    try:
        tokens = chat.encode_prompt(tokenizer, record.prompt)
    except UserError as error:
        raise UserError(f"{record.where}: {error}") from error
    if len(tokens) > longest:
        raise UserError(
            f"{record.where}: field `prompt`: {len(tokens)} tokens, but at most {longest} leave room for the response; "
            "shorten it or lower config.sampler.gen_length"
        )
    return np.asarray(tokens, np.int32)
