"""Text at the end of a terminal that is drawn over itself, by `rich`."""

from collections.abc import Iterator
from io import TextIOBase
from typing import TextIO, cast

from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.segment import Segment
from rich.text import Text


class Canvas:
    """One text, shown until it is erased; of a text that is higher than the terminal its end is shown."""

    def __init__(self, out: TextIO | TextIOBase):
        self._live = Live(
            console=Console(file=cast(TextIO, out), highlight=False, force_terminal=True, legacy_windows=False),
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()

    def draw(self, text: str) -> None:
        """Replaces what was drawn before; a terminal obeys control characters, so none is passed on."""
        shown = "".join(character for character in text if character.isprintable() or character in "\n\t ")
        self._live.update(_End(shown.expandtabs(1)), refresh=True)

    def erase(self) -> None:
        """Removes what was drawn."""
        self._live.stop()


class _End:
    """The last lines of a text, as many as a terminal has but one."""

    def __init__(self, text: str):
        self._text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        text = Text(self._text, overflow="fold")
        lines = console.render_lines(text, options.update(height=None), pad=False)
        for i, line in enumerate(lines[-max(options.size.height - 1, 1) :]):
            yield from ([Segment.line()] if i else []) + line
