"""reports/denoising.py: every token with its step and confidence, and the frames."""

from elbo_kto_jax.reports.denoising import MASK, Trace, write_denoising_report
from tests.reports.seen import HOSTILE, Seen, words

SUMMARY = {"prompts": 30, "tokens_per_second": 12.5, "forward_passes": 4, "forward_tokens": 512}
TRACE = Trace("Say <hi>", ["Hel", "lo", "\n", "<b>", " "], [1, 0, 1, -1, 3], [0.75, 0.999, 0.5, 0.0, 0.2])


def report(tmp_path, traces):
    path = tmp_path / "page.html"
    write_denoising_report(path, title="Responses", traces=traces, summary=SUMMARY, settings={"steps": 4})
    return Seen(path)


def tokens(seen):
    """(text, shade and what is said of it) of each token."""
    return [(one.text, one.get("class"), one.get("title")) for one in seen.root.findall(".//article//span")]


def frames(seen):
    """Heading and text of each, what is new in brackets."""
    return [
        (words(heading), (text.text or "") + "".join(f"[{new.text}]{new.tail or ''}" for new in text))
        for heading, text in seen.root.findall(".//ol/li")
    ]


def test_tokens(tmp_path):
    seen = report(tmp_path, [TRACE])
    assert tokens(seen) == [
        ("Hel", "token l1", "step 2, confidence 0.750"),
        ("lo", "token l4", "step 1, confidence 0.999"),
        ("↵", "token l1", "step 2, confidence 0.500"),
        ("<b>", "token given", None),
        ("␣", "token l0", "step 4, confidence 0.200"),
    ]
    assert [one.text for one in seen.root.iter("small")] == ["2", "1", "2", "4"]
    assert "1 responses of 4 written tokens in all, 1.00 a step on average." in seen.text
    assert "Say <hi>" in seen.text
    assert "The first 1 of 30 are shown." in seen.text
    assert "0.999 at step 1, 0.200 at step 4; lowest 0.200, highest 0.999" in seen.charts["Confidence"]
    assert "1.00 at step 1, 1.00 at step 4; lowest 0, highest 2.00" in seen.charts["Tokens written"]


def test_frames(tmp_path):
    assert frames(report(tmp_path, [TRACE])) == [
        ("Step 1: 1 token, confidence 0.999", f"{MASK}[lo]{MASK}<b>{MASK}"),
        ("Step 2: 2 tokens, confidence 0.625", f"[Hel]lo[\n]<b>{MASK}"),
        ("Step 3: 0 tokens, confidence –", f"Hello\n<b>{MASK}"),
        ("Step 4: 1 token, confidence 0.200", "Hello\n<b>[ ]"),
    ]


def test_of_many_steps_some_are_left_out(tmp_path):
    steps = 100
    seen = report(tmp_path, [Trace("p", ["x"] * steps, list(range(steps)), [0.5] * steps)])
    headings = [heading for heading, _ in frames(seen)]
    assert len(headings) == 24
    assert headings[0].startswith("Step 1:")
    assert f"to {steps}:" in headings[-1]
    assert len(list(seen.root.iter("mark"))) == steps
    assert f"Step by step ({steps})" in seen.text


def test_nothing_to_show(tmp_path):
    assert "No response was written." in report(tmp_path, []).text
    assert "Step by step (0)" in report(tmp_path, [Trace("p", [], [], [])]).text


def test_a_character_of_several_tokens_is_shown_when_all_are_written(tmp_path):
    messages = [{"role": "user", "content": "p"}]
    seen = report(tmp_path, [Trace(messages, ["a", "👍", None, None], [0, 2, 0, 1], [0.5] * 4)])
    assert [text for _, text in frames(seen)] == [f"[a]{MASK}[▒]{MASK}", f"a{MASK}▒[▒]", "a[👍]"]
    assert [text for text, *_ in tokens(seen)] == ["a", "👍", "⋯", "⋯"]
    assert "Prompt user p Response" in words(seen.root.find(".//article"))


def test_everything_is_escaped(tmp_path):
    trace = Trace([{"role": HOSTILE, "content": HOSTILE}], [HOSTILE], [0], [0.5])
    assert report(tmp_path, [trace]).text.count(HOSTILE) == 4


def test_only_the_first_response_is_unfolded_and_late_ones_are_folded_away(tmp_path):
    seen = report(tmp_path, [TRACE] * 8)
    assert [one.get("open") is not None for one in seen.root.findall(".//article/details")] == [True] + [False] * 7
    assert "2 more" in seen.text
