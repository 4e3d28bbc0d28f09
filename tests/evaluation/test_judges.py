"""The verifiable judge: what counts as right, and what it says of records that it cannot use."""

import pytest

from elbo_kto_jax.errors import UserError
from elbo_kto_jax.evaluation.judges import verifiable


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
    ],
)
def test_a_bad_record_is_named_with_its_line_and_field(record, field, shown):
    with pytest.raises(UserError) as refused:
        verifiable([{"answer": "1"}, record], ["prompts.jsonl:1", "prompts.jsonl:7"])
    message = str(refused.value)
    assert message.startswith(f"prompts.jsonl:7: field `{field}`: ")
    assert shown in message
