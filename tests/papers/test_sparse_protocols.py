"""Sparse feedback: parsing, the two protocols at a real loopback endpoint, files, sheets, a local model."""

import csv
import urllib.request

import numpy as np
import pandas as pd
import pytest
from conftest import completion

from lib import chat, models, preferences, tables
from lib.papers.sparse_feedback import analysis, conversions, protocols, sheets
from lib.papers.sparse_feedback.serve import serve

HARD = ["None", "NA", "nan", 'say "hi", then go', "two\r\nlines", "=1+1", "emoji 🙂 \u2028 ü", "-"]


def client(server, folder, **options):
    options = {"timeout": 5.0, "first_pause": 0.02, "cache": folder / "replies.sqlite"} | options
    return chat.ChatClient("m", base_url=server.url, **options)


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
        ("<think>\n3?\n</think>\n\n6", 6, "ok"), ("3?\n</think>\nRating: 6", 6, "ok"),
        ("```\n6\n```", 6, "ok"), ("<think>\n6", None, "empty"), ("Score: 6/10", None, "unparsed"),
    ],
)  # fmt: skip
def test_parse_rating(text, score, status):
    assert protocols.parse_rating(text) == (score, status)


def test_reference_rule_for_ratings():
    rule = protocols.parse_rating_reference
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
        ("<think>(a) or (b)?</think>\nOutput (b)", "(b)", "ok"), ("<think>\n(a)", None, "empty"),
    ],
)  # fmt: skip
def test_parse_verdict(text, letter, status):
    assert protocols.parse_verdict(text) == (letter, status)


def test_equal_counts_where_it_is_offered():
    assert protocols.parse_verdict("Equal.", equal=True) == ("equal", "ok")
    assert protocols._verdict("(a)", "equal") == "equal" == protocols._verdict("equal", "equal")
    assert protocols._verdict("(a)", "(b)") == "(a)" and protocols._verdict(None, "equal") is None
    assert "Equal" in protocols.ranking_prompt("i", "", "x", "y", equal=True)
    assert "Equal" not in protocols.ranking_prompt("i", "", "x", "y")


# --- the protocols -------------------------------------------------------------------------------

ITEMS = [
    {"instruction": "Say hello", "input": "", "responses": ["hello", "go away", "None"]},
    {"instruction": "Sum up", "input": "A text.", "responses": ["text", "NA", "x {y} %s"]},
]


def test_prompts_hold_the_item_and_no_nan():
    table = conversions.to_ratings_table(ITEMS).assign(
        input=lambda t: t["input"].replace("", np.nan)
    )
    prompts = [r["messages"][0]["content"] for r in protocols.rating_requests(table)]
    assert not any("nan" in p.lower() for p in prompts)
    assert "Input:\nA text." in prompts[3] and prompts[0].count("Input:") == 1  # the example's
    assert prompts[5].endswith("Answer: x {y} %s\nGrade:")
    a, b = protocols.ranking_requests(conversions.to_rankings_table(ITEMS))[:2]
    assert a["messages"][0]["content"].endswith("Output (a): hello\nOutput (b): go away\nBetter:")
    assert b["messages"][0]["content"].endswith("Output (a): go away\nOutput (b): hello\nBetter:")


def test_rate_and_rank(server, tmp_path):
    asking = client(server(say="6/7"), tmp_path)
    ratings = protocols.rate(asking, conversions.to_ratings_table(ITEMS))
    assert protocols.usable(ratings)["score"].tolist() == [6] * 6
    assert set(ratings["status"]) == {"ok"} and ratings["prompt_tokens"].tolist() == [100] * 6
    assert ratings["id"].is_unique and ratings["reply"].tolist() == ["6/7"] * 6
    judge = client(server(say="Output (a)"), tmp_path, cache=tmp_path / "other.sqlite")
    rankings = protocols.rank(judge, conversions.to_rankings_table(ITEMS))
    assert rankings["verdict"].tolist() == ["equal"] * 6  # followed position
    assert not analysis.judge_report(ratings, rankings)["passes"].all()
    outside = client(server(say="8"), tmp_path, cache=tmp_path / "third.sqlite")
    lost = protocols.rate(outside, conversions.to_ratings_table(ITEMS))
    assert lost["score"].isna().all() and not len(protocols.usable(lost))


def test_only_the_missing_half_of_a_pair_is_asked_again(server, tmp_path):
    pairs = conversions.to_rankings_table(ITEMS)
    script = ["ok"] * 5 + ["400!odd"] + ["ok"] * 6
    one = server(script=script, say="Output (b)")
    first = protocols.rank(client(one, tmp_path, concurrency=1), pairs)
    assert first["verdict"].isna().sum() == 1 and first["status"].tolist().count("no_reply") == 1
    assert first["first"].notna().all()
    second = protocols.rank(client(one, tmp_path, concurrency=1), pairs)
    assert second["verdict"].notna().all() and len(one.log()) == 12 + 1


def test_generate(server, tmp_path):
    one = server()
    items = protocols.generate(client(one, tmp_path), ITEMS, n=3, max_tokens=9)
    assert [len(item["responses"]) for item in items] == [3, 3]
    assert items[1]["responses"][0] == "Sum up\n\nA text."[::-1] and len(one.log()) == 6


def test_a_reasoning_model_is_asked_in_its_own_terms(scripted, tmp_path):
    def answer(body):
        if {"max_tokens", "temperature"} & set(body):
            return 400, {"error": {"message": "unsupported parameter"}}, {}
        assert body["max_completion_tokens"] == 900
        rating = "Grade:" in body["messages"][0]["content"]
        return completion("<think>hm, 2 (a)?</think>\n" + ("6" if rating else "Output (b)"))

    asking = client(scripted(answer), tmp_path)
    options = {"max_completion_tokens": 900, "temperature": None}
    ratings = protocols.rate(asking, conversions.to_ratings_table(ITEMS[:1]), **options)
    assert ratings["score"].tolist() == [6, 6, 6] and set(ratings["error"]) == {""}
    rankings = protocols.rank(asking, conversions.to_rankings_table(ITEMS[:1]), **options)
    assert rankings["first"].tolist() == rankings["swapped"].tolist() == ["(b)"] * 3
    items = protocols.generate(asking, ITEMS[:1], n=1, **options)
    assert items[0]["responses"] == ["Output (b)"]


def test_a_reply_that_was_cut_or_kept_back_says_so(scripted, tmp_path):
    replies = [
        completion("Let me see", "length"),
        completion("6", "content_filter"),
        completion(None, refusal="no"),
        completion("6", "length"),
    ]
    one = scripted(lambda body: replies.pop(0))
    table = pd.DataFrame([(f"i{k}", "", "r") for k in range(4)], columns=preferences.RATING[:-1])
    with pytest.warns(UserWarning, match="1 of 4 replies were cut off"):
        rated = protocols.rate(client(one, tmp_path, concurrency=1), table)
    assert rated["status"].tolist() == ["cut_off", "filtered", "refused", "ok"]
    assert protocols.usable(rated)["score"].tolist() == [6]


def test_a_refused_response_is_empty_and_told(scripted, tmp_path):
    replies = [completion("fine"), completion(None, refusal="I will not")]
    one = scripted(lambda body: replies.pop(0))
    with pytest.warns(UserWarning, match="1 of 2 responses are empty, first: the model refused"):
        items = protocols.generate(client(one, tmp_path, concurrency=1), ITEMS[:1], n=2)
    assert items[0]["responses"] == ["fine", ""]


def test_responses_that_end_inside_their_reasoning_are_refused(scripted, tmp_path):
    one = scripted(lambda body: completion("<think>Well", "length"))
    with pytest.raises(
        chat.EndpointError, match="2 of 2 responses are empty.*max_completion_tokens"
    ):
        protocols.generate(client(one, tmp_path), ITEMS[:1], n=2)


def test_tables_are_checked():
    with pytest.raises(ValueError, match="lacks the columns response"):
        protocols.rating_requests(pd.DataFrame({"instruction": ["x"], "input": [""]}))
    bad = pd.DataFrame({"instruction": ["x"], "input": [""], "response": [None]})
    with pytest.raises(ValueError, match="row 0: response is None"):
        protocols.rating_requests(bad)


# --- files ---------------------------------------------------------------------------------------


def hard_ratings():
    return pd.DataFrame({"instruction": "i", "input": "", "response": HARD}, dtype=object)


def test_jsonl_round_trip(server, tmp_path):
    table = protocols.rate(client(server(say="x"), tmp_path), hard_ratings())
    path = tables.write_jsonl(table, tmp_path / "log.jsonl")
    assert len(path.read_bytes().split(b"\n")) == len(HARD) + 1
    pd.testing.assert_frame_equal(tables.read_jsonl(path), table, check_dtype=False)


def fill(path, answer):
    with path.open(encoding="utf-8-sig", newline="") as handle:
        header, *rows = list(csv.reader(handle))
    with path.open("w", encoding="utf-8-sig", newline="") as handle:
        csv.writer(handle).writerows([header, *([*row[:-1], answer(row)] for row in rows)])
    return header, rows


def test_human_ratings_round_trip(tmp_path):
    table = hard_ratings().assign(id="secret-id", model="secret-model")
    path = sheets.export_for_humans(table, tmp_path / "sheet.csv")
    assert "secret" not in path.read_text(encoding="utf-8-sig")
    grades = {sheets.sheet_text(text): 1 + k % 7 for k, text in enumerate(HARD)}
    _, rows = fill(path, lambda row: str(grades[sheets.sheet_text(row[2])]))
    assert [r[2] for r in rows] != HARD and "'=1+1" in [r[2] for r in rows]
    found = sheets.import_from_humans(path, table)
    assert found["response"].tolist() == HARD
    assert found["score"].tolist() == [1 + k % 7 for k in range(len(HARD))]


def test_human_rankings_round_trip(tmp_path):
    table = conversions.to_rankings_table(
        [{"instruction": "i", "input": "", "responses": ["a", "bb", "ccc", "dddd", "eeeee"]}]
    )
    path = sheets.export_for_humans(table, tmp_path / "sheet.csv")
    _, rows = fill(path, lambda row: "A" if len(row[2]) > len(row[3]) else "b")
    assert 0 < sum(len(r[2]) > len(r[3]) for r in rows) < 10  # both orders are shown
    found = sheets.import_from_humans(path, table)
    assert found["verdict"].tolist() == ["(b)"] * 10  # the longer one, wherever it stood


def test_bad_human_answers(tmp_path):
    table = hard_ratings()
    path = sheets.export_for_humans(table, tmp_path / "sheet.csv")
    fill(path, lambda row: "8")
    with pytest.raises(ValueError, match=r"sheet.csv, line 2: answer '8'; allowed: a whole number"):
        sheets.import_from_humans(path, table)
    fill(path, lambda row: "")
    with pytest.warns(UserWarning, match="8 of 8 rows have no answer"):
        assert not len(sheets.import_from_humans(path, table))
    fill(path, lambda row: "3")
    with pytest.raises(ValueError, match="not in the table"):
        sheets.import_from_humans(path, table.iloc[1:])
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    path.write_text("\n".join([f"{lines[0]},grade (1-7)", *(f"{line},4" for line in lines[1:])]))
    with pytest.raises(ValueError, match=r"line 1: column 'grade \(1-7\)' twice"):
        sheets.import_from_humans(path, table)
    with pytest.raises(ValueError, match="lacks the columns"):
        sheets.import_from_humans(path, conversions.to_rankings_table(ITEMS))


def test_a_sheet_saved_with_semicolons_is_read(tmp_path):
    pairs = conversions.to_rankings_table(ITEMS)
    path = sheets.export_for_humans(pairs, tmp_path / "sheet.csv")
    with path.open(encoding="utf-8-sig", newline="") as handle:
        header, *rows = list(csv.reader(handle))
    with path.open("w", encoding="utf-8-sig", newline="") as handle:
        filled = [[*row[:-1], "a" if row[2] < row[3] else "b"] for row in rows]
        csv.writer(handle, delimiter=";").writerows([header, *filled])
    back = sheets.import_from_humans(path, pairs)
    smaller = [
        "(a)" if a < b else "(b)" for a, b in zip(back.response1, back.response2, strict=True)
    ]
    assert back["verdict"].tolist() == smaller and len(back) == len(pairs)


def test_a_lone_carriage_return_survives_the_sheet(tmp_path):
    table = pd.DataFrame({"instruction": "i", "input": "", "response": ["a\rb", "\r", "c\r\nd"]})
    path = sheets.export_for_humans(table, tmp_path / "sheet.csv")
    content = path.read_bytes().decode("utf-8-sig").replace(",\r\n", ",3\r\n")
    path.write_bytes(content.encode("utf-8-sig"))
    assert sheets.import_from_humans(path, table)["score"].tolist() == [3, 3, 3]


# --- a local endpoint ----------------------------------------------------------------------------


def test_serve_a_local_model(tmp_path):
    pytest.importorskip("fastapi", reason="transformers serve needs transformers[serving]")
    model, tokenizer = models.build_tiny_model("tiny")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "tiny")
    with pytest.raises(ZeroDivisionError), serve(tmp_path / "tiny") as (url, name):
        asking = chat.ChatClient(name, base_url=url, cache=tmp_path / "r.sqlite")
        reply = asking.ask([chat.chat("the cat", max_tokens=3, temperature=0.0)])[0]
        assert reply.tokens("completion") == 3
        raise ZeroDivisionError
    with pytest.raises(OSError):
        urllib.request.urlopen(url.replace("/v1", "/health"), timeout=2)


class Literal:
    """An annotator that reads literally: a longer answer is better, and the first place is worth a little."""

    name = "literal"

    def __init__(self):
        self.asked = []

    def log_probs(self, asked):
        self.asked += asked
        return np.array([self.answer(question) for question in asked])

    def answer(self, question):
        if len(question.options) == 7:
            size = len(question.rest.split("\n\n")[0].removeprefix("Answer: "))
            return [-abs(k - size) for k in range(1, 8)]
        first, second, _ = question.rest.split("\n\n")
        odds = 0.5 + len(first) - len(second)
        return [-np.logaddexp(0, -odds), -np.logaddexp(0, odds)]


def test_judgements_are_asked_plainly_and_by_single_criteria_in_both_orders():
    judge = Literal()
    table = pd.DataFrame(
        {"instruction": "Sum up.", "input": ["text", ""], "response": ["abc", "abcde"]}
    )
    rated = protocols.judge_ratings(judge, table)
    assert rated["likeliest"].tolist() == [3, 5]
    assert judge.asked[0].shared == "Task: Sum up.\n\nPassage: text\n\n"
    assert judge.asked[1].shared == "Task: Sum up.\n\n"
    again = protocols.judge_ratings(judge, table, wording=1)
    assert again["score"].tolist() == rated["score"].tolist()
    assert judge.asked[0].rest != judge.asked[2].rest
    pairs = pd.DataFrame(
        {
            "instruction": "Sum up.",
            "input": "text",
            "response1": ["abc", "a"],
            "response2": ["a", "a"],
        }
    )
    judge.asked.clear()
    ranked = protocols.judge_rankings(judge, pairs)
    assert len(judge.asked) == 2 * 2 * 3 and len({q.rest for q in judge.asked}) == 9
    assert ranked["verdict"].tolist()[0] == "(a)" and ranked["p_first"][1] == pytest.approx(0.5)
    assert ranked["order_effect"][1] > 0.1


def test_judgements_that_are_missing_stay_missing():
    class Silent(Literal):
        def answer(self, question):
            return [np.nan] * len(question.options)

    table = pd.DataFrame({"instruction": ["i"], "input": "x", "response": ["abc"]})
    assert protocols.judge_ratings(Silent(), table)[["score", "likeliest"]].isna().all(axis=None)
    pairs = pd.DataFrame({"instruction": ["i"], "input": "x", "response1": "a", "response2": "b"})
    assert protocols.judge_rankings(Silent(), pairs)["verdict"].isna().all()
