"""Installs the course into the Python of a hosted notebook: Colab, Kaggle, any Jupyter that is not ours.

The set-up cell of every notebook runs this file where `lib` cannot be imported.  It needs nothing but the
standard library.  What the host brings of torch, numpy, pandas and its own kernel is kept as it is.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

KEPT = ("torch", "torchvision", "torchaudio", "numpy", "pandas", "ipykernel")
WATCHED = ("transformers", "datasets", "trl", "peft", "openai")  # a change of these is told


def installed(names: tuple[str, ...]) -> dict[str, str]:
    """Name -> version of those packages that are installed."""
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def writable_home(home: Path) -> Path:
    """The course's folder, or a copy of it in the working directory where it is mounted read-only."""
    if os.access(home, os.W_OK):
        return home
    copy = Path.cwd() / "learning-from-feedback"
    print(f"{home} is read-only: the course is copied to {copy}.")
    shutil.copytree(home, copy, dirs_exist_ok=True)
    return copy


def pip_command() -> list[str]:
    """pip of this Python, or uv where the environment was made without pip."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "install", "--quiet"]
    return ["uv", "pip", "install", "--quiet", "--python", sys.executable]


def main() -> None:
    """Install the course's folder, editable, with the `notebooks` extra; make `lib` importable now."""
    home = writable_home(Path(__file__).resolve().parents[2])
    untouched = installed(KEPT)
    before = installed(WATCHED)
    names = ", ".join(f"{name} {number}" for name, number in untouched.items()) or "nothing"
    print(f"Installing the course from {home} (one to three minutes). Kept as they are: {names}.")
    sys.stdout.flush()
    pins = [f"{name}=={number}" for name, number in untouched.items()]
    subprocess.run([*pip_command(), "--editable", f"{home}[notebooks]", *pins], check=True)
    changed = [
        f"{name} {before[name]} -> {number}"
        for name, number in installed(WATCHED).items()
        if name in before and before[name] != number
    ]
    if changed:
        print(f"Replaced: {', '.join(changed)}. If one was imported before, restart the kernel.")
    importlib.invalidate_caches()
    sys.path.insert(0, str(home))  # an editable install counts from the next start on
    sys.modules.pop("lib", None)
    print("Done.")


if __name__ == "__main__":
    main()
