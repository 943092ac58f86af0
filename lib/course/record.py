"""The record of a run: its settings, and every number, claim, table and figure that a notebook shows.

A notebook calls `start_run` once and hands everything to the `Run` it gets back; `Run.finish` writes
`results.json`.  Under `python -m lib run` the runner names the folder (`FEEDBACK_RUN_DIR`) and adds
`run.json` beside it.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import platform
import re
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import pandas as pd

from lib import runtime, tables
from lib.course import assets, place, show, together

SCALES = ("smoke", "demo", "gpu", "full")
VERDICTS = ("same direction", "opposite", "not demonstrated")
SHOWN_PACKAGES = ("torch", "transformers", "trl", "datasets", "numpy", "pandas")


@dataclass
class Claim:
    """One row of a closing table: what the paper says, what was measured here, and the verdict."""

    claim: str
    paper: str
    here: str
    rule: str
    verdict: str
    why: str = ""

    def __post_init__(self):
        if self.verdict not in VERDICTS:
            raise ValueError(f"verdict is {self.verdict!r}; allowed: {', '.join(VERDICTS)}")


class StopHere(Exception):
    """Raised by a notebook that ends early on purpose, after `Run.finish` (a dry run, for example)."""

    def _render_traceback_(self) -> list[str]:
        return [f"Stopped here on purpose: {self}"]


@dataclass
class Run:
    """Everything one notebook measured.  Made by `start_run`; written by `finish`."""

    notebook: str
    scale: str
    seed: int
    folder: Path
    metrics: dict[str, dict] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)
    figures: list[dict] = field(default_factory=list)
    started: float = field(default_factory=time.time)

    def metric(self, name: str, value, low=None, high=None, *, n=None, seeds: int = 1) -> None:
        """Record one number with its interval, sample size and number of seeds.

        `value` may be an `Interval` or `Effect` of `lib.stats`, which brings its own bounds, n and seeds.
        """
        if hasattr(value, "low"):
            low, high, n = value.low, value.high, value.n
            seeds = getattr(value, "seeds", seeds)
            value = value.value
        self.metrics[name] = {"value": value, "low": low, "high": high, "n": n, "seeds": seeds}

    def claim(
        self, claim: str, *, paper: str, here: str, rule: str, verdict: str, why: str = ""
    ) -> str:
        """Record a claim with the decision rule that was fixed before the run; return the verdict.

        `paper`: what the paper reports, with its table or figure; "" for what no paper has a figure of
        (`other_table`).
        """
        self.claims.append(Claim(claim, paper, here, rule, verdict, why))
        return verdict

    def closing_table(self) -> pd.DataFrame:
        """What the paper claims: claim | paper | here | same direction? | why it differs."""
        rows = [(c.claim, c.paper, c.here, c.verdict, c.why) for c in self.claims if c.paper]
        return pd.DataFrame(
            rows, columns=["claim", "paper", "here", "same direction?", "why it differs"]
        )

    def other_table(self) -> pd.DataFrame:
        """What else was seen, of which the paper gives no figure: claim | here | shown? | why, if given."""
        rows = [(c.claim, c.here, c.verdict, c.why) for c in self.claims if not c.paper]
        table = pd.DataFrame(rows, columns=["claim", "here", "shown?", "why"])
        words = {"same direction": "yes", "opposite": "the opposite"}
        table = table.replace({"shown?": words})
        return table if table["why"].any() else table.drop(columns="why")

    def save_figure(self, figure, name: str, *, caption: str, alt: str):
        """Write `<name>.png` and `.svg` into the run's folder; return an image with alt text to show."""
        import matplotlib.pyplot as plt
        from IPython.display import Image
        from PIL import Image as Pillow

        from lib import plots

        png = self.folder / f"{name}.png"
        if not together.is_first():
            plt.close(figure)
            return None
        plots.make_room(figure)
        if pairs := plots.overlapping(figure):
            warnings.warn(f"figure {name}: texts lie over each other: {pairs}", stacklevel=2)
        figure.savefig(png, dpi=120, bbox_inches="tight", metadata={"Software": None})
        with Pillow.open(png) as drawn:  # a palette: a third of the size in the notebook
            drawn = drawn.convert("RGB").quantize(128, dither=Pillow.Dither.NONE)
        drawn.save(png, optimize=True)
        figure.savefig(
            png.with_suffix(".svg"), bbox_inches="tight", metadata={"Date": None, "Creator": None}
        )
        plt.close(figure)
        self.figures = [f for f in self.figures if f["name"] != name]
        self.figures.append({"name": name, "caption": caption, "alt": alt})
        return Image(data=png.read_bytes(), format="png", alt=alt)

    def save_table(self, table: pd.DataFrame, name: str) -> Path:
        """Write a table as `<name>.csv` into the run's folder, so figures can be redrawn without running."""
        path = self.folder / f"{name}.csv"
        return tables.write_csv(table, path) if together.is_first() else path

    def cached(self, name: str, make: Callable[[], pd.DataFrame], **key) -> pd.DataFrame:
        """The table `make()` returns, kept in `work/`: a killed run continues with what was finished.

        `key` names everything the table depends on; another key makes it again.
        """
        made_by = os.environ.get("FEEDBACK_FINGERPRINT") or lib_version()
        path = (
            self.folder / "work" / f"{name}-{runtime.content_hash(name, key, made_by)[:16]}.jsonl"
        )
        if together.is_there(path):
            return tables.read_jsonl(path)
        table = make()
        if len(table) and together.is_first():
            tables.write_jsonl(table, path)
        return table

    def stored(
        self, name: str = "", *, settings: dict, use: bool = True, **other
    ) -> dict[str, pd.DataFrame]:
        """Kept tables of other runs of this notebook, joined by table, as far as their settings are these.

        `settings`: whatever moves the numbers (model, data, steps, ...), but what the rows say themselves
        (seed, arm).  They are written to `settings.json` here, for who keeps this run: a kept run is
        `<table>-<run>.csv` (or `.csv.gz`) and `settings-<run>.json` in `data/results/<notebook>/<scale>/`,
        or in `<scale>-<name>/` for a set that differs from this run by `other`.  Runs with other settings
        are left out, and one line says why.  `use=False` reads none.
        """
        own = json.loads(runtime.to_json(settings))
        if together.is_first():
            runtime.write_atomic(self.folder / "settings.json", runtime.to_json(own))
        if not use:
            return {}
        wanted = own | json.loads(runtime.to_json(other))
        place = f"{self.scale}-{name}" if name else self.scale
        folder = runtime.project_root() / "data" / "results" / self.notebook / place
        parts: dict[str, list[pd.DataFrame]] = {}
        left_out: dict[str, list[str]] = {}
        for run, paths in _stored_runs(folder).items():
            reason = _other_settings(folder / f"settings-{run}.json", wanted)
            if reason:
                left_out.setdefault(reason, []).append(run)
                continue
            for table, path in paths.items():
                parts.setdefault(table, []).append(tables.read_csv(path))
        for reason, runs in left_out.items():
            print(f"stored {', '.join(runs)}: {reason}: not mixed")
        return {table: pd.concat(rows, ignore_index=True) for table, rows in parts.items()}

    def keep(self, name: str, model, tokenizer, **card) -> Path:
        """Keep a trained model in `models/<name>/` of this run's folder; return that folder.

        `card`: what `lib.cards.describe` takes (settings, metrics, data, licence).  A later run of the
        notebook replaces it.  `models.load_policy` or `reward_models.load` read the folder, and so does any
        notebook parameter that names a model.
        """
        from lib import models

        if not together.is_first():
            return self.folder / "models" / name
        made_by = {"notebook": self.notebook, "scale": self.scale, "seed": self.seed}
        card["settings"] = made_by | card.get("settings", {})
        folder = models.save(model, tokenizer, self.folder / "models" / name, card=card)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        with contextlib.suppress(ValueError):  # a folder elsewhere is named whole
            folder = folder.relative_to(runtime.project_root())
        print(f"kept: {folder} ({size / 1e6:.0f} MB)")
        return folder

    def finish(self) -> pd.DataFrame:
        """Write `results.json` and return the metrics as a table."""
        record = {
            "notebook": self.notebook,
            "scale": self.scale,
            "seed": self.seed,
            "device": runtime.describe_device(),
            "metrics": self.metrics,
            "claims": [asdict(c) for c in self.claims],
            "figures": self.figures,
        }
        if together.is_first():
            runtime.write_atomic(self.folder / "results.json", runtime.to_json(record))
        table = pd.DataFrame.from_dict(self.metrics, orient="index")
        return table.rename_axis("metric").reset_index()


def start_run(notebook: str, *, scale: str, seed: int) -> Run:
    """Check the scale, seed everything, and open the folder for this notebook's results.

    Raises ValueError for an unknown scale or a seed that is not a whole number >= 0.
    """
    if scale not in SCALES:
        raise ValueError(f"SCALE is {scale!r}; allowed: {', '.join(SCALES)}. Try SCALE = 'demo'.")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"SEED is {seed!r}; it must be a whole number >= 0.")
    runtime.set_seed(seed)
    runtime.quiet_libraries()
    runtime.use_hub_token()
    show.show_tables_so()
    together.meet()
    return Run(notebook, scale, seed, place.results_folder(notebook))


def _stored_runs(folder: Path) -> dict[str, dict[str, Path]]:
    """Run -> table -> file, of the files `<table>-<run>.csv` or `.csv.gz` in a folder."""
    runs: dict[str, dict[str, Path]] = {}
    for path in sorted([*folder.glob("*-*.csv"), *folder.glob("*-*.csv.gz")]):
        table, _, run = path.name.removesuffix(".gz").removesuffix(".csv").partition("-")
        runs.setdefault(run, {})[table] = path
    return {run: runs[run] for run in sorted(runs, key="{}.csv".format)}


def _other_settings(path: Path, wanted: dict) -> str:
    """How the settings in a file differ from those wanted, in words; "" where they are the same."""
    if not path.exists():
        return f"there is no {path.name} that says how it was made"
    recorded = json.loads(path.read_text(encoding="utf-8"))
    names = [name for name in {**wanted, **recorded} if recorded.get(name) != wanted.get(name)]
    if not names:
        return ""
    return f"made with {_listed(names, recorded)}, this run has {_listed(names, wanted)}"


def _listed(names: list[str], settings: dict) -> str:
    return ", ".join(f"{name}={_short(settings.get(name))}" for name in names)


def _short(value: object) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def with_stored(
    live: pd.DataFrame | None, stored: pd.DataFrame | None, keys: Sequence[str] = ("arm", "seed")
) -> pd.DataFrame:
    """Live rows, then the kept rows of those values of `keys` that did not run here."""
    parts = [table for table in (live, stored) if table is not None and len(table)]
    if len(parts) < 2:
        return parts[0] if parts else pd.DataFrame(columns=list(keys))
    ran, held = (pd.MultiIndex.from_frame(table[list(keys)]) for table in parts)
    return pd.concat([live, stored[~held.isin(ran)]], ignore_index=True)


def describe_run(run: Run, **settings) -> pd.DataFrame:
    """The parameters, versions and device of this run, as the table under the parameters cell."""
    rows = [("scale", run.scale), ("seed", run.seed), ("device", runtime.describe_device())]
    rows += [(name, value) for name, value in settings.items()]
    if counts := lowered_counts():
        rows.append(("rehearsal: counts lowered", ", ".join(counts)))
    rows += [("python", platform.python_version())]
    rows += [(name, metadata.version(name)) for name in SHOWN_PACKAGES]
    return pd.DataFrame(rows, columns=["setting", "value"]).astype(str)


def settings_table(settings: dict[str, tuple]) -> pd.DataFrame:
    """A notebook's settings, one row each, a column a scale, and "paper" where a last value says the paper's.

    Raises ValueError for a setting that has another number of values.
    """
    longest = max(map(len, settings.values()))
    columns = [*SCALES, "paper"][: max(longest, len(SCALES))]
    if wrong := [name for name, row in settings.items() if len(row) != len(columns)]:
        raise ValueError(f"{', '.join(wrong)}: give a value for each of {', '.join(columns)}.")
    rows = [list(row) for row in settings.values()]
    index = pd.Index(settings, name="setting")
    # objects: 12 stays 12 beside 0.002
    return pd.DataFrame(rows, index=index, columns=columns, dtype=object)


def scale_settings(settings: dict[str, tuple], scale: str, task: dict | None = None) -> dict:
    """One scale's values of a notebook's settings `{name: (smoke, demo, gpu, full)}`.

    `task`: values of one task, in the place of the scale's.  Counts are `lowered` in a rehearsal.
    """
    settings_table(settings)  # which checks it
    column = SCALES.index(scale)
    return lowered({name: row[column] for name, row in settings.items()} | (task or {}))


def lowered(settings: dict) -> dict:
    """The settings with the counts of a rehearsal (`python -m rehearsal`); in every other run as they are.

    `FEEDBACK_COUNTS` holds them as a JSON object.  Raises ValueError for a name that is no setting, and where
    anything but a whole number, or a list of such, would be lowered.
    """
    counts = lowered_counts()
    for name, count in counts.items():
        _check_lowered(name, count, settings)
    return settings | counts


def lowered_counts() -> dict:
    """Setting -> its count in this rehearsal; empty in every other run."""
    return json.loads(os.environ.get("FEEDBACK_COUNTS") or "{}")


def _check_lowered(name: str, count: object, settings: dict) -> None:
    if name not in settings:
        raise ValueError(
            f"FEEDBACK_COUNTS names {name!r}, which is no setting here; there are {', '.join(settings)}"
        )
    old, new = ([x] if not isinstance(x, list) else x for x in (settings[name], count))
    counts = old and all(type(x) is int and x > 0 for x in [*old, *new])
    if not counts or len(old) != len(new) or any(a < b for a, b in zip(old, new, strict=True)):
        raise ValueError(
            f"FEEDBACK_COUNTS gives {name} = {count!r}, but the setting is {settings[name]!r}: only whole "
            "numbers above 0 can be lowered, to such numbers"
        )


def model_name(name: str) -> str:
    """A model's name for readers: what an offline asset is ("policy" says nothing), else the name."""
    known = assets.ASSETS.get(name)
    return re.split(r" \(|, ", known.what)[0] if known else name


@lru_cache(maxsize=1)
def lib_version() -> str:
    """Hash of the library's files: results made by another `lib` are not taken for this one's."""
    folder = Path(__file__).parents[1]
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix != ".pyc"]
    hashes = [(str(p.relative_to(folder)), runtime.file_hash(p)) for p in files]
    return runtime.content_hash(hashes)[:16]


def source_of(thing: object) -> str:
    """What a function, or an object's class, is written as; its text form where there is no source.

    It tells a reward or judge of a reader's own from another one, among the settings of a run.
    """
    own = thing if inspect.isroutine(thing) or inspect.isclass(thing) else type(thing)
    try:
        return inspect.getsource(own)
    except (OSError, TypeError):
        return repr(thing)


def show_source(thing: Callable) -> object:
    """Show a library function's source in a notebook, so that text and code cannot drift apart."""
    from IPython.display import Code

    return Code(inspect.getsource(thing), language="python")
