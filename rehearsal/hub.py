"""The Hugging Face Hub on loopback: unmodified `transformers`, `datasets`, `huggingface_hub` work against it.

`HF_ENDPOINT` names its address.  `root/models/NAMESPACE/NAME/` and `root/datasets/NAMESPACE/NAME/` are main
branches, `NAME@REVISION/` beside one is another revision ("/" in it as %2F).  The file `.hub.json` in a
repository may say {"gated": true}: then only clients with the right token read it.

Answered: facts of a repository and its files, trees, paths, branches, and the files themselves, whole or from
a byte on.  Large files redirect to another address, as the Hub's do.

Simplified: one commit a revision, which is the hash of its content; no uploads, no pages, no Xet.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, parse_qsl, quote, unquote

SETTINGS = ".hub.json"
DAY = "2024-01-01T00:00:00.000Z"  # of every commit
LARGE = (
    ".safetensors",
    ".bin",
    ".parquet",
    ".gz",
    ".model",
    ".h5",
    ".msgpack",
    ".ot",
)  # in Git LFS
API = re.compile(
    r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info|refs)(?:/(.*))?)?"
)
FILE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class Refusal(Exception):
    """An answer that is none: the status and the code by which clients know what is wrong."""

    def __init__(self, status: int, code: str):
        super().__init__(code)
        self.status = status
        self.code = code


class Revision:
    """One revision of a repository: a folder and its files by their path in it."""

    def __init__(self, folder: Path):
        self.folder = folder
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        self.files = {p.relative_to(folder).as_posix(): p for p in paths if p.name != SETTINGS}
        content = [(name, facts(path)["sha256"]) for name, path in self.files.items()]
        self.commit = hashlib.sha1(json.dumps(content).encode()).hexdigest()

    @property
    def gated(self) -> bool:
        """Whether only clients with the token read it."""
        path = self.folder / SETTINGS
        return path.exists() and json.loads(path.read_text()).get("gated", False)

    def info(self, kind: str, name: str) -> dict:
        """What the Hub says of the repository."""
        known = {
            "_id": name,
            "id": name,
            "sha": self.commit,
            "gated": "manual" if self.gated else False,
        }
        known |= {"private": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0}
        known |= {"createdAt": DAY, "lastModified": DAY}
        known["siblings"] = [{"rfilename": file} for file in self.files]
        return known | ({"modelId": name} if kind == "models" else {})

    def entry(self, name: str) -> dict:
        """What a listing says of one path: a file, or a folder of some."""
        if name not in self.files:
            return {
                "type": "directory",
                "path": name,
                "size": 0,
                "oid": hashlib.sha1(name.encode()).hexdigest(),
            }
        known = facts(self.files[name])
        row = {"type": "file", "path": name, "size": known["size"], "oid": known["git"]}
        if name.endswith(LARGE):
            row["lfs"] = {"oid": known["sha256"], "size": known["size"], "pointerSize": 134}
        return row

    def tree(self, folder: str, recursive: bool) -> list[dict]:
        """The entries under a folder ("" for all), those of its folders too where `recursive`."""
        start = f"{folder}/" if folder else ""
        names = dict.fromkeys(file for file in self.files if file.startswith(start))
        if not names:
            raise Refusal(404, "EntryNotFound")
        parents = (str(p) for name in names for p in Path(name).parents if str(p) != ".")
        names |= dict.fromkeys(p for p in parents if p.startswith(start) and p != folder)
        depth = len(Path(folder).parts) + 1
        return [self.entry(name) for name in names if recursive or len(Path(name).parts) == depth]

    def has(self, name: str) -> bool:
        """Whether this is a file or a folder here."""
        return name in self.files or any(file.startswith(f"{name}/") for file in self.files)


def facts(path: Path) -> dict:
    """Size, git's blob id and SHA-256 of a file."""
    status = path.stat()
    return _facts(path, status.st_mtime_ns, status.st_size)


@cache
def _facts(path: Path, _changed: int, _size: int) -> dict:
    content = path.read_bytes()
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return {"size": len(content), "git": git, "sha256": hashlib.sha256(content).hexdigest()}


class Hub:
    """Serves `root` at `url` until `close`.  `files` lists what was fetched: NAMESPACE/NAME/PATH.

    `token`: what a client must send to read a gated repository.
    """

    def __init__(self, root: Path, token: str = "hf_rehearsal"):
        self.root = root.resolve()
        self.token = token
        self.files: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        self.server.shutdown()
        self.server.server_close()

    def revision(self, kind: str, name: str, wanted: str, token: str) -> Revision:
        """The revision of that name or commit; Refusal as the Hub would refuse."""
        home = self.root / kind / name
        folders = [*home.parent.glob(home.name), *home.parent.glob(f"{home.name}@*")]
        if ".." in name or not folders:
            raise Refusal(404 if token else 401, "RepoNotFound")
        known = {unquote(path.name.partition("@")[2]) or "main": Revision(path) for path in folders}
        if any(revision.gated for revision in known.values()) and token != self.token:
            raise Refusal(403 if token else 401, "GatedRepo")
        for label, revision in known.items():
            if wanted in (label, revision.commit):
                return revision
        raise Refusal(404, "RevisionNotFound")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        """Nothing: what was fetched is in `Hub.files`."""

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        self.do_GET()

    def do_GET(self):
        size = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(size).decode()
        path, _, query = self.path.partition("?")
        self.query = dict(parse_qsl(query))
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip()
        try:
            if match := API.fullmatch(unquote(path)):
                return self.send_json(self.api(*match.groups()))
            if match := FILE.fullmatch(path):
                return self.resolve(*(unquote(part or "") for part in match.groups()))
            raise Refusal(404, "EntryNotFound")
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.code}
            self.send(refusal.status, json.dumps({"error": refusal.code}).encode(), headers)

    def api(self, kind: str, name: str, what: str | None, rest: str | None) -> object:
        """Facts of a repository, its branches, its tree, or some of its paths."""
        if what is None or what == "refs":
            main = self.hub.revision(kind, name, "main", self.token)
            branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": main.commit}
            refs = {"branches": [branch], "tags": [], "converts": []}
            return main.info(kind, name) if what is None else refs
        wanted, path = _revision_and_path(rest or "main")
        revision = self.hub.revision(kind, name, wanted, self.token)
        if what == "revision":
            return revision.info(kind, name)
        if what == "tree":
            return revision.tree(path, self.query.get("recursive", "").lower() in ("true", "1"))
        return [revision.entry(name) for name in self.posted_paths() if revision.has(name)]

    def posted_paths(self) -> list[str]:
        """The paths that a paths-info request asks for, as a form or as JSON."""
        if "json" in (self.headers.get("Content-Type") or ""):
            paths = json.loads(self.body)["paths"]
            return [paths] if isinstance(paths, str) else paths
        return parse_qs(self.body).get("paths", [])

    def resolve(self, kind: str, name: str, wanted: str, file: str) -> None:
        """A file; a large one at the second address that the first redirects to."""
        revision = self.hub.revision(
            kind or "models", name, wanted, self.token or self.query.get("token", "")
        )
        if file not in revision.files:
            raise Refusal(404, "EntryNotFound")
        path = revision.files[file]
        known = facts(path)
        marks = {
            "X-Repo-Commit": revision.commit,
            "ETag": f'"{known["git"]}"',
            "Accept-Ranges": "bytes",
        }
        if file.endswith(LARGE):
            marks["ETag"] = f'"{known["sha256"]}"'
            if "storage" not in self.query:
                marks |= {"X-Linked-Etag": marks["ETag"], "X-Linked-Size": str(known["size"])}
                other = f"http://localhost:{self.hub.port}{self.path.partition('?')[0]}"
                there = {"Location": f"{other}?storage=1&token={quote(self.token)}"}
                return self.send(302, b"", marks | there)
        if self.command == "GET":
            self.hub.files.append(f"{name}/{file}")
        self.send_part(path.read_bytes(), marks)

    def send_part(self, content: bytes, headers: dict) -> None:
        """The content, or what of it the header Range asks for."""
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not match:
            return self.send(200, content, headers)
        start = int(match[1])
        stop = min(int(match[2] or len(content)) + 1, len(content))
        if start >= len(content):
            return self.send(416, b"", headers | {"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self.send(206, content[start:stop], headers)

    def send_json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, content: bytes, headers: dict) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _revision_and_path(text: str) -> tuple[str, str]:
    """REVISION/PATH taken apart; a revision such as refs/pr/1 holds slashes itself."""
    special = re.fullmatch(r"(refs/[^/]+/[^/]+)(?:/(.*))?", text)
    if special:
        return special[1], special[2] or ""
    revision, _, path = text.partition("/")
    return revision, path
