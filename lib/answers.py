"""What a chat endpoint answered, read once: the text, or why there is none; and what a text says.

`read_response` turns an HTTP response into an `Outcome`.  Gateways put failures into a status of 200, models
write their reasoning before the answer, and content comes as text or in parts: whoever parses a reply sees
none of that.  `without_reasoning`, `first_line` and `parse_whole` are what all parsers of replies share.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass

from lib.replies import LONGEST_WAIT, retry_after

ADVICE = {  # what every other request would meet too
    401: "check the key",
    402: "the account has no credit left",
    403: "the key may not use this model; try another model or key",
    404: "check the model's name and the base_url (it usually ends in /v1)",
}
NO_CREDIT = re.compile(
    r"insufficient[ _]?(quota|balance|funds|credit)|credit balance|billing|exceeded your current quota",
    re.I,
)
CUT_OFF = (
    "the answer reached its token limit before it said anything; raise max_tokens, or give a reasoning "
    "model max_completion_tokens of a few thousand"
)
DAILY_LIMIT = re.compile(r"per[ -]?day|daily|\b[RT]PD\b", re.I)
# What endpoints call a token limit and a filter, in lower case: Mistral, Gemini, Anthropic, Bedrock.
LIMITS = ("length", "max_tokens", "model_length")
FILTERS = re.compile(
    "content_filter(ed)?|refusal|safety|prohibited_content|recitation|blocklist|spii|guardrail_intervened"
)
# "Please try again in 1m20.5s", and Gemini's {"retryDelay": "32s"}
_WAIT = re.compile(
    r"try(?: again)? in ((?:[\d.]+ ?(?:ms|[hms])\w* ?)+)|retryDelay[\"']*: *[\"']*([\d.]+s)", re.I
)
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}

# Reasoning in <think>, <seed:think>, Kimi's triangles, Mistral's [THINK], Cohere's, gpt-oss's and Gemma's.
_TAG = (
    r"(?i:<{slash}(?:\w+:)?(?:think|thinking|thoughts?|reasoning)>)|◁{slash}think▷|\[{slash}THINK\]"
)
_OPENING = (
    rf"(?:{_TAG.format(slash='')}|<\|START_THINKING\|>|<\|channel\|>analysis|<\|channel>thought)"
)
_CLOSING = (
    rf"(?:{_TAG.format(slash='/')}|<\|END_THINKING\|>|<\|channel\|>final<\|message\|>|<channel\|>)"
)
_FRAME = re.compile(r"\A\s*<\|START_RESPONSE\|>|<\|(?:END_RESPONSE|return|end)\|>\s*\Z")
_BLOCK = re.compile(f"{_OPENING}.*?{_CLOSING}", re.S)
_TO_CLOSING = re.compile(f".*{_CLOSING}", re.S)
_FROM_OPENING = re.compile(f"{_OPENING}.*", re.S)


def without_reasoning(text: str) -> str:
    """What a reply says after its reasoning (<think>...</think>); "" where the reasoning does not end.

    Some models are given the opening tag in their prompt: all before a lone closing tag is reasoning.
    """
    answer = _FROM_OPENING.sub("", _TO_CLOSING.sub("", _BLOCK.sub("", text)))
    answer = _FRAME.sub("", answer)
    return text if answer == text else answer.strip()


def first_line(text: str | None) -> str:
    """The first line after any reasoning with more on it than quotes and asterisks, and without those."""
    lines = without_reasoning(text or "").split("\n")
    return next(filter(None, (line.strip("*_`\"' \t\r") for line in lines)), "")


def parse_whole(text: str, low: int, high: int) -> tuple[int | None, str]:
    """(number, status) of a text that is one whole number from low to high, and nothing else.

    "6", "6.", "6/7" and "6 out of 7" (where high is 7) are read; decimals, ranges, other scales and other
    scripts' digits are "unparsed", other numbers "out_of_range".
    """
    match = re.fullmatch(rf"([+-]?[0-9]+)(?:\s*(?:/|out of)\s*{high})?\.?", text.strip(), re.I)
    if not match:
        return None, "unparsed"
    number = int(match[1]) if len(match[1]) < 9 else high + 1
    return (number, "ok") if low <= number <= high else (None, "out_of_range")


@dataclass(frozen=True)
class Outcome:
    """What came of one attempt: the text of an answer ("" where it says nothing), or None without one.

    problem: why there is nothing to read.  passing: another try may help; lasting: every other request
    would meet it too.
    """

    text: str | None = None
    finish_reason: str = ""
    problem: str = ""
    passing: bool = False
    lasting: bool = False
    throttled: bool = False
    wait: float | None = None  # seconds that the server asks for


def read_answer(raw: object) -> Outcome:
    """The text of a chat completion, or why it has none: gateways put failures into a status of 200."""
    if not isinstance(raw, dict):
        return Outcome(problem=f"an answer that is no JSON object: {_excerpt(raw)}", passing=True)
    choices = raw.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    choice = choice if isinstance(choice, dict) else {}
    if error := raw.get("error") or choice.get("error"):
        return read_failure(200, error)
    message, reason = choice.get("message"), str(choice.get("finish_reason") or "")
    reason = "length" if reason.lower() in LIMITS else reason
    text = _content(message.get("content")) if isinstance(message, dict) else None
    if reason == "error" or text is None:
        return Outcome(problem=f"an answer without a message: {_excerpt(raw)}", passing=True)
    if message.get("refusal"):
        return Outcome("", "refusal", f"the model refused: {_excerpt(message['refusal'])}")
    if FILTERS.fullmatch(reason.lower()):
        return Outcome("", reason, "the provider's content filter cut the answer")
    if without_reasoning(text).strip():
        return Outcome(text, reason)
    text = text.strip()  # "", or reasoning without an answer after it
    if reason == "length":
        return Outcome(text, reason, CUT_OFF)
    return Outcome(text, reason, f"an empty answer (finish_reason {reason!r})", passing=True)


def first_tokens(raw: object) -> list[tuple[str, float]]:
    """The likeliest first tokens of a chat completion, with their log p; [] where it shows none."""
    try:
        (first, *_) = raw["choices"][0]["logprobs"]["content"]
        listed = first.get("top_logprobs") or [first]
        return [(str(one["token"]), float(one["logprob"])) for one in listed]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return []


def _content(content: object) -> str | None:
    """The text of a message: a string, or the text parts of a list (thinking parts left out)."""
    if content is None:
        return ""
    if isinstance(content, str):
        return _whole(content)
    if not isinstance(content, list):
        return None
    texts = [part.get("text") if isinstance(part, dict) else part for part in content]
    return _whole("".join(text for text in texts if isinstance(text, str)))


def _whole(text: str) -> str:
    """The text without half emoji (lone surrogates), which no file can hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_failure(status: int, error: object, wait: float | None = None) -> Outcome:
    """What an error means: `error` is the endpoint's own object or text, inside a status of 200 too."""
    if isinstance(error, list) and error and isinstance(error[0], dict):  # Gemini
        error = error[0].get("error") or error[0]
    fields = error if isinstance(error, dict) else {"message": error}
    inside = status == 200  # a gateway: the status of the provider behind it, where it says
    if inside:
        codes = (str(fields.get(name)) for name in ("code", "status"))
        status = next((int(x) for x in codes if re.fullmatch("[45][0-9][0-9]", x)), 502)
    words = " ".join(str(fields.get(name) or "") for name in ("code", "type", "message"))
    detail = fields.get("metadata") or fields.get("details") or ""
    said = _wait_said(f"{words} {detail}") if status == 429 else None
    wait = said if wait is None else wait
    # Gemini says "exceeded your current quota" of a minute's limit too, and then how long to wait
    broke = (inside or 400 <= status < 500) and bool(NO_CREDIT.search(words)) and said is None
    flagged = status == 403 and bool(re.search("moderation|flagged", f"{words} {detail}", re.I))
    too_long = wait is not None and wait > LONGEST_WAIT
    daily = status == 429 and bool(DAILY_LIMIT.search(f"{words} {detail}"))
    lasting = broke or daily or too_long or (status in ADVICE and not flagged)
    advice = ADVICE[402] if broke else "a daily limit" if daily else ADVICE.get(status, "")
    advice = f"it asks to wait {wait:.0f} s" if too_long else advice
    problem = f"HTTP {status}: {_excerpt(fields.get('message') or error)}"
    problem += f" {_excerpt(detail)}" * bool(detail) + f" ({advice})" * bool(advice)
    passing = not lasting and (status in (408, 409, 425, 429) or status >= 500)
    return Outcome(
        problem=problem, passing=passing, lasting=lasting, throttled=status == 429, wait=wait
    )


def _wait_said(text: str) -> float | None:
    """Seconds that the words of an error ask to wait; None where they do not."""
    match = _WAIT.search(text)
    if not match:
        return None
    parts = re.findall(r"(\d+(?:\.\d+)?) ?(ms|[hms])", match[1] or match[2], re.I)
    return sum(float(number) * _SECONDS[unit.lower()] for number, unit in parts) if parts else None


def _excerpt(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text[:300]


def read_response(response) -> tuple[Outcome, object]:
    """The outcome of an HTTP response whose body has been read, and that body as JSON (None: it is none)."""
    try:
        answer = json.loads(response.content)
    except ValueError:
        answer = None
    if response.status_code != 200:
        fields = answer if isinstance(answer, dict) else {}
        error = fields.get("error") or fields.get("detail") or answer or response.text
        wait = retry_after(response.headers.get("retry-after"))
        return read_failure(response.status_code, error, wait), answer
    if answer is None:
        kind = response.headers.get("content-type", "")
        what = "a stream" if "event-stream" in kind else f"malformed {kind or 'text'}"
        problem = f"{what} came in the place of JSON: {_excerpt(response.text)}"
        return Outcome(problem=problem, passing=True), None
    return read_answer(answer), answer


def count_tokens(answer: object, side: str) -> int | None:
    """Tokens that an endpoint counted ("prompt", "completion"); None where it did not, or wrote null."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    count = usage.get(f"{side}_tokens") if isinstance(usage, dict) else None
    counted = type(count) in (int, float) and 0 <= count < math.inf
    return int(count) if counted else None
