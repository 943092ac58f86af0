"""Replies that are kept, and Retry-After."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lib import replies, runtime


def test_reply_cache_keeps_the_first_reply_across_instances_and_threads(tmp_path):
    path = tmp_path / "replies.sqlite"
    caches = [replies.ReplyStore(path) for _ in range(4)]
    key = runtime.content_hash("model", {"b": 1, "a": 2})
    assert key == runtime.content_hash("model", {"a": 2, "b": 1})
    threads = [threading.Thread(target=c.put, args=(key, {"n": i})) for i, c in enumerate(caches)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = caches[0].get(key)
    caches[1].put(key, "later")
    assert replies.ReplyStore(path).get(key) == kept
    assert len(caches[2]) == 1
    assert caches[3].get("absent") is None


def test_threads_that_ask_at_once_get_one_store(tmp_path, monkeypatch):
    """Two stores would each claim, and buy, the same reply."""
    create = replies.ReplyStore.__init__

    def slowly(self, path):
        time.sleep(0.05)
        create(self, path)

    monkeypatch.setattr(replies.ReplyStore, "__init__", slowly)
    paths = [tmp_path / "a.sqlite", tmp_path / "." / "b" / ".." / "a.sqlite"] * 4
    with ThreadPoolExecutor(len(paths)) as pool:
        stores = list(pool.map(replies.open_store, paths))
    assert len(set(map(id, stores))) == 1
    assert [store.claim("0" * 16) for store in stores] == [True] + [False] * 7


def test_processes_that_begin_one_file_at_once_all_open_it(tmp_path):
    """A new file is turned to its log by one of them; the others wait for it (each connection is its own)."""
    barrier = threading.Barrier(8)

    def begin(path):
        barrier.wait()
        return replies.ReplyStore(path)

    with ThreadPoolExecutor(8) as threads:
        for k in range(60):
            assert len(list(threads.map(begin, [tmp_path / f"{k}.sqlite"] * 8))) == 8


def test_no_module_opens_a_store_of_its_own():
    lib = Path(replies.__file__).parent
    opened = [p for p in lib.rglob("*.py") if "= ReplyStore(" in p.read_text()]
    assert opened == [Path(replies.__file__)]


def test_retry_after_takes_seconds_and_dates():
    assert replies.retry_after("2") == 2 and replies.retry_after(None) is None
    assert replies.retry_after("soon") is None and replies.retry_after("") is None
    assert replies.retry_after("nan") is None and replies.retry_after("inf") is None
    assert replies.retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert replies.retry_after("-7") == 0
    assert replies.retry_after("Fri, 31 Dec 9999 23:59:59 GMT") > 1e9
    assert replies.retry_after("Fri, 31 Dec 99999 23:59:59 GMT") is None


def test_a_file_that_is_no_store_is_refused_by_name(tmp_path):
    (tmp_path / "notes.txt").write_text("no database " * 99)
    (tmp_path / "folder").mkdir()
    for name in ("notes.txt", "folder"):
        with pytest.raises(ValueError, match=f"{name} cannot hold replies .* Name another file"):
            replies.open_store(tmp_path / name)
    with pytest.raises(OSError, match="notes.txt. Set FEEDBACK_CACHE to a folder of your own"):
        replies.open_store(tmp_path / "notes.txt" / "r.sqlite")
