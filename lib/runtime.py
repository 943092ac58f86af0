"""What every module needs: folders, secrets, seed, device, progress, and files that are never half written.

Simplified: equal digits are promised only for the same machine, versions and thread count.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import glob
import hashlib
import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import psutil
from tqdm import tqdm

if TYPE_CHECKING:  # torch is loaded by what computes with it: tables and files do without
    import torch

DTYPES = ("float32", "bfloat16", "float16")
BFLOAT16_FLAGS = {"amx_bf16", "avx512_bf16", "bf16"}  # the last one is ARM's

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
    return make_folder(folder, "FEEDBACK_CACHE").resolve()


def make_folder(folder: Path, variable: str) -> Path:
    """Make a folder unless it is there; an OSError says which variable of the environment moves it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        advice = f"{error.strerror}: {folder}. Set {variable} to a folder of your own"
        raise OSError(error.errno, advice) from None
    return folder


def secret(name: str, why: str) -> str:
    """Value of a key from the environment or `.env` (never stored, never shown), without space around it.

    Raises ValueError that names the variable where it is missing, or holds what no HTTP header can.
    """
    from dotenv import dotenv_values

    value = os.environ.get(name) or dotenv_values(project_root() / ".env").get(name)
    value = (value or "").strip()  # a file saved by Windows leaves a carriage return
    if not value:
        raise ValueError(
            f"{why} needs {name}, which is not set. Export it, or copy .env.example to .env and fill it in."
        )
    if not re.fullmatch("[!-~]+", value):
        raise ValueError(
            f"{name} holds a space, a line break or a letter outside ASCII (a curly quote, for example). "
            "Copy it again."
        )
    return value


def use_hub_token() -> None:
    """Hand the Hugging Face token of `.env` to the Hub's libraries, where none is set already."""
    from dotenv import dotenv_values

    token = dotenv_values(project_root() / ".env").get("HF_TOKEN")
    if token:
        os.environ.setdefault("HF_TOKEN", token)


def headless() -> bool:
    """True where nobody watches a bar move: under the runner, in CI, or without a terminal or kernel."""
    if os.environ.get("FEEDBACK_HEADLESS") or os.environ.get("CI"):
        return True
    return "ipykernel" not in sys.modules and not sys.stderr.isatty()


def plain_mode() -> bool:
    """True when `LIB_PLAIN=1`: every optimisation off, for tests that compare fast with plain paths."""
    return os.environ.get("LIB_PLAIN", "") not in ("", "0")


def fast_module() -> ModuleType | None:
    """`lib.fast`; None with LIB_PLAIN=1 and where the file is not there."""
    return None if plain_mode() else _import_fast()


@lru_cache(maxsize=1)
def _import_fast() -> ModuleType | None:
    try:
        return importlib.import_module("lib.fast")
    except ModuleNotFoundError as error:
        if error.name != "lib.fast":
            raise
        return None


def accelerated(plain: Callable) -> Callable:
    """Decorator: `lib.fast` holds a faster function of this name, which gives the same numbers.

    It is called with the plain function first, which it may fall back on.  With LIB_PLAIN=1, and without
    the file lib/fast.py, the plain function runs.
    """

    @functools.wraps(plain)
    def chosen(*args, **kwargs):
        fast = fast_module()
        if fast is None:
            return plain(*args, **kwargs)
        return getattr(fast, plain.__name__)(plain, *args, **kwargs)

    return chosen


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


def inference_dtype(device: torch.device | None = None) -> torch.dtype:
    """Number type in which sampling is fastest here, by what the machine is; no time is taken.

    CUDA: bfloat16 where the card computes in it itself, else float16 (a T4 only emulates bfloat16).  CPU:
    bfloat16 where it has instructions for it (AMX, AVX512_BF16, the bf16 of ARM), else float32.  Elsewhere
    float32.  `LIB_DTYPE` (float32, bfloat16 or float16) decides instead where it is set, `LIB_PLAIN=1` gives
    float32.  Raises ValueError for another LIB_DTYPE.
    """
    import torch

    chosen = os.environ.get("LIB_DTYPE")
    if chosen:
        if chosen not in DTYPES:
            raise ValueError(f"LIB_DTYPE is {chosen!r}; allowed: {', '.join(DTYPES)}. Or unset it.")
        return getattr(torch, chosen)
    device = device or get_device()
    if plain_mode():
        return torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if cuda_has_bfloat16() else torch.float16
    computes = device.type == "cpu" and cpu_has_bfloat16()
    return torch.bfloat16 if computes else torch.float32


def cuda_has_bfloat16() -> bool:
    """Whether the GPU here computes in bfloat16 itself; emulation does not count."""
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


@lru_cache(maxsize=1)
def cpu_has_bfloat16() -> bool:
    """Whether this CPU has instructions for products in bfloat16, and torch a library that uses them."""
    import torch

    known = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return bool(known) and bool(cpu_flags() & BFLOAT16_FLAGS)


@lru_cache(maxsize=1)
def cpu_info() -> str:
    """What Linux says about the processors here; empty on other systems."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def cpu_flags() -> set[str]:
    """What the CPU says it can do, as Linux names it (empty on other systems)."""
    lines = cpu_info().splitlines()
    named = [line for line in lines if line.startswith(("flags", "Features"))]
    return set(named[0].partition(":")[2].split()) if named else set()


def free_memory(*objects: object) -> None:
    """Collect garbage and empty the accelerator's cache; delete your own names first.

    Models given as arguments lose their weights, also those in 8 bits, even while a notebook variable
    still points at them.
    """
    import torch

    for thing in objects:
        if isinstance(thing, torch.nn.Module):
            _drop_weights(thing)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _drop_weights(model: torch.nn.Module) -> None:
    """Put weights without memory (on the meta device) in the place of a model's."""
    import torch

    vars(model).pop("value_function", None)  # PPO's, which belongs to the policy
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                module._parameters[name] = torch.nn.Parameter(empty, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to("meta")
        if hasattr(module, "state") and hasattr(module.state, "CB"):  # bitsandbytes: 8 bits
            module.state.CB = module.state.SCB = None


# --- progress and files --------------------------------------------------------------------------


def progress(
    items: Iterable | None = None, *, total: int | None = None, label: str = "", unit="it"
):
    """A text progress bar; silent when headless (widgets would end up in the committed notebook)."""
    # JupyterLab paints whatever comes on stderr red, like an error
    stream = sys.stdout if "ipykernel" in sys.modules else sys.stderr
    return tqdm(
        items,
        total=total,
        desc=label,
        unit=unit,
        disable=headless(),
        leave=False,
        file=stream,
        dynamic_ncols=True,
        mininterval=0.3,
    )


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
        try:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        except BaseException:  # a full disk must not be kept full
            os.unlink(handle.name)
            raise
    os.chmod(handle.name, 0o644)
    os.replace(handle.name, path)
    return path


@contextlib.contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Within: an empty hidden folder beside `path` to write into, which becomes `path` at the end.

    Killed before, there is at `path` what was there.  A folder that is there already is replaced, and put
    back where the replacing fails; of several writers the last one's stays.  What a killed writer left is
    removed by the next one.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}~"
    for leftover in path.parent.glob(f"{glob.escape(prefix)}*"):
        writer = leftover.name.removeprefix(prefix).partition("-")[0]
        if not (writer.isdigit() and psutil.pid_exists(int(writer))):
            shutil.rmtree(leftover, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=path.parent))
    content, before = staging / "new", staging / "before"
    try:
        content.mkdir()
        yield content
        while content.exists():
            shutil.rmtree(before, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):
                os.replace(path, before)
            try:
                os.replace(content, path)
            except OSError as error:
                # another writer's folder that came between goes too
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
    finally:
        if content.exists() and before.exists() and not path.exists():
            os.replace(before, path)
        shutil.rmtree(staging, ignore_errors=True)


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


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, which are not all read into memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_commit() -> str:
    """Commit of the checkout, with `+` where files differ from it; `unknown` outside git."""
    try:
        describe = ["git", "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"]
        described = subprocess.run(
            describe, cwd=project_root(), capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return described.stdout.strip() or "unknown"
