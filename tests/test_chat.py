"""The chat client, against real loopback endpoints (bench/endpoint.py)."""

import asyncio
import email.utils
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import completion

from lib import chat


def client(server, folder, **options):
    options = {"timeout": 20.0, "first_pause": 0.02, "cache": folder / "replies.sqlite"} | options
    return chat.ChatClient("m", base_url=server.url, **options)


def questions(n):
    return [chat.chat(f"question {i}", max_tokens=4) for i in range(n)]


# --- the client ----------------------------------------------------------------------------------


def test_order_duplicates_and_cache(server, tmp_path):
    one = server()
    asked = questions(20) + questions(5)
    replies = client(one, tmp_path).ask(asked)
    assert [r.text for r in replies] == [r["messages"][0]["content"][::-1] for r in asked]
    assert replies[0].tokens("prompt") == 100 and replies[0].parameters == {"max_tokens": 4}
    assert len(one.log()) == 20
    again = chat.ChatClient(
        "m", base_url="http://127.0.0.1:9/v1", cache=tmp_path / "replies.sqlite"
    )
    assert all(r.cached for r in again.ask(asked))  # neither address nor key is part of the name
    client(one, tmp_path).ask([chat.chat("question 0", max_tokens=4, replicate=1)])
    client(one, tmp_path).ask([chat.chat("question 0", max_tokens=5)])
    assert len(one.log()) == 22


def test_works_inside_a_running_event_loop(server, tmp_path):
    one = server()

    async def cell():
        return client(one, tmp_path).ask(questions(3))

    assert len(asyncio.run(cell())) == 3


def test_passing_failures_are_tried_again(server, tmp_path):
    script = ["ok", "500", "429", "half", "malformed", "no choices", "timeout", "503", "408"]
    one = server(script=script)
    asking = client(one, tmp_path, timeout=1.0, concurrency=1)
    assert [r.text for r in asking.ask(questions(2))] == ["0 noitseuq", "1 noitseuq"]
    assert one.log()["outcome"].tolist() == [*script, "ok"]


def test_backoff_grows_and_retry_after_is_honoured(server, tmp_path):
    one = server(script=["503", "503", "503", "503", "429:1", "ok"], delay=0)
    client(one, tmp_path, first_pause=0.2, concurrency=1).ask(questions(1))
    waits = np.diff(one.log()["at"])
    assert (
        0.1 <= waits[0] <= 0.6 and 0.8 <= waits[3] <= 2.2
    )  # 0.2 s, doubled three times, with jitter
    assert 1.0 <= waits[4] < 3


@pytest.mark.parametrize("status", ["401", "403", "404", "400"])
def test_what_another_try_would_repeat_stops_at_once(server, tmp_path, status, monkeypatch):
    monkeypatch.setenv("SECRET_OF_TEST", "sk-very-secret")
    one = server(script=["ok"] * 3 + [f"{status}!bad sk-very-secret"] * 50)
    asking = client(one, tmp_path, concurrency=2, key_name="SECRET_OF_TEST")
    with pytest.raises(chat.EndpointError, match=f"HTTP {status}") as caught:
        asking.ask(questions(40))
    assert len(one.log()) <= 5
    assert sum(r is not None for r in caught.value.replies) == 3
    assert "sk-very-secret" not in str(caught.value)
    assert not any(b"sk-very-secret" in p.read_bytes() for p in tmp_path.iterdir())


def test_one_refused_request_is_kept_apart(server, tmp_path):
    one = server(script=["ok", "ok", "400!too long", "ok"])
    replies = client(one, tmp_path, concurrency=1).ask(questions(5), on_error="keep")
    assert [r.text is None for r in replies] == [False, False, True, False, False]
    assert "too long" in replies[2].error


def test_a_server_that_never_answers_is_given_up_on(tmp_path):
    dead = chat.ChatClient(
        "m", base_url="http://127.0.0.1:9/v1", cache=tmp_path / "r.sqlite", first_pause=0.01
    )
    with pytest.raises(chat.EndpointError, match="no answer in 6 attempts"):
        dead.ask(questions(3), on_error="keep")


def test_bad_settings_and_missing_key(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("FEEDBACK_ROOT", str(tmp_path))
    with pytest.raises(ValueError, match="max_cost needs price"):
        chat.ChatClient("m", base_url="http://x/v1", max_cost=1)
    with pytest.raises(ValueError, match="concurrency is 0"):
        chat.ChatClient("m", base_url="http://x/v1", concurrency=0)
    remote = chat.ChatClient("m", base_url="http://example.org/v1", cache=tmp_path / "r")
    with pytest.raises(ValueError, match="OPENAI_API_KEY"):
        remote.ask(questions(1))


def test_dry_run(server, tmp_path):
    one = server()
    asking = client(one, tmp_path, price=(1.0, 10.0), requests_per_second=2)
    asking.ask(questions(3))
    plan = asking.estimate(questions(10) + questions(2))
    assert (plan["calls"], plan["cached"], plan["to_buy"]) == (12, 5, 7)
    assert plan["input_tokens"] == 7 * (3 + 4) and plan["output_tokens"] == 7 * 4
    assert plan["cost"] == pytest.approx((49 * 1 + 28 * 10) / 1e6) and plan["seconds"] == 3.5
    assert len(one.log()) == 3
    assert client(one, tmp_path).estimate(questions(2))["cost"] is None


@pytest.mark.parametrize("usage", [True, False])
def test_spending_cap(server, tmp_path, usage):
    one = server(usage=usage)
    tokens = 110 if usage else 7 + 4  # the endpoint's count, or the estimate
    asking = client(one, tmp_path, price=(1e4, 1e4), max_cost=30 * tokens / 100, concurrency=8)
    with pytest.raises(chat.BudgetReached, match="max_cost") as caught:
        asking.ask(questions(100))
    done = [r for r in caught.value.replies if r is not None]
    assert 30 - 8 <= len(done) <= 30 and len(done) == len(one.log())
    assert asking.spent <= asking.max_cost * 1.001
    more = client(one, tmp_path)
    more.ask(questions(100))
    assert more.sent == 100 - len(done)


# --- what comes in is read once -------------------------------------------------------------------


def ask_one(server, folder, **options):
    """(client, reply) of one request, tried twice."""
    asking = client(server, folder, **{"attempts": 2, **options})
    return asking, asking.ask([chat.chat("Hi", max_tokens=4)], on_error="keep")[0]


def test_content_in_parts_is_one_text(scripted, tmp_path):
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "a 2? no"}]}
    parts = [thinking, {"type": "text", "text": "6"}, {"type": "text", "text": "/7"}]
    one = scripted(lambda body: completion(parts))
    for _ in range(2):  # the second time from the store
        _, reply = ask_one(one, tmp_path)
        assert reply.text == "6/7"
    assert len(one.asked) == 1


def test_a_limit_without_a_time_is_not_stormed(scripted, tmp_path):
    left = [429] * 3
    one = scripted(lambda body: (left.pop(), {}, {}) if left else completion("6"))
    started = time.monotonic()
    asking = client(one, tmp_path, attempts=1, first_pause=0.2)  # no try of the package's own
    assert asking.ask(questions(1))[0].text == "6"
    assert time.monotonic() - started > 0.2 + 0.4 + 0.8


def test_half_an_emoji_does_not_get_in(scripted, tmp_path):
    one = scripted(lambda body: completion("so \ud83d so"))
    assert ask_one(one, tmp_path)[1].text == "so \ufffd so"


@pytest.mark.parametrize("usage", [None, {}, [], {"prompt_tokens": 7, "completion_tokens": None}])
def test_what_was_not_counted_is_estimated(scripted, tmp_path, usage):
    one = scripted(lambda body: completion("6") | {"usage": usage})
    asking, reply = ask_one(one, tmp_path, price=(1e6, 1e6), max_cost=100.0)
    assert reply.text == "6" and reply.tokens("completion") is None
    assert asking.spent == (7 if usage else 1 + 4) + 4  # 4 tokens of output at most


CHOICE_ERROR = {"finish_reason": "error", "error": {"code": 502, "message": "overloaded upstream"}}
FAILURES_IN_200 = {
    "error object": ({"choices": None, "error": {"message": "overloaded upstream"}}, "overloaded"),
    "error in the choice": (
        {"choices": [{"message": {"content": ""}, **CHOICE_ERROR}]},
        "overloaded",
    ),
    "error as text": ({"error": "model is loading"}, "is loading"),
    "no choices": ({"choices": []}, "without a message"),
    "a list": ([1], "no JSON object"),
    "content of another kind": (completion({"text": "6"}), "without a message"),
    "a stream": (b'data: {"choices": []}\n\ndata: [DONE]\n\n', "a stream came"),
    "a page": (b"<html>log in</html>", "<html>"),
}


@pytest.mark.parametrize("kind", FAILURES_IN_200)
def test_a_failure_inside_a_200_is_tried_again_and_never_stored(scripted, tmp_path, kind):
    value, words = FAILURES_IN_200[kind]
    headers = {"Content-Type": "text/event-stream"} if kind == "a stream" else {}
    answers = [(200, value, headers), completion("6")]
    one = scripted(lambda body: answers.pop(0) if len(answers) > 1 else answers[0])
    assert ask_one(one, tmp_path)[1].text == "6"
    broken = scripted(lambda body: (200, value, headers))
    asking = client(broken, tmp_path, attempts=2, cache=tmp_path / "other.sqlite")
    with pytest.raises(chat.EndpointError, match=words):
        asking.ask([chat.chat("Hi")])
    assert len(asking.store) == 0 and len(broken.asked) == 2


NO_ANSWERS = {
    "refusal": (completion(None, refusal="I will not."), "refused: I will not", 1),
    "filter": (completion("6 beca", "content_filter"), "filter", 1),
    "reasoning to the limit": (completion("<think>6? 5?", "length"), "max_completion_tokens", 1),
    "nothing to the limit": (completion(None, "length"), "max_completion_tokens", 1),
    "nothing": (completion(""), "an empty answer", 3),
    "only reasoning": (completion("<think>6</think>"), "an empty answer", 3),
}


@pytest.mark.parametrize("kind", NO_ANSWERS)
def test_what_is_no_answer_is_named_and_not_stored(scripted, tmp_path, kind):
    value, words, calls = NO_ANSWERS[kind]
    one = scripted(lambda body: value)
    asking, reply = ask_one(one, tmp_path, attempts=5)
    assert not reply.answer and words in reply.error
    assert len(asking.store) == 0 and len(one.asked) == calls


def test_a_stored_reply_that_is_no_answer_is_bought_again(scripted, tmp_path):
    one = scripted(lambda body: completion("6"))
    asking = client(one, tmp_path)
    request = chat.chat("Hi", max_tokens=4)
    record = {"model": "m", "parameters": {}, "at": "", "seconds": 0.0}
    record["raw"] = {"choices": [{"finish_reason": "error", "message": {"content": ""}}]}
    asking.store.put(asking.key(request), record)
    assert asking.estimate([request])["to_buy"] == 1
    assert asking.ask([request])[0].text == "6"
    assert asking.ask([request])[0].cached and len(one.asked) == 1


def test_a_limit_that_holds_no_answer_stops_early(scripted, tmp_path):
    one = scripted(lambda body: completion("<think>Let me", "length"))
    with pytest.raises(chat.EndpointError, match="max_completion_tokens"):
        client(one, tmp_path, concurrency=1).ask(questions(200), on_error="keep")
    assert len(one.asked) < 10


# --- the account ---------------------------------------------------------------------------------

ACCOUNT = {
    "no balance": (402, "Insufficient Balance", {}),
    "no quota": (429, "You exceeded your current quota, please check your plan", {}),
    "no credit, as a 400": (400, "Your credit balance is too low to access the API", {}),
    "a daily limit": (429, "Rate limit reached on requests per day (RPD): Limit 200", {}),
    "a free tier's day": (429, "Rate limit exceeded: free-models-per-day", {}),
    "a wait of a day": (429, "slow down", {"Retry-After": "86400"}),
}


@pytest.mark.parametrize("kind", ACCOUNT)
def test_what_all_requests_would_meet_stops_the_run(scripted, tmp_path, kind):
    status, message, headers = ACCOUNT[kind]

    def answer(body):
        if len(one.asked) <= 3:
            return completion("6")
        return status, {"error": {"message": message}}, headers

    one = scripted(answer)
    with pytest.raises(chat.EndpointError, match=message[:20].replace("(", ".")) as caught:
        client(one, tmp_path, concurrency=2).ask(questions(60), on_error="keep")
    assert len(one.asked) < 10 and sum(r is not None for r in caught.value.replies) == 3


def test_what_one_request_meets_does_not(scripted, tmp_path):
    def answer(body):
        if "question 1" in body["messages"][0]["content"]:
            flagged = {"message": "flagged by moderation", "metadata": {"reasons": ["violence"]}}
            return 403, {"error": flagged}, {}
        return completion("6")

    replies = client(scripted(answer), tmp_path, concurrency=1).ask(questions(4), on_error="keep")
    assert [r.text for r in replies] == ["6", None, "6", "6"] and "violence" in replies[1].error


@pytest.mark.parametrize("form", ["seconds", "date", "nonsense"])
def test_retry_after_in_its_forms(scripted, tmp_path, form):
    value = {
        "seconds": "1",
        "date": email.utils.formatdate(time.time() + 3, usegmt=True),
        "nonsense": "soon",
    }
    answers = [(429, {"error": {"message": "slow"}}, {"Retry-After": value[form]})]
    one = scripted(lambda body: answers.pop() if answers else completion("6"))
    started = time.monotonic()
    assert ask_one(one, tmp_path)[1].text == "6"
    took = time.monotonic() - started
    assert took < 8 and (took > 0.9 or form == "nonsense")


def test_a_wait_in_an_errors_words_is_kept_to(scripted, tmp_path):
    message = "Rate limit reached. Please try again in 1.2s."
    answers = [(429, {"error": {"message": message}}, {})]
    one = scripted(lambda body: answers.pop() if answers else completion("6"))
    started = time.monotonic()
    assert ask_one(one, tmp_path, first_pause=0.01)[1].text == "6"
    assert 1.1 < time.monotonic() - started < 8


def test_parameters_replace_and_take_back_defaults():
    merged = chat.with_defaults({"max_tokens": 4, "temperature": 0}, {"max_completion_tokens": 900})
    assert merged == {"temperature": 0, "max_completion_tokens": 900}
    assert chat.with_defaults({"max_tokens": 4, "temperature": 0}, {"temperature": None}) == {
        "max_tokens": 4
    }
    assert chat.chat("x", max_tokens=None) == chat.chat("x")
    with pytest.raises(ValueError, match="stream=True"):
        chat.chat("x", stream=True)


# --- kills and parallel runs ---------------------------------------------------------------------


def _ask_all(url, folder, n, rate, timeout=60.0):
    class At:
        pass

    At.url = url
    client(At, Path(folder), requests_per_second=rate, concurrency=16, timeout=timeout).ask(
        questions(n)
    )


def _process(*arguments):
    process = multiprocessing.get_context("fork").Process(target=_ask_all, args=arguments)
    process.start()
    return process


def test_killed_ten_times_nothing_is_lost_or_bought_twice(server, tmp_path):
    """Only a call in flight at a kill may be bought again: at most `concurrency` of them each time."""
    one, n, draw = server(faults=0.2, rate=150), 900, random.Random(1)
    kills = []
    for _ in range(10):
        process = _process(one.url, tmp_path, n, 150, 3.0)
        time.sleep(draw.uniform(0.3, 0.8))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills.append(time.time())
    process = _process(one.url, tmp_path, n, 150, 3.0)
    process.join(200)
    assert process.exitcode == 0
    replies = client(one, tmp_path).ask(questions(n))
    assert all(r.cached and r.text for r in replies)
    log = one.log()
    bought = log[log["outcome"] == "ok"]
    assert bought["prompt"].nunique() == n
    twice = bought[bought["prompt"].duplicated(keep="last")]
    assert len(twice) <= 10 * 16
    for at in twice["at"]:  # its first answer came when a kill was under way
        assert any(-1.0 < killed - at < 1.0 for killed in kills)


def test_parallel_processes_and_threads_buy_once(server, tmp_path):
    one = server(delay=0.05)
    processes = [_process(one.url, tmp_path, 120, None) for _ in range(3)]
    threads = [threading.Thread(target=_ask_all, args=(one.url, tmp_path, 120, None)) for _ in "ab"]
    for thread in threads:
        thread.start()
    for started in [*processes, *threads]:
        started.join(200)
    assert [p.exitcode for p in processes] == [0, 0, 0]
    assert one.log()["prompt"].is_unique and len(one.log()) == 120


def test_keyboard_interrupt_keeps_what_is_answered(server, tmp_path):
    one = server(delay=0.02)
    asking = client(one, tmp_path, concurrency=4)

    def interrupt_once_some_are_answered():
        while len(one.log()) < 10:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt_once_some_are_answered, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        asking.ask(questions(2000))
    answered = len(one.log())
    assert 0 < answered < 2000
    assert asking.estimate(questions(2000))["cached"] == answered


def test_load_3000_calls_with_faults(server, tmp_path):
    """30 % faults and a rate limit: each answered once, none again after it, no pile of waiting calls."""
    n, rate = 3000, 150
    one = server(rate=rate, faults=0.3)
    asking = client(one, tmp_path, requests_per_second=rate, concurrency=128, timeout=8.0)
    replies = asking.ask(questions(n))
    assert [r.text for r in replies] == [f"question {i}"[::-1] for i in range(n)]
    log = one.log()
    assert (log["outcome"] == "ok").sum() == n  # once each: all n are among the replies
    assert set(log["outcome"]) >= {"429", "500", "timeout", "half", "malformed"}
    admitted = log[log["outcome"] != "over"]["at"].to_numpy()
    span = 1500  # the best 10 s of the run: other work on the machine is not the client's doing
    assert span / (admitted[span:] - admitted[:-span]).min() >= 0.5 * rate
