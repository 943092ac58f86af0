"""A stand-in for the Hugging Face Hub on loopback: models out of a folder, as the Hub's own client asks.

`root/namespace/name` is a model's main revision, `root/namespace/name@revision` another one.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

INFO = re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?$")
TREE = re.compile(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)$")
FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")


class HubServer:
    """Serves `root` at `url`; `requests` lists the files that were fetched."""

    def __init__(self, root: Path):
        self.root, self.requests = root, []
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def folder(self, name: str, revision: str | None) -> Path | None:
        """The folder of a revision, which is named or given by its commit."""
        wanted = (revision or "main").replace("%2F", "/")
        for folder in self.root.glob(f"{name}*"):
            own_name, _, own_revision = folder.name.partition("@")
            known = (own_revision or "main", self.commit(folder))
            if own_name == name.rpartition("/")[2] and wanted in known:
                return folder
        return None

    def commit(self, folder: Path) -> str:
        return hashlib.sha1(str(folder).encode()).hexdigest()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        """Nothing: tests read their own output."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        if match := INFO.match(path):
            return self._send_info(match[1], match[2])
        if match := TREE.match(path):
            folder = self.hub.folder(match[1], match[2])
            files = [self._entry(path) for path in sorted(folder.iterdir())]
            return self._send(200, json.dumps(files).encode(), {})
        match = FILE.match(path)
        folder = self.hub.folder(match[1], match[2]) if match else None
        if folder is None or not (folder / match[3]).is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        content = (folder / match[3]).read_bytes()
        marks = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        marks["X-Repo-Commit"] = self.hub.commit(folder)
        if self.command == "GET":
            self.hub.requests.append(f"{match[1]}/{match[3]}")
        self._send(200, content, marks)

    def _entry(self, path):
        own = hashlib.sha256(path.read_bytes()).hexdigest()
        return {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": own}

    def _send_info(self, name, revision):
        folder = self.hub.folder(name, revision)
        if folder is None:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        files = [{"rfilename": path.name} for path in sorted(folder.iterdir())]
        info = {"id": name, "modelId": name, "sha": self.hub.commit(folder), "siblings": files}
        self._send(200, json.dumps(info | {"tags": [], "private": False}).encode(), {})

    def _send(self, status, content, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)
