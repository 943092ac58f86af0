"""Arms of an experiment: the rows of all training runs, their paired effects, and the claims on them.

    arms = Arms(run, unit="prompt_index")
    arms.add(rows, arm="dense", seed=SEED)        # live: a row a sample, with its unit and what was measured
    arms.with_stored(stored.get("scores"))        # stored seeds; what ran live goes first
    arms.effects([("holistic", "dense")], ["total", "f1"])
    arms.claim("dense ends with more reward", "holistic", "dense", "total", better="higher", smallest=0.1)

An effect is b - a over units (prompts) and training seeds, both resampled; `minus` takes a control's
effect away.  The rule of every claim is the same: `RULE`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from lib import runtime, stats
from lib.course.record import Run, with_stored
from lib.stats import Effect

TUNING_SEEDS = (0, 1, 2)  # settings were chosen on these, so they decide nothing
RULE = (
    "the 95 % interval over units and seeds lies on one side of 0, with at least three seeds; equal: it lies "
    "within the smallest effect that matters"
)
Pair = tuple[str, str]


@dataclass
class Arms:
    """Rows of every arm and seed: columns arm, seed, the unit, and what was measured."""

    run: Run
    unit: str = "prompt_index"
    table: pd.DataFrame = field(default_factory=pd.DataFrame)

    def add(self, rows: pd.DataFrame, *, arm: str, seed: int) -> None:
        """Add the rows of one arm trained with one seed.

        Raises ValueError where they do not name their units.
        """
        if self.unit not in rows:
            raise ValueError(
                f"rows of arm {arm!r} have no column {self.unit!r}; there are {', '.join(rows)}. Give the "
                "column that names a prompt, or another `unit`."
            )
        self.table = pd.concat([self.table, rows.assign(arm=arm, seed=seed)], ignore_index=True)

    def with_stored(self, stored: pd.DataFrame | None) -> None:
        """Add stored rows of the arms and seeds that did not run here."""
        self.table = with_stored(self.table, stored)

    @property
    def names(self) -> list[str]:
        """The arms there are."""
        return list(dict.fromkeys(self.table.arm)) if len(self.table) else []

    def deciding(self) -> pd.DataFrame:
        """Rows that decide: those of seeds on which nothing was tuned, or all where there are no others."""
        fresh = self.table[~self.table.seed.isin(TUNING_SEEDS)]
        return fresh if len(fresh) else self.table

    def planned(self) -> str:
        """How many seeds of the notebook's design are here, and whether they are enough to decide."""
        place = runtime.project_root() / "data" / "results" / self.run.notebook / "design.json"
        seeds = json.loads(place.read_text(encoding="utf-8"))["seeds"]
        used = sorted(set(self.deciding().seed))
        count = len(set(used) & set(seeds))
        line = f"{count} of {len(seeds)} planned seeds are here; used below: {', '.join(map(str, used))}."
        if count >= stats.SEEDS_NEEDED:
            return line
        return f"{line} It takes {stats.SEEDS_NEEDED}: nothing below is decided."

    def resampled(self, units: str) -> str:
        """What the intervals are over: the `units` alone where one seed is here."""
        several = self.deciding().seed.nunique() > 1
        return f"{units} and seeds" if several else f"{units} (one seed)"

    def means(self, arm: str, column: str) -> pd.DataFrame:
        """Mean of the samples of each unit, (seeds, units), of the rows that decide."""
        return self._means(self.deciding(), arm, column)

    def _means(self, rows: pd.DataFrame, arm: str, column: str) -> pd.DataFrame:
        rows = rows[rows.arm == arm]
        return rows.pivot_table(column, "seed", self.unit, aggfunc="mean", dropna=False)

    def differences(
        self, a: str, b: str, column: str, rows: pd.DataFrame | None = None
    ) -> pd.DataFrame:
        """b - a of each unit in each seed in which both ran, (seeds, units); of the `rows` that decide."""
        rows = self.deciding() if rows is None else rows
        first, second = (self._means(rows, arm, column) for arm in (a, b))
        return _over_common_seeds(first, second)

    def effect(self, a: str, b: str, column: str, *, minus: Pair | None = None) -> Effect:
        """b - a, minus the same of a control pair where one is given."""
        difference = self._effect_cells(a, b, column, minus)
        return stats.over_units_and_seeds(difference, seed=self.run.seed)

    def _effect_cells(self, a, b, column, minus: Pair | None) -> pd.DataFrame:
        difference = self.differences(a, b, column)
        if minus is None:
            return difference
        control = self.differences(*minus, column)
        return _over_common_seeds(control, difference)

    def level(self, arm: str, column: str) -> Effect:
        """An arm's own mean, with the same kind of interval."""
        return stats.over_units_and_seeds(self.means(arm, column), seed=self.run.seed)

    def effects(
        self, pairs: Sequence[Pair], columns: Sequence[str], *, minus: Pair | None = None
    ) -> pd.DataFrame:
        """A row for each pair and column, as `plots.interval_plot` draws them; each becomes a metric.

        Columns: group (what was measured), condition ("b - a"), value, low, high, n, seeds, by seed.
        """
        rows = []
        for a, b in pairs:
            for column in columns:
                effect = self.effect(a, b, column, minus=minus)
                self.run.metric(f"{b} - {a}/{column}", effect)
                row = {"group": column, "condition": f"{b} - {a}"}
                row |= {"value": effect.value, "low": effect.low, "high": effect.high}
                row |= {"n": effect.n, "seeds": effect.seeds, "by seed": by_seed(effect)}
                rows.append(row)
        return pd.DataFrame(rows)

    def levels(self, columns: Sequence[str], name: str = "{arm}/{column}") -> pd.DataFrame:
        """A row for each arm and column, as `plots.interval_plot` draws them; each becomes the metric `name`.

        Columns: group (the arm), condition (what was measured), value, low, high, n, seeds.
        """
        rows = []
        for arm in self.names:
            for column in columns:
                level = self.level(arm, column)
                self.run.metric(name.format(arm=arm, column=column), level)
                row = {"group": arm, "condition": column, "value": level.value, "low": level.low}
                rows.append(row | {"high": level.high, "n": level.n, "seeds": level.seeds})
        columns = ["group", "condition", "value", "low", "high", "n", "seeds"]
        return pd.DataFrame(rows, columns=columns)

    def claim(
        self,
        claim: str,
        a: str,
        b: str,
        column: str,
        *,
        better: str,
        smallest: float,
        paper: str = "",
        minus: Pair | None = None,
        why: str = "",
    ) -> str:
        """Decide a claim by `RULE` and record it; return the verdict.

        Args:
            better: "higher" or "lower": the direction that is claimed of b - a.
            smallest: the smallest effect that matters, in the column's unit; an interval within it is
                called equal.
            paper: what the paper reports, with its table or figure; "" where it has none.
            minus: a control pair (a, b) whose effect is taken away.
        """
        if not {a, b, *(minus or ())} <= set(self.names):
            missing = sorted({a, b, *(minus or ())} - set(self.names))
            words = {"here": f"did not run: {', '.join(missing)}", "why": why}
            return self.run.claim(
                claim, paper=paper, rule=RULE, verdict="not demonstrated", **words
            )
        effect = self.effect(a, b, column, minus=minus)
        verdict = decide(effect, better)
        here = f"{b} - {a}" + (f", minus {minus[1]} - {minus[0]}" if minus else "")
        here = f"{effect} ({here})"
        if is_equal(effect, smallest):
            here += f"; equal within {smallest:g}"
        return self.run.claim(claim, paper=paper, here=here, rule=RULE, verdict=verdict, why=why)

    def power(
        self, pairs: Sequence[Pair], columns: Sequence[str], *, smallest: float, seeds: int
    ) -> pd.DataFrame:
        """Would so many seeds show the smallest effect that matters?  From the rows at hand, of any seeds.

        Columns: effect, smallest, half width (of the expected interval), units, seeds, enough (the half
        width is below the smallest effect).
        """
        rows = []
        for a, b in pairs:
            for column in columns:
                cells = self.differences(a, b, column, self.table)
                half = stats.expected_half_width(cells, seeds)
                row = {"effect": f"{b} - {a}/{column}", "smallest": smallest, "half width": half}
                row |= {"units": cells.shape[1], "seeds": seeds, "enough": bool(half < smallest)}
                rows.append(row)
        return pd.DataFrame(rows)


def _over_common_seeds(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """second - first, (seeds, units), in the seeds that both have."""
    both = first.index.intersection(second.index)
    return second.loc[both] - first.loc[both]


def decide(effect: Effect, better: str) -> str:
    """The verdict by `RULE`.  `better`: "higher" or "lower".

    Too few seeds, or an interval without bounds, decide nothing.
    """
    if effect.seeds < stats.SEEDS_NEEDED:
        return "not demonstrated"
    return stats.decide(effect, better=better)


def is_equal(effect: Effect, smallest: float) -> bool:
    """The whole interval, of at least three seeds, lies within the smallest effect that matters."""
    within = -smallest < effect.low and effect.high < smallest
    return bool(effect.seeds >= stats.SEEDS_NEEDED and within)


def by_seed(effect: Effect) -> str:
    """Each seed's effect, "+0.12 -0.03"."""
    return " ".join(f"{value:+.2f}" for value in np.round(effect.by_seed, 2))
