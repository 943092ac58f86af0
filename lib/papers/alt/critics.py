"""Who gives the feedback: a scorer, a word list, the rubric, or a language model; and the control."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from lib import runtime, scorers
from lib.answers import first_line, parse_whole, without_reasoning
from lib.chat import ChatClient, Reply, chat, with_defaults
from lib.papers.alt import labels
from lib.rewards import Judge

Feedback = Callable[[Sequence[str], Sequence[str]], list[dict]]  # -> score, feedback, attributes


def scored(judge: Judge, **attributes: Judge) -> Feedback:
    """Feedback in numbers: a reward model's `score`, or any judge; further judges give attributes.

    NaN stands for a score that could not be had.
    """

    def ask(prompts, responses):
        columns = [fn(prompts, responses) for fn in (judge, *attributes.values())]
        rows = [list(map(_number, row)) for row in zip(*columns, strict=True)]
        return [
            {"score": row[0], "attributes": dict(zip(attributes, row[1:], strict=True))}
            for row in rows
        ]

    return ask


def as_plain(verdict: dict) -> dict:
    """A verdict whose score and attributes are floats that a file can hold, or None where there is none."""
    plain = dict(verdict)
    if "score" in plain:
        plain["score"] = _number(plain["score"])
    if plain.get("attributes"):
        plain["attributes"] = {k: _number(v) for k, v in plain["attributes"].items()}
    return plain


def _number(value) -> float | None:
    return float(value) if labels.is_number(value) else None


def from_scorer(scorer: scorers.Scorer, sign: float = 1.0) -> Judge:
    """A text scorer as a judge of the response alone: sign x clipped logit; -1 where high is bad."""
    return lambda prompts, responses: sign * scorer.logit(list(responses))


def without_words(judge: Judge, words: Sequence[str]) -> Judge:
    """The judge, blind to these words: parroting the condition earns nothing."""
    pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})\b", re.I)

    def ask(prompts, responses):
        return judge(prompts, [" ".join(pattern.sub(" ", text).split()) for text in responses])

    return ask


def shuffled(feedback: Feedback, seed: int = 0) -> Feedback:
    """The control: a round's verdicts dealt out at random, so a label tells nothing of its response."""

    def ask(prompts, responses):
        answers = feedback(prompts, responses)
        draw = int(runtime.content_hash(seed, list(prompts), list(responses))[:15], 16)
        return [answers[i] for i in np.random.default_rng(draw).permutation(len(answers))]

    return ask


@dataclass(frozen=True)
class Axis:
    """One thing a critic looks at: met where low <= judge <= high, and what it then says."""

    judge: Judge
    low: float
    high: float
    good: tuple[str, ...]
    bad: tuple[str, ...]


def axes_critic(axes: Sequence[Axis], *, max_words: int = 10, seed: int = 0) -> Feedback:
    """A critic that works offline: praise, "but", blame, in at most `max_words` words; a point an axis.

    Wording varies with the response.  A response whose judge gives NaN gets no feedback.
    """

    def say(prompt, response, met):
        draw = int(runtime.content_hash(seed, prompt, response)[:8], 16)
        texts = [axis.good if ok else axis.bad for axis, ok in zip(axes, met, strict=True)]
        said = [some[draw % len(some)] for some in texts]
        praise = [text for text, ok in zip(said, met, strict=True) if ok]
        blame = [text for text, ok in zip(said, met, strict=True) if not ok]
        return " but ".join(" and ".join(part) for part in (praise, blame) if part)

    def ask(prompts, responses):
        values = np.array([axis.judge(prompts, responses) for axis in axes], dtype=float).T
        rows = []
        for prompt, response, row in zip(prompts, responses, values, strict=True):
            met = [axis.low <= value <= axis.high for axis, value in zip(axes, row, strict=True)]
            text = say(prompt, response, met)
            if len(text.split()) > max_words:
                raise ValueError(
                    f"feedback {text!r} is over {max_words} words; shorten the phrases."
                )
            known = {"score": float(sum(met)), "feedback": text}
            rows.append(dict.fromkeys(known) if np.isnan(row).any() else known)
        return rows

    return ask


_CRITIQUE = re.compile(
    r"analysis\W*:\s*(?P<analysis>.+?)\s*feedback\W*:\s*(?P<feedback>.+?)\s*score\W*:(?P<score>.*)",
    re.I | re.S,
)


def parse_critique(text: str | None, best: int = 3, max_words: int = 10) -> dict | None:
    """analysis, feedback and score (0 to best) under their headings, or None where one is unusable.

    Any reasoning before is left out.  The score is one whole number, as `answers.parse_whole` reads it.
    """
    match = _CRITIQUE.search(without_reasoning(text or ""))
    if not match:
        return None
    analysis = match["analysis"].strip(" *#\n")
    sentence = match["feedback"].strip(" *#\n\"'")
    score, _ = parse_whole(first_line(match["score"]), 0, best)
    if not sentence or "\n" in sentence or len(sentence.split()) > max_words or score is None:
        return None
    return {"analysis": analysis, "feedback": sentence, "score": float(score)}


def llm_categories(
    client: ChatClient, names: Sequence[str], examples: Sequence[tuple[str, str, str]], *,
    task: str = "Judge the last response to its prompt.", attempts: int = 2, **parameters,
) -> Feedback:  # fmt: skip
    """Feedback from fixed labels, best first, shown by examples (prompt, response, label) (ALT_LMC).

    What names no label is asked again, then missing.  `parameters` go to the endpoint (default temperature 0,
    max_tokens 12).  ValueError where an example has another label.
    """
    if wrong := [label for _, _, label in examples if label not in names]:
        raise ValueError(f"examples have labels {wrong}; allowed: {', '.join(names)}.")
    shots = "\n\n".join(f"Prompt: {p}\nResponse: {r}\nFeedback: {f}" for p, r, f in examples)
    rule = f"Answer with one of: {'; '.join(names)}."
    head = f"{task} {rule}\n\n{shots}\n\n"
    options = with_defaults({"temperature": 0, "max_tokens": 12}, parameters)

    def parse(text):
        name = labels.parse_category(text, names)
        return name and {"feedback": name, "score": float(len(names) - 1 - names.index(name))}

    def request(prompt, response):
        return chat(f"{head}Prompt: {prompt}\nResponse: {response}\nFeedback:", **options)

    return _asked(client, request, parse, attempts, rule)


def llm_critique(
    client: ChatClient, task: str, axes: Sequence[str], *, attempts: int = 5,
    max_words: int = 10, **parameters,
) -> Feedback:  # fmt: skip
    """Analysis, a sentence of feedback and a point for each axis, in the model's own words (ALT_LMU).

    What misses a heading, or is too long, is asked again, then missing.  `parameters` go to the endpoint
    (default temperature 0, max_tokens 300).
    """
    options = with_defaults({"temperature": 0, "max_tokens": 300}, parameters)
    listed = "\n".join(f"{i}. {axis}" for i, axis in enumerate(axes, 1))
    rule = (
        "Answer under three headings.\nAnalysis: what you find on each point.\nFeedback: one sentence of at "
        f"most {max_words} words, with strengths and weaknesses.\nScore: 0 to {len(axes)}, one point for "
        "each of the above that is met."
    )
    head = f"{task} Look at:\n{listed}\n\n{rule}"

    def request(prompt, response):
        return chat(f"{head}\n\nPrompt:\n{prompt}\n\nResponse:\n{response}", **options)

    parse = partial(parse_critique, best=len(axes), max_words=max_words)
    return _asked(client, request, parse, attempts, rule)


def _asked(
    client: ChatClient, request: Callable, parse: Callable, attempts: int, rule: str
) -> Feedback:
    """Feedback by a chat model: up to `attempts` requests a response, until `parse` can read a reply."""

    def ask(prompts, responses):
        requests = [request(*pair) for pair in zip(prompts, responses, strict=True)]
        rows: list[dict] = [{"score": None, "feedback": None} for _ in requests]
        left = list(range(len(requests)))
        for _ in range(attempts):
            if not left:
                break
            replies = client.ask([requests[i] for i in left], on_error="keep")
            unread = {}
            for i, reply in zip(left, replies, strict=True):
                row = parse(reply.text)
                if row:
                    rows[i] = row
                elif reply.answer or reply.finish_reason != "length":  # no limit is too short twice
                    unread[i] = _once_more(requests[i], reply, rule)
            left = list(unread)
            for i in left:
                requests[i] = unread[i]
        return rows

    return ask


def _once_more(request: dict, reply: Reply, rule: str) -> dict:
    """The request after a reply that could not be read: a sampling model is asked for another.

    At temperature 0 it would say the same again, so it is shown its reply and the rule.
    """
    if (
        reply.text is None
    ):  # nothing was bought, so nothing is stored: the same request is sent again
        return request
    request = request | {"replicate": request["replicate"] + 1}
    if request.get("temperature") != 0:
        return request
    shown = {"role": "assistant", "content": reply.answer or "(no answer)"}
    correction = {"role": "user", "content": f"That answer cannot be read. {rule}"}
    return request | {"messages": [*request["messages"], shown, correction]}
