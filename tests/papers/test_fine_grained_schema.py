"""The qa-feedback schema: reading, prompts, statistics, agreement; and the released files themselves."""

import copy
import itertools
import json

import numpy as np
import pytest

from lib import runtime
from lib.papers.fine_grained import schema as qa

SAMPLE = runtime.project_root() / "data" / "samples" / "qa_feedback.json"
TEXT = "The mill was built in 1790. It is old. It grinds flour \U0001f600 still."


def span(text, kind, explanation="", inside=TEXT):
    start = inside.index(text)
    end = start + len(text)
    return {"error type": kind, "explanation": explanation, "start": start, "end": end}


@pytest.fixture
def record():
    source = {"passage_id": 1, "sentence_id": [1]}
    return {
        "question": "When was the mill built?",
        "passages": [["Mill", "The mill was built in 1791.", "It grinds flour."]],
        "gold": "In 1791.",
        "prediction 1": TEXT,
        "prediction 2": "In 1791.",
        "prediction 3": "Long ago.",
        "prediction 4": "In 1791.",
        "feedback": {
            "errors": [
                span("in 1790.", "Wrong-Grounding", json.dumps(source)),
                span("It is old.", "Redundant", "The mill"),
                span("\U0001f600 still.", "Irrelevant"),
            ],
            "missing-info": [{"error type": "Missing-Answer", **source}],
            "corrected-prediction": "The mill was built in 1791.",
        },
        "preference": [2, 1, 2, 1, 0, 2],
    }


def write(path, records):
    path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    return path


# --- reading -------------------------------------------------------------------------------------


def test_a_record_is_read_as_it_stands(record, tmp_path):
    assert qa.load_feedback(write(tmp_path / "f.json", [record])) == [record]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda r: r.pop("question"), "question"),
        (lambda r: r.update(passages="none"), "passages"),
        (lambda r: r["passages"].append([]), "passage 2"),
        (lambda r: r.pop("prediction 3"), "prediction 3"),
        (lambda r: r.update(gold=None), "gold"),
        (lambda r: r.update(preference=[1, 2]), "preference"),
        (lambda r: r.update(preference=[1, 2, 0, 1, 2, True]), "preference"),
        (lambda r: r.pop("preference"), "preference"),
        (lambda r: r["feedback"].pop("missing-info"), "feedback.missing-info"),
        (lambda r: r["feedback"]["errors"][0].update({"error type": "Typo"}), "errors[0]"),
        (lambda r: r["feedback"]["errors"][1].update(start=29), "errors[1]"),
        (lambda r: r["feedback"]["errors"][1].update(end=10_000), "errors[1]"),
        (lambda r: r["feedback"]["errors"][2].update(start=28), "do not overlap"),
        (lambda r: r["feedback"]["errors"][0].update(explanation="p1"), "explanation, passage_id"),
        (lambda r: r["feedback"]["errors"][1].update(explanation=""), "errors[1], explanation"),
        (lambda r: r["feedback"]["missing-info"][0].update(passage_id=2), "passage_id"),
        (lambda r: r["feedback"]["missing-info"][0].update(sentence_id=[3]), "sentence_id"),
        (lambda r: r["feedback"]["missing-info"][0].update(sentence_id=[]), "sentence_id"),
        (lambda r: r["feedback"].update({"corrected-prediction": None}), "corrected-prediction"),
    ],
)
def test_a_broken_field_is_named_with_its_line(record, tmp_path, change, named):
    broken = copy.deepcopy(record)
    change(broken)
    path = write(tmp_path / "f.json", [record, broken])
    with pytest.raises(ValueError) as error:
        qa.load_feedback(path, needed=qa.FIELDS)
    assert "f.json, line " in str(error.value) and named in str(error.value)


def test_white_space_at_the_edges_of_a_span_is_no_part_of_it(record, tmp_path):
    """As in the released training records, where a last span may hold the line break that ends the text."""
    record["prediction 1"] += "\n"
    size = len(record["prediction 1"])
    first = record["prediction 1"].rindex(" ") + 1
    span = {"error type": "Irrelevant", "explanation": "", "start": first, "end": size - 1}
    record["feedback"]["errors"] = [span]
    wide = copy.deepcopy(record)
    wide["feedback"]["errors"][0] |= {"start": first - 1, "end": size}
    assert qa.load_feedback(write(tmp_path / "f.json", [wide])) == [record]
    wide["feedback"]["errors"][0] |= {"start": size - 1, "end": size}  # white space alone
    with pytest.raises(ValueError, match="whole words"):
        qa.load_feedback(write(tmp_path / "f.json", [wide]))


def test_course_items_become_records():
    item = {"instruction": "Summarise.", "input": "One is. Two is!", "responses": ["a", "b"]}
    made = qa.check_record(qa.to_record(item))
    assert made["passages"] == [["Input", "One is.", "Two is!"]]
    assert (made["prediction 1"], made["prediction 2"]) == ("a", "b")
    assert "prediction 3" not in made
    assert qa.to_record(item | {"input": ""})["passages"] == []


# --- prompts -------------------------------------------------------------------------------------


def test_prompt_layout():
    passages = [("A", "A\n\nx y."), ("B", "z.")]
    before = "question: q? context: wikipage: A text: A\n\nx y. | wikipage: B text: z."
    assert qa.prompt("q?", passages) == before
    assert qa.prompt("q?", passages, "") == before + " answer:"
    assert qa.prompt("q?", passages, "yes") == qa.prompt("q?", passages, "") + " yes"
    assert qa.prompt("q?", None, "yes") == "question: q? answer: yes"


@pytest.mark.parametrize("answer", [None, "", "a kind cat sat on a mat ."])
def test_fit_prompt_keeps_question_and_answer_and_all_context_that_fits(tiny, answer):
    tokenizer, question = tiny[1], "are you a cat"
    passages = [("the dog", "the dog ran on the mat . " * 9), ("you", "you are nice . " * 5)]

    def size(text):
        return len(tokenizer(text)["input_ids"])

    whole = qa.prompt(question, passages, answer)
    least = size(qa.prompt(question, [], answer))
    for limit in (size(whole), size(whole) - 1, least + 7, least):
        text = qa.fit_prompt(tokenizer, question, passages, answer, max_tokens=limit)
        assert size(text) <= limit
        assert text.startswith(f"question: {question} context:")
        if answer is not None:
            assert text.endswith(f"answer: {answer}".rstrip())
        assert (text == whole) == (limit == size(whole))
        assert size(text) >= min(limit - 2, size(whole) - 2)  # "wikipage:" is two tokens here
    with pytest.raises(ValueError, match=r"Raise it"):
        qa.fit_prompt(tokenizer, question, passages, answer, max_tokens=least - 1)


def test_questions_must_carry_the_prompt_that_everyone_builds(tmp_path):
    page = {"wikipage": "Mill", "content": "Mill\n\nOld."}
    good = {"question": "q", "passages": [page], "answer": ["a"]}
    good["text"] = qa.prompt("q", [("Mill", "Mill\n\nOld.")])
    assert qa.load_questions(write(tmp_path / "q.json", [good])) == [good]
    for wrong in (
        {"text": good["text"].replace(" | ", " ") + " x"},
        {"answer": []},
        {"passages": ["x"]},
        {"question": 3},
    ):
        with pytest.raises(ValueError, match=f"line .*{next(iter(wrong))}"):
            qa.load_questions(write(tmp_path / "q.json", [good | wrong]))


# --- statistics ----------------------------------------------------------------------------------


def test_tables(record):
    spans = qa.span_table([record])
    assert spans.type.tolist() == ["Wrong-Grounding", "Redundant", "Irrelevant"]
    assert spans.category.tolist() == ["C2", "C1", "C1"]
    assert spans.words.tolist() == [2, 3, 2] and spans.characters.tolist() == [8, 10, 8]
    counts = qa.class_counts([record, record]).set_index("type")
    assert counts.loc["Redundant", ["count", "records", "value"]].tolist() == [2, 2, 1]
    assert counts.loc["Missing-Answer", "count"] == 2 and counts.loc["Incoherent", "count"] == 0
    pairs = qa.preference_table([record])
    assert pairs.pair.tolist() == ["1-2", "1-3", "1-4", "2-3", "2-4", "3-4"]
    assert pairs.first_words.tolist()[:4] == [len(TEXT.split())] * 3 + [2]
    assert qa.first_wins(pairs).value == 2 / 5


def test_conflicts_are_cycles_and_broken_ties():
    assert qa.conflicts([1, 2, 1, 1, 1, 1]) == [(0, 1, 2)]  # 1 > 2 > 3 > 1
    assert qa.conflicts([0, 1, 1, 0, 1, 1]) == []  # 1 = 2 = 3, 1 > 3: small differences add up
    assert qa.conflicts([0, 1, 1, 2, 1, 1]) == [(0, 1, 2)]  # 1 = 2, 1 > 3 > 2
    assert qa.conflicts([1, 2, None, 1, None, None]) == [(0, 1, 2)]
    assert qa.conflicts([1, None, 1, 1, 1, 1]) == []


def test_orders_with_ties_never_conflict_and_every_cycle_does():
    for ranks in itertools.product(range(4), repeat=4):
        signs = [np.sign(ranks[b] - ranks[a]) for a, b in qa.PAIRS]
        assert qa.conflicts([{1: 1, -1: 2, 0: 0}[int(s)] for s in signs]) == []
    strict = itertools.product((1, 2), repeat=6)
    free = [p for p in strict if not qa.conflicts(list(p))]
    assert len(free) == 24  # the orders of four answers


# --- agreement -----------------------------------------------------------------------------------


def test_agreement_of_a_record_with_itself_and_by_hand(record):
    table = qa.agreement([record] * 3, [record] * 3).set_index(["unit", "level"])
    assert (table.value == 1).all() and (table.n == 3).all()

    other = copy.deepcopy(record)
    errors = other["feedback"]["errors"]
    errors[0] = span("1790.", "Wrong-Grounding", errors[0]["explanation"])  # shorter
    errors[1]["error type"] = "Irrelevant"  # same category
    del errors[2]
    value = qa.agreement([record], [other]).set_index(["unit", "level"]).value
    assert value["span", "any"] == pytest.approx(2 * 1 / 5)
    assert value["span", "category"] == pytest.approx(2 * 1 / 5)
    assert value["span", "type"] == 0
    assert value["character", "any"] == pytest.approx(2 * 15 / (26 + 15))
    assert value["character", "type"] == pytest.approx(2 * 5 / (26 + 15))
    words, both = len(TEXT.split()), 4
    seen = (both + words - 7) / words
    chance = (7 * 4 + (words - 7) * (words - 4)) / words**2
    assert value["word", "any"] == pytest.approx((seen - chance) / (1 - chance))
    assert value["sentence", "type"] == 1 and value["preference", "type"] == 1


def test_agreement_counts_clusters_not_their_copies(record):
    other = copy.deepcopy(record)
    del other["feedback"]["errors"][2]
    how = {"resamples": 40}
    once = qa.agreement([record, record], [record, other], **how)
    twice = qa.agreement([record, record] * 9, [record, other] * 9, clusters=[0, 1] * 9, **how)
    assert (once.n == 2).all() and (twice.n == 2).all()
    for name in ("value", "low", "high"):
        np.testing.assert_allclose(once[name], twice[name])
    loose = qa.agreement([record, record] * 9, [record, other] * 9, **how)
    assert (loose.n == 18).all() and (loose.high - loose.low)[0] < (twice.high - twice.low)[0]


def test_agreement_needs_the_same_records(record):
    other = record | {"prediction 1": "Something else."}
    with pytest.raises(ValueError, match="same order"):
        qa.agreement([record], [other])
    with pytest.raises(ValueError, match="at least one"):
        qa.agreement([], [])


def test_agreement_without_any_label(record):
    bare = record | {"feedback": record["feedback"] | {"errors": [], "missing-info": []}}
    bare.pop("preference")
    value = qa.agreement([bare], [bare]).set_index(["unit", "level"]).value
    assert value.isna().all() and "preference" not in value.index.get_level_values(0)


# --- files ---------------------------------------------------------------------------------------


def test_our_sample_fits_the_schema():
    records = qa.load_feedback(SAMPLE)
    assert 8 <= len(records) <= 12
    assert set(qa.span_table(records).type) == set(qa.CATEGORIES)
    assert (qa.class_counts(records)["count"] > 0).all()
    assert not any(qa.conflicts(r["preference"]) for r in records)


def test_released_feedback(real_data):
    """Counts as published with the data: 500 records, 1,373 spans, 842 missing pieces, 3,000 preferences."""
    records = qa.load_feedback(real_data / "qa_feedback" / "dev_feedback.json")
    counts = qa.class_counts(records).set_index("type")["count"]
    assert len(records) == 500
    assert counts.tolist() == [909, 133, 16, 163, 152, 240, 283, 319]
    pairs = qa.preference_table(records)
    assert pairs.value.value_counts().to_dict() == {1: 1577, 2: 1039, 0: 384}
    assert qa.first_wins(pairs).value == pytest.approx(1577 / 2616)
    assert not any(qa.conflicts(r["preference"]) for r in records)


def test_released_questions(real_data):
    found = {
        name: qa.load_questions(real_data / "qa_feedback" / name)
        for name in ("train_1k.json", "dev.json")
    }
    assert {name: len(rows) for name, rows in found.items()} == {
        "train_1k.json": 1000,
        "dev.json": 500,
    }
    row = found["dev.json"][0]
    assert qa.prompt(row["question"], qa.passages_of(row)) == row["text"]


def test_first_records_of_the_files_for_training(real_data):
    """The first 24 of the authors' train_feedback.json, train.json and test.json fit the readers whole."""
    folder = real_data / "qa_feedback" / "first_24"
    records = qa.load_feedback(folder / "train_feedback.json")
    assert len(records) == 24 and len(qa.preference_table(records)) == 24 * 6
    assert set(qa.span_table(records).type) <= set(qa.CATEGORIES)
    assert not any(qa.conflicts(r["preference"]) for r in records)
    for name, references in (("train.json", 1), ("test.json", 2)):
        rows = qa.load_questions(folder / name)
        assert len(rows) == 24 and {len(row["answer"]) for row in rows} == {references}
        for row in rows:  # the layout is exact but for white space
            rebuilt = qa.prompt(row["question"], qa.passages_of(row))
            assert rebuilt.split() == row["text"].split()
