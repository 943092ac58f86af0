"""What notebook 40 measures on collected feedback, its simulated annotators, and the policy that answers."""

import copy
import json

import numpy as np
import pandas as pd
import pytest
from conftest import asset
from matplotlib.backends.backend_agg import FigureCanvasAgg

from lib import models, runtime, sft
from lib.papers.fine_grained import figures, first_policy, simulated
from lib.papers.fine_grained import schema as qa

SAMPLE = runtime.project_root() / "data" / "samples" / "qa_feedback.json"


@pytest.fixture(scope="module")
def records():
    return qa.load_feedback(SAMPLE)


# --- statistics ----------------------------------------------------------------------------------


def test_labels_of_an_answer_are_counted_by_category(records):
    table = qa.labels_table(records)
    assert table.loc[0].to_dict() == {"C1": 1, "C2": 1, "C3": 1, "labels": 3, "categories": 3}
    assert table.loc[3].to_dict() == {"C1": 0, "C2": 0, "C3": 0, "labels": 0, "categories": 0}
    assert table.loc[9, ["C1", "labels", "categories"]].tolist() == [2, 4, 3]
    assert table.labels.sum() == qa.class_counts(records)["count"].sum()


def test_marks_are_read_out(records):
    table = qa.marks_table(records[0])
    assert table.text.tolist()[:2] == [
        "6,000 years ago",
        "Salmon returned to the River Sund in 2004.",
    ]
    assert table.category.tolist() == ["C2", "C1", "C3"]
    assert table["where"].tolist()[::2] == ["answer, characters 28 to 43", "passage 1, sentence 3"]
    assert table.text[2] == records[0]["passages"][0][3]


def test_length_gap_is_a_difference_of_means():
    spans = pd.DataFrame(
        {"record": [0, 0, 1, 1], "type": ["a", "b", "a", "c"], "words": [9, 2, 5, 90]}
    )
    assert qa.length_gap(spans, "a", "b").value == 5
    assert qa.length_gap(spans, "a", "b").n == 2
    assert np.isnan(qa.length_gap(spans, "a", "d").value)


def test_shares_of_preferences_and_who_wins():
    columns = ["record", "pair", "value", "first_words", "second_words"]
    rows = [(0, "1-2", 1, 5, 3), (0, "1-3", 0, 5, 5), (1, "1-2", 2, 5, 9), (1, "1-3", 1, 5, 5)]
    table = pd.DataFrame(rows, columns=columns)
    shares = qa.preference_shares(table).set_index("group")
    assert shares.loc["all pairs", ["first", "equal", "second"]].tolist() == [0.5, 0.25, 0.25]
    assert shares.loc["all pairs", "value"] == pytest.approx(2 / 3)
    assert shares.loc["pair 1-3", "value"] == 1 and shares.index.tolist()[1:] == [
        "pair 1-2",
        "pair 1-3",
    ]
    assert qa.longer_wins(table).value == 1 and qa.longer_wins(table).n == 2


def test_records_in_both_stand_in_one_order(records):
    first, second = qa.in_both(records[:4], records[3:1:-1])
    assert first == second == records[2:4]
    assert qa.in_both(records[:1], records[1:]) == ([], [])


def test_a_plain_cut_takes_answers_that_fit_prompt_keeps(records, tiny):
    tokenizer = tiny[1]
    sizes = [
        qa.prompt_size(tokenizer, qa.prompt(r["question"], qa.passages_of(r), r["prediction 1"]))
        for r in records
    ]
    table = qa.truncation_table(tokenizer, records, (3, max(sizes) - 1, max(sizes)))
    assert table.value.tolist() == [1, sizes.count(max(sizes)) / 10, 0]
    assert table.can_fit.tolist() == table.whole.tolist() == [0, 10, 10]


# --- simulated annotators ------------------------------------------------------------------------


def test_a_copy_without_noise_is_the_annotation_and_the_original_stays(records):
    before = copy.deepcopy(records)
    for record in records:
        assert simulated.noisy_copy(record, 0.0, np.random.default_rng(0)) == record
        simulated.noisy_copy(record, 1.0, np.random.default_rng(0))
    assert records == before


def test_copies_fit_the_schema_and_err_as_often_as_they_say(records):
    """Each of the four errors at its own rate: seen on records without neighbours to run into."""
    rng, noise = np.random.default_rng(1), 0.4
    copies = [simulated.noisy_copy(r, noise, rng) for r in records for _ in range(40)]
    for record in copies:  # explanations are still those of the first type
        errors = [error | {"error type": "Irrelevant"} for error in record["feedback"]["errors"]]
        qa.check_record(record | {"feedback": record["feedback"] | {"errors": errors}})
    error = {"error type": "Irrelevant", "explanation": "", "start": 8, "end": 23}
    text = "aaa bbb ccc ddd eee fff ggg hhh"
    passages = [["t", "one", "two", "three", "four"]]
    missing = {"error type": "Missing-Answer", "passage_id": 1, "sentence_id": [2]}
    feedback = {"errors": [error], "missing-info": [missing], "corrected-prediction": ""}
    record = {"question": "q", "passages": passages, "prediction 1": text, "feedback": feedback}
    copies = [simulated.noisy_copy(record, noise, rng)["feedback"] for _ in range(4000)]
    spans = [c["errors"][0] for c in copies if c["errors"]]
    pieces = [c["missing-info"][0] for c in copies if c["missing-info"]]
    assert len(pieces) / 4000 == pytest.approx(0.8, abs=0.03)
    moved = np.mean([piece["sentence_id"] != [2] for piece in pieces])
    assert moved == pytest.approx(0.4, abs=0.03)
    for labels in (spans, pieces):
        kinds = [label["error type"] for label in labels]
        same = np.mean([kind in ("Irrelevant", "Missing-Answer") for kind in kinds])
        assert same == pytest.approx(0.8, abs=0.03)
    assert {span["start"] for span in spans} == {0, 4, 8, 12, 16}
    assert np.mean([span["start"] != 8 for span in spans]) == pytest.approx(0.4, abs=0.04)


def test_agreement_falls_with_noise_and_counts_records(records):
    table = simulated.agreement_by_noise(records, (0.0, 0.5), repeats=3, resamples=30)
    values = table.pivot(index="name", columns="noise", values="value")
    assert (values[0.0] == 1).all() and (values[0.5] < 0.9).all()
    assert (table.n == 10).all() and "preference kappa, type" not in values.index


# --- the policy that answers ---------------------------------------------------------------------


def test_questions_of_a_file_are_shuffled_by_the_seed_and_fit_whole(tiny, tmp_path):
    records = []
    for number in range(9):
        page = {"wikipage": "dog", "content": "the dog ran . " * (40 if number == 4 else 1)}
        record = {"question": f"{number}", "passages": [page], "answer": [f"a{number}", "x"]}
        record["text"] = qa.prompt(record["question"], qa.passages_of(record))
        records.append(record)
    path = tmp_path / "q.json"
    path.write_text(json.dumps(records))
    rows = {
        seed: first_policy.from_file(path, tokenizer=tiny[1], max_prompt=None, seed=seed)
        for seed in (1, 2)
    }
    assert sorted(rows[1]) == sorted(rows[2]) and rows[1] != rows[2]
    assert {(question, answer) for question, _, answer in rows[1]} == {
        (f"{i}", f"a{i}") for i in range(9)
    }
    short = first_policy.from_file(path, tokenizer=tiny[1], max_prompt=60, seed=1)
    assert short == [row for row in rows[1] if row[0] != "4"]
    with pytest.raises(ValueError, match="no prompt is within 3"):
        first_policy.from_file(path, tokenizer=tiny[1], max_prompt=3)


def test_questions_come_from_files_or_our_records_or_wikipedia(records, tiny, tmp_path):
    how = {"tokenizer": tiny[1], "max_prompt": None, "words": (30, 80)}
    train, held_out = first_policy.train_and_held_out((7, 2), files=["", ""], own=records, **how)
    assert [len(train), len(held_out)] == [7, 2] and train[0][2] == records[0]["gold"]
    with pytest.raises(ValueError, match="give both files"):
        first_policy.train_and_held_out((1, 1), files=["a.json", ""], own=records, **how)
    asset("wikipedia")
    train, held_out = first_policy.train_and_held_out((3, 2), files=["", ""], own=[], **how)
    assert train + held_out == first_policy.wikipedia_pairs(5, words=(30, 80))


def test_wikipedia_pairs_answer_from_the_right_lead():
    asset("wikipedia")
    pairs = first_policy.wikipedia_pairs(20, words=(30, 80))
    assert len(pairs) == 20
    for question, passages, answer in pairs:
        right = [text for title, text in passages if question == f"What is {title}?"]
        assert len(passages) == 2 and len(right) == 1 and right[0].startswith(answer)
    assert len({question == f"What is {p[0][0]}?" for question, p, _ in pairs}) == 2  # either place
    with pytest.raises(ValueError, match="need 20000 leads"):
        first_policy.wikipedia_pairs(10_000, words=(30, 80))


@pytest.fixture(scope="module", params=["tiny", "tiny-encoder-decoder"])
def policy(request):
    return models.load_policy(request.param)


def test_loss_falls_on_the_answer_alone_and_the_prompt_is_fitted(policy):
    rows = [("are you a cat", [("dog", "the dog ran . " * 30)], "you are nice , you cat . " * 9)]
    (row,) = first_policy.encode(*policy, rows, max_prompt=40, max_answer=6)
    shown = sft.loss_tokens(policy[1], row)
    assert shown.loss.sum() == 6 and not shown.loss[: len(shown) - 6].any()
    assert 30 < (~shown.loss).sum() <= 41
    decoder = not policy[0].config.is_encoder_decoder
    (prompt,) = first_policy.fitted_prompts(*policy, rows, 40)
    assert prompt.endswith("answer:") == decoder


def test_token_losses_are_the_models_own_loss(policy):
    model, tokenizer = policy
    rows = first_policy.encode(
        model, tokenizer, [("a cat", [], "you are nice .")], max_prompt=40, max_answer=9
    )
    (losses,) = first_policy.token_losses(model, rows)
    assert len(losses) == sum(label != sft.NO_LOSS for label in rows[0]["labels"])
    history = sft.train_sft(
        model, tokenizer, rows, learning_rate=0.0, num_train_epochs=1, max_length=60
    )
    assert history.loss.iloc[0] == pytest.approx(losses.mean(), rel=1e-3)


# --- figures -------------------------------------------------------------------------------------


def written(figure):
    """Everything written in a figure."""
    FigureCanvasAgg(figure).draw()
    return {text.get_text() for text in figure.findobj(lambda x: hasattr(x, "get_text"))}


def test_pieces_of_a_record_are_its_answer_and_its_marks(records):
    pieces = figures.pieces_of(records[0], "Ann")
    assert (
        " ".join(piece.strip() for _, piece, _, _ in pieces).strip() == records[0]["prediction 1"]
    )
    assert [note for *_, note in pieces if note] == [
        "[Wrong-Grounding]",
        "[Irrelevant]",
        "[Missing-Minor-Auxiliary]",
    ]
    assert [value for _, _, value, _ in pieces][:4] == [1, -1, 1, -1]
    assert len(figures.pieces_of(records[3], "Ann")) == 1


def test_label_counts_stack_answers_by_categories(records):
    figure = figures.label_counts(qa.labels_table(records), title="t")
    bars = [bar for group in figure.axes[0].containers for bar in group]
    assert sum(bar.get_height() for bar in bars) == 10
    assert {"no error", "1 category", "2 categories", "3 categories"} <= written(figure)


def test_span_lengths_have_a_panel_a_type_and_all_spans(records):
    spans = qa.span_table(records)
    figure = figures.span_lengths(spans, list(qa.CATEGORIES), title="t", longest=4)
    assert len(figure.axes) == 5
    for axes in figure.axes:
        assert sum(bar.get_height() for bar in axes.patches) == pytest.approx(1)
    assert any(text.startswith("Incoherent, 1 spans, median 7") for text in written(figure))


def test_preference_bars_mark_half_of_the_decided_pairs(records):
    shares = qa.preference_shares(qa.preference_table(records))
    figure = figures.preference_bars(shares, title="t")
    ticks = [line[0][0] for line in figure.axes[0].collections[0].get_segments()]
    np.testing.assert_allclose(ticks, (1 - shares["equal"]) / 2)
    ends = [bar.get_x() + bar.get_width() for bar in figure.axes[0].containers[-1]]
    np.testing.assert_allclose(ends, 1)


def test_before_and_after_stand_at_their_values():
    figure = figures.before_after(
        np.array([2.0, 3.0]), np.array([1.0, 3.5]), title="t", label="loss"
    )
    (dots,) = (line for line in figure.axes[0].lines if line.get_label() == "one question")
    assert dots.get_xydata().tolist() == [[2.0, 1.0], [3.0, 3.5]]
    assert {"loss, before", "loss, after"} <= written(figure)
