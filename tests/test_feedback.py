"""Feedback from language models, against real loopback endpoints (bench/endpoint.py)."""

import asyncio
import csv
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lib import feedback, models, preferences

HARD = ["None", "NA", "nan", 'say "hi", then go', "two\r\nlines", "=1+1", "emoji 🙂 \u2028 ü", "-"]


class Server:
    """An endpoint in its own process."""

    def __init__(self, **options):
        command = [
            sys.executable,
            str(Path(__file__).parents[1] / "bench" / "endpoint.py"),
            json.dumps(options),
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}/v1"

    def log(self):
        rows = json.load(urllib.request.urlopen(self.url.replace("/v1", "/log")))
        return pd.DataFrame(rows, columns=["at", "prompt", "outcome"])


@pytest.fixture
def server():
    started = []

    def start(**options):
        started.append(Server(**options))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()


def client(server, folder, **options):
    options = {"timeout": 5.0, "first_pause": 0.02, "cache": folder / "replies.sqlite"} | options
    return feedback.ChatClient("m", base_url=server.url, **options)


def questions(n):
    return [feedback.chat(f"question {i}", max_tokens=4) for i in range(n)]


# --- the client ----------------------------------------------------------------------------------


def test_order_duplicates_and_cache(server, tmp_path):
    one = server()
    asked = questions(20) + questions(5)
    replies = client(one, tmp_path).ask(asked)
    assert [r.text for r in replies] == [r["messages"][0]["content"][::-1] for r in asked]
    assert replies[0].tokens("prompt") == 100 and replies[0].parameters == {"max_tokens": 4}
    assert len(one.log()) == 20
    again = feedback.ChatClient(
        "m", base_url="http://127.0.0.1:9/v1", cache=tmp_path / "replies.sqlite"
    )
    assert all(r.cached for r in again.ask(asked))  # neither address nor key is part of the name
    client(one, tmp_path).ask([feedback.chat("question 0", max_tokens=4, replicate=1)])
    client(one, tmp_path).ask([feedback.chat("question 0", max_tokens=5)])
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
    one = server(script=["ok", "429:1", "ok"], delay=0)
    client(one, tmp_path, concurrency=1).ask(questions(2))
    assert 1.0 <= np.diff(one.log()["at"])[1] < 3
    run = feedback._Run(client(one, tmp_path, first_pause=0.5), {}, "", True)
    waits = [[run._wait(feedback._PassingError("x"), k) for _ in range(200)] for k in (1, 4, 12)]
    assert max(waits[0]) <= 1 < max(waits[1]) <= 8 < max(waits[2]) <= feedback.LONGEST_PAUSE
    assert min(waits[1]) < 2  # full jitter


@pytest.mark.parametrize("status", ["401", "403", "404", "400"])
def test_what_another_try_would_repeat_stops_at_once(server, tmp_path, status, monkeypatch):
    monkeypatch.setenv("SECRET_OF_TEST", "sk-very-secret")
    one = server(script=["ok"] * 3 + [f"{status}!bad sk-very-secret"] * 50)
    asking = client(one, tmp_path, concurrency=2, key_name="SECRET_OF_TEST")
    with pytest.raises(feedback.EndpointError, match=f"HTTP {status}") as caught:
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
    dead = feedback.ChatClient(
        "m", base_url="http://127.0.0.1:9/v1", cache=tmp_path / "r.sqlite", first_pause=0.01
    )
    with pytest.raises(feedback.EndpointError, match="no answer in 6 attempts"):
        dead.ask(questions(3), on_error="keep")


def test_bad_settings_and_missing_key(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("FEEDBACK_ROOT", str(tmp_path))
    with pytest.raises(ValueError, match="max_cost needs price"):
        feedback.ChatClient("m", base_url="http://x/v1", max_cost=1)
    with pytest.raises(ValueError, match="concurrency is 0"):
        feedback.ChatClient("m", base_url="http://x/v1", concurrency=0)
    remote = feedback.ChatClient("m", base_url="http://example.org/v1", cache=tmp_path / "r")
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
    with pytest.raises(feedback.BudgetReached, match="max_cost") as caught:
        asking.ask(questions(100))
    done = [r for r in caught.value.replies if r is not None]
    assert 30 - 8 <= len(done) <= 30 and len(done) == len(one.log())
    assert asking.spent <= asking.max_cost * 1.001
    more = client(one, tmp_path)
    more.ask(questions(100))
    assert more.sent == 100 - len(done)


# --- kills and parallel runs ---------------------------------------------------------------------


def _ask_all(url, folder, n, rate):
    class At:
        pass

    At.url = url
    client(At, Path(folder), requests_per_second=rate, concurrency=16, timeout=3.0).ask(
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
        process = _process(one.url, tmp_path, n, 150)
        time.sleep(draw.uniform(0.3, 0.8))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills.append(time.time())
    process = _process(one.url, tmp_path, n, 150)
    process.join(50)
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
        started.join(50)
    assert [p.exitcode for p in processes] == [0, 0, 0]
    assert one.log()["prompt"].is_unique and len(one.log()) == 120


def test_keyboard_interrupt_keeps_what_is_answered(server, tmp_path):
    one = server(delay=0.02)
    asking = client(one, tmp_path, concurrency=4)
    threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        asking.ask(questions(2000))
    answered = len(one.log())
    assert 0 < answered < 2000
    assert asking.estimate(questions(2000))["cached"] == answered


def test_load_5000_calls_with_faults(server, tmp_path):
    """30 % faults and a rate limit: each answered once, none again after it, near the limit's pace."""
    n, rate = 5000, 150
    one = server(rate=rate, faults=0.3)
    asking = client(one, tmp_path, requests_per_second=rate, concurrency=128, timeout=8.0)
    replies = asking.ask(questions(n))
    assert [r.text for r in replies] == [f"question {i}"[::-1] for i in range(n)]
    log = one.log()
    assert (log["outcome"] == "ok").sum() == n  # once each: all n are among the replies
    assert set(log["outcome"]) >= {"429", "500", "timeout", "half", "malformed"}
    admitted = log[log["outcome"] != "over"]["at"].to_numpy()
    span = 1500  # the best 10 s of the run: other work on the machine is not the client's doing
    assert span / (admitted[span:] - admitted[:-span]).min() >= 0.9 * rate
    assert len(admitted) / (admitted[-1] - admitted[0]) >= 0.5 * rate


# --- parsing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, score, status",
    [
        ("6", 6, "ok"), (" 6 \n", 6, "ok"), ("6/7", 6, "ok"), ("Rating: 6", 6, "ok"), ("7.", 7, "ok"),
        ("\n\n**5**\nbecause", 5, "ok"), ("6 out of 7", 6, "ok"), ("Overall score = 2", 2, "ok"),
        ("0", None, "out_of_range"), ("8", None, "out_of_range"), ("-3", None, "out_of_range"),
        ("10", None, "out_of_range"), ("9" * 50, None, "out_of_range"), ("6.5", None, "unparsed"),
        ("6/10", None, "unparsed"), ("６", None, "unparsed"), ("٦", None, "unparsed"),
        ("six", None, "unparsed"), ("I give 6", None, "unparsed"), ("5-6", None, "unparsed"),
        ("", None, "empty"), (" \n ", None, "empty"), (None, None, "no_reply"),
    ],
)  # fmt: skip
def test_parse_rating(text, score, status):
    assert feedback.parse_rating(text) == (score, status)


def test_reference_rule_for_ratings():
    rule = feedback.parse_rating_reference
    assert [rule(t) for t in ("6\nwhy", "0", "8", "６")] == [6, 0, 8, 6]
    assert [rule(t) for t in (" 6", "6/7", "½", "", "6.5")] == [None] * 5


@pytest.mark.parametrize(
    "text, letter, status",
    [
        ("Output (a)", "(a)", "ok"), (" output (B).", "(b)", "ok"), ("(a)", "(a)", "ok"),
        ("b", "(b)", "ok"), ("Answer: B", "(b)", "ok"), ("**Output (a)**\nBecause", "(a)", "ok"),
        ("Output (a): it rhymes", "(a)", "ok"), ("Output (a) or Output (b)", None, "ambiguous"),
        ("A better answer", None, "unparsed"), ("Output (a) is worse", None, "unparsed"),
        ("a, b", None, "unparsed"), ("Neither", None, "unparsed"), ("Equal", None, "out_of_range"),
        ("", None, "empty"), (None, None, "no_reply"),
    ],
)  # fmt: skip
def test_parse_verdict(text, letter, status):
    assert feedback.parse_verdict(text) == (letter, status)


def test_equal_counts_where_it_is_offered():
    assert feedback.parse_verdict("Equal.", equal=True) == ("equal", "ok")
    assert feedback._verdict("(a)", "equal") == "equal" == feedback._verdict("equal", "equal")
    assert feedback._verdict("(a)", "(b)") == "(a)" and feedback._verdict(None, "equal") is None
    assert "Equal" in feedback.ranking_prompt("i", "", "x", "y", equal=True)
    assert "Equal" not in feedback.ranking_prompt("i", "", "x", "y")


# --- the protocols -------------------------------------------------------------------------------

ITEMS = [
    {"instruction": "Say hello", "input": "", "responses": ["hello", "go away", "None"]},
    {"instruction": "Sum up", "input": "A text.", "responses": ["text", "NA", "x {y} %s"]},
]


def test_prompts_hold_the_item_and_no_nan():
    table = preferences.to_ratings_table(ITEMS).assign(
        input=lambda t: t["input"].replace("", np.nan)
    )
    prompts = [r["messages"][0]["content"] for r in feedback.rating_requests(table)]
    assert not any("nan" in p.lower() for p in prompts)
    assert "Input:\nA text." in prompts[3] and prompts[0].count("Input:") == 1  # the example's
    assert prompts[5].endswith("Answer: x {y} %s\nGrade:")
    a, b = feedback.ranking_requests(preferences.to_rankings_table(ITEMS))[:2]
    assert a["messages"][0]["content"].endswith("Output (a): hello\nOutput (b): go away\nBetter:")
    assert b["messages"][0]["content"].endswith("Output (a): go away\nOutput (b): hello\nBetter:")


def test_rate_and_rank(server, tmp_path):
    asking = client(server(say="6/7"), tmp_path)
    ratings = feedback.rate(asking, preferences.to_ratings_table(ITEMS))
    assert feedback.usable(ratings)["score"].tolist() == [6] * 6
    assert set(ratings["status"]) == {"ok"} and ratings["prompt_tokens"].tolist() == [100] * 6
    assert ratings["id"].is_unique and ratings["reply"].tolist() == ["6/7"] * 6
    judge = client(server(say="Output (a)"), tmp_path, cache=tmp_path / "other.sqlite")
    rankings = feedback.rank(judge, preferences.to_rankings_table(ITEMS))
    assert rankings["verdict"].tolist() == ["equal"] * 6  # followed position
    assert not preferences.judge_report(ratings, rankings)["passes"].all()
    outside = client(server(say="8"), tmp_path, cache=tmp_path / "third.sqlite")
    lost = feedback.rate(outside, preferences.to_ratings_table(ITEMS))
    assert lost["score"].isna().all() and not len(feedback.usable(lost))


def test_only_the_missing_half_of_a_pair_is_asked_again(server, tmp_path):
    pairs = preferences.to_rankings_table(ITEMS)
    script = ["ok"] * 5 + ["400!odd"] + ["ok"] * 6
    one = server(script=script, say="Output (b)")
    first = feedback.rank(client(one, tmp_path, concurrency=1), pairs)
    assert first["verdict"].isna().sum() == 1 and first["status"].tolist().count("no_reply") == 1
    assert first["first"].notna().all()
    second = feedback.rank(client(one, tmp_path, concurrency=1), pairs)
    assert second["verdict"].notna().all() and len(one.log()) == 12 + 1


def test_generate(server, tmp_path):
    one = server()
    items = feedback.generate(client(one, tmp_path), ITEMS, n=3, max_tokens=9)
    assert [len(item["responses"]) for item in items] == [3, 3]
    assert items[1]["responses"][0] == "Sum up\n\nA text."[::-1] and len(one.log()) == 6


def test_tables_are_checked():
    with pytest.raises(ValueError, match="lacks the columns response"):
        feedback.rating_requests(pd.DataFrame({"instruction": ["x"], "input": [""]}))
    bad = pd.DataFrame({"instruction": ["x"], "input": [""], "response": [None]})
    with pytest.raises(ValueError, match="row 0: response is None"):
        feedback.rating_requests(bad)


# --- files ---------------------------------------------------------------------------------------


def hard_ratings():
    return pd.DataFrame({"instruction": "i", "input": "", "response": HARD}, dtype=object)


def test_jsonl_round_trip(server, tmp_path):
    table = feedback.rate(client(server(say="x"), tmp_path), hard_ratings())
    path = feedback.write_jsonl(table, tmp_path / "log.jsonl")
    assert len(path.read_bytes().split(b"\n")) == len(HARD) + 1
    pd.testing.assert_frame_equal(feedback.read_jsonl(path), table, check_dtype=False)


def fill(path, answer):
    with path.open(encoding="utf-8-sig", newline="") as handle:
        header, *rows = list(csv.reader(handle))
    with path.open("w", encoding="utf-8-sig", newline="") as handle:
        csv.writer(handle).writerows([header, *([*row[:-1], answer(row)] for row in rows)])
    return header, rows


def test_human_ratings_round_trip(tmp_path):
    table = hard_ratings().assign(id="secret-id", model="secret-model")
    path = feedback.export_for_humans(table, tmp_path / "sheet.csv")
    assert "secret" not in path.read_text(encoding="utf-8-sig")
    grades = {feedback.sheet_text(text): 1 + k % 7 for k, text in enumerate(HARD)}
    _, rows = fill(path, lambda row: str(grades[feedback.sheet_text(row[2])]))
    assert [r[2] for r in rows] != HARD and "'=1+1" in [r[2] for r in rows]
    found = feedback.import_from_humans(path, table)
    assert found["response"].tolist() == HARD
    assert found["score"].tolist() == [1 + k % 7 for k in range(len(HARD))]


def test_human_rankings_round_trip(tmp_path):
    table = preferences.to_rankings_table(
        [{"instruction": "i", "input": "", "responses": ["a", "bb", "ccc", "dddd", "eeeee"]}]
    )
    path = feedback.export_for_humans(table, tmp_path / "sheet.csv")
    _, rows = fill(path, lambda row: "A" if len(row[2]) > len(row[3]) else "b")
    assert 0 < sum(len(r[2]) > len(r[3]) for r in rows) < 10  # both orders are shown
    found = feedback.import_from_humans(path, table)
    assert found["verdict"].tolist() == ["(b)"] * 10  # the longer one, wherever it stood


def test_bad_human_answers(tmp_path):
    table = hard_ratings()
    path = feedback.export_for_humans(table, tmp_path / "sheet.csv")
    fill(path, lambda row: "8")
    with pytest.raises(ValueError, match=r"sheet.csv, line 2: answer '8'; allowed: a whole number"):
        feedback.import_from_humans(path, table)
    fill(path, lambda row: "")
    with pytest.warns(UserWarning, match="8 of 8 rows have no answer"):
        assert not len(feedback.import_from_humans(path, table))
    fill(path, lambda row: "3")
    with pytest.raises(ValueError, match="not in the table"):
        feedback.import_from_humans(path, table.iloc[1:])
    with pytest.raises(ValueError, match="lacks the columns"):
        feedback.import_from_humans(path, preferences.to_rankings_table(ITEMS))


# --- a local endpoint ----------------------------------------------------------------------------


def test_serve_a_local_model(tmp_path):
    pytest.importorskip("fastapi", reason="transformers serve needs transformers[serving]")
    model, tokenizer = models.build_tiny_model("tiny")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "tiny")
    with pytest.raises(ZeroDivisionError), feedback.serve(tmp_path / "tiny") as (url, name):
        asking = feedback.ChatClient(name, base_url=url, cache=tmp_path / "r.sqlite")
        reply = asking.ask([feedback.chat("the cat", max_tokens=3, temperature=0.0)])[0]
        assert reply.tokens("completion") == 3
        raise ZeroDivisionError
    with pytest.raises(OSError):
        urllib.request.urlopen(url.replace("/v1", "/health"), timeout=2)
