"""What a chat model's reply says: its verdict, beside its reasoning."""

import re

from elbo_kto_jax.evaluation.winrate import Verdict

# What sets reasoning off where a server leaves it in the text: tags, the marks of Mistral and Kimi, gpt-oss's channels.
_THINK = r"(?:think|thinking|thought|thoughts|reason|reasoning|reflection|analysis|scratchpad)"
_OPEN = rf"<\s*{_THINK}\b[^<>]*>|\[THINK\]|◁think▷|<\|channel\|>analysis(?:<\|message\|>)?"
_CLOSE = rf"<\s*/\s*{_THINK}\s*>|\[/THINK\]|◁/think▷|<\|channel\|>final(?:<\|message\|>)?"
_REASONING = re.compile(f"(?P<open>{_OPEN})|(?P<close>{_CLOSE})", re.IGNORECASE)
# The brackets may be escaped or the letter emphasised: Markdown and LaTeX.
_VERDICTS: dict[str, Verdict] = {"A": "A", "B": "B", "TIE": "tie"}
_STATED = re.compile(r"\\?\[\\?\[[\s*_`]*(A|B|tie)[\s*_`]*\\?\]\\?\]", re.IGNORECASE)


def without_reasoning(reply: str) -> str:
    """What a reply says beside its reasoning.

    Reasoning stands between two marks, after one that nothing closes (the reply was cut off), or before one that
    nothing opened (some templates write the opening mark into the prompt).
    """
    said: list[str] = []
    start, opened = 0, None
    for mark in _REASONING.finditer(reply):
        if mark["open"]:
            opened = mark.start() if opened is None else opened
            continue
        said = [] if opened is None else [*said, reply[start:opened]]
        start, opened = mark.end(), None
    return "".join([*said, reply[start:opened]])


def read_verdict(reply: str) -> Verdict:
    """The verdict that a reply states beside its reasoning; none where it states none, or several that differ."""
    stated = {verdict.upper() for verdict in _STATED.findall(without_reasoning(reply))}
    if len(stated) != 1:
        return "unparsable"
    (verdict,) = stated
    return _VERDICTS[verdict]
