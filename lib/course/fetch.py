"""The papers' own released files: fetched from where their authors put them, checked by hash, and found.

`python -m lib fetch NAME` downloads a set from GitHub at a fixed commit, or from the Hugging Face Hub at a
fixed revision, into `<cache>/released/<name>/` (git-ignored) and writes `card.json` beside the files:
source, licence, sizes, hashes.  A cut or killed download goes on where it stopped.  `released` says
where a set is.  Nothing of these files is part of the course, and some may not be passed on at all.
The name of an asset (`lib.course.assets`), such as a local annotator's, gets that.

`COURSE_GITHUB` and `HF_ENDPOINT` name other servers in the place of raw.githubusercontent.com and
huggingface.co: for mirrors, and for tests with a server on loopback.

What there is stands in `released.json`: repositories, commits, and for each file git's blob id, or the
SHA-256 of a file in Git LFS.

Simplified: a file whose hash we could not learn is accepted at its first use, and its hash recorded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

import filelock
import requests

from lib import runtime
from lib.course import assets
from lib.course.assets import AssetError, advice

CARD = "card.json"
ATTEMPTS = 4  # that bring no byte, before a download is given up
PAUSE = 1.0  # seconds before the second attempt; it doubles
TIMEOUT = (15, 60)  # seconds to connect, and between two pieces
BLOCK = 1 << 16  # bytes; what a killed process loses at most


class _Unreachable(AssetError):
    """The server does not answer: no use in asking it for the next file."""


@dataclass(frozen=True)
class Source:
    """Files of one repository at one commit, each with what is known of its content."""

    host: str  # "github" or "hub"
    repository: str
    commit: str
    files: dict[str, str]  # path -> "git:<blob id>", "sha256:<hash>", or "" where neither is known

    def url(self, path: str) -> str:
        """Address of a file's bytes."""
        if self.host == "github":
            base = os.environ.get("COURSE_GITHUB") or "https://raw.githubusercontent.com"
            return f"{base.rstrip('/')}/{self.repository}/{self.commit}/{quote(path)}"
        base = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        return f"{base.rstrip('/')}/datasets/{self.repository}/resolve/{self.commit}/{quote(path)}"

    @property
    def address(self) -> str:
        """The repository's page, for people."""
        if self.host == "github":
            return f"github.com/{self.repository}"
        return f"huggingface.co/datasets/{self.repository}"


@dataclass(frozen=True)
class Released:
    """A set of released files, with what its card says."""

    name: str
    what: str
    licence: str
    megabytes: int  # about: not every file's size could be learned
    sources: tuple[Source, ...]
    notice: str = ""  # terms to know before the download

    @property
    def folder(self) -> Path:
        """Where `fetch` puts the files."""
        return runtime.cache_dir() / "released" / self.name

    @property
    def files(self) -> list[str]:
        """Names of the set's files; folders of the repository are left out."""
        return [Path(path).name for source in self.sources for path in source.files]


def _read_sets() -> dict[str, Released]:
    """The sets of `released.json` by name, in its order."""
    text = (Path(__file__).parent / "released.json").read_text(encoding="utf-8")
    known = {}
    for name, entry in json.loads(text).items():
        sources = tuple(Source(**source) for source in entry.pop("sources"))
        known[name] = Released(name, sources=sources, **entry)
    return known


SETS = _read_sets()


# --- where a set is ------------------------------------------------------------------------------


def released(name: str, *files: str, needed: bool = True) -> Path | None:
    """Folder with a set's files: `$FEEDBACK_DATA/<name>` where it has them, else where `fetch` put them.

    `files`: those that must be there; none named means the folder itself, or everything fetched.
    Where they are nowhere, FileNotFoundError names the command that gets them; `needed=False` prints that
    instead and returns None.  Raises ValueError for an unknown name.
    """
    folder = find(name, *files)
    if folder is not None:
        return folder
    item = _known(name)
    message = (
        f"the released files {name!r}{' (' + ', '.join(files) + ')' if files else ''} are not here. "
        f"Try: python -m lib fetch {name} ({item.licence}; about {item.megabytes} MB), or set "
        f"FEEDBACK_DATA to a folder of yours that has them in {name}/."
    )
    own = os.environ.get("FEEDBACK_DATA")
    if own and not Path(own).expanduser().is_dir():
        message += f" (FEEDBACK_DATA is {own!r} now, which is no folder.)"
    if needed:
        raise FileNotFoundError(message)
    print(message)
    return None


def find(name: str, *files: str) -> Path | None:
    """As `released`, in silence: the folder, or None where the files are nowhere."""
    item = _known(name)
    own = os.environ.get("FEEDBACK_DATA")
    if own:
        folder = Path(own).expanduser() / name
        if folder.is_dir() and all((folder / file).is_file() for file in files):
            return folder
    return item.folder if _has(item, files or item.files) else None


def _known(name: str, others: Sequence[str] = ()) -> Released:
    if name not in SETS:
        raise ValueError(f"unknown set {name!r}; allowed: {', '.join([*SETS, *others])}.")
    return SETS[name]


def _card(item: Released) -> dict:
    """The card written by `fetch`; one without files where there is none."""
    try:
        card = json.loads((item.folder / CARD).read_text(encoding="utf-8"))
        return card if isinstance(card["files"], dict) else {"files": {}}
    except (OSError, ValueError, KeyError, TypeError):
        return {"files": {}}


def _has(item: Released, files) -> bool:
    """Whether these files were fetched and still have their sizes (`fetch` compares hashes)."""
    recorded = _card(item)["files"]
    for file in files:
        path = item.folder / file
        if file not in recorded or not path.is_file():
            return False
        if path.stat().st_size != recorded[file].get("bytes"):
            return False
    return True


def describe_sets() -> str:
    """What there is, one paragraph a set or asset: what, where from, licence, size, is it here."""
    parts = []
    for item in SETS.values():
        sources = " and ".join(source.address for source in item.sources)
        lines = [
            f"{item.name}: {_state(item)}",
            item.what,
            f"{_files(len(item.files))}, about {item.megabytes} MB, from {sources}",
            f"licence: {item.licence}",
        ]
        parts.append("\n    ".join(lines))
    for card in assets.cards().to_dict("records"):
        head = f"{card['name']}: {card['state']}"
        size = f"{card['rows or parameters']}, {card['MB']:.1f} MB, from {card['source']}"
        parts.append("\n    ".join([head, card["what"], size, f"licence: {card['licence']}"]))
    return "\n".join([*parts, "Get one with: python -m lib fetch NAME"])


def _state(item: Released) -> str:
    """Where a set's files are, in words."""
    places = []
    own = os.environ.get("FEEDBACK_DATA")
    if own and (Path(own).expanduser() / item.name).is_dir():
        places.append(f"in FEEDBACK_DATA ({own})")
    count = sum(_has(item, [file]) for file in item.files)
    if count == len(item.files):
        places.append(f"fetched ({item.folder})")
    elif count or list(item.folder.glob("*.part")):
        places.append(f"begun ({count} of {_files(len(item.files))} whole)")
    return ", ".join(places) or "not here"


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


# --- fetching ------------------------------------------------------------------------------------


def fetch(*names: str) -> None:
    """Download what is missing or damaged of these sets, check it, and write their cards; or of assets.

    Files that are whole are not asked for again.  Raises ValueError for an unknown name, before anything
    is downloaded, and, after all was tried, AssetError where a file cannot be had or is not the expected
    one; what was whole by then is kept and usable.
    """
    failures = []
    asked = [assets.ASSETS.get(name) or _known(name, [*assets.ASSETS]) for name in names]
    for item in asked:
        try:
            failures += _fetch_set(item) if isinstance(item, Released) else _fetch_asset(item)
        except OSError as error:  # the disk, not the network
            failures.append(advice(f"{type(error).__name__}: {error}", error.errno))
    if failures:
        raise AssetError(
            "\n".join(["not everything was fetched; what is whole is kept.", *failures])
        )
    print("Notebooks that ran before: run them again with --force to see these files.")


def _fetch_asset(asset: assets.Asset) -> list[str]:
    """One asset, where it is not here whole.  Returns what went wrong."""
    print(f"{asset.name}: {asset.what}. Licence: {asset.licence}.")
    try:
        print(f"{asset.name}: in {assets.fetch(asset.name)}")
    except AssetError as error:
        return [str(error)]
    return []


def _fetch_set(item: Released) -> list[str]:
    """One set: terms first, then its files, one repository after the other.  Returns what went wrong."""
    print(f"{item.name}: {item.what}. Licence: {item.licence}.")
    if item.notice:
        print(f"Before you use it: {item.notice}")
    item.folder.mkdir(parents=True, exist_ok=True)
    failures = []
    with _alone(item):
        for source in item.sources:
            failures += _fetch_source(item, source)
    if not failures:
        print(f"{item.name}: {_files(len(item.files))} in {item.folder}")
    return failures


@contextlib.contextmanager
def _alone(item: Released) -> Iterator[None]:
    """Within: no other process fetches this set."""
    lock = filelock.FileLock(f"{item.folder}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"another process is fetching {item.name}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch_source(item: Released, source: Source) -> list[str]:
    """Fetch a repository's files; returns what went wrong."""
    failures = []
    for path, expected in source.files.items():
        try:
            _fetch_file(item, source, path, expected)
        except AssetError as error:
            failures.append(str(error))
            if isinstance(error, _Unreachable):  # another repository may be in reach
                break
    return failures


def _fetch_file(item: Released, source: Source, path: str, expected: str) -> None:
    """One file: left as it is where it is whole, else downloaded, checked, moved into place, recorded."""
    file = item.folder / Path(path).name
    facts = _facts(file)
    if facts and _fits(facts, expected, _card(item)["files"].get(file.name), source.commit):
        print(f"  {file.name}: here already")
        _record(item, source, path, expected, facts)
        return
    part = file.with_name(f"{file.name}.part")
    if not expected:  # what an older part holds cannot be checked at the end
        part.unlink(missing_ok=True)
    resumed = part.exists()
    facts = receive(source.url(path), part)
    if (
        expected and resumed and not _fits(facts, expected)
    ):  # the older part may have been the fault
        part.unlink()
        facts = receive(source.url(path), part)
    if expected and not _fits(facts, expected):
        part.unlink()
        kind = expected.partition(":")[0]
        raise AssetError(
            f"{file.name} from {source.url(path)} is not the expected file: it has {kind}:{facts[kind]}, not "
            f"{expected}; it was removed. Try again; if it stays so, it was altered on its way or at its "
            "source."
        )
    os.replace(part, file)
    _record(item, source, path, expected, facts)
    checked = expected or f"no hash was known, accepted at first use: sha256:{facts['sha256']}"
    print(f"  {file.name}: {facts['bytes']:,} bytes, {checked}")


def _facts(path: Path) -> dict:
    """Size, SHA-256 and git's blob id of a file; empty where there is none."""
    if not path.is_file():
        return {}
    size = path.stat().st_size
    sha256 = hashlib.sha256()
    # What `git hash-object` prints: SHA-1 of "blob <size>", a zero byte, and the content.
    blob = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            sha256.update(block)
            blob.update(block)
    return {"bytes": size, "sha256": sha256.hexdigest(), "git": blob.hexdigest()}


def _fits(facts: dict, expected: str, recorded: dict | None = None, commit: str = "") -> bool:
    """Whether a file is the expected one, or the recorded one where no hash was known beforehand."""
    if expected:
        kind, _, value = expected.partition(":")
        return facts[kind] == value
    if recorded is None:
        return False
    return recorded.get("commit") == commit and recorded.get("sha256") == facts["sha256"]


def _record(item: Released, source: Source, path: str, expected: str, facts: dict) -> None:
    """Write the card, with this file in it."""
    files = _card(item)["files"]
    entry = {"source": source.address, "commit": source.commit, "path": path, **facts}
    entry["checked"] = expected or "first use"
    if files.get(Path(path).name) == entry:
        return
    files[Path(path).name] = entry
    card = {"name": item.name, "what": item.what, "licence": item.licence}
    card |= {"notice": item.notice, "files": files}
    runtime.write_atomic(item.folder / CARD, runtime.to_json(card))


def receive(url: str, part: Path) -> dict:
    """Fill `part` to the file's end, a connection that breaks taken up where it broke; return its facts."""
    failed = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _receive_once(url, part, before)
            return _facts(part)
        except requests.RequestException as error:
            grown = part.exists() and part.stat().st_size > before
            failed = 1 if grown else failed + 1
            if failed == ATTEMPTS or not _passes(error):
                kind = _Unreachable if _passes(error) else AssetError
                raise kind(_refusal(url, error)) from None
            time.sleep(PAUSE * 2 ** (failed - 1))


def _receive_once(url: str, part: Path, start: int) -> None:
    """One request for what is missing from byte `start` on."""
    # Without "identity" a server may compress, and a range would count compressed bytes.
    headers = {"Accept-Encoding": "identity", "User-Agent": "learning-from-feedback"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == 416:  # nothing follows: whole already, or longer than the file
            if response.headers.get("Content-Range", "").endswith(f"/{start}"):
                return
            part.unlink()
            return _receive_once(url, part, 0)
        response.raise_for_status()
        if response.headers.get("Content-Type", "").startswith("text/html"):
            host = urlsplit(url).netloc
            raise AssetError(
                f"{host} sent a web page in the place of {url}: a log-in of your network?"
            )
        if response.status_code != 206:  # the server sends all of it again
            start = 0
        length = int(response.headers.get("Content-Length") or 0)
        label = f"fetching {part.name.removesuffix('.part')}"
        bar = runtime.progress(total=round((start + length) / 1e6), label=label, unit="MB")
        with contextlib.closing(bar), open(part, "ab" if start else "wb") as stream:
            for block in response.iter_content(BLOCK):
                stream.write(block)
                bar.update(round(stream.tell() / 1e6) - bar.n)


def _passes(error: requests.RequestException) -> bool:
    """Whether another attempt may help: no answer, a cut one, or a server that is busy."""
    if error.response is None:
        return True
    return error.response.status_code == 429 or error.response.status_code >= 500


def _refusal(url: str, error: requests.RequestException) -> str:
    """Why a file cannot be had, and what to try."""
    host = urlsplit(url).netloc
    by_hand = f"By hand: save {url} into a folder that FEEDBACK_DATA names (see data/README.md)."
    if error.response is None:
        return (
            f"{host} cannot be reached or broke off ({type(error).__name__}). Check the network, and "
            f"HTTPS_PROXY where you need a proxy; the same command goes on where it stopped. {by_hand}"
        )
    status = error.response.status_code
    if status in (401, 403):
        return f"{host} refused {url} (HTTP {status}). {by_hand}"
    if status == 404:
        return (
            f"{host} has no file {url} any more (HTTP 404). Is there a newer version of the course?"
        )
    return f"{host} answered HTTP {status} for {url}. Try again later. {by_hand}"
