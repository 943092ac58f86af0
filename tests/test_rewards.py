"""The clean-text reward: right sign, each fault punished, every term named."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lib import generation, scorers, segments
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
