"""Do ratings and rankings disagree more than one annotator disagrees with itself?

Every pair of responses gets two preferences by ratings and two by rankings, asked in two wordings.  With one
yardstick behind both protocols, and noise of its own on every asking, the correlation across protocols is
the geometric mean of the correlations within (Spearman's attenuation, 1904).  For normal preferences the
share of pairs with the same sign is 1/2 + arcsin(correlation) / pi (Sheppard, 1899).  So the two agreements
within say which agreement across one yardstick gives; what is missing below that is the protocols' own.

Simplified: preferences of real pairs are not normal.  Where some pairs are much easier than others and one
protocol is much noisier, one yardstick agrees a little less than the formula says: in what a test tries, by
`UNEVEN` at most.  So an effect is one only below that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from lib import preferences, stats

WITHIN = ("ratings, asked twice", "rankings, asked twice")
ACROSS, EXPECTED, EFFECT = "ratings against rankings", "one yardstick", "protocol effect"
SMALLEST = 0.05  # effect that matters
UNEVEN = 0.03  # shown by one yardstick as an effect, at most, where pairs are not equally hard
PREFERENCES = ["rating_0", "rating_1", "ranking_0", "ranking_1"]


def occasions(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The first and the second annotation of each thing in a ratings or rankings table."""
    first = preferences.first_of_each(table)
    return first, preferences.first_of_each(table.drop(first.index))


def asked_twice(ratings: Sequence[pd.DataFrame], rankings: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """A row for each pair that both protocols judged on both occasions: prompt, and `PREFERENCES`.

    ratings, rankings: two tables each.  A preference is for the first response: the difference of its
    rating and the other's; P(first) - 1/2, or +1, 0, -1 where a rankings table has verdicts only.
    """
    tables = []
    for k, (rated, ranked) in enumerate(zip(ratings, rankings, strict=True)):
        scores = dict(zip(_keys(rated, ["response"]), rated["score"].astype(float), strict=True))
        sides = [_keys(ranked, [name]) for name in ("response1", "response2")]
        left, right = ([scores.get(key, np.nan) for key in keys] for keys in sides)
        by_rank = ranked["verdict"].map({"(a)": 1.0, "equal": 0.0, "(b)": -1.0})
        if "p_first" in ranked:
            by_rank = ranked["p_first"] - 0.5
        columns = {f"rating_{k}": np.subtract(left, right), f"ranking_{k}": by_rank.to_numpy()}
        index = pd.MultiIndex.from_tuples(_keys(ranked, ["response1", "response2"]))
        rows = pd.DataFrame(columns, index=index, dtype=float)
        tables.append(rows[~rows.index.duplicated()])
    pairs = tables[0].join(tables[1], how="inner").dropna()
    prompts = [key[:2] for key in pairs.index]
    return pairs.assign(prompt=pd.factorize(pd.Series(prompts, dtype=object))[0])


def _keys(table: pd.DataFrame, responses: list[str]) -> list[tuple]:
    return preferences.text_keys(table, [*preferences.ITEM, *responses])


def same_side(a: np.ndarray, b: np.ndarray) -> float:
    """Share of pairs in which both preferences are for the same response; no preference counts one half."""
    return float((1 + np.sign(a) * np.sign(b)).mean() / 2)


def one_yardstick(ratings: float, rankings: float) -> float:
    """The agreement across protocols that one yardstick gives, from the agreements within; see above.

    Agreement within of one half or less is all noise: then 1/2.
    """
    shares = np.clip([ratings, rankings], 0.5, 1.0)
    correlations = np.sin(np.pi * (shares - 0.5))
    return float(0.5 + np.arcsin(np.sqrt(correlations.prod())) / np.pi)


def agreements_of(*pairs: np.ndarray) -> dict[str, float]:
    """The agreements of `PREFERENCES`: within, across (mean of the four crossings), expected, the effect."""
    ratings, rankings = pairs[:2], pairs[2:]
    within = same_side(*ratings), same_side(*rankings)
    across = float(np.mean([same_side(a, b) for a in ratings for b in rankings]))
    expected = one_yardstick(*within)
    values = dict(zip(WITHIN, within, strict=True))
    return values | {ACROSS: across, EXPECTED: expected, EFFECT: across - expected}


def agreements(pairs: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """`agreements_of` a table of `asked_twice`, prompts resampled: name, value, low, high, n (prompts)."""
    columns = tuple(pairs[name].to_numpy() for name in PREFERENCES)
    rows = []
    for name in (*WITHIN, ACROSS, EXPECTED, EFFECT):
        interval = stats.bootstrap(
            columns,
            lambda *draw, name=name: agreements_of(*draw)[name],
            clusters=pairs["prompt"].to_numpy(),
            seed=seed,
        )
        rows.append({"name": name, **interval._asdict()})
    return pd.DataFrame(rows)


def simulate(
    prompts: int,
    pairs: int,
    *,
    noise: tuple[float, float],
    apart: float,
    seed: int,
    uneven: float = 0.0,
) -> pd.DataFrame:
    """Preferences of an annotator made by hand, as `asked_twice` gives them.

    Args:
        noise: standard deviation of what every rating and every ranking adds by chance; the yardstick's
            own is 1.
        apart: the angle between the two yardsticks, 0 (one and the same) to pi / 2 (independent).
        uneven: how much pairs differ in difficulty: the standard deviation of the logarithm of the
            yardstick's size, over pairs.
    """
    rng = np.random.default_rng(seed)
    n = prompts * pairs
    one, other = rng.standard_normal((2, n))
    second = np.cos(apart) * one + np.sin(apart) * other
    table = pd.DataFrame({"prompt": np.repeat(np.arange(prompts), pairs)})
    for k in (0, 1):
        table[f"rating_{k}"] = one + noise[0] * rng.standard_normal(n)
        table[f"ranking_{k}"] = second + noise[1] * rng.standard_normal(n)
    if uneven:
        extra = np.exp(uneven * rng.standard_normal(n)) - 1
        table[PREFERENCES[:2]] += (extra * one)[:, None]
        table[PREFERENCES[2:]] += (extra * second)[:, None]
    return table


def decide(effect: stats.Interval) -> tuple[str, bool]:
    """The verdict on "they disagree more than noise explains", and whether the protocols are alike.

    Same direction: the interval lies below -`UNEVEN`; opposite: above 0.  Alike: within `SMALLEST` of 0.
    """
    alike = effect.low > -SMALLEST and effect.high < SMALLEST
    if effect.high < -UNEVEN:
        return "same direction", alike
    return stats.decide(effect, better="lower") if effect.low > 0 else "not demonstrated", alike
