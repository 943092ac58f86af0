"""The study of real feedback in words: parts that stay, texts of every arm, shares by hand."""

import numpy as np
import pandas as pd
import pytest

from lib import models
from lib.course import annotators, assets
from lib.judge import LocalAnnotator
from lib.papers.ilf import refine, study


class Writes:
    """An annotator whose texts say what they were asked for, and which reads literally."""

    name = "writes"

    def __init__(self):
        self.prompts = []

    def write(self, prompts, *, n=1, seed=0, system="", **decoding):
        self.prompts += prompts
        return [
            [(f"Text {k} of {seed}. {prompt[-40:]}.", True) for k in range(n)] for prompt in prompts
        ]

    def supports(self, texts, facts):
        held = [fact.split(": ", 1)[1] in text for text, fact in zip(texts, facts, strict=True)]
        return np.where(held, 2.0, -1.0)


@pytest.fixture
def articles():
    rows = [("a", "Ormin", "It is a lake. It is deep. It has an island."),
            ("b", "Bell", "It is a clock. It strikes. It was built in 1834.")]  # fmt: skip
    table = pd.DataFrame(rows, columns=["id", "title", "post"])
    return table.assign(summary=["It is a lake.", "A clock."], feedback=["Say deep.", "Say 1834."])


def test_every_arm_has_its_texts_and_sees_what_it_should(articles):
    writer = Writes()
    table = study.texts(writer, articles)
    counts = table.groupby("arm")["text"].size().to_dict()
    assert counts == {
        study.FIRST: 2,
        "feedback": 10,
        "second try": 4,
        "other feedback": 4,
        study.OWN: 2,
    }
    with_feedback, without, other, own = (
        writer.prompts[:2],
        *(writer.prompts[i : i + 2] for i in (2, 4, 6)),
    )
    assert "Say deep." in with_feedback[0] and "Say deep." in other[1] and "Say 1834." in other[0]
    assert not any("Say" in prompt for prompt in without + own)
    assert not any("Summary:" in prompt for prompt in own)


def test_shares_by_hand(articles):
    texts = ["It is deep. It is blue.", "", "It is a lake. It is deep. It has an island."]
    table = pd.DataFrame({"id": "a", "arm": "x", "candidate": 0, "text": texts})
    judged = study.judge(Writes(), articles, table, threshold=0.0)
    assert judged["complete"].round(3).tolist() == [0.333, 0.0, 1.0]
    assert judged["faithful"].fillna(-1).tolist() == [0.5, -1, 1.0]
    assert judged["n_words"].tolist() == [6, 0, 11]
    assert study.judge(Writes(), articles, table, threshold=3.0)["complete"].tolist() == [0, 0, 0]


def test_a_missing_answer_is_missing_not_no(articles):
    class Silent(Writes):
        def supports(self, texts, facts):
            return np.full(len(texts), np.nan)

    table = pd.DataFrame({"id": ["a"], "arm": "x", "candidate": 0, "text": ["It is deep."]})
    judged = study.judge(Silent(), articles, table, threshold=0.0)
    assert judged[["complete", "faithful"]].isna().all(axis=None)


def test_parts_are_apart_and_more_articles_come_after_those_there_are():
    try:
        assets.fetch("wikipedia")
    except assets.AssetError as error:
        pytest.skip(f"needs the real asset: {error}")
    parts = {name: study.select_articles(name) for name in study.PARTS}
    assert {name: len(table) for name, table in parts.items()} == study.PARTS
    assert not set(parts["tuning"]["id"]) & set(parts["test"]["id"]) | set()
    few = study.select_articles("test", 5, taken=[parts["test"]["title"][0]])
    assert few["id"].tolist() == parts["test"]["id"][1:6].tolist()
    with pytest.raises(ValueError, match="tuning, test, train"):
        study.select_articles("dev")


def test_known_answers_by_hand_and_the_threshold_between_them(articles):
    known = study.known_answers(articles)
    assert len(known) == 2 * (3 + 3 + 3) and known["right"].sum() == 2 * (2 + 3)
    assert not known[known["text"].str.endswith("It is deep.")]["right"].iloc[2]
    threshold, balanced = study.fit_threshold(Writes(), articles)
    assert -1 < threshold < 2 and balanced == 1.0


def test_facts_that_the_feedback_gives_away_are_counted_apart(articles):
    fact = "Bell: It was built in 1834 by a carpenter."
    assert study.is_named("Bell", fact, "Say that it was built in 1834.")
    assert not study.is_named("Bell", fact, "Say more about the Bell.")
    named = articles.assign(feedback=["Mention the island.", ""])
    table = pd.DataFrame({"id": ["a"], "arm": "x", "candidate": 0, "text": ["It has an island."]})
    judged = study.judge(Writes(), named, table, threshold=0.0)
    assert judged["complete"].round(3).tolist() == [0.333] and judged["unnamed"].tolist() == [0.0]


def test_equal_length_takes_away_what_words_bring():
    table = pd.DataFrame({"id": list("aabb"), "n_words": [10, 20, 5, 25],
                          "unnamed": [0.2, 0.4, 0.5, 0.9]})  # fmt: skip
    slope = study.words_slope(table)
    assert slope == pytest.approx(0.02)
    assert study.at_equal_length(table, slope).round(3).tolist() == [0.3, 0.3, 0.7, 0.7]
    assert study.words_slope(table.assign(n_words=3)) == 0.0


def test_the_job_with_a_tiny_model_gives_every_text_and_comes_again_without_it(
    articles, tmp_path, monkeypatch
):
    """One model in every role: texts, shares, choices; then from the stored replies alone."""
    monkeypatch.setenv("FEEDBACK_CACHE", str(tmp_path))
    plain = articles[["id", "title", "post"]]

    def all_of_it(ask):
        roles = [LocalAnnotator("tiny", ask=ask, shipped=tmp_path / "shipped")] * 3
        named, texts = annotators.study_tables(plain, *roles, threshold=0.0)
        yes_no = [q for q in refine.QUESTIONS if q.yes == " Yes"]  # words that the tiny model has
        chosen = study.instruct_rm(roles[1], study.candidates(named, texts), yes_no)
        removed = study.word_removal(roles[1], 2)
        assert roles[0].export("refinements").exists()
        return named, texts, chosen, removed

    named, texts, chosen, removed = all_of_it(True)
    assert set(texts["arm"]) == {study.FIRST, study.OWN, *study.N} and len(texts) == 2 * 11
    assert texts["complete"].between(0, 1).all() and named["feedback"].notna().all()
    assert chosen.shape == (10, 3) and ((chosen > 0) & (chosen < 1)).all()
    assert removed["setting"].value_counts().to_dict() == dict.fromkeys(removed["setting"], 2)
    monkeypatch.setattr(models, "load_policy", None)  # nothing is asked again
    for first, again in zip((named, texts, chosen, removed), all_of_it(False), strict=True):
        assert str(pd.DataFrame(first).to_dict()) == str(pd.DataFrame(again).to_dict())


def test_people_s_summaries_and_feedback_are_not_written_again(articles):
    writer = Writes()
    named, texts = annotators.study_tables(articles, None, writer, writer, 0.0)
    assert named["feedback"].tolist() == articles["feedback"].tolist()
    assert texts[texts["arm"] == study.FIRST]["text"].tolist() == articles["summary"].tolist()


def test_effects_and_power_by_hand():
    table = pd.DataFrame({"id": list("aabb") * 2, "arm": ["x"] * 4 + ["y"] * 4,
                          "unnamed": [0, 0.2, 0.4, 0.4, 0.5, 0.5, 0.6, 0.8]})  # fmt: skip
    (row,) = study.effects(table, [("x", "y")], ["unnamed"]).to_dict("records")
    assert row["group"] == "y - x" and row["value"] == pytest.approx(0.35) and row["n"] == 2
    spread = np.std([0.4, 0.3], ddof=1)
    half = study.power(table, [("x", "y")], ["unnamed"], [4]).iloc[0, 0]
    assert half == pytest.approx(1.96 * spread / 2)


def test_ranks_of_people_go_out_unnamed_and_come_back(articles):
    texts = study.texts(Writes(), articles)
    sheet = study.to_rank(articles, texts, "second try", "feedback")
    firsts = texts[(texts["arm"] == "feedback") & (texts["candidate"] == 0)].set_index("id")["text"]
    right = [1 if row.text_1 == firsts[row.id] else 2 for row in sheet.itertuples()]
    assert study.ranks_won(sheet.assign(choice=right)).tolist() == [1.0, 1.0]
    assert study.ranks_won(sheet.assign(choice=["", 3 - right[1]])).tolist() == [0.0]
