"""Where a response ends: at its first end-of-text or end-of-turn token."""

from collections.abc import Sequence
from typing import cast

import numpy as np
from jaxtyping import Int32
from transformers import PreTrainedTokenizerBase


def stop_tokens(eos_id: int, eot_id: int | None) -> list[int]:
    """The tokens that end a response."""
    return [eos_id] if eot_id is None else [eos_id, eot_id]


def has_ended(response, mask_id: int, stop_ids: list[int]):
    """Whether a stop token stands in each response [... g] with no masked position before it: what precedes it is the
    answer, and cannot change any more."""
    is_stop = (response[..., None] == np.asarray(stop_ids)).any(axis=-1)
    return (is_stop & ((response == mask_id).cumsum(axis=-1) == 0)).any(axis=-1)


def cut_response(response: Int32[np.ndarray, " g"], stop_ids: Sequence[int]) -> Int32[np.ndarray, " m"]:
    """The response up to its first end-of-text or end-of-turn token, without it."""
    (stops,) = np.nonzero(np.isin(response, np.asarray(stop_ids, np.int32)))
    return response[: stops[0]] if len(stops) else response


def to_text(response: Int32[np.ndarray, " g"], tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> str:
    """The text of a response up to its first stop token; other special tokens are left out."""
    return decoded(tokenizer, cut_response(response, stop_ids).tolist(), skip_special_tokens=True)


def decoded(tokenizer: PreTrainedTokenizerBase, tokens: list[int], *, skip_special_tokens: bool = False) -> str:
    """The text of one list of tokens; of several, `decode` would give as many texts."""
    return cast(str, tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens))
