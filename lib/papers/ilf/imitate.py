"""Learning from refinements (ILF, Scheurer et al. 2023): what a student imitates, and what it then writes.

    articles, texts (`study`) -> refinements, one of each article's chosen -> an arm's targets (`imitated`)
                              -> conversations, for `sft.train_sft` -> the student's summaries of new articles

Every arm has the same articles and the same question; only the targets differ.  Beside it: the weights of
ILF's objective, the likelihood of targets, and a reward model's pairs and choices.

Simplified: a target ends with the end token (the paper's ended at 48 tokens); loss falls on targets only
(the paper's prompt loss weight was between 0 and 0.1).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import special
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib import encoding, logprobs, models, reward_models, runtime, sft, tables
from lib.answers import without_reasoning
from lib.judge import LocalAnnotator
from lib.papers.ilf import refine, study
from lib.text import is_empty, words

CUE = "Improved TL;DR:"
BOTH = "feedback + refinement"
ARMS = {  # what a student imitates
    "initial": "its own first summary of the article",
    "refinement": "the refinement that InstructRM chose of five",
    "random": "one of the five at random",
    "shuffled": "the chosen refinement of another article",
    BOTH: "the feedback, then the chosen refinement",
    study.OWN: "the writer's first summary",
    "second try": "the writer's second try without feedback",
    "other feedback": "a refinement with another article's feedback",
}
REFINEMENT = ["id", "title", "post", "summary", "feedback", "candidate", "refinement", "empty"]


# --- what a student imitates ----------------------------------------------------------------------


def refinements(articles: pd.DataFrame, texts: pd.DataFrame) -> pd.DataFrame:
    """The refinements with feedback among the texts of the study, as choosers take them (`REFINEMENT`)."""
    return study.refinements(articles, texts)[REFINEMENT]


def full_plan(full: dict) -> pd.DataFrame:
    """What a run at the scale `full` asks: calls, tokens of each that are read, written, trained, and hours.

    Hours assume that one GPU reads 20,000, writes 2,500 and trains 6,000 tokens a second (assumed, not
    measured).
    """
    posts, tests = full["train_articles"], full["test"]
    asked = {  # calls or rows; tokens read, written and trained by each
        "feedback, refinements, own summaries": (posts * 7, 480, 60, 0),
        f"InstructRM, {full['questions']} questions": (posts * 5 * full["questions"], 620, 1, 0),
        "fine-tuning, 6 arms": (2 * sum(full["sizes"]) + 4 * posts, 0, 0, 500),
        "summaries of test articles": (tests * 10, 400, 60, 0),
        "judge: facts and sentences": (tests * 28 * 15, 200, 1, 0),
        "samples for best of n": (2 * tests * full["best_of"], 10, 60, 0),
    }
    plan = pd.DataFrame(asked, index=["calls", "read", "written", "trained"]).T
    tokens = plan.drop(columns="calls").mul(plan["calls"], axis=0)
    return plan.join((tokens / [20_000, 2500, 6000] / 3600).add_prefix("hours "))


def material(
    student: LocalAnnotator,
    writer: LocalAnnotator | refine.Writer,
    articles: pd.DataFrame,
    arms: Sequence[str] = (),
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The articles with summary and feedback (a person's, where there is one), and their texts, unjudged.

    Beside the first summaries, refinements and the writer's own summaries those that `arms` of `ARMS` need.
    """
    articles = study.prepare(student, writer, articles)
    articles = articles[articles["feedback"].fillna("") != ""].reset_index(drop=True)
    kinds = ["feedback", *(arm for arm in study.N if arm in arms and arm != "feedback"), study.OWN]
    return articles, study.texts(writer, articles, kinds)


def choose(
    annotator: LocalAnnotator, candidates: pd.DataFrame, asked: Sequence[refine.Question]
) -> pd.DataFrame:
    """The refinements with reward (InstructRM, from 0 to 1), and by_InstructRM: is it the chosen one."""
    rewards = study.instruct_rm(annotator, candidates, asked).mean(1)
    best = refine.choose(candidates, rewards)
    chosen = candidates.index.isin(best.index)
    return candidates.assign(reward=rewards, by_InstructRM=chosen)


def read_refinements(path: Path | str, articles: pd.DataFrame) -> pd.DataFrame:
    """Refinements of a CSV, such as notebook 30's handover.csv: `REFINEMENT` and `by_InstructRM`.

    The post comes from the file, where it has that column, else from the `articles` by id.  Without a column
    by_InstructRM (who chose) each article must have one refinement, which is then the chosen one.  Raises
    ValueError for what is missing.
    """
    path = Path(path).expanduser()
    rows = tables.read_csv(path).fillna({"refinement": ""})
    needed = {"id", "title", "summary", "feedback", "refinement"}
    if missing := needed - set(rows):
        raise ValueError(
            f"{path.name} has no column {', '.join(sorted(missing))}; it has {', '.join(rows)}."
        )
    rows["id"] = rows["id"].astype(str)
    if "post" not in rows:
        rows["post"] = rows["id"].map(articles.set_index("id")["post"])
        if unknown := sorted(set(rows.loc[rows["post"].isna(), "id"])):
            raise ValueError(
                f"{path.name}: no post for {len(unknown)} articles, such as {unknown[0]}. Add a column post, "
                "or choose as DATA what they are from."
            )
    rows["candidate"] = rows.groupby("id", sort=False).cumcount()
    if "by_InstructRM" not in rows:
        if rows["candidate"].any():
            raise ValueError(
                f"{path.name}: several refinements an article, and no column by_InstructRM that is true for "
                "the chosen one."
            )
        rows["by_InstructRM"] = True
    return rows.assign(empty=rows["refinement"] == "")[[*REFINEMENT, "by_InstructRM"]]


def imitated(
    candidates: pd.DataFrame, chosen: Sequence[bool], texts: pd.DataFrame | None = None, *, seed: int = 0
) -> pd.DataFrame:  # fmt: skip
    """A row an article: id, title, post, summary, feedback, and a column for each of `ARMS` with its target.

    candidates: `refinements`, of which `chosen` says which are the chosen ones; texts: of the study, for the
    arms that need no choice ("" without them).  The seed draws the random one, and deals the chosen ones out.
    """
    rng = np.random.default_rng(seed)
    best = candidates[np.asarray(chosen, bool)].drop_duplicates("id").set_index("id")["refinement"]
    filled = candidates[~candidates["empty"]]
    drawn = filled.iloc[rng.permutation(len(filled))].drop_duplicates("id")
    table = candidates.drop_duplicates("id")[REFINEMENT[:5]].reset_index(drop=True)
    table["initial"] = table["summary"]
    table["refinement"] = table["id"].map(best)
    table["random"] = table["id"].map(drawn.set_index("id")["refinement"])
    away = int(rng.integers(1, len(table))) if len(table) > 1 else 0  # nobody keeps the own one
    table["shuffled"] = np.roll(table["refinement"], away)
    table[BOTH] = table["refinement"]
    for arm in (study.OWN, "second try", "other feedback"):
        mine = pd.DataFrame(columns=["id", "text"]) if texts is None else texts[texts["arm"] == arm]
        table[arm] = table["id"].map(mine.drop_duplicates("id").set_index("id")["text"])
    return table.astype(object).fillna("")


def folder_name(arm: str) -> str:
    """An arm as the name of a folder."""
    return re.sub(r"\W+", "_", arm)


def label_sizes(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows whose arm names the number of articles, too, where it is not the largest (0: not trained)."""
    small = ~rows["size"].isin([0, rows["size"].max()])
    return rows.assign(arm=rows["arm"] + np.where(small, ", " + rows["size"].astype(str), ""))


def questions(articles: pd.DataFrame) -> list[str]:
    """What a student is asked for a summary, the same before training, in it, and after it."""
    return [refine.summary_prompt(a.title, a.post) + study.LENGTH for a in articles.itertuples()]


def critique_prompt(title: str, post: str, summary: str) -> str:
    """The prompt after which a student writes feedback on its own summary, and then the refinement."""
    return (
        "A summary of a text is given. Write feedback on it, and then a better summary."
        f"\n\nTitle: {title}\n\nText: {post}\n\nSummary: {summary}\n\nFeedback on summary:"
    )


def _asked(articles: pd.DataFrame, arm: str) -> list[str]:
    if arm != BOTH:
        return questions(articles)
    return [critique_prompt(a.title, a.post, a.summary) for a in articles.itertuples()]


def conversations(table: pd.DataFrame, arm: str) -> list[list[dict]]:
    """Question and target of each article of `imitated`, for `sft.encode_conversations`.

    Empty targets are left out.  Raises ValueError for an unknown arm.
    """
    if arm not in ARMS:
        raise ValueError(f"arm is {arm!r}; allowed: {', '.join(ARMS)}.")
    targets = table[arm]
    if arm == BOTH:
        targets = table["feedback"] + f"\n\n{CUE} " + table[arm]
    return [
        [{"role": "user", "content": question}, {"role": "assistant", "content": target}]
        for question, target, text in zip(_asked(table, arm), targets, table[arm], strict=True)
        if not is_empty(text)
    ]


def encoded(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, table: pd.DataFrame, arm: str
) -> list[dict]:
    """Token ids and labels of an arm's targets in the student's chat form: loss on the target and its end."""
    return sft.encode_conversations(tokenizer, conversations(table, arm), model=model)


def fine_tune(
    name: str, tokenizer: PreTrainedTokenizerBase, rows: list[dict], settings: dict, *, seed: int = 0
) -> tuple[PreTrainedModel, pd.DataFrame]:  # fmt: skip
    """A fresh student, fine-tuned on encoded rows, and the history of its loss.

    settings: train and train_layers (`models.set_trainable`), learning_rate, epochs, batch, max_length.
    Raises ValueError where a target is longer than max_length.
    """
    longest = max(len(row["input_ids"]) for row in rows)
    if longest > settings["max_length"]:
        raise ValueError(
            f"the longest target ends after {longest} tokens, and max_length is {settings['max_length']}: it "
            "would lose its end. Raise max_length, or leave the article out."
        )
    model, _ = models.load_policy(name)
    models.set_trainable(model, settings["train"], layers=settings["train_layers"])
    history = sft.train_sft(
        model,
        tokenizer,
        rows,
        save_strategy="no",
        learning_rate=settings["learning_rate"],
        num_train_epochs=settings["epochs"],
        per_device_train_batch_size=settings["batch"],
        max_length=settings["max_length"],
        seed=seed,
    )
    return model.to(runtime.inference_dtype()), history


# --- what a student writes ------------------------------------------------------------------------


def written_refinement(
    text: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> tuple[str, bool]:
    """The refinement in what was written after `critique_prompt`, tidied and cut; whether the cue was there.

    Without the cue the whole text counts as the refinement, as in the paper.
    """
    text = without_reasoning(text)
    _, cue, after = text.partition(CUE)
    ids = encoding.bare_ids(tokenizer, refine.tidy(after if cue else text))
    shortened = tokenizer.decode(ids[:max_tokens], skip_special_tokens=True)
    return refine.tidy(shortened), bool(cue)


def write_summaries(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, articles: pd.DataFrame, arm: str = "", *,
    n: int = 1, seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """n summaries of each article by a student, sampled as the first ones were: id, candidate, text.

    One that learned feedback + refinement is shown the first summary, and its feedback is left out.
    """
    most = study.TOKENS["summary"]
    tokens = most + study.TOKENS["feedback"] if arm == BOTH else most
    write = refine.LocalWriter(model, tokenizer, tokens, temperature=0.7, style="auto")
    rows = []
    for key, drafts in zip(articles["id"], write(_asked(articles, arm), n, seed), strict=True):
        for k, draft in enumerate(drafts):
            text = refine.tidy(draft.text)
            if arm == BOTH:
                text, _ = written_refinement(draft.text, tokenizer, most)
            rows.append({"id": key, "candidate": k, "text": text})
    return pd.DataFrame(rows)


def likelihood(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict]
) -> pd.DataFrame:
    """nll (mean over the tokens with loss, nats), tokens, perplexity of encoded rows, a row each."""
    contexts, targets = zip(*map(context_and_target, rows), strict=True)
    return logprobs.perplexity(model, tokenizer, contexts, targets)


def context_and_target(row: dict) -> tuple[list[int], list[int]]:
    """An encoded row's tokens before its target, and those of its target, which carry loss.

    What a chat template writes after the target's end is neither.
    """
    places = [i for i, label in enumerate(row["labels"]) if label != sft.NO_LOSS]
    return row["input_ids"][: places[0]], row["input_ids"][places[0] : places[-1] + 1]


def target_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    table: pd.DataFrame,
    kinds: Sequence[str],
) -> pd.DataFrame:
    """`likelihood` of the targets of some arms: with id, and target (the arm)."""
    parts = []
    for kind in kinds:
        some = table[~table[kind].map(is_empty)].reset_index(drop=True)
        if len(some):
            rows = likelihood(model, tokenizer, encoded(model, tokenizer, some, kind))
            parts.append(rows.assign(id=some["id"], target=kind))
    return pd.concat(parts, ignore_index=True)


def measure(
    model: PreTrainedModel, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arm: str,
    test: pd.DataFrame, held_out: pd.DataFrame, settings: dict, *, distance: bool, seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """What a trained student writes, finds likely, and how far it moved: three tables in one (`table`).

    texts: its summaries of the test articles (`samples` each); likelihood: of held-out initial and refined
    summaries (not for feedback + refinement, which answers another question); kl: `kl_texts` texts, where
    `distance`.
    """
    n = settings["samples"]
    parts = {"texts": write_summaries(model, tokenizer, test, arm, n=n, seed=seed)}
    if arm != BOTH:
        kinds = ("initial", "refinement")
        parts["likelihood"] = target_likelihoods(model, tokenizer, held_out, kinds)
    if distance:
        draws = {"n": settings["kl_texts"], "max_new_tokens": 64, "seed": seed}
        parts["kl"] = logprobs.sequence_kl(model, base, tokenizer, **draws)
    return pd.concat(parts, names=["table"]).reset_index("table")


def judged(
    annotator: LocalAnnotator, articles: pd.DataFrame, table: pd.DataFrame, threshold: float
) -> pd.DataFrame:
    """`study.judge` of the texts that have their answers; the others are counted, printed and left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # counted instead
        rows = study.judge(annotator, articles, table, threshold)
    answered = rows[rows["complete"].notna()].reset_index(drop=True)
    if missing := len(rows) - len(answered):
        print(
            f"{missing} of {len(rows)} texts are not judged, because {annotator.name} is not here: "
            f"python -m lib fetch {annotator.name}"
        )
    return answered


# --- ILF as inference ----------------------------------------------------------------------------


def target_weights(
    rewards: np.ndarray, beta: float, log_policy: np.ndarray | float = 0.0,
    log_proposal: np.ndarray | float = 0.0,
) -> np.ndarray:  # fmt: skip
    """Self-normalised weight of each of an article's refinements in ILF's objective, (articles, n).

    The target is p(x) ~ policy(x) exp(R(x) / beta); the refinements come from a proposal, so
    w_i ~ policy(x_i) exp(R_i / beta) / proposal(x_i).  Without the two log-probabilities of the texts
    (the policy then counts as the proposal) it is a softmax of R / beta; beta -> 0 gives the argmax,
    which is what ILF trains on.  Raises ValueError unless beta > 0.
    """
    if beta <= 0:
        raise ValueError(
            f"beta is {beta!r}; it must be > 0 (its limit 0 is the argmax of rewards)."
        )
    return special.softmax(np.asarray(rewards) / beta + log_policy - log_proposal, axis=-1)


def effective_number(weights: np.ndarray) -> np.ndarray:
    """How many refinements carry an article's weight: 1 / sum of squares, from 1 to n, (articles,)."""
    return 1 / (np.asarray(weights) ** 2).sum(-1)


# --- reward models and best of n -----------------------------------------------------------------


def refinement_pairs(candidates: pd.DataFrame) -> pd.DataFrame:
    """Every refinement against the summary that it refines, and preferred: a rankings table, and id.

    Repeated and empty refinements, and those that change nothing, are left out.
    """
    rows = candidates[~candidates["empty"] & (candidates["refinement"] != candidates["summary"])]
    rows = rows.drop_duplicates(["id", "refinement"])
    return pd.DataFrame(
        {
            "id": rows["id"], "instruction": questions(rows), "input": "",
            "response1": rows["refinement"], "response2": rows["summary"], "verdict": "(a)",
        }
    ).reset_index(drop=True)  # fmt: skip


def people_pairs(articles: pd.DataFrame) -> pd.DataFrame:
    """SLF5K's comparisons of two summaries by people: a rankings table, and id; empty for other articles."""
    columns = ["id", "instruction", "input", "response1", "response2", "verdict"]
    if "comparison_preference" not in articles:
        return pd.DataFrame(columns=columns)
    rows = articles.dropna(subset=["comparison_preference"])
    sides = [rows[f"generated_summary_for_comparison_{letter}"] for letter in "AB"]
    verdicts = rows["comparison_preference"].map({"Summary A": "(a)", "Summary B": "(b)"})
    values = [rows["id"], questions(rows), "", *sides, verdicts]
    return pd.DataFrame(dict(zip(columns, values, strict=True))).reset_index(drop=True)


def bare(prompt: str, _: str) -> str:
    """The template of a reward model that reads the question as it is."""
    return prompt


def fit_reward_model(
    encoder: str, pairs: pd.DataFrame, *, shuffle: bool = False, seed: int = 0
) -> reward_models.RewardModel:
    """A reward model on a rankings table: a linear head on a frozen encoder, Bradley-Terry loss.

    shuffle: the control, whose pairs are turned round by a coin.
    """
    backbone, tokenizer = reward_models.load_backbone(encoder)
    backbone.requires_grad_(False)
    feedback = reward_models.from_rankings(pairs, template=bare)
    if shuffle:
        feedback = reward_models.shuffled(feedback, seed)
    model = reward_models.RewardModel(backbone, tokenizer)
    features = model.features(feedback.prompts, feedback.responses)
    config = replace(reward_models.TrainConfig(), seed=seed)
    reward_models.train(model, feedback, config, features=features)
    return model.eval()


Scores = Callable[[Sequence[str], Sequence[str]], np.ndarray]


def count_words(_: Sequence[str], texts: Sequence[str]) -> np.ndarray:
    """The rival that a reward model must beat: longer is better."""
    return np.array([len(words(text)) for text in texts], float)


def pairs_right(score: Scores, pairs: pd.DataFrame) -> pd.DataFrame:
    """id and right of each pair: 1 where the preferred text scores higher, 0.5 for the same score, else 0."""
    prompts = pairs["instruction"].tolist()
    first, second = (score(prompts, pairs[f"response{k}"].tolist()) for k in (1, 2))
    return margins_right(np.asarray(first) - np.asarray(second), pairs)


def margins_right(margins: np.ndarray, pairs: pd.DataFrame) -> pd.DataFrame:
    """id and right of each pair, by how much its first text is the better one: `pairs_right`."""
    sign = np.where(pairs["verdict"] == "(a)", 1, -1)
    return pd.DataFrame({"id": pairs["id"], "right": (1 + sign * np.sign(margins)) / 2})


def picks(pool: pd.DataFrame, articles: pd.DataFrame, score: Scores) -> pd.DataFrame:
    """What is taken of each article's pool (id, candidate, text): a row each, with `pick`.

    "first": without a choice; "best": the highest score; "longest": the most words.  Ties: the earlier one.
    """
    asked = dict(zip(articles["id"], questions(articles), strict=True))
    prompts, texts = pool["id"].map(asked).tolist(), pool["text"].tolist()
    ranked = pool.assign(
        best=np.asarray(score(prompts, texts), float), longest=count_words(prompts, texts)
    )
    parts = [ranked[ranked["candidate"] == 0].assign(pick="first")]
    for pick in ("best", "longest"):
        parts.append(ranked.loc[ranked.groupby("id", sort=False)[pick].idxmax()].assign(pick=pick))
    return pd.concat(parts, ignore_index=True)[["id", "candidate", "text", "pick"]]
