"""Dense rewards: each at its segment's last token, added up, in all what the holistic one pays."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import generation, rewards, segments
from lib.papers.fine_grained import toy

_, TOKENIZER = toy.tokenizer_and_model()
WORDS = ["red", "Iron", "oslo", "age", "two", ",", ".", ";", "!"]
END = TOKENIZER.eos_token_id
QA_UNITS = ("clause", "sentence", "sequence")
SEGMENTERS = [*map(toy.Segmenter, QA_UNITS), *map(segments.Segmenter, segments.UNITS)]


def response_ids():
    """Generated ids: words, marks, unknown and special tokens; ended, cut off, or the end token alone."""
    token = st.sampled_from([*TOKENIZER(" ".join(WORDS))["input_ids"], TOKENIZER.unk_token_id])
    body = st.lists(token, max_size=24)
    return st.one_of(body.map(lambda ids: [*ids, END]), body.filter(bool))


def samples_of(*rows, prompt="p"):
    zeros = [np.zeros(len(ids), dtype=np.float32) for ids in rows]
    return generation.Samples(
        prompts=[prompt] * len(rows), prompt_index=[0] * len(rows), prompt_ids=[[1]] * len(rows),
        response_ids=list(rows), texts=[TOKENIZER.decode(r, skip_special_tokens=True) for r in rows],
        log_probs=zeros, model_log_probs=zeros, finished=[r[-1] == END for r in rows],
    )  # fmt: skip


def part(name, segmenter, numbers, **how):
    """A reward model that gives the numbers round and round, one for each segment."""

    def score(prompts, responses):
        cut = [segmenter.spans(text) for text in responses]
        return [np.array([numbers[i % len(numbers)] for i in range(len(row))]) for row in cut]

    return rewards.SegmentReward(name, segmenter, score, **how)


numbers = st.lists(st.floats(-1, 1), min_size=1, max_size=7)
weights = st.floats(0, 1)


@settings(max_examples=1000, deadline=None)
@given(ids=response_ids(), values=st.tuples(numbers, numbers, numbers), w=weights, data=st.data())
def test_each_reward_sits_at_its_segments_last_token_and_all_add_up(ids, values, w, data):
    chosen = data.draw(st.permutations(SEGMENTERS))[:3]
    parts = [
        part(f"R{k}", s, v, weight=w, mean=0.25, std=2.0)
        for k, (s, v) in enumerate(zip(chosen, values, strict=True))
    ]
    drawn = samples_of(ids)
    dense = rewards.compose(parts, TOKENIZER)
    expected = np.zeros(len(ids))
    for segmenter, found, k in zip(chosen, values, range(3), strict=True):
        spans = segmenter.spans(drawn.texts[0])
        for j, (_, end) in enumerate(spans):
            last = j == len(spans) - 1
            place = len(ids) - 1 if last else first_token_that_writes(ids, end)
            expected[place] += w * (found[j % len(found)] - 0.25) / 2.0
        assert len(dense(drawn)[f"R{k}"][0]) == len(ids)
    placed, sums = rewards.place_rewards(dense(drawn), drawn)
    np.testing.assert_allclose(placed[0].numpy(), expected, atol=1e-6)
    whole, whole_sums = rewards.place_rewards(rewards.at_end(dense)(drawn), drawn)
    assert not whole[0, :-1].any()
    assert abs(whole[0, -1].item() - expected.sum()) < 1e-6
    for name, total in sums.items():
        assert abs(total[0] - whole_sums[name][0]) < 1e-6


def first_token_that_writes(ids, end):
    """By trying every prefix, where the segmenter searches by halves."""
    text = TOKENIZER.decode(ids, skip_special_tokens=True)
    for i in range(len(ids)):
        if TOKENIZER.decode(ids[: i + 1], skip_special_tokens=True).startswith(text[:end]):
            return i
    raise AssertionError(f"no token ends at {end} of {text!r}")


def test_rewards_that_meet_on_one_token_add_up():
    ids = [*TOKENIZER("age two.")["input_ids"], END]
    both = [part(n, toy.Segmenter(u), [0.5]) for n, u in (("a", "clause"), ("b", "sentence"))]
    placed, sums = rewards.place_rewards(
        rewards.compose(both, TOKENIZER)(samples_of(ids)), samples_of(ids)
    )
    assert placed.tolist() == [[0, 0, 0, 1]] and sums["a"] == sums["b"] == 0.5


def test_an_empty_response_is_judged_as_a_sequence_of_the_task_and_has_no_clauses():
    parts = [part(u, toy.Segmenter(u), [1.0]) for u in QA_UNITS]
    found = rewards.compose(parts, TOKENIZER)(samples_of([END]))
    assert [found[u][0].tolist() for u in QA_UNITS] == [[0], [0], [1]]


@pytest.mark.parametrize("value, n", [(0.1, 3), (0.7, 6), (-1.3, 10)])
def test_a_reward_model_that_says_the_same_of_everything_pays_nothing(value, n):
    reward = rewards.SegmentReward(
        "R", segments.Segmenter("sequence"), lambda p, r: [np.array([value]) for _ in r]
    )
    fitted = reward.fitted(["p"] * n, ["r"] * n)
    assert fitted.std == 1.0
    assert np.abs(np.concatenate(fitted(["p"] * n, ["r"] * n))).max() < 1e-12


def test_a_response_without_a_token_is_paid_nothing_anywhere():
    samples = samples_of([5, 6, END], [END])
    samples.response_ids[1], samples.texts[1] = [], ""
    dense = rewards.compose([part("R", segments.Segmenter("sentence"), [2.0])], TOKENIZER)

    def numbers(s):
        return {"whole": [1.0] * len(s), "tokens": [[0.5] * len(x) for x in s.response_ids]}

    for reward in (dense, rewards.at_end(dense), numbers, lambda s: np.array([1.0, 10.0])):
        for fn in (reward, rewards.shuffled(reward)):
            paid, sums = rewards.place_rewards(fn(samples), samples)
            assert paid[1].sum() == 0 and all(values[1] == 0 for values in sums.values())
            np.testing.assert_allclose(paid.sum(1), sum(sums.values()))
    none = samples_of([END], [END])
    none.response_ids[:], none.texts[:] = [[], []], ["", ""]
    paid, sums = rewards.place_rewards([1.0, 10.0], none)
    assert paid.shape == (2, 0) and sums["reward"].tolist() == [0, 0]


def test_mean_and_deviation_are_measured():
    reward = part("R", toy.Segmenter("clause"), [1.0, 3.0], weight=2.0)
    fitted = reward.fitted(["p"], ["age two, age two, age two, age two."])
    assert (fitted.mean, fitted.std) == (2.0, 1.0)
    assert fitted(["p"], ["age two, age two."])[0].tolist() == [-2.0, 2.0]
    alike = reward.fitted(["p"], ["age two."])
    assert alike.std == 1 and alike(["p"], ["age two."])[0].tolist() == [0]
    for texts, scores in (([""], [1.0]), (["age two."], [float("inf")]), (["age two."], [np.nan])):
        with pytest.raises(ValueError, match="'R' gives . scores for 1 responses"):
            part("R", toy.Segmenter("clause"), scores).fitted(["p"], texts)
    with pytest.raises(ValueError, match="std of 'R' is 0.0"):
        part("R", toy.Segmenter("clause"), [1.0], std=0.0)


def test_scores_and_segments_that_do_not_match_are_refused():
    wrong = rewards.SegmentReward("R", toy.Segmenter("clause"), lambda p, r: [np.ones(5)])
    with pytest.raises(ValueError, match="5 scores for a response of 1 segments: 'age two"):
        rewards.compose([wrong], TOKENIZER)(samples_of([*TOKENIZER("age two.")["input_ids"], END]))
    with pytest.raises(ValueError, match="names must differ"):
        rewards.compose([wrong, wrong], TOKENIZER)
