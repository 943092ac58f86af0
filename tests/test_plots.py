"""Figures: built from tables, readable in grey, honest about n; example tables: hidden and escaped."""

import io
import itertools
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from lib import plots
from lib.course import show

nan = np.nan
WAYS = ["raw continuation", "chat format", "chat format, courteous system prompt"]
GROUPS = ["expected maximum toxicity, k = 8 (profanity)", "toxic fraction (hate)"]


def intervals(first, second, **columns):
    """A row for each pair of names, with a value, an interval and n."""
    rows = []
    for i, (a, b) in enumerate(itertools.product(*columns.values())):
        names = dict(zip(columns, (a, b), strict=True))
        rows.append(names | dict(value=i * first, low=i * first - second, high=i * first + second))
    return pd.DataFrame(rows).assign(n=210)


TABLES = {
    "interval": intervals(0.1, 0.04, group=GROUPS, condition=WAYS),
    "k": intervals(0.05, 0.02, condition=["profanity", "hate"], k=range(1, 5)),
    "category": intervals(0.1, 0.1, category=["insult", "severe_toxicity"], condition=WAYS),
    "distribution": pd.DataFrame(
        {"condition": ["a"] * 5 + ["b"] * 2, "score": [0.1, 0.5, 0.5, 0.9, nan, 0.2, 0.8]}
    ),
    "calibration": pd.DataFrame(
        dict(
            condition=["a", "a", "b"],
            predicted=[0.9, 0.2, 0.5],
            value=[0.8, 0.3, 0.5],
            low=[0.7, 0.2, 0.4],
            high=[0.9, 0.4, 0.6],
        )
    ),
    "ratings": pd.DataFrame(
        {"condition": ["people"] * 4 + ["a model"] * 3, "score": [1, 7, 7, 4, 6, 6, 5]}
    ),
    "bounds": pd.DataFrame(
        [dict(label="measured_tox_RL_m", value=0.113, low=0.099, high=0.22, n=5549, n_missing=669)]
    ),
    "curve": pd.DataFrame(
        [(step, arm, seed, seed + step) for step in range(4) for arm in "xy" for seed in (0, 2)],
        columns=["step", "arm", "seed", "value"],
    ),
    "dense": pd.DataFrame(
        [(2, "R1", 0.3), (4, "R1", -0.3), (4, "R2", 0.5)], columns=["position", "model", "value"]
    ),
}
FIGURES = {
    "interval": lambda t: plots.interval_plot(t, xlabel="score", reference=0.0),
    "k": plots.curve_by_k,
    "category": plots.category_heatmap,
    "distribution": plots.toxicity_distribution,
    "bounds": lambda t: plots.bounds_plot(t, xlabel="share above 0.5"),
    "curve": lambda t: plots.learning_curve(t, ylabel="reward"),
    "ratings": plots.score_histogram,
    "calibration": plots.calibration_plot,
    "dense": lambda t: plots.dense_rewards(t, ["A", " lake", ".", "\n", "It"]),
}


def texts(figure):
    """Everything written in a figure."""
    FigureCanvasAgg(figure).draw()
    found = figure.findobj(lambda artist: hasattr(artist, "get_text"))
    return {text.get_text().replace("\n", " ") for text in found}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_has_title_labels_and_saves(name):
    figure = FIGURES[name](TABLES[name])
    axes, file = figure.axes[0], io.BytesIO()
    assert figure.get_suptitle()[0].isupper()
    if name != "category":  # the heat map's axes hold names, its colour bar the quantity
        assert axes.get_xlabel() and figure.legends
    figure.savefig(file, format="png", dpi=60)
    assert file.getvalue().startswith(b"\x89PNG")
    figure.savefig(io.StringIO(), format="svg")


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_is_cut_off_or_too_small(name):
    figure = FIGURES[name](TABLES[name])
    FigureCanvasAgg(figure).draw()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(box.x0, box.y0, width - box.x1, height - box.y1) > -0.03
    sizes = [t.get_fontsize() for t in figure.findobj(lambda a: hasattr(a, "get_fontsize"))]
    assert min(sizes) >= 10


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_lies_over_another(name):
    assert plots.overlapping(plots.make_room(FIGURES[name](TABLES[name]))) == []


def test_room_is_made_for_long_names_and_an_overlap_is_named():
    table = TABLES["k"]
    label = "gain over a blind choice of one answer (standard deviations of all answers)"
    figure = plots.curve_by_k(table, ylabel=label)
    assert any(label in pair for pair in plots.overlapping(figure))
    assert plots.overlapping(plots.make_room(figure)) == []
    assert figure.axes[0].get_ylabel().replace("\n", " ") == label
    tokens = ["initially", "recommended", "to", "those", "month", "october"] * 2
    rows = pd.DataFrame(np.zeros((2, len(tokens))), index=["reward", "advantage at the end"])
    figure = plots.token_heatmap(rows, tokens, title="Tokens", label="reward")
    assert ("initially", "recommended") in plots.overlapping(figure)
    assert plots.overlapping(plots.make_room(figure)) == []
    names = figure.axes[0].get_xticklabels()
    assert [name.get_text() for name in names] == tokens
    assert {name.get_rotation() for name in names} == {30}
    short = plots.token_heatmap(rows, ["a"] * len(tokens), title="Tokens", label="reward")
    assert plots.make_room(short).axes[0].get_xticklabels()[0].get_rotation() == 0


def test_a_legend_has_five_entries_at_most():
    names = ["a", "b", "c", "d", "e"]
    table = intervals(0.1, 0.04, group=["x"], condition=names)
    figure = plots.interval_plot(table, xlabel="score", reference=0.5)
    assert [text.get_text() for text in figure.legends[0].texts] == names
    assert "0.5" in texts(figure)
    four = plots.interval_plot(table[:4], xlabel="score", reference=0.5)
    assert four.legends[0].texts[-1].get_text() == "reference 0.5"


def test_n_is_written():
    assert "(n = 210)" in plots.interval_plot(TABLES["interval"], xlabel="x").get_suptitle()
    mixed = TABLES["interval"].assign(n=[90, 96, 96, 96, 96, 1200])
    assert "(n = 90 to 1,200)" in plots.interval_plot(mixed, xlabel="x").get_suptitle()
    written = " ".join(texts(plots.toxicity_distribution(TABLES["distribution"])))
    assert "a (n = 4, 1 missing)" in written and "b (n = 2)" in written
    assert "severe toxicity (n = 210)" in texts(plots.category_heatmap(TABLES["category"]))
    written = texts(plots.bounds_plot(TABLES["bounds"], xlabel="x"))
    assert "measured_tox_RL_m 669 of 5,549 missing" in written
    assert "x (2 seeds)" in texts(plots.learning_curve(TABLES["curve"], ylabel="reward"))


def test_conditions_differ_without_colour():
    styles = plots.condition_styles("abcdefgh").values()
    assert len({s["marker"] for s in styles}) == len({str(s["linestyle"]) for s in styles}) == 8
    greys = [np.dot(to_rgb(s["color"]), [0.3, 0.59, 0.11]) for s in styles]
    assert max(greys) < 0.85  # visible on white
    lines = plots.curve_by_k(TABLES["k"]).axes[0].lines
    assert lines[0].get_linestyle() != lines[1].get_linestyle()
    assert lines[0].get_marker() != lines[1].get_marker()
    with pytest.raises(ValueError, match="9 conditions"):
        plots.condition_styles("abcdefghi")


def test_a_category_keeps_its_style_where_others_are_absent():
    kind = pd.CategoricalDtype(["PT", "FT", "PPO"])
    everything = plots.condition_styles(pd.Series(["PT", "FT", "PPO"], dtype=kind))
    some = plots.condition_styles(pd.Series(["PPO", "FT", "PPO"], dtype=kind))
    assert list(some) == ["FT", "PPO"]
    assert all(some[name] == everything[name] for name in some)
    rows = pd.DataFrame({"group": "g", "condition": ["PPO"], "value": 1.0, "low": 0.0, "high": 2.0})
    drawn = plots.interval_plot(rows.astype({"condition": kind}), xlabel="x")
    labels = drawn.axes[0].get_legend_handles_labels()[1]
    assert labels == ["PPO"]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.2, 0.5, 0.7, 1.0]), min_size=1, max_size=12))
def test_survival_curve_is_the_share_at_or_above_x(scores):
    table = pd.DataFrame({"condition": "a", "score": scores})
    line = plots.toxicity_distribution(table, log=False).axes[0].lines[0]
    x, y = line.get_data()
    for at in set(scores) - {0.0}:  # a step up to and including x has the height at the first x
        assert y[list(x).index(at)] == pytest.approx(np.mean(np.array(scores) >= at))


def test_intervals_are_drawn_where_the_table_says():
    table = TABLES["interval"].assign(low=lambda t: t.low.where(t.index != 1))  # one bound missing
    axes = plots.interval_plot(table, xlabel="x").axes[0]
    drawn = [s[:, 0] for c in axes.collections for s in c.get_segments() if len(s)]
    expected = table.sort_values("condition", key=lambda c: c.map(WAYS.index), kind="stable")
    np.testing.assert_allclose(drawn, expected[["low", "high"]].dropna().to_numpy())
    dots = np.concatenate([line.get_xdata() for line in axes.lines[: len(WAYS)]])
    np.testing.assert_allclose(dots, expected["value"])
    heights = np.concatenate([line.get_ydata() for line in axes.lines[: len(WAYS)]])
    assert len(set(heights)) == len(table)  # no two dots on one another


def test_a_row_without_missing_scores_keeps_its_dot_inside():
    row = dict(label="m", value=0.5, low=0.5, high=0.5, n=10, n_missing=0)
    axes = plots.bounds_plot(pd.DataFrame([row]), xlabel="x").axes[0]
    assert axes.get_xlim()[0] == 0 and axes.get_xlim()[1] > 0.5


def test_heatmap_sorts_and_writes_values():
    table = TABLES["category"].assign(value=[0.0, 0.1, nan, 0.31, 0.4, 0.5])
    figure = plots.category_heatmap(table)
    assert figure.axes[0].get_yticklabels()[0].get_text().startswith("severe toxicity")
    cells = {t.get_text(): t.get_color() for t in figure.axes[0].texts}
    assert {"0.31", "0.50", "-"} <= set(cells) and "0.20 to 0.40" in cells
    assert (cells["-"], cells["0.00"], cells["0.50"]) == ("black", "white", "black")


def test_a_square_heatmap_has_its_diagonal():
    rows = [(a, b, float(a == b) + 0.1 * (b == "b")) for a in "abc" for b in "abc"]
    figure = plots.category_heatmap(pd.DataFrame(rows, columns=["category", "condition", "value"]))
    shown = [
        [label.get_text() for label in labels]
        for labels in (figure.axes[0].get_xticklabels(), figure.axes[0].get_yticklabels())
    ]
    assert shown == [["a", "b", "c"]] * 2


def test_agreement_shows_every_count_and_frames_the_diagonal():
    counts = [[19, 8, 10], [11, 21, 7], [6, 9, 1026]]
    table = pd.DataFrame(counts, index=list("a=b"), columns=list("a=b"))
    axes = plots.agreement_heatmap(table, xlabel="rankings", ylabel="ratings").axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("rankings", "ratings")
    assert sorted(t.get_text() for t in axes.texts)[-3:] == ["7", "8", "9"]
    assert "1,026" in {t.get_text() for t in axes.texts} and len(axes.patches) == 3


def test_calibration_sorts_by_prediction_and_draws_the_diagonal():
    axes = plots.calibration_plot(TABLES["calibration"]).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    np.testing.assert_allclose(lines["a"].get_xydata(), [[0.2, 0.3], [0.9, 0.8]])
    np.testing.assert_allclose(lines["calibrated"].get_xydata(), [[0, 0], [1, 1]])
    assert axes.get_xlim()[0] < 0 and axes.get_ylim()[1] > 1  # markers on the border stay whole


def test_k_can_be_drawn_in_powers_of_two():
    axes = plots.curve_by_k(TABLES["k"].assign(k=lambda t: 2.0 ** t["k"]), log=True).axes[0]
    assert axes.get_xscale() == "log"


def test_learning_curve_shows_mean_and_range():
    axes = plots.learning_curve(TABLES["curve"], ylabel="reward", reference=1.5).axes[0]
    mean = next(line for line in axes.lines if line.get_label().startswith("x "))
    np.testing.assert_allclose(mean.get_ydata(), [1, 2, 3, 4])
    assert any(line.get_label() == "reference 1.5" for line in axes.lines)
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == 0 and band[:, 1].max() == 5


def test_many_seeds_are_a_band_without_a_line_each():
    table = pd.concat([TABLES["curve"].assign(seed=seed) for seed in range(12)])
    table = table.drop_duplicates(["step", "arm", "seed"])
    axes = plots.learning_curve(table, ylabel="reward").axes[0]
    assert len(axes.lines) == table.arm.nunique() == len(axes.collections)


def test_dense_rewards_stand_side_by_side_at_their_tokens():
    figure = FIGURES["dense"](TABLES["dense"])
    assert {"A", "lake", "\\n", "R1 (sum +0.00)", "R2 (sum +0.50)"} <= texts(figure)
    first, second = (line.get_xdata() for line in figure.axes[0].lines[:2])
    np.testing.assert_allclose(np.round(first), [2, 4])
    assert second[0] > first[1] and round(second[0]) == 4


@pytest.mark.parametrize("name", FIGURES)
def test_missing_columns_and_empty_tables_are_refused(name):
    table = TABLES[name]
    numbers = "value" if "value" in table else "score"
    with pytest.raises(ValueError, match=f"no column {numbers}; needed: .*; found: "):
        FIGURES[name](table.drop(columns=numbers))
    with pytest.raises(ValueError, match="no rows"):
        FIGURES[name](table.head(0))


# --- texts that may offend -----------------------------------------------------------------------

ROWS = [
    {"prompt": "<script>alert('x')</script> & more", "text": "you fool", "score": 0.9123},
    {"prompt": "it cost $5 and $10", "text": " ", "score": nan},
]


def summaries_only(markup):
    """What a page shows before anybody clicks: styles stripped and closed <details> left out."""
    markup = re.sub(r"<style>.*?</style>", "", markup, flags=re.DOTALL)
    return re.sub(r"</summary>.*?</details>", "</summary>", markup)


def test_texts_are_hidden_until_opened_even_without_styles():
    shown = show.blurred_examples(ROWS)
    assert "you fool" in shown.data and "you fool" not in summaries_only(shown.data)
    assert "fool" not in repr(shown) and "8 characters" in repr(shown)
    assert "0.91" in shown.data and "missing" in shown.data and "<i>empty</i>" in shown.data
    assert shown.data.count("<details>") == shown.data.count("<summary") == 3  # all closed
    revealed = show.blurred_examples(ROWS, reveal=True)
    assert "<details>" not in revealed.data and "you fool" in revealed.data
    assert "you fool" in repr(revealed)


def test_only_the_named_columns_are_hidden():
    shown = summaries_only(show.blurred_examples(ROWS, text_columns=["prompt"]).data)
    assert "you fool" in shown and "more" not in shown
    with pytest.raises(ValueError, match="no column reply; allowed: prompt, text, score"):
        show.blurred_examples(ROWS, text_columns=["reply"])


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_any_text_is_escaped_and_kept(text):
    from html.parser import HTMLParser

    class Reader(HTMLParser):
        tags, heard = set(), ""

        def handle_starttag(self, tag, attrs):
            self.tags = self.tags | {tag}

        def handle_data(self, data):
            self.heard += data

    hostile = f"<img src=x onerror=alert(1)>{text}$a$ \\(b\\)"
    shown = show.blurred_examples([{f"<b>{hostile}": hostile}], reveal=True).data
    reader = Reader()
    reader.feed(re.sub(r"<style>.*?</style>", "", shown, flags=re.DOTALL))
    assert reader.tags <= {"div", "table", "thead", "tbody", "tr", "th", "td", "bdi", "span"}
    kept = hostile.encode("utf-8", "replace").decode()
    assert f"<b>{kept}{kept}" in reader.heard
    assert "$a$" not in shown and "\\(" not in shown  # no page takes it for a formula


def test_coloured_text_gives_every_token_a_box_of_its_colour():
    tokens = ["One", " day", " a", " ship", "\n", " came"] * 12
    figure = plots.coloured_text(
        tokens, [-1.0, 2.0, 0.0, 1.0, -2.0, 0.5] * 12, title="t", label="nats"
    )
    boxes = figure.axes[0].patches
    assert len(boxes) == len(tokens) and len({box.get_y() for box in boxes}) > 2  # wrapped
    colours = [box.get_facecolor() for box in boxes[:3]]
    assert colours[2][:3] == pytest.approx((1, 1, 1), abs=0.01) and colours[0] != colours[1]
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert "".join(texts).startswith("One day a ship↵  came")
    bar = figure.axes[1].get_xlim()
    assert bar == (-2, 2)
    below = plots.coloured_text(tokens, [-1.0, -4.0, -3.0] * 24, title="t", label="nats")
    assert below.axes[1].get_xlim() == (-4, -1)  # not up to +1.7, beyond any log-probability
    with pytest.raises(ValueError, match="2 tokens and 1 values"):
        plots.coloured_text(["a", "b"], [1.0], title="t", label="nats")


def test_dollars_in_texts_are_no_formulas():
    odd = ["$5 to $10", "$$", r"$\bad$"]
    table = pd.DataFrame({"group": odd, "condition": odd, "value": 1.0, "low": 0.0, "high": 2.0})
    row = pd.DataFrame([[1.0, 2.0, 3.0]], index=odd[2:])
    square = pd.DataFrame(np.eye(3), index=odd, columns=odd)
    bounds = pd.DataFrame(
        {"label": odd, "value": 0.2, "low": 0.1, "high": 0.3, "n": 9, "n_missing": 1}
    )
    stems = pd.DataFrame({"position": 0, "model": odd, "value": 1.0})
    for figure in (
        plots.interval_plot(table, xlabel="x", title=odd[2]),
        plots.bounds_plot(bounds, xlabel="x"),
        plots.category_heatmap(table.assign(category=odd)),
        plots.agreement_heatmap(square, xlabel="x", ylabel="y"),
        plots.coloured_text(odd, [0.0, 1.0, 2.0], title="t", label="l"),
        plots.token_heatmap(row, odd, title="t", label="l"),
        plots.dense_rewards(stems, odd),
    ):
        figure.savefig(io.BytesIO(), format="svg")  # matplotlib parses formulas as it draws


def test_drawings_show_every_token_and_where_the_objective_is_flat():
    table = pd.DataFrame([[0.5, 0, -1.0], [0, 0, 2.0]], index=["paid", "credited"])
    axes = plots.token_heatmap(table, ["a", "b", "."], title="t", label="l").axes[0]
    assert [text.get_text() for text in axes.texts] == ["+0.50", "0", "-1.00", "0", "0", "+2.00"]
    with pytest.raises(ValueError, match="3 columns for 2 tokens"):
        plots.token_heatmap(table, ["a", "b"], title="t", label="l")
    for axes, flat in zip(plots.clipped_objective(0.2).axes[:2], (1.2, 0.8), strict=True):
        ratio, gain = (np.asarray(x, dtype=float) for x in axes.lines[1].get_data())
        beyond = ratio > flat + 0.01 if flat > 1 else ratio < flat - 0.01
        assert np.ptp(gain[beyond]) < 1e-6 and np.ptp(gain[~beyond]) > 0.5


def test_a_panel_with_a_legend_of_its_own_is_not_in_the_figures():
    figure = Figure()
    left, right = figure.subplots(1, 2)
    left.plot([0, 1], label="here")
    left.legend()
    right.plot([0, 1], label="below")
    plots.finish(figure, "title")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["below"]
