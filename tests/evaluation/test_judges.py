"""The judges: what counts as right, records that cannot be used, both orders and the verdicts of a chat model."""

import pytest

from elbo_kto_jax.evaluation.judges.chat import chat, check_template
from elbo_kto_jax.evaluation.judges.verifiable import verifiable
from elbo_kto_jax.evaluation.verdicts import read_verdict
from elbo_kto_jax.evaluation.winrate import Opinion
from elbo_kto_jax.runtime.errors import UserError


def judge_one(record: dict, a: str, b: str) -> tuple:
    return verifiable([record], ["prompts.jsonl:1"])([a], [b])[0]


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [("12", "21", "A"), ("21", "12", "B"), ("12", "12", "tie"), ("21", "1", "tie"), (" 12\n", "012", "A")],
)
def test_right_beats_wrong_and_all_else_is_a_tie(a, b, verdict):
    assert judge_one({"answer": "12"}, a, b) == (verdict,)


def test_one_of_several_answers_is_enough():
    assert judge_one({"answer": ["four", "4"]}, "4", "five") == ("A",)


@pytest.mark.parametrize(
    ("match", "expected", "right", "wrong"),
    [
        ("exact", "4", "4", "It is 4."),
        ("contains", "4", "It is 4.", "It is five."),
        ("contains", "a.c", "a.c", "abc"),
        ("regex", r"\b4\b", "It is 4.", "It is 42."),
    ],
)
def test_match(match, expected, right, wrong):
    assert judge_one({"answer": expected, "match": match}, right, wrong) == ("A",)
    assert judge_one({"answer": expected, "match": match}, wrong, right) == ("B",)


def test_each_prompt_has_its_own_answer():
    judge = verifiable([{"answer": "1"}, {"answer": "2"}, {"answer": "3"}], ["f:1", "f:2", "f:3"])
    assert judge(["1", "1", "3"], ["2", "2", "3"]) == [("A",), ("B",), ("tie",)]


@pytest.mark.parametrize(
    ("record", "field", "shown"),
    [
        ({}, "answer", "None"),
        ({"answer": ""}, "answer", "''"),
        ({"answer": 12}, "answer", "12"),
        ({"answer": []}, "answer", "[]"),
        ({"answer": ["1", " "]}, "answer", "' '"),
        ({"answer": "1", "match": "fuzzy"}, "match", "'fuzzy'"),
        ({"answer": "(", "match": "regex"}, "answer", "'('"),
        ({"answer": "(" * 5000 + ")" * 5000, "match": "regex"}, "answer", "no regular expression"),
        ({"answer": "[" * 5000, "match": "regex"}, "answer", "no regular expression"),
        ({"answer": "a{99999999999999999999}", "match": "regex"}, "answer", "no regular expression"),
        ({"answer": "(" * 100_000, "match": "regex"}, "answer", "'((("),
        ({"answer": ["x" * 100_000, ""]}, "answer", "xxx"),
        ({"answer": "1", "match": "y" * 100_000}, "match", "yyy"),
    ],
)
def test_a_bad_record_is_named_with_its_line_and_field(record, field, shown):
    with pytest.raises(UserError) as refused:
        verifiable([{"answer": "1"}, record], ["prompts.jsonl:1", "prompts.jsonl:7"])
    message = str(refused.value)
    assert message.startswith(f"prompts.jsonl:7: field `{field}`: ")
    assert shown in message
    assert len(message) < 500


# ---- a chat model as the judge ----

TEMPLATE = "{prompt}|{answer_a}|{answer_b}"


def chat_judge(verdict_of, prompts=("p", "q")):
    """A judge whose model replies `verdict_of(first, second)`, and the questions that it was asked."""
    asked = []

    def ask(texts):
        asked.extend(texts)
        return [verdict_of(*text.split("|")[1:]) for text in texts]

    judge = chat(prompts, ask, TEMPLATE)

    def verdicts(answers_a, answers_b):
        given = judge(answers_a, answers_b)
        return [tuple(one.verdict if isinstance(one, Opinion) else one for one in of_prompt) for of_prompt in given]

    return verdicts, asked


def test_both_orders_are_judged_and_the_verdict_names_the_model():
    judge, asked = chat_judge(lambda first, second: "[[A]]" if len(first) > len(second) else "[[B]]")
    assert judge(["long answer", "x"], ["short", "longer"]) == [("A", "A"), ("B", "B")]
    assert asked == ["p|long answer|short", "p|short|long answer", "q|x|longer", "q|longer|x"]


def test_a_judge_that_always_picks_the_first_is_undecided():
    judge, _ = chat_judge(lambda first, second: "[[A]]")
    assert judge(["a", "b"], ["c", "d"]) == [("A", "B"), ("A", "B")]


def test_equal_answers_tie_without_being_asked():
    judge, asked = chat_judge(lambda first, second: "[[A]]")
    assert judge(["same", "a"], ["same", "b"]) == [("tie", "tie"), ("A", "B")]
    assert len(asked) == 2


def test_what_cannot_be_read_is_no_verdict():
    judge, _ = chat_judge(lambda first, second: "I like both" if first == "a" else "[[tie]]")
    assert judge(["a", "b"], ["c", "d"]) == [("unparsable", "tie"), ("tie", "tie")]


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("It is clear.\n[[A]]", "A"),
        ("[[B]]", "B"),
        ("[[ tie ]]", "tie"),
        ("[[TIE]] [[tie]]", "tie"),
        ("[[a]]", "A"),
        ("[[A]] or [[B]]", "unparsable"),
        ("A", "unparsable"),
        ("[A]", "unparsable"),
        ("[[C]]", "unparsable"),
        ("**Verdict:** **[[A]]**", "A"),
        ("[[**B**]]", "B"),
        (r"Verdict: \[\[A\]\]", "A"),
        (r"$\boxed{[[A]]}$", "A"),
        ("<think>\nMaybe [[B]]? No.\n</think>\n\n[[A]]", "A"),
        ("Maybe [[B]]? No.\n</think>\n\n[[A]]", "A"),
        ("[[A]] <think> or [[B]]", "A"),
        ("<think>[[A]], I think", "unparsable"),
        ("<think>[[A]]</think>", "unparsable"),
        ("<Thinking effort=low>[[B]]</THINKING >[[A]]", "A"),
        ("<think>a <think>b</think> [[B]]</think>[[A]]", "A"),
        ("[[A]]\n<reasoning>[[A]] beats [[B]]</reasoning>", "A"),
        ("[THINK][[B]][/THINK][[tie]]", "tie"),
        ("◁think▷[[B]]◁/think▷[[A]]", "A"),
        ("<|channel|>analysis<|message|>[[B]]<|end|><|start|>assistant<|channel|>final<|message|>[[A]]", "A"),
        ("", "unparsable"),
    ],
)
def test_read_verdict(reply, verdict):
    assert read_verdict(reply) == verdict


def test_answers_that_look_like_fields_stay_as_they_are():
    asked = []
    judge = chat(["{answer_a}"], lambda texts: asked.extend(texts) or ["[[A]]"] * len(texts), TEMPLATE)
    judge(["{answer_b} \\1"], ["{prompt}"])
    assert asked[0] == "{answer_a}|{answer_b} \\1|{prompt}"


def test_a_template_without_the_answers_is_refused():
    with pytest.raises(UserError, match=r"mine\.txt: the judge prompt lacks \{answer_b\}"):
        check_template("{prompt} {answer_a}", "mine.txt")
