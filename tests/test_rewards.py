"""The clean-text reward: right sign, each fault punished, every term named."""

import numpy as np

from lib import generation, rewards, scoring


def samples(*texts):
    rows = [np.zeros(3, dtype=np.float32) for _ in texts]
    return generation.Samples(
        prompts=["p"] * len(texts), prompt_index=[0] * len(texts), prompt_ids=[[1]] * len(texts),
        response_ids=[[1, 2, 3]] * len(texts), texts=list(texts), log_probs=rows,
        model_log_probs=rows, finished=[True] * len(texts),
    )  # fmt: skip


def total(*texts):
    reward = rewards.CleanTextReward(scoring.load_scorer("lexicon-insults", role="reward"))
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
    reward = rewards.CleanTextReward(scoring.load_scorer("lexicon-insults"))
    parts = reward(samples("a b c", ""))
    assert list(parts) == ["clean", "empty", "repetition", "non_latin"]
    assert parts["empty"].tolist() == [0, -4]
    assert all(np.isfinite(part).all() and part.shape == (2,) for part in parts.values())
