"""What notebook 22 measures of win rates, reward models and choices: metrics of its run, tables, figures."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from IPython.display import Image

from lib import plots, preferences, runtime, stats
from lib.annotator import Rubric, SimulatedAnnotator
from lib.course.arms import Arms, Pair
from lib.course.record import Run
from lib.judge import LocalAnnotator
from lib.papers.sparse_feedback import analysis, choices, conversions, protocols
from lib.stats import Interval

OTHER = {"ratings": "rankings", "rankings": "ratings"}
WINS = {"rating": "wins by rating", "ranking": "wins by ranking"}  # columns of `choices.measured`
RELEASED = ("ratings_alpaca", "rankings_alpaca")  # the authors' files of both policies' choices
TASTES = {  # weight of coverage when rating, and when ranking
    "protocols differ (1, 0)": (1.0, 0.0),
    "differ a little (.7, .3)": (0.7, 0.3),
    "control: same (.5, .5)": (0.5, 0.5),
}


# --- win rates from files ------------------------------------------------------------------------


def write_evaluation(
    ratings: pd.DataFrame, rankings: pd.DataFrame, generators: tuple[str, str], folder: Path
) -> list[Path]:
    """Feedback on two generators' responses as the three evaluation files: the first is the reference.

    Of the ranked pairs those count that hold one response of each; ratings are rounded to whole numbers, and
    the instruction holds the passage, because evaluation by rating joins on the instruction alone.
    """
    by = dict(
        zip(preferences.text_keys(ratings, [*_ITEM, "response"]), ratings["generator"], strict=True)
    )
    score = dict(
        zip(preferences.text_keys(ratings, [*_ITEM, "response"]), ratings["score"], strict=True)
    )
    sides = [preferences.text_keys(rankings, [*_ITEM, f"response{k}"]) for k in (1, 2)]
    tables: list[list] = [[], [], []]
    mirror = {"(a)": "(b)", "(b)": "(a)"}
    for first, second, verdict in zip(*sides, rankings["verdict"], strict=True):
        if (by[second], by[first]) == generators:
            first, second, verdict = second, first, mirror.get(verdict, verdict)
        if (by[first], by[second]) != generators:
            continue
        asked = protocols.task_of(*first[:2])
        for table, side in zip(tables, (first, second), strict=False):
            table.append((asked, "", side[2], round(score[side])))
        tables[2].append((asked, "", first[2], second[2], verdict))
    columns = [preferences.RATING, preferences.RATING, preferences.RANKING]
    names = ["reference_ratings", "policy_ratings", "rankings"]
    return [
        preferences.write_table(pd.DataFrame(rows, columns=column), folder / f"{name}.csv")
        for rows, column, name in zip(tables, columns, names, strict=True)
    ]


_ITEM = preferences.ITEM


def win_rates(run: Run, judged: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Win rates of points by protocol ("rating", "ranking"), also at equal length; each is a metric."""
    rows = []
    for protocol, table in judged.items():
        rate = preferences.win_rate(table["points"])
        bounds = rate.percent - rate.half_width, rate.percent + rate.half_width
        run.metric(f"{protocol}_win_rate_pct", rate.percent, *bounds, n=rate.n)
        run.metric(f"{protocol}_win_rate_ci", rate.half_width, *bounds, n=rate.n)
        run.metric(f"{protocol}_n", rate.n, n=rate.n)
        equal = preferences.length_controlled(table, seed=run.seed)
        bounds = [100 * x for x in equal[:3]]
        run.metric(f"{protocol}_win_rate_length_controlled_pct", *bounds, n=equal.n)
        row = {"evaluation": protocol, "win rate": str(rate), "wins": rate.wins}
        row |= {"ties": rate.ties, "losses": rate.losses}
        rows.append(row | {"without ties": str(rate.without_ties), "at equal length": str(equal)})
    return pd.DataFrame(rows)


def common_win_rates(run: Run, judged: dict[str, pd.DataFrame]) -> str:
    """The same on instructions that both protocols evaluated, and the sign test between them, as lines."""
    both = preferences.common_points(judged["rating"], judged["ranking"])
    lines = []
    for protocol in ("rating", "ranking"):
        rate = preferences.win_rate(both[protocol])
        bounds = rate.percent - rate.half_width, rate.percent + rate.half_width
        run.metric(f"common_{protocol}_win_rate_pct", rate.percent, *bounds, n=rate.n)
        lines.append(f"{protocol}: {rate}")
    run.metric("common_n", len(both), n=len(both))
    p = preferences.sign_test(both["rating"], both["ranking"])
    run.metric("sign_test_p", p, n=len(both))
    return "\n".join([*lines, f"{len(both)} common instructions, sign test p = {p:.3f}"])


# --- reward models -------------------------------------------------------------------------------


def training_figure(run: Run, fitted: dict[str, tuple[dict, pd.DataFrame]], *, name: str) -> Image:
    """Each reward model's mean loss by epoch as a saved figure; every step goes to the table "history".

    fitted: kind -> (weights, history), as `choices.Learner.fit` returns them.
    """
    histories = [h.assign(arm=f"{kind} RM", seed=run.seed) for kind, (_, h) in fitted.items()]
    history = pd.concat(histories).rename(columns={"loss": "value"})
    run.save_table(history, "history")
    history["step"] = np.ceil(history["epoch"].round(6))
    by_epoch = history.groupby(["arm", "seed", "step"], sort=False)["value"].mean().reset_index()
    title = "Training reward models"
    figure = plots.learning_curve(by_epoch, xlabel="epoch", ylabel="loss", title=title)
    caption = "Mean loss by epoch: squared error for ratings, Bradley-Terry for rankings."
    ends = by_epoch.groupby("arm")["value"].agg(["first", "last"])
    alt = "; ".join(f"{arm} from {a:.3f} to {b:.3f}" for arm, (a, b) in ends.iterrows())
    return run.save_figure(figure, name, caption=caption, alt=f"Loss curves: {alt}.")


def learned(
    run: Run,
    learner: choices.Learner,
    fitted: dict[str, dict],
    train: dict[str, pd.DataFrame],
    test: dict[str, pd.DataFrame],
    shuffles: int,
) -> tuple[pd.DataFrame, dict[str, tuple[Interval, np.ndarray]]]:
    """Accuracy of reward models on unseen pairs, a row each, and (own accuracy, those of shuffled trainings).

    fitted: kind -> weights; train, test: kind -> table.  Without rankings to test on there is no accuracy;
    without ratings, no transfer.  Each number is a metric.
    """
    rows, own = [], {}
    if "rankings" not in test:
        return pd.DataFrame(), own
    fresh = {"rankings": test["rankings"]}
    if "ratings" in test:
        fresh = choices.pairs_of(test["ratings"], test["rankings"])

    def accuracy(weights: dict, protocol: str) -> Interval:
        pairs = choices.margins(learner, weights, fresh[protocol])
        return analysis.pairwise_accuracy(pairs, seed=run.seed)

    for kind, weights in fitted.items():
        value = accuracy(weights, kind)
        run.metric(f"pairwise_accuracy/{kind}", value)
        trained = (
            learner.fit(train[kind], run.seed + i, shuffled=True)[0] for i in range(shuffles)
        )
        chance = np.array([accuracy(w, kind).value for w in trained])
        bounds, name = (chance.min(), chance.max()), f"pairwise_accuracy/{kind}, shuffled labels"
        run.metric(name, chance.mean(), *bounds, n=value.n, seeds=shuffles)
        own[kind] = (value, chance)
        row = {"reward model": kind, "own protocol": str(value)}
        row["shuffled labels"] = "{:.3f} to {:.3f}".format(*bounds)
        if len(fresh) == 2:
            other = accuracy(weights, OTHER[kind])
            run.metric(f"transfer_accuracy/{kind}", other)
            row["other protocol"] = str(other)
            row |= _order_and_calibration(
                run, learner, kind, weights, test["ratings"], fresh["rankings"]
            )
        rows.append(row)
    return pd.DataFrame(rows), own


def _order_and_calibration(run, learner, kind, weights, rated, ranked) -> dict:
    z = learner.score(weights, rated)
    spearman = analysis.rank_correlation(z, rated["score"], rated["input"], seed=run.seed)
    run.metric(f"spearman/{kind}", spearman)
    pairs = choices.margins(learner, weights, ranked)
    error = analysis.calibration(pairs).attrs["error"]
    run.metric(f"calibration_error/{kind}", error, n=len(pairs))
    return {"Spearman": str(spearman), "calibration error": error}


def calibration(learner, fitted: dict[str, dict], ranked: pd.DataFrame) -> pd.DataFrame:
    """The calibration table of each reward model on ranked pairs, with its name as condition."""
    return pd.concat(
        analysis.calibration(choices.margins(learner, weights, ranked)).assign(
            condition=f"{kind} RM"
        )
        for kind, weights in fitted.items()
    )


def calibration_figure(run: Run, bins: pd.DataFrame, *, name: str) -> Image:
    """The table of `calibration` as a saved figure."""
    figure = plots.calibration_plot(bins, title="Are margins probabilities?")
    caption = "Observed preference by predicted probability, on unseen pairs."
    ends = bins.groupby("condition")["value"].agg(["first", "last"])
    parts = [f"{condition} {a:.2f} to {b:.2f}" for condition, (a, b) in ends.iterrows()]
    alt = "Share preferred from the lowest to the highest fifth: " + "; ".join(parts)
    return run.save_figure(figure, name, caption=caption, alt=alt)


def learned_from_released(
    run: Run, learner: choices.Learner, folder: Path, shuffles: int
) -> tuple[pd.DataFrame, dict[str, tuple[Interval, np.ndarray]]]:
    """As `learned`, from the authors' released sample: each prompt by models of the others."""
    tables = choices.released_feedback(folder)
    judges = {"ratings": tables["ratings, as pairs"], "rankings": tables["rankings"]}
    texts = [tables["ratings"]]
    for table in judges.values():
        texts += [table.rename(columns={f"response{k}": "response"}) for k in (1, 2)]
    texts = pd.concat([part[[*_ITEM, "response"]] for part in texts])
    rows, own = [], {}
    with warnings.catch_warnings(action="ignore"):  # `reward.truncated` counts prompts that are cut
        learner.score(learner.start, texts)
    for kind in judges:
        z = choices.leave_one_out(learner, tables[kind], texts, run.seed)
        value, other = (choices.accuracy_of(z, judges[k], run.seed) for k in (kind, OTHER[kind]))
        chance = []
        for i in range(shuffles):
            c = choices.leave_one_out(learner, tables[kind], texts, 1 + i, shuffled=True)
            chance.append(choices.accuracy_of(c, judges[kind], run.seed).value)
        chance = np.array(chance)
        rated = tables["ratings"]
        mine = [z[key] for key in zip(rated["input"], rated["response"], strict=True)]
        spearman = analysis.rank_correlation(mine, rated["score"], rated["input"], seed=run.seed)
        prefix = f"released/{kind} RM"
        run.metric(f"{prefix}/pairwise_accuracy", value)
        run.metric(f"{prefix}/transfer_accuracy", other)
        run.metric(f"{prefix}/spearman", spearman)
        name, bounds = f"{prefix}/pairwise_accuracy, shuffled", (chance.min(), chance.max())
        run.metric(name, chance.mean(), *bounds, n=value.n, seeds=shuffles)
        own[kind] = (value, chance)
        row = {"reward model": kind, "own protocol": str(value)}
        row |= {"shuffled labels": "{:.3f} to {:.3f}".format(*bounds), "other protocol": str(other)}
        rows.append(row | {"Spearman": str(spearman)})
    return pd.DataFrame(rows), own


def released_outputs(run: Run, folder: Path) -> dict[str, list[dict]]:
    """The released outputs of davinci003 and of both policies; how their 553 choices differ is a metric.

    Rankings minus ratings: characters, and distinct words.
    """
    names = ("davinci003", *RELEASED)
    outputs = {name: conversions.read_outputs(folder / f"{name}.json") for name in names}
    sides = [{row["instruction"]: row["output"] for row in outputs[name]} for name in RELEASED]
    counts = {"characters": len, "distinct_words": lambda text: len(set(text.split()))}
    for name, count in counts.items():
        sizes = [[count(side[key]) for key in sides[0]] for side in sides]
        more = stats.paired_difference(*sizes, seed=run.seed)
        run.metric(f"released/rankings_minus_ratings_{name}", more)
        print(f"rankings-RM choice minus ratings-RM choice, {name}: {more}")
    return outputs


def plan_on_released(outputs: dict[str, list[dict]], **request) -> tuple[dict, dict, list[dict]]:
    """What a judge would be asked of the released outputs: tables to rate and to rank, and all requests."""
    wanted = {row["instruction"] for row in outputs[RELEASED[0]]}
    sets = {
        name: [row for row in part if row["instruction"] in wanted]
        for name, part in outputs.items()
    }
    to_rate = {name: conversions.to_rating_eval(part) for name, part in sets.items()}
    first = sets["davinci003"]
    to_rank = {name: conversions.to_ranking_eval(first, sets[name]) for name in RELEASED}
    plan = [protocols.rating_requests(table, **request) for table in to_rate.values()]
    plan += [protocols.ranking_requests(table, **request) for table in to_rank.values()]
    return to_rate, to_rank, [one for requests in plan for one in requests]


def interaction_of_released(
    run: Run, rated: dict[str, pd.DataFrame], ranked: dict[str, pd.DataFrame]
) -> tuple[pd.DataFrame, Interval]:
    """The report on a judge of the released outputs, and the interaction in points; win rates are printed.

    rated: of davinci003, ratings_alpaca, rankings_alpaca; ranked: of the last two against the first.
    """
    rated, ranked = (
        {name: protocols.usable(table) for name, table in tables.items()}
        for tables in (rated, ranked)
    )
    report = analysis.judge_report(pd.concat(rated.values()), pd.concat(ranked.values()))
    points = {}
    for name in ranked:
        points[name] = preferences.common_points(
            preferences.win_points_by_rating(rated["davinci003"], rated[name]),
            preferences.win_points_by_ranking(ranked[name]),
        )
        for protocol in ("rating", "ranking"):
            rate = preferences.win_rate(points[name][protocol])
            print(f"{name}, {protocol} evaluation: {rate}")
    lead = points["rankings_alpaca"] - points["ratings_alpaca"]
    interaction = stats.bootstrap(100 * (lead["ranking"] - lead["rating"]).dropna(), seed=run.seed)
    run.metric("released/interaction_points", interaction)
    return report, interaction


def claim_learned(
    run: Run, text: str, value: Interval, chance: np.ndarray, *, rule: str, why: str
) -> str:
    """Claim that a reward model learned: accuracy above 0.5, and every shuffled training below it."""
    verdict = stats.decide(value, better="higher", threshold=0.5)
    if verdict == "same direction" and value.value <= chance.max():
        verdict = "not demonstrated"
    here = f"{value}; {len(chance)} shuffled runs at most {chance.max():.3f}"
    return run.claim(text, paper="", here=here, rule=rule, verdict=verdict, why=why)


# --- choices -------------------------------------------------------------------------------------


def judge_choices(
    judges: dict[str, str],
    picks: pd.DataFrame,
    pool: pd.DataFrame,
    unit: dict[str, float],
    *,
    ask: bool | None,
) -> dict[str, pd.DataFrame]:
    """role -> the picks with what they are worth to that judge (`choices.measured`), in deviations.

    judges: role -> model; all rate, and "main" alone compares.  ask: as `LocalAnnotator` takes it.  How many
    judgements are missing is printed; where there are any, the judge's table has no rows.
    """
    worth = {}
    for role, model in judges.items():
        compare = role == "main"
        with warnings.catch_warnings(action="ignore"):  # missing answers are counted below
            judged = choices.judge(LocalAnnotator(model, ask=ask), picks, pool, compare=compare)
        table = choices.measured(picks, judged, unit)
        compared = compare & (table["n"] == picks["n"].max())
        missing = table["rating"].isna().sum() + table.loc[compared, "ranking"].isna().sum()
        print(f"{model}: {missing} judgements of {len(table)} choices are missing")
        worth[role] = table[:0] if missing else table
    return worth


def arms_of(run: Run, measured: pd.DataFrame, n: int) -> Arms:
    """The choices among n as the arms of an experiment whose units are prompts."""
    arms = Arms(run, unit="id")
    for (arm, seed), rows in measured[measured["n"] == n].groupby(["arm", "seed"], sort=False):
        arms.add(rows.drop(columns=["arm", "seed"]), arm=arm, seed=seed)
    return arms


def win_table(arms: Arms, judge: str) -> pd.DataFrame:
    """Win rates of every arm by every protocol, each a metric: a row each, with judge, arm and more words.

    more words: words that the arm's choices are longer than the reference.  A protocol that was not asked has
    no row.
    """
    rows = []
    asked = {name: x for name, x in WINS.items() if arms.names and arms.table[x].notna().any()}
    for protocol, column in asked.items():
        for arm in arms.names:
            level = arms.level(arm, column)
            arms.run.metric(f"win_rate_pct/{judge}/{protocol}/{arm} RM", level)
            row = {"group": f"by {protocol}", "condition": f"{arm} RM", "arm": arm, "judge": judge}
            row |= {"value": level.value, "low": level.low, "high": level.high, "n": level.n}
            lengths = [arms.level(arm, name).value for name in ("words", "reference_words")]
            rows.append(row | {"more words": lengths[0] - lengths[1]})
    return pd.DataFrame(rows)


def win_figure(run: Run, wins: pd.DataFrame, n: int, *, name: str) -> Image:
    """The table of `win_table`, of choices among n, as a saved figure."""
    title = f"Best of {n} against a random response"
    figure = plots.interval_plot(wins, xlabel="win rate, %", reference=50, title=title)
    caption = "Win rates by model and evaluation; intervals over prompts and seeds."
    alt = "; ".join(f"{r.condition} {r.group} {r.value:.0f} %" for r in wins.itertuples())
    return run.save_figure(figure, name, caption=caption, alt=alt)


def power_table(arms: Arms, pair: Pair) -> pd.DataFrame:
    """Would 3, 6 or 12 seeds show the smallest interaction that matters?  A row each of `Arms.power`."""
    return pd.concat(
        arms.power([pair], ["difference"], smallest=choices.SMALLEST, seeds=seeds)
        for seeds in (3, 6, 12)
    )


def curve(run: Run, measured: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Win rates by rating and by number to choose among (k), of one seed, for `plots.curve_by_k`."""
    rows = []
    table = measured[(measured["seed"] == seed) & (measured["arm"] != "control")]
    for (arm, k), part in table.groupby(["arm", "n"], sort=False):
        interval = stats.bootstrap(part[WINS["rating"]], seed=run.seed)
        rows.append({"condition": f"{arm} RM", "k": k, **interval._asdict()})
        if k == table["n"].max():
            run.metric(f"best_of_{k}/{arm} RM/rating_win_rate_pct", interval)
            one = {"k": 1, "value": 50.0, "low": 50.0, "high": 50.0}  # the reference itself
            rows.append(rows[-1] | one)
    return pd.DataFrame(rows)


def curve_figure(run: Run, curve: pd.DataFrame, *, name: str) -> Image:
    """The table of `curve` as a saved figure."""
    title = "Best of k, judged by ratings"
    figure = plots.curve_by_k(curve, ylabel="win rate, %", title=title, log=True)
    caption = "Win rate over a random response by k, rating evaluation, one seed."
    ends = curve[curve["k"] == curve["k"].max()].itertuples()
    alt = "; ".join(f"{r.condition} ends at {r.value:.0f} %" for r in ends)
    return run.save_figure(figure, name, caption=caption, alt=f"Curves: {alt}.")


def by_hand(
    run: Run,
    learner: choices.Learner,
    ratings: pd.DataFrame,
    rankings: pd.DataFrame,
    pool: pd.DataFrame,
    annotators: int,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Leads and interaction, in win-rate points, where annotators with the tastes of `TASTES` do everything.

    The table has group, condition, value, low, high, n; each is a metric.  With it come all points.
    """
    parts = []
    for taste, (rating, ranking) in TASTES.items():
        for seed in runtime.progress(range(1, 1 + annotators), label=taste):
            weights = {"rating_density": rating, "ranking_density": ranking}
            person = SimulatedAnnotator(
                rubric=Rubric(max_facts=10), **weights, seed=run.seed + seed
            )
            points = choices.by_simulated(person, learner, ratings, rankings, pool, run.seed + seed)
            parts.append(points.assign(setting=taste, seed=run.seed + seed))
    points = pd.concat(parts, ignore_index=True)
    index, columns = ["setting", "seed", "prompt"], ["protocol", "policy"]
    wide = points.pivot(index=index, columns=columns, values="points")
    lead = {p: wide[p]["rankings RM"] - wide[p]["ratings RM"] for p in ("ranking", "rating")}
    cells = {f"lead under {p}": values for p, values in lead.items()}
    cells["interaction"] = lead["ranking"] - lead["rating"]
    rows = []
    for taste in TASTES:
        for name, values in cells.items():
            effect = stats.over_units_and_seeds(values.loc[taste].unstack("prompt"), seed=run.seed)
            run.metric(f"{name.replace(' ', '_')}_points/{taste}", effect)
            row = {"group": taste, "condition": name, "value": effect.value}
            rows.append(row | {"low": effect.low, "high": effect.high, "n": effect.n})
    return pd.DataFrame(rows), points


def by_hand_figure(run: Run, table: pd.DataFrame, *, name: str) -> Image:
    """The table of `by_hand` as a saved figure."""
    title = "Annotators made by hand: the rankings model's lead"
    figure = plots.interval_plot(table, xlabel="win-rate points", reference=0, title=title)
    caption = "Leads and interaction by taste; intervals over prompts and annotators."
    shown = table[table["condition"] == "interaction"]
    alt = "; ".join(f"{r.group} {r.value:+.0f}" for r in shown.itertuples())
    return run.save_figure(figure, name, caption=caption, alt=f"Interaction: {alt}.")


# --- DPO -----------------------------------------------------------------------------------------


def chat_pairs(rankings: pd.DataFrame, n: int, message) -> dict[str, list]:
    """n decided pairs as trl's trainer takes them: columns prompt, chosen, rejected, as messages.

    message(instruction, input): what the user says.
    """
    rows = preferences.decided(rankings).head(n)
    first = (rows["verdict"] == "(a)").to_numpy()
    sides = [rows["response1"].to_numpy(), rows["response2"].to_numpy()]
    columns: dict[str, Sequence] = {
        "prompt": [message(*item) for item in zip(rows["instruction"], rows["input"], strict=True)],
        "chosen": np.where(first, *sides),
        "rejected": np.where(first, *sides[::-1]),
    }
    return {
        name: [
            [{"role": "user" if name == "prompt" else "assistant", "content": str(text)}]
            for text in texts
        ]
        for name, texts in columns.items()
    }
