"""Reward models that answer with one token: rows, both orders, a difference that is learned."""

import numpy as np
import pandas as pd
import pytest

from lib import models, sft
from lib.papers.ilf import forms
from lib.papers.ilf import imitate as im

POST = "Lake Ormin is a shallow lake in Halland. It was formed when the Torvald Glacier melted."


@pytest.fixture(scope="module")
def tiny():
    words = {*models.sample_words(), "Yes", "No", "A", "B", *POST.split()}
    return models.build_tiny_model("tiny", words=sorted(words))


def pairs(n=4):
    good, bad = "Lake Ormin is a shallow lake in Halland.", "Lake"
    first = np.arange(n) % 2 == 0
    return pd.DataFrame(
        {
            "id": [f"a{i}" for i in range(n)], "instruction": f"Lake Ormin: {POST}", "input": "",
            "response1": np.where(first, good, bad), "response2": np.where(first, bad, good),
            "verdict": np.where(first, "(a)", "(b)"),
        }
    )  # fmt: skip


def test_classification_rows_stand_together_with_loss_on_the_answer_alone(tiny):
    tokenizer = tiny[1]
    rows = forms.rows(tokenizer, pairs(2), "classification")
    labels = [[t for t in row["labels"] if t != sft.NO_LOSS] for row in rows]
    yes, no = (tokenizer(word)["input_ids"] for word in ("Yes", "No"))
    assert labels == [yes, no, no, yes]
    assert all(row["input_ids"][-1:] == row["labels"][-1:] for row in rows)


def test_comparison_rows_name_the_preferred_summary_wherever_it_stands(tiny):
    tokenizer = tiny[1]
    a, b = (tokenizer(word)["input_ids"][0] for word in ("A", "B"))
    rows = forms.rows(tokenizer, pairs(2), "comparison")
    assert [row["labels"][-1] for row in rows] == [a, b, b, a]
    # the second order of pair 0 is pair 1 as given
    assert rows[1]["input_ids"][:-1] == rows[2]["input_ids"][:-1]


def test_both_orders_take_a_position_preference_out(tiny):
    alike = pairs(2).assign(response2=lambda t: t["response1"])
    turned = pairs(2).rename(columns={"response1": "response2", "response2": "response1"})
    for form in forms.FORMS:
        assert abs(forms.margins(*tiny, alike, form)).max() < 1e-5
        margins, mirrored = (forms.margins(*tiny, table, form) for table in (pairs(2), turned))
        assert np.allclose(mirrored, -margins, atol=1e-5)


@pytest.mark.parametrize("form", forms.FORMS)
def test_a_reward_model_learns_a_plain_difference(form):
    words = {*models.sample_words(), "Yes", "No", "A", "B", *POST.split()}
    model, tokenizer = models.build_tiny_model("tiny", words=sorted(words))
    rows = forms.rows(tokenizer, pairs(12), form)
    settings = {"num_train_epochs": 6, "per_device_train_batch_size": 4}
    sft.train_sft(model, tokenizer, rows, learning_rate=3e-3, **settings)
    right = im.margins_right(forms.margins(model, tokenizer, pairs(), form), pairs())
    assert right["right"].tolist() == [1] * 4


def test_an_undecided_pair_and_an_unknown_form_train_nothing(tiny):
    undecided = pairs(2).assign(verdict=["(a)", "tie"])
    for form in forms.FORMS:
        with pytest.raises(ValueError, match="verdict is 'tie' in 1 of 2 pairs"):
            forms.rows(tiny[1], undecided, form)
    with pytest.raises(ValueError, match="form is 'regression'; allowed: classification"):
        forms.rows(tiny[1], pairs(), "regression")


def test_margins_count_ties_half():
    right = im.margins_right(np.array([2.0, 1.0, 0.0, -1.0]), pairs())
    assert right["right"].tolist() == [1, 0, 0.5, 1]
