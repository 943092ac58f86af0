"""Replies that cost money or time, kept so that each is bought once; and how long a server asks to wait.

One SQLite file holds the replies under the hash of what was asked.  A reply is on disk when `put` returns:
a process that is killed loses only what had not arrived.
"""

from __future__ import annotations

import email.utils
import json
import math
import os
import sqlite3
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from lib import runtime

try:
    import fcntl
except ImportError:  # Windows: runs in several processes may then buy the same reply
    fcntl = None


LONGEST_WAIT = 900.0  # seconds; a server that asks for more is not waited for


class ReplyStore:
    """Replies (JSON values) by key, and claims: a key is bought by one thread or process at a time.

    Several processes may use one file.  `put` keeps the first reply of a key.  A claim is a lock on one byte
    of a file beside the store, which the system frees when its process dies.  Claims hold between processes,
    not between two stores of one process: take the store of a file from `open_store`.  Raises ValueError for
    a file that is no store, or cannot be written.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        runtime.make_folder(self.path.parent, "FEEDBACK_CACHE")
        self._guard = threading.Lock()
        self._claimed: set[str] = set()
        self._locks: int | None = (
            None  # the file whose bytes are claimed, opened with the first claim
        )
        try:
            self._db = self._open()
        except sqlite3.Error as error:
            raise ValueError(
                f"{path} cannot hold replies ({error}). Name another file, set FEEDBACK_CACHE to a folder of "
                "your own, or move a damaged file away: what it held is then bought again."
            ) from None

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=60, check_same_thread=False)
        # With a write-ahead log a commit outlives its process without waiting for the disk.
        for _ in range(600):
            try:
                db.execute("PRAGMA journal_mode=WAL")
                break
            except sqlite3.OperationalError as error:  # two begin one file: no timeout holds here
                if "locked" not in str(error):
                    raise
                time.sleep(0.1)
        db.execute("PRAGMA synchronous=NORMAL")
        db.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT, at TEXT)")
        return db

    def get(self, key: str):
        """The stored reply, or None."""
        return self.get_many([key]).get(key)

    def get_many(self, keys: Iterable[str]) -> dict[str, object]:
        """The stored replies among these keys."""
        query = "SELECT key, reply FROM replies WHERE key IN (SELECT value FROM json_each(?))"
        with self._guard:
            rows = self._db.execute(query, [json.dumps(list(keys))]).fetchall()
        return {key: json.loads(reply) for key, reply in rows}

    def put(self, key: str, reply: object, *, replace: bool = False) -> None:
        """Store a reply unless the key has one; `replace`: in the place of one that is no answer."""
        rule = "REPLACE" if replace else "IGNORE"
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        row = (key, json.dumps(reply), now)
        with self._guard, self._db:
            self._db.execute(f"INSERT OR {rule} INTO replies VALUES (?, ?, ?)", row)

    def put_many(self, replies: dict[str, object]) -> None:
        """Store the replies of several keys, all or none; a key that has one keeps it."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        rows = [(key, json.dumps(reply), now) for key, reply in replies.items()]
        with self._guard, self._db:
            self._db.executemany("INSERT OR IGNORE INTO replies VALUES (?, ?, ?)", rows)

    def __len__(self) -> int:
        with self._guard:
            return self._db.execute("SELECT COUNT(*) FROM replies").fetchone()[0]

    def claim(self, key: str) -> bool:
        """True where nobody else is buying this key; then `release` it."""
        with self._guard:
            if key in self._claimed:
                return False
            try:
                self._lock(key, take=True)
            except OSError:
                return False
            self._claimed.add(key)
            return True

    def release(self, key: str) -> None:
        """Give a claim back."""
        with self._guard:
            self._lock(key, take=False)
            self._claimed.discard(key)

    def _lock(self, key: str, take: bool) -> None:
        if fcntl is None:
            return
        if self._locks is None:
            path = self.path.with_suffix(".lock")
            self._locks = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        mode = fcntl.LOCK_EX | fcntl.LOCK_NB if take else fcntl.LOCK_UN
        fcntl.lockf(self._locks, mode, 1, int(key[:15], 16))


_stores: dict[tuple[Path, int], ReplyStore] = {}
_opening = threading.Lock()


def open_store(path: Path | str) -> ReplyStore:
    """The one store that this process has of a file, whichever thread asks first.

    A second one would buy what the first is buying, and closing it would free the first one's locks.
    """
    name = (Path(path).expanduser().resolve(), os.getpid())
    with _opening:
        if name not in _stores:
            _stores[name] = ReplyStore(name[0])
        return _stores[name]


def retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for (a number or a date); None where it says neither."""
    try:
        seconds = float(value or "")
    except ValueError:
        date = email.utils.parsedate_tz(value)
        try:
            seconds = email.utils.mktime_tz(date) - time.time() if date else math.nan
        except (ValueError, OverflowError):  # a year that no calendar has
            seconds = math.nan
    return max(0.0, seconds) if math.isfinite(seconds) else None
