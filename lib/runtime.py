"""What every module needs: folders, secrets, seed, device, progress, and files that are never half written.

Simplified: equal digits are promised only for the same machine, versions and thread count.
"""

from __future__ import annotations

import contextlib
import email.utils
import gc
import hashlib
import json
import os
import platform
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

if TYPE_CHECKING:  # torch is loaded by what computes with it: tables and files do without
    import torch

# --- folders and settings ------------------------------------------------------------------------


def project_root() -> Path:
    """Folder that holds `notebooks/` and `lib/`: `$FEEDBACK_ROOT`, the checkout, or the current folder."""
    if os.environ.get("FEEDBACK_ROOT"):
        return Path(os.environ["FEEDBACK_ROOT"]).expanduser().resolve()
    checkout = Path(__file__).resolve().parents[1]
    return checkout if (checkout / "pyproject.toml").exists() else Path.cwd()


def cache_dir() -> Path:
    """Folder of downloaded assets and paid replies: `$FEEDBACK_CACHE`, else `data/cache/`."""
    chosen = os.environ.get("FEEDBACK_CACHE")
    folder = Path(chosen).expanduser() if chosen else project_root() / "data" / "cache"
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


def secret(name: str, why: str) -> str:
    """Value of a key from the environment or `.env` (never stored, never shown).

    Raises ValueError that names the variable where it is missing.
    """
    from dotenv import dotenv_values

    value = os.environ.get(name) or dotenv_values(project_root() / ".env").get(name)
    if not value:
        raise ValueError(
            f"{why} needs {name}, which is not set. Export it, or copy .env.example to .env and fill it in."
        )
    return value


def headless() -> bool:
    """True where nobody watches a bar move: under the runner, in CI, or without a terminal or kernel."""
    if os.environ.get("FEEDBACK_HEADLESS") or os.environ.get("CI"):
        return True
    return "ipykernel" not in sys.modules and not sys.stderr.isatty()


def plain_mode() -> bool:
    """True when `LIB_PLAIN=1`: every optimisation off, for tests that compare fast with plain paths."""
    return os.environ.get("LIB_PLAIN", "") not in ("", "0")


def set_seed(seed: int) -> torch.Generator:
    """Seed python, numpy and torch; return a CPU generator with the same seed for samplers."""
    import torch
    from transformers import set_seed as seed_everything

    seed_everything(seed)
    return torch.Generator().manual_seed(seed)


# --- device and dtype ----------------------------------------------------------------------------


def get_device(name: str | None = None) -> torch.device:
    """The device named, else CUDA, else Apple MPS, else CPU."""
    import torch

    if name:
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def describe_device(device: torch.device | None = None) -> str:
    """One line about the device, as stored with every result."""
    import torch

    device = device or get_device()
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()}, {platform.machine()}, {torch.get_num_threads()} threads"


@lru_cache(maxsize=8)
def inference_dtype(device: torch.device | None = None) -> torch.dtype:
    """bfloat16 where a matrix product measured here is at least 1.3x faster in it, else float32.

    CUDA with bf16 support is not measured: it is faster there.  `LIB_PLAIN=1` gives float32.
    """
    import torch

    device = device or get_device()
    if plain_mode():
        return torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device.type != "cpu":
        return torch.float32
    seconds = {d: _matmul_seconds(d) for d in (torch.float32, torch.bfloat16)}
    return (
        torch.bfloat16 if seconds[torch.float32] > 1.3 * seconds[torch.bfloat16] else torch.float32
    )


@contextlib.contextmanager
def medium_precision() -> Iterator[None]:
    """Within: torch's float32 precision "medium", process-wide."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@lru_cache(maxsize=1)
def medium_is_exact() -> bool:
    """Whether float32 products at "medium" precision are as exact on this CPU, and at least 1.2x as fast.

    There torch asks oneDNN in the place of MKL, which is slow on processors that Intel did not make
    (measured on an AMD EPYC: 2.2x).  Where oneDNN has bfloat16 units to use (AMX), it rounds: not exact.
    """
    import torch

    errors, seconds = [], []
    try:
        torch.get_float32_matmul_precision()
    except RuntimeError:  # set backend by backend, by its owner: left as it is
        return False
    with torch.random.fork_rng(devices=[]):
        left, right = torch.randn(512, 512), torch.randn(512, 512)
        exact = left.double() @ right.double()
        for precision in (contextlib.nullcontext, medium_precision):
            with precision():
                errors.append((left @ right - exact).abs().mean().item())
                seconds.append(_matmul_seconds(torch.float32))
    return errors[1] < 2 * errors[0] and seconds[0] > 1.2 * seconds[1]


def _matmul_seconds(dtype: torch.dtype, size: int = 512, repeats: int = 5) -> float:
    import torch

    left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    left @ right  # warm-up
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - start)
    return min(times)


def free_memory(*objects: object) -> None:
    """Collect garbage and empty the accelerator's cache; delete your own names first.

    Models given as arguments are moved to the meta device, which releases their weights even
    while a notebook variable still points at them.
    """
    import torch

    for thing in objects:
        if isinstance(thing, torch.nn.Module):
            thing.to("meta")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- progress and files --------------------------------------------------------------------------


def progress(
    items: Iterable | None = None, *, total: int | None = None, label: str = "", unit="it"
):
    """A text progress bar; silent when headless (widgets would end up in the committed notebook)."""
    return tqdm(
        items, total=total, desc=label, unit=unit, disable=headless(), leave=False,
        file=sys.stderr, dynamic_ncols=True, mininterval=0.3,
    )  # fmt: skip


def quiet_libraries() -> None:
    """Switch off the progress bars and chatter of transformers and datasets."""
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def write_atomic(path: Path | str, content: str | bytes) -> Path:
    """Write a file so that a reader sees the old content or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8") if isinstance(content, str) else content
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    os.chmod(handle.name, 0o644)
    os.replace(handle.name, path)
    return path


def to_json(value: object) -> str:
    """JSON with plain numbers: numpy scalars and arrays unpacked, NaN and infinities as null."""
    torch = sys.modules.get("torch")  # whoever has a tensor has loaded it
    scalars = (np.generic, torch.Tensor) if torch else (np.generic,)

    def plain(item):
        if isinstance(item, dict):
            return {str(k): plain(v) for k, v in item.items()}
        if isinstance(item, (list, tuple, set, np.ndarray)):
            return [plain(v) for v in item]
        if isinstance(item, scalars):
            return plain(item.item())
        if isinstance(item, float) and not np.isfinite(item):
            return None
        return item if isinstance(item, (str, int, float, bool, type(None))) else str(item)

    return json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n"


def content_hash(*parts: object) -> str:
    """SHA-256 of the parts' JSON; equal content gives equal keys on every machine."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


class ReplyCache:
    """Crash-safe store of replies that cost money or time, keyed by content (SQLite, one file).

    Several processes may use one file; `put` keeps the first reply for a key, so a reply is
    never replaced by a later one.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._connect() as db:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute(
                "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT, at TEXT)"
            )

    @contextlib.contextmanager
    def _connect(self):
        db = sqlite3.connect(self.path, timeout=60)
        try:
            with db:
                yield db
        finally:
            db.close()

    def get(self, key: str):
        """The stored reply (any JSON value), or None."""
        with self._connect() as db:
            row = db.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        return json.loads(row[0]) if row else None

    def put(self, key: str, reply: object) -> None:
        """Store a reply unless the key has one."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with self._connect() as db:
            db.execute(
                "INSERT OR IGNORE INTO replies VALUES (?, ?, ?)", (key, json.dumps(reply), now)
            )

    def __len__(self) -> int:
        with self._connect() as db:
            return db.execute("SELECT COUNT(*) FROM replies").fetchone()[0]


def git_commit() -> str:
    """Commit of the checkout, with `+` where files differ from it; `unknown` outside git."""
    try:
        describe = ["git", "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"]
        found = subprocess.run(
            describe, cwd=project_root(), capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() or "unknown"


def retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for (a number or a date); None where it says neither."""
    try:
        return max(0.0, float(value or ""))
    except ValueError:
        date = email.utils.parsedate_tz(value)
        return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else None
