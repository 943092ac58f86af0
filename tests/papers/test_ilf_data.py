"""SLF5K, the TL;DR comparisons, and Wikipedia under SLF5K's names."""

import json

import pandas as pd
import pytest
from conftest import asset

from lib import annotator
from lib.course import assets
from lib.papers.ilf import data as ilf_data
from lib.papers.ilf.data import (
    SLF5K_NEEDED,
    SLF5K_SECONDS,
    SLF5K_SPLITS,
    SLF5K_TEXTS,
    TLDR,
    load_slf5k,
    load_tldr_comparisons,
    wikipedia_as_slf5k,
)

WHOLE = {
    "id": "t3_abc1",
    "subreddit": "gardening",
    "title": "Should I move my rose?",
    "post": "I planted a rose.\nIt gets no sun.",
    "tldr_human_reference_summary": "Rose in the shade.",
    "summary_prompt": "Summarise. Title: ... TL;DR:",
    "generated_summary_for_comparison_A": "A rose.",
    "generated_summary_for_comparison_B": "A rose without sun.",
    "comparison_preference": "Summary B",
    "generated_summary_for_feedback": "I have a rose.",
    "feedback": "It should mention the lack of sun.",
    "feedback_class": "Coverage",
    "has_additional_feedback": "No",
    "ideal_human_summary": "My rose gets no sun; should I move it?",
    "time_spent_in_seconds_feedback": 181,
    "time_spent_in_seconds_ideal_human_summary": 200,
    "time_spent_in_seconds_comparison": 61.5,
}
CORE = {name: WHOLE[name] for name in (*SLF5K_NEEDED, "ideal_human_summary")}


def write(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def test_every_documented_field(tmp_path):
    write(tmp_path / "train.jsonl", WHOLE | {"extra": 1})
    rows = load_slf5k(tmp_path, "train")
    assert set(rows.column_names) == set(WHOLE) == {*SLF5K_TEXTS, *SLF5K_SECONDS}
    assert rows[0] == WHOLE


@pytest.mark.parametrize("split", SLF5K_SPLITS)
def test_every_split_under_either_name(tmp_path, split):
    write(tmp_path / f"{split}_dataset_{SLF5K_SPLITS[split]}.jsonl", CORE, CORE | {"id": "b"})
    rows = load_slf5k(tmp_path, split)
    assert rows["id"] == ["t3_abc1", "b"]
    assert rows["feedback"] == [None, None] and rows["time_spent_in_seconds_feedback"] == [None] * 2
    assert rows["ideal_human_summary"][0] == WHOLE["ideal_human_summary"]


def test_other_preferences_count_as_none(tmp_path):
    file = write(tmp_path / "x.jsonl", WHOLE | {"comparison_preference": "Both"})
    assert load_slf5k(file)["comparison_preference"] == [None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"post": None}, "line 2: post is None"),
        ({"feedback": 7}, "line 2: feedback is 7"),
        ({"time_spent_in_seconds_feedback": "long"}, "number of seconds"),
        ({"id": "a"}, "line 2: id 'a' stands on line 1 too"),
    ],
)
def test_bad_rows_are_named(tmp_path, change, message):
    file = write(tmp_path / "train.jsonl", WHOLE | {"id": "a"}, WHOLE | change)
    with pytest.raises(ValueError, match=message):
        load_slf5k(file)


def test_missing_things_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="split is 'dev'.*development"):
        load_slf5k(tmp_path, "dev")
    with pytest.raises(FileNotFoundError, match=r"needed is one file train\*\.jsonl"):
        load_slf5k(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_slf5k(tmp_path / "nowhere" / "at" / "all")
    write(tmp_path / "train.jsonl", ["no", "object"])
    with pytest.raises(ValueError, match="line 1: id is None"):
        load_slf5k(tmp_path, "train")
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: 1 / 0)
    with pytest.raises(assets.AssetError, match="local folder"):
        load_slf5k("JeremyAlain/SLF5K", "train")


def comparison(choice=1, split="train", **info):
    info = {name: WHOLE[name] for name in SLF5K_NEEDED} | info
    summaries = [{"text": "one", "policy": "p", "note": None}, {"text": "two", "policy": "q"}]
    return {
        "info": info | {"site": None, "article": None},
        "summaries": summaries,
        "choice": choice,
        "worker": "w1",
        "batch": "batch3",
        "split": split,
        "extra": {"confidence": None},
    }


def test_tldr_comparisons(tmp_path, monkeypatch):
    write(tmp_path / "batch3.json", comparison(), comparison(0, "valid1"), comparison(0, post=None))
    write(tmp_path / "batch4.json", comparison(0))
    rows = load_tldr_comparisons(tmp_path, "train")
    assert rows["comparison_preference"] == ["Summary B", "Summary A"]
    assert rows[0]["summary_A"] == "one" and rows[0]["batch"] == "batch3"
    held_out = load_tldr_comparisons(tmp_path, "validation")
    assert held_out["comparison_preference"] == ["Summary A"]
    with pytest.raises(ValueError, match="holds no comparison of split 'validation'"):
        load_tldr_comparisons(tmp_path / "batch4.json", "validation")
    write(tmp_path / "batch4.json", comparison() | {"choice": 2})
    with pytest.raises(ValueError, match="batch4.json, line 1: not a comparison"):
        load_tldr_comparisons(tmp_path)

    pd.DataFrame([comparison()]).to_parquet(tmp_path / "0000.parquet")  # as the Hub converts it
    asked = []
    monkeypatch.setattr(
        ilf_data,
        "_hub_file",
        lambda *request: asked.append(request) or tmp_path / "0000.parquet",
    )
    assert load_tldr_comparisons()["summary_B"] == ["two"]
    assert asked == [(TLDR, "comparisons/train/0000.parquet", "refs/convert/parquet")]


def test_wikipedia_splits_are_disjoint_and_nested():
    asset("wikipedia")
    judge = annotator.Rubric()

    def fit(text):
        return len(judge.facts(text)) >= 4

    found = {s: wikipedia_as_slf5k(s, 40, keep=fit) for s in ("train", "test", "pool")}
    titles = [title for rows in found.values() for title in rows["title"]]
    assert len(set(titles)) == 120
    assert found["train"]["id"][:10] == wikipedia_as_slf5k("train", 10, keep=fit)["id"]
    row = found["test"][0]
    assert set(row) == {"id", "subreddit", "title", "post", "one_line_description"}
    assert all(fit(text) and 40 <= len(text.split()) <= 90 for text in found["test"]["post"])
    with pytest.raises(ValueError, match="n is 100000"):
        wikipedia_as_slf5k("development", 100_000)
    with pytest.raises(ValueError, match="allowed: train"):
        wikipedia_as_slf5k("dev")
