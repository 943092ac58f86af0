"""What a chain of `jobs` comes to: the tables of the paper's form, and a drawing of who reads what.

The paper's Table 3 compares policies on the test questions, its Table 5 leaves out one reward model at a
time, on the dev questions; its comparison of short, medium and long answers changes the weight of R1.
Ratios (R1: relevant sub-sentences, R2: factual sentences) are over all segments of all answers, as the
reference counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from lib import plots, stats
from lib.papers.fine_grained import jobs

RATIOS = {"R1": ("relevant", "sub_sentences"), "R2": ("factual", "sentences")}
MEASURES = ("R1", "R2", "R3", "preference", "rouge", "tokens")
# dev questions, read off the authors' project page (first version of the paper)
PAPER_TABLE_5 = pd.DataFrame(
    {
        "R1": [0.514, 0.516, 0.249, 0.716, 0.565],
        "R2": [0.735, 0.825, 0.771, 0.640, 0.799],
        "R3": [0.065, 0.266, 0.742, -0.177, 0.123],
        "rouge": [43.13, 44.29, 38.52, 43.18, 43.61],
        "tokens": [96.69, 101.76, 179.31, 78.08, 93.92],
    },
    index=["SFT", "fine-grained", "without R1", "without R2", "without R3"],
)


def summary(scores: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Every measure of every policy with its interval over questions.

    `scores`: rows as `jobs.evaluate` writes them.  Columns arm, split, measure, value, low, high, n.
    """
    rows = []
    for (arm, split), part in scores.groupby(["arm", "split"], sort=False):
        for measure in MEASURES:
            if measure in RATIOS:
                columns = tuple(part[name].to_numpy(dtype=float) for name in RATIOS[measure])
                interval = stats.bootstrap(columns, _ratio, seed=seed)
            else:
                interval = stats.bootstrap(part[measure].to_numpy(dtype=float), seed=seed)
            rows.append({"arm": arm, "split": split, "measure": measure, **interval._asdict()})
    return pd.DataFrame(rows)


def _ratio(right, total) -> float:
    return float(right.sum() / total.sum()) if total.sum() else float("nan")


def table(
    summed: pd.DataFrame, split: str, arms: Sequence[str], measures: Sequence[str] = MEASURES
) -> pd.DataFrame:
    """Policies by measures, (arms, measures), in this order; NaN where something is missing."""
    part = summed[summed.split == split].pivot(index="arm", columns="measure", values="value")
    return part.reindex(index=list(arms), columns=list(measures))


def per_answer(scores: pd.DataFrame) -> pd.DataFrame:
    """The same rows with each answer's own shares, `relevance` and `factuality`, for paired comparisons."""
    shares = {
        "relevance": scores.relevant / scores.sub_sentences,
        "factuality": scores.factual / scores.sentences,
    }
    return scores.assign(**shares)


def drawing(chain: jobs.Chain) -> Figure:
    """The chain: data files, models made from them, policies, the evaluation; a line to all that is read."""
    columns = [[*jobs.DATA], ["SFT", *jobs.REWARDS], [*chain.arms], [jobs.EVALUATE]]
    if chain.full:
        columns[1].insert(1, "SFT-Full")
    titles = ("data files", "first policies, reward models", "PPO", "tables")
    plots.use_style()
    tallest = max(map(len, columns))
    figure = Figure(figsize=(plots.WIDTH * 1.15, 1.0 + 0.5 * tallest), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(-0.5, 3.5), ylim=(-tallest, 1))
    axes.axis("off")
    places = {}
    for x, (title, names) in enumerate(zip(titles, columns, strict=True)):
        axes.text(x, 0.6, title, ha="center", fontsize=10, weight="bold")
        for i, name in enumerate(names):
            # spread over the height of the tallest column
            y = -(i + 0.5) * tallest / len(names)
            places[name] = (x, y)
            box = {"boxstyle": "round", "facecolor": "white", "edgecolor": "0.3"}
            axes.text(x, y, name, ha="center", va="center", fontsize=9, bbox=box, zorder=3)
    for stage in chain.stages:
        for source in sum(jobs.inputs_of(chain, stage), []):
            (x, y), (to_x, to_y) = places[source], places[stage]
            if to_x - x == 1:  # what comes from further back would cross every box between
                axes.plot([x, to_x], [y, to_y], color="0.6", lw=0.8, zorder=1)
    return figure
