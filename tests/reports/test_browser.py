"""The pages in a real browser: nothing may stick out sideways on a phone, and something is drawn."""

import html
import math
import re
import shutil
import struct
import subprocess
import zlib

import numpy as np
import pytest

from elbo_kto_jax.reports.denoising import Trace, write_denoising_report
from elbo_kto_jax.reports.sweep import write_sweep_report
from elbo_kto_jax.reports.training import write_training_report
from elbo_kto_jax.reports.winrate import write_winrate_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip

# The page lies in a frame of the width to test, since a browser's own window cannot be made that narrow. The frame has
# no source of its own (srcdoc), so the script may look into it; the page's policy forbids scripts inside.
_HARNESS = """<!doctype html><body><iframe width={width} height=800 style="border:0" srcdoc="{page}"></iframe><script>
document.querySelector("iframe").onload = event => {{
  const inside = event.target.contentDocument, root = inside.documentElement;
  inside.querySelectorAll("details").forEach(one => one.open = true);
  const cut = [...inside.querySelectorAll("svg.chart text")].filter(one => {{
    const drawing = one.ownerSVGElement.getBoundingClientRect(), text = one.getBoundingClientRect();
    return text.left < drawing.left - 1 || text.right > drawing.right + 1;
  }}).map(one => one.textContent);
  const wide = [...inside.querySelectorAll("table.stacked")].filter(one => {{
    const around = one.parentElement;
    return around.scrollWidth > around.clientWidth + 1;
  }}).length;
  const sizes = `wide=${{wide}} scroll=${{root.scrollWidth}} client=${{root.clientWidth}}`;
  document.body.textContent = `${{sizes}} cut=[${{cut.join("|")}}]`;
}};
</script>"""

LONG = "unbreakable" * 60


def _training_page(path):
    noise = np.random.default_rng(0).normal(size=300)
    metrics = [
        {
            **{"step": 1000 * (i + 1), "loss": math.nan if i == 5 else 0.5 + 1e-6 * noise[i], "reference_point": 0.0},
            **{"reward_desirable": 1e4 * noise[i], "reward_undesirable": -noise[i], "reward_margin": 1e-9 * noise[i]},
            **{"grad_norm": 1e7 + noise[i], "learning_rate": 1e-6},
            **{"examples": i, "tokens": 123_456_789 * i, "seconds": float(i)},
        }
        for i in range(300)
    ]
    write_training_report(
        path,
        title=LONG,
        config={"model": {"path": LONG}},
        metrics=metrics,
        samples=[{"prompt": LONG, "before": LONG, "after": "    " * 80 + LONG}],
        summary={"steps": 300_000, "tokens_per_second": 123_456_789.0, "checkpoint": LONG},
    )


def _winrate_page(path):
    summary = {"adjusted_win_rate": 0.5, "ci95": (0.4, 0.6), "wins": 1, "ties": 0, "losses": 1, "comparisons": 2}
    summary |= {"unparsable": 1, "left_out": 1}
    example = {"prompt": LONG, "answer_a": LONG, "answer_b": "x", "verdict": "A", "expected": "B", "first": "B"}
    write_winrate_report(path, title=LONG, summary=summary, examples=[example], names=(LONG, "base"))


def _denoising_page(path):
    steps, words = 40, [LONG, " the", "\n", " ", "é", "<b>", " tok", "en"]
    trace = Trace(
        LONG, [words[i % len(words)] for i in range(steps)], list(range(steps)), [i / steps for i in range(steps)]
    )
    summary = {"prompts": 1, "tokens_per_second": 1e9, "forward_passes": 40, "forward_tokens": 123_456_789}
    write_denoising_report(path, title=LONG, traces=[trace], summary=summary, settings={"steps": 40})


def _sweep_page(path):
    rows = [
        {
            **{"cell": str(cell), "checkpoint": f"{LONG}/{checkpoint}", "task": task, "metric": "acc,none"},
            **{"sampler": sampler, "draws": draws, "seconds": 1e6},
            **{"value": 0.1 * checkpoint, "low": 0.1 * checkpoint - 0.05, "high": 0.1 * checkpoint + 0.05},
        }
        for checkpoint in (1, 2, 3)
        for cell, (task, sampler, draws) in enumerate(
            [("gsm8k", "{}", None), ("gsm8k", f'{{"{LONG}": "x"}}', None), (LONG, None, 1), (LONG, None, 128)]
        )
    ]
    write_sweep_report(path, title=LONG, config={"sweep": {"tasks": [LONG]}}, rows=rows, cells=13, done=12)


IN_BROWSER = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on the PATH")
PAGES = pytest.mark.parametrize("write", [_training_page, _winrate_page, _denoising_page, _sweep_page])


@IN_BROWSER
@PAGES
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_sticks_out(tmp_path, write, width):
    report, harness = tmp_path / "report.html", tmp_path / "harness.html"
    write(report)
    harness.write_text(_HARNESS.format(width=width, page=html.escape(report.read_text(encoding="utf-8"))))
    command = [CHROMIUM, *FLAGS, "--dump-dom", f"--user-data-dir={tmp_path / 'profile'}", harness.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    measured = re.search(r"wide=(\d+) scroll=(\d+) client=(\d+) cut=\[(.*)\]", shown)
    assert measured, shown[-500:]
    assert int(measured[1]) == 0, "tables of cards that have to be scrolled sideways"
    assert int(measured[2]) <= int(measured[3]) <= width
    assert measured[4] == "", "labels that stick out of their drawing"


@IN_BROWSER
@PAGES
def test_screenshot(tmp_path, write):
    """The page as it is seen: text and drawings in each third of it. An empty third packs into a few distinct bytes."""
    report, picture = tmp_path / "report.html", tmp_path / "page.png"
    write(report)
    options = [f"--screenshot={picture}", "--window-size=1280,1500", f"--user-data-dir={tmp_path / 'profile'}"]
    subprocess.run([CHROMIUM, *FLAGS, *options, report.as_uri()], capture_output=True, timeout=60, check=True)
    rows = _png_rows(picture.read_bytes())
    assert len(rows) == 1500
    assert [len(np.unique(third)) > 32 for third in np.array_split(rows, 3)] == [True] * 3


def _png_rows(content: bytes) -> np.ndarray:
    """The rows of an 8-bit PNG as they are packed: uint8[height, 1 + width * channels]."""
    (height,), (at, packed) = struct.unpack(">I", content[20:24]), (8, b"")
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        if content[at + 4 : at + 8] == b"IDAT":
            packed += content[at + 8 : at + 8 + length]
        at += length + 12
    return np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, -1)
