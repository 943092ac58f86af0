"""Where a model's files are: a folder, an offline asset, or the Hugging Face Hub, by one name.

A name is `name`, `name@revision` or `name#label`, or all three: `name@revision#label`; so a parameter of a
notebook, which is one string, can say everything.  Weights come as safetensors.  Where a model has only
pickled ones (`pytorch_model.bin`), they are read once with `torch.load(weights_only=True)`, which runs no
code, and kept as safetensors under `<cache_dir()>/converted`.  Remote code is never loaded.
"""

from __future__ import annotations

import fnmatch
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import filelock
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, PretrainedConfig

from lib import runtime
from lib.course import assets
from lib.course.assets import AssetError

MODEL_ASSETS = ("policy", "encoder", "qwen-0.5b", "qwen-1.5b")
TOKENIZER_FILES = ["*.json", "*.txt", "*.jinja", "*.model"]
HUB_FILES = ["*.safetensors", *TOKENIZER_FILES]
PICKLED_FILES = ["pytorch_model*.bin", "pytorch_model.bin.index.json", "adapter_model.bin"]
SAFE = {"trust_remote_code": False}  # of every from_pretrained: transformers would ask, or run it
CONVERTED = "converted_from.json"  # beside converted weights: where they come from


@dataclass(frozen=True)
class ModelName:
    """A model's name taken apart; `revision` and `label` are None where the name has none."""

    name: str
    revision: str | None = None
    label: str | None = None


def parse_name(text: str | Path, revision: str | None = None) -> ModelName:
    """`name[@revision][#label]` taken apart; a folder of exactly this name is taken whole.

    Raises ValueError where the name and `revision` say different things.
    """
    text = str(text)
    if not text.strip():
        raise ValueError(
            "no model is named; give an asset, a folder, or a Hub id (namespace/name)."
        )
    if Path(text).expanduser().is_dir():
        return ModelName(text, revision)
    rest, _, label = text.rpartition("#") if "#" in text else (text, "", "")
    if Path(rest).expanduser().is_dir():
        return ModelName(rest, revision, label or None)
    name, _, own = rest.partition("@")
    if own and revision and own != revision:
        raise ValueError(
            f"the model is named {text!r} and revision is {revision!r}. Give the revision once."
        )
    return ModelName(name, own or revision, label or None)


def resolve_model(name: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """Folder of a model: an asset (`MODEL_ASSETS`), a local folder, or a Hub id "namespace/name".

    From the Hub only weights, configuration and tokenizer files are fetched, into `<cache_dir()>/hub`
    unless HF_HOME or HF_HUB_CACHE is set; without `weights` only the small files (for a tokenizer).
    Raises ValueError for another name, AssetError where the Hub cannot be reached or has no weights.
    """
    wanted = parse_name(name, revision)
    if wanted.name in MODEL_ASSETS:
        if wanted.revision:
            raise ValueError(f"the offline asset {wanted.name!r} has no revisions; leave it out.")
        return assets.fetch(wanted.name)
    for root in (Path(), runtime.project_root()):  # Jupyter starts in notebooks/
        folder = root / Path(wanted.name).expanduser()
        if folder.is_dir():
            return as_safetensors(folder.resolve())
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", wanted.name):
        raise ValueError(
            f"unknown model {wanted.name!r}; allowed: {', '.join(MODEL_ASSETS)}, an existing folder, or a "
            "Hub id such as namespace/name, with @revision after it where one is meant."
        )
    return _fetch_from_hub(wanted, weights)


def commit_of(folder: Path) -> str | None:
    """The Hub commit whose files a folder holds, or None for a folder of another origin."""
    if folder.parent.name == "snapshots":  # the Hub's cache names folders after commits
        return folder.name
    if (folder / CONVERTED).exists():
        return json.loads((folder / CONVERTED).read_text(encoding="utf-8"))["commit"]
    return None


def _fetch_from_hub(wanted: ModelName, weights: bool) -> Path:
    folder = _snapshot(wanted, HUB_FILES if weights else TOKENIZER_FILES)
    if not weights or [*folder.glob("*.safetensors")]:
        return folder
    folder = _snapshot(wanted, [*HUB_FILES, *PICKLED_FILES])
    if not _pickled(folder):
        raise AssetError(
            f"model {wanted.name!r} has no safetensors weights and no pytorch_model.bin at this revision. "
            "Give another revision (name@revision) or another model."
        )
    return as_safetensors(folder)


def _snapshot(wanted: ModelName, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    own = os.environ.get("HF_HOME") or os.environ.get("HF_HUB_CACHE")
    cache = None if own else runtime.cache_dir() / "hub"
    try:
        folder = snapshot_download(
            wanted.name,
            revision=wanted.revision,
            cache_dir=cache,
            endpoint=os.environ.get("HF_ENDPOINT"),
            allow_patterns=patterns,
            ignore_patterns=["*/*", "consolidated*"],
        )
    except Exception as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AssetError(
            f"model {wanted.name!r} could not be had from the Hugging Face Hub ({type(error).__name__}: "
            f"{why}). Check the name and the network, log in where the model is gated, or give a folder "
            "or the offline asset 'policy'."
        ) from None
    return Path(folder)


def read_config(folder: Path) -> PretrainedConfig:
    """A model's configuration.  Raises ValueError where it has none, or is of a kind transformers lacks."""
    try:
        return AutoConfig.from_pretrained(folder, **SAFE)
    except (OSError, ValueError, KeyError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        needs_code = "trust_remote_code" in str(error)
        remedy = (
            "It brings code of its own, which is never run here; choose a model that transformers knows."
            if needs_code
            else "Is it a model's folder (config.json, weights, tokenizer)?"
        )
        raise ValueError(f"{readable(folder)} cannot be loaded: {why} {remedy}") from None


def tensor_names(path: Path) -> list[str]:
    """Names of the tensors in a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


# --- pickled weights -----------------------------------------------------------------------------


def as_safetensors(folder: Path) -> Path:
    """`folder`, or, where its weights are pickled only, a folder in the cache that holds them as safetensors.

    Raises AssetError where a file holds anything but tensors and plain values.
    """
    if [*folder.glob("*.safetensors")] or not _pickled(folder):
        return folder
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in _pickled(folder)]
    key = runtime.content_hash(str(folder), facts)[:16]
    name = f"{readable(folder).replace('/', '-')}-{key}"
    return converted(name, lambda staging: _convert(folder, staging))


def converted(name: str, make: Callable[[Path], None]) -> Path:
    """The cache's folder of converted weights of this name; `make` fills it once, whoever asks first."""
    target = runtime.cache_dir() / "converted" / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{target}.lock"):
            if not target.exists():  # another process may have made it meanwhile
                with runtime.atomic_folder(target) as staging:
                    make(staging)
    return target


def readable(folder: Path) -> str:
    """A folder's name for people: of a Hub snapshot the repository's."""
    if folder.parent.name == "snapshots":
        return folder.parents[1].name.removeprefix("models--").replace("--", "/")
    return folder.name


def _pickled(folder: Path) -> list[Path]:
    """Pickled weights of a folder, without their index."""
    patterns = [pattern for pattern in PICKLED_FILES if pattern.endswith(".bin")]
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


def _convert(folder: Path, target: Path) -> None:
    """The folder's small files, and its weights as safetensors, shard by shard."""
    for path in folder.iterdir():
        small = any(fnmatch.fnmatch(path.name, pattern) for pattern in TOKENIZER_FILES)
        if path.is_file() and small and not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)
    places, size = {}, 0
    for path in _pickled(folder):
        shard = re.sub("^pytorch_model", "model", path.stem) + ".safetensors"
        tensors = read_pickled(path)
        _write_safetensors(tensors, target / shard)
        places |= dict.fromkeys(tensors, shard)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if len(set(places.values())) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": places}
        runtime.write_atomic(target / "model.safetensors.index.json", runtime.to_json(index))
    origin = {"folder": str(folder), "commit": commit_of(folder)}
    runtime.write_atomic(target / CONVERTED, runtime.to_json(origin))


def read_pickled(path: Path) -> dict:
    """The tensors of a pickled file by name, read with weights_only=True; AssetError where it holds more."""
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AssetError(
            f"{path} was not loaded: it is damaged, or it holds more than tensors, and running what a "
            f"pickle holds would run its author's code ({why}). Use a revision with safetensors."
        ) from None
    named = state.items() if isinstance(state, dict) else ()
    tensors = {name: value for name, value in named if isinstance(value, torch.Tensor)}
    if not tensors:
        raise AssetError(f"{path} holds no tensor by name: these are not a model's weights.")
    return tensors


def _write_safetensors(tensors: dict, path: Path) -> None:
    """Write tensors; those that share memory (tied weights) are written each, as safetensors wants it."""
    own, storages = {}, set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        alone = place not in storages and tensor.is_contiguous()
        own[name] = tensor if alone else tensor.clone(memory_format=torch.contiguous_format)
        storages.add(place)
    save_file(own, path, metadata={"format": "pt"})
