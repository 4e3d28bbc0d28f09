"""trackio: a local dashboard (`trackio show`), or a Hugging Face Space that TRACKIO_SPACE_ID names."""

import importlib
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elbo_kto_jax.runtime.extras import import_extra
from elbo_kto_jax.trackers.protocol import KEY, PROJECT, Run


def check() -> None:
    """Raises UserError where it is not installed."""
    import_extra("trackio", f"{KEY}: 'trackio'", "trackio", "trackio")


def begin(run: Run) -> "Trackio":
    return Trackio(run)


class Trackio:
    """A run in trackio, whose name is its key: the name of the working folder, and something that no other has."""

    def __init__(self, run: Run):
        self._trackio = importlib.import_module("trackio")
        _print_to_stderr()
        self.key = run.key or f"{run.name}-{secrets.token_hex(3)}"
        self._run: Any = self._trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=self.key,
            config=dict(run.config),
            resume="allow" if run.key else "never",
            embed=False,
        )
        # It does not say publicly what it has. 0: nothing, or its server was not reached.
        following = getattr(self._run, "_next_step", 0)
        self.sent = following - 1 if run.key and following else run.sent

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def samples(self, step: int, when: str, samples: Sequence[Mapping[str, str]]) -> None:
        rows = [{name: sample.get(name, "") for name in ("prompt", "before", "after")} for sample in samples]
        self._run.log({"samples": self._trackio.Table(data=rows)}, step=step)

    def report(self, step: int, file: Path) -> None:
        self._run.log({"report": self._trackio.Html(file.read_text(encoding="utf-8"))}, step=step)

    def close(self, finished: bool) -> None:
        self._run.finish()


def _print_to_stderr() -> None:
    """trackio prints to stdout, which is for the summary of a command."""
    for name, module in sys.modules.copy().items():  # other threads import meanwhile
        if name.partition(".")[0] == "trackio":
            vars(module)["print"] = _print


def _print(*values: Any, **options: Any) -> None:
    print(*values, file=sys.stderr, **{name: value for name, value in options.items() if name != "file"})
