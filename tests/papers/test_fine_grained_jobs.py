"""The chain of fine-grained RLHF in miniature: every stage reads the files of the ones before it."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from transformers import LongformerModel, T5ForConditionalGeneration

from lib import models, ppo
from lib.course.launch import launch
from lib.papers.fine_grained import chain_tables, jobs, miniature, released, rouge
from lib.papers.fine_grained import schema as qa

ROOT = Path(__file__).parents[2]
COUNTS = {
    "train_1k": 4, "train": 6, "train_feedback": 6, "dev": 4, "dev_feedback": 4, "test": 3,
}  # fmt: skip
REWARD_MODEL = {
    "epochs": 1, "learning_rate": 1e-3, "prompts_per_batch": 3, "prompts_in_memory": 2,
    "max_length": 192,
}  # fmt: skip
PPO = {
    "steps": 2, "prompts_per_step": 2, "samples_per_prompt": 2, "epochs": 1, "minibatch_size": 4,
    "learning_rate": 1e-3, "eval_every": 1, "checkpoint_every": 1,
}  # fmt: skip
ARMS = {
    "fine-grained": {"rewards": {"R1": 0.3, "R2": 0.5, "R3": 0.3}, "lam": 0.95, "kl_coef": 0.3},
    "preference RLHF": {"rewards": {"preference": 1.0}, "lam": 0.99, "kl_coef": 0.2},
    "without R1": {"rewards": {"R2": 0.5, "R3": 0.3}, "place": "at the end"},
}


def articles():
    lines = (ROOT / "data/samples/passages.jsonl").read_text(encoding="utf-8").splitlines()
    return [(article["title"], article["post"]) for article in map(json.loads, lines)]


def make_chain(folder, data, **changed):
    made = miniature.build_models(data, folder / "start", words=800)
    settings = {
        "folder": str(folder / "chain"), "data": str(data), **made, "max_prompt": 64,
        "max_answer": 8, "ppo": PPO, "arms": ARMS, "seed": 0, "full": False,
        "sft": {"num_train_epochs": 3, "learning_rate": 5e-3, "per_device_train_batch_size": 2},
        "reward_models": dict.fromkeys(jobs.REWARDS, REWARD_MODEL),
    } | changed  # fmt: skip
    return jobs.Chain(**settings)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The whole chain, run once."""
    folder = tmp_path_factory.mktemp("chain")
    whole = make_chain(folder, miniature.construct(articles(), folder / "data", COUNTS))
    jobs.run(whole)
    return whole


def done(chain):
    return {
        stage: json.loads((chain.home(stage) / jobs.DONE).read_text()) for stage in chain.stages
    }


def test_every_stage_leaves_its_files_and_the_next_reads_them(chain):
    assert chain.stages == ["SFT", *jobs.REWARDS, *ARMS, "evaluate"]
    for stage in chain.policies:
        policy, _ = models.load_policy(str(chain.model(stage)))
        assert isinstance(policy, T5ForConditionalGeneration)
        assert hasattr(policy, "value_function") == (stage != "SFT")
        assert not (chain.home(stage) / "work").exists()
    narrow = policy.value_function.model
    assert narrow.config.d_model < policy.config.d_model  # as T5-base beside T5-large
    for name, model in jobs.load_reward_models(chain, jobs.REWARDS).items():
        assert isinstance(model.backbone, LongformerModel)
        assert model.segmenter.unit == released.UNITS[name] and model.context == (name != "R1")
        result = done(chain)[name]["result"]
        assert (model.mean, model.std) == (result["mean"], result["std"])
        history = pd.read_csv(chain.home(name) / "history.csv")
        assert history.validation.max() == pytest.approx(result["accuracy"])
    epochs = pd.read_csv(chain.home("SFT") / "epochs.csv")
    assert epochs.rouge.max() == pytest.approx(done(chain)["SFT"]["result"]["rouge"])


def test_the_kept_policy_is_that_of_the_best_epoch(chain):
    policy, tokenizer = models.load_policy(str(chain.model("SFT")))
    dev = jobs.questions(chain, "dev")
    again = jobs.rouge_of(chain, tokenizer, dev, policy)
    assert again == pytest.approx(done(chain)["SFT"]["result"]["rouge"])


def test_tables_have_the_paper_s_rows_and_columns(chain):
    scores = pd.read_csv(chain.home("evaluate") / "scores.csv", keep_default_na=False)
    assert len(scores) == len(chain.policies) * (COUNTS["dev"] + COUNTS["test"])
    summed = chain_tables.summary(scores)
    assert set(summed.columns) == {"arm", "split", "measure", "value", "low", "high", "n"}
    test = chain_tables.table(summed, "test", ["SFT", "preference RLHF", "fine-grained"])
    assert list(test.columns) == ["R1", "R2", "R3", "preference", "rouge", "tokens"]
    assert test.notna().all(axis=None) and test[["R1", "R2"]].stack().between(0, 1).all()
    part = scores[(scores.arm == "SFT") & (scores.split == "test")]
    assert test.loc["SFT", "R1"] == pytest.approx(part.relevant.sum() / part.sub_sentences.sum())
    dev = chain_tables.table(summed, "dev", chain_tables.PAPER_TABLE_5.index)
    assert dev.loc[["SFT", "fine-grained", "without R1"]].notna().all(axis=None)
    assert set(chain_tables.PAPER_TABLE_5) <= set(dev)
    assert len(chain_tables.drawing(chain).axes[0].texts) == len(jobs.DATA) + len(chain.stages) + 4


def test_finished_stages_are_skipped_and_other_inputs_refused(chain, monkeypatch):
    before = {s: (chain.home(s) / jobs.DONE).read_bytes() for s in chain.stages}
    for name in ("train_sft", "train_reward_model", "train_policy", "evaluate"):
        monkeypatch.setattr(jobs, name, lambda *_: pytest.fail("ran again"))
    jobs.run(chain)
    assert before == {s: (chain.home(s) / jobs.DONE).read_bytes() for s in chain.stages}
    other = dataclasses.replace(
        chain, reward_models=chain.reward_models | {"R3": REWARD_MODEL | {"epochs": 2}}
    )
    changed = [s for s in chain.stages if jobs.key_of(chain, s) != jobs.key_of(other, s)]
    assert changed == ["R3"]
    with pytest.raises(ValueError, match="other settings or inputs"):
        jobs.run(other, ["R3"])


def test_a_stage_without_its_inputs_says_what_is_missing(chain, tmp_path):
    fresh = dataclasses.replace(chain, folder=str(tmp_path))
    with pytest.raises(ValueError, match="not there yet: SFT, R1, R2, R3"):
        jobs.run(fresh, ["fine-grained"])
    with pytest.raises(ValueError, match="unknown stages"):
        jobs.run(fresh, ["R4"])
    with pytest.raises(ValueError, match="names of other stages"):
        dataclasses.replace(chain, arms={"R1": ARMS["fine-grained"]})
    with pytest.raises(ValueError, match="give rewards"):
        dataclasses.replace(chain, arms={"mine": {"rewards": {"R9": 1}}})


class Killed(Exception):
    pass


def test_ppo_killed_between_steps_ends_as_one_that_was_not(chain, tmp_path, monkeypatch):
    def copy(name):
        folder = tmp_path / name
        folder.mkdir()
        for stage in ("SFT", *jobs.REWARDS):
            (folder / stage).symlink_to(chain.home(stage))
        return dataclasses.replace(chain, folder=str(folder))

    killed = copy("killed")
    real = ppo.Loop.finish_step

    def dies(run, step, *rest):
        if step == 1:
            raise Killed
        real(run, step, *rest)

    monkeypatch.setattr(ppo.Loop, "finish_step", dies)
    with pytest.raises(Killed):
        jobs.run(killed, ["fine-grained"])
    assert list((killed.home("fine-grained") / "work").glob("checkpoint-*"))
    monkeypatch.setattr(ppo.Loop, "finish_step", real)
    jobs.run(killed, ["fine-grained"])
    columns = ["step", "reward", "kl", "held_out_reward"]
    tables = [pd.read_csv(c.home("fine-grained") / "history.csv") for c in (killed, chain)]
    pd.testing.assert_frame_equal(*[table[columns] for table in tables])


@pytest.mark.parametrize("stage, at", [("SFT", 2), ("R3", 2)])
def test_other_stages_go_on_too(chain, tmp_path, monkeypatch, stage, at):
    """Killed after the second epoch's measurement: the best before it is not forgotten."""
    more = dict.fromkeys(jobs.REWARDS, REWARD_MODEL | {"epochs": 4})
    settings = {"reward_models": more} if stage == "R3" else {}
    whole = dataclasses.replace(chain, folder=str(tmp_path / "whole"), **settings)
    killed = dataclasses.replace(chain, folder=str(tmp_path / "killed"), **settings)
    jobs.run(whole, [stage])
    name = "rouge_of" if stage == "SFT" else "measure"
    real, calls = getattr(jobs, name), []

    def dies(*arguments):
        calls.append(1)
        if len(calls) == at + 1:
            raise Killed
        return real(*arguments)

    monkeypatch.setattr(jobs, name, dies)
    with pytest.raises(Killed):
        jobs.run(killed, [stage])
    monkeypatch.setattr(jobs, name, real)
    jobs.run(killed, [stage])
    first, second = (
        json.loads((c.home(stage) / jobs.DONE).read_text())["result"] for c in (whole, killed)
    )
    assert first == pytest.approx(second)
    tables = [pd.read_csv(c.home(stage) / "history.csv") for c in (whole, killed)]
    pd.testing.assert_series_equal(tables[0].loss, tables[1].loss)


def test_the_released_models_take_the_place_of_training(chain, tmp_path):
    own = dataclasses.replace(chain, folder=str(tmp_path), released={"R3": "nowhere/at-all"})
    with pytest.raises(Exception, match="nowhere/at-all"):
        jobs.run(own, ["R3"])
    assert jobs.key_of(own, "R3") != jobs.key_of(chain, "R3")


def test_a_file_runs_a_stage_without_a_notebook(chain, tmp_path):
    path = jobs.write_chain(
        dataclasses.replace(chain, folder=str(tmp_path / "run")), tmp_path / "chain.json"
    )
    assert jobs.read_chain(path).arms == ARMS
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lib.papers.fine_grained.jobs", str(path), "R1"]
    subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True)
    made = json.loads((tmp_path / "run/R1/done.json").read_text())
    assert made["key"] == done(chain)["R1"]["key"]
    path.write_text('{"folder": "a", "data": "b", "polcy": "c"}')
    with pytest.raises(ValueError, match="unknown settings"):
        jobs.read_chain(path)


def test_two_processes_leave_the_files_that_one_leaves(chain, tmp_path):
    """Every stage, from the command line: history, results and what the reward models say."""
    both = dataclasses.replace(chain, folder=str(tmp_path / "both"))
    path = jobs.write_chain(both, tmp_path / "chain.json")
    launch("lib.papers.fine_grained.jobs", str(path), processes=2)
    for stage in chain.stages:
        ours, theirs = (done(c)[stage] for c in (chain, both))
        assert ours["key"] == theirs["key"] or stage not in (*jobs.SFT, *jobs.REWARDS)
        results = [
            {n: x for n, x in made["result"].items() if x is not None} for made in (ours, theirs)
        ]
        assert results[1] == pytest.approx(results[0], rel=1e-4, abs=1e-4), stage
        if stage != jobs.EVALUATE:
            tables = [pd.read_csv(c.home(stage) / "history.csv") for c in (chain, both)]
            tables = [t.drop(columns=[c for c in t if "seconds" in c]) for t in tables]
            pd.testing.assert_frame_equal(*tables, rtol=1e-4, atol=1e-4)
    scores = [pd.read_csv(c.home("evaluate") / "scores.csv") for c in (chain, both)]
    pd.testing.assert_frame_equal(*scores, rtol=1e-4, atol=1e-4)


def test_a_notebook_s_stage_is_launched_unless_it_is_finished(chain, tmp_path, monkeypatch):
    calls = []

    def starts(module, path, stage, processes):
        calls.append((module, stage, processes))
        jobs.run(jobs.read_chain(path), [stage])

    monkeypatch.setattr(jobs, "launch", starts)
    fresh = dataclasses.replace(chain, folder=str(tmp_path / "fresh"))
    for _ in range(2):
        assert jobs.run_on(fresh, "R1", 2)["result"] == done(chain)["R1"]["result"]
    assert calls == [("lib.papers.fine_grained.jobs", "R1", 2)]
    jobs.run_on(chain, "R1")
    assert len(calls) == 1


def test_the_real_files_run_through_the_loaders(real_data, tmp_path):
    """First records of the authors' files: what `copy_released` writes is what the stages read."""
    folder = miniature.copy_released(real_data / "qa_feedback", tmp_path, COUNTS)
    for name, count in COUNTS.items():
        load = qa.load_questions if name in miniature.QUESTIONS else qa.load_feedback
        assert len(load(folder / f"{name}.json")) == count
    chain = make_chain(tmp_path, folder)
    for stage in jobs.REWARDS:
        assert len(jobs.feedback_of(chain, stage, "train_feedback").responses) > 0


def test_constructed_files_hold_what_the_released_ones_hold(tmp_path):
    data = miniature.construct(articles(), tmp_path, COUNTS)
    asked = {
        name: [record["question"] for record in json.loads((data / f"{name}.json").read_text())]
        for name in jobs.DATA
    }
    assert asked["train"] == (asked["train_1k"] + asked["train_feedback"])[: COUNTS["train"]]
    assert asked["dev_feedback"] == asked["dev"]
    assert not set(asked["test"]) & {*asked["train"], *asked["dev"]}
    with pytest.raises(ValueError, match="too few"):
        miniature.construct(articles()[:5], tmp_path, COUNTS)


# --- ROUGE ---------------------------------------------------------------------------------------


def test_rouge_lsum_by_hand():
    """Reference "the cat sat. a dog ran.": of six words five are covered, of the five said all."""
    texts = ["the cat sat. dogs ran.", "", "nothing alike here"]
    scores = rouge.rouge_lsum(texts, [["the cat sat. A dog ran."]] * 3)
    np.testing.assert_allclose(scores, [100 * 2 * 5 / 11, 0, 0])
    best = rouge.rouge_lsum(["a dog ran"], [["the cat sat", "a dog ran"]])
    assert best[0] == 100
    assert rouge.rouge_lsum(["sat cat the"], [["the cat sat"]])[0] == pytest.approx(100 / 3)


@pytest.mark.parametrize(
    "word, stem",
    [
        ("caresses", "caress"), ("ponies", "poni"), ("flies", "fli"), ("dies", "die"),
        ("agreed", "agre"), ("plastered", "plaster"), ("sing", "sing"), ("hopping", "hop"),
        ("falling", "fall"), ("filing", "file"), ("happy", "happi"), ("relational", "relat"),
        ("vietnamization", "vietnam"), ("formalize", "formal"), ("electrical", "electr"),
        ("adoption", "adopt"), ("controlling", "control"), ("rate", "rate"), ("sky", "sky"),
    ],
)  # fmt: skip
def test_stems_are_porter_s(word, stem):
    assert rouge.stem(word) == stem
