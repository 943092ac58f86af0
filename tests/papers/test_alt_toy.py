"""Notebook 50's invented world, and the arms that are trained in it."""

import re

import numpy as np
import pandas as pd
import pytest
import torch

from lib import models
from lib.papers.alt import critics, figures, loop, plan, toy, trials
from lib.papers.alt.labels import FreeText, Item, Quantiles
from lib.stats import Interval

SMALL = dict(
    iterations=2,
    samples_per_prompt=5,
    steps=4,
    batch_size=8,
    learning_rate=3e-3,
    max_new_tokens=8,
    eval_samples=2,
    check_every=2,
    beta=0.05,
    alpha=0.06,
)


# --- the world -----------------------------------------------------------------------------------


def test_every_word_is_known_and_moods_order_the_reward():
    known = set(toy.vocabulary())
    texts = toy.corpus(3000, seed=1)
    assert set(" ".join(texts).split()) <= known
    assert set(toy.PREFIX.replace("{}", "").split()) <= known and set(toy.CRITIC.split()) <= known
    headed = [re.match(r"a (?:short |long )?(.+) review \. (.+)", text) for text in texts]
    share = sum(match is not None for match in headed) / len(texts)
    assert 0.35 < share < 0.45
    by_tag = {tag: [m[2] for m in headed if m and m[1] == tag] for tag in toy.TAGS}
    means = [np.mean(toy.mood(texts, texts)) for texts in by_tag.values()]
    assert means == sorted(means, reverse=True) and means[0] > 0.4 and means[-1] < -0.4


def test_headings_can_be_left_out_and_the_corpus_depends_on_the_seed():
    assert not any(text.startswith("a ") for text in toy.corpus(200, seed=0, headings=0.0))
    assert toy.corpus(20, seed=0) == toy.corpus(20, seed=0) != toy.corpus(20, seed=1)


def test_nothing_the_critic_says_and_no_condition_stands_in_the_corpus():
    words = set(" ".join(toy.corpus(3000, seed=2)).split())
    assert not words & {*toy.CRITIC.split(), "feedback", "input", "quality"}


def test_no_thing_is_in_two_parts():
    parts = toy.split(3, 2, 4)
    assert [len(part) for part in parts] == [15, 10, 20]
    things = [{prompt.split()[1] for prompt in part} for part in parts]
    assert not (things[0] & things[1] or things[0] & things[2] or things[1] & things[2])
    with pytest.raises(ValueError, match="60 in all"):
        toy.split(50, 10, 10)


@pytest.mark.parametrize(
    "text, value",
    [
        ("was superb and ugly .", 0.0),
        ("was superb .", 0.5),
        ("was awful and dull .", -2 / 3),
        ("was very positive .", 0.0),
        ("", 0.0),
    ],
)
def test_the_reward_counts_and_is_blind_to_the_labels_words(text, value):
    assert toy.mood(["the lamp"], [text]) == [pytest.approx(value)]


def test_a_prompts_level_moves_its_reward_and_nothing_else():
    prompts, texts = ["the lamp", "the boat"], ["was superb .", "was superb ."]
    one, two = toy.biased_mood(prompts, texts)
    assert one - toy.offset_of("the lamp") == pytest.approx(0.5) and one != two
    levels = [toy.offset_of(prompt) for prompt in toy.prompts_of(toy.THINGS)]
    assert abs(np.mean(levels)) < 0.2 and 0.85 < np.std(levels) < 1.15


def test_the_critic_says_what_it_measures():
    (row,) = toy.critic(0)(["the lamp"], ["was superb and lovely . the handle was bright ."])
    assert row["score"] == 3 and "but" not in row["feedback"]
    (row,) = toy.critic(0)(["the lamp"], ["was awful ."])
    assert row["score"] == 1
    praise, _, blame = row["feedback"].partition(" but ")
    assert praise in ("brief", "compact") and blame.split()[0] in ("harsh", "gloomy")


def test_a_kept_policy_of_this_world_is_loaded_and_another_is_refused(tmp_path):
    for name, words in {"own": toy.vocabulary(), "other": ["one", "two"]}.items():
        models.save(*models.build_tiny_model("tiny", words=words), tmp_path / name)
    policy, tokenizer = toy.load_base(str(tmp_path / "own"))
    assert tokenizer("the lamp was superb .")["input_ids"] and policy.dtype == torch.float32
    with pytest.raises(ValueError, match="other tokens"):
        toy.load_base(str(tmp_path / "other"))


# --- the arms ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    model, tokenizer = models.build_tiny_model("tiny", words=toy.vocabulary())
    parts = toy.split(2, 1, 1)
    return trials.World(model, tokenizer, parts, SMALL, 0, tmp_path_factory.mktemp("arms"))


NUMBERS, FIVE = critics.scored(toy.mood), Quantiles(toy.TAGS)
ARMS = {
    "cloning": trials.Arm(NUMBERS, FIVE, "none", best="none", settings={"only": (0,)}),
    "Quark": trials.Arm(NUMBERS, FIVE, "token"),
    "critic": trials.Arm(toy.critic(0), FreeText(), best="pool", settings={"exemplar": "pool"}),
    "words": trials.combination_arm("text", 3),
}


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_is_trained_and_measured_on_every_test_prompt(world, name):
    arm, before = ARMS[name], {n: p.clone() for n, p in world.base.named_parameters()}
    trained = world.train(arm, name)
    assert all(torch.equal(before[n], p) for n, p in world.base.named_parameters())
    scores = trained.scores
    assert list(scores.prompt_index) == [*range(5)] and scores.reward.between(-1, 1).all()
    assert scores.gap.notna().all() == (name in ("Quark", "words"))
    assert ("met" in scores) == (name == "words")
    steps = list(trained.checks.step)
    assert steps == ([] if name == "words" else [0, 2, 4, 4, 6, 8])
    assert trained.levels.n.sum() == (5 * 2 * 5 if name == "Quark" else 0)


def test_ppo_and_the_untrained_model_are_measured_alike(world):
    trained = world.train_ppo()
    assert list(trained.checks.step) == [0, *range(8, 8 * len(trained.checks), 8)]
    tables = {"PPO": trained.scores, "chance": world.measure_chance(), **world.measure_base()}
    assert all(list(table.prompt_index) == [*range(5)] for table in tables.values())
    assert tables["asking"].gap.notna().all() and tables["chance"].met.between(0, 1).all()


def test_rows_of_samples_by_hand():
    arm = trials.Arm(NUMBERS, FIVE, best="good", worst="bad")
    samples = [
        ("good", 0, 0.5, "was fresh .", 3, 6.0),
        ("good", 0, 0.0, "was new .", 5, 2.0),
        ("good", 1, 1.0, "was new .", 2, 2.0),
        ("bad", 0, -1.0, "was stale .", 3, 3.0),
        ("bad", 1, 0.5, "was fresh .", 3, 3.0),
    ]
    columns = ["request", "prompt_index", "score", "text", "tokens", "nll"]
    rows = trials.rows_of(pd.DataFrame(samples, columns=columns), arm)
    assert rows.reward.tolist() == [0.25, 1.0] and rows.gap.tolist() == [1.25, 0.5]
    assert rows.log_ppl.tolist() == [1.0, 1.0] and rows.words.tolist() == [3.0, 3.0]


def test_both_met_needs_mood_and_brevity():
    def item(score, brevity):
        return Item("p", "r", (1,), True, 1, score, attributes={"brevity": brevity})

    class Pool:
        items = [item(0.0, -3.0), item(0.2, -5.0), item(0.4, -9.0)]

    table = pd.DataFrame(
        {"score": [0.5, 0.5, 0.2, 0.5], "text": ["a b", "a b c d e f", "a", "a b c d e"]}
    )
    assert trials.both_met(table, Pool).tolist() == [1.0, 0.0, 0.0, 1.0]


def test_levels_are_counted_by_the_edges():
    arm = ARMS["Quark"]
    table = pd.DataFrame(
        {"request": [toy.TAGS[0]] * 3 + [toy.TAGS[4], "none"], "score": [0.9, 0.3, 0.0, -0.9, 0.9]}
    )
    counts = trials.count_levels(table, arm)
    assert counts.values.tolist() == [[0, 0, 1], [0, 1, 1], [0, 2, 1], [4, 4, 1]]
    square = trials.level_matrix(pd.concat([counts, counts]), toy.TAGS)
    assert square.shape == (5, 5) and square.loc["very positive", "0.2 to 0.55"] == 2
    assert square.to_numpy().sum() == 8 and square.iloc[4, 4] == 2


def test_the_task_of_an_arm_asks_only_for_what_it_can_read(world):
    _, task, _ = world.start(ARMS["cloning"], "x")
    assert dict(task.requests) == {"none": ()} and task.validation == world.prompts.validation
    learner, task, _ = world.start(ARMS["words"], "y")
    assert len(task.requests) == 5 and not task.validation and learner.config.without == ((0, 0),)
    assert isinstance(learner, loop.Learner)


# --- what is drawn and planned -------------------------------------------------------------------


def test_the_trade_off_has_a_point_and_two_intervals_an_arm():
    one, two = Interval(0.5, 0.4, 0.6, 9), Interval(1.5, 1.2, 1.9, 9)
    points = pd.DataFrame([{"arm": "a", "x": one, "y": two}, {"arm": "b", "x": two, "y": one}])
    (axes,) = figures.trade_off(points, xlabel="x", ylabel="y", title="t").axes
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[0.5, 1.5]], [[1.5, 0.5]]]
    ends = [lines.get_segments()[0].tolist() for lines in axes.collections]
    assert ends[:2] == [[[0.4, 1.5], [0.6, 1.5]], [[0.5, 1.2], [0.5, 1.9]]]
    with pytest.raises(ValueError, match="nothing to draw"):
        figures.trade_off(points[:0], xlabel="x", ylabel="y", title="t")


def test_the_plan_of_the_papers_runs_by_hand():
    table = plan.table().set_index("task")
    # weights, the reference, gradients and two moments, each float32, and what one row keeps
    assert 20 * 0.774 < table.loc["toxicity", "GPU memory, GB"] < 20 * 0.774 + 2
    sampled = 2 * 0.774e9 * 1.36e6 * 60
    learned = 8 * 0.774e9 * 32_000 * 32 * 60
    hours = (sampled + learned) / 1e14 / 3600
    assert table.loc["toxicity", "hours"] == pytest.approx(hours, abs=0.05)
