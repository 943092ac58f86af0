"""Learning from refinements: targets, one-token reward models, weights, KL, win points."""

import numpy as np
import pandas as pd
import pytest

from lib import models, preferences, reward_models, sft
from lib.annotator import SimulatedAnnotator
from lib.papers.ilf import learn as im
from lib.papers.ilf import refine as rf

POST = "Lake Ormin is a shallow lake in Halland. It was formed when the Torvald Glacier melted."


@pytest.fixture(scope="module")
def tiny():
    words = {*models.sample_words(), "Yes", "No", "A", "B", *POST.split()}
    return models.build_tiny_model("tiny", words=sorted(words))


def articles(n=3):
    return pd.DataFrame(
        {
            "id": [f"a{i}" for i in range(n)], "title": "Lake Ormin", "post": POST,
            "summary": [f"Summary {i}." for i in range(n)], "feedback": "It does not say Halland.",
            "chosen": [f"Chosen {i}." for i in range(n)], "reference": "Lake Ormin: lake in Halland.",
            "shuffled": [f"Shuffled {i}." for i in range(n)],
        }
    )  # fmt: skip


def pairs(n=4):
    good, bad = "Lake Ormin is a shallow lake in Halland.", "Lake"
    first = np.arange(n) % 2 == 0
    return pd.DataFrame(
        {
            "id": [f"a{i}" for i in range(n)], "title": "Lake Ormin", "post": POST,
            "first": np.where(first, good, bad), "second": np.where(first, bad, good),
            "preferred": first.astype(float),
        }
    )  # fmt: skip


# --- targets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("initial", "Summary 1."),
        ("refinement", "Chosen 1."),
        ("shuffled", "Shuffled 1."),
        ("description", "Lake Ormin: lake in Halland."),
    ],
)
def test_every_kind_imitates_its_own_text_after_the_same_prompt(kind, said):
    table = im.targets(articles(), kind)
    assert list(table["id"]) == ["a0", "a1", "a2"] and table["completion"][1] == f" {said}"
    assert set(table["prompt"]) == {rf.summary_prompt("Lake Ormin", POST)}


def test_empty_targets_are_left_out_and_counted():
    table = articles()
    table.loc[1, "chosen"], table.loc[2, "chosen"] = "", None
    found = im.targets(table, "refinement")
    assert list(found["id"]) == ["a0"] and found.attrs["left_out"] == 2
    assert im.targets(table, "feedback + refinement").attrs["left_out"] == 2


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="feedback \\+ refinement"):
        im.targets(articles(), "human")


def test_feedback_then_refinement_is_taken_apart_again(tiny):
    row = im.targets(articles(), "feedback + refinement").iloc[0]
    assert "Summary 0." in row["prompt"] and row["prompt"].endswith("Feedback on summary:")
    assert "It does not say Halland." in row["completion"]
    written = row["completion"].replace("Chosen 0.", "Ormin is a shallow lake. It was")
    text, found = im.written_refinement(written, tiny[1], 40)
    assert found and text.replace(" .", ".") == "Ormin is a shallow lake."


def test_without_the_cue_the_whole_text_is_the_refinement(tiny):
    text, found = im.written_refinement(" Ormin is a shallow lake", tiny[1], 3)
    assert not found and text == "Ormin is a"


def test_shorten_cuts_the_post_at_a_token(tiny):
    tokenizer = tiny[1]
    short = im.shorten(POST, tokenizer, 5)
    assert POST.startswith(short) and len(tokenizer(short)["input_ids"]) == 5
    assert im.shorten(POST, tokenizer, 500) == POST


# --- reward models -------------------------------------------------------------------------------


def test_pairs_from_slf5k_and_from_the_annotator():
    table = articles().assign(
        generated_summary_for_comparison_A="one", generated_summary_for_comparison_B="two",
        comparison_preference=["Summary B", None, "Summary A"],
    )  # fmt: skip
    found = im.comparison_pairs(table)
    assert list(found["preferred"]) == [0.0, 1.0] and found.attrs["left_out"] == 1
    table = articles().assign(summary_2="Nonsense", summary_3=POST)
    found = im.comparison_pairs(table, SimulatedAnnotator(ranking_noise=0.0))
    assert list(found["preferred"]) == [0.0] * 3 and set(found["second"]) == {POST}


def test_classification_rows_stand_together_with_loss_on_the_answer_alone(tiny):
    tokenizer = tiny[1]
    rows = im.classification_rows(tokenizer, pairs(2))
    labels = [[t for t in row["labels"] if t != sft.NO_LOSS] for row in rows]
    yes, no = (tokenizer(word)["input_ids"] for word in ("Yes", "No"))
    assert labels == [yes, no, no, yes]
    assert all(row["input_ids"][-1:] == row["labels"][-1:] for row in rows)


def test_comparison_rows_name_the_preferred_summary_wherever_it_stands(tiny):
    tokenizer = tiny[1]
    a, b = (tokenizer(word)["input_ids"][0] for word in ("A", "B"))
    rows = im.comparison_rows(tokenizer, pairs(2))
    assert [row["labels"][-1] for row in rows] == [a, b]
    both = im.comparison_rows(tokenizer, pairs(2), both_orders=True)
    assert [row["labels"][-1] for row in both] == [a, b, b, a]
    assert (
        both[1]["input_ids"][:-1] == rows[1]["input_ids"][:-1]
    )  # swapped pair 0 is pair 1 as given


def test_both_orders_take_a_position_preference_out(tiny):
    model, tokenizer = tiny
    alike = pairs(2).assign(second=lambda t: t["first"])
    assert abs(im.comparison_scores(model, tokenizer, alike)).max() < 1e-5
    assert abs(im.comparison_scores(model, tokenizer, alike, both_orders=False)).max() > 1e-4


@pytest.mark.parametrize("form", ["classification", "comparison"])
def test_a_reward_model_learns_a_plain_difference(form):
    words = {*models.sample_words(), "Yes", "No", "A", "B", *POST.split()}
    model, tokenizer = models.build_tiny_model("tiny", words=sorted(words))
    rows = {"classification": im.classification_rows, "comparison": im.comparison_rows}[form]
    how = dict(learning_rate=3e-3, num_train_epochs=6, per_device_train_batch_size=4)
    sft.train_sft(model, tokenizer, rows(tokenizer, pairs(12)), **how)
    test = pairs(4)
    if form == "comparison":
        margins = im.comparison_scores(model, tokenizer, test)
    else:
        sides = [
            im.classification_scores(model, tokenizer, test["title"], test["post"], test[side])
            for side in ("first", "second")
        ]
        margins = sides[0] - sides[1]
    assert im.pair_accuracy(test, margins).mean() == 1


def test_shuffled_pairs_turn_about_half():
    many = pairs(400)
    turned = im.shuffled_pairs(many, seed=1)["preferred"] != many["preferred"]
    assert 0.4 < turned.mean() < 0.6
    assert im.shuffled_pairs(many, seed=1).equals(im.shuffled_pairs(many, seed=1))


def test_pair_accuracy_counts_ties_half():
    assert list(im.pair_accuracy(pairs(4), np.array([2.0, 1.0, 0.0, -1.0]))) == [1, 0, 0.5, 1]


def test_pairs_fit_the_standard_reward_model():
    table = pairs(4)
    rankings = table.rename(columns={"first": "response1", "second": "response2"})
    rankings = rankings.assign(
        instruction=table["post"], input="", verdict=np.where(table["preferred"] == 1, "(a)", "(b)")
    )
    found = reward_models.from_rankings(rankings)
    assert all(len(found.responses[a]) > len(found.responses[b]) for a, b in found.pairs)


# --- win points -----------------------------------------------------------------------------------


def test_win_points_and_ranks(tmp_path):
    assert list(preferences.win_points([1, 0.5, 0.1 + 0.2], [0.5, 1, 0.3])) == [1, 0, 0.5]
    path = tmp_path / "ranks.csv"
    path.write_text("id,human,ILF,initial\nx,1,2,3\ny,2,2,1\n")
    found = im.read_ranks(path, ["human", "ILF", "initial"], "human")
    points = found.set_index(["method", "id"])["points"]
    assert points["ILF", "x"] == 0 and points["ILF", "y"] == 0.5 and points["initial", "y"] == 1
    with pytest.raises(ValueError, match="no column RM"):
        im.read_ranks(path, ["RM"], "human")
    path.write_text("id,human,ILF\nx,1,first\n")
    with pytest.raises(ValueError, match="line 2"):
        im.read_ranks(path, ["ILF"], "human")


def test_ids_of_ranked_texts_stay_text(tmp_path):
    path = tmp_path / "ranks.csv"
    path.write_text("\ufeffid;human;ILF\n007;1;2\n1e5;2;1\nNA;1,5;1,5\n".replace(",", "."))
    found = im.read_ranks(path, ["human", "ILF"], "human")
    assert found["id"].tolist() == ["007", "1e5", "NA"] and found["points"].tolist() == [0, 1, 0.5]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("x,1,2\nx,2,1\n", "line 3: id 'x' stands on line 2 too"),
        ("x,1,2\ny,0,1\n", "line 3: rank '0' of human; allowed: a number from 1 .best. to 2"),
        ("x,1,3\n", "line 2: rank '3' of ILF"),
        ("x,-1,1\n", "line 2: rank '-1'"),
        ("x,,1\n", "line 2: rank ''"),
        ("", "a header but no rows"),
    ],
)
def test_ranks_that_cannot_be_are_refused(tmp_path, rows, message):
    (tmp_path / "ranks.csv").write_text("id,human,ILF\n" + rows)
    with pytest.raises(ValueError, match=message):
        im.read_ranks(tmp_path / "ranks.csv", ["ILF"], "human")


def test_an_undecided_pair_trains_nothing(tiny):
    undecided = pairs(2).assign(preferred=[1.0, np.nan])
    for rows in (im.classification_rows, im.comparison_rows):
        with pytest.raises(ValueError, match="preferred is nan in 1 of 2 pairs"):
            rows(tiny[1], undecided)
    accuracy = im.pair_accuracy(undecided, np.array([1.0, 1.0]))
    assert accuracy[0] == 1 and np.isnan(accuracy[1])
