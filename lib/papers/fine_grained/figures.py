"""Drawings of 40 (marks and preferences), 41 (an answer beside its marks, ROC) and 44 (gain by error).

The last two, of 42 and 43, are saved as well: they write what their alt text says from the data.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lib import plots
from lib.course.record import Run

SHADES = ("#e8a33d", "#ffffff", "#4a90c8")  # wrong, undecided, right


def marked_text(table: pd.DataFrame, *, title: str, label: str, per_line: int = 72) -> Figure:
    """One text in several rows, each coloured by what that row says of its pieces: orange wrong, blue right.

    Columns row, piece, value (-1 wrong to 1 right; NaN: it says nothing), note (written behind the piece).
    """
    plots.use_style()
    boxes, names, line = [], {}, 0
    for name, pieces in table.groupby("row", sort=False):
        names[name], column = line, 0
        for piece in pieces.itertuples():
            for word in f"{piece.piece} {piece.note}".split():
                if column + len(word) > per_line:
                    line, column = line + 1, 0
                boxes.append((line, column, word, piece.value))
                column += len(word) + 1
        line += 1.6
    figure = Figure(figsize=(plots.WIDTH, 1.2 + 0.28 * line), layout="constrained")
    axes = figure.subplots()
    colours = matplotlib.colors.LinearSegmentedColormap.from_list("right", SHADES)
    scale = matplotlib.colors.Normalize(-1, 1)
    for row, start, word, value in boxes:
        shade = "0.88" if np.isnan(value) else colours(scale(value))
        axes.add_patch(Rectangle((start, -row - 0.45), len(word) + 1, 0.9, color=shade, lw=0))
        axes.text(start, -row, word, family="monospace", va="center", fontsize=9)
    for name, row in names.items():
        axes.text(-1.5, -row, name, ha="right", va="center", weight="bold", fontsize=10)
    axes.set(xlim=(-14, per_line + 1), ylim=(-line + 0.6, 0.7))
    axes.axis("off")
    bar = matplotlib.cm.ScalarMappable(scale, colours)
    figure.colorbar(bar, ax=axes, orientation="horizontal", label=label, aspect=50, pad=0.02)
    return plots.finish(figure, title)


def pieces_of(record: dict, row: str) -> list[tuple[str, str, float, str]]:
    """A record's marks as rows of `marked_text` (row, piece, value, note): what no span covers is right.

    Each span is wrong, with its type as note; missing pieces follow in grey.
    """
    text, pieces, last = record["prediction 1"], [], 0
    for error in sorted(record["feedback"]["errors"], key=lambda e: e["start"]):
        start, end = error["start"], error["end"]
        pieces.append((row, text[last:start], 1.0, ""))
        pieces.append((row, text[start:end], -1.0, f"[{error['error type']}]"))
        last = end
    pieces.append((row, text[last:], 1.0, ""))
    missing = [piece["error type"] for piece in record["feedback"]["missing-info"]]
    pieces += [(row, "", np.nan, f"[{kind}]") for kind in missing]
    return [piece for piece in pieces if piece[1].strip() or piece[3]]


def roc_curves(table: pd.DataFrame, *, title: str) -> Figure:
    """Share of wrong segments found against share of fine ones called wrong, for every threshold.

    A panel a model, a curve a kind of training (all its seeds' scores together).  Columns model, kind, wrong
    (0, 1), score (low: wrong).
    """
    plots.use_style()
    panels = list(dict.fromkeys(table.model))
    figure = Figure(figsize=(plots.WIDTH, 3.8), layout="compressed")  # panels are square
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    styles = plots.condition_styles(table.kind)
    for axes, model in zip(row, panels, strict=True):
        for kind, style in styles.items():
            rows = table[(table.model == model) & (table.kind == kind)].sort_values("score")
            hits, alarms = rows.wrong.cumsum(), (1 - rows.wrong).cumsum()
            hits, alarms = hits / max(1, hits.iloc[-1]), alarms / max(1, alarms.iloc[-1])
            axes.plot(alarms, hits, color=style["color"], ls=style["linestyle"], label=kind)
        axes.plot([0, 1], [0, 1], color="0.5", lw=1, ls=":")
        axes.text(0.97, 0.05, model, ha="right", weight="bold")
        axes.set(xlabel="fine segments called wrong", aspect="equal")
    row[0].set_ylabel("wrong segments found")
    return plots.finish(figure, title)


def gain_by_error(table: pd.DataFrame, *, title: str, xlabel: str, ylabel: str) -> Figure:
    """A gain with its interval against the error of the reward model; a line for each kind of error.

    Columns kind, level (written at its point), error, value, low, high; bounds may be NaN.
    """
    plots.use_style()
    figure = Figure(figsize=(plots.WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    for kind, style in plots.condition_styles(table.kind).items():
        rows = table[table.kind == kind].sort_values("error")
        axes.plot(rows.error, rows.value, **style, label=kind)
        axes.fill_between(rows.error, rows.low, rows.high, color=style["color"], alpha=0.15, lw=0)
        axes.vlines(rows.error, rows.low, rows.high, color=style["color"], lw=1)
        for number, row in enumerate(rows.itertuples()):
            place, shift = (row.error, row.value), (4, (6, -12)[number % 2])  # above, below, above
            axes.annotate(row.level, place, shift, textcoords="offset points", fontsize=8)
    axes.margins(x=0.12)  # for the last point's text
    axes.axhline(0, color="0.3", lw=1, ls=":")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return plots.finish(figure, title)


def label_counts(table: pd.DataFrame, *, title: str) -> Figure:
    """How many labels an answer has, each bar cut by how many categories they are of (darker: more).

    Columns labels and categories, a row an answer (`schema.labels_table`).
    """
    plots.use_style()
    figure = Figure(figsize=(plots.WIDTH, 3.6), layout="constrained")
    axes = figure.subplots()
    counts = np.arange(table.labels.max() + 1)
    shades = matplotlib.colormaps["Blues"](np.linspace(0.15, 0.95, 4))
    bottom = np.zeros(len(counts))
    for number, shade in enumerate(shades):
        rows = table[table.categories == number]
        height = np.array([(rows.labels == count).sum() for count in counts])
        name = {0: "no error", 1: "1 category"}.get(number, f"{number} categories")
        axes.bar(counts, height, 0.85, bottom, color=shade, edgecolor="0.3", lw=0.6, label=name)
        bottom += height
    axes.set(xlabel="labels of an answer", ylabel="answers", xticks=counts)
    axes.grid(False, axis="x")
    return plots.finish(figure, title)


def span_lengths(
    spans: pd.DataFrame, kinds: Sequence[str], *, title: str, longest: int = 40
) -> Figure:
    """Histograms of the words in a span, one below another for these types; a line at each median.

    Columns type and words (`schema.span_table`).  Spans over `longest` words stand in the last bar.
    """
    plots.use_style()
    figure = Figure(figsize=(plots.WIDTH, 1.0 + 0.95 * len(kinds)), layout="constrained")
    rows = figure.subplots(len(kinds), sharex=True, squeeze=False)[:, 0]
    edges = np.arange(0, longest + 3, 2)
    for axes, kind in zip(rows, kinds, strict=True):
        words = spans.words[spans.type == kind]
        share = np.full(len(words), 1 / max(1, len(words)))
        axes.hist(words.clip(upper=longest + 1), edges, weights=share, color="#4a90c8", ec="white")
        if len(words):
            axes.axvline(words.median(), color="black", lw=1.5)
        name = f"{kind}, {len(words)} spans, median {words.median():.0f} words"
        axes.text(0.98, 0.72, name, transform=axes.transAxes, ha="right")
        axes.set_yticks([])
    rows[-1].set(xlabel=f"words in a span (last bar: over {longest})")
    figure.supylabel("share of the type's spans", fontsize=10)
    return plots.finish(figure, title)


def preference_bars(shares: pd.DataFrame, *, title: str) -> Figure:
    """A bar a row: pairs of which the first is better, both are equal, the second is better.

    Columns group, first, equal, second (`schema.preference_shares`).  The tick in each bar is where its
    first part would end if place did not matter: at half of the decided pairs.
    """
    plots.use_style()
    figure = Figure(figsize=(plots.WIDTH, 1.3 + 0.42 * len(shares)), layout="constrained")
    axes = figure.subplots()
    looks = {"first": ("#4a90c8", ""), "equal": ("0.92", ""), "second": ("#e8a33d", "//")}
    left = np.zeros(len(shares))
    for part, (colour, hatch) in looks.items():
        width = shares[part].to_numpy()
        name = {"equal": "equally good"}.get(part, f"{part} is better")
        bars = axes.barh(
            shares.group, width, 0.7, left, color=colour, hatch=hatch, ec="white", label=name
        )
        written = [f"{100 * share:.0f} %" if share > 0.04 else "" for share in width]
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5} if hatch else None
        axes.bar_label(bars, written, label_type="center", fontsize=9, bbox=box)
        left += width
    half = (1 - shares["equal"]) / 2
    places = np.arange(len(shares))
    axes.vlines(
        half, places - 0.42, places + 0.42, color="black", lw=2, label="half of the decided"
    )
    axes.set(xlim=(0, 1), xlabel="share of pairs", ylim=(len(shares) - 0.5, -0.5))
    axes.grid(False)
    return plots.finish(figure, title)


def before_after(before: np.ndarray, after: np.ndarray, *, title: str, label: str) -> Figure:
    """A dot for each unit, (units,) before against (units,) after; below the line it went down."""
    plots.use_style()
    figure = Figure(figsize=(plots.WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    ends = [min(before.min(), after.min()) - 0.1, max(before.max(), after.max()) + 0.1]
    axes.plot(ends, ends, color="0.5", lw=1, ls=":", label="unchanged")
    axes.plot(before, after, "o", color="#4a90c8", markeredgecolor="black", label="one question")
    axes.set(xlabel=f"{label}, before", ylabel=f"{label}, after", aspect="equal")
    return plots.finish(figure, title)


# --- drawn and saved -------------------------------------------------------------------------------


def save_credit(run: Run, credit: pd.DataFrame, tokens: Sequence[str], *, name: str):
    """Save what each token of one answer is paid and credited with (42, 43); return the image to show.

    `credit`: (rows, tokens), in units of reward, with a row "reward, dense".
    """
    title = "One answer: what each token is paid, and what it is credited with"
    figure = plots.token_heatmap(credit, tokens, title=title, label="reward units")
    caption = "The same sum, paid dense or at the end, and the advantages made of it."
    paid = int((credit.loc["reward, dense"] != 0).sum())
    alt = f"{len(tokens)} tokens, {paid} of them paid when dense, one when at the end"
    for row, values in credit.iterrows():
        low, high = int(np.argmin(values)), int(np.argmax(values))
        ends = f"{min(values):+.2f} (token {low + 1}) to {max(values):+.2f} (token {high + 1})"
        alt += f"; {row}: {ends}"
    return run.save_figure(figure, name, caption=caption, alt=alt)


def save_by_kl(
    run: Run, rows: pd.DataFrame, order: Sequence[str], *,
    name: str, ylabel: str, title: str, caption: str,
):  # fmt: skip
    """Save a score against KL, a line for each way of paying, in this order (43); return the image to show.

    `rows` as `toxicity.along_kl` gives them.
    """
    rows = rows.assign(arm=pd.Categorical(rows.arm, order))
    labels = {"xlabel": "KL from PT, nats an answer", "ylabel": ylabel, "title": title}
    figure = plots.learning_curve(rows, **labels)
    means = rows.groupby(["arm", "step"], observed=True).value.mean().reset_index()
    ends = means.groupby("arm", observed=True).last().itertuples()
    parts = [f"All start at {means.value[means.step == 0].mean():.2f} without KL"]
    parts += [f"{x.Index} ends with {x.value:.2f} at {x.step:.1f} nats" for x in ends]
    return run.save_figure(figure, name, caption=caption, alt="; ".join(parts))
