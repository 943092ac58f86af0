"""Released files: real downloads from a server on loopback that can cut, stall, alter and refuse."""

import functools
import hashlib
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lib import data
from lib.course import assets, cli, fetch
from lib.papers import rewardlm
from lib.papers.ilf import data as ilf

ROOT = Path(fetch.__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
BYTES = np.random.default_rng(0)
TRAIN, EXTRA, TERMS = BYTES.bytes(2_000_000), BYTES.bytes(700_000), b"take it\n"
CONTENT = {  # address -> bytes
    f"/authors/paper/{COMMIT}/tasks/data/train.json": TRAIN,
    f"/authors/paper/{COMMIT}/LICENSE": TERMS,
    f"/datasets/authors/paper/resolve/{COMMIT}/more/extra.csv": EXTRA,
}


def blob_id(content: bytes) -> str:
    """What `git hash-object` prints, by git itself."""
    command = ["git", "hash-object", "--stdin"]
    return subprocess.run(command, input=content, capture_output=True).stdout.decode().strip()


class Server:
    """Repositories on 127.0.0.1: counts requests, keeps their ranges, and misbehaves on demand."""

    def __init__(self):
        self.content = dict(CONTENT)
        self.requests, self.ranges = [], []
        self.cut = {}  # address -> how many more answers break off half-way
        self.status = {}  # address -> refuse with this status
        self.pause, self.ranged, self.kind = 0.0, True, "text/plain"
        handler = functools.partial(_Handler, self)
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

        self.server.handle_error = lambda *_: None  # a client that was killed

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    def __init__(self, repositories, *args):
        self.repositories = repositories
        super().__init__(*args)

    def log_message(self, *args):
        pass

    def do_GET(self):
        served = self.repositories
        served.requests.append(self.path)
        asked = self.headers.get("Range", "")
        served.ranges.append(asked)
        body = served.content.get(self.path)
        if self.path in served.status or body is None:
            return self.send_error(served.status.get(self.path, 404))
        start = int(re.search(r"\d+", asked)[0]) if asked and served.ranged else 0
        if start >= len(body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", served.kind)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        middle = (start + len(body)) // 2
        self.wfile.write(body[start:middle])
        self.wfile.flush()
        time.sleep(served.pause)
        if served.cut.get(self.path):
            served.cut[self.path] -= 1
            self.close_connection = True
            return
        self.wfile.write(body[middle:])


def tiny(train=None, extra=None) -> dict:
    """A set of two repositories, as an entry of released.json."""
    github = {"tasks/data/train.json": train or f"git:{blob_id(TRAIN)}", "LICENSE": ""}
    hub = {"more/extra.csv": extra or f"sha256:{hashlib.sha256(EXTRA).hexdigest()}"}
    where = {"repository": "authors/paper", "commit": COMMIT}
    return {
        "what": "noise",
        "licence": "none at all",
        "notice": "for tests only.",
        "megabytes": 3,
        "sources": [
            {"host": "github", **where, "files": github},
            {"host": "hub", **where, "files": hub},
        ],
    }


def register(monkeypatch, **hashes):
    entry = tiny(**hashes)
    sources = tuple(fetch.Source(**source) for source in entry.pop("sources"))
    monkeypatch.setitem(fetch.SETS, "tiny", fetch.Released("tiny", sources=sources, **entry))


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Two repositories with the set "tiny", an empty cache, no FEEDBACK_DATA, and short pauses."""
    served = Server()
    monkeypatch.setenv("COURSE_GITHUB", served.url)
    monkeypatch.setenv("HF_ENDPOINT", served.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("FEEDBACK_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FEEDBACK_DATA", raising=False)
    monkeypatch.setattr(fetch, "PAUSE", 0.01)
    register(monkeypatch)
    yield served
    served.close()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache" / "released" / "tiny"


def test_both_hosts_a_card_and_a_second_call_that_asks_for_nothing(server, folder, capsys):
    fetch.fetch("tiny")
    said = capsys.readouterr().out
    assert (folder / "train.json").read_bytes() == TRAIN
    assert (folder / "extra.csv").read_bytes() == EXTRA
    assert sorted(path.name for path in folder.iterdir()) == [
        "LICENSE", "card.json", "extra.csv", "train.json",
    ]  # fmt: skip
    assert sorted(server.requests) == sorted(CONTENT)
    fetch.fetch("tiny")
    assert len(server.requests) == 3
    # Terms first, then the files; a file of unknown hash is named as such, with its hash.
    assert said.index("none at all") < said.index("for tests only") < said.index("train.json")
    assert f"accepted at first use: sha256:{hashlib.sha256(TERMS).hexdigest()}" in said
    card = json.loads((folder / "card.json").read_text())
    assert card["licence"] == "none at all" and card["notice"] == "for tests only."
    entry = card["files"]["train.json"]
    assert entry["checked"] == f"git:{blob_id(TRAIN)}" == f"git:{entry['git']}"
    assert entry["sha256"] == hashlib.sha256(TRAIN).hexdigest() and entry["bytes"] == len(TRAIN)
    assert entry["commit"] == COMMIT and entry["source"] == "github.com/authors/paper"
    assert card["files"]["LICENSE"]["checked"] == "first use"


def test_a_cut_connection_goes_on_where_it_broke(server, folder):
    address = next(iter(CONTENT))
    server.cut[address] = 3
    fetch.fetch("tiny")
    assert (folder / "train.json").read_bytes() == TRAIN
    starts = [int(re.search(r"\d+", asked)[0]) for asked in server.ranges if asked]
    assert len(starts) == 3 and 0 < starts[0] < starts[1] < starts[2] < len(TRAIN)
    assert starts[0] > len(TRAIN) // 2 - fetch.BLOCK  # next to nothing is asked for twice


def test_a_server_without_ranges_sends_all_again(server, folder):
    server.cut[next(iter(CONTENT))] = 1
    server.ranged = False
    fetch.fetch("tiny")
    assert (folder / "train.json").read_bytes() == TRAIN


def test_what_an_earlier_process_left_is_used_or_replaced(server, folder):
    folder.mkdir(parents=True)
    (folder / "train.json.part").write_bytes(TRAIN[:1_500_000])
    (folder / "extra.csv.part").write_bytes(b"x" * 500_000)  # of another file
    (folder / "LICENSE.part").write_bytes(b"ta")  # cannot be checked: not used
    fetch.fetch("tiny")
    assert (folder / "train.json").read_bytes() == TRAIN
    assert (folder / "extra.csv").read_bytes() == EXTRA
    assert (folder / "LICENSE").read_bytes() == TERMS
    assert "bytes=1500000-" in server.ranges
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize("length", [len(TRAIN), len(TRAIN) + 10])
def test_a_part_that_is_whole_or_too_long(server, folder, length):
    folder.mkdir(parents=True)
    (folder / "train.json.part").write_bytes((TRAIN + b"0123456789")[:length])
    fetch.fetch("tiny")
    assert (folder / "train.json").read_bytes() == TRAIN


def test_another_file_is_refused_with_both_hashes_and_the_rest_is_kept(server, folder, monkeypatch):
    register(monkeypatch, train="git:" + "0" * 40)
    with pytest.raises(
        fetch.AssetError, match=f"train.json.*it has git:{blob_id(TRAIN)}, not git:0000"
    ):
        fetch.fetch("tiny")
    assert not (folder / "train.json").exists() and not list(folder.glob("*.part"))
    assert (folder / "extra.csv").read_bytes() == EXTRA
    assert fetch.released("tiny", "extra.csv") == folder
    with pytest.raises(FileNotFoundError):
        fetch.released("tiny")


def test_a_web_page_is_no_data(server, folder):
    """A network that wants a log-in answers everything with its page, and status 200."""
    server.kind = "text/html; charset=utf-8"
    with pytest.raises(fetch.AssetError, match="sent a web page"):
        fetch.fetch("tiny")
    assert not (folder / "LICENSE").exists()  # whose hash would not tell


def test_one_set_fails_and_the_next_is_fetched(server, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(fetch.SETS, "gone", replace(fetch.SETS["tiny"], name="gone"))
    (tmp_path / "cache" / "released").mkdir(parents=True)
    (tmp_path / "cache" / "released" / "gone").write_text("a file in the folder's place")
    with pytest.raises(fetch.AssetError, match="not everything was fetched.*\n.*gone"):
        fetch.fetch("gone", "tiny")
    assert fetch.released("tiny") == folder


def test_a_damaged_file_is_fetched_again(server, folder):
    fetch.fetch("tiny")
    (folder / "extra.csv").write_bytes(EXTRA[:-1])
    with pytest.raises(FileNotFoundError, match="lib fetch tiny"):
        fetch.released("tiny")
    (folder / "train.json").write_bytes(TRAIN[:-1] + b"?")  # of the same size
    fetch.fetch("tiny")
    assert (folder / "extra.csv").read_bytes() == EXTRA
    assert (folder / "train.json").read_bytes() == TRAIN
    assert len(server.requests) == 5


def test_no_network(server, folder, capsys):
    server.close()
    assert cli.main(["fetch", "tiny"]) == 2
    said = capsys.readouterr().err
    assert "127.0.0.1" in said and "cannot be reached" in said and "HTTPS_PROXY" in said
    assert "FEEDBACK_DATA" in said and f"/authors/paper/{COMMIT}/tasks/data/train.json" in said
    assert "Traceback" not in said
    assert said.count("cannot be reached") == 2  # one file of each host, not every file
    assert "not here" in fetch.describe_sets().partition("tiny: ")[2].splitlines()[0]


@pytest.mark.parametrize(
    ("status", "words"), [(404, "no file"), (403, "refused"), (503, "answered HTTP 503")]
)
def test_refusals_say_what_was_refused(server, status, words):
    server.status[next(iter(CONTENT))] = status
    with pytest.raises(fetch.AssetError, match=words):
        fetch.fetch("tiny")
    tried = server.requests.count(next(iter(CONTENT)))
    assert tried == (fetch.ATTEMPTS if status == 503 else 1)


def test_unknown_names_are_refused_before_anything_is_asked(server, capsys):
    assert cli.main(["fetch", "tiny", "qa_fedback"]) == 2
    said = capsys.readouterr().err
    assert "'qa_fedback'" in said and "qa_feedback" in said
    assert not server.requests


def test_an_asset_is_fetched_by_its_name_too(server, monkeypatch, capsys, tmp_path):
    """Several in one call, of both kinds; one that cannot be had does not keep the others from coming."""
    asked = []

    def get(name):
        asked.append(name)
        if name == "qwen-1.5b":
            raise assets.AssetError("asset 'qwen-1.5b': no way")
        return tmp_path / name

    monkeypatch.setattr(assets, "fetch", get)
    assert cli.main(["fetch", "qwen-1.5b", "qwen-0.5b", "tiny"]) == 2
    assert asked == ["qwen-1.5b", "qwen-0.5b"] and fetch.find("tiny")
    said = capsys.readouterr()
    assert f"qwen-0.5b: in {tmp_path / 'qwen-0.5b'}" in said.out and "no way" in said.err
    cli.main(["fetch"])
    assert "qwen-0.5b: not fetched yet" in capsys.readouterr().out


def test_every_fetch_that_a_text_names_is_known():
    """In notebooks, documents and messages: `lib fetch NAME`, or several names."""
    root = ROOT
    named = set()
    for pattern in ("*.md", "docs/*.md", "data/**/*.md", "notebooks/**/*.ipynb", "lib/**/*.py"):
        for path in root.glob(pattern):
            text = path.read_text(encoding="utf-8")
            for names in re.findall(r"lib fetch((?:\s+[a-z][\w.-]*[\w])+)", text):
                named |= set(names.split()[:1])
    known = {*fetch.SETS, *assets.ASSETS}
    assert {"qa_feedback", "qwen-1.5b"} <= named and named <= known, named - known


def test_your_own_folder_comes_first(server, folder, tmp_path, monkeypatch, capsys):
    own = tmp_path / "own"
    (own / "tiny").mkdir(parents=True)
    (own / "tiny" / "train.json").write_text("[]")
    assert fetch.released("tiny", needed=False) is None
    assert "python -m lib fetch tiny" in capsys.readouterr().out
    monkeypatch.setenv("FEEDBACK_DATA", str(tmp_path / "typo"))
    with pytest.raises(FileNotFoundError, match="typo' now, which is no folder"):
        fetch.released("tiny")
    monkeypatch.setenv("FEEDBACK_DATA", str(own))
    assert fetch.released("tiny") == own / "tiny"
    fetch.fetch("tiny")
    assert fetch.released("tiny", "train.json") == own / "tiny"
    assert fetch.released("tiny", "extra.csv") == folder  # your folder has none
    monkeypatch.delenv("FEEDBACK_DATA")
    assert fetch.released("tiny") == folder
    with pytest.raises(ValueError, match="'tinny'.*tiny"):
        fetch.released("tinny")


CHILD = """
import json, sys
from lib.course import fetch
entry = json.loads(sys.argv[1])
sources = tuple(fetch.Source(**source) for source in entry.pop("sources"))
fetch.SETS["tiny"] = fetch.Released("tiny", sources=sources, **entry)
fetch.fetch("tiny")
"""


def start_child() -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, json.dumps(tiny())],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def test_two_processes_download_once(server, folder):
    server.pause = 1.0
    children = [start_child(), start_child()]
    said = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0, 0], said
    assert sorted(server.requests) == sorted(CONTENT)
    assert sum("waiting for it" in out for out, _ in said) == 1
    assert fetch.released("tiny") == folder


def test_killed_in_the_middle_then_resumed(server, folder):
    server.pause = 30.0
    child = start_child()
    part = folder / "train.json.part"
    deadline = time.time() + 60
    while time.time() < deadline and not (part.exists() and part.stat().st_size):
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    left = part.stat().st_size
    assert 0 < left < len(TRAIN)
    assert fetch.released("tiny", needed=False) is None
    server.pause = 0.0
    fetch.fetch("tiny")
    assert (folder / "train.json").read_bytes() == TRAIN
    assert f"bytes={left}-" in server.ranges


def test_a_full_disk_is_said(server, monkeypatch):
    """As the system says it; what the message names is where more room can be had."""
    real = open

    class Full:
        def __init__(self, stream):
            self.stream = stream

        def write(self, block):
            raise OSError(28, "No space left on device")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.stream.close()

    def opener(path, mode="r", *rest):
        stream = real(path, mode, *rest)
        return Full(stream) if str(path).endswith(".part") and "r" not in mode else stream

    monkeypatch.setattr(fetch, "open", opener, raising=False)
    with pytest.raises(fetch.AssetError, match="disk is full.*FEEDBACK_CACHE"):
        fetch.fetch("tiny")


# --- who reads them ------------------------------------------------------------------------------


def test_loaders_find_what_was_fetched(tmp_path, monkeypatch):
    """By the names that the notebooks use at full scale, and without a network."""
    monkeypatch.setenv("FEEDBACK_DATA", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    post = {"id": "t3_a", "subreddit": "r", "title": "t", "post": "p"}
    files = {
        "slf5k/train.jsonl": json.dumps(post | {"feedback": "f"}),
        "real_toxicity_prompts/prompts.jsonl": json.dumps(
            {"prompt": {"text": "So I", "toxicity": 0.25}, "challenging": False}
        ),
        "dialoconan/DIALOCONAN.csv": (
            "text,dialogue_id,turn_id,type\nhate,0,0,HS\ncounter,0,1,CN\n"
        ),
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    summaries = [{"text": "one"}, {"text": "two"}]
    comparison = {"info": post, "summaries": summaries, "choice": 1, "worker": "w", "batch": "b"}
    (tmp_path / "tldr_comparisons").mkdir()
    pd.DataFrame([comparison]).to_parquet(
        tmp_path / "tldr_comparisons" / "summarize_from_feedback_comparisons-train.parquet"
    )
    assert ilf.load_slf5k()["feedback"] == ["f"]
    assert ilf.load_tldr_comparisons()["comparison_preference"] == ["Summary B"]
    assert data.load_prompts(data.RTP)["prompt_score"] == [0.25]
    ((user, assistant),) = rewardlm.load_dialoconan("dialoconan")
    assert (user["content"], assistant["content"]) == ("hate", "counter")


def test_a_loader_says_how_to_get_what_is_not_here(tmp_path, monkeypatch):
    monkeypatch.delenv("FEEDBACK_DATA", raising=False)
    monkeypatch.setenv("FEEDBACK_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="python -m lib fetch dialoconan.*redistribution"):
        rewardlm.load_dialoconan("dialoconan")


# --- what is registered --------------------------------------------------------------------------


def test_every_set_is_fixed_to_a_commit_and_says_its_terms():
    assert {"qa_feedback", "sparse_feedback", "slf5k", "real_toxicity_prompts", "dialoconan"} <= (
        set(fetch.SETS)
    )
    for item in fetch.SETS.values():
        assert item.licence and item.what and item.megabytes > 0
        assert len(set(item.files)) == len(item.files), "two files of one name"
        for source in item.sources:
            assert re.fullmatch("[0-9a-f]{40}", source.commit)
            for expected in source.files.values():
                assert re.fullmatch("(git:[0-9a-f]{40}|sha256:[0-9a-f]{64})?", expected)
    assert "redistribution" in fetch.SETS["dialoconan"].notice
    assert "CC BY-NC" in fetch.SETS["sparse_feedback"].notice
    listed = fetch.describe_sets()
    for item in fetch.SETS.values():
        assert f"{item.name}: " in listed and item.licence in listed


def test_addresses_where_none_is_overridden(monkeypatch):
    for variable in ("COURSE_GITHUB", "HF_ENDPOINT"):
        monkeypatch.delenv(variable, raising=False)
    (source,) = fetch.SETS["qa_feedback"].sources
    assert source.url("a/b c.json") == (
        f"https://raw.githubusercontent.com/allenai/FineGrainedRLHF/{source.commit}/a/b%20c.json"
    )
    (source,) = fetch.SETS["slf5k"].sources
    assert source.url("train.jsonl") == (
        f"https://huggingface.co/datasets/JeremyAlain/SLF5K/resolve/{source.commit}/train.jsonl"
    )


def test_the_files_at_hand_have_the_registered_hashes(real_data):
    """The extracts of sparse_feedback are unchanged bytes: their blob ids are those of the authors."""
    expected = {
        Path(path).name: value
        for source in fetch.SETS["sparse_feedback"].sources
        for path, value in source.files.items()
    }
    files = [path for path in (real_data / "sparse_feedback").iterdir() if path.name in expected]
    assert len(files) >= 9
    for path in files:
        assert expected[path.name] == f"git:{blob_id(path.read_bytes())}"
