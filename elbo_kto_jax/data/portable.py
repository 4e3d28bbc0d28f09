"""What of a tokenizer turns texts into tokens, and how a process without transformers gets the same."""

import datetime
import json
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import tokenizers


@runtime_checkable
class TextTokenizer(Protocol):
    """The parts of transformers' fast tokenizers that `data.chat` uses."""

    chat_template: Any

    @property
    def backend_tokenizer(self) -> Any: ...

    @property
    def special_tokens_map(self) -> Any: ...

    @property
    def added_tokens_decoder(self) -> Any: ...

    def get_chat_template(self) -> Any: ...

    def convert_tokens_to_ids(self, tokens: Any) -> Any: ...


def describe(tokenizer: TextTokenizer) -> dict[str, Any]:
    """All that `Portable` needs, in what JSON can hold; equal tokenizers have equal descriptions."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    try:
        template, refusal = tokenizer.get_chat_template() if tokenizer.chat_template is not None else None, ""
    except ValueError as error:  # several, and none is the default
        template, refusal = None, str(error)
    moment = getattr(tokenizer, "moment", None)
    return {
        "tokenizer": backend.to_str(),
        "chat_template": json.loads(json.dumps(tokenizer.chat_template)),
        "template": template,
        "refusal": refusal,
        "special_tokens_map": {name: _text(value) for name, value in tokenizer.special_tokens_map.items()},
        "moment": moment and moment.isoformat(),
    }


def _text(value: Any) -> Any:
    """The value of a special token as a template sees it."""
    return [_text(one) for one in value] if isinstance(value, (list, tuple)) else str(value)


class Portable:
    """A tokenizer made of its description."""

    def __init__(self, description: Mapping[str, Any]):
        self.backend_tokenizer = tokenizers.Tokenizer.from_str(description["tokenizer"])
        self.chat_template = description["chat_template"]
        self.special_tokens_map = description["special_tokens_map"]
        self.added_tokens_decoder = self.backend_tokenizer.get_added_tokens_decoder()
        moment = description["moment"]
        self.moment = moment and datetime.datetime.fromisoformat(moment)
        self._template, self._refusal = description["template"], description["refusal"]

    def get_chat_template(self) -> Any:
        if self._refusal:
            raise ValueError(self._refusal)
        return self._template

    def convert_tokens_to_ids(self, tokens: str) -> int | None:
        return self.backend_tokenizer.token_to_id(tokens)
