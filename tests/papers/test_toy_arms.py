"""Training in the toy world: what is paid where, what is measured on the way, the learned rival."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from lib import generation, ppo, reward_models, rewards
from lib.papers.fine_grained import toy, toy_arms

WEIGHTS = (0.3, 0.5, 0.3)
QUESTIONS = [question.prompt for question in toy.draw_questions(48, seed=0)]


@pytest.fixture(scope="module")
def start():
    return toy.tokenizer_and_model(0, hidden_size=32)


@pytest.fixture(scope="module")
def answers(start):
    return generation.sample(*start, QUESTIONS, seed=1, max_new_tokens=12)


def fresh():
    return toy.tokenizer_and_model(0, hidden_size=32)[0]


def said(tokenizer, text):
    """An answer as a sample of one."""
    prompt = "colour red, metal iron, city oslo? metal city:"
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return generation.Samples(
        prompts=[prompt], prompt_index=[0], texts=[text], prompt_ids=[[0]], response_ids=[ids],
        log_probs=[np.zeros(len(ids))], model_log_probs=[np.zeros(len(ids))], finished=[True],
    )  # fmt: skip


def test_every_place_pays_the_same_total_and_dense_pays_where_it_is_earned(start, answers):
    dense = toy_arms.dense_reward(start[1], answers, WEIGHTS)
    places = {name: place(dense) for name, place in toy_arms.PLACES.items()}
    totals = {name: rewards.totals(reward(answers), answers) for name, reward in places.items()}
    np.testing.assert_allclose(totals["dense"], totals["at the end"], atol=1e-6)
    assert sorted(totals["shuffled"]) == pytest.approx(sorted(totals["dense"]))
    at_end, _ = rewards.place_rewards(places["at the end"](answers), answers)
    assert all((row != 0).sum() <= 1 for row in at_end)


def test_weights_leave_parts_out_and_errors_turn_scores(start, answers):
    without = toy_arms.dense_reward(start[1], answers, (0.0, 0.5, 0.3))(answers)
    assert set(without) == {"R2", "R3"}
    right, wrong = (
        toy_arms.dense_reward(start[1], answers, (1.0, 0.0, 0.0), errors)(answers)["R1"]
        for errors in (0.0, 1.0)
    )
    np.testing.assert_allclose(np.concatenate(right), -np.concatenate(wrong))


def test_answers_are_described_and_an_empty_one_has_no_right_parts(start, answers):
    dense = toy_arms.dense_reward(start[1], answers, WEIGHTS)
    good, empty = (
        toy_arms.describe_answers(said(start[1], text), dense).iloc[0]
        for text in ("metal iron . city oslo .", "")
    )
    assert (good.f1, good.relevance, good.factuality, good.clauses, good.tokens) == (1, 1, 1, 2, 7)
    assert (empty.f1, empty.relevance, empty.factuality) == (0, 0, 0) and empty.total <= 0


def test_training_is_measured_before_on_the_way_and_at_the_end_and_not_changed_by_it(
    start, answers
):
    reward = toy_arms.dense_reward(start[1], answers, WEIGHTS)
    config = ppo.PPOConfig(
        steps=5, prompts_per_step=8, train="all", epochs=1, max_new_tokens=12, learning_rate=1e-3
    )
    policy = fresh()

    def measure():
        drawn = generation.sample(policy, start[1], QUESTIONS[:6], seed=3, max_new_tokens=12)
        return toy_arms.describe_answers(drawn, reward)

    before = measure()
    table = toy_arms.train_measured(policy, start[1], QUESTIONS, reward, config, measure, every=2)
    assert table.groupby("step").size().to_dict() == {0: 6, 2: 6, 4: 6, 5: 6}
    pd.testing.assert_frame_equal(table[table.step == 0][before.columns], before)
    assert (table[table.step == 0].kl == 0).all() and (table[table.step == 5].kl > 0).all()
    plain = fresh()
    ppo.train_ppo(plain, start[1], QUESTIONS, reward, config)
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(policy.state_dict()[name], weight, atol=0, rtol=0)

    scores = toy_arms.scores_of_questions(table)
    assert len(scores) == 6
    one = table[table.prompt_index == 2]
    assert scores.set_index("prompt_index").area[2] == pytest.approx(one.f1.mean())
    assert scores.set_index("prompt_index").f1[2] == one.f1.iloc[-1]
    thirds = toy_arms.scores_of_thirds(table)
    late = one[one.step > 2 * 5 / 3].clauses.mean()
    assert thirds["last third"].set_index("prompt_index").clauses[2] == pytest.approx(late)


def test_steps_until_a_level_and_a_bound_where_it_is_never_reached():
    rows = [
        ("a", 1, 0, 0.1),
        ("a", 1, 10, 0.8),
        ("a", 1, 20, 0.6),
        ("b", 1, 0, 0.1),
        ("b", 1, 20, 0.2),
    ]
    curves = pd.DataFrame(rows, columns=["arm", "seed", "step", "f1"])
    assert toy_arms.steps_to(curves, 0.7).steps.tolist() == [10, 40]


def test_a_preference_model_is_trained_on_other_questions_than_it_is_tested_on(start):
    questions = toy.draw_questions(48, seed=0)
    trios = zip(*(toy.demonstrate(questions, seed) for seed in range(3)), strict=True)
    texts = [text for trio in trios for text in trio]
    drawn = generation.sample(*start, QUESTIONS, n=3, seed=2, max_new_tokens=12)
    drawn = dataclasses.replace(drawn, texts=texts)
    config = reward_models.TrainConfig(1e-3, epochs=1, prompts_per_batch=8)
    model, table = toy_arms.train_preference_model(
        fresh(), start[1], drawn, config, per_question=3, held_out=16, noise=0.0
    )
    assert table.loc["ceiling: quality without noise", "value"] > 0.9  # ties count half
    assert (table.n == 16).all() and table.value.between(0, 1).all()
    reward = toy_arms.preference_reward(model, start[1], drawn)
    paid = rewards.totals(reward(drawn), drawn)
    assert paid.mean() == pytest.approx(0, abs=1e-3) and paid.std() == pytest.approx(1, abs=1e-2)
    assert all((row[:-1] == 0).all() for row in reward(drawn)["preference"])  # at the last token


def test_the_likelihood_model_scores_by_the_mean_probability_of_an_answers_tokens(start, answers):
    model = toy_arms.LikelihoodModel(fresh(), start[1]).eval()
    encoded = model.encode(answers.prompts, answers.texts)
    same = [i for i, (_, ids) in enumerate(encoded) if ids == list(answers.response_ids[i])]
    assert len(same) > 2  # others did not end, or hold a token that is no text
    prompts, texts = ([x[i] for i in same] for x in (answers.prompts, answers.texts))
    expected = [8 * np.exp(answers.model_log_probs[i]).mean() for i in same]
    np.testing.assert_allclose(model.score(prompts, texts), expected, atol=1e-4)
    logits = model(**model.batch([encoded[i] for i in same])).logits[:, 0]
    np.testing.assert_allclose(logits.detach(), expected, atol=1e-4)


def test_the_plan_holds_ppo_and_three_reward_models():
    table, gigabytes = toy_arms.plan()
    assert table.index.tolist() == ["PPO", "R1, R2, R3"]
    assert gigabytes == pytest.approx(table["peak, GB"].sum(), abs=0.02)
    assert 1.5 < table.loc["R1, R2, R3", "peak, GB"] < 2  # 149M parameters each, 4 bytes
