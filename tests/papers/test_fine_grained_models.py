"""Fine-grained reward models: labels, derived pairs, segment features, training without leaks."""

import difflib
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LongformerConfig, LongformerModel

from lib import models, reward_models, runtime
from lib.papers.fine_grained import models as fg
from lib.papers.fine_grained import schema as qa
from lib.segments import Segmenter

OURS = qa.load_feedback(runtime.project_root() / "data" / "samples" / "qa_feedback.json")
HEAD = reward_models.TrainConfig(learning_rate=3e-2, epochs=30, weight_decay=0.01)


def model_of(unit, **how):
    backbone, tokenizer = reward_models.load_backbone("tiny-encoder-decoder")
    return fg.FineGrainedModel(backbone.requires_grad_(False), tokenizer, unit=unit, **how)


# --- labels and pairs ----------------------------------------------------------------------------


def record_with(text, *spans):
    errors = [{"error type": kind, "start": a, "end": b} for kind, a, b in spans]
    return {"prediction 1": text, "feedback": {"errors": errors}}


def test_labels_of_segments_follow_the_categories():
    text = "One two three four five. Six seven eight nine ten. End of it."
    long, short, wrong = ("Irrelevant", 25, 50), ("Irrelevant", 51, 57), ("Unverifiable", 51, 57)
    cut = Segmenter("sentence")
    labels = fg.segment_labels
    np.testing.assert_array_equal(labels(record_with(text, long), cut, "C1"), [0, 1, 0])
    np.testing.assert_array_equal(labels(record_with(text, short), cut, "C1"), [0, 0, 0])
    found = labels(record_with(text, long, wrong), cut, "C2")
    np.testing.assert_array_equal(
        found, [0, np.nan, 1]
    )  # irrelevant text was not checked for facts


def test_counts_of_the_released_records(real_data):
    """The reference's own files hold 1,362 and 1,342 sub-sentences, cut with another sentence splitter."""
    records = qa.load_feedback(real_data / "qa_feedback" / "dev_feedback.json")
    first, second = (fg.from_errors(records, category).labels for category in ("C1", "C2"))
    assert abs((first == 1).sum() - 1362) < 20 and abs((first == 0).sum() - 1342) < 20
    assert np.isnan(second).sum() > 500 > (second == 1).sum() > 200


@given(st.text("abc ", min_size=1), st.text("abcd. ", min_size=1))
def test_likeness_is_the_best_quick_ratio_over_runs_of_words(piece, text):
    piece, text = " ".join(piece.split()), " ".join(text.split())
    if not piece or not text:
        return
    n = len(piece.split()) + int(0.05 * len(piece.split()))
    words = text.split() + ["#"] * (n - len(text.split()))
    runs = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
    expected = max(difflib.SequenceMatcher(None, piece, run).quick_ratio() for run in runs)
    sentences = fg._PassageSentences([["title", text]])
    found = sentences._likeness(piece, text, sentences.counts[0])
    assert found == pytest.approx(1.0 if piece in text else expected)


def test_completeness_counts_needed_sentences_only():
    passage = [
        "T",
        "The lake lies in the north.",
        "It was formed by a river.",
        "Cranes nest there.",
    ]
    record = {
        "question": "q", "passages": [passage], "prediction 1": "The lake lies in the north.",
        "prediction 2": "The lake lies in the north. It was formed by a river.",
        "prediction 3": "", "prediction 4": "Cranes nest there.",
        "feedback": {"errors": [], "corrected-prediction": " ".join(passage[1:])},
    }  # fmt: skip
    missing = {"error type": qa.MISSING[2], "passage_id": 1, "sentence_id": [3]}
    record["feedback"]["missing-info"] = [missing]
    assert fg.completeness(record).tolist() == [0.5, 1, 0, 0]
    assert fg.verdicts(fg.completeness(record)) == [2, 1, 1, 1, 1, 0]
    record["feedback"]["corrected-prediction"] = "Nothing of the kind was ever said of anything."
    assert fg.completeness(record) is None


def test_pairs_of_the_released_records(real_data):
    """Beside the file that the reference's script makes: 442 records, 1,115 decided pairs."""
    records = qa.load_feedback(real_data / "qa_feedback" / "dev_feedback.json")[:60]
    held = [fg.completeness(r) for r in records]
    kept = [x for x in held if x is not None]
    decided = sum(np.count_nonzero(fg.verdicts(x)) for x in kept)
    assert 0.8 < len(kept) / 60 < 0.97 and 0.3 < decided / (6 * len(kept)) < 0.55


# --- the model -----------------------------------------------------------------------------------


def test_features_are_means_over_each_segments_tokens_whatever_the_batch():
    model = model_of("sentence", relations=False)
    prompts = [fg.prompt_of(r) for r in OURS[:4]]
    responses = [r["prediction 1"] for r in OURS[:4]]
    found = model.features(prompts, responses)
    for prompt, response, rows in zip(prompts, responses, found, strict=True):
        assert len(rows) == len(model.segmenter.spans(response))
        alone = model.features([prompt], [response])[0]
        torch.testing.assert_close(rows, alone, atol=1e-5, rtol=1e-4)
        ids = model.encode([prompt], [response])[0]
        inputs = torch.tensor([ids.context + ids.response])
        hidden = model.backbone(input_ids=inputs).last_hidden_state[0][len(ids.context) :]
        first = hidden[: len(ids.owner)][ids.owner == 0].mean(0)
        torch.testing.assert_close(rows[0], first, atol=1e-5, rtol=1e-4)


def test_relations_see_what_is_copied_and_what_is_not():
    model = model_of("sentence")
    prompt = qa.prompt("What is a lake?", [("Lake", "The lake is old. Cats sat there.")])
    rows = model.features([prompt], ["The lake is old. Where stupid dog mat? The lake is old."])[0]
    copied, new, again = rows[:, -fg.RELATIONS :]
    equal_in_passage, equal_before = 10, 12  # means of the equal-token likeness
    assert copied[equal_in_passage] > 0.9 > new[equal_in_passage]
    assert again[equal_before] > 0.9 and copied[equal_before] == 0


def test_passages_read_apart_are_not_cut_and_reach_relations_alone():
    long = [("t", "The old king saw nobody. " * 40 + "The lake is old.")]
    prompts = [
        qa.prompt("What is a lake?", long),
        qa.prompt("What is a lake?", [("t", "Cats sat.")]),
    ]
    answer = "The lake is old. Where stupid dog mat?"
    apart = model_of("sentence", max_length=64, apart=True)
    rows = apart.features(prompts * 2, [answer] * 4)  # nothing is cut: no warning
    equal_in_passage = 10
    relations = [row[:, -fg.RELATIONS :] for row in rows]
    assert relations[0][0, equal_in_passage] > 0.9 > relations[1][0, equal_in_passage]
    width = rows[0].shape[1] - fg.RELATIONS
    torch.testing.assert_close(rows[0][:, :width], rows[1][:, :width])
    for i in (0, 1):  # whatever the batch
        torch.testing.assert_close(rows[i], rows[i + 2])
        alone = apart.features(prompts[i : i + 1], [answer])[0]
        torch.testing.assert_close(rows[i], alone, atol=1e-5, rtol=1e-4)
    read = {}
    again = [apart.features(prompts, [answer] * 2, read=read) for _ in range(2)]
    assert read and all(torch.equal(a, b) for a, b in zip(*again, strict=True))
    with pytest.warns(UserWarning, match="cut to 64 tokens: 1 prompts"):
        whole = model_of("sentence", max_length=64).features(prompts[:1], [answer])[0]
    assert whole[0, equal_in_passage - fg.RELATIONS] < 0.9
    with pytest.raises(ValueError, match="relations=False"):
        model_of("sentence", relations=False, apart=True)


def test_a_kept_model_reads_passages_as_it_did(tmp_path):
    model = model_of("sequence", apart=True)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    model.save(tmp_path, "tiny-encoder-decoder")
    again = fg.load(tmp_path)
    texts = [fg.prompt_of(r) for r in OURS[:3]], [r["prediction 1"] for r in OURS[:3]]
    assert (
        again.apart
        and not fg.FineGrainedModel(again.backbone, again.tokenizer, unit="sentence").apart
    )
    np.testing.assert_allclose(again.score(*texts), model.score(*texts), rtol=1e-5)


def test_a_sentence_too_long_is_cut_and_counted():
    model = model_of("sentence", max_length=24, apart=True)
    with pytest.warns(UserWarning, match="cut to 24 tokens: 1 prompts"):
        model.features([qa.prompt("who", [("t", "word " * 50)])], ["the cat sat."])


def test_cuts_are_counted_and_the_question_stays():
    model = model_of("sentence", max_length=24)
    prompt = qa.prompt("who won", [("t", "word " * 50)])
    with pytest.warns(UserWarning, match="cut to 24 tokens: 1 prompts"):
        model.features([prompt], ["the cat sat."])
    row = model.encode([prompt], ["the cat sat."])[0]
    assert len(row.context) + len(row.response) == 24
    question = model.tokenizer("question: who won", add_special_tokens=False)["input_ids"]
    assert row.context[: len(question)] == question
    long = "The cat sat. " * 20
    with pytest.warns(UserWarning, match="segments"):
        scores = model.score_segments(["question: q"], [long])[0]
    assert len(scores) == 20 and np.isfinite(scores).all()


def test_empty_responses_and_wrong_units():
    model = model_of("sentence")
    assert [x.shape for x in model.score_segments(["p", "p"], ["", "a cat."])] == [(0,), (1,)]
    blank = model.score_segments(["p"], [" \n "])[0]  # one segment, no token: the mean
    np.testing.assert_array_equal(blank, [model.mean])
    with pytest.raises(ValueError, match="Try score_segments"):
        model.score(["p"], ["a"])
    assert model_of("sequence").score(["p", "p"], ["", "a cat. A dog."]).shape == (2,)


def test_question_alone_without_context():
    model = model_of("sub_sentence", context=False)
    with_passage = qa.prompt("who won", [("t", "the cat")])
    rows = model.encode([with_passage, qa.prompt("who won", None)], ["a cat."] * 2)
    assert rows[0].context == rows[1].context


def test_longformer_counts_its_own_positions():
    torch.manual_seed(0)
    _, tokenizer = reward_models.load_backbone("tiny-encoder-decoder")
    config = LongformerConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, attention_window=8, max_position_embeddings=66,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    backbone = LongformerModel(config, add_pooling_layer=False).eval()
    model = fg.FineGrainedModel(backbone, tokenizer, unit="sentence", relations=False)
    assert model.max_length == 64
    prompts, responses = ["question: who", "question: the cat sat"], ["a cat.", "a dog. A cat sat."]
    together = model.features(prompts, responses)
    for i in (0, 1):
        alone = model.features(prompts[i : i + 1], responses[i : i + 1])[0]
        torch.testing.assert_close(together[i], alone, atol=1e-5, rtol=1e-4)


# --- training ------------------------------------------------------------------------------------


def records(n=24):
    file = runtime.project_root() / "data" / "samples" / "passages.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return fg.constructed_records([(r["title"], r["post"]) for r in rows][:n])


def test_training_on_labels_starts_at_ln_2_and_ranks_errors_below(tmp_path):
    model, feedback = model_of("sub_sentence"), fg.from_errors(records(), "C1")
    features = model.features(feedback.prompts, feedback.responses)
    history = fg.fit(model, feedback, HEAD, features=features)
    assert history["loss"].iloc[0] == pytest.approx(np.log(2), abs=1e-4)
    scores = np.concatenate(model.score_features(features))
    assert scores[feedback.labels == 0].mean() > scores[feedback.labels == 1].mean() + 1
    assert model.mean == pytest.approx(scores.mean()) and model.std == pytest.approx(scores.std())
    model.save(tmp_path, "tiny-encoder-decoder")
    again = fg.load(tmp_path)
    assert (again.mean, again.std) == (model.mean, model.std)
    some = feedback.prompts[:3], feedback.responses[:3]
    for a, b in zip(again.score_segments(*some), model.score_segments(*some), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert set(np.concatenate(again.signs(*some))) <= {1.0, -1.0}


def test_a_set_of_kept_models_is_read_whole_or_refused(tmp_path):
    for name, category in fg.REWARDS.items():
        with pytest.raises(ValueError, match=f"no folder .*{name}"):
            fg.load_all(tmp_path)
        model = model_of(fg.UNITS[category])
        model.fit_normaliser([np.array([0.0, 4.0])])
        models.save(model, model.tokenizer, tmp_path / name)
    loaded = fg.load_all(tmp_path)
    assert [(name, model.mean, model.std) for name, model in loaded.items()] == [
        ("R1", 2, 2), ("R2", 2, 2), ("R3", 2, 2),
    ]  # fmt: skip
    models.save(loaded["R1"], loaded["R1"].tokenizer, tmp_path / "R2")
    with pytest.raises(ValueError, match="'sub_sentence'; R2 judges 'sentence'"):
        fg.load_all(tmp_path)


def test_balance_weighs_both_classes_alike():
    feedback = fg.from_errors(records(), "C2")
    wrong = np.nanmean(feedback.labels)
    assert 0.02 < wrong < 0.45
    means = []
    for balance in (False, True):  # without features to tell them apart, the bias shows the prior
        model = model_of("sentence", relations=False)
        features = [x * 0 for x in model.features(feedback.prompts, feedback.responses)]
        fg.fit(model, feedback, HEAD, features=features, balance=balance)
        means.append(1 / (1 + np.exp(-model.mean)))
    assert means[0] == pytest.approx(1 - wrong, abs=0.08)
    assert means[1] == pytest.approx(0.5, abs=0.08)


def test_training_on_pairs_and_end_to_end():
    made = records(8)
    feedback = fg.from_preferences(made, [r["preference"] for r in made])
    model = model_of("sequence")
    features = model.features(feedback.prompts, feedback.responses)
    fg.fit(model, feedback, HEAD, features=features)
    score = model.score(feedback.prompts, feedback.responses)
    a, b = feedback.pairs.T
    assert (score[a] > score[b]).mean() > 0.8
    model.backbone.requires_grad_(True)
    before = model.backbone.get_input_embeddings().weight.clone()
    short = reward_models.TrainConfig(epochs=1, learning_rate=1e-3)
    fg.fit(model, feedback, short)
    assert not torch.equal(before, model.backbone.get_input_embeddings().weight)


@pytest.mark.parametrize("category", ["C1", "C2"])
def test_held_out_labels_do_not_reach_their_own_scores(category):
    feedback = fg.from_errors(records(12), category)
    model = model_of(fg.UNITS[category])
    features = model.features(feedback.prompts, feedback.responses)
    folds = fg.question_folds(feedback, 3)
    short = reward_models.TrainConfig(epochs=2, learning_rate=1e-2)
    before = fg.out_of_fold(model, feedback, folds, short, features=features)
    inside = np.isin(feedback.row, np.flatnonzero(folds == 0))
    labels = np.where(inside, 1 - feedback.labels, feedback.labels)
    changed = fg.SegmentFeedback(**vars(feedback) | {"labels": labels})
    after = fg.out_of_fold(model, changed, folds, short, features=features)
    for fold, x, y in zip(folds, before, after, strict=True):
        assert np.allclose(x, y) == (fold == 0)


def one_kind(record, field):
    """The record with feedback or preference alone; with the one answer that spans need."""
    other = {"feedback": ("preference", *qa.PREDICTIONS[1:]), "preference": ("feedback",)}[field]
    return {name: value for name, value in record.items() if name not in other}


def test_each_model_learns_from_the_records_that_hold_what_it_needs():
    marked = [one_kind(r, "feedback") for r in OURS[:3]]
    compared = [one_kind(r, "preference") for r in OURS[3:5]]
    used = fg.used_for([*marked, *compared, OURS[5]])
    assert used["R1"] == used["R2"] == [*marked, OURS[5]]
    assert used["R3"] == [OURS[5]] and used["preference"] == [*compared, OURS[5]]
    assert fg.used_for(OURS) == dict.fromkeys(("R1", "R2", "R3", "preference"), OURS)


def test_a_model_with_too_few_questions_is_left_out_with_a_reason(capsys):
    feedback = {
        "R1": fg.from_errors(OURS[:4], "C1"),
        "R2": fg.from_errors([], "C2"),
        "R3": fg.from_preferences(OURS[:4], [[0] * 6] * 3 + [None]),
        "preference": fg.from_preferences([], []),
    }
    assert list(fg.with_enough(feedback, 3)) == ["R1"]
    said = capsys.readouterr().out
    assert "R1" not in said and all(name in said for name in ("R2", "R3", "preference"))
    assert "0 questions have that, 3 are needed" in said
    assert list(fg.with_enough(feedback, 5)) == []  # R1 has four


def test_where_the_other_folds_teach_nothing_the_model_stays_untrained(tmp_path):
    made = records(6)
    feedback = fg.from_preferences(made, [[1] * 6] * 2 + [None] * 4)
    folds = np.repeat([0, 0, 1, 1, 2, 2], 4)  # fold 0 has all decided pairs
    model = model_of("sequence")
    features = model.features(feedback.prompts, feedback.responses)
    short = reward_models.TrainConfig(epochs=2, learning_rate=1e-2)
    how = {"features": features, "folder": tmp_path}
    scores = np.concatenate(fg.out_of_fold(model, feedback, folds, short, **how))
    assert (scores[folds == 0] == 0).all() and (scores[folds != 0] != 0).all()
    assert sorted(p.parent.name for p in tmp_path.glob("*/history.csv")) == ["fold-1", "fold-2"]


def test_folds_keep_questions_together_and_subsets_renumber():
    made = records(9)
    feedback = fg.from_preferences(made, [r["preference"] for r in made])
    folds = fg.question_folds(feedback, 3, seed=1)
    for group in np.unique(feedback.group):
        assert len(set(folds[feedback.group == group])) == 1
    part = fg.subset(feedback, folds == 1)
    whole = {(feedback.responses[a], feedback.responses[b]) for a, b in feedback.pairs}
    assert {(part.responses[a], part.responses[b]) for a, b in part.pairs} <= whole
    with pytest.raises(ValueError, match="no row teaches anything"):
        fg.fit(model_of("sequence"), fg.from_preferences(made, [None] * 9), HEAD)


def test_shuffled_labels_keep_their_number_and_the_unknown_ones():
    feedback = fg.from_errors(OURS, "C2")
    dealt = fg.shuffled(feedback, 3)
    assert np.array_equal(np.isnan(dealt.labels), np.isnan(feedback.labels))
    assert np.nansum(dealt.labels) == np.nansum(feedback.labels)


def test_constructed_records_fit_the_schema_and_mark_what_was_changed():
    made = records()
    again = records()
    assert made == again
    kinds = {e["error type"] for r in made for e in r["feedback"]["errors"]}
    assert kinds == {"Wrong-Grounding", "Irrelevant", "Redundant"}
    for record in made:
        qa.check_record(record, needed=["feedback", "preference"])
        own = " ".join(record["passages"][0][1:])
        other = " ".join(record["passages"][1][1:])
        for error in record["feedback"]["errors"]:
            text = record["prediction 1"][error["start"] : error["end"]]
            inside = {"Irrelevant": other, "Redundant": own}.get(error["error type"], "")
            assert text in inside or error["error type"] != "Irrelevant"
