"""The pages in a real browser: nothing may stick out sideways on a phone."""

import html
import math
import re
import shutil
import subprocess

import numpy as np
import pytest

from elbo_kto_jax.report.denoising import Trace, write_denoising_report
from elbo_kto_jax.report.training import write_training_report
from elbo_kto_jax.report.winrate import write_winrate_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--dump-dom",
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
  document.body.textContent = `scroll=${{root.scrollWidth}} client=${{root.clientWidth}} cut=[${{cut.join("|")}}]`;
}};
</script>"""

LONG = "unbreakable" * 60


def _training_page(path):
    noise = np.random.default_rng(0).normal(size=300)
    metrics = [
        {
            "step": 1000 * (i + 1),
            "loss": math.nan if i == 5 else 0.5 + 1e-6 * noise[i],
            "reward_desirable": 1e4 * noise[i],
            "reward_undesirable": -noise[i],
            "reward_margin": 1e-9 * noise[i],
            "reference_point": 0.0,
            "grad_norm": 1e7 + noise[i],
            "learning_rate": 1e-6,
            "examples": i,
            "tokens": 123_456_789 * i,
            "seconds": float(i),
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
    example = {"prompt": LONG, "answer_a": LONG, "answer_b": "x", "verdict": "A", "expected": "B"}
    write_winrate_report(path, title=LONG, summary=summary, examples=[example], names=(LONG, "base"))


def _denoising_page(path):
    steps, words = 40, [LONG, " the", "\n", " ", "é", "<b>", " tok", "en"]
    trace = Trace(
        LONG, [words[i % len(words)] for i in range(steps)], list(range(steps)), [i / steps for i in range(steps)]
    )
    summary = {"prompts": 1, "tokens_per_second": 1e9, "forward_passes": 40, "forward_tokens": 123_456_789}
    write_denoising_report(path, title=LONG, traces=[trace], summary=summary, settings={"steps": 40})


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on the PATH")
@pytest.mark.parametrize("write", [_training_page, _winrate_page, _denoising_page])
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_sticks_out(tmp_path, write, width):
    report, harness = tmp_path / "report.html", tmp_path / "harness.html"
    write(report)
    harness.write_text(_HARNESS.format(width=width, page=html.escape(report.read_text(encoding="utf-8"))))
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", harness.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    measured = re.search(r"scroll=(\d+) client=(\d+) cut=\[(.*)\]", shown)
    assert measured, shown[-500:]
    assert int(measured[1]) <= int(measured[2]) <= width
    assert measured[3] == "", "labels that stick out of their drawing"
