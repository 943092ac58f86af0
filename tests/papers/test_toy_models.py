"""Reward models learned in the toy world: what they see, that they learn, how their errors are counted."""

import numpy as np
import pandas as pd
import pytest
import torch

from lib import generation
from lib.papers.fine_grained import figures, toy, toy_arms, toy_models

PROMPT = "colour red, metal iron, city oslo? metal city:"
ANSWERS = ["metal iron. colour red.", "metal gold, city oslo.", "", "metal iron. metal iron."]
PROMPTS = [PROMPT] * len(ANSWERS)


@pytest.fixture(scope="module")
def policy():
    model, tokenizer = toy.tokenizer_and_model(0, hidden_size=32, num_key_value_heads=4)
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def samples(policy):
    model, tokenizer = policy
    questions = toy.draw_questions(60, seed=3)
    answers = toy.demonstrate(questions, 0)
    ids = [[*tokenizer(a, add_special_tokens=False).input_ids, 0] for a in answers]
    for row in ids:
        row[-1] = tokenizer.eos_token_id
    prompts = [question.prompt for question in questions]
    return generation.Samples(
        prompts=prompts, texts=answers, response_ids=ids,
        prompt_ids=[tokenizer(p).input_ids for p in prompts],
        prompt_index=list(range(len(prompts))), log_probs=[np.zeros(len(row)) for row in ids],
        model_log_probs=[np.zeros(len(row)) for row in ids],
        finished=[True] * len(ids),
    )  # fmt: skip


def test_each_segment_has_a_row_of_features_that_no_neighbour_in_the_batch_moves(policy):
    model, tokenizer = policy
    features = toy_models.segment_features(model, tokenizer, PROMPTS, ANSWERS)
    marks = toy_models.true_scores(PROMPTS, ANSWERS)
    for name, rows in features.items():
        assert [len(row) for row in rows] == [len(row) for row in marks[name]]
        alone = toy_models.segment_features(model, tokenizer, PROMPTS[:1], ANSWERS[:1])
        assert torch.allclose(rows[0], alone[name][0], atol=1e-5)


def test_the_places_of_a_segment_and_its_relations(policy):
    """Clause 2 of an answer repeats clause 1, so its tokens are as like as can be to the answer before."""
    _, tokenizer = policy
    row = toy_models._row(tokenizer, PROMPT, "metal iron, metal iron.")
    assert row.ends["R1"].tolist() == [2, 5] and row.ends["R2"].tolist() == [5]
    assert row.ends["R3"].tolist() == [6] and row.asked == 3
    like = torch.eye(4)[None].repeat(2, 1, 1)
    like[1, 3, 1] = 0.5
    probability = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).repeat(2, 1)
    places = (
        torch.tensor([0, 0]),
        torch.tensor([1, 1]),
        torch.tensor([1, 3]),
        torch.tensor([2, 3]),
    )
    numbers = toy_models._relations(probability, like, *places)
    assert torch.allclose(numbers[0, :2], torch.tensor([0.25, 0.2]))
    assert torch.allclose(numbers[1, 4:6], torch.tensor([0.5, 0.5]))
    assert numbers[1, 6] == 0


def test_heads_learn_marks_that_features_hold():
    rng = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 5, generator=rng)
    classes = {"R1": np.sign(inputs[:, 0].numpy()), "R2": np.sign(inputs[:, 1].numpy().round())}
    for name, scores in classes.items():
        model = toy_models.fit(name, [inputs], [scores.astype(float)])
        assert (model.score(inputs) == scores).mean() > 0.9
    share = torch.sigmoid(2 * inputs[:, 2]).numpy()
    assert np.abs(toy_models.fit("R3", [inputs], [share]).score(inputs) - share).mean() < 0.05


def test_learned_scores_pay_each_segment_and_an_empty_answer(policy, samples):
    model, tokenizer = policy
    features = toy_models.segment_features(model, tokenizer, samples.prompts, samples.texts)
    marks = toy_models.true_scores(samples.prompts, samples.texts)
    heads = toy_models.learn(features, marks, 50)
    scores = toy_models.scores_of(heads, model, tokenizer)
    assert [len(x) for x in scores["R1"](PROMPTS, ANSWERS)] == [2, 2, 0, 2]
    assert set(np.concatenate(scores["R1"](PROMPTS, ANSWERS))) <= {-1.0, 1.0}
    reward = toy_arms.dense_reward(tokenizer, samples, (0.3, 0.5, 0.3), scores=scores)
    true = toy_arms.dense_reward(tokenizer, samples, (0.3, 0.5, 0.3))
    table = toy_models.describe_answers(samples, true, reward, scores)
    assert table[["paid", "total", "misjudged"]].notna().all(axis=None)


def test_errors_are_none_without_flips_and_all_when_everything_is_turned(samples):
    texts = samples.prompts, samples.texts
    right = toy_models.error_rates(toy_models.flipped(0.0), *texts, seed=0)
    assert (right.value == 0).all() and right.index.tolist() == ["R1", "R2", "R3", "misjudged"]
    turned = toy_models.errors(toy_models.flipped(1.0), *texts)
    r1 = turned[turned.reward == "R1"]
    assert (r1.error == 1).all() and len(r1) == toy.panel(*texts).clauses.sum()
    fifth = toy_models.error_rates(toy_models.flipped(0.2), *texts, seed=0).value
    assert 0.1 < fifth["misjudged"] < 0.3


def test_an_error_reaches_the_tokens_before_it_when_dense_and_all_at_the_end(policy, samples):
    _, tokenizer = policy
    scores = toy_models.flipped(0.2)
    weights = (0.3, 0.5, 0.3)
    true = toy_arms.dense_reward(tokenizer, samples, weights)
    erring = toy_arms.dense_reward(tokenizer, samples, weights, scores=scores)
    number = toy_models.one_misjudged(samples, scores)
    table = toy_models.credit_of_tokens(samples, number, {"true": true, "erring": erring})
    shift = {
        (what, place): (table.loc[f"{what}, {place}, erring"] - table.loc[f"{what}, {place}, true"]).abs()
        for what in ("reward", "advantage") for place in toy_models.PLACEMENTS
    }  # fmt: skip
    at_end = shift["advantage", "at the end"]
    assert np.allclose(at_end, at_end.iloc[0], atol=1e-5)  # every token alike
    places = np.flatnonzero(shift["reward", "dense"] > 0.2)
    assert len(places) and (shift["advantage", "dense"][places[-1] + 1 :] < 0.2).all()
    follows = toy_models.agreement(samples, true, {"none": true, "a fifth": erring})
    assert follows.loc["none", "dense"] == pytest.approx(1.0)
    assert follows.loc["a fifth", "dense"] < 1


def test_pooled_arms_are_means_of_seeds_in_which_all_ran():
    rows = [("a", 1, 0, 0.2), ("b", 1, 0, 0.4), ("a", 2, 0, 0.9)]
    table = pd.DataFrame(rows, columns=["arm", "seed", "prompt_index", "area"])
    mean = toy_models.pooled(table, ["a", "b"])
    assert mean.to_dict("records") == [{"seed": 1, "prompt_index": 0, "area": pytest.approx(0.3)}]


def test_gain_by_error_draws_a_line_a_kind():
    columns = ["kind", "level", "error", "value", "low", "high"]
    rows = [("flipped", "0 %", 0.0, 0.1, 0.0, 0.2), ("learned", "30", 0.15, 0.05, np.nan, np.nan)]
    figure = figures.gain_by_error(
        pd.DataFrame(rows, columns=columns), title="t", xlabel="x", ylabel="y"
    )
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["flipped", "learned"]
