"""Notebook 51's arms, its stored samples, and the papers' tasks."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import completion

from lib.papers.alt import critics, labels, loop, mood, real, tasks, trials

SETTINGS = {"samples_per_prompt": 5, "max_new_tokens": 6, "train": "top", "layers": 1}
SETTINGS |= {"steps": 2, "batch_size": 8, "eval_samples": 2, "learning_rate": 1e-3}


def make_world(tmp_path, **changes):
    openers = mood.openers()
    world = real.World(
        real.tiny_policy,
        openers[10:16],
        openers[:3],
        mood.count_words,
        SETTINGS,
        0,
        tmp_path,
        second=mood.count_words,
    )
    return replace(world, **changes)


def make_arms():
    labeller = labels.Quantiles(mood.TAGS)
    feedback = critics.scored(lambda p, r: [float(len(text)) for text in r])
    return real.arms(feedback, labeller, mood.PREFIX, real.word_critic())


def test_the_known_pairs_hold_no_listed_word_and_a_cut_after_topics_splits_by_topic():
    said = set(" ".join(sum(mood.KNOWN, ())).lower().replace(".", "").replace(",", "").split())
    assert not said & (mood.PLEASANT | mood.UNPLEASANT)
    openers = mood.openers()
    assert len(set(openers)) == 200
    first, rest = openers[:100], openers[100:]
    topics = [topic for topic in mood.TOPICS if any(f" {topic}" in text for text in first)]
    assert not any(text.endswith(topic) for text in rest for topic in topics)


def test_a_judge_that_knows_nothing_orders_half_of_the_pairs():
    assert mood.right_order(lambda p, r: np.zeros(len(r))) == 0.5
    good = {pair[0] for pair in mood.KNOWN}
    assert mood.right_order(lambda p, r: np.array([float(text in good) for text in r])) == 1


@pytest.mark.parametrize(
    "text, wanted",
    [
        (None, None), ("  \n ", None), ('"Warm and kind."\nMore', "Warm and kind."),
        ("It is dull. The person who came used the wrong list for the", "It is dull."),
        ("a b c d e f g h i j k l m n", "a b c d e f g h i j k l"),
    ],
)  # fmt: skip
def test_a_critique_is_one_short_line(text, wanted):
    assert real.tidy(text) == wanted


def test_the_local_critic_scores_by_quarters_and_leaves_out_what_is_missing():
    odds = np.linspace(0.1, 0.8, 8)
    odds[2] = np.nan

    class Annotator(SimpleNamespace):
        def write(self, prompts, **decoding):
            assert all("Text: " in prompt for prompt in prompts)
            return [None, *([(f"Text {k} is fine.", True)] for k in range(1, len(prompts)))]

        def classify(self, texts, question, options):
            assert options == real.MOODS
            return np.stack([odds, 1 - odds], axis=1)

    rows = real.local_critic(Annotator())(["The zoo"] * 8, ["was there"] * 8)
    assert rows[0] == rows[2] == {"score": None, "feedback": None}
    scores = [row["score"] for row in rows if row["score"] is not None]
    assert scores == sorted(scores) and set(scores) == {0.0, 1.0, 2.0, 3.0}


def test_reversed_labels_call_the_best_the_worst(tmp_path):
    every, world = make_arms(), make_world(tmp_path)
    learner, task, _ = world.start(every["reversed"], "reversed")
    pool = world.fill(every["reversed"], learner, task)
    means = {}
    for item, label in zip(pool.items, pool.labels(), strict=True):
        means.setdefault(pool.condition(item, label)[0], []).append(len(item.response))
    assert np.mean(means["Very positive"]) < np.mean(means["Very negative"])


def test_stored_samples_take_the_place_of_drawn_ones(tmp_path):
    every, world = make_arms(), make_world(tmp_path)
    learner, task, _ = world.start(every["ALT"], "ALT")
    drawn = loop.sample_items(learner, task, labels.DataPool(task.labeller), 1)
    again = make_world(tmp_path, first=drawn[:7])
    learner, task, folder = again.start(every["ALT"], "ALT")
    assert loop.sample_items(learner, task, labels.DataPool(task.labeller), 1) == drawn[:7]
    second = loop.sample_items(learner, task, world.fill(every["ALT"], learner, task), 2)
    assert len(second) == len(drawn)


def test_the_stored_samples_are_of_the_training_openers():
    items = real.read_pool()
    train = mood.openers()[real.HELD_OUT : real.HELD_OUT + real.TRAIN]
    assert {item.prompt for item in items} == set(train)
    assert len(items) == len(train) * real.POOL["samples_per_prompt"]
    part = real.choose_openers(train, 60, seed=3)
    assert len(part) == len(set(part)) == 60 and part != real.choose_openers(train, 60, seed=4)
    assert len(real.read_pool(part)) == 480


def test_every_arm_trains_and_is_measured_as_its_control_is(tmp_path):
    every, world = make_arms(), make_world(tmp_path)
    assert tuple(every) == real.ARMS
    untrained = world.measure_untrained(every)
    assert list(untrained) == ["base", "asking", "asking in critiques"]
    for name, arm in every.items():
        trained = world.train_arm(arm, name)
        assert list(trained.scores.prompt_index) == [0, 1, 2]
        assert trained.scores.gap.notna().all() and trained.scores.gap_second.notna().all()
        requests = {trials.NO_REQUEST} if name == "cloning" else {arm.best, arm.worst}
        assert set(trained.samples.request) == requests


def test_tasks_of_the_papers_say_what_they_need():
    with pytest.raises(ValueError, match="give one as REWARD"):
        tasks.summaries(tasks.Own(), 4)
    with pytest.raises(ValueError, match="leave REWARD empty"):
        tasks.dialogue(tasks.Own(reward="x"), 4)
    assert set(tasks.TASKS) == set(tasks.SETTINGS)


def test_at_full_words_come_from_the_endpoint_or_are_refused(scripted, tmp_path, monkeypatch):
    """ALT_LMU's critic of summaries is `JUDGE_MODEL`; a task without a critic says so, and none is asked
    that no arm wants."""
    reply = "Analysis: fine.\nFeedback: Clear but misses the cause.\nScore: 2"
    one = scripted(lambda body: completion(reply))
    monkeypatch.setenv("OPENAI_BASE_URL", one.url)
    monkeypatch.setenv("FEEDBACK_CACHE", str(tmp_path))
    own = tasks.Own(judge_model="m", request={"seed": 7})
    critic = real.find_critic(False, False, True, lambda: tasks.summary_critic(own))
    row = critic(["SUBREDDIT: r/a POST: a long one"], ["a short one"])[0]
    assert row["feedback"] == "Clear but misses the cause." and row["score"] == 2
    [asked] = one.asked
    text = asked["messages"][-1]["content"]
    assert asked["seed"] == 7 and "POST: a long one" in text and "a short one" in text
    assert all(axis in text for axis in tasks.AXES)
    assert real.find_critic(False, False, False, tasks.no_critic) is None
    with pytest.raises(ValueError, match="this TASK has no critic"):
        real.find_critic(False, False, True, tasks.no_critic)


def test_reward_and_judge_are_blind_to_the_labels_words():
    length = lambda p, r: [float(len(text.split())) for text in r]  # noqa: E731
    task = tasks.pleasant(tasks.Own(), 4, length, length)
    assert task.judge([""], ["very positive zoo"]) == [1.0]
    assert task.feedback([""], ["very positive zoo"])[0]["score"] == 1.0
