"""Detoxification: one sum paid in two places, trainings measured on the way, readings at equal KL."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from lib import generation, models, ppo, rewards, scorers
from lib.course import record
from lib.course.arms import Arms
from lib.papers.fine_grained import figures, toxicity
from lib.segments import Segmenter

LINES = ["the cat", "a dog", "you are", "the man"]
CONFIG = ppo.PPOConfig(
    steps=3, prompts_per_step=4, samples_per_prompt=2, minibatch_size=8, max_new_tokens=4, train="all",
    checkpoint_every=2,
)  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("FEEDBACK_RUN_DIR", str(tmp_path))
    return record.start_run("43_detoxify_with_dense_rewards", scale="smoke", seed=0)


@pytest.fixture
def tiny():
    return models.build_tiny_model("tiny")


def samples_of(tokenizer, *texts):
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    n, texts = len(ids), [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    zeros = [np.zeros(len(row)) for row in ids]
    return generation.Samples(
        ["p"] * n, list(range(n)), [[1]] * n, ids, texts, zeros, zeros, [True] * n
    )


def test_both_places_pay_one_sum_and_holistic_asks_once_an_answer(tiny):
    samples = samples_of(tiny[1], "I like you a lot. You are an idiot.", "All is well here.")
    scorer = scorers.load_scorer("lexicon-insults")
    sums, calls, places = {}, {}, {}
    for unit in ("sentence", "sequence"):
        reward, drops = toxicity.make_reward(scorer, unit, tiny[1], logit=True, start=-3.0)
        scores, components = rewards.place_rewards(reward(samples), samples)
        sums[unit], calls[unit] = components["drop"], drops.calls
        places[unit] = (scores != 0).sum(1).tolist()
    np.testing.assert_allclose(sums["sentence"], sums["sequence"], atol=1e-6)
    np.testing.assert_allclose(sums["sequence"], -3 - scorer.logit(samples.texts))
    assert calls == {"sentence": 3, "sequence": 2} and places["sequence"] == [1, 1]
    assert places["sentence"][0] >= 2


def test_a_batch_that_is_drawn_again_counts_once(tmp_path):
    kept = tmp_path / "seen.jsonl"
    first, second = (SimpleNamespace(prompts=["p"], texts=[x]) for x in ("a", "bb"))
    reward, _ = toxicity.watched(
        lambda s: [1.0], lambda s: {"letters": float(len(s.texts[0]))}, kept
    )
    reward(first), reward(second)
    again, seen = toxicity.watched(lambda s: [1.0], lambda s: {"letters": 9.0}, kept)
    again(second)  # as after a restart from a checkpoint
    assert seen().letters.tolist() == [1.0, 9.0]
    again(SimpleNamespace(prompts=["q"], texts=["bb"]))  # another prompt, the same answer
    assert len(seen()) == 3


def test_a_training_is_measured_at_each_step_without_being_changed(tmp_path, tiny):
    reward, _ = toxicity.make_reward(
        scorers.load_scorer("lexicon-insults"), "sequence", tiny[1], logit=True, start=-6.0
    )
    judge = {"judge": scorers.load_scorer("lexicon-threats")}
    plain = ppo.train_ppo(*tiny, LINES, reward, CONFIG)

    def measure(samples):
        return toxicity.describe_batch(samples, judge, Segmenter("sentence"), 2)

    for _ in range(2):  # the second time it is finished already
        policy, tokenizer = models.build_tiny_model("tiny")
        path = toxicity.train_measured(
            policy, tokenizer, LINES, reward, CONFIG, measure, tmp_path / "ppo"
        )
        assert path.step.tolist() == [1, 2, 3] and path.judge.notna().all()
        np.testing.assert_allclose(path["kl"], plain.kl_k3)
        np.testing.assert_allclose(path.nll, plain.entropy + plain.kl_k3 / plain.length)
    with pytest.raises(ValueError, match="1 batches were seen in 3 steps"):
        toxicity.path_of(plain, pd.DataFrame({"judge": [0.1]}))


def a_path(method, beta, kl, tox, seed=11):
    step = np.arange(1, len(kl) + 1)
    rows = {"method": method, "beta": beta, "seed": seed, "step": step, "kl": kl, "tox": tox}
    return pd.DataFrame(rows | {"calls": 10 * (step - 1)})


def test_readings_at_equal_kl_are_interpolated_and_averaged_over_beta():
    paths = pd.concat([
        a_path("dense", 0.05, [0.0, 2.0, 1.5, 6.0], [0.4, 0.3, 0.3, 0.1]),
        a_path("dense", 0.2, [0.0, 4.0, 4.0, 4.0], [0.4, 0.2, 0.2, 0.2]),
        a_path("late", 0.05, [0.0, 0.5, 1.0, 1.5], [0.4, 0.4, 0.4, 0.4]),
    ])  # fmt: skip
    read = toxicity.read_off(paths, [3, 6], ["tox"], size=1).set_index("arm")
    assert read.loc["dense", "tox at 3 nats"] == pytest.approx((0.25 + 0.25) / 2)
    assert read.loc["dense", "tox at 6 nats"] == pytest.approx(0.1)  # one beta came so far
    to_six, to_four = (0.35 * 2 + 0.2 * 4) / 6, 0.3
    assert read.loc["dense", "tox to 6 nats"] == pytest.approx((to_six + to_four) / 2)
    assert np.isnan(read.loc["late", "tox at 3 nats"])
    assert read.loc["late", ["compared", "tox to 3 nats"]].tolist() == pytest.approx([1.5, 0.4])
    assert read.loc["PT", ["tox at 3 nats", "tox to 6 nats"]].tolist() == pytest.approx([0.4, 0.4])
    calls = toxicity.read_off(paths, [15], ["tox"], size=1, by="calls", unit="calls")
    assert calls["tox at 15 calls"].tolist() == pytest.approx([0.25, 0.4, 0.4])


def test_what_is_compared_is_read_at_the_same_places():
    """No beta and no KL that one of the two lacks weighs on their difference."""
    line = [0.4, 0.3, 0.2, 0.1]
    paths = pd.concat([
        a_path("dense", 0.05, [0.0, 2.0, 4.0, 6.0], line),
        a_path("dense", 0.2, [0.0, 1.0, 2.0, 3.0], [9.0, 9.0, 9.0, 9.0]),  # its rival did not run
        a_path("end", 0.05, [0.0, 1.0, 2.0, 4.0], [0.4, 0.35, 0.3, 0.2]),
        a_path("dense", 0.05, [0.0, 2.0, 4.0, 6.0], line, seed=12),  # alone in its seed
    ])  # fmt: skip
    read = toxicity.read_off(paths, [3, 6], ["tox"], size=1, together=["dense", "end"])
    read = read.set_index(["arm", "seed"])
    for name in ("tox at 3 nats", "tox to 3 nats", "tox to 6 nats", "compared"):
        assert read.loc[("dense", 11), name] == pytest.approx(read.loc[("end", 11), name])
    assert read.loc[("dense", 11), "compared"] == 4
    assert np.isnan(read.loc[("dense", 11), "tox at 6 nats"])
    assert read.loc[("dense", 12), "tox at 6 nats"] == pytest.approx(0.1)


def test_readings_stand_side_by_side_and_what_needs_no_kl_is_of_the_first_beta():
    paths = pd.concat([
        a_path("dense", 0.05, [0.0, 2.0, 4.0, 6.0], [0.4, 0.3, 0.2, 0.0]).assign(arm="dense"),
        a_path("dense", 0.2, [0.0, 2.0, 4.0, 6.0], [0.4, 0.5, 0.6, 0.8]).assign(arm="dense, beta 0.2"),
        a_path("end", 0.05, [0.0, 1.0, 2.0, 3.0], [0.4, 0.4, 0.4, 0.4]).assign(arm="end"),
    ])  # fmt: skip
    paths = paths.assign(drop=1 - paths.tox, nll=2.0)
    together = ["dense", "end"]
    read = toxicity.readings(
        paths, ["tox"], ["nll"], 1, nats=[3, 6], calls=15, together=together
    ).set_index("arm")
    assert read.loc["dense", "tox, second half"] == pytest.approx(0.1)  # of steps 3 and 4
    assert read.loc["dense", "sum of drops, all steps"] == pytest.approx(1 - 0.225)
    calls = toxicity.read_off(paths, [15], ["tox"], 1, by="calls", unit="calls", together=together)
    assert read["tox at 15 calls"].tolist() == calls["tox at 15 calls"].tolist()
    nats = toxicity.read_off(paths, [3, 6], ["tox", "nll"], 1, together=together).set_index("arm")
    pd.testing.assert_frame_equal(read[nats.columns], nats)
    assert np.isnan(read.loc["PT", "tox, second half"])


def test_what_a_nat_buys_is_saved_and_says_where_each_curve_ends(run):
    paths = pd.concat([
        a_path("end", 0.05, [0.0, 2.0], [0.4, 0.3]), a_path("dense", 0.05, [0.0, 4.0], [0.4, 0.0]),
    ])  # fmt: skip
    words = {"name": "kl", "ylabel": "y", "title": "t", "caption": "c"}
    rows = toxicity.along_kl(paths, "tox", size=1)
    assert figures.save_by_kl(run, rows, ["dense", "end"], **words)
    ends = "dense ends with 0.00 at 4.0 nats; end ends with 0.30 at 2.0 nats"
    assert run.figures[0]["alt"] == f"All start at 0.40 without KL; {ends}"


def test_credit_is_saved_and_says_how_many_tokens_are_paid(run):
    rows = {"reward, dense": [0.0, -1.0, 0.5], "advantage, dense": [1.0, 2.0, 3.0]}
    credit = pd.DataFrame.from_dict(rows, orient="index")
    assert figures.save_credit(run, credit, ["a", "b", "c"], name="tokens")
    assert run.figures[0]["alt"].startswith("3 tokens, 2 of them paid when dense")


def test_levels_on_test_are_metrics_with_the_perplexity_of_log_ppl(run):
    arms = Arms(run, unit="prompt")
    rows = pd.DataFrame({"prompt": range(4), "who": 0.25, "log_ppl": np.log(8.0)})
    for seed in (11, 12, 13):
        arms.add(rows, arm="PT", seed=seed)
    table = toxicity.levels_on_test(arms, {"judge": "who"})
    assert table.loc["PT"].to_dict() == {
        "judge": "0.250 [0.250, 0.250]", "perplexity": "8.000 [8.000, 8.000]",
    }  # fmt: skip
    metric = run.metrics["PT/perplexity"]
    assert metric["value"] == pytest.approx(8) and (metric["n"], metric["seeds"]) == (4, 3)


def test_curves_go_as_far_as_every_training_came():
    paths = pd.concat([
        a_path("dense", 0.05, [0.0, 2.0, 4.0], [0.4, 0.3, 0.2], seed=11),
        a_path("dense", 0.2, [0.0, 2.0, 3.5], [0.4, 0.3, 0.0], seed=11),
        a_path("dense", 0.05, [0.0, 1.0, 2.0], [0.4, 0.2, 0.0], seed=12),
    ])  # fmt: skip
    curve = toxicity.along_kl(paths, "tox", size=1, points=5)
    assert set(curve.seed) == {11, 12} and curve.step.max() == 2.0
    means = curve.groupby("step").value.mean()
    assert means.tolist() == pytest.approx([0.4, 0.275, 0.15])


def test_points_are_the_start_and_means_of_steps():
    path = a_path("dense", 0.05, [1e-9, 2.0, 1.0, 0.6, 5.0], [1.0, 3.0, 5.0, 7.0, 9.0])
    curve = toxicity.blocks(path, 2)
    assert curve.tox.tolist() == [1.0, 2.0, 6.0, 9.0] and curve.kl[0] == 0
    assert curve.kl.tolist() == pytest.approx([0.0, 1.0, 1.0, 5.0])
    assert curve.step.tolist() == [1, 2, 4, 5]
    assert toxicity.blocks(path, 1).step.tolist() == [1, 2, 3, 4, 5]
    assert np.isnan(toxicity.at(curve, np.array([-0.1, 5.1]), "tox")).all()


def test_a_policy_is_measured_by_the_maximum_of_its_answers(tiny):
    scorer = SimpleNamespace(score=lambda texts: np.arange(len(texts), dtype=float))
    table, texts = toxicity.measure_policy(
        tiny[0], tiny[0], tiny[1], LINES, {"number": scorer}, 3, seed=1, max_new_tokens=4
    )
    assert table.number.tolist() == [2, 5, 8, 11] and len(texts) == 4
    np.testing.assert_allclose(table.log_prob, -table.nll, rtol=1e-4)  # it is its own reference
    np.testing.assert_allclose(table.log_ppl, table.nll / table.tokens)


def test_the_plan_counts_scorer_calls():
    plan = toxicity.plan(600, 64, "openai-community/gpt2-large")
    assert plan["scorer calls"].tolist() == [38_400, 115_200] and (plan["PPO, GB"] > 10).all()
