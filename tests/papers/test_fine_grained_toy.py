"""The task whose errors are known by construction: each kind of error is found, and only where it is."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib import models
from lib.papers.fine_grained import toy

PROMPT = "colour red, metal iron, city oslo? metal city:"


def told(text):
    found = toy.judge(PROMPT, text)
    return found.relevant.tolist(), found.true.tolist(), found.sentences.tolist(), found.coverage


@pytest.mark.parametrize(
    "text, expected",
    [
        ("metal iron, city oslo.", ([1, 1], [1, 1], [1], 1.0)),
        ("metal iron. colour red.", ([1, 0], [1, 1], [1, 1], 0.5)),  # C1: not asked for
        ("metal iron, metal iron.", ([1, 0], [1, 1], [1], 0.5)),  # C1: repeated
        ("metal gold, city oslo. city oslo", ([1, 1, 0], [0, 1, 1], [0, 1], 0.5)),  # C2 and C3
        ("metal gold. metal iron.", ([1, 0], [0, 1], [0, 1], 0.5)),  # right at the second try
        ("metal , city oslo oslo. age", ([0, 0, 0], [0, 0, 0], [0, 0], 0.0)),  # no clauses
        ("", ([], [], [], 0.0)),
    ],
)  # fmt: skip
def test_errors(text, expected):
    assert told(text) == expected


def test_the_judge_makes_padding_costly_and_is_at_most_one():
    best, padded = (
        toy.judge(PROMPT, text).f1
        for text in ("metal iron, city oslo.", "metal iron, city oslo. colour red. colour red.")
    )
    assert best == 1 and padded == pytest.approx(2 * 2 / (4 + 2))
    assert toy.judge(PROMPT, "").f1 == 0


@pytest.mark.parametrize(
    "text, paid",
    [
        ("metal iron. city oslo.", [1, 1]),
        ("metal iron. metal iron.", [1, 0]),  # said before: not paid again, not charged either
        ("metal iron. metal iron, city oslo.", [1, 1]),  # something new in it
        ("metal gold. metal iron.", [-1, 1]),  # what was wrong before can still be said rightly
        ("metal iron. metal gold.", [1, -1]),
        ("metal iron, metal iron.", [1]),
        ("", []),
    ],
)
def test_a_true_sentence_is_paid_once(text, paid):
    assert toy.factuality([PROMPT], [text])[0].tolist() == paid


@given(st.lists(st.sampled_from(["metal", "iron", "city", "oslo", ",", "."])).map(" ".join))
def test_rewards_have_one_number_for_each_segment_and_segments_cut_the_text(text):
    for unit, score in (
        ("clause", toy.relevance),
        ("sentence", toy.factuality),
        ("sequence", toy.completeness),
    ):
        spans = toy.Segmenter(unit).spans(text)
        assert "".join(text[a:b] for a, b in spans) == text
        assert len(score([PROMPT], [text])[0]) == len(spans)
    row = toy.panel([PROMPT], [text]).iloc[0]
    assert row.relevant <= row.clauses and row.factual <= row.sentences <= row.clauses


def test_questions_differ_read_back_and_depend_on_the_seed():
    questions = toy.draw_questions(50, seed=3)
    assert len({q.prompt for q in questions}) == 50
    assert [toy.read(q.prompt) for q in questions] == questions
    assert toy.draw_questions(50, seed=3) == questions
    assert toy.draw_questions(50, seed=4) != questions
    with pytest.raises(ValueError, match="asked up to facts"):
        toy.draw_questions(1, seed=0, facts=2, asked=3)
    with pytest.raises(ValueError, match="not a prompt of this task"):
        toy.read("What is the metal?")


def test_words_are_tokens_and_values_belong_to_one_attribute():
    _, tokenizer = toy.tokenizer_and_model()
    words = [w for name, values in toy.ATTRIBUTES.items() for w in (name, *values)]
    assert len(words) == len(set(words)) == 12 * 9
    assert tokenizer.unk_token_id not in tokenizer(" ".join([*words, PROMPT]))["input_ids"]


def test_demonstrations_err_as_often_as_they_are_told_to():
    questions = toy.draw_questions(400, seed=0)
    prompts = [q.prompt for q in questions]
    texts = toy.demonstrate(questions, 0, relevant=1.0, right=0.75)
    found = [toy.judge(p, t) for p, t in zip(prompts, texts, strict=True)]
    assert np.concatenate([e.true for e in found]).mean() == pytest.approx(
        0.75 + 0.25 / 8, abs=0.04
    )
    perfect = toy.demonstrate(questions, 0, relevant=1.0, right=1.0)
    assert all(e.sentences.all() for e in map(toy.judge, prompts, perfect))


@pytest.mark.parametrize("relevant", [0.0, 0.6, 1.0])
def test_demonstrations_say_nothing_twice_and_asked_facts_first_where_that_is_wanted(relevant):
    questions = toy.draw_questions(200, seed=1)
    for question, text in zip(
        questions, toy.demonstrate(questions, 0, relevant=relevant), strict=True
    ):
        names = [
            clause.split()[0] for clause in text.replace(".", ",").split(",") if clause.strip()
        ]
        assert 2 <= len(names) == len(set(names)) <= len(question.facts)
        first = [name in question.asked for name in names[:3]]
        assert relevant not in (0.0, 1.0) or set(first) == {bool(relevant)}


def test_erring_scores_turn_the_share_of_segments_asked_for_and_always_the_same():
    questions = toy.draw_questions(400, seed=2)
    prompts, texts = [q.prompt for q in questions], toy.demonstrate(questions, 0)
    for name, score in (("R1", toy.relevance), ("R3", toy.completeness)):
        right = np.concatenate(score(prompts, texts))
        wrong = np.concatenate(toy.erring(score, name, 0.2)(prompts, texts))
        turned = wrong != right
        unclear = right == sum(toy.SCALES[name]) / 2  # a half stays a half
        assert turned[~unclear].mean() == pytest.approx(0.2, abs=0.05)
        np.testing.assert_allclose((wrong + right)[turned], sum(toy.SCALES[name]))
        back = toy.erring(score, name, 0.2)(prompts[::-1], texts[::-1])[::-1]
        np.testing.assert_array_equal(np.concatenate(back), wrong)
        other = np.concatenate(toy.erring(score, name, 0.2, seed=1)(prompts, texts))
        assert (other != wrong).any()
    with pytest.raises(ValueError, match="allowed: 0 to 1"):
        toy.erring(toy.relevance, "R1", 20)


def test_preferred_pairs_put_the_better_answer_first_and_noise_turns_some():
    values = np.array([0.1, 0.9, 0.5, 0.2, 0.3, 0.8])
    sure = toy.preferred_pairs(values, 3, noise=0.0, seed=0)
    assert sure.shape == (2, 3, 2) and (values[sure[..., 0]] > values[sure[..., 1]]).all()
    assert {tuple(sorted(pair)) for pair in sure[1].tolist()} == {(3, 4), (3, 5), (4, 5)}
    close = np.tile([0.5, 0.55], 500)
    turned = close[toy.preferred_pairs(close, 2, noise=0.1, seed=0)[..., 0]] == 0.5
    assert 0.25 < turned.mean() < 0.48  # P(N(.05, .1 sqrt 2) < 0) = .36


def test_quality_is_the_mean_of_three_shares():
    texts = ["metal iron, city oslo.", "metal iron. colour red.", ""]
    assert toy.quality([PROMPT] * 3, texts).tolist() == pytest.approx([1, 2 / 3, 0])


def test_a_kept_policy_of_the_task_is_loaded_and_another_refused(tmp_path):
    policy, tokenizer = toy.tokenizer_and_model(7, hidden_size=32)
    models.save(policy, tokenizer, tmp_path / "toy")
    again = toy.load_policy(str(tmp_path / "toy"))
    assert again.dtype == torch.float32
    for name, weight in policy.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name].cpu(), weight, atol=0, rtol=0)
    models.save(*models.build_tiny_model("tiny"), tmp_path / "tiny")
    with pytest.raises(ValueError, match="other tokens than the words of this task"):
        toy.load_policy(str(tmp_path / "tiny"))
