"""The runs that decide: a notebook once for each fresh seed, after its rules are committed.

`data/results/<notebook>/design.json` says what is run and by which rules:

    {"seeds": [11, 12, 13], "scale": "demo", "parameters": {"ARMS": ["dense", "holistic"]},
     "tables": ["scores", "history"], "rules": ["..."], "smallest": {"f1": 0.05}}

`python -m lib confirm NOTEBOOK` runs those seeds that are missing, with USE_STORED false, and puts each
run's tables where `Run.stored` finds them: `<scale>/<table>-<seed>.csv.gz` and `settings-<seed>.json`.
`made.json` beside the design says of each seed the commit of the rules, the code's, device and hours.  A
killed command continues with the same seed.

A second set of runs of a notebook has a name, such as that of another annotator: `--set NAME` reads
`design-NAME.json`, writes `made-NAME.json`, and keeps the tables in `<scale>-NAME/`.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
from pathlib import Path

from lib import runtime
from lib.course import notebooks, runner
from lib.course.arms import TUNING_SEEDS

NEEDED = ("seeds", "scale", "parameters", "tables", "rules")


def confirm(name: str, chosen: str = "") -> int:
    """Run the seeds of a notebook's design that are not stored yet; return the exit code.

    chosen: the name of a second set of runs; "": the notebook's own.  Raises RequestError for a design
    that is missing, wrong or not committed, or a notebook that is not.
    """
    folder = runtime.project_root() / "data" / "results" / name
    ending = f"-{chosen}" if chosen else ""
    rules, done = folder / f"design{ending}.json", folder / f"made{ending}.json"
    design, made = read_design(rules), notebooks.read_json(done)
    commit = _commit_of_rules(rules, notebooks.find_notebooks()[name])
    target = folder / (design["scale"] + ending)
    left = [seed for seed in design["seeds"] if str(seed) not in made]
    print(f"{name}: {len(design['seeds']) - len(left)} of {len(design['seeds'])} seeds stored")
    runner.prepare()
    for seed in left:
        place = runtime.project_root() / "runs" / f"confirm{ending}" / f"seed-{seed}"
        record = _run_seed(name, design, seed, place)
        if record["status"] != "finished":
            return 130 if record["status"] == "interrupted" else 1
        _keep_tables(place / name, target, design["tables"], seed)
        made[str(seed)] = {
            "rules": commit,
            "code": record["git_commit"],
            "device": record["device"],
            "hours": round(record["wall_seconds"] / 3600, 3),
            "finished": record["finished"],
        }
        runtime.write_atomic(done, runtime.to_json(made))
    return 0


def read_design(path: Path) -> dict:
    """A checked design.  Raises RequestError that names what is wrong."""
    if not path.exists():
        raise notebooks.RequestError(
            f"{path} is missing; its form stands in lib/course/confirm.py."
        )
    try:
        design = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise notebooks.RequestError(f"{path}, line {error.lineno}: {error.msg}.") from None
    empty = [key for key in NEEDED if not design.get(key)]
    missing = [key for key in empty if key != "parameters" or key not in design]
    if missing:
        raise notebooks.RequestError(
            f"{path} has no {', '.join(missing)}; needed: {', '.join(NEEDED)}."
        )
    if tuned := sorted(set(design["seeds"]) & set(TUNING_SEEDS)):
        raise notebooks.RequestError(
            f"{path}: seeds {tuned} are for tuning and decide nothing. Take fresh ones: 11, 12, 13, ..."
        )
    return design


def _commit_of_rules(design: Path, notebook: Path) -> str:
    """The commit that the design stands in.  Raises RequestError where it, notebook or lib are changed."""
    root = runtime.project_root()
    paths = [str(design), str(notebook), str(root / "lib")]
    changed = _git("status", "--porcelain", "--untracked-files=all", "--", *paths)
    if changed:
        raise notebooks.RequestError(
            f"not committed: {', '.join(line[3:] for line in changed.splitlines())}. Commit the rules and "
            "the code first, so that git shows that they are older than the results."
        )
    return _git("log", "-1", "--format=%h", "--abbrev=10", "--", str(design))


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=runtime.project_root(),
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "") or error
        raise notebooks.RequestError(
            f"confirm needs a git checkout of the course: {reason}"
        ) from None
    return done.stdout.rstrip("\n")


def _run_seed(name: str, design: dict, seed: int, place: Path) -> dict:
    """Run the notebook with one seed in a folder of its own; return its record."""
    parameters = notebooks.read_parameters(notebooks.find_notebooks()[name])
    chosen = {**design["parameters"], "SEED": seed}
    if "USE_STORED" in parameters:
        chosen["USE_STORED"] = False
    chosen = notebooks.assign_parameters([name], [[k, json.dumps(v)] for k, v in chosen.items()])
    before = os.environ.get("FEEDBACK_OUT")
    os.environ["FEEDBACK_OUT"] = str(place)
    try:
        label = f"seed {seed}"
        record = runner.run_notebook(name, design["scale"], chosen[name], force=False, label=label)
    finally:
        os.environ.pop("FEEDBACK_OUT")
        if before is not None:
            os.environ["FEEDBACK_OUT"] = before
    if record["status"] == "skipped":  # it had finished when the command was killed
        record["status"] = "finished"
    print(f"seed {seed}: {runner.describe(record)}", flush=True)
    return record


def _keep_tables(run: Path, target: Path, tables: list[str], seed: int) -> None:
    """Copy a run's tables, compressed to the same bytes every time, and its settings."""
    for table in tables:
        source = run / f"{table}.csv"
        if not source.exists():
            raise notebooks.RequestError(
                f"the run wrote no {source.name}; see {run}/executed.ipynb."
            )
        packed = gzip.compress(source.read_bytes(), mtime=0)
        runtime.write_atomic(target / f"{table}-{seed}.csv.gz", packed)
    settings = (run / "settings.json").read_bytes()
    runtime.write_atomic(target / f"settings-{seed}.json", settings)
