"""Real passages of notebook 44: dealt out once each, the reward models' measure, the reward of ten words."""

import numpy as np
import pandas as pd
import pytest

from lib import rewards
from lib.papers.fine_grained import models, passages


def test_no_article_stands_in_two_parts_and_too_few_are_refused():
    articles = passages.articles("smoke")
    world = passages.split(articles, {"reward_articles": 3, "n_test": 2})
    assert [len(x) for x in world.prompts.values()] == [3, 2]
    assert not set(world.prompts["reward_articles"]) & set(world.prompts["n_test"])
    assert all(prompt in world.posts for part in world.prompts.values() for prompt in part)
    with pytest.raises(ValueError, match="too few articles"):
        passages.split(articles, {"n_test": len(articles) + 1})


class Knows:
    """A model that calls each segment what its label says."""

    def __init__(self, feedback):
        self.rows = np.split(1 - 2 * feedback.labels, np.flatnonzero(np.diff(feedback.row)) + 1)

    def score_segments(self, prompts, responses):
        return self.rows


def test_a_model_that_is_right_gains_what_a_constant_answer_lacks():
    records = models.constructed_records(passages.articles("smoke"), seed=0)
    feedback = models.feedback_for("R1", records)
    measured = passages.measure_model("R1", Knows(feedback), records, seed=0)
    share = np.nanmean(feedback.labels)
    assert measured["accuracy"].value == 1
    assert measured["gain"].value == pytest.approx(min(share, 1 - share))


def test_ten_words_is_a_ratio_of_sums():
    rows = [("SFT", 0, -1.0, 10), ("SFT", 1, -1.0, 10), ("dense", 0, 1.0, 5), ("dense", 1, 3.0, 15)]
    table = pd.DataFrame(rows, columns=["arm", "prompt_index", "total", "words"])
    assert passages.ten_words(table, "SFT", "dense", seed=0).value == pytest.approx(3.0)


def test_arms_say_where_the_same_total_is_paid():
    assert passages.ARMS["holistic"] is rewards.at_end
    assert passages.ARMS["shuffled"] is rewards.shuffled
    settings = {name: row[0] for name, row in passages.SETTINGS.items()}
    lam = {arm: passages.ppo_config(settings, arm, 0).lam for arm in passages.ARMS}
    assert lam == {"dense": 0.95, "holistic": 0.95, "holistic, lambda 1": 1.0, "shuffled": 0.95}
