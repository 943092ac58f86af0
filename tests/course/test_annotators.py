"""The annotators' items, gate and jobs: cases by hand, figures by hand, files that come again."""

import re
from functools import partial

import numpy as np
import pandas as pd
import pytest

from lib import generation, models, questions, tables
from lib.annotator import SimulatedAnnotator
from lib.course import annotators, assets, cli, gate, items
from lib.judge import LocalAnnotator
from lib.replies import ReplyStore


@pytest.fixture(scope="module")
def wikipedia():
    """The real leads, or a skip."""
    try:
        return assets.fetch("wikipedia")
    except assets.AssetError as error:
        pytest.skip(f"needs the real asset: {error}")


# --- items ---------------------------------------------------------------------------------------


def test_the_committed_prompts_are_what_the_selection_gives(wikipedia):
    assert items.select_prompts().to_dict("records") == items.read_prompts().to_dict("records")


def test_prompts_have_their_parts_kinds_and_questions_of_their_own():
    prompts = items.read_prompts()
    assert prompts["part"].value_counts().to_dict() == items.PARTS
    assert prompts["id"].is_unique and prompts["title"].is_unique
    assert (prompts["part"] != "pool").sum() >= 150 and (prompts["part"] == "pool").sum() >= 60
    counts = prompts.groupby("part")["kind"].value_counts().unstack()
    assert (counts >= 5).all(axis=None) and set(counts) == {"question", "summary", "explanation"}
    assert not prompts["input"].str.contains("\n").any()
    with pytest.raises(ValueError, match="'dev'.*train, tuning"):
        items.read_prompts("dev")


def test_responses_that_are_not_there_are_asked_for_by_their_command(tmp_path, monkeypatch):
    tables.write_jsonl(items.read_prompts("tuning"), tmp_path / "prompts.jsonl")
    monkeypatch.setattr(items, "folder", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match="python -m lib replies items"):
        items.read_responses()


def test_the_committed_responses_are_of_the_committed_prompts():
    if not (items.folder() / "responses.jsonl.gz").exists():
        pytest.skip("python -m lib replies items has not been run")
    table = items.read_responses()
    assert (
        len(table) == 154 * 5 + 60 * 64
        and (items.folder() / "responses.jsonl.gz").stat().st_size < 5e6
    )
    counts = table.groupby(["id", "generator"]).size().unstack()
    assert set(counts) == set(items.GENERATORS) and counts.notna().all(axis=None)
    assert (table["response"] != "").mean() > 0.95


@pytest.fixture
def few(tmp_path, monkeypatch):
    """Six prompts in a folder of their own, one tiny generator, and how often it was asked."""
    prompts = pd.concat([items.read_prompts("train")[:4], items.read_prompts("pool")[:2]])
    tables.write_jsonl(prompts, tmp_path / "prompts.jsonl")
    monkeypatch.setattr(items, "folder", lambda: tmp_path)
    monkeypatch.setattr(items, "GENERATORS", {"tiny": (2, 5)})
    monkeypatch.setattr(items, "DECODING", {"max_new_tokens": 4})
    monkeypatch.setattr(items, "ROWS", 4)
    asked = []

    def count(model, tokenizer, shown, **options):
        asked.append(len(shown))
        return sample(model, tokenizer, shown, **options)

    sample = generation.sample
    monkeypatch.setattr(generation, "sample", count)
    monkeypatch.setattr(models, "load_policy", lambda name: models.build_tiny_model())
    return tmp_path, asked


def test_responses_are_sampled_once_and_come_again_the_same(few):
    folder, asked = few
    path = items.generate(store=ReplyStore(folder / "a.sqlite"))
    assert asked == [2, 2, 1, 1]
    first = path.read_bytes()
    items.generate(store=ReplyStore(folder / "a.sqlite"))
    assert len(asked) == 4
    items.generate(store=ReplyStore(folder / "b.sqlite"))  # as if the store had been deleted
    assert len(asked) == 8 and path.read_bytes() == first
    table = items.read_responses()
    assert table.groupby(["part", "id"]).size().groupby("part").unique().to_dict() == {
        "train": [2], "pool": [5]
    }  # fmt: skip
    assert table["input"].nunique() == 6 and set(table["generator"]) == {"tiny"}


def test_pairs_are_of_one_prompt_and_both_places_are_used(few, monkeypatch):
    folder, _ = few
    monkeypatch.setattr(items, "GENERATORS", {"tiny": (5, 5)})
    items.generate(store=ReplyStore(folder / "a.sqlite"))
    pairs = annotators.rankings_table(4, "train")
    assert len(pairs) == 16 and (pairs["place1"] != pairs["place2"]).all()
    assert (pairs["place1"] < pairs["place2"]).nunique() == 2
    responses = items.read_responses("train").groupby("id")["response"].apply(list)
    for row in pairs.itertuples():
        assert row.response1 == responses[row.id][row.place1]
        assert row.response2 == responses[row.id][row.place2]
    pd.testing.assert_frame_equal(pairs, annotators.rankings_table(4, "train"))


# --- the gate's cases ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sentence", "allowed"),
    [
        ("It was built in 1975.", lambda n: 5 <= abs(n - 1975) <= 40),
        ("It has 12,500 inhabitants.", lambda n: 1200 <= abs(n - 12500) <= 6300),
        ("It rises 47 metres in 3 steps.", lambda n: 4 <= abs(n - 47) <= 24),
    ],
)
def test_a_changed_number_is_another_plausible_one_and_nothing_else_changes(sentence, allowed):
    changed = gate.change_number(sentence)
    old, new = (re.search(r"\d{1,3}(,\d{3})+|\d{2,}", text)[0] for text in (sentence, changed))
    assert allowed(int(new.replace(",", "")))
    assert changed.replace(new, old) == sentence and ("," in new) == ("," in old)


def test_a_sentence_without_a_number_is_refused():
    with pytest.raises(ValueError, match="no number"):
        gate.change_number("It is 3 of us.")


@pytest.fixture(scope="module")
def cases(wikipedia):
    return gate.build_cases()


def test_cases_are_apart_from_the_items_and_enough(cases):
    assert cases["part"].value_counts().to_dict() == gate.CASES and gate.CASES["test"] >= 100
    assert cases["title"].is_unique
    assert not set(cases["title"]) & set(items.read_prompts()["title"])
    for column in ("wrong_kind", "worse_kind"):
        counts = cases[cases["part"] == "test"][column].value_counts()
        assert counts.min() == counts.max()


def test_each_case_is_wrong_in_the_way_it_says(cases):
    for case in cases.itertuples():
        assert case.right != case.wrong and case.better != case.worse
        if case.wrong_kind != "description":
            assert case.right in case.text
        assert case.wrong not in case.text
        assert all(part in case.text for part in case.better.split(". ")[:1])
        if case.worse_kind == "dropped":
            assert case.worse in case.better
        elif case.worse_kind == "added":
            assert case.worse.startswith(case.better) and case.worse not in case.text
        elif case.worse_kind == "number":
            assert len(case.worse.split()) == len(case.better.split())
        else:
            assert case.worse not in case.text


# --- its figures ---------------------------------------------------------------------------------


def test_figures_of_a_pair_by_hand():
    table = pd.DataFrame({"right": ["aa", "a", "a", "a"], "wrong": ["a", "aa", "aa", "aa"]})
    # log odds of the first place: right first, wrong first
    scores = np.array([[2.0, -1.0], [3.0, 1.0], [1.0, 2.0], [-1.0, 1.0]])
    row = gate.measure("grounded pair", table, scores, scores)
    assert row["accuracy"] == 0.5 and row["longer"] == 0.25 and row["gain"] == 0.25
    assert row["first_share"] == pytest.approx(6 / 8) and row["consistency"] == 0.5
    assert row["accuracy_low"] < 0.5 < row["accuracy_high"] and "threshold" not in row


def test_the_threshold_is_fitted_on_tuning_cases_only():
    table = pd.DataFrame({"right": ["a"] * 3, "wrong": ["b"] * 3})
    tuning = np.array([[5.0, 1.0], [6.0, 2.0]])
    row = gate.measure(
        "grounded yes/no", table, np.array([[4.0, 1.0], [9.0, 8.0], [3.0, 3.4]]), tuning
    )
    assert row["threshold"] == 3.5
    assert row["threshold_accuracy"] == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert row["accuracy"] == pytest.approx(2 / 3)


class Oracle:
    """An annotator that knows the texts; `bias` is what the first place is worth to it."""

    name = "oracle"

    def __init__(self, cases: pd.DataFrame, bias: float = 0.0):
        self.good = {*cases["right"], *cases["better"]}
        self.bias, self.asked = bias, []

    def log_probs(self, asked):
        self.asked += asked
        rows = np.full((len(asked), 7), np.nan)
        for row, question in zip(rows, asked, strict=True):
            row[: len(question.options)] = np.log(self.answer(question))
        return rows

    def answer(self, question):
        n = len(question.options)
        if n == 7:
            known = any(text in question.rest for text in self.good)
            return [0.02] * 6 + [0.88] if known else [0.88] + [0.02] * 6
        if n == 2 and "Statement: " in question.rest:
            return [0.9, 0.1] if any(text in question.rest for text in self.good) else [0.1, 0.9]
        first, _ = re.split(r"(?:Answer|Statement|Output) (?:B|\(b\)): ", question.rest)
        odds = self.bias + (1 if any(text in first for text in self.good) else -1)
        return [1 / (1 + np.exp(-odds)), 1 / (1 + np.exp(odds))]

    def supports(self, texts, statements):
        asked = [questions.support_question(*pair) for pair in zip(texts, statements, strict=True)]
        return questions.log_odds(self.log_probs(asked)[:, :2])


def test_a_gate_of_a_judge_that_knows_and_one_that_looks_at_the_place(cases):
    # a longer answer may hold the better one whole; judge those that differ otherwise
    plain = cases[cases["worse_kind"] != "added"]
    test = plain[plain["part"] == "test"]
    kind = "grounded pair"
    ask = gate.KINDS[kind]["plain"]
    fair, biased = (
        gate.measure(kind, test, ask(Oracle(cases, bias), test), np.zeros((2, 2)))
        for bias in (0.0, 5.0)
    )
    assert fair["accuracy"] == biased["accuracy"] == 1  # both orders are averaged
    assert (fair["first_share"], biased["first_share"]) == (0.5, 1)
    assert (fair["consistency"], biased["consistency"]) == (1, 0)


def test_every_way_of_asking_gives_two_scores_a_case(cases):
    oracle = Oracle(cases)
    table = cases[:3].assign(reference="a reference")
    for askings in gate.KINDS.values():
        for ask in askings.values():
            assert ask(oracle, table).shape == (3, 2)
    assert len({(q.shared, q.rest) for q in oracle.asked}) == 3 * 31


def test_the_whole_gate_chooses_on_tuning_cases_and_reports_test_cases(cases):
    passed, tried = gate.run(Oracle(cases))
    assert passed["kind"].tolist() == list(gate.KINDS) and set(passed["part"]) == {"test"}
    assert set(tried["part"]) == {"tuning"} and len(tried) == sum(map(len, gate.KINDS.values()))
    assert (passed["n"] == gate.CASES["test"]).all()
    best = tried.groupby("kind", sort=False)["accuracy"].max()
    chosen = tried.merge(passed[["kind", "asked"]])
    assert (chosen.set_index("kind")["accuracy"] == best).all()
    assert passed.set_index("kind").loc["grounded yes/no", "threshold_accuracy"] == 1


def test_the_simulated_annotator_passes_where_its_rubric_sees_the_damage(cases):
    rows = gate.run_simulated(SimulatedAnnotator(rating_noise=0, ranking_noise=0), cases[:24])
    assert rows["kind"].tolist() == ["open rating", "open pair"] and (rows["n"] == 24).all()
    assert (rows["accuracy_low"] > 0.5).all() and (rows["model"] == "simulated").all()


def test_cases_as_they_were_asked_are_stored():
    if not (annotators.folder() / "gate-cases.jsonl.gz").exists():
        pytest.skip("no gate was run")
    assert len(annotators.read_cases()) == gate.CASES["test"]
    assert len(annotators.read_cases("tuning")) == gate.CASES["tuning"]


def test_stored_cases_are_those_that_the_program_builds(cases):
    for part in gate.CASES:
        built = cases[cases["part"] == part].reset_index(drop=True)
        pd.testing.assert_frame_equal(annotators.read_cases(part), built)


# --- habits --------------------------------------------------------------------------------------


class Habitual(LocalAnnotator):
    """Rates by length, and takes the first place unless the other response is much longer."""

    def _answer(self, asked):
        return [self.reply(question) for question in asked]

    def reply(self, question):
        if len(question.options) == 7:
            size = len(question.rest.split("Answer: ")[1]) / 100
            return [-((k - 1 - size) ** 2) for k in range(7)]
        first, second = question.rest.split("Output (b): ")
        odds = 1.0 + (len(first) - len(second)) / 200
        return [-np.logaddexp(0, -odds).item(), -np.logaddexp(0, odds).item()]


def test_habits_are_counted_from_stored_replies(tmp_path, monkeypatch):
    monkeypatch.setenv("FEEDBACK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(annotators, "folder", lambda: tmp_path)
    monkeypatch.setattr(annotators, "ANNOTATED", ("tuning",))
    monkeypatch.setattr(annotators, "released_feedback", lambda: None)
    judge = partial(Habitual, shipped=tmp_path)
    monkeypatch.setattr(annotators, "LocalAnnotator", judge)
    assert annotators.habits("tiny") == {}
    annotators.annotate("tiny")
    row = annotators.habits("tiny")
    assert row["first place"] > 0.8 and row["ties, rankings"] > 0.5 and "rubric" in row
    assert not any(name.startswith("again") for name in row)
    annotators.annotate_again("tiny")
    assert annotators.habits("tiny")["again: ratings, asked twice"] > 0.99
    assert annotators.annotate_released("tiny") == []


# --- the command ---------------------------------------------------------------------------------


def test_the_command_writes_what_a_job_makes_and_refuses_unknown_ones(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("FEEDBACK_ROOT", str(tmp_path))
    made = []
    monkeypatch.setitem(
        annotators.JOBS, "gate", lambda model: made.append(model) or [tmp_path / "x"]
    )
    assert cli.main(["replies", "gate", "--model", "tiny"]) == 0
    assert made == ["tiny"] and capsys.readouterr().out.startswith("x\n| annotator")
    assert cli.main(["replies", "gate"]) == 0
    assert made[1:] == list(annotators.MODELS)
    assert cli.main(["replies", "nosuch"]) == 2
    allowed = ", ".join(annotators.JOBS)
    assert f"allowed: {allowed}" in capsys.readouterr().err


def test_stored_gate_tables_are_read_and_shown_together(tmp_path, monkeypatch):
    monkeypatch.setattr(annotators, "folder", lambda: tmp_path)
    assert annotators.read_gate().empty
    for model in annotators.MODELS:
        row = {"model": model, "kind": "open pair", "asked": "plain", "n": 108, "accuracy": 0.75}
        row |= {"accuracy_low": 0.66, "accuracy_high": 0.82, "threshold_accuracy": None}
        tables.write_csv(pd.DataFrame([row]), tmp_path / f"gate-test-{model}.csv")
    assert annotators.read_gate()["model"].tolist() == list(annotators.MODELS)
    lines = annotators.gate_markdown().splitlines()
    assert len(lines) == 4 and lines[2].startswith(
        "| qwen-0.5b | open pair | plain | 108 | 75 [66, 82] | "
    )
    assert len({line.count("|") for line in lines}) == 1
    with pytest.raises(ValueError, match="tuning, test"):
        annotators.read_gate("train")
