"""The clean-text reward: right sign, each fault punished, every term named; and rewards of one's own."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import WORDS
from hypothesis import given
from hypothesis import strategies as st

from lib import generation, models, ppo, rewards, rloo, scorers, segments
from lib.papers import rewardlm
from lib.papers.fine_grained.toxicity import ToxicityDrops


def samples(*texts):
    rows = [np.zeros(3, dtype=np.float32) for _ in texts]
    return generation.Samples(
        prompts=["p"] * len(texts), prompt_index=[0] * len(texts), prompt_ids=[[1]] * len(texts),
        response_ids=[[1, 2, 3]] * len(texts), texts=list(texts), log_probs=rows,
        model_log_probs=rows, finished=[True] * len(texts),
    )  # fmt: skip


def total(*texts):
    reward = rewardlm.CleanTextReward(scorers.load_scorer("lexicon-insults", role="reward"))
    return sum(reward(samples(*texts)).values())


def test_less_toxic_text_earns_more():
    clean, rude = total("You are a kind person.", "You are a stupid idiot.")
    assert clean > rude + 2


def test_empty_repeated_and_foreign_texts_earn_less():
    plain, empty, repeated, foreign = total(
        "the weather is nice today",
        "",
        "so it is so it is so it is so it is",
        "погода сегодня хорошая",
    )
    assert plain > max(empty, repeated, foreign) + 2


def test_terms_are_named_and_per_row():
    reward = rewardlm.CleanTextReward(scorers.load_scorer("lexicon-insults"))
    parts = reward(samples("a b c", ""))
    assert list(parts) == ["clean", "empty", "repetition", "non_latin"]
    assert parts["empty"].tolist() == [0, -4]
    assert all(np.isfinite(part).all() and part.shape == (2,) for part in parts.values())


# --- rewards of one's own ------------------------------------------------------------------------

LENGTHS = (3, 1, 2)
FOR_RESPONSES = [1.0, -2.0, 0.5]
FOR_TOKENS = [[0.1, 0.2, 0.3], [-2.0], [0.25, 0.25]]
PADDED = np.array([[0.1, 0.2, 0.3], [-2.0, 9, 9], [0.25, 0.25, np.nan]])  # nobody reads the padding


def drawn():
    """Three samples of 3, 1 and 2 tokens."""
    three = samples("one two three", "one", "one two")
    three.response_ids = [[5] * length for length in LENGTHS]
    return three


@pytest.mark.parametrize(
    "returned",
    [
        FOR_RESPONSES, tuple(FOR_RESPONSES), np.array(FOR_RESPONSES),
        pd.Series(FOR_RESPONSES, index=[7, 8, 9]),
        -np.array([-1.0, 2.0, -0.5]), torch.tensor(FOR_RESPONSES, requires_grad=True),
        torch.tensor(FOR_RESPONSES, dtype=torch.bfloat16), iter(FOR_RESPONSES),
        [torch.tensor(1.0), np.float32(-2.0), 0.5], [True, -2, 0.5],
    ],
)  # fmt: skip
def test_numbers_for_responses_in_any_form_are_paid_at_the_end(returned):
    paid, sums = rewards.place_rewards(returned, drawn())
    assert paid.tolist() == [[0, 0, 1], [-2, 0, 0], [0, 0.5, 0]]
    assert {name: values.tolist() for name, values in sums.items()} == {"reward": FOR_RESPONSES}


@pytest.mark.parametrize(
    "returned",
    [
        FOR_TOKENS, [np.array(row) for row in FOR_TOKENS], [torch.tensor(row) for row in FOR_TOKENS],
        PADDED, torch.tensor(PADDED), {"tokens": FOR_TOKENS}, (row for row in FOR_TOKENS),
    ],
)  # fmt: skip
def test_numbers_for_tokens_in_any_form_are_paid_where_they_stand(returned):
    paid, sums = rewards.place_rewards(returned, drawn())
    expected = [[0.1, 0.2, 0.3], [-2, 0, 0], [0.25, 0.25, 0]]
    np.testing.assert_allclose(paid, expected, atol=1e-6)
    (values,) = sums.values()
    np.testing.assert_allclose(values, [0.6, -2, 0.5], atol=1e-6)


def test_components_are_added_whatever_their_names_and_forms():
    parts = {"kind": np.array(FOR_RESPONSES), "short": [-1, -1, -1], 3: PADDED}
    paid, sums = rewards.place_rewards(parts, drawn())
    assert list(sums) == ["kind", "short", "3"]
    np.testing.assert_allclose(paid.sum(1), [0.6, -5, 0])
    np.testing.assert_allclose(rewards.totals(parts, drawn()), [0.6, -5, 0])
    table = pd.DataFrame({"kind": FOR_RESPONSES, "short": -1.0})
    np.testing.assert_allclose(rewards.totals(table, drawn()), [0, -3, -0.5])


def test_a_judge_of_prompts_and_responses_becomes_a_reward():
    reward = rewards.from_judge(lambda prompts, texts: [len(t.split()) for t in texts], "words")
    assert reward(drawn()) == {"words": [3, 1, 2]}
    assert rewards.totals(reward(drawn()), drawn()).tolist() == [3, 1, 2]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "'reward' is None.*3 samples.*return"),
        (1.0, "'reward' is 1.0; a reward function returns one number for each"),
        (np.array(1.0), "one number for each"),
        ("good", "'reward' is 'good'"),
        ({}, "no component"),
        ({"kind": None}, "'kind' is None"),
        ([1.0, 2.0], "'reward' has 2 rows for 3 samples"),
        ({"kind": np.zeros(4)}, "'kind' has 4 rows for 3 samples"),
        ([1.0, math.nan, 2.0], "'reward' of sample 1 is nan; give one finite number"),
        ([1.0, 2.0, math.inf], "sample 2 is inf"),
        (np.zeros((3, 2)), "sample 0 is .*each of its 3 response tokens"),
        ([[0, 0, 0], [1.0, 2.0], [0, 0]], "sample 1 is .*each of its 1 response tokens"),
        ([[0, 0, 0], [1.0], [0.0, "x"]], "sample 2 is .*'x'"),
        ([1.0, "fine", 2.0], "sample 1 is fine"),
        ([{"a": 1}, {"a": 2}, {"a": 3}], "sample 0 is {'a': 1}"),
        ([[0, [1, 2], 0], [1.0], [0, 0]], "sample 0"),
    ],
)
def test_what_is_no_reward_is_refused_by_name_and_sample(returned, message):
    with pytest.raises(ValueError, match=message):
        rewards.place_rewards(returned, drawn())


@pytest.mark.parametrize("name", ["array", "tokens", "components"])
def test_ppo_and_rloo_take_a_reward_of_ones_own(name):
    own = {
        "array": lambda s: -np.array([len(ids) for ids in s.response_ids]),
        "tokens": lambda s: [np.full(len(ids), -0.5) for ids in s.response_ids],
        "components": lambda s: {
            "brief": torch.tensor([-1.0 * len(ids) for ids in s.response_ids]),
            "polite": [float("kind" in text) for text in s.texts],
        },
    }[name]
    config = ppo.PPOConfig(
        steps=1,
        prompts_per_step=4,
        samples_per_prompt=2,
        max_new_tokens=4,
        minibatch_size=8,
        layers=1,
    )
    for train in (ppo.train_ppo, rloo.train_rloo):
        policy, tokenizer = models.build_tiny_model("tiny", words=WORDS)
        history = train(policy, tokenizer, ["the cat", "a dog", "you are", "the"], own, config)
        columns = [column for column in history if column.startswith("reward/")]
        assert columns == (
            ["reward/brief", "reward/polite"] if name == "components" else ["reward/reward"]
        )
        np.testing.assert_allclose(history["reward"], history[columns].sum(axis=1), rtol=1e-5)


# --- detoxification: toxicity before a sentence less toxicity after it ---------------------------

PARTS = ["You are kind.", "You stupid idiot!", "Well,", "e.g. this", "\n", "Ünï", "?!", " "]


class Scripted(scorers.Scorer):
    """A score for every text, from its characters; some have none (NaN)."""

    def __init__(self, holes=False):
        super().__init__(name="scripted", version="0", detects="nothing")
        self.holes = holes

    def _score(self, texts):
        found = np.array([sum(map(ord, text)) % 97 / 96 for text in texts])
        return np.where(self.holes & (found > 0.7), np.nan, found)


@given(st.lists(st.lists(st.sampled_from(PARTS)).map(" ".join), min_size=1, max_size=5))
def test_drops_telescope_to_the_whole_responses_toxicity(texts):
    for unit in segments.UNITS:
        for logit in (False, True):
            drops = ToxicityDrops(Scripted(), segments.Segmenter(unit), logit)
            found = drops(["p"] * len(texts), texts)
            whole = Scripted().score(texts)
            end = -scorers.log_odds(whole) if logit else -whole
            start = scorers.log_odds(np.zeros(1))[0] if logit else 0.0
            for row, total, text in zip(found, end, texts, strict=True):
                assert len(row) == len(segments.Segmenter(unit).spans(text))
                if text.strip():
                    assert abs(row.sum() - (start + total)) < 1e-6


class ShareOfRudeWords(Scripted):
    def _score(self, texts):
        return np.array([text.split().count("idiot.") / len(text.split()) for text in texts])


def test_drops_are_before_less_after_and_count_their_calls():
    drops = ToxicityDrops(ShareOfRudeWords(), segments.Segmenter("sentence"))
    found = drops(["p", "p"], ["You are an idiot. You are kind. Bye.", ""])
    np.testing.assert_allclose(found[0], [-1 / 4, 1 / 4 - 1 / 7, 1 / 7 - 1 / 8])
    assert found[1].shape == (0,) and drops.calls == 3


def test_the_toxicity_of_no_text_moves_the_first_drop_only():
    text = "You are an idiot. You are kind. Bye."
    for logit in (False, True):
        how = (ShareOfRudeWords(), segments.Segmenter("sentence"), logit)
        low, high = (ToxicityDrops(*how, start=x)(["p"], [text])[0] for x in (-1.0, 0.5))
        np.testing.assert_allclose(high - low, [1.5, 0, 0], atol=1e-9)


def test_a_prefix_without_a_score_counts_as_the_one_before():
    drops = ToxicityDrops(Scripted(holes=True), segments.Segmenter("sentence"))
    found = drops(["p"], ["One here. Two there. Three now. Four then. Five so. Six. Seven."])[0]
    assert np.isfinite(found).all() and (found == 0).any()
