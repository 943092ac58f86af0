"""Notebook 90: quality, the annotator's looks, what minutes buy, what learns from them."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import completion

from lib import annotate, chat, generation, losses, models, questions
from lib.course import record
from lib.course.arms import Arms
from lib.papers.fine_grained import schema, toy, toy_models
from lib.papers.one_hour import annotator, arms, eyes, figures, learners, world
from lib.papers.sparse_feedback import sheets

QUESTIONS = toy.draw_questions(60, seed=3)
PROMPTS = [question.prompt for question in QUESTIONS]
PERFECT = eyes.Simulated(0.0, 1)
PROMPT = "colour red, metal iron, city oslo, age two? metal city:"


def looked(prompt, answer, error, seed):
    return eyes.Simulated(error, seed).looks([prompt], [answer])[0]


def pool_of(first, second):
    """Two answers to each prompt as samples."""
    texts = [text for pair in zip(first, second, strict=True) for text in pair]
    n = len(texts)
    prompts = [prompt for prompt in PROMPTS[: n // 2] for _ in range(2)]
    empty = [np.zeros(1)] * n
    ids = [[0]] * n
    index = [i // 2 for i in range(n)]
    return generation.Samples(prompts, index, ids, ids, texts, empty, empty, [True] * n)


@pytest.fixture(scope="module")
def pool():
    return pool_of(toy.demonstrate(QUESTIONS, 1), toy.demonstrate(QUESTIONS, 2))


@pytest.fixture(scope="module")
def ground():
    model, tokenizer = models.build_tiny_model(
        words=world.vocabulary(), seed=0, hidden_size=32, num_key_value_heads=4
    )
    settings = arms.Settings(
        best_of=2, steps=3, episodes=8, ppo_epochs=1, minibatch=4, max_new_tokens=8
    )
    prompts = arms.Prompts(PROMPTS[:6], PROMPTS[6:40], PROMPTS[40:])
    return arms.Ground(model, tokenizer, prompts, settings, 0)


# --- the world -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text, complete, faithful", [
    ("metal iron, city oslo.", 1, 1),
    ("metal iron.", 0.5, 1),
    ("metal iron, city rome.", 0.5, 0.5),
    ("metal iron, city oslo, age two.", 1, 2 / 3),  # true, but nobody asked
    ("metal iron, metal iron.", 0.5, 0.5),
    ("", 0, 0),
])  # fmt: skip
def test_quality_is_complete_times_faithful(text, complete, faithful):
    grade = world.grade(toy.judge(PROMPT, text))
    assert grade == pytest.approx((complete, faithful))
    assert grade.quality == pytest.approx(complete * faithful)


@pytest.mark.parametrize("text, sentence, better", [
    ("metal tin, city oslo.", "metal is wrong", "metal iron, city oslo."),
    ("metal iron.", "city is missing", "metal iron, city oslo."),
    ("age two. metal iron.", "age is not asked", "metal iron."),
    ("metal iron, city oslo. metal iron.", "metal is said twice", "metal iron, city oslo."),
])  # fmt: skip
def test_each_flaw_is_named_and_mended(text, sentence, better):
    assert sentence in world.flaws_of(PROMPT, text, toy.judge(PROMPT, text))
    assert world.mended(toy.read(PROMPT), text, sentence) == better
    assert arms.follows(text, better, sentence)
    assert not arms.follows(text, text, sentence)


def test_mending_never_lowers_quality():
    for question, draft in zip(QUESTIONS, toy.demonstrate(QUESTIONS, 5), strict=True):
        errors = toy.judge(question.prompt, draft)
        for sentence in world.flaws_of(question.prompt, draft, errors):
            after = toy.judge(question.prompt, world.mended(question, draft, sentence))
            assert world.grade(after).quality >= world.grade(errors).quality - 1e-9


def test_a_right_answer_has_no_flaw():
    text = "metal iron, city oslo."
    assert world.flaws_of(PROMPT, text, toy.judge(PROMPT, text)) == [world.NO_FLAW]


def test_the_first_policy_knows_every_word_it_reads(ground):
    rows = world.pretraining_rows(ground.tokenizer, QUESTIONS, 20, 0)
    unknown = ground.tokenizer.unk_token_id
    assert len(rows) == 80
    assert not any(unknown in row["input_ids"] for row in rows)


# --- the annotator -------------------------------------------------------------------------------


def test_without_error_a_look_is_the_truth():
    for prompt, answer in zip(PROMPTS, toy.demonstrate(QUESTIONS, 4), strict=True):
        truth, seen = toy.judge(prompt, answer), looked(prompt, answer, 0.0, 1)
        for part in ("relevant", "true", "sentences", "new"):
            np.testing.assert_array_equal(getattr(seen, part), getattr(truth, part))
        assert seen.coverage == pytest.approx(truth.coverage)


def test_a_look_errs_as_often_as_it_is_said_to():
    flips = []
    for seed in range(20):
        for prompt, answer in zip(PROMPTS, toy.demonstrate(QUESTIONS, 4), strict=True):
            seen = looked(prompt, answer, 0.2, seed)
            flips += (seen.true != toy.judge(prompt, answer).true).tolist()
    assert abs(np.mean(flips) - 0.2) < 0.02


def test_minutes_buy_what_the_papers_times_say():
    bought = {kind: annotator.items_of(kind, 60) for kind in annotator.SECONDS}
    assert bought == {
        "ratings": 117, "rankings": 58, "spans": 46, "words": 19, "demonstrations": 18
    }  # fmt: skip
    assert annotator.items_of("spans", 60, {"spans": 360}) == 10
    with pytest.raises(ValueError, match="allowed: ratings"):
        annotator.items_of("praise", 60)


@pytest.mark.parametrize("kind", annotator.SECONDS)
def test_a_larger_budget_has_what_a_smaller_one_bought(kind, pool):
    few, many = (annotator.buy(kind, n, pool, eyes.Simulated(0.2, 1)) for n in (10, 30))
    n = len(few.prompts)
    assert few.items == 10 and many.items == 30
    assert few.prompts == many.prompts[:n] and few.answers == many.answers[:n]
    assert few.sentences == many.sentences[:n]
    with pytest.raises(ValueError, match="60 questions"):
        annotator.buy(kind, 61, pool, eyes.Simulated(0.2, 1))


def test_without_error_the_better_answer_is_preferred(pool):
    bought = annotator.buy("rankings", 60, pool, eyes.Simulated(0.0, 1))
    better, worse = (annotator.quality_seen(bought.prompts, x, PERFECT) for x in bought.sides)
    assert (better > worse).all() and 0 < len(better) < 60


def test_ratings_rise_with_quality_and_demonstrations_are_right(pool):
    bought = annotator.buy("ratings", 60, pool, eyes.Simulated(0.0, 1))
    quality = annotator.quality_seen(bought.prompts, bought.answers, PERFECT)
    np.testing.assert_array_equal(bought.values, 1 + np.rint(6 * quality))
    blind = annotator.buy("ratings", 60, pool, eyes.Simulated(0.5, 1))
    assert set(blind.values) <= set(range(1, 8))
    written = annotator.buy("demonstrations", 60, pool, eyes.Simulated(0.0, 1))
    assert (annotator.quality_seen(written.prompts, written.answers, PERFECT) == 1).all()


def test_a_filled_sheet_becomes_comparisons(tmp_path, pool):
    table = pd.DataFrame({"instruction": pool.prompts[::2], "input": ""})
    table = table.assign(response1=pool.texts[::2], response2=pool.texts[1::2]).head(9)
    path = sheets.export_for_humans(table, tmp_path / "sheet.csv")
    sheet = pd.read_csv(path, encoding="utf-8-sig")
    sheet["better (a, b or equal)"] = ["a", "b", "equal"] * 3
    sheet.to_csv(path, index=False)
    bought = annotator.from_sheet(path)
    assert bought.items == 9 and len(bought.prompts) == 6
    rows = sheet.set_index("instruction")
    for prompt, better, worse in zip(bought.prompts, *bought.sides, strict=True):
        row = rows.loc[prompt]
        sides = [row["output (a)"], row["output (b)"]]
        assert [better, worse] == (sides if row.iloc[-1] == "a" else sides[::-1])


# what the page asks for beside a mark
WHY = {
    "Wrong-Grounding": json.dumps({"passage_id": 1, "sentence_id": [1]}),
    "Redundant": "it was said before",
}


def marked(item, *errors):
    """An item of the page as its export has it, with (clause number, type) marked."""
    record = schema.to_record(item)
    spans = toy.Segmenter("clause").spans(record["prediction 1"])
    found = [
        {
            "start": spans[i][0],
            "end": spans[i][1],
            "error type": kind,
            "explanation": WHY.get(kind, ""),
        }
        for i, kind in errors
    ]
    corrected = "metal iron." if errors else record["prediction 1"]
    feedback = {"errors": found, "missing-info": [], "corrected-prediction": corrected}
    return record | {"feedback": feedback}


def test_an_export_of_the_page_becomes_the_marks_of_who_saw_the_same(tmp_path, pool):
    items = annotator.to_mark(pool, 40)
    assert len(items) == 40 and annotate.build(items, guidelines=annotator.GUIDELINES)
    records = []
    for item in items:  # marked by someone who knows
        truth = toy.judge(item["instruction"], item["responses"][0])
        pairs = enumerate(zip(truth.relevant, truth.true, strict=True))
        kinds = [
            (i, "Wrong-Grounding" if not true else "Irrelevant")
            for i, (relevant, true) in pairs
            if not (relevant and true)
        ]
        records.append(marked(item, *kinds))
    path = tmp_path / "my_hour.json"
    path.write_text(json.dumps(records))
    bought = annotator.from_file(path)
    assert bought.kind == "spans" and bought.items == 40
    looks = PERFECT.looks(bought.prompts, bought.answers)
    for name in ("R2", "R3"):
        for mine, theirs in zip(bought.marks[name], annotator.marks_of(looks)[name], strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_a_mark_on_part_of_a_clause_counts_for_the_clause_and_for_no_other(tmp_path):
    item = {"instruction": PROMPT, "input": "", "responses": ["metal tin, city oslo, age two."]}
    record = marked(item, (2, "Redundant"))
    tin = {"start": 6, "end": 10, "error type": "Unverifiable", "explanation": ""}
    record["feedback"]["errors"].append(tin)
    (tmp_path / "mine.json").write_text(json.dumps([record]))
    marks = annotator.from_file(tmp_path / "mine.json").marks
    assert marks["R1"][0].tolist() == [1, 1, -1] and marks["R2"][0].tolist() == [-1]
    assert marks["R3"][0].tolist() == [0.5]


# --- a language model's eyes ---------------------------------------------------------------------


class TruthfulJudge:
    """A judge that reads the question's own text, as a model would; it counts what it was asked."""

    def __init__(self, lean=0.0):
        self.lean, self.asked = lean, []

    def log_probs(self, asked):
        self.asked += asked
        odds = np.array([self.lean + (3.0 if self.holds(question) else -3.0) for question in asked])
        return np.stack([odds, np.zeros(len(asked))], 1)

    def holds(self, question):
        text = question.shared.removeprefix("Text: ").strip()
        name, statement = question.rest.split(".")[0].removeprefix("Statement: The ").split(" ", 1)
        if name == "person":
            return (
                statement.split()[-1]
                in text.split("asks only for")[1].rstrip(".").replace(",", "").split()
            )
        if statement.startswith("is already"):
            return name in [
                x.split()[0] for x in text.removeprefix("The answer so far: ").split(", ")
            ]
        return f"The {name} {statement}." in text

    def write(self, prompts):
        return [[("Metal: iron, the city is Oslo.", True)] for _ in prompts]


@pytest.mark.parametrize("lean", [0.0, 2.5])
def test_a_model_that_answers_truly_sees_the_truth_wherever_it_leans(lean):
    model = eyes.Model(TruthfulJudge(lean), seed=1)
    answers = [*toy.demonstrate(QUESTIONS, 4)[:-3], "", "metal iron, metal iron.", "iron"]
    for prompt, answer, seen in zip(PROMPTS, answers, model.looks(PROMPTS, answers), strict=True):
        truth = toy.judge(prompt, answer)
        for part in ("relevant", "true", "sentences", "new"):
            np.testing.assert_array_equal(getattr(seen, part), getattr(truth, part), err_msg=answer)
    assert len({*model.judge.asked}) == len(model.judge.asked) - repeated()


def repeated():
    """Questions of the known answers that stand twice: their shared texts are made once a case."""
    known = [x for pairs in eyes.known_answers().values() for pair in pairs for x in pair]
    return len(known) - len({*known})


@pytest.fixture
def client(scripted, tmp_path):
    """Of an endpoint that answers truly."""

    def answer(body):
        rest = body["messages"][-1]["content"]
        shared, _, rest = rest.partition("\n\n")
        if not rest.startswith("Statement"):
            return completion("metal iron, city oslo.")
        holds = TruthfulJudge().holds(questions.Question(shared, rest, questions.YES_NO))
        return completion("Yes" if holds else "No")

    return chat.ChatClient("truthful", base_url=scripted(answer).url, cache=tmp_path / "r.sqlite")


def test_a_model_at_an_endpoint_sees_what_it_answers(client):
    model = eyes.of("truthful", 0.1, 1, client)
    answers = [*toy.demonstrate(QUESTIONS, 4)[:8], ""]
    for prompt, text, seen in zip(
        PROMPTS, answers, model.looks(PROMPTS[:9], answers), strict=False
    ):
        truth = toy.judge(prompt, text)
        np.testing.assert_array_equal(seen.true, truth.true)
        np.testing.assert_array_equal(seen.relevant, truth.relevant)
    assert model.ideals(PROMPTS[:2]) == ["metal iron, city oslo."] * 2
    assert isinstance(eyes.of(eyes.SIMULATED, 0.1, 1), eyes.Simulated)


def test_the_estimate_is_what_an_endpoint_is_asked(client, ground, pool):
    """Known answers, the example, every kind, before anything is sent; then nothing is left to buy."""
    settings = arms.Settings(annotator="truthful", best_of=2, max_new_tokens=8)
    asking = arms.Ground(ground.first, ground.tokenizer, ground.prompts, settings, 1, client)
    asking.pool = pool  # answers that have clauses
    estimate = asking.estimate(8)
    assert client.sent == client.bought == 0
    assert estimate["to_buy"] > 2 * eyes.CASES * len(eyes.KINDS) - repeated()
    annotator.telling_example(pool, asking.eyes)
    for kind in annotator.SECONDS:
        asking.buy(kind, 8)
    assert client.bought == estimate["to_buy"]
    assert asking.estimate(8)["to_buy"] == 0


@pytest.mark.parametrize("text, read", [
    ("metal iron, city oslo.", "metal iron, city oslo."),
    ("Metal: iron, the city is Oslo.", "metal iron, city oslo."),
    ("metal iron, oslo, age seventy", "metal iron."),
    ("I cannot say.", ""),
    ("", ""),
])  # fmt: skip
def test_what_a_model_writes_is_read_or_lost(text, read):
    assert eyes.in_form(text) == read


def test_each_kind_can_be_bought_from_a_model_and_lost_demonstrations_are_paid_for(pool):
    model = eyes.Model(TruthfulJudge(), seed=1)
    for kind in annotator.SECONDS:
        bought = annotator.buy(kind, 8, pool, model)
        simulated = annotator.buy(kind, 8, pool, PERFECT)
        assert bought.items == 8
        if kind != "demonstrations":
            assert bought.answers == simulated.answers and bought.sentences == simulated.sentences
    assert bought.answers == ["metal iron, city oslo."] * 8
    model.judge.write = lambda prompts: [[("?", True)] for _ in prompts]
    bought = annotator.buy("demonstrations", 8, pool, model)
    assert bought.items == 8 and bought.answers == []
    errors = annotator.misjudged(annotator.buy("ratings", 8, pool, model), model)
    assert (errors.error == 0).all() and (errors.clauses > 8).all()


def test_known_answers_stand_in_pairs_and_no_case_is_a_question_of_the_notebook():
    cases = eyes.known_answers(5)
    assert set(cases) == set(eyes.KINDS) and all(len(pairs) == 5 for pairs in cases.values())
    shown = {question.prompt for question in toy.draw_questions(16_000, 1)}  # the notebook's
    assert not shown & {question.prompt for question in toy.draw_questions(eyes.CASES, 2)}
    judge = TruthfulJudge()
    for pairs in cases.values():
        assert all(judge.holds(yes) and not judge.holds(no) for yes, no in pairs)


# --- what learns ---------------------------------------------------------------------------------


def test_words_are_mapped_onto_the_clause_they_speak_of():
    answers = ["metal tin. city oslo.", "metal iron, metal iron.", "metal iron."]
    said = ["metal is wrong", "metal is said twice", "city is missing"]
    marks = learners.spans_of_words(answers, said)
    assert [row.tolist() for row in marks["true"]] == [[-1, 1], [1, 1], [1]]
    assert [row.tolist() for row in marks["asked"]] == [[1, 1], [1, -1], [1]]
    assert [row.tolist() for row in marks["complete"]] == [[1], [1], [0]]


def test_dpo_loss_is_ln_2_at_the_start_and_as_by_hand():
    zero = torch.zeros(6)
    assert float(losses.dpo_loss(zero, zero, 0.1)) == pytest.approx(math.log(2))
    now, before = torch.tensor([-1.0, -4.0]), torch.tensor([-2.0, -3.0])
    # margin 0.5 (1 - (-1)) = 1
    assert float(losses.dpo_loss(now, before, 0.5)) == pytest.approx(math.log(1 + math.exp(-1)))


def test_dpo_makes_preferred_answers_likelier(ground):
    prompts, better, worse = PROMPTS[:8], ["metal iron."] * 8, ["city rome, age two."] * 8
    policy = ground.policy()
    history = learners.train_dpo(
        policy, ground.tokenizer, prompts, better, worse,
        beta=0.1, passes=5, learning_rate=1e-3, batch=4, seed=0,
    )  # fmt: skip
    assert history[0] == pytest.approx(math.log(2), abs=1e-5) and history[-1] < history[0] - 0.05


def test_reward_models_learn_what_they_are_told():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(300, 5, generator=generator)
    z = features[:, 0]
    values = (1 + 6 * torch.sigmoid(z)).round().numpy()
    scorer = learners.learn_from_ratings(features, values, 0.01)
    assert np.corrcoef(scorer.logits(features), z)[0, 1] > 0.95
    first, second = features.chunk(2)
    swap = (first[:, 0] < second[:, 0])[:, None]
    better, worse = torch.where(swap, second, first), torch.where(swap, first, second)
    scorer = learners.learn_from_pairs(better, worse, 0.1)
    assert np.corrcoef(scorer.logits(features), z)[0, 1] > 0.95
    assert (learners.indifferent(features).logits(features) == 0).all()


def test_whole_features_of_an_empty_answer_are_zeros_where_it_has_no_clause(ground):
    features = toy_models.segment_features(
        ground.first, ground.tokenizer, PROMPTS[:2], ["", "metal iron."]
    )
    whole = learners.whole_features(features)
    width = whole.shape[1] // 3
    assert whole.isfinite().all() and (whole[0, width:] == 0).all()


@pytest.mark.parametrize("name", arms.ARMS)
def test_every_arm_answers_every_question_within_its_compute(name, ground):
    result = ground.run(name, 12)
    assert len(result.answers) == len(ground.prompts.test)
    assert result.used.samples <= max(ground.settings.samples, 5 * result.bought.items)
    assert result.used.passes <= max(ground.settings.passes, 2 * len(result.bought.prompts))
    rows = ground.measure(result.answers)
    assert rows.log_ppl.notna().all() and (rows.tokens >= 1).all()


def test_best_takes_the_highest_of_each_question(ground):
    n = ground.settings.best_of
    scores = np.arange(len(ground.candidates))  # the last of each is highest
    assert ground.best(scores) == ground.candidates.texts[n - 1 :: n]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("FEEDBACK_RUN_DIR", str(tmp_path))
    return record.start_run("90_one_hour_of_feedback", scale="smoke", seed=0)


def test_pairs_are_decided_equal_or_open_and_drawn(run):
    table = Arms(run)
    rng = np.random.default_rng(0)
    levels = {"a": (0.2, 0.001), "b": (0.201, 0.001), "c": (0.8, 0.001), "d": (0.5, 0.5)}
    for seed in (11, 12, 13):
        for name, (level, spread) in levels.items():
            quality = level + spread * (rng.normal(size=40) / 10 + rng.normal())
            rows = pd.DataFrame({"prompt_index": range(40), "quality": quality})
            table.add(rows, arm=name, seed=seed)
    labels = {name: name for name in levels}
    differences, verdicts = figures.compare_pairs(table, labels, "quality", 0.05)
    assert verdicts.loc["a", "b"] == "equal" and verdicts.loc["a", "c"] == "decided"
    assert verdicts.loc["a", "d"] == "open"
    assert differences.loc["c", "a"] == pytest.approx(0.6, abs=0.02)
    words = {"name": "pairs", "title": "t", "caption": "c"}
    assert figures.save_pairs(table, labels, "quality", 0.05, **words)
    assert {name: metric["value"] for name, metric in run.metrics.items()} == {
        "pairs/decided": 2, "pairs/equal": 1, "pairs/open": 3,
    }  # fmt: skip
    (saved,) = run.figures
    assert saved["alt"] == "4 arms; pairs: open 3, decided 2, equal 1; highest: a, lowest: d."
    drawn = figures.pair_differences(differences, verdicts, title="t", label="quality")
    texts = {text.get_text() for text in drawn.axes[0].texts}
    assert any(text.startswith("=") for text in texts)
    points = pd.DataFrame(
        [{"kind": k, "learner": "PPO", "minutes": m, "value": 0.5, "low": 0.4, "high": 0.6}
         for k in ("ratings", "spans") for m in (60, 240)]
    )  # fmt: skip
    figure = figures.quality_by_minutes(points, {"nothing": 0.3}, title="t", ylabel="quality")
    assert [axes.get_title() for axes in figure.axes[:2]] == ["ratings", "spans"]


def arms_of(run, levels):
    """Arms of 3 seeds and 4 questions whose quality is the level."""
    table = Arms(run)
    for seed in (11, 12, 13):
        for arm, level in levels.items():
            rows = pd.DataFrame({"prompt_index": range(4), "quality": level})
            table.add(rows, arm=arm, seed=seed)
    return table


def test_quality_by_minutes_is_saved_with_its_metrics_and_says_the_ends(run):
    levels = {
        "ratings, PPO, 60 min": 0.3,
        "ratings, PPO, 240 min": 0.5,
        "spans, PPO, 240 min": 0.75,
    }
    table = arms_of(run, levels | {"first policy": 0.25})
    budgets = [(arm, m) for arm in ("ratings, PPO", "spans, PPO") for m in (60, 240)]
    words = {"name": "minutes", "title": "t", "caption": "c"}
    assert figures.save_quality_by_minutes(table, budgets, ["first policy"], **words)
    named = {f"quality/{name}": level for name, level in levels.items()}
    named["quality/first policy"] = 0.25
    assert {name: metric["value"] for name, metric in run.metrics.items()} == pytest.approx(named)
    (saved,) = run.figures
    ends = "from 0.50 (ratings, PPO) to 0.75 (spans, PPO)"
    assert saved["alt"] == f"At 240 minutes {ends}; first policy 0.25"


def test_arms_are_drawn_beside_those_of_other_eyes_where_there_are_any(run):
    first, second = "ratings, PPO", "spans, PPO"
    ours = arms_of(run, {arms.label_of(first, 60): 0.5, arms.label_of(second, 60): 0.25})
    theirs = arms_of(run, {arms.label_of(first, 60): 0.75})
    groups, words = [("a", ours), ("b", theirs)], {"name": "eyes", "title": "t", "caption": "c"}
    assert figures.save_by_eyes(run, groups, [], 60, **words) is None and not run.figures
    assert figures.save_by_eyes(run, groups, [first, second], 60, **words)
    (saved,) = run.figures
    assert saved["alt"] == f"2 arms; highest: a: {first}, 0.50; b: {first}, 0.75"


def test_texts_are_those_of_the_first_seed_that_has_the_arm():
    rows = [("a", 12, 0, "x"), ("a", 11, 0, "y"), ("a", 11, 1, "z"), ("b", 12, 1, "w")]
    texts = pd.DataFrame(rows, columns=["arm", "seed", "prompt_index", "text"])
    table = arms.first_texts(texts, ["p", "q"])
    assert table.loc["a"].to_dict() == {"p": "y", "q": "z"} and table.loc["b", "q"] == "w"
    assert arms.label_of("a", 0) == "a" and arms.label_of("a", 60.0) == "a, 60 min"
