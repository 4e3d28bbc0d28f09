"""reports/denoising.py: every token with its step and confidence, and the frames."""

import re

from elbo_kto_jax.reports.denoising import MASK, Trace, write_denoising_report

SUMMARY = {"prompts": 30, "tokens_per_second": 12.5, "forward_passes": 4, "forward_tokens": 512}
TRACE = Trace("Say <hi>", ["Hel", "lo", "\n", "<b>", " "], [1, 0, 1, -1, 3], [0.75, 0.999, 0.5, 0.0, 0.2])


def report(tmp_path, traces):
    path = tmp_path / "page.html"
    write_denoising_report(path, title="Responses", traces=traces, summary=SUMMARY, settings={"steps": 4})
    return path.read_text(encoding="utf-8")


def test_tokens(tmp_path):
    text = report(tmp_path, [TRACE])
    found = re.findall(r'<span class="token l(\d)" title="step (\d), confidence ([\d.]*)">([^<]*)<small>(\d)', text)
    assert found == [
        ("1", "2", "0.750", "Hel", "2"),
        ("4", "1", "0.999", "lo", "1"),
        ("1", "2", "0.500", "↵", "2"),
        ("0", "4", "0.200", "␣", "4"),
    ]
    assert '<span class="token given">&lt;b&gt;</span>' in text
    assert "1 responses of 4 written tokens in all, 1.00 a step on average." in text
    assert "Say &lt;hi&gt;" in text
    assert "The first 1 of 30 are shown." in text


def test_frames(tmp_path):
    frames = re.findall(r"<li><h3>([^<]*)</h3><div[^>]*>(.*?)</div></li>", report(tmp_path, [TRACE]), flags=re.DOTALL)
    assert frames == [
        ("Step 1: 1 token, confidence 0.999", f"{MASK}<mark>lo</mark>{MASK}&lt;b&gt;{MASK}"),
        ("Step 2: 2 tokens, confidence 0.625", f"<mark>Hel</mark>lo<mark>\n</mark>&lt;b&gt;{MASK}"),
        ("Step 3: 0 tokens, confidence –", f"Hello\n&lt;b&gt;{MASK}"),
        ("Step 4: 1 token, confidence 0.200", "Hello\n&lt;b&gt;<mark> </mark>"),
    ]


def test_of_many_steps_some_are_left_out(tmp_path):
    steps = 100
    text = report(tmp_path, [Trace("p", ["x"] * steps, list(range(steps)), [0.5] * steps)])
    headings = re.findall(r"<li><h3>([^:]*):", text)
    assert len(headings) == 24
    assert headings[0] == "Step 1"
    assert headings[-1].endswith(f"to {steps}")
    assert text.count("<mark>") == steps


def test_nothing_to_show(tmp_path):
    assert "No response was written." in report(tmp_path, [])
    assert "Step by step (0)" in report(tmp_path, [Trace("p", [], [], [])])


def test_a_character_of_several_tokens_is_shown_when_all_are_written(tmp_path):
    text = report(
        tmp_path, [Trace([{"role": "user", "content": "p"}], ["a", "👍", None, None], [0, 2, 0, 1], [0.5] * 4)]
    )
    frames = re.findall(r"<li><h3>[^<]*</h3><div[^>]*>(.*?)</div></li>", text, flags=re.DOTALL)
    part = "<mark>▒</mark>"
    assert frames == [f"<mark>a</mark>{MASK}{part}{MASK}", f"a{MASK}▒{part}", "a<mark>👍</mark>"]
    assert text.count("⋯<small>") == 2
    assert '<div class="role">user</div><div class="text" dir="auto">p</div>' in text
