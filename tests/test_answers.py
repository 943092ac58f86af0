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
        ("<seed:think>x</seed:think>y", "y"),  # Seed-OSS
        ("<thoughts>x</thoughts>\ny", "y"),
        ("◁think▷x◁/think▷y", "y"),  # Kimi
        ("◁think▷x", ""),
        ("<|START_THINKING|>x<|END_THINKING|><|START_RESPONSE|>y<|END_RESPONSE|>", "y"),  # Cohere
        ("<|START_RESPONSE|>y<|END_RESPONSE|>", "y"),
        (
            "<|channel|>analysis<|message|>x<|end|><|start|>assistant"
            "<|channel|>final<|message|>y<|return|>",
            "y",
        ),  # gpt-oss
        ("<|channel|>analysis<|message|>x", ""),
        ("<|channel>thought\nx\n<channel|>y", "y"),  # Gemma
        ("<thinker>x</thinker> y", "<thinker>x</thinker> y"),
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
    assert (
        answers.first_line("\n \n") == answers.first_line(None) == answers.first_line("***") == ""
    )


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


# --- endings and failures ------------------------------------------------------------------------


def ended(reason, content=""):
    return answers.read_answer(
        {"choices": [{"finish_reason": reason, "message": {"content": content}}]}
    )


@pytest.mark.parametrize("reason", ["length", "max_tokens", "MAX_TOKENS", "model_length"])
def test_every_name_of_the_token_limit_is_the_limit(reason):
    outcome = ended(reason)
    assert outcome.problem == answers.CUT_OFF and not outcome.passing
    assert ended(reason, "6").finish_reason == "length"


@pytest.mark.parametrize("reason", ["content_filter", "SAFETY", "refusal", "RECITATION"])
def test_what_a_filter_cut_is_not_asked_for_again(reason):
    outcome = ended(reason, "6 beca")
    assert outcome.text == "" and "filter" in outcome.problem and not outcome.passing


@pytest.mark.parametrize(
    "error",
    [
        {"code": "insufficient_quota", "message": "You exceeded your current quota"},
        {"code": "402", "message": "Insufficient credits"},
        {"code": 401, "message": "no such key"},
        {"status": 403, "message": "not with this key"},
    ],
)
def test_an_account_that_is_refused_inside_a_200_is_refused(error):
    outcome = answers.read_answer({"error": error})
    assert outcome.lasting and not outcome.passing


def gemini(limit, wait="Please retry in 32.5s."):
    """Its 429 speaks of quota and billing whatever the limit, in a list."""
    message = f"You exceeded your current quota, please check your plan and billing. {wait}"
    details = [{"violations": [{"quotaId": f"GenerateRequests{limit}PerProject-FreeTier"}]}]
    return [{"error": {"code": 429, "message": message, "details": details}}]


def test_a_minutes_limit_is_waited_for_and_a_days_limit_is_not():
    minute, day = (answers.read_failure(429, gemini(x)) for x in ("PerMinute", "PerDay"))
    assert minute.passing and minute.wait == 32.5 and minute.throttled
    assert day.lasting and "daily limit" in day.problem
    nothing_said = answers.read_failure(429, gemini("", wait=""))
    assert nothing_said.lasting and "no credit" in nothing_said.problem


@pytest.mark.parametrize(
    ("words", "wait"),
    [
        ("Rate limit reached (TPM). Please try again in 1m20.5s. Visit ...", 80.5),
        ("Please try again in 120ms.", 0.12),
        ("Please try again in 2 seconds", 2),
        ('{"retryDelay": "32s"}', 32),
        ("try again in a while", None),
        ("slow down", None),
    ],
)
def test_the_wait_that_an_error_names(words, wait):
    assert answers.read_failure(429, {"message": words}).wait == pytest.approx(wait)
    assert answers.read_failure(429, {"message": words}, 7.0).wait == 7  # the header goes first
    assert answers.read_failure(400, {"message": words}).wait is None


@pytest.mark.parametrize(
    ("count", "read"), [(3, 3), (3.0, 3), (-1, None), (True, None), ("3", None), (None, None),
                        (float("nan"), None)]
)  # fmt: skip
def test_counts_that_are_none(count, read):
    assert answers.count_tokens({"usage": {"prompt_tokens": count}}, "prompt") == read
