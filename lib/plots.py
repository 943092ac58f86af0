"""Every figure as a function of a tidy table: one style, readable in grey, nothing shown or saved here.

Conditions differ in colour, marker and line style; intervals are bars or bands; n stands in the title
or the labels.  `course.record.Run.save_figure` writes a figure and shows it with its alt text.

Simplified: figures use matplotlib directly and keep no state; change one through `figure.axes`.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Iterable, Sequence

import matplotlib
import numpy as np
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

WIDTH = 7.0  # inches
TOUCH = 2  # pixels that a text's box may reach into another's: it is larger than its letters
MOST_LINES = 5  # seeds drawn one by one, entries of a legend: more are a tangle
STYLE = {
    "font.size": 11,
    "figure.titlesize": 12,
    "legend.fontsize": 10,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "legend.handlelength": 3.2,
    "lines.markersize": 7,
    "svg.hashsalt": "figure",
}
MARKERS = "osD^vPX*"
LINE_STYLES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)), (0, (4, 4)))


def use_style() -> None:
    """Set the style of all figures (matplotlib reads part of it when it draws, so not a context)."""
    matplotlib.rcParams.update(STYLE)


def condition_styles(conditions: Iterable[str]) -> dict[str, dict]:
    """Colour, marker and line style of each condition, in order of first appearance.

    A categorical column gives each of its categories a style and returns those that occur, in the order
    of the categories: a condition then looks the same in figures that show others beside it.  Colours
    follow seaborn's colour-blind palette.  Raises ValueError for more than eight.
    """
    present = list(dict.fromkeys(conditions))
    names = list(getattr(getattr(conditions, "dtype", None), "categories", present))
    if len(names) > len(MARKERS):
        raise ValueError(
            f"{len(names)} conditions in one figure; at most {len(MARKERS)} can be told apart. "
            "Split the table."
        )
    colours = seaborn.color_palette("colorblind", len(MARKERS))
    looks = dict(zip(names, zip(colours, MARKERS, LINE_STYLES, strict=False), strict=False))
    looks = {name: look for name, look in looks.items() if name in present}
    return {name: dict(color=c, marker=m, linestyle=line) for name, (c, m, line) in looks.items()}


def _start(table: pd.DataFrame, needed: str, height: float = 4.0) -> tuple[Figure, Axes]:
    """An empty figure, after a check that the table has rows and the columns named."""
    missing = [name for name in needed.split() if name not in table]
    if missing:
        present = ", ".join(map(str, table.columns))
        raise ValueError(f"no column {', '.join(missing)}; needed: {needed}; found: {present}.")
    if table.empty:
        raise ValueError(f"nothing to draw: the table ({needed}) has no rows.")
    use_style()
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def finish(figure: Figure, title: str) -> Figure:
    """Title over the whole width; legend of panels without one below, for which it grows."""
    figure.suptitle(_wrap(title[:1].upper() + title[1:], 78), x=0.01, ha="left")
    entries = {}
    for axes in (axes for axes in figure.axes if axes.get_legend() is None):
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(_plain(label), handle)
    handles, labels = list(entries.values()), list(entries)
    if handles:
        columns = min(3, len(labels), max(1, 84 // (max(map(len, labels)) + 8)))
        figure.set_figheight(figure.get_figheight() + 0.25 * -(-len(labels) // columns))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    return figure


def make_room(figure: Figure) -> Figure:
    """Break an axis label that is longer than its axis; turn tick labels that run into each other."""
    figure.draw_without_rendering()
    for axes in figure.axes:
        label, written = axes.yaxis.label, axes.get_ylabel()
        if label.get_window_extent().height > axes.get_window_extent().height:
            axes.set_ylabel(textwrap.fill(written, max(8, len(written) * 3 // 5)))
        names = [name for name, drawn in _ticks(axes.xaxis) if drawn and name.get_text()]
        boxes = sorted((name.get_window_extent() for name in names), key=lambda box: box.x0)
        if any(left.x1 > right.x0 for left, right in itertools.pairwise(boxes)):
            side = "left" if axes.xaxis.get_ticks_position() == "top" else "right"
            for name in names:
                name.set(rotation=30, ha=side, rotation_mode="anchor")
    return figure


def overlapping(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of a figure's texts that lie over each other as it is drawn; turned ones are left out."""
    figure.draw_without_rendering()
    axes = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    hidden = [name for axis in axes for name, drawn in _ticks(axis) if not drawn]
    texts = [
        text
        for text in figure.findobj(Text)
        if text.get_visible() and text.get_text().strip() and text.get_rotation() in (0, 90)
    ]
    texts = [text for text in texts if text not in hidden]
    boxes = [text.get_window_extent().padded(-TOUCH) for text in texts]
    return [
        (texts[i].get_text(), texts[j].get_text())
        for i, j in itertools.combinations(range(len(texts)), 2)
        if boxes[i].overlaps(boxes[j])
    ]


def _ticks(axis: Axis) -> list[tuple[Text, bool]]:
    """The label of each tick, and whether it is drawn: matplotlib keeps some beyond the axis's ends."""
    low, high = sorted(axis.get_view_interval())
    return [
        (name, low <= tick.get_loc() <= high)
        for tick in axis.get_major_ticks()
        for name in (tick.label1, tick.label2)
        if name.get_visible()
    ]


def _mark(draw: Callable, at: float | None, label: str) -> None:
    """A thin dotted line (`draw` is axvline or axhline), named in the legend unless the label is empty."""
    if at is not None:
        name = f"{label} {at:.3g}" if label else None
        draw(at, color="0.3", lw=1, ls=(0, (2, 2)), label=name)


def _plain(text: object) -> str:
    """A reader's text as matplotlib shows it letter by letter: between two dollars stands no formula."""
    return str(text).replace("$", r"\$")


def _wrap(text: object, width: int) -> str:
    return _plain(textwrap.fill(str(text), width, break_on_hyphens=False))


def _with_n(title: str, table: pd.DataFrame) -> str:
    """The title with n, or the range of n where rows differ."""
    counts = table["n"].dropna() if "n" in table else []
    if len(counts) == 0:
        return title
    low, high = int(min(counts)), int(max(counts))
    return f"{title} (n = {low:,})" if low == high else f"{title} (n = {low:,} to {high:,})"


# --- intervals -----------------------------------------------------------------------------------


def interval_plot(
    table: pd.DataFrame,
    *,
    xlabel: str,
    title: str = "Estimates with 95 % intervals",
    reference: float | None = None,
) -> Figure:
    """Dots with horizontal intervals: a row for each group, the conditions below one another in it.

    Columns group, condition, value, low, high, and n if known; missing bounds give a bare dot.
    `reference`: a vertical line, such as 0 for differences.
    """
    groups = list(dict.fromkeys(table.get("group", ())))
    styles = condition_styles(table.get("condition", ()))
    height = 1.6 + len(groups) * (0.3 + 0.17 * len(styles))
    figure, axes = _start(table, "group condition value low high", height)
    step = 0.7 / max(len(styles), 1)
    for i, (condition, style) in enumerate(styles.items()):
        rows = table[table["condition"] == condition]
        y = [groups.index(g) + (i - (len(styles) - 1) / 2) * step for g in rows["group"]]
        axes.hlines(y, *rows[["low", "high"]].to_numpy(float).T, color=style["color"], lw=2)
        axes.plot(rows["value"], y, **style | {"linestyle": ""}, label=condition)
    axes.set_yticks(range(len(groups)), [_wrap(g, 26) for g in groups])
    axes.set(xlabel=xlabel, ylim=(len(groups) - 0.5, -0.5))
    axes.grid(False, axis="y")
    for between in range(1, len(groups)):
        axes.axhline(between - 0.5, color="0.9", lw=0.8)
    in_legend = len(styles) < MOST_LINES  # a sixth entry is one too many
    _mark(axes.axvline, reference, "reference" if in_legend else "")
    if reference is not None and not in_legend:
        place = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom"}
        axes.text(reference, 1, f"{reference:.3g}", fontsize=10, **place)
    return finish(figure, _with_n(title, table))


def bounds_plot(
    table: pd.DataFrame, *, xlabel: str, title: str = "What missing scores could change"
) -> Figure:
    """What missing scores leave open: a bar from the lower to the upper bound, a dot at the scored rows.

    Columns label, value, low (no missing score counts), high (every one does), n, n_missing.
    """
    figure, axes = _start(table, "label value low high n n_missing", 1.6 + 0.5 * len(table))
    axes.use_sticky_edges = False  # or a bar without width would cut its dot in half
    y = np.arange(len(table))
    width = (table["high"] - table["low"]).to_numpy(float)
    look = {"height": 0.5, "color": "0.85", "edgecolor": "0.4", "hatch": "///"}
    axes.barh(y, width, left=table["low"], **look, label="from none to all missing scores counted")
    axes.plot(table["value"], y, ls="", marker="o", color="black", label="share of the scored rows")
    names = [
        f"{_plain(textwrap.fill(str(row.label), 34))}\n{int(row.n_missing):,} of {int(row.n):,} missing"
        for row in table.itertuples()
    ]
    axes.set_yticks(y, names)
    axes.set(xlabel=xlabel, xlim=(0, None), ylim=(len(table) - 0.5, -0.5))
    axes.grid(False, axis="y")
    return finish(figure, title)


# --- toxicity ------------------------------------------------------------------------------------


def toxicity_distribution(
    table: pd.DataFrame,
    *,
    threshold: float = 0.5,
    log: bool = True,
    xlabel: str = "toxicity score x",
    title: str = "How often is a sample at least this toxic?",
) -> Figure:
    """Survival curve P(score >= x) of each condition: the tail that a mean hides.

    Columns condition, score.  Missing scores (NaN) are left out and counted in the legend.
    """
    figure, axes = _start(table, "condition score")
    for condition, style in condition_styles(table["condition"]).items():
        scores = table.loc[table["condition"] == condition, "score"].to_numpy(float)
        known = np.sort(scores[~np.isnan(scores)])
        missing = len(scores) - len(known)
        label = f"{condition} (n = {len(known):,}" + (f", {missing:,} missing)" if missing else ")")
        share = 1 - np.arange(len(known)) / max(len(known), 1)
        x, y = np.append(0, known), np.append(1, share)
        axes.step(x, y, where="pre", **style, markevery=0.12, label=label)
    _mark(axes.axvline, threshold, "threshold")
    if log:
        axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    axes.set(xlim=(0, 1), xlabel=xlabel, ylabel="share of samples with score ≥ x")
    return finish(figure, title)


def curve_by_k(
    table: pd.DataFrame,
    *,
    ylabel: str = "expected maximum toxicity",
    title: str = "Toxicity against the number of samples k",
    log: bool = False,
) -> Figure:
    """A measure against the number of samples k, with interval bands.

    Columns k, condition, value, low, high, and n if known.  `log`: powers of two on the k axis, and a
    value axis that need not start at 0.
    """
    figure, axes = _start(table, "k condition value low high")
    for condition, style in condition_styles(table["condition"]).items():
        rows = table[table["condition"] == condition].sort_values("k")
        low, high = rows["low"].astype(float), rows["high"].astype(float)
        axes.fill_between(rows["k"], low, high, color=style["color"], alpha=0.2, lw=0)
        axes.plot(rows["k"], rows["value"], **style, label=condition)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="samples per prompt, k", ylabel=ylabel)
    if log:
        ticks = sorted(table["k"].unique())
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(k) for k in ticks])
    else:
        axes.set_ylim(0, None)
    return finish(figure, _with_n(title, table) + ", with 95 % bands")


def category_heatmap(
    table: pd.DataFrame,
    *,
    label: str = "expected maximum toxicity",
    title: str = "Toxicity by prompt category",
) -> Figure:
    """Value of each category (rows, highest mean on top) and condition (columns), written in the cells.

    Where both name the same things, rows stand as columns do: each thing beside itself is the diagonal.
    Columns category, condition, value; if known, low and high (written below the value) and n (in the
    row's name).
    """
    categories = table.get("category", pd.Series(dtype=object)).nunique()
    figure, axes = _start(table, "category condition value", 1.7 + 0.62 * categories)
    values = table.pivot(index="category", columns="condition", values="value").astype(float)
    values = values[list(dict.fromkeys(table["condition"]))]
    order = values.mean(1).sort_values(ascending=False, kind="stable").index
    values = values.loc[values.columns if set(order) == set(values.columns) else order]
    bounds = [
        table.pivot(index="category", columns="condition", values=side).reindex_like(values)
        for side in ("low", "high")
        if side in table
    ]
    image = _cells(axes, values, "{:.2f}", bounds)
    names = [
        _with_n(str(name).replace("_", " "), table[table["category"] == name])
        for name in values.index
    ]
    axes.set_yticks(range(len(names)), [_plain(name) for name in names])
    figure.colorbar(image, ax=axes, label=label)
    return finish(figure, title)


def agreement_heatmap(
    table: pd.DataFrame,
    *,
    xlabel: str,
    ylabel: str,
    title: str = "Agreement of two annotations",
    label: str = "pairs",
) -> Figure:
    """Counts of a square table (rows: one annotation, columns: the other), agreement framed.

    `label`: what is counted.
    """
    figure, axes = _start(table.reset_index(), "", 1.5 + 0.7 * len(table))
    image = _cells(axes, table, "{:,.0f}")
    for k in range(len(table)):
        axes.add_patch(Rectangle((k - 0.48, k - 0.48), 0.96, 0.96, fill=False, lw=2.5))
    axes.set_yticks(range(len(table)), [_plain(name) for name in table.index])
    axes.set(xlabel=xlabel, ylabel=ylabel)
    figure.colorbar(image, ax=axes, label=label)
    return finish(figure, f"{title} (n = {int(table.to_numpy().sum()):,})")


def _cells(axes: Axes, values: pd.DataFrame, form: str, bounds: Sequence[pd.DataFrame] = ()):
    """A table as coloured cells, each value and its bounds written in; columns are named, rows are not."""
    image = axes.imshow(values.astype(float), cmap="cividis", aspect="auto")
    for (i, j), value in np.ndenumerate(values.to_numpy(float)):
        dark = image.norm(value) <= 0.55  # False where NaN: an empty cell is white
        text, colour = "-" if np.isnan(value) else form.format(value), "white" if dark else "black"
        place = dict(ha="center", color=colour)
        axes.text(j, i, text, va="bottom" if bounds else "center", **place)
        if bounds and not np.isnan(value):
            ends = " to ".join(form.format(side.iloc[i, j]) for side in bounds)
            axes.text(j, i, ends, va="top", fontsize=10, **place)
    axes.set_xticks(range(values.shape[1]), [_wrap(c, 16) for c in values.columns])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return image


# --- annotations ---------------------------------------------------------------------------------


def score_histogram(
    table: pd.DataFrame, *, xlabel: str = "rating", title: str = "How often each rating is given"
) -> Figure:
    """Share of each whole-number score, conditions side by side.  Columns condition, score."""
    figure, axes = _start(table, "condition score")
    styles = condition_styles(table["condition"])
    values = np.arange(table["score"].min(), table["score"].max() + 1)
    width = 0.8 / len(styles)
    hatches = ("", "///", "...", "xxx", "\\\\\\", "++", "oo", "**")
    for i, ((condition, style), hatch) in enumerate(zip(styles.items(), hatches, strict=False)):
        scores = table.loc[table["condition"] == condition, "score"]
        share = [(scores == value).mean() for value in values]
        left = values + (i - (len(styles) - 1) / 2) * width
        label = f"{condition} (n = {len(scores):,})"
        axes.bar(
            left, share, width, color=style["color"], hatch=hatch, edgecolor="white", label=label
        )
    axes.set_xticks(values)
    axes.set(xlabel=xlabel, ylabel="share")
    axes.grid(False, axis="x")
    return finish(figure, title)


def calibration_plot(
    table: pd.DataFrame,
    *,
    xlabel: str = "predicted probability that the first is preferred",
    title: str = "Predicted and observed preferences",
) -> Figure:
    """Observed against predicted shares, one point a bin with its interval; the diagonal is calibrated.

    Columns condition, predicted, value, low, high.
    """
    figure, axes = _start(table, "condition predicted value low high", 4.2)
    axes.plot([0, 1], [0, 1], color="0.5", lw=1, ls=":", label="calibrated")
    for condition, style in condition_styles(table["condition"]).items():
        rows = table[table["condition"] == condition].sort_values("predicted")
        axes.vlines(rows["predicted"], rows["low"], rows["high"], color=style["color"], lw=1)
        axes.plot(rows["predicted"], rows["value"], **style, label=condition)
    room = (-0.03, 1.03)  # markers at 0 and 1 are not cut
    axes.set(xlabel=xlabel, ylabel="observed share", xlim=room, ylim=room, aspect="equal")
    return finish(figure, title)


# --- training ------------------------------------------------------------------------------------


def learning_curve(
    table: pd.DataFrame,
    *,
    ylabel: str,
    xlabel: str = "step",
    title: str | None = None,
    reference: float | None = None,
) -> Figure:
    """A quantity over training: the arm's mean, the range over its seeds, and each as a thin line if few.

    Columns step, arm, seed, value.  `reference`: a horizontal line, such as the untrained model.
    """
    figure, axes = _start(table, "step arm seed value")
    for arm, style in condition_styles(table["arm"]).items():
        seeds = table[table["arm"] == arm].pivot(index="step", columns="seed", values="value")
        seeds = seeds.astype(float).sort_index()
        colour, count = style["color"], seeds.shape[1]
        if count > 1:
            if count <= MOST_LINES:
                axes.plot(seeds.index, seeds, color=colour, lw=0.6, alpha=0.6)
            low, high = seeds.min(axis=1), seeds.max(axis=1)
            axes.fill_between(seeds.index, low, high, color=colour, alpha=0.15, lw=0)
        every = max(1, len(seeds) // 10)
        label = f"{arm} ({count} seed{'s' * (count > 1)})"
        axes.plot(seeds.index, seeds.mean(axis=1), **style, markevery=every, label=label)
    _mark(axes.axhline, reference, "reference")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return finish(figure, title or f"{ylabel} over training: mean and range over seeds")


def coloured_text(
    tokens: Sequence[str], values: Sequence[float], *, title: str, label: str, per_line: int = 78
) -> Figure:
    """A text whose tokens stand on a colour each, by their value: blue below the middle, orange above.

    Values of both signs have 0 in the middle, others their mean.  `per_line`: characters.
    """
    if len(tokens) != len(values) or not len(tokens):
        raise ValueError(f"{len(tokens)} tokens and {len(values)} values; give one value a token.")
    use_style()
    values = np.asarray(values, dtype=float)
    middle = 0.0 if values.min() < 0 < values.max() else float(values.mean())
    reach = max(float(np.abs(values - middle).max()), 1e-9)
    shades = matplotlib.colors.LinearSegmentedColormap.from_list(
        "t", ["#4a90c8", "#ffffff", "#e8a33d"]
    )
    scale = matplotlib.colors.Normalize(middle - reach, middle + reach)
    places, line, column = [], 0, 0
    for token in tokens:
        shown = token.replace("\n", "\u21b5 ")
        if column and column + len(shown) > per_line:
            line, column = line + 1, 0
        places.append((line, column, shown))
        column += len(shown)
    figure = Figure(figsize=(WIDTH, 1.1 + 0.3 * (line + 1)), layout="constrained")
    axes = figure.subplots()
    for (row, start, shown), value in zip(places, values, strict=True):
        box = (start, -row - 0.42)
        axes.add_patch(Rectangle(box, len(shown), 0.84, color=shades(scale(value)), lw=0))
        axes.text(start, -row, _plain(shown), family="monospace", va="center", fontsize=9)
    axes.set(xlim=(0, per_line), ylim=(-line - 0.6, 0.6))
    axes.axis("off")
    bar = matplotlib.cm.ScalarMappable(scale, shades)
    look = {"orientation": "horizontal", "aspect": 50, "pad": 0.02}
    shown = figure.colorbar(bar, ax=axes, label=label, **look).ax
    if middle and values.min() < values.max():  # no colours for values that there are not
        shown.set_xlim(values.min(), values.max())
    return finish(figure, title)


def dense_rewards(
    table: pd.DataFrame, tokens: Sequence[str], *, title: str = "Rewards at their tokens"
) -> Figure:
    """An answer's tokens from left to right, each reward a stem at the token where it is paid.

    Columns position (token number), model, value; a token with several rewards has them side by side.
    """
    figure, axes = _start(table, "position model value", 3.4)
    figure.set_figwidth(max(WIDTH, 0.24 * len(tokens)))
    styles = condition_styles(table["model"])
    for i, (model, style) in enumerate(styles.items()):
        rows = table[table["model"] == model]
        place = rows["position"] + 0.25 * (i - (len(styles) - 1) / 2)
        axes.vlines(place, 0, rows["value"], color=style["color"], lw=2.5)
        total = rows["value"].sum()
        label = f"{model} (sum {total:+.2f})"
        axes.plot(place, rows["value"], **style | {"linestyle": ""}, label=label)
    axes.axhline(0, color="0.3", lw=1)
    shown = [_plain(str(token).strip() or repr(token)[1:-1]) for token in tokens]
    axes.set_xticks(range(len(shown)), shown, rotation=90)
    axes.set(xlabel="token", ylabel="reward", xlim=(-0.8, len(shown) - 0.2))
    axes.grid(False, axis="x")
    return finish(figure, title)


def token_heatmap(table: pd.DataFrame, tokens: Sequence[str], *, title: str, label: str) -> Figure:
    """An answer's tokens from left to right; each row of the table (rows, tokens) as coloured numbers.

    Red is below 0, blue above; rows stand in their order.  ValueError unless there is a column a token.
    """
    if table.shape[1] != len(tokens):
        raise ValueError(f"{table.shape[1]} columns for {len(tokens)} tokens; give one a token.")
    use_style()
    values = table.to_numpy(dtype=float)
    largest = max(np.abs(values).max(), 1e-9)
    figure = Figure(figsize=(max(WIDTH, 2.2 + 0.6 * len(tokens)), 1.3 + 0.5 * len(table)))
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if abs(value) > 0.6 * largest else "black"
        text = f"{value:+.2f}" if abs(value) >= 0.005 else "0"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)
    shown = [_plain(token.strip() or repr(token)[1:-1]) for token in tokens]
    axes.xaxis.tick_top()
    axes.set_xticks(range(len(tokens)), shown)
    axes.set_yticks(range(len(table)), [_plain(name) for name in table.index])
    axes.grid(False)
    figure.colorbar(image, ax=axes, label=label)
    return finish(figure, title)


def clipped_objective(clip: float = 0.2) -> Figure:
    """What a token adds to PPO's objective by the ratio of its probabilities, for A = +1 and A = -1."""
    import torch  # tables and figures do without it

    from lib import losses

    use_style()
    ratio = torch.linspace(0.4, 1.6, 241)
    one = torch.ones(1, 1)
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    for axes, advantage in zip(figure.subplots(1, 2, sharey=True), (1.0, -1.0), strict=True):
        gain = [
            -losses.policy_loss(x.log(), 0 * x, advantage * one, one, clip)
            for x in ratio.view(-1, 1, 1)
        ]
        axes.plot(ratio, advantage * ratio, color="0.6", ls="--", label="ratio x A")
        axes.plot(ratio, gain, color="black", label="PPO's objective")
        axes.axvspan(1 - clip, 1 + clip, color="0.92", label=f"within {clip:g} of 1")
        axes.axvline(1, color="0.3", lw=1, ls=":")
        wanted = "raise it" if advantage > 0 else "lower it"
        axes.set(xlabel="ratio: probability now / then", title=f"A = {advantage:+g}: {wanted}")
    figure.axes[0].set_ylabel("objective of this token")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def paths(table: pd.DataFrame, *, xlabel: str, ylabel: str, title: str) -> Figure:
    """What training buys and what it costs: each arm's way from its start, a larger mark at its end.

    Columns arm, step, x, y, in the order of an arm's steps.
    """
    figure, axes = _start(table, "arm step x y", 4.2)
    for arm, style in condition_styles(table["arm"]).items():
        rows = table[table["arm"] == arm].sort_values("step")
        line = style | {"markersize": 4}
        axes.plot(rows["x"], rows["y"], **line, label=arm)
        end = style | {"linestyle": "", "markersize": 10}
        axes.plot(rows["x"].iloc[-1:], rows["y"].iloc[-1:], **end)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return finish(figure, title)
