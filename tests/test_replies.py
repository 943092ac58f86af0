"""Replies that are kept, and Retry-After."""

import threading

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


def test_retry_after_takes_seconds_and_dates():
    assert replies.retry_after("2") == 2 and replies.retry_after(None) is None
    assert replies.retry_after("soon") is None and replies.retry_after("") is None
    assert replies.retry_after("nan") is None and replies.retry_after("inf") is None
    assert replies.retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
