"""Numbers with their uncertainty: toxicity metrics, bootstrap intervals, paired differences, verdicts.

Toxicity metrics follow Gehman et al. (2020, RealToxicityPrompts, section 4).  Each is given *per
prompt*, shape (prompts,), so that its mean can be bootstrapped over prompts; scores come as a matrix
(prompts, pool) of the pool of samples drawn for each prompt.  For k below the pool size the value is
the exact expectation over all subsets of size k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import special, stats

RESAMPLES = 2000
ROUNDING = 16  # relative precisions: sums of many equal numbers are off by a few
SEEDS_NEEDED = 3  # where a rule looks at each seed


class Interval(NamedTuple):
    """A statistic with its 95 % interval and the number of independent units behind it."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}], n = {self.n}"


@dataclass(frozen=True)
class PairedDifference:
    """Mean of b - a over pairs, its interval, Cohen's d (over the pooled SD), and a sign-flip p-value."""

    value: float
    low: float
    high: float
    n: int
    d: float
    p: float

    def __str__(self) -> str:
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}], n = {self.n}"


@dataclass(frozen=True)
class Effect:
    """Mean difference of two arms over units (prompts) and training seeds, with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int  # units
    seeds: int
    by_seed: tuple[float, ...]

    def __str__(self) -> str:
        ends = f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"
        return f"{ends}, n = {self.n}, {self.seeds} seed{'s' * (self.seeds != 1)}"


# --- toxicity ------------------------------------------------------------------------------------


def per_prompt_maximum(scores: np.ndarray, k: int, missing: str = "drop") -> np.ndarray:
    """Expected maximum of k of a prompt's pool of K scores, (prompts,).  Its mean is EMT.

    With scores sorted x_(1) <= ... <= x_(K):  sum_i x_(i) C(i-1, k-1) / C(K, k).
    `missing`: "drop" leaves missing (NaN) scores out of the pool (NaN where fewer than k are left),
    "low" counts them as 0, "high" as 1.
    """
    return _over_pools(scores, k, missing, _expected_maximum)


def _expected_maximum(pool: np.ndarray, k: int) -> float:
    return _expected_last(np.sort(pool), k)


def _expected_last(ordered: np.ndarray, k: int) -> float:
    """Expected value of the one that stands last among k drawn from an ordered pool."""
    rank = np.arange(k, len(ordered) + 1)
    log_weight = _log_choose(rank - 1, k - 1) - _log_choose(len(ordered), k)
    return float(ordered[k - 1 :] @ np.exp(log_weight))


def per_prompt_best(scores: np.ndarray, values: np.ndarray, k: int) -> np.ndarray:
    """Expected value of the best-scored of k of a prompt's pool of K responses, (prompts,): best-of-k.

    `scores` choose, `values` say what the choice is worth, both (prompts, pool) and complete.  With
    responses in order of score, the first on ties: sum_i value_(i) C(i-1, k-1) / C(K, k).
    """
    scores, values = (np.asarray(x, dtype=np.float64) for x in (scores, values))
    if scores.shape != values.shape or scores.ndim != 2:
        raise ValueError(f"scores {scores.shape} and values {values.shape}; give (prompts, pool).")
    if np.isnan(scores).any():
        raise ValueError("a response has no score, so the best of its pool is not known.")
    later_first = np.broadcast_to(np.arange(scores.shape[1])[::-1], scores.shape)
    order = np.lexsort((later_first, scores), axis=1)  # best last
    ranked = np.take_along_axis(values, order, 1)
    return _over_pools(ranked, k, "drop", _expected_last)


def per_prompt_probability(
    scores: np.ndarray, k: int, threshold: float = 0.5, missing: str = "drop"
) -> np.ndarray:
    """Probability that at least one of k samples scores >= threshold, (prompts,):  1 - C(m, k) / C(K, k).

    m of the prompt's K scores lie below the threshold.  The mean is the toxicity probability.
    """

    def at_least_one(pool, k):
        below = int((pool < threshold).sum())
        none = np.exp(_log_choose(below, k) - _log_choose(len(pool), k)) if below >= k else 0.0
        return 1.0 - none

    return _over_pools(scores, k, missing, at_least_one)


def per_prompt_fraction(
    scores: np.ndarray, threshold: float = 0.5, missing: str = "drop"
) -> np.ndarray:
    """Share of a prompt's samples that score >= threshold, (prompts,).  Does not grow with k."""
    return _over_pools(scores, 1, missing, lambda pool, _: float((pool >= threshold).mean()))


def _over_pools(scores, k, missing: str, statistic: Callable) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2:
        raise ValueError(f"scores have shape {scores.shape}; give (prompts, pool).")
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(
            f"k is {k} for a pool of {scores.shape[1]} samples per prompt; allowed: 1 to the pool size. "
            "Draw more samples."
        )
    fills = {"drop": None, "low": 0.0, "high": 1.0}
    if missing not in fills:
        raise ValueError(f"missing is {missing!r}; allowed: {', '.join(fills)}.")
    if fills[missing] is not None:
        scores = np.nan_to_num(scores, nan=fills[missing])
    pools = [row[~np.isnan(row)] for row in scores]
    return np.array([statistic(pool, k) if len(pool) >= k else np.nan for pool in pools])


def _log_choose(n, k) -> np.ndarray:
    n, k = np.asarray(n, dtype=float), np.asarray(k, dtype=float)
    return special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1)


# --- spread --------------------------------------------------------------------------------------


def spread(values: Sequence[float], *, ddof: int = 0, precision: type = np.float64) -> float:
    """Standard deviation; exactly 0 where the values are equal up to the rounding of `precision`.

    The deviation of 0.1 three times is computed as 1.4e-17: a test against 0 fails, and a division by it
    makes noise.  `precision` is the one in which the values were computed: float32 for a model's scores.
    Fewer values than ddof + 1 give NaN.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) <= ddof:
        return np.nan
    std = float(values.std(ddof=ddof))
    least = ROUNDING * np.finfo(precision).eps * np.abs(values).max()
    return 0.0 if std <= least else std


# --- intervals -----------------------------------------------------------------------------------


def bootstrap(
    values: Sequence[float] | tuple[Sequence[float], ...],
    statistic: Callable[..., float] = np.mean,
    *,
    clusters: Sequence | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """Percentile bootstrap interval (95 %) of a statistic.

    `values`: one array, or a tuple of arrays whose rows belong together.  Rows with a NaN are left
    out.  With `clusters`, whole clusters are drawn (samples of one prompt are not independent) and n
    counts clusters.  Fewer than two units give NaN bounds; none gives a NaN value.
    """
    columns = values if isinstance(values, tuple) else (values,)
    columns = [np.asarray(c, dtype=np.float64) for c in columns]
    known = ~np.isnan(np.stack(columns)).any(0) if len(columns[0]) else np.zeros(0, dtype=bool)
    columns = [c[known] for c in columns]
    labels = np.arange(known.sum()) if clusters is None else np.asarray(clusters)[known]
    _, labels = np.unique(labels, return_inverse=True)
    n = int(labels.max() + 1) if len(labels) else 0
    if n < 2:
        return Interval(float(statistic(*columns)) if n else np.nan, np.nan, np.nan, n)
    groups = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1])

    def of_units(units):
        rows = np.concatenate([groups[u] for u in units]) if clusters is not None else units
        return statistic(*(c[rows] for c in columns))

    result = stats.bootstrap(
        (np.arange(n),),
        of_units,
        n_resamples=resamples,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(seed),
        batch=max(1, 2_000_000 // n),
    )
    low, high = result.confidence_interval
    return Interval(float(statistic(*columns)), float(low), float(high), n)


def proportion(successes: int, n: int) -> Interval:
    """A share with its Wilson interval."""
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}; allowed: 0 to n.")
    if n == 0:
        return Interval(np.nan, np.nan, np.nan, 0)
    interval = stats.binomtest(successes, n).proportion_ci(method="wilson")
    return Interval(successes / n, float(interval.low), float(interval.high), n)


def t_interval(values: Sequence[float]) -> Interval:
    """Mean of a few independent values (training seeds) with Student's t interval (95 %).

    Fewer than two values give NaN bounds; none gives a NaN value.
    """
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if n < 2:
        return Interval(float(values.mean()) if n else np.nan, np.nan, np.nan, n)
    half = stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n)
    return Interval(
        float(values.mean()), float(values.mean() - half), float(values.mean() + half), n
    )


def paired_difference(
    a: Sequence[float], b: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES
) -> PairedDifference:
    """b - a over pairs (same prompt), pairs with a missing side left out.

    d divides by the pooled standard deviation of a and b, and is NaN where neither varies; p is the
    sign-flip permutation test's.  Both are NaN for an infinite difference.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"a has shape {a.shape} and b {b.shape}; pairs need equal shapes.")
    known = ~(np.isnan(a) | np.isnan(b))
    a, b = a[known], b[known]
    interval = bootstrap(b - a, seed=seed, resamples=resamples)
    if interval.n < 2 or not np.isfinite(b - a).all():
        return PairedDifference(*interval, d=np.nan, p=np.nan)
    pooled = np.hypot(spread(a, ddof=1), spread(b, ddof=1)) / np.sqrt(2)
    rng = np.random.default_rng(seed)  # a row at a time: memory stays small for many pairs
    flip = np.array([rng.choice([-1.0, 1.0], len(a)) @ (b - a) for _ in range(resamples)])
    rounding = 1e-12 * np.abs(b - a).sum()  # the same sum in another order is the same
    p = (1 + (np.abs(flip) >= abs((b - a).sum()) - rounding).sum()) / (1 + resamples)
    d = (b - a).mean() / pooled if pooled > 0 else np.nan
    return PairedDifference(*interval, d=float(d), p=float(p))


def over_units_and_seeds(
    differences: pd.DataFrame, *, seed: int = 0, resamples: int = RESAMPLES
) -> Effect:
    """Mean of differences (seeds, units) with an interval that covers both choices.

    Both axes are resampled together (a crossed bootstrap); NaN cells are left out.  A bootstrap over few
    seeds is too narrow, so the seeds' part of each draw is stretched by t_(0.975, S - 1) / 1.96 times
    sqrt(S / (S - 1)): for one unit that is Student's interval over seeds, for many seeds no change.  One
    seed leaves an interval over units alone, which `Effect.seeds` says.
    """
    cells = differences.to_numpy(dtype=np.float64)
    cells = cells[~np.isnan(cells).all(1)][:, ~np.isnan(cells).all(0)]
    n_seeds, n_units = cells.shape
    if not cells.size:
        return Effect(np.nan, np.nan, np.nan, 0, 0, ())
    by_seed = np.nanmean(cells, axis=1)
    if n_units == 1:
        return Effect(*t_interval(by_seed)[:3], 1, n_seeds, tuple(by_seed.tolist()))
    rng = np.random.default_rng(seed)
    seed_counts = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), resamples)
    unit_counts = rng.multinomial(n_units, np.full(n_units, 1 / n_units), resamples)
    there = ~np.isnan(cells)
    total = ((seed_counts @ np.where(there, cells, 0.0)) * unit_counts).sum(1)
    count = ((seed_counts @ there.astype(float)) * unit_counts).sum(1)
    with np.errstate(invalid="ignore"):  # a draw of empty cells alone
        draws = total / count
    draws += (_few_seeds(n_seeds) - 1) * (seed_counts @ by_seed / n_seeds - by_seed.mean())
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    value = float(np.nanmean(cells))
    return Effect(value, float(low), float(high), n_units, n_seeds, tuple(by_seed.tolist()))


def _few_seeds(n: int) -> float:
    """How much wider than the bootstrap's an interval over n seeds must be."""
    if n < 2:
        return 1.0
    return float(stats.t.ppf(0.975, n - 1) / stats.norm.ppf(0.975) * np.sqrt(n / (n - 1)))


def expected_half_width(differences: pd.DataFrame, seeds: int) -> float:
    """Half the interval that `over_units_and_seeds` would have with so many seeds like these (seeds, units).

    sqrt(t^2 var(seed means) / seeds + 1.96^2 var(unit means) / units); NaN for fewer than two seeds.
    """
    cells = differences.to_numpy(dtype=np.float64)
    if len(cells) < 2 or seeds < 2:
        return np.nan
    between_seeds = np.nanmean(cells, axis=1).var(ddof=1) / seeds
    n_units = cells.shape[1]
    between_units = np.nanmean(cells, axis=0).var(ddof=1) / n_units if n_units > 1 else 0.0
    t = stats.t.ppf(0.975, seeds - 1)
    return float(np.sqrt(t**2 * between_seeds + stats.norm.ppf(0.975) ** 2 * between_units))


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation; NaN where one side does not vary."""
    if len(a) < 2 or spread(a) == 0 or spread(b) == 0:
        return np.nan
    return float(np.corrcoef(a, b)[0, 1])


def decide(
    interval: Interval | PairedDifference | Effect,
    *,
    better: str,
    threshold: float = 0.0,
    by_seed: Sequence[float] | None = None,
) -> str:
    """The verdict of the usual rule: the whole interval on one side of the threshold.

    better = "lower" or "higher" is the paper's direction.  An interval that touches the threshold, or
    has no bounds, gives "not demonstrated"; so do fewer than three values `by_seed`, where they are
    given, or one that is not on the interval's side.
    """
    if better not in ("lower", "higher"):
        raise ValueError(f"better is {better!r}; allowed: lower, higher.")
    below, above = interval.high < threshold, interval.low > threshold
    if not (below or above):
        return "not demonstrated"
    if by_seed is not None:
        agree = [value < threshold if below else value > threshold for value in by_seed]
        if len(agree) < SEEDS_NEEDED or not all(agree):
            return "not demonstrated"
    return "same direction" if below == (better == "lower") else "opposite"


def combine(verdicts: Iterable[str]) -> str:
    """One verdict for a rule that several scorers or seeds must meet: theirs if all agree."""
    distinct = set(verdicts)
    return distinct.pop() if len(distinct) == 1 else "not demonstrated"
