"""From a checkpoint and records to answers in text: loading, chat template, decoding (docs/method.md 5, 6)."""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from elbo_kto_jax.checkpoints.load import load_config, load_model
from elbo_kto_jax.checkpoints.tokenizer import build_tokenizer
from elbo_kto_jax.data import chat, special
from elbo_kto_jax.data.records import Record
from elbo_kto_jax.models import axes
from elbo_kto_jax.models.network import MaskPredictor, Params, abstract_params
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.sampling.generate import Responses, check_options, generate
from elbo_kto_jax.sampling.stops import to_text
from elbo_kto_jax.sharding import rules

log = logging.getLogger(__name__)


class Answers(NamedTuple):
    """The answers to n records, in their order.

    Attributes:
      prompts: tokens of each prompt.
      responses: what the sampler made of them.
      texts: each response up to its first end-of-text or end-of-turn token.
      seconds: the time that decoding took, its compilation included.
    """

    prompts: list[Int32[np.ndarray, "_"]]
    responses: Responses
    texts: list[str]
    seconds: float


class Questions(NamedTuple):
    """What n records ask, in tokens.

    Attributes:
      prompts: of each record.
      templates: what each answer starts as, for infilling; None: mask tokens.
    """

    prompts: list[Int32[np.ndarray, "_"]]
    templates: list[Int32[np.ndarray, "_"]] | None

    def of(self, some: Sequence[int]) -> "Questions":
        """Those with these numbers."""
        templates = None if self.templates is None else [self.templates[i] for i in some]
        return Questions([self.prompts[i] for i in some], templates)


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint that answers: its weights are read when they are first needed, and once."""

    source: str
    flag: str  # the flag or config key that named `source`, for messages
    model: MaskPredictor
    tokenizer: PreTrainedTokenizerBase
    mesh: jax.sharding.Mesh

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end an answer: end-of-text and, where the tokenizer has one, end-of-turn."""
        eot_id = special.end_of_turn(self.tokenizer)
        return [self.model.config.eos_id] + ([] if eot_id is None else [eot_id])

    @functools.cached_property
    def params(self) -> Params:
        """The parameters over the devices of `mesh`, in the dtype that the model computes in: all that it has to keep.

        Raises:
          UserError: they are missing, damaged or cannot be split as the mesh asks.
        """
        shardings = axes.param_shardings(abstract_params(self.model), self.mesh, self.model.config)
        dtype = self.model.param_dtype
        return load_model(self.source, param_dtype=dtype, shardings=shardings, flag=self.flag).params


def open_checkpoint(source: str, config: Config, *, flag: str) -> Checkpoint:
    """The checkpoint `source` in `config.model.dtype` on `config.mesh`; its weights are not read yet.

    Raises:
      UserError: the checkpoint or its tokenizer is not usable, or does not fit on the mesh.
    """
    model_config, assets = load_config(source, flag)
    tokenizer = build_tokenizer(assets, source)
    model_config = special.with_special_tokens(model_config, tokenizer, config.model.mask_token_id, source)
    mesh = rules.make_mesh(config.mesh)
    axes.check_heads(model_config, mesh)
    dtype = jnp.dtype(config.model.dtype)
    return Checkpoint(source, flag, MaskPredictor(model_config, dtype=dtype, param_dtype=dtype), tokenizer, mesh)


def answer(source: str, records: Sequence[Record], config: Config, *, flag: str) -> Answers:
    """`respond` with the checkpoint `source`, which the flag or config key `flag` named."""
    return respond(open_checkpoint(source, config, flag=flag), records, config)


def encode(
    checkpoint: Checkpoint,
    records: Sequence[Record],
    config: Config,
    *,
    infill: bool = False,
    cut_prompts: bool = False,
) -> Questions:
    """The tokens of records; for the arguments see `respond`.

    Raises:
      UserError: a prompt or a completion to fill does not fit, or the sampler's options exclude each other.
    """
    tokenizer, model_config = checkpoint.tokenizer, checkpoint.model.config
    prompts = encode_prompts(checkpoint, records, config, cut=cut_prompts)
    templates = None
    if infill:
        mask_id, most = model_config.mask_id, config.sampler.gen_length
        templates = [_encode_template(tokenizer, record, mask_id, most) for record in records]
    return Questions(prompts, templates)


def respond(
    checkpoint: Checkpoint,
    records: Sequence[Record],
    config: Config,
    *,
    cut_prompts: bool = False,
    questions: Questions | None = None,
    progress: Callable[[int], Any] | None = None,
    watch: Callable[[int, Int32[np.ndarray, " g"]], Any] | None = None,
) -> Answers:
    """Answers the prompts of `records` with the options `config.sampler`.

    The random draws of an answer depend on `config.seed` and the record's id alone: two checkpoints get the same.

    Args:
      checkpoint: the model that answers.
      records: prompts.
      config: its `sampler` and `seed`.
      cut_prompts: cut prompts that leave no room for the response from the left, with a word about it.
      questions: what `encode` made of the records, with `infill` perhaps: it fills the mask tokens of their completions
        instead of writing new ones. None: it is called here.
      progress: called with the number of prompts whenever some are done; None: there is a bar.
      watch: see `generate.generate`; with it there is no bar.

    Raises:
      UserError: the weights are not usable, or see `encode`.
    """
    questions = questions or encode(checkpoint, records, config, cut_prompts=cut_prompts)
    params = checkpoint.params
    start = time.perf_counter()
    hidden = watch is not None or progress is not None
    with tqdm(total=len(records), desc="generate", unit="prompt", disable=hidden) as bar:
        responses = generate(
            checkpoint.model,
            params,
            questions.prompts,
            config.sampler,
            seed=config.seed,
            prompt_ids=[record.id for record in records],
            templates=questions.templates,
            eot_id=special.end_of_turn(checkpoint.tokenizer),
            mesh=checkpoint.mesh,
            progress=progress or bar.update,
            watch=watch,
        )
    seconds = time.perf_counter() - start
    _check_finite(checkpoint, records, responses)
    texts = [to_text(response, checkpoint.tokenizer, checkpoint.stop_ids) for response in responses.tokens]
    return Answers(questions.prompts, responses, texts, seconds)


def check_sampler(checkpoint: Checkpoint, config: Config) -> int:
    """The tokens that config.sampler leaves for a prompt; the weights are not read.

    Raises:
      UserError: the model or its tokenizer cannot follow an option.
    """
    check_options(config.sampler)
    if config.sampler.confidence_eos_eot_inf:
        special.find_eot_id(checkpoint.tokenizer, checkpoint.source)  # refuses a tokenizer without it
    most, length = checkpoint.model.config.max_sequence_length, config.sampler.gen_length
    if length > most:
        raise UserError(f"config.sampler.gen_length: {length}, but the model takes {most} tokens, the prompt included")
    return most - length


def encode_prompts(
    checkpoint: Checkpoint, records: Sequence[Record], config: Config, *, cut: bool = False
) -> list[Int32[np.ndarray, "_"]]:
    """The tokens of the prompts of `records`, all that `respond` refuses of them refused; the weights are not read.

    Args:
      checkpoint, records, config: see `respond`.
      cut: see `cut_prompts` there.

    Raises:
      UserError: the model or its tokenizer cannot follow an option, or a prompt does not fit.
    """
    longest = check_sampler(checkpoint, config)
    prompts = [_encode(checkpoint.tokenizer, record, None if cut else longest) for record in records]
    return _cut(prompts, longest) if cut else prompts


def _check_finite(checkpoint: Checkpoint, records: Sequence[Record], responses: Responses) -> None:
    """Raises UserError where a probability of an answer is NaN or infinite."""
    bad = np.flatnonzero(~np.isfinite(responses.confidence).all(axis=1))
    if len(bad):  # though the weights are finite, or they would not have been loaded
        raise UserError(
            f"{checkpoint.flag}={checkpoint.source}: the answer to record {records[bad[0]].id!r} has a probability "
            "that is NaN or infinite: numbers overflow; its weights are damaged, or config.model.dtype has no numbers "
            "as large (float16: choose bfloat16)"
        )


def _cut(prompts: Sequence[Int32[np.ndarray, "_"]], longest: int) -> list[Int32[np.ndarray, "_"]]:
    """The last `longest` tokens of each prompt."""
    excess = [len(prompt) - longest for prompt in prompts]
    if max(excess, default=0) > 0:
        log.warning(
            "%d of %d prompts have more than the %d tokens that leave room for the response: cut from the left, by up "
            "to %d tokens",
            *(sum(tokens > 0 for tokens in excess), len(prompts), longest, max(excess)),
        )
    return [prompt[max(0, tokens) :] for prompt, tokens in zip(prompts, excess, strict=True)]


def _encode(tokenizer: PreTrainedTokenizerBase, record: Record, longest: int | None) -> Int32[np.ndarray, "_"]:
    """The tokens of a record's prompt.

    Raises:
      UserError: there are more than `longest`, or the chat template refuses the record.
    """
    try:
        tokens = chat.encode_prompt(tokenizer, record.prompt, longest)
    except UserError as error:
        raise UserError(f"{record.where}: {error}") from error
    if longest is not None and len(tokens) > longest:
        raise UserError(
            f"{record.where}: field `prompt`: {len(tokens)} tokens or more, but at most {longest} leave room for the "
            "response; shorten it or lower config.sampler.gen_length"
        )
    return np.asarray(tokens, np.int32)


def _encode_template(
    tokenizer: PreTrainedTokenizerBase, record: Record, mask_id: int, longest: int
) -> Int32[np.ndarray, "_"]:
    """The tokens of a record's completion, some of which are the mask token.

    Raises:
      UserError: there is no completion, it has no mask token, or more than `longest` tokens.
    """
    completion = record.completion
    text = completion if isinstance(completion, str) else completion[0]["content"] if completion else ""
    tokens = np.asarray(chat.encode_prompt(tokenizer, text), np.int32)
    if mask_id not in tokens:
        mask = tokenizer.convert_ids_to_tokens(mask_id)
        raise UserError(f"{record.where}: field `completion`: --infill fills its {mask} tokens, and there is none")
    if len(tokens) > longest:
        raise UserError(
            f"{record.where}: field `completion`: {len(tokens)} tokens, but config.sampler.gen_length is {longest}"
        )
    return tokens
