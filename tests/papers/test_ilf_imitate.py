"""Learning from refinements: targets of every arm, what carries loss, likelihood, choices, reward pairs."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from lib import generation, models, reward_models, runtime, sft
from lib.data import apply_template
from lib.papers.ilf import imitate as im
from lib.papers.ilf import refine as rf
from lib.papers.ilf import study

POST = "Lake Ormin is a shallow lake in Halland. It was formed when the Torvald Glacier melted."
SETTINGS = {"train": "top", "train_layers": 1, "learning_rate": 5e-3, "epochs": 12, "batch": 4}
SETTINGS |= {"max_length": 256, "samples": 2, "kl_texts": 4}


@pytest.fixture(scope="module")
def tiny():
    return models.build_tiny_model("tiny")


def articles(n=4):
    table = pd.DataFrame({"id": [f"a{i}" for i in range(n)], "title": "Lake Ormin", "post": POST})
    firsts = [f"Summary {i}." for i in range(n)]
    return table.assign(summary=firsts, feedback="It does not say Halland.")


def texts(table):
    """As `study.texts` has them: three refinements, the last one empty, and a row of every other arm."""
    rows = []
    for key, first in zip(table["id"], table["summary"], strict=True):
        rows += [(key, study.FIRST, 0, first)]
        rows += [(key, "feedback", k, f"Refined {k} of {key}." if k < 2 else "") for k in range(3)]
        for arm in ("second try", "other feedback", study.OWN):
            rows.append((key, arm, 0, f"{arm} of {key}."))
    return pd.DataFrame(rows, columns=["id", "arm", "candidate", "text"])


def imitated(n=4, seed=0):
    table = articles(n)
    candidates = im.refinements(table, texts(table))
    return im.imitated(candidates, candidates["candidate"] == 1, texts(table), seed=seed)


# --- what a student imitates ----------------------------------------------------------------------


def test_every_arm_has_its_own_target():
    table = imitated()
    assert table["initial"].tolist() == [f"Summary {i}." for i in range(4)]
    assert table["refinement"].tolist() == [f"Refined 1 of a{i}." for i in range(4)]
    assert sorted(table["shuffled"]) == sorted(table["refinement"])
    assert not (table["shuffled"] == table["refinement"]).any(), "an article kept its own"
    assert table[study.OWN].tolist() == [f"{study.OWN} of a{i}." for i in range(4)]
    assert table["second try"][2] == "second try of a2."


def test_the_random_one_is_of_the_same_article_never_empty_and_the_seed_s():
    drawn = [imitated(seed=seed)["random"].tolist() for seed in range(20)]
    assert {text for row in drawn for text in row} == {
        f"Refined {k} of a{i}." for k in range(2) for i in range(4)
    }
    assert all(text.endswith(f"a{i}.") for row in drawn for i, text in enumerate(row))
    assert imitated(seed=3)["random"].tolist() == drawn[3]


def test_all_arms_ask_the_same_question_but_for_the_one_that_criticises_first():
    table = imitated()
    for arm in im.ARMS:
        ((asked, answered), *_) = im.conversations(table, arm)
        assert (asked["role"], answered["role"]) == ("user", "assistant")
        if arm == im.BOTH:
            assert "Summary 0." in asked["content"]
            assert (
                answered["content"]
                == "It does not say Halland.\n\nImproved TL;DR: Refined 1 of a0."
            )
        else:
            assert asked["content"] == rf.summary_prompt("Lake Ormin", POST) + study.LENGTH
            assert answered["content"] == table[arm][0]
    with pytest.raises(ValueError, match="feedback \\+ refinement"):
        im.conversations(table, "human")


def test_empty_targets_are_left_out_and_without_texts_an_arm_has_none():
    table = articles()
    candidates = im.refinements(table, texts(table))
    chosen = candidates["candidate"] == np.where(candidates["id"] == "a1", 2, 1)
    table = im.imitated(candidates, chosen)
    assert len(im.conversations(table, "refinement")) == 3 == len(im.conversations(table, im.BOTH))
    assert (table[study.OWN] == "").all() and im.conversations(table, study.OWN) == []


def test_loss_falls_on_the_target_after_exactly_what_sampling_shows(tiny):
    model, tokenizer = tiny
    (row,) = im.encoded(model, tokenizer, imitated().head(1), "refinement")
    loss = [label != sft.NO_LOSS for label in row["labels"]]
    start = loss.index(True)
    shown = apply_template(im.questions(articles(1)), tokenizer, "auto")
    (prompt,) = generation.encode_prompts(model, tokenizer, shown, 8)
    assert row["input_ids"][:start] == prompt and all(loss[start:])
    assert row["input_ids"][-1] == tokenizer.eos_token_id


def test_a_student_learns_its_targets_and_a_cut_target_is_refused(tiny):
    model, tokenizer = tiny
    rows = im.encoded(model, tokenizer, imitated().head(4), "refinement")
    trained, history = im.fine_tune("tiny", tokenizer, rows, SETTINGS)
    before, after = (im.likelihood(m, tokenizer, rows).nll.mean() for m in (model, trained))
    assert after < before and history["loss"].dropna().iloc[-1] < history["loss"].dropna().iloc[0]
    with pytest.raises(ValueError, match="the longest target ends after"):
        longest = max(len(row["input_ids"]) for row in rows)
        im.fine_tune("tiny", tokenizer, rows, SETTINGS | {"max_length": longest - 2})


# --- what a student writes ------------------------------------------------------------------------


def test_feedback_then_refinement_is_taken_apart_again(tiny):
    written = f" It does not say Halland.\n\n{im.CUE} The lake is in the north. It was"
    text, cue = im.written_refinement(written, tiny[1], 40)
    assert cue and text.replace(" .", ".") == im.written_refinement(
        f"{im.CUE} The lake is in the north.", tiny[1], 40
    )[0].replace(" .", ".")


def test_without_the_cue_the_whole_text_is_the_refinement(tiny):
    text, cue = im.written_refinement(" the river is in the north", tiny[1], 3)
    assert not cue and len(text.split()) == 3


def test_likelihood_is_the_mean_over_the_target_s_tokens(tiny):
    model, tokenizer = tiny
    (row,) = im.encoded(model, tokenizer, imitated().head(1), "refinement")
    start = next(i for i, label in enumerate(row["labels"]) if label != sft.NO_LOSS)
    with torch.no_grad():
        logits = model(torch.tensor([row["input_ids"]])).logits.log_softmax(-1)[0]
    by_hand = [
        logits[t - 1, row["input_ids"][t]].item() for t in range(start, len(row["input_ids"]))
    ]
    scored = im.likelihood(model, tokenizer, [row])
    assert scored["tokens"][0] == len(by_hand)
    assert scored["nll"][0] == pytest.approx(-np.mean(by_hand), abs=1e-4)
    assert scored["perplexity"][0] == pytest.approx(np.exp(scored["nll"][0]))


def test_what_a_template_writes_after_the_end_is_no_part_of_the_target(tiny):
    """Many chat templates end a turn with a line break, after the end token: without loss."""
    row = {"input_ids": [7, 8, 9, 5, 6], "labels": [sft.NO_LOSS, sft.NO_LOSS, 9, 5, sft.NO_LOSS]}
    assert im.context_and_target(row) == ([7, 8], [9, 5])
    bare = {name: values[:4] for name, values in row.items()}
    with_break, without = (im.likelihood(*tiny, [each])["nll"][0] for each in (row, bare))
    assert with_break == pytest.approx(without)


def test_a_measured_student_has_texts_likelihood_and_distance(tiny):
    model, tokenizer = tiny
    test = articles(2)
    asked = {"distance": True, "seed": 1}
    table = im.measure(model, model, tokenizer, "initial", test, imitated(2), SETTINGS, **asked)
    counts = table["table"].value_counts().to_dict()
    assert counts["texts"] == 2 * 2 and counts["likelihood"] == 2 * 2 and counts["kl"] > 0
    assert table.loc[table["table"] == "kl", "value"].abs().max() < 1e-4  # to itself
    asked = {"distance": False}
    both = im.measure(model, model, tokenizer, im.BOTH, test, imitated(2), SETTINGS, **asked)
    assert set(both["table"]) == {"texts"}


def test_texts_that_no_judge_read_are_counted_and_left_out(capsys):
    class Half:
        name = "half"

        def supports(self, texts, statements):
            return np.array([np.nan if "Summary 1" in text else 1.0 for text in texts])

    table = pd.DataFrame({"id": ["a0", "a1"], "text": ["Summary 0.", "Summary 1."]})
    judged = im.judged(Half(), articles(2), table, 0.0)
    assert judged["id"].tolist() == ["a0"]
    said = capsys.readouterr().out
    assert (
        said == "1 of 2 texts are not judged, because half is not here: python -m lib fetch half\n"
    )
    assert judged["complete"].tolist() == [1.0]


# --- one's own refinements ------------------------------------------------------------------------


def test_own_refinements_come_from_a_csv_with_or_without_posts(tmp_path):
    table = articles(2)
    rows = im.refinements(table, texts(table)).assign(by_InstructRM=[False, True, False] * 2)
    path = tmp_path / "handover.csv"
    rows.drop(columns="post").to_csv(path, index=False)
    again = im.read_refinements(path, table)
    assert (
        again["post"].eq(POST).all() and again["by_InstructRM"].tolist() == [False, True, False] * 2
    )
    assert again["empty"].tolist() == [False, False, True] * 2
    with pytest.raises(ValueError, match="no post for 1 articles, such as a1"):
        im.read_refinements(path, table.head(1))
    rows.drop(columns="by_InstructRM").to_csv(path, index=False)
    with pytest.raises(ValueError, match="no column by_InstructRM"):
        im.read_refinements(path, table)
    one = rows[rows["candidate"] == 1].drop(columns=["by_InstructRM", "candidate", "empty"])
    one.to_csv(path, index=False)  # of people: one an article
    assert im.read_refinements(path, table.head(0))["by_InstructRM"].all()
    one.drop(columns="feedback").to_csv(path, index=False)
    with pytest.raises(ValueError, match="no column feedback"):
        im.read_refinements(path, table)


def test_people_s_summaries_and_feedback_are_taken_and_articles_without_feedback_left_out():
    class Writes:
        def __call__(self, prompts, n=1, seed=0):
            return [[rf.Draft(f"Text {k}.", True) for k in range(n)] for _ in prompts]

    table = articles(3)
    table.loc[1, "feedback"] = ""
    named, written = im.material(None, Writes(), table)
    assert named["id"].tolist() == ["a0", "a2"] and set(written["id"]) == {"a0", "a2"}
    assert written[written["arm"] == study.FIRST]["text"].tolist() == ["Summary 0.", "Summary 2."]


def test_instruct_rm_chooses_one_that_is_not_empty(monkeypatch):
    table = articles(2)
    candidates = im.refinements(table, texts(table))
    scores = np.array([[0.1], [0.3], [0.9]] * 2)  # the empty one has the highest
    monkeypatch.setattr(study, "instruct_rm", lambda *_: scores)
    chosen = im.choose(None, candidates, ())
    assert chosen["by_InstructRM"].tolist() == [False, True, False] * 2
    assert chosen["reward"].tolist() == scores[:, 0].tolist()


# --- reward models and best of n ------------------------------------------------------------------


def test_each_refinement_is_preferred_to_its_summary_once():
    table = articles(2)
    candidates = im.refinements(table, texts(table))
    candidates.loc[1, "refinement"] = candidates.loc[0, "refinement"]  # twice the same
    candidates.loc[4, "refinement"] = candidates.loc[4, "summary"]  # nothing changed
    pairs = im.refinement_pairs(candidates)
    assert pairs["response1"].tolist() == ["Refined 0 of a0.", "Refined 0 of a1."]
    assert pairs["response2"].tolist() == ["Summary 0.", "Summary 1."]
    feedback = reward_models.from_rankings(pairs, template=im.bare)
    assert feedback.prompts[0] == im.questions(table)[0] and len(feedback.pairs) == 2


def test_people_s_comparisons_join_where_the_data_has_them():
    table = articles(3).assign(
        generated_summary_for_comparison_A="one", generated_summary_for_comparison_B="two",
        comparison_preference=["Summary B", None, "Summary A"],
    )  # fmt: skip
    pairs = im.people_pairs(table)
    assert pairs["id"].tolist() == ["a0", "a2"] and pairs["verdict"].tolist() == ["(b)", "(a)"]
    assert im.people_pairs(articles()).empty
    right = im.pairs_right(lambda _, texts: [float(text == "two") for text in texts], pairs)
    assert right["right"].tolist() == [1.0, 0.0]


def test_a_reward_model_learns_to_prefer_refinements_and_its_control_does_not_change():
    table = articles(6)
    written = texts(table)
    written.loc[written["arm"] == "feedback", "text"] = "the river is in the north of it"
    pairs = im.refinement_pairs(im.refinements(table, written))
    model = im.fit_reward_model("tiny", pairs)
    assert im.pairs_right(model.score, pairs)["right"].mean() == 1
    assert im.pairs_right(im.count_words, pairs)["right"].mean() == 1  # they are longer, too
    coin = im.fit_reward_model("tiny", pairs, shuffle=True)
    assert not np.allclose(coin.score(["a"], ["b"]), model.score(["a"], ["b"]))


def test_picks_by_hand_and_ties_go_to_the_earlier_one():
    pool = pd.DataFrame({"id": list("aaabbb"), "candidate": [0, 1, 2] * 2,
                         "text": ["x", "x y", "x y z", "u v", "u", "u w"]})  # fmt: skip
    named = pd.DataFrame({"id": list("ab"), "title": "T", "post": "P"})
    scores = {"x": 0, "x y": 2, "x y z": 1, "u v": 5, "u": 5, "u w": 1}
    taken = im.picks(pool, named, lambda _, texts: [scores[text] for text in texts])
    wide = taken.pivot(index="id", columns="pick", values="text")
    assert wide.loc["a", ["first", "best", "longest"]].tolist() == ["x", "x y", "x y z"]
    assert wide.loc["b", ["first", "best", "longest"]].tolist() == ["u v", "u v", "u v"]


def test_sizes_are_named_where_they_are_not_the_largest():
    rows = pd.DataFrame({"arm": ["first student", "initial", "initial"], "size": [0, 40, 160]})
    assert im.label_sizes(rows)["arm"].tolist() == ["first student", "initial, 40", "initial"]
    assert im.folder_name("feedback + refinement") == "feedback_refinement"


# --- weights, distance ----------------------------------------------------------------------------


def test_weights_run_from_the_softmax_to_the_argmax():
    rewards = np.array([[0.2, 0.5, 0.4], [0.1, 0.1, 0.1]])
    soft = im.target_weights(rewards, 0.1)
    assert np.allclose(soft.sum(1), 1) and np.allclose(soft[1], 1 / 3)
    assert np.isclose(soft[0, 1] / soft[0, 0], np.exp(3))
    hard = im.target_weights(rewards, 1e-4)
    assert hard[0].argmax() == 1 and np.isclose(hard[0, 1], 1)
    assert np.allclose(im.effective_number(hard), [1, 3])


def test_weights_correct_for_the_proposal():
    """Weighted samples of the proposal have the target's mean (self-normalised importance sampling)."""
    policy, proposal = np.log([0.7, 0.2, 0.1]), np.log([0.2, 0.3, 0.5])
    rewards, beta = np.array([0.0, 1.0, 0.5]), 0.5
    target = np.exp(policy + rewards / beta)
    target /= target.sum()
    drawn = np.random.default_rng(0).choice(3, 200_000, p=np.exp(proposal))
    weights = im.target_weights(rewards[drawn], beta, policy[drawn], proposal[drawn])
    assert np.allclose(np.bincount(drawn, weights), target, atol=0.01)


def test_weights_refuse_a_beta_of_zero():
    with pytest.raises(ValueError, match="> 0"):
        im.target_weights(np.zeros((1, 2)), 0.0)


def test_the_settings_that_decide_are_those_of_the_design():
    """The planned runs train arms that there are, the controls among them, at both sizes."""
    folder = runtime.project_root() / "data/results/31_learn_from_refinements"
    design = json.loads((folder / "design.json").read_text(encoding="utf-8"))
    assert set(design["parameters"]["ARMS"]) <= {*im.ARMS, "reward model"}
    assert {"initial", "refinement", "shuffled", study.OWN} <= set(design["parameters"]["ARMS"])
    assert design["parameters"]["SIZES"] == [32, 96]


def test_the_plan_counts_what_each_article_asks():
    full = {"train_articles": 10, "test": 4, "questions": 5, "sizes": [2, 10], "best_of": 64}
    plan = im.full_plan(full)
    assert plan.loc["InstructRM, 5 questions", "calls"] == 10 * 5 * 5
    assert plan.loc["samples for best of n", "calls"] == 2 * 4 * 64
    written = plan.loc["feedback, refinements, own summaries", "hours written"]
    assert written == pytest.approx(70 * 60 / 2500 / 3600)


def test_what_no_arm_needs_is_not_written():
    """Second tries and refinements with another's feedback are written for the arms that imitate them."""

    class Writes:
        def __call__(self, prompts, n=1, seed=0):
            return [[rf.Draft(f"Text {k}.", True) for k in range(n)] for _ in prompts]

    few = im.material(None, Writes(), articles(2))[1]
    assert set(few["arm"]) == {study.FIRST, "feedback", study.OWN}
    more = im.material(None, Writes(), articles(2), ["refinement", "second try"])[1]
    assert set(more["arm"]) == {*few["arm"], "second try"}
