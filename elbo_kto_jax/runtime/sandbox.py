"""A process for what comes with a checkpoint and is not data: its chat template is a program, its tokenizer may crash.

`data.foreign` starts this file as a program and talks to it in lines of JSON. Requests are read from stdin, answers
written to stdout; nothing else of the package is imported here.

    {"template", "variables", "conversations": [{"messages", "open"}, ...], "moment"}
        -> a line for each conversation: {"text"} or {"error"}
    {"tokenizer": content of tokenizer.json, "texts": [...]}
        -> {} where it is read and tokenises the texts, or {"error"}

Memory is limited for the process and processor time for each answer. Who takes more time is ended by the system:
then there is no answer.
"""

import contextlib
import datetime
import json
import resource
import signal
import sys
from typing import Any

MOST_MEMORY_BYTES = 2**31
MOST_SECONDS = 5.0  # of processor time for a conversation; a usual template takes less than a thousandth
MOST_SECONDS_TOKENIZER = 60.0  # a large vocabulary takes two
MOST_CHARACTERS = 1_000_000  # that a template writes, besides MOST_GROWTH times those of the messages
MOST_GROWTH = 10
ENDED_BY = signal.SIGPROF  # where it takes more time
_OPEN = "CONTINUE_FINAL_MESSAGE_TAG "  # as in transformers: stands where the text is cut


def main() -> None:
    with contextlib.suppress(ValueError, OSError):  # a lower limit stands already, or the system has none
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY_BYTES, MOST_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in (signal.SIGINT, signal.SIGTERM):  # it ends with the process that started it
        signal.signal(number, signal.SIG_IGN)
    signal.signal(ENDED_BY, signal.SIG_DFL)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        if "tokenizer" in request:
            _answer(MOST_SECONDS_TOKENIZER, _try_tokenizer, request)
            continue
        for conversation in request["conversations"]:
            _answer(MOST_SECONDS, _render, request, conversation)


def _answer(seconds: float, function: Any, *args: Any) -> None:
    """Writes what the function returns, or why it returns nothing."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        answer = json.dumps(function(*args))
    except MemoryError:
        answer = json.dumps({"error": f"takes more than {MOST_MEMORY_BYTES} bytes of memory"})
    except BaseException as error:  # the template may raise anything; Rust's panics are no Exception
        answer = json.dumps({"error": (str(error).splitlines() or [""])[0][:1000] or type(error).__name__})
    signal.setitimer(signal.ITIMER_PROF, 0)
    sys.stdout.buffer.write(answer.encode() + b"\n")
    sys.stdout.buffer.flush()


def _try_tokenizer(request: dict[str, Any]) -> dict[str, str]:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(request["tokenizer"])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for text in request["texts"]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        tokenizer.decode(ids)
    return {}


_templates: dict[tuple[str, str | None], Any] = {}  # the last one, compiled


def _render(request: dict[str, Any], conversation: dict[str, Any]) -> dict[str, str]:
    """The text of a conversation; where it is `open`, it ends with the content of the last message."""
    template = _compile(request["template"], request["moment"])
    messages = conversation["messages"]
    is_open = conversation["open"]
    if is_open:
        content = messages[-1]["content"]
        messages = [*messages[:-1], {**messages[-1], "content": content + _OPEN}]
    parts, left = [], MOST_CHARACTERS + MOST_GROWTH * sum(len(message["content"]) for message in messages)
    for part in template.generate(
        messages=messages, tools=None, documents=None, add_generation_prompt=not is_open, **request["variables"]
    ):
        parts.append(part)
        left -= len(part)
        if left < 0:
            raise ValueError(f"writes more than {MOST_CHARACTERS} characters besides {MOST_GROWTH} times the messages'")
    text = "".join(parts)
    return {"text": _cut(text, content) if is_open else text}


def _cut(text: str, content: str) -> str:
    """The text up to the end of the last message's content; transformers has this rule, and TRL with it."""
    at = text.rfind(_OPEN.strip())
    if at < 0 or content.strip() not in text:
        raise ValueError("leaves out the assistant message at the end, which the answer goes on with")
    return text[:at] if text.startswith(_OPEN, at) else text[:at].rstrip()


def _compile(template: str, moment: str | None) -> Any:
    """A template compiled as transformers does it; its clock stands at `moment` (ISO 8601), if there is one."""
    if (template, moment) not in _templates:
        _templates.clear()
        _templates[template, moment] = _environment(moment).from_string(template)
    return _templates[template, moment]


def _environment(moment: str | None) -> Any:
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %}, with which some templates mark what the assistant says."""

        tags = {"generation"}  # noqa: RUF012  # Jinja's own type

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

        def _said(self, caller: Any) -> str:
            return caller()

    class Namespace(jinja2.utils.Namespace):
        def __setitem__(self, name: str, value: Any) -> None:
            jinja2.utils.Namespace.__setitem__(self, _public(name), value)

    def namespace(*args: Any, **kwargs: Any) -> Namespace:
        return Namespace({_public(name): value for name, value in dict(*args, **kwargs).items()})

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def strftime_now(form: str) -> str:
        return (datetime.datetime.fromisoformat(moment) if moment else datetime.datetime.now()).strftime(form)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # Jinja's own escapes HTML

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now, namespace=namespace)
    return environment


def _public(name: Any) -> Any:
    """A name that a template may store; those with an underscore in front belong to Python."""
    if isinstance(name, str) and name.startswith("_"):
        raise ValueError(f"stores the name {name!r}")
    return name


if __name__ == "__main__":
    main()
