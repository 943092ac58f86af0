"""The study of real feedback in words: parts that stay, texts of every arm, shares by hand."""

import numpy as np
import pandas as pd
import pytest

from lib.course import assets
from lib.papers.ilf import study


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
