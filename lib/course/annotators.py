"""What `python -m lib replies` makes: the items' responses, the gate's tables, the local annotators' replies.

Every job is resumable: what was sampled or answered is on disk after each batch.  The same machine and
versions give the same files, whether a job was killed or not.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from lib import preferences, runtime, tables
from lib.annotator import SimulatedAnnotator
from lib.course import fetch, gate, items
from lib.judge import LocalAnnotator
from lib.papers.alt import real
from lib.papers.ilf import imitate, study
from lib.papers.sparse_feedback import analysis, choices, noise, protocols

MODELS = ("qwen-0.5b", "qwen-1.5b")
# of the ten pairs that five responses make, compared for each prompt
PAIRS = {"policy": 4, "qwen-0.5b": 10, "qwen-1.5b": 4}
TEACHER = "qwen-1.5b"  # whose annotations teach notebook 22's reward models
REMOVAL_PROMPTS = 40  # sentences a setting of the word-removal test
ANNOTATED = ("train", "test", "tuning")  # parts; the pool is rated by whoever chooses from it


def folder() -> Path:
    """Where the annotators' results are."""
    return runtime.project_root() / "data" / "results" / "annotators"


def sample_items(model: str) -> list[Path]:
    """The items' prompts and, from every generator, responses (`model` is not asked)."""
    return [items.write_prompts(), items.generate()]


def run_gate(model: str) -> list[Path]:
    """The gate of a model: gate-test-<model>.csv, gate-tuning-<model>.csv, and its replies."""
    annotator = LocalAnnotator(model, ask=True)
    passed, tried = gate.run(annotator)
    return [
        tables.write_csv(passed.round(4), folder() / f"gate-test-{annotator.file}.csv"),
        tables.write_csv(tried.round(4), folder() / f"gate-tuning-{annotator.file}.csv"),
        tables.write_packed(
            gate.build_cases().to_dict("records"), folder() / "gate-cases.jsonl.gz"
        ),
        annotator.export("gate"),
    ]


def annotate(model: str) -> list[Path]:
    """A model's ratings and rankings of the items' responses, as replies (`protocols.rate`, `rank`)."""
    annotator = LocalAnnotator(model, ask=True)
    protocols.rate(annotator, ratings_table())
    protocols.rank(annotator, rankings_table(PAIRS.get(model, 10)))
    return [annotator.export("annotations")]


def annotate_again(model: str) -> list[Path]:
    """The same ratings and rankings asked in the prompts' second wording: what luck of the words changes."""
    annotator = LocalAnnotator(model, ask=True)
    protocols.rate(annotator, ratings_table(), wording=1)
    protocols.rank(annotator, rankings_table(PAIRS.get(model, 10)), wording=1)
    return [annotator.export("paraphrases")]


def judge_items(model: str) -> list[Path]:
    """Ratings and rankings of the items, asked as the gate found to work best, in both wordings."""
    annotator = LocalAnnotator(model, ask=True)
    for wording, part in itertools.product((0, 1), ANNOTATED):
        pairs = rankings_table(PAIRS.get(model, 10), part)
        protocols.judge_ratings(annotator, ratings_table(part), wording=wording)
        protocols.judge_rankings(annotator, pairs, wording=wording)
    return [annotator.export("judgements")]


def annotate_released(model: str) -> list[Path]:
    """A model's ratings and rankings of what GPT-3.5 judged in the authors' released sample, where that is
    at hand (`python -m lib fetch sparse_feedback`)."""
    feedback = released_feedback()
    if feedback is None:
        return []
    annotator = LocalAnnotator(model, ask=True)
    protocols.rate(annotator, feedback[0])
    protocols.rank(annotator, feedback[1])
    return [annotator.export("released")]


def judge_choices(model: str) -> list[Path]:
    """A model's judgements of what notebook 22's reward models choose from the pool, all that it reads.

    The reward models learn from `TEACHER`'s stored judgements; what they choose is computed once.  Only the
    teacher compares: the smaller model's comparisons do not pass the gate.
    """
    written = []
    if choices.read_choices() is None:
        written.append(choose_from_pool())
    annotator = LocalAnnotator(model, ask=True)
    picks, pool = choices.read_choices(), choices.course_pool()
    choices.judge(annotator, picks, pool, compare=model == TEACHER)
    return [*written, annotator.export("choices")]


def choose_from_pool() -> Path:
    """Write what the reward models of every seed choose (`choices.choose`); return the file's path."""
    table = choices.choose(
        choices.load_learner(**choices.BACKBONE, **choices.HEAD),
        *taught(*choices.TAUGHT),
        choices.course_pool(),
    )
    return tables.write_csv(table, choices.path())


def taught(
    *parts: str, model: str = "", n: int | None = None, ask: bool | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A model's ratings and rankings, asked as the gate found to work best, of the items' first n prompts of
    some parts, or of all.

    model: default `TEACHER`.  Raises ValueError where replies are missing.
    """
    model = model or TEACHER
    annotator = LocalAnnotator(model, ask=ask)
    pairs = rankings_table(PAIRS.get(model, 10), *parts)
    ids = pairs["id"].unique()[:n]
    rows = (table[table["id"].isin(ids)] for table in (ratings_table(*parts), pairs))
    ratings = protocols.judge_ratings(annotator, next(rows))
    rankings = protocols.judge_rankings(annotator, next(rows))
    if missing := int(ratings["score"].isna().sum() + rankings["p_first"].isna().sum()):
        raise ValueError(
            f"{missing} of {len(ratings) + len(rankings)} judgements of {model} are missing. Try: "
            f"python -m lib replies judgements --model {model}"
        )
    return ratings, rankings


def refine_with_feedback(_: str) -> list[Path]:
    """The texts of notebooks 30 and 31 and the judge's answers on them; who chooses among the refinements of
    the test and train parts (the latter without the controls, which no student imitates); word removal."""
    roles = (study.STUDENT, study.WRITER, study.JUDGE)
    student, writer, judge = [LocalAnnotator(name, ask=True) for name in roles]
    threshold, _ = study.fit_threshold(judge, study_articles("tuning"))
    for annotator in (student, judge, writer):
        study.word_removal(annotator, REMOVAL_PROMPTS)
    for part in ("tuning", "test"):
        articles, texts = study_tables(study_articles(part), student, writer, judge, threshold)
        if part == "test":
            study.instruct_rm(writer, study.candidates(articles, texts))
    articles, texts = imitate.material(student, writer, study_articles("train"))
    study.instruct_rm(writer, imitate.refinements(articles, texts), study.CHOOSING)
    study.judge(judge, articles, texts, threshold)
    return [annotator.export("refinements") for annotator in (student, writer, judge)]


def study_articles(part: str, n: int | None = None) -> pd.DataFrame:
    """Articles of a part of the study; those of the items and of the gate are not among them."""
    known = [items.read_prompts(), *(read_cases(name) for name in gate.CASES)]
    return study.select_articles(part, n, taken=pd.concat(known)["title"].tolist())


def study_tables(
    articles: pd.DataFrame, student, writer, judge: LocalAnnotator, threshold: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The articles with summary and feedback (a person's, where they have it), and every text, judged.

    student, writer: local annotators, or writers such as `refine.ApiWriter`.  threshold: the judge's, of
    `study.fit_threshold` on tuning articles.
    """
    articles = study.prepare(student, writer, articles)
    return articles, study.judge(judge, articles, study.texts(writer, articles), threshold)


JOBS: dict[str, Callable[[str], list[Path]]] = {
    "items": sample_items,
    "gate": run_gate,
    "annotations": annotate,
    "paraphrases": annotate_again,
    "judgements": judge_items,
    "released": annotate_released,
    "choices": judge_choices,
    "refinements": refine_with_feedback,
    "critiques": real.make_critiques,
}
ONCE = ("items", "refinements", "critiques")  # jobs whose models are fixed


def run(jobs: list[str], chosen: list[str]) -> list[Path]:
    """Run jobs (all where none is named) for models (both); return the files that were written.

    Raises ValueError for an unknown job.
    """
    if unknown := set(jobs) - set(JOBS):
        raise ValueError(f"job {min(unknown)!r}; allowed: {', '.join(JOBS)}.")
    written = []
    for job in jobs or JOBS:
        for model in [""] if job in ONCE else chosen or MODELS:
            paths = JOBS[job](model)
            written += paths
            for path in paths:
                print(f"{path.relative_to(runtime.project_root())}", flush=True)
        if job == "gate":
            print(gate_markdown())
    return written


def read_gate(part: str = "test") -> pd.DataFrame:
    """The gate's stored table, every model's rows: part "test", or "tuning" for every way of asking."""
    if part not in gate.CASES:
        raise ValueError(f"part is {part!r}; allowed: {', '.join(gate.CASES)}.")
    stored = [tables.read_csv(path) for path in sorted(folder().glob(f"gate-{part}-*.csv"))]
    return pd.concat(stored, ignore_index=True) if stored else pd.DataFrame()


def read_cases(part: str = "test") -> pd.DataFrame:
    """The gate's cases as they were asked (`gate.build_cases`), of one part.

    Raises FileNotFoundError where no gate was run yet.
    """
    table = pd.DataFrame(tables.read_packed(folder() / "gate-cases.jsonl.gz"))
    return table[table["part"] == part].reset_index(drop=True)


def gate_markdown() -> str:
    """The gate's stored test table as Markdown, for docs/annotators.md."""

    def shown(row: dict, name: str) -> str:
        if pd.isna(row.get(name)):
            return ""
        percent = [100 * row[part] for part in (name, f"{name}_low", f"{name}_high")]
        return "{:.0f} [{:.0f}, {:.0f}]".format(*percent)

    names = {"accuracy": "accuracy, %", "gain": "over the longer, points"}
    names |= {"first_share": "first place, %", "consistency": "orders agree, %"}
    names |= {"threshold_accuracy": "with a fitted threshold, %"}
    heads = ["annotator", "question", "asked", "n", *names.values()]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in read_gate().to_dict("records"):
        cells = [row["model"], row["kind"], row["asked"], str(row["n"])]
        lines.append("| " + " | ".join([*cells, *(shown(row, name) for name in names)]) + " |")
    return "\n".join(lines)


def released_feedback() -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """GPT-3.5's ratings and rankings of the authors' sample, the first of each; None where it is not here."""
    folder = fetch.released("sparse_feedback", "sample_generation.json", needed=False)
    if folder is None:
        return None
    path = "feedback_{}_sample_generation.csv"
    ratings = preferences.read_ratings(folder / path.format("ratings"))
    rankings = preferences.read_rankings(folder / path.format("rankings"))
    return preferences.first_of_each(ratings), preferences.first_of_each(rankings)


def ratings_table(*parts: str) -> pd.DataFrame:
    """The items' responses as `protocols.rate` takes them: instruction, input, response, and names."""
    names = ["id", "part", "generator", "sample", "instruction", "input", "response"]
    return items.read_responses(*(parts or ANNOTATED))[names]


def rankings_table(pairs: int, *parts: str) -> pd.DataFrame:
    """`pairs` pairs of responses a prompt as `protocols.rank` takes them, which of them by hash.

    Columns id, part, place1, place2 (among the prompt's responses), instruction, input, response1, response2.
    """
    rows = []
    for key, group in ratings_table(*parts).groupby("id", sort=False):
        first, texts = group.iloc[0], group["response"].tolist()
        every = list(itertools.combinations(range(len(texts)), 2))
        every.sort(key=lambda pair: runtime.content_hash("pair", key, pair))
        for a, b in every[:pairs]:
            a, b = (a, b) if int(runtime.content_hash("order", key, a, b), 16) % 2 else (b, a)
            facts = {"id": key, "part": first["part"], "place1": a, "place2": b}
            facts |= {"instruction": first["instruction"], "input": first["input"]}
            rows.append(facts | {"response1": texts[a], "response2": texts[b]})
    return pd.DataFrame(rows)


# --- what a judge is like ------------------------------------------------------------------------


def habits(model: str) -> dict[str, float]:
    """What can be counted of a model's stored replies to the items; {} where they are not stored.

    Ties: pairs with the same likeliest digit, and rankings whose orders contradict each other.  First place:
    share of calls that took it.  Rubric: rank correlation of expected ratings, within prompts, with the
    simulated annotator's.  Again: agreement with itself in the second wording.  GPT-3.5, on its released
    sample where that is here: rank correlation with its ratings, share of its decided pairs preferred alike.
    """
    judge = LocalAnnotator(model, ask=False)
    pairs = rankings_table(PAIRS.get(model, 10))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is missing shows as NaN
        rated = protocols.rate(judge, ratings_table())
        ranked = protocols.rank(judge, pairs)
        again = protocols.rate(judge, ratings_table(), wording=1)
        again = again, protocols.rank(judge, pairs, wording=1)
        gpt = _beside_gpt(judge)
    if rated["score"].isna().any() or ranked["p_first"].isna().any():
        return {}
    digits = analysis.pair_verdicts(rated.assign(score=rated["likeliest"]), ranked)
    calls = pd.concat([ranked["first"], ranked["swapped"]])
    rubric = SimulatedAnnotator().quality(rated["input"], rated["response"])
    prompts = rated["instruction"] + rated["input"]
    row = {"ties, ratings": float((digits["derived"] == "equal").mean())}
    row["ties, rankings"] = float((ranked["verdict"] == "equal").mean())
    row["first place"] = float((calls == "(a)").mean())
    row["rubric"] = analysis.rank_correlation(rated["score"], rubric, prompts).value
    twice = noise.asked_twice((rated, again[0]), (ranked, again[1]))
    if len(twice):
        values = noise.agreements_of(*twice[noise.PREFERENCES].to_numpy().T)
        row |= {f"again: {name}": values[name] for name in noise.WITHIN}
    return row | gpt


def _beside_gpt(judge: LocalAnnotator) -> dict[str, float]:
    feedback = released_feedback()
    if feedback is None:
        return {}
    ratings, rankings = feedback
    prompts = ratings["instruction"] + ratings["input"]
    scores = protocols.rate(judge, ratings)["score"]
    decided = preferences.decided(rankings)
    p_first = protocols.rank(judge, decided)["p_first"]
    if scores.isna().any() or p_first.isna().any():
        return {}
    alike = (p_first > 0.5).to_numpy() == (decided["verdict"] == "(a)").to_numpy()
    correlation = analysis.rank_correlation(scores, ratings["score"], prompts)
    return {"GPT-3.5: ratings": correlation.value, "GPT-3.5: pairs": float(alike.mean())}
