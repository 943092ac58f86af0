"""The command line: run, list, publish, confirm, report, site, address, lab, fetch, annotate, ..."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from lib import runtime
from lib.course import address, record

try:
    from lib.course import confirm, notebooks, publish, ranks, report, runner, side_by_side
except ModuleNotFoundError as error:
    sys.exit(f"{error.name} is missing. Try: pip install -c constraints.txt -e '.[notebooks]'")

CHECKOUT = Path(__file__).resolve().parents[2]


def _run(options: argparse.Namespace) -> int:
    names = notebooks.resolve_notebooks(options.notebooks)
    chosen = notebooks.assign_parameters(names, options.parameters)
    if options.out:
        os.environ["FEEDBACK_OUT"] = options.out
    try:
        ranks.check(options.processes, options.shards)
    except ValueError as error:
        raise notebooks.RequestError(str(error)) from None
    if options.shards:
        os.environ["FEEDBACK_SHARDS"] = "1"
    if options.jobs < 0:
        raise notebooks.RequestError(f"--jobs is {options.jobs}; allowed: 1 or more.")
    alone = len(names) == 1 or options.scale not in side_by_side.SCALES
    jobs = options.jobs or (1 if alone else side_by_side.fitting())
    settings = {"force": options.force, "processes": options.processes, "jobs": jobs}
    return runner.run_notebooks(names, options.scale, chosen, **settings)[0]


def _list(options: argparse.Namespace) -> int:
    print(report.list_notebooks())
    return 0


def _publish(options: argparse.Namespace) -> int:
    return publish.publish(notebooks.resolve_notebooks(options.notebooks))


def _confirm(options: argparse.Namespace) -> int:
    names = notebooks.resolve_notebooks(options.notebooks)
    return max(confirm.confirm(name, options.set) for name in names)


def _report(options: argparse.Namespace) -> int:
    print(f"Report: {report.write_report(options.scale)}")
    return 0


def _site(options: argparse.Namespace) -> int:
    from lib.course import site

    out = Path(options.out) if options.out else runtime.project_root() / "site"
    print(f"Site: {site.build(out)}")
    return 0


def _address(options: argparse.Namespace) -> int:
    root = runtime.project_root()
    if options.url is None:
        hint = "No address is set. Try: python -m lib address https://github.com/YOU/FORK"
        print(address.read(root) or hint)
        return 0
    try:
        written = address.write_everywhere(root, "" if options.url == "none" else options.url)
    except ValueError as error:
        raise notebooks.RequestError(str(error)) from None
    print(f"Address {address.read(root) or 'removed'}: {len(written)} files written.")
    return 0


def _lab(options: argparse.Namespace) -> int:
    from lib.course import lab

    lab.start(runtime.project_root(), options.rest)
    return 0


def _fetch(options: argparse.Namespace) -> int:
    from lib.course import fetch

    if not options.sets:
        print(fetch.describe_sets())
        return 0
    try:
        fetch.fetch(*options.sets)
    except (ValueError, fetch.AssetError) as error:
        raise notebooks.RequestError(str(error)) from None
    return 0


def _annotate(options: argparse.Namespace) -> int:
    from lib import annotate

    try:
        items = annotate.read_items(options.items)
        own = options.guidelines and Path(options.guidelines).read_text(encoding="utf-8")
        page = annotate.write(items, options.out, options.kind, guidelines=own)
        print(f"Page: {page} ({len(items)} records)")
    except (ValueError, OSError) as error:
        raise notebooks.RequestError(str(error)) from None
    return 0


def _replies(options: argparse.Namespace) -> int:
    from lib.course import annotators, assets

    try:
        annotators.run(options.jobs, options.model)
    except (ValueError, assets.AssetError) as error:
        raise notebooks.RequestError(str(error)) from None
    return 0


def _bench(options: argparse.Namespace) -> int:
    if not (CHECKOUT / "bench" / "__init__.py").exists():
        raise notebooks.RequestError(
            f"the benchmarks are not installed with lib, and {CHECKOUT} has no folder bench/. Try again "
            "in a checkout of the course (git clone, then make setup)."
        )
    if str(CHECKOUT) not in sys.path:  # an editable install finds lib alone
        sys.path.append(str(CHECKOUT))
    from bench import report as speed

    try:
        size = "quick" if options.quick else options.size
        options_of_run = {"rounds": options.rounds, "size": size, "growth": options.growth}
        speed.run(options.names, options.json, **options_of_run)
    except ValueError as error:
        raise notebooks.RequestError(str(error)) from None
    return 0


def _add_replies_options(replies: argparse.ArgumentParser) -> None:
    text = "items, gate, annotations, paraphrases, judgements, released, choices, refinements, "
    text += "critiques (all if none is named)"
    replies.add_argument("jobs", nargs="*", metavar="JOB", help=text)
    text = "annotator: qwen-0.5b, qwen-1.5b (both if none is named), or another model; several too"
    replies.add_argument("--model", action="append", default=[], metavar="NAME", help=text)


def _add_bench_options(bench: argparse.ArgumentParser) -> None:
    text = (
        "benchmark (all of them if none is named), `course` for a table of the notebooks' times, "
    )
    bench.add_argument(
        "names", nargs="*", metavar="NAME", help=text + "`table` or `figure` for the kept results"
    )
    bench.add_argument(
        "--json", metavar="FILE", help="keep the record (a folder: one file for each)"
    )
    bench.add_argument(
        "--rounds", type=int, default=5, help="of each side, after a warm-up (default 5)"
    )
    bench.add_argument(
        "--quick", action="store_true", help="fewer rows, one peer: are the goals met? (8 minutes)"
    )
    bench.add_argument(
        "--growth", action="store_true", help="our side on inputs of growing size, and nothing else"
    )
    bench.add_argument(
        "--size", choices=("real", "quick", "tiny"), default="real", help=argparse.SUPPRESS
    )


def _add_page_options(page: argparse.ArgumentParser) -> None:
    page.add_argument("items", metavar="ITEMS.json", help="qa-feedback records, or course items")
    page.add_argument("--out", default="annotate.html", metavar="PAGE.html")
    page.add_argument("--kind", choices=("spans", "compare"), default="spans")
    text = "your own text in place of the page's guidelines ('# ' heading, '- ' list)"
    page.add_argument("--guidelines", metavar="FILE", help=text)


def _add_run_options(run: argparse.ArgumentParser) -> None:
    run.add_argument("--out", metavar="DIR", help="write to DIR/<notebook>/ instead of runs/")
    run.add_argument("--force", action="store_true", help="repeat finished notebooks from scratch")
    text = "notebooks at a time (default: at smoke and demo what cores and memory allow)"
    run.add_argument("--jobs", type=int, default=0, metavar="N", help=text)
    text = "train on so many processes, each on a GPU of its own (default 1)"
    run.add_argument("--processes", type=int, default=1, metavar="N", help=text)
    text = "with --processes: fine-tune in shards, one a GPU, what no GPU can train whole"
    run.add_argument("--shards", action="store_true", help=text)
    run.add_argument(
        "-p",
        dest="parameters",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="set a notebook's parameter; VALUE is JSON where it parses as JSON, else text",
    )


def build_parser() -> argparse.ArgumentParser:
    """The parser; each subcommand sets `command`, a function of the parsed options."""
    parser = argparse.ArgumentParser(prog="python -m lib", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        return sub

    run = add("run", _run, "run notebooks (all of them if none is named)")
    listing = add("list", _list, "the notebooks, their questions, and what has run")
    publishing = add("publish", _publish, "write the committed notebooks and plots/ (demo scale)")
    deciding = add(
        "confirm", _confirm, "run the fresh seeds that decide, by data/results/*/design.json"
    )
    text = "notebook whose design is committed, such as 42"
    deciding.add_argument("notebooks", nargs="+", metavar="NOTEBOOK", help=text)
    text = "a second set of runs, by design-NAME.json"
    deciding.add_argument("--set", default="", metavar="NAME", help=text)
    report = add("report", _report, "write the page of results, runs/<scale>/index.html")
    text = "write the course as a static site; nothing is executed"
    add("site", _site, text).add_argument("--out", metavar="DIR", help="folder (default site/)")
    where = add("address", _address, "show or set the address of badges and set-up cells")
    where.add_argument(
        "url", nargs="?", metavar="URL", help="https address of a git repository; none"
    )
    jupyter = add("lab", _lab, "open the course in JupyterLab")
    jupyter.add_argument("rest", nargs=argparse.REMAINDER, help="options of JupyterLab")
    fetching = add(
        "fetch", _fetch, "get the papers' released files, or a model (without a name: list them)"
    )
    fetching.add_argument(
        "sets", nargs="*", metavar="NAME", help="such as qa_feedback or qwen-1.5b; several too"
    )
    text = "write an annotation page that works offline in a browser"
    _add_page_options(add("annotate", _annotate, text))
    text = "make the local annotators' replies (hours; what is there is not asked again)"
    _add_replies_options(add("replies", _replies, text))
    _add_bench_options(add("bench", _bench, "measure speed beside what a reader would use instead"))
    for sub in (run, publishing):
        text = "name, file or number, such as 10_toxicity_meter or 10"
        sub.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help=text)
    for sub in (run, report):
        sub.add_argument("--scale", choices=record.SCALES, default="demo")
    _add_run_options(run)
    listing.description = "State at each scale, with the wall time of the last run."
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit code (2 for a request that cannot be met)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a console that lacks a letter must not end a run
            stream.reconfigure(errors="backslashreplace")
    options = build_parser().parse_args(arguments)
    try:
        return options.command(options)
    except notebooks.RequestError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
