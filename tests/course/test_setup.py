"""Set-up: pins that every index serves, one address of the course, the set-up cell, JupyterLab."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import nbformat
import papermill
import pytest

from lib.course import address, install, lab, notebooks

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PINS = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]


def uv():
    """uv, which resolves a set in a second where pip takes minutes."""
    beside = Path(sys.executable).with_name("uv")
    program = str(beside) if beside.exists() else shutil.which("uv")
    return [program or pytest.skip("uv is not installed")]


def tracked_texts():
    """Path and text of every tracked file that is text."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in (".png", ".svg", ".gz", ".csv") or not path.is_file():
            continue
        yield name, path.read_text("utf-8")


# --- pins ----------------------------------------------------------------------------------------


def test_no_pin_holds_a_local_version():
    """A version such as 2.13.0+cpu is served by no index but the one it was built for."""
    exact = [line.partition("#")[0].strip() for line in PINS if not line.startswith("#")]
    assert len(exact) > 100
    assert not [pin for pin in exact if "+" in pin or "@" in pin or " " in pin]


@pytest.mark.parametrize("python", ["3.11.5", "3.12", "3.13", "3.14"])
@pytest.mark.parametrize("platform", ["x86_64-manylinux_2_28", "windows", "aarch64-apple-darwin"])
def test_the_set_resolves_without_the_settings_of_this_machine(python, platform):
    """As on a reader's machine: the public index alone, no settings of pip or uv."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_"))}
    environment["MACOSX_DEPLOYMENT_TARGET"] = "14.0"  # torch has no build for older ones
    options = ["--no-config", "--no-python-downloads", "--only-binary", ":all:"]
    options += ["--extra", "notebooks", "--extra", "dev"]
    machine = ["--python-version", python, "--python-platform", platform]
    command = [
        *uv(),
        "pip",
        "compile",
        *options,
        *machine,
        "-c",
        "constraints.txt",
        "pyproject.toml",
    ]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    unreached = "error sending request" in done.stderr or "Failed to fetch" in done.stderr
    if done.returncode and unreached:
        pytest.skip("the public package index is out of reach here")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "torch==2.13.0" in done.stdout.split() and "+cpu" not in done.stdout


def test_conda_and_make_use_the_same_set():
    environment = (ROOT / "environment.yml").read_text()
    assert (
        "--constraint constraints.txt" in environment and "--editable .[notebooks]" in environment
    )
    assert "--constraint constraints.txt" in (ROOT / "Makefile").read_text()


# --- the address ---------------------------------------------------------------------------------


def test_there_is_one_address_and_nothing_is_fetched_from_another():
    """Badges, set-up cells and install lines lead to the project's own address, or there is none of them."""
    own = address.read(ROOT)
    places = re.compile(
        r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/blob"
        r"|kaggle\.com/kernels/welcome\?src=https://github\.com/([\w.-]+/[\w.-]+)"
        r"|mybinder\.org/v2/gh/([\w.-]+/[\w.-]+)"
        r"|(?:git clone|git\+)[^\n]{0,60}?github\.com/([\w.-]+/[\w.-]+)"
    )
    known = {"YOU/FORK", "someone/their-fork"}
    known |= {
        "allenai/FineGrainedRLHF",
        "GXimingLu/Quark",
        "Hritikbansal/sparse_feedback",
        "sauc-abadal/ALT",
    }  # read, never fetched
    for name, text in tracked_texts():
        for match in places.finditer(text):
            target = next(group for group in match.groups() if group)
            assert target == "YOU/FORK" or own.endswith(target), f"{name}: {match[0]}"
        for repository in re.findall(r"https?://github\.com/([\w.-]+/[\w-]+)", text):
            assert repository in known or own.endswith(repository), (name, repository)


def test_every_notebook_has_the_badge_and_the_cell_of_the_address():
    own = address.read(ROOT)
    for path in NOTEBOOKS:
        cells = nbformat.read(path, as_version=4).cells
        code = [cell for cell in cells if cell.cell_type == "code"]
        assert code[0].source == address.setup_cell(own), "try: python -m lib address"
        assert ("colab-badge" in cells[0].source) == bool(address.badge(own, path.stem))


def copy_of_the_course(folder):
    (folder / "notebooks").mkdir()
    for name in ("pyproject.toml", "README.md", "notebooks/00_start_here.ipynb"):
        (folder / name).write_text((ROOT / name).read_text("utf-8"), "utf-8")
    return folder


def test_one_command_changes_the_address_everywhere_and_back(tmp_path):
    root = copy_of_the_course(tmp_path)
    before = {path: path.read_text() for path in root.rglob("*.*") if path.is_file()}
    address.write_everywhere(root, "https://github.com/someone/their-fork/")
    assert address.read(root) == "https://github.com/someone/their-fork"
    notebook = (root / "notebooks/00_start_here.ipynb").read_text()
    assert "github/someone/their-fork/blob/main/notebooks/00_start_here.ipynb" in notebook
    assert 'REPOSITORY = \\"https://github.com/someone/their-fork\\"' in notebook
    assert "github/someone/their-fork/blob" in (root / "README.md").read_text()
    address.write_everywhere(root, address.read(ROOT))
    assert {path: path.read_text() for path in before} == before


@pytest.mark.parametrize(
    "wrong",
    ["github.com/a/b", "https://user:pass@x.org/a", 'https://x.org/a"; import os', "https://x.org"],
)
def test_an_address_that_cannot_be_cloned_safely_is_refused(wrong):
    with pytest.raises(ValueError, match="Allowed"):
        address.check(wrong)


# --- the set-up cell -----------------------------------------------------------------------------


def run_cell(folder, **variables):
    """Run the set-up cell in a Python without the course, pip replaced by a record of its arguments."""
    driver = f"""
import json, subprocess, sys
sys.path[:] = [p for p in sys.path if p not in ("", {str(ROOT)!r})]
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
real = subprocess.run
def run(command, **options):
    if "pip" not in command:
        return real(command, **options)
    print("PIP", json.dumps(command))
subprocess.run = run
exec({address.setup_cell("")!r})
import lib.runtime
print("LIB", lib.runtime.__file__)
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "COURSE_REPO")}
    return subprocess.run(
        [sys.executable, "-c", driver],
        env=environment | variables,
        cwd=folder,
        capture_output=True,
        text=True,
    )


def test_a_hosted_notebook_fetches_the_course_and_keeps_its_torch(tmp_path):
    done = run_cell(tmp_path, COURSE_REPO=str(ROOT))
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"Fetching the course from {ROOT}" in done.stdout and "Kept as they are" in done.stdout
    command = json.loads(re.search(r"^PIP (.*)$", done.stdout, flags=re.M)[1])
    # the version of the package: torch's own names a build as well, which no pin can ask PyPI for
    assert f"torch=={importlib.metadata.version('torch')}" in command
    assert any(word.endswith("[notebooks]") for word in command)
    assert "-U" not in command and "--upgrade" not in command
    assert f"LIB {tmp_path}" in done.stdout


def test_a_mounted_copy_is_found_and_a_read_only_one_is_copied(tmp_path, monkeypatch):
    mounted = tmp_path / "mounted"
    subprocess.run(
        ["git", "clone", "-q", "--depth", "1", f"file://{ROOT}", str(mounted)], check=True
    )
    (tmp_path / "work").mkdir()
    done = run_cell(tmp_path / "work", COURSE_HOME=str(mounted))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Fetching" not in done.stdout and f"LIB {mounted}" in done.stdout
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(install.os, "access", lambda path, mode: False)
    copy = install.writable_home(mounted)
    assert copy.parent == tmp_path / "work" and (copy / "pyproject.toml").exists()


def test_without_an_address_the_cell_says_what_to_do(tmp_path):
    done = run_cell(tmp_path)
    assert done.returncode != 0
    for word in ("make setup", "COURSE_HOME", "COURSE_REPO"):
        assert word in done.stderr


def test_where_the_course_is_installed_the_cell_does_nothing():
    source = address.setup_cell("")
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout + done.stderr == ""


# --- parameters and JupyterLab -------------------------------------------------------------------


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_papermill_itself_reads_every_parameter(path):
    """`papermill --help-notebook` lists them all, with the help of their comments."""
    listed = papermill.inspect_notebook(str(path))
    assert set(listed) == set(notebooks.read_parameters(path))
    assert all(parameter["help"] for name, parameter in listed.items() if name != "SYSTEM_PROMPT")


def test_kernel_metadata_is_completed_on_reading_and_tidied_on_saving():
    committed = {"kernelspec": lab.KERNELSPEC, "language_info": lab.LANGUAGE, "x": 1}
    opened = lab.as_opened(committed)
    assert opened["language_info"]["version"] == sys.version.split()[0]
    assert lab.as_committed(opened) == committed
    julia = {"kernelspec": {"name": "julia", "display_name": "Julia"}}
    assert lab.as_opened(julia) == julia and lab.as_committed(julia) == julia


def test_a_notebook_opened_in_jupyterlab_is_not_unsaved_and_the_root_is_the_course(
    chromium, tmp_path
):
    """In a real browser: no mark of a change on the tab, and saving changes no byte."""
    (tmp_path / "notebooks").mkdir()
    book = ROOT / "notebooks" / "00_start_here.ipynb"
    copy = tmp_path / "notebooks" / book.name
    copy.write_bytes(book.read_bytes())
    (tmp_path / "README.md").write_text("# The course")
    quiet = ["--allow-root", "--no-browser", "--port", "0", "--IdentityProvider.token="]
    environment = os.environ | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(
        lab.command(tmp_path, quiet),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        lines = iter(server.stdout.readline, "")
        urls = (re.search(r"http://(?:localhost|127\.0\.0\.1):\d+", line) for line in lines)
        url = next(match[0] for match in urls if match)
        threading.Thread(target=server.stdout.read, daemon=True).start()
        page = chromium.new_page()
        page.goto(f"{url}/lab/tree/notebooks/{book.name}", timeout=120_000)
        page.wait_for_selector(".jp-Notebook", timeout=120_000)
        page.wait_for_selector("[data-status=idle]", timeout=120_000)  # the kernel has answered
        page.wait_for_timeout(5000)
        tab = page.locator(".lm-DockPanel-tabBar .lm-mod-current").first
        assert "jp-mod-dirty" not in tab.get_attribute("class")
        page.keyboard.press("Control+s")
        page.goto(f"{url}/lab/tree/README.md", timeout=120_000)
        page.wait_for_selector(".jp-FileEditor, .jp-MarkdownViewer", timeout=120_000)
        page.close()
        assert copy.read_bytes() == book.read_bytes()
    finally:
        server.terminate()
        server.wait()
