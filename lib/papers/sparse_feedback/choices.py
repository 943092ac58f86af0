"""Which protocol's reward model makes the better policy?  They choose from a pool, and both protocols judge.

One annotator has rated and ranked the same responses.  A seed draws prompts with replacement, and on these
three reward models are trained: on the ratings, on the rankings, and on the control, which are the rankings
that the ratings imply, as many of them turned round, by chance, as the real rankings contradict.  So the
control has the rankings' loss, pairs and share of contradictions; what it lacks is whatever the rankings want
*in particular*.  Each model chooses the best of n of a prompt's pool; the annotator rates the chosen
responses, and ranks them against a reference: the response that stands first in a random order of the pool.

Simplified: both protocols are asked as the gate found to work best (`protocols.judge_ratings`, plainly, and
`judge_rankings`, by single criteria in both orders), not by the paper's prompts; no ranking is "equal".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.special import logit

from lib import data, generation, preferences, reward_models, runtime, tables
from lib.answers import without_reasoning
from lib.course import items
from lib.papers.sparse_feedback import analysis, protocols
from lib.papers.sparse_feedback.conversions import read_generations, to_rankings_table
from lib.stats import Interval

if TYPE_CHECKING:
    from lib.annotator import SimulatedAnnotator
    from lib.judge import LocalAnnotator

ARMS = ("ratings", "rankings", "control")
SEEDS = (11, 12, 13, 14, 15, 16)  # none of them was looked at while backbone and head were chosen
SIZES = (4, 16, 64)  # responses among which the best is chosen; of one, it is the reference
CURVE_SEEDS = (11,)  # those whose arms, but the control, choose among fewer than all, too
SMALLEST = (
    0.35  # the interaction that matters, in deviations of one response: ten points of win rate
)
TAUGHT = ("train",)  # parts whose feedback teaches; the test part and the pool are new
BACKBONE = {"name": "encoder", "keep_layers": 3}
HEAD = {"learning_rate": 1e-3, "weight_decay": 10.0, "epochs": 20}


# --- feedback ------------------------------------------------------------------------------------


def prompts_of(table: pd.DataFrame) -> np.ndarray:
    """Number of each row's prompt, in order of appearance."""
    return pd.factorize(table["instruction"] + "\x1f" + table["input"])[0]


def implied(ratings: pd.DataFrame, rankings: pd.DataFrame) -> pd.Series:
    """The verdict that the ratings imply for each ranked pair; None where a rating is missing."""
    scores = {
        key: score
        for *key, score in ratings[preferences.RATING].itertuples(index=False)
        for key in [tuple(key)]
    }
    verdicts = []
    for row in rankings.itertuples():
        sides = [(row.instruction, row.input, text) for text in (row.response1, row.response2)]
        first, second = (scores.get(side, np.nan) for side in sides)
        known = not (pd.isna(first) or pd.isna(second))
        verdicts.append(("equal", "(a)", "(b)")[int(np.sign(first - second))] if known else None)
    return pd.Series(verdicts, index=rankings.index, dtype=object)


def contradicted(ratings: pd.DataFrame, rankings: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The control: the ratings' own verdicts on the ranked pairs, with the rankings' share of contradictions.

    Which pairs are turned round is chance.  Pairs that either side leaves undecided are left out.
    """
    table = rankings.assign(implied=implied(ratings, rankings))
    table = table[table[["implied", "verdict"]].isin(["(a)", "(b)"]).all(axis=1)]
    turned = np.random.default_rng(seed).permutation(table["implied"] != table["verdict"])
    other = table["implied"].map({"(a)": "(b)", "(b)": "(a)"})
    return table.assign(verdict=other.where(turned, table["implied"])).drop(columns="implied")


def teach(ratings: pd.DataFrame, rankings: pd.DataFrame, seed: int) -> dict[str, pd.DataFrame]:
    """What each arm of a seed learns from: a ratings table, and two rankings tables of the same pairs."""
    return {
        "ratings": ratings,
        "rankings": rankings,
        "control": contradicted(ratings, rankings, seed),
    }


def resampled(feedback: reward_models.Feedback, seed: int) -> reward_models.Feedback:
    """The feedback on as many prompts, drawn with replacement: what another set of prompts might have taught.

    The same prompts are drawn for every arm of a seed.  A prompt that is drawn twice counts twice.
    """
    prompts = sorted(set(feedback.prompts))
    rows_of = {p: [] for p in prompts}
    for row, prompt in enumerate(feedback.prompts):
        rows_of[prompt].append(row)
    rows, group, pairs = [], [], []
    for number, k in enumerate(
        np.random.default_rng(seed).integers(len(prompts), size=len(prompts))
    ):
        own = np.array(rows_of[prompts[k]])
        if feedback.pairs is not None:
            mine = feedback.pairs[np.isin(feedback.pairs[:, 0], own)]
            pairs.append(np.searchsorted(own, mine) + len(rows))
        rows += own.tolist()
        group += [number] * len(own)
    return reward_models.Feedback(
        [feedback.prompts[row] for row in rows],
        [feedback.responses[row] for row in rows],
        np.array(group),
        None if feedback.targets is None else feedback.targets[rows],
        np.concatenate(pairs) if pairs else None,
    )


# --- reward models -------------------------------------------------------------------------------


def prompt_of(instruction: str, input: str) -> str:
    """What a reward model reads before the response: the passage, or the instruction where there is none."""
    return input or instruction


class Learner:
    """One backbone, many trainings, each from the same start.

    Where the backbone is frozen its features are computed once, and a training of the head takes a second.
    """

    def __init__(self, reward: reward_models.RewardModel, **config):
        self.reward, self.config = reward, config
        self.start = reward.trained_state()
        frozen = not any(p.requires_grad for p in reward.backbone.parameters())
        self.store = reward_models.FeatureStore(reward) if frozen else None

    def fit(
        self,
        table: pd.DataFrame,
        seed: int,
        *,
        resample: bool = False,
        shuffled: bool = False,
        folder: Path | None = None,
    ) -> tuple[dict, pd.DataFrame]:
        """The weights that a ratings or a rankings table teaches, and the history of the training.

        resample: on prompts drawn with replacement by the seed.  shuffled: on labels dealt out at random.
        """
        read = reward_models.from_ratings if "score" in table else reward_models.from_rankings
        rows = read(table, prompt_of)
        rows = resampled(rows, seed) if resample else rows
        rows = reward_models.shuffled(rows, seed) if shuffled else rows
        self.reward.load_state_dict(self.start, strict=False)
        features = self.store(rows.prompts, rows.responses) if self.store else None
        config = reward_models.TrainConfig(**self.config, seed=seed)
        history = reward_models.train(self.reward, rows, config, features=features, folder=folder)
        return self.reward.trained_state(), history

    def score(self, weights: dict, table: pd.DataFrame, column: str = "response") -> np.ndarray:
        """(rows,) the logits of a table's responses under some weights."""
        self.reward.load_state_dict(weights, strict=False)
        prompts = list(map(prompt_of, table["instruction"], table["input"]))
        texts = list(table[column])
        if self.store:
            return self.reward.score_features(self.store(prompts, texts))
        return self.reward.score(prompts, texts)


def load_learner(name: str, keep_layers: int | None = None, **config) -> Learner:
    """A `Learner` on a frozen backbone."""
    backbone, tokenizer = reward_models.load_backbone(name, keep_layers=keep_layers)
    backbone.requires_grad_(False)
    return Learner(reward_models.RewardModel(backbone, tokenizer), **config)


def pairs_of(ratings: pd.DataFrame, rankings: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The ranked pairs with the verdicts of "ratings" and of "rankings", to test a reward model on."""
    return {
        "ratings": rankings.assign(verdict=implied(ratings, rankings)),
        "rankings": rankings,
    }


def margins(learner: Learner, weights: dict, pairs: pd.DataFrame) -> pd.DataFrame:
    """Decided pairs with the model's margin (`analysis.pair_margins`)."""
    sides = [learner.score(weights, pairs, f"response{k}") for k in (1, 2)]
    return analysis.pair_margins(pairs, *sides)


def leave_one_out(
    learner: Learner, table: pd.DataFrame, texts: pd.DataFrame, seed: int, *, shuffled: bool = False
) -> dict[tuple[str, str], float]:
    """(input, response) -> logit, each prompt scored by a model that was trained on the other prompts.

    table: a ratings or rankings table; texts: columns instruction, input, response.
    """
    scores: dict[tuple[str, str], float] = {}
    for prompt in dict.fromkeys(texts["input"]):
        weights, _ = learner.fit(table[table["input"] != prompt], seed, shuffled=shuffled)
        mine = texts[texts["input"] == prompt].drop_duplicates("response")
        keys = zip(mine["input"], mine["response"], strict=True)
        scores |= dict(zip(keys, learner.score(weights, mine), strict=True))
    return scores


def released_feedback(folder: Path) -> dict[str, pd.DataFrame]:
    """The authors' released sample: ratings, rankings, and every pair with the verdict that ratings imply.

    Keys ratings, rankings, "ratings, as pairs"; line ends are made alike.
    """
    sample = "sample_generation"
    pairs = to_rankings_table(read_generations(folder / f"{sample}.json"))
    path = "feedback_{}_" + f"{sample}.csv"
    ratings = preferences.read_ratings(folder / path.format("ratings"))
    rankings = preferences.read_rankings(folder / path.format("rankings"))
    ratings, rankings, pairs = (
        table.replace("\r\n", "\n", regex=True) for table in (ratings, rankings, pairs)
    )
    rated = analysis.pair_verdicts(ratings, pairs.assign(verdict="equal"))
    rated = rated.assign(verdict=rated["derived"])
    return {"ratings": ratings, "rankings": rankings, "ratings, as pairs": rated}


def accuracy_of(scores: dict[tuple[str, str], float], pairs: pd.DataFrame, seed: int) -> Interval:
    """Pairwise accuracy of known logits on a table of pairs."""
    sides = [
        [scores[key] for key in zip(pairs["input"], pairs[name], strict=True)]
        for name in ("response1", "response2")
    ]
    return analysis.pairwise_accuracy(analysis.pair_margins(pairs, *sides), seed=seed)


# --- choices -------------------------------------------------------------------------------------


def shuffled_pool(responses: pd.DataFrame) -> pd.DataFrame:
    """Pools in an order by hash, with each response's place in it.

    responses: columns id, instruction, input, response, generator, sample.  The response at place 0 is the
    reference, and the best of n is chosen among places 0 to n - 1.
    """
    names = ["id", "instruction", "input", "response", "generator", "sample"]
    parts = []
    for _, group in responses[names].groupby("id", sort=False):
        keys = [
            runtime.content_hash("pool", r.id, r.generator, r.sample) for r in group.itertuples()
        ]
        parts.append(group.iloc[np.argsort(keys)].assign(place=range(len(group))))
    return pd.concat(parts, ignore_index=True)


def course_pool() -> pd.DataFrame:
    """The course's pool: 60 prompts, 64 responses each."""
    return shuffled_pool(items.read_responses("pool"))


def sampled_pool(
    policy, tokenizer, prompts: pd.DataFrame, name: str, *, n: int, seed: int, **decoding
) -> pd.DataFrame:
    """A pool of n responses a prompt from a policy, in random order; prompts: id, instruction, input."""
    asked = list(map(items.user_message, prompts["instruction"], prompts["input"]))
    shown = data.apply_template(asked, tokenizer, "chat")
    drawn = generation.sample(policy, tokenizer, shown, n=n, seed=seed, **decoding)
    rows = prompts.loc[prompts.index.repeat(n), ["id", "instruction", "input"]]
    texts = [without_reasoning(text).strip() for text in drawn.texts]
    return shuffled_pool(
        rows.assign(response=texts, generator=name, sample=list(range(n)) * len(prompts))
    )


def split(tables: Sequence[pd.DataFrame], share: float = 0.2) -> list[list[pd.DataFrame]]:
    """Tables for training, and tables of the other `share` of prompts (by hash) for testing."""
    keys = [list(zip(t["instruction"], t["input"], strict=True)) for t in tables]
    prompts = sorted({k for part in keys for k in part}, key=lambda k: runtime.content_hash(*k))
    test = set(prompts[: round(share * len(prompts))])
    inside = [np.array([key in test for key in part]) for part in keys]
    return [
        [
            table[rows == side].reset_index(drop=True)
            for table, rows in zip(tables, inside, strict=True)
        ]
        for side in (False, True)
    ]


def best_of(pool: pd.DataFrame, scores: Sequence[float], n: int) -> pd.DataFrame:
    """The row of the best-scored of each prompt's first n, the first on ties."""
    table = pool.assign(z=scores)
    table = table[table["place"] < n]
    return pool.loc[table.groupby("id", sort=False)["z"].idxmax()]


def choose(
    learner: Learner,
    ratings: pd.DataFrame,
    rankings: pd.DataFrame,
    pool: pd.DataFrame,
    *,
    seeds: Sequence[int] = (),
    sizes: Sequence[int] = (),
    curve_seeds: Sequence[int] = CURVE_SEEDS,
) -> pd.DataFrame:
    """What every arm of every seed chooses: columns id, arm, seed, n, place, generator, sample.

    seeds, sizes: default `SEEDS`, `SIZES`.  Seeds that are not among `curve_seeds`, and the control, choose
    among the largest size only.
    """
    rows, sizes = [], sizes or SIZES
    for seed in runtime.progress(list(seeds or SEEDS), label="reward models", unit="seed"):
        for arm, table in teach(ratings, rankings, seed).items():
            weights, _ = learner.fit(table, seed, resample=True)
            scores = learner.score(weights, pool)
            curve = seed in curve_seeds and arm != ARMS[-1]
            for n in sizes if curve else sizes[-1:]:
                picked = best_of(pool, scores, n)[["id", "place", "generator", "sample"]]
                rows.append(picked.assign(arm=arm, seed=seed, n=n))
    table = pd.concat(rows, ignore_index=True)
    return table[["id", "arm", "seed", "n", "place", "generator", "sample"]]


# --- judging -------------------------------------------------------------------------------------


def judge(
    annotator: LocalAnnotator, picks: pd.DataFrame, pool: pd.DataFrame, *, compare: bool = True
) -> pd.DataFrame:
    """Both protocols' judgement of every response that was chosen: one row each, whoever chose it.

    The pool's columns, then reference (its text), rating (expected, 1 to 7), reference_rating, and p_better
    (the ranking's P(chosen is better than the reference), over both orders).  Compared are the best of the
    most responses alone: p_better is NaN for others, and without `compare`.  The reference itself has a row,
    with p_better 1/2.
    """
    first = pool[pool["place"] == 0][["id", "response"]]
    wanted = pd.concat([picks[["id", "place"]], first[["id"]].assign(place=0)])
    rows = pool.merge(wanted.drop_duplicates(), on=["id", "place"])
    rows = rows.merge(first.rename(columns={"response": "reference"}), on="id")
    rows["rating"] = protocols.judge_ratings(annotator, rows)["score"].to_numpy(float)
    of_first = rows[rows["place"] == 0].set_index("id")["rating"]
    rows["reference_rating"] = rows["id"].map(of_first)
    rows["p_better"] = np.where(compare & (rows["response"] == rows["reference"]), 0.5, np.nan)
    if compare:
        last = picks[picks["n"] == picks["n"].max()].set_index(["id", "place"]).index
        among = pd.MultiIndex.from_frame(rows[["id", "place"]]).isin(last)
        asked = rows[among & (rows["response"] != rows["reference"])]
        pairs = asked.rename(columns={"response": "response2", "reference": "response1"})
        compared = protocols.judge_rankings(annotator, pairs)
        rows.loc[asked.index, "p_better"] = 1 - compared["p_first"].to_numpy()
    return rows


def units(ratings: pd.DataFrame, rankings: pd.DataFrame) -> dict[str, float]:
    """How far two responses to a prompt are apart in the annotator's numbers, over the root of two.

    rating: of expected ratings, ranking: of the log odds that one is better.  So measured, a response's
    deviation is 1 under either protocol.
    """
    spread = ratings.groupby(prompts_of(ratings))["score"].std()
    return {
        "rating": float(np.sqrt((spread**2).mean())),
        "ranking": float(np.sqrt((logit(rankings["p_first"]) ** 2).mean() / 2)),
    }


def measured(picks: pd.DataFrame, judged: pd.DataFrame, unit: dict[str, float]) -> pd.DataFrame:
    """The picks with what they are worth against the reference, by either protocol.

    Adds rating, ranking (in deviations of one response, see `units`; 0: like the reference), difference
    (ranking minus rating: what the interaction is made of), wins by rating and wins by ranking (100, 50 for
    the same, 0; NaN where nothing was compared), words and reference_words.
    """
    table = picks.merge(judged.drop(columns=["generator", "sample"]), on=["id", "place"])
    won = preferences.win_points
    table["wins by rating"] = 100 * won(table["rating"], table["reference_rating"])
    compared = won(table["p_better"], np.full(len(table), 0.5))
    table["wins by ranking"] = 100 * pd.Series(compared).where(table["p_better"].notna())
    table["rating"] = (table["rating"] - table["reference_rating"]) / unit["rating"]
    table["ranking"] = logit(table["p_better"]) / unit["ranking"]
    table["difference"] = table["ranking"] - table["rating"]
    for name, column in (("words", "response"), ("reference_words", "reference")):
        table[name] = table[column].str.split().str.len()
    return table


def by_simulated(
    person: SimulatedAnnotator,
    learner: Learner,
    ratings: pd.DataFrame,
    rankings: pd.DataFrame,
    pool: pd.DataFrame,
    seed: int,
) -> pd.DataFrame:
    """The whole chain with an annotator whose taste is known: columns prompt, policy, protocol, points.

    It annotates the responses of the two tables anew, a reward model is trained on each kind, and what both
    choose from the pool, and the reference ("base"), is judged by the same annotator: 100, 50 or 0.
    """
    rated = ratings.assign(score=person.rate(ratings["input"], ratings["response"]))
    pairs = rankings["input"], rankings["response1"], rankings["response2"]
    ranked = rankings.assign(verdict=person.rank(*pairs))
    first = pool[pool["place"] == 0]
    policies = {"base": first}
    for name, table in (("ratings RM", rated), ("rankings RM", ranked)):
        weights, _ = learner.fit(table, seed)
        policies[name] = best_of(pool, learner.score(weights, pool), len(pool))
    source, against, rows = list(first["input"]), list(first["response"]), []
    for name, picked in policies.items():
        texts = list(picked["response"])
        ahead = preferences.win_points(person.rate(source, texts), person.rate(source, against))
        verdicts = pd.Series(person.rank(source, against, texts))
        won = verdicts.map({"(a)": 0.0, "equal": 0.5, "(b)": 1.0}).to_numpy()
        for protocol, value in (("rating", ahead), ("ranking", won)):
            part = pd.DataFrame({"prompt": range(len(first)), "points": 100 * value})
            rows.append(part.assign(policy=name, protocol=protocol))
    return pd.concat(rows, ignore_index=True)


# --- the stored choices --------------------------------------------------------------------------


def path() -> Path:
    """Where the choices are kept that the stored replies judge."""
    return runtime.project_root() / "data" / "results" / "annotators" / "choices.csv"


def read_choices() -> pd.DataFrame | None:
    """The stored table of `choose`; None where it was not made yet."""
    return tables.read_csv(path()) if path().exists() else None
