"""What a reply says after its reasoning, and numbers read strictly."""

import pytest

from lib import answers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("6", "6"),
        (" 6\n", " 6\n"),  # without reasoning nothing is touched
        ("<think>\n3?\n</think>\n\n6", "6"),
        ("<think></think>6", "6"),
        ("<think>\n\n</think>\n\n5", "5"),
        ("so: 3?\n</think>\n6", "6"),  # the opening tag stood in the prompt
        ("<think>a</think>b<think>c</think>d", "bd"),
        ("<Think>\n6", ""),  # never closed
        ("<thinking>x</thinking>y", "y"),
        ("[THINK]x[/THINK]y", "y"),
        ("[think] is a word", "[think] is a word"),
        ("", ""),
    ],
)
def test_reasoning_is_left_out(text, answer):
    assert answers.without_reasoning(text) == answer


def test_the_first_line_is_that_of_the_answer():
    assert (
        answers.first_line("<think>\nOutput (a)?\n</think>\n\n **Output (b)**\nsince")
        == "Output (b)"
    )
    assert answers.first_line("\n \n") == answers.first_line(None) == ""


@pytest.mark.parametrize("text", ["2", " 2 ", "2.", "2/3", "2 / 3", "2 out of 3", "+2"])
def test_whole_numbers_are_read(text):
    assert answers.parse_whole(text, 0, 3) == (2, "ok")


@pytest.mark.parametrize(
    "text",
    [
        "2.5",
        "0.5",
        "1,5",
        "2-3",
        "2 or 3",
        "3/10",
        "3 out of 10",
        "two",
        "２",
        "٢",
        "",
        "2 points",
        "1e0",
    ],
)
def test_what_is_no_whole_number_is_not_guessed_at(text):
    assert answers.parse_whole(text, 0, 3) == (None, "unparsed")


@pytest.mark.parametrize("text", ["4", "-1", "99999999999999999999"])
def test_numbers_off_the_scale(text):
    assert answers.parse_whole(text, 0, 3) == (None, "out_of_range")
