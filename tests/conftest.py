"""Fixtures shared by the tests: tiny models (no download) and the real policy where it can be had."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

os.environ.setdefault("FEEDBACK_HEADLESS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads of several workers wait for each other's cores; and a run in a process of its own has one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from lib import models
from lib.course import assets

ROOT = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
]

# A busy core is no failure: examples have no time limit of their own.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

# A shell starts background jobs with Ctrl-C ignored, and children inherit that: the tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

WORDS = [*"the a cat dog sat ran on mat you are nice kind stupid idiot".split(), "."]  # noqa: SIM905


@pytest.fixture(scope="session")
def tiny():
    """A decoder-only model over 15 words: about one sampled token in twenty ends the text."""
    return models.build_tiny_model("tiny", words=WORDS)


@pytest.fixture(scope="session")
def tiny_seq2seq():
    return models.build_tiny_model("tiny-encoder-decoder", words=WORDS)


def asset(name):
    """An offline asset's folder; the test is skipped where it is neither cached nor downloadable."""
    try:
        return assets.fetch(name)
    except assets.AssetError as error:
        pytest.skip(f"asset {name!r} cannot be had here: {error}")


@pytest.fixture(scope="session")
def policy():
    """SmolLM2-135M-Instruct in float32 and its tokenizer."""
    asset("policy")
    return models.load_policy("policy", dtype=torch.float32)


@pytest.fixture(scope="session")
def real_prompts():
    """64 real prompts of mixed length."""
    from lib import data

    asset("prompts")
    found = data.load_prompts("realtoxicityprompts", n=64, seed=1)["prompt"]
    return [p if i % 3 else p + " " + found[i - 1] for i, p in enumerate(found)]


@pytest.fixture(scope="session")
def real_data():
    """The papers' own files, which `FEEDBACK_DATA` names; nothing of them is in the project."""
    folder = os.environ.get("FEEDBACK_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("FEEDBACK_DATA names no folder with the papers' own files")
    return Path(folder)


def named(processes, word):
    """Those of the processes that still run and have the word in their command line."""
    running = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            running += [process] if word in " ".join(process.cmdline()) else []
    return running


class Server:
    """An endpoint in its own process."""

    def __init__(self, **options):
        command = [
            sys.executable,
            str(Path(__file__).parents[1] / "bench" / "endpoint.py"),
            json.dumps(options),
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}/v1"

    def log(self):
        rows = json.load(urllib.request.urlopen(self.url.replace("/v1", "/log")))
        return pd.DataFrame(rows, columns=["at", "prompt", "outcome"])


@pytest.fixture
def server():
    started = []

    def start(**options):
        started.append(Server(**options))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()


class Scripted(ThreadingHTTPServer):
    """A loopback server that answers each request as a function of its JSON body says.

    The function gives an object (status 200), or (status, object or bytes, headers).  `asked`: the bodies.
    """

    daemon_threads = True

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), _Scripted)
        self.answer = answer
        self.asked = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Scripted(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        answer = self.server.answer(body)
        status, value, headers = answer if isinstance(answer, tuple) else (200, answer, {})
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def cpu_seconds():
    """CPU seconds of the processes that the test has started and waited for (0 on Windows).

    A promise of time is kept on a machine that is busy with other tests too.
    """
    before = os.times()

    def spent() -> float:
        now = os.times()
        both = ("children_user", "children_system")
        return sum(getattr(now, name) - getattr(before, name) for name in both)

    return spent


def completion(content, finish_reason="stop", **message):
    """A chat completion's JSON with this content."""
    choice = {"index": 0, "finish_reason": finish_reason}
    choice["message"] = {"role": "assistant", "content": content, **message}
    return {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}


@pytest.fixture
def scripted():
    """Start a `Scripted` server for a function; all are stopped after the test."""
    started = []

    def start(answer):
        started.append(Scripted(answer))
        return started[-1]

    yield start
    for one in started:
        one.shutdown()
        one.server_close()


CLASSIFIER_WORDS = [f"w{i}" for i in range(200)]


def tiny_classifier(labels=("nothate", "hate"), **config):
    """A random two-layer BERT over 200 words; no download."""
    vocabulary = {
        token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *CLASSIFIER_WORDS])
    }
    core = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", model_max_length=64,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(
            BertConfig(
                vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2,
                num_attention_heads=2, intermediate_size=64, max_position_embeddings=64,
                initializer_range=0.5, id2label=dict(enumerate(labels)),
                label2id={label: i for i, label in enumerate(labels)}, **config,
            )
        )  # fmt: skip
    return model.eval(), tokenizer


def random_texts(n: int, longest: int, seed: int = 0) -> list[str]:
    """n texts of up to `longest` of the classifier's words."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(CLASSIFIER_WORDS, rng.integers(1, longest + 1))) for _ in range(n)]


# --- a browser ------------------------------------------------------------------------------------


@pytest.fixture
def records():
    """The ten marked records written for this course."""
    from lib.papers.fine_grained import schema

    return schema.load_feedback(ROOT / "data" / "samples" / "qa_feedback.json")


@pytest.fixture(scope="module")
def chromium():
    """The system's Chromium, headless; closed after each file: while it is open, no other event loop runs."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed (apt install chromium)")
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium, tmp_path):
    """open_page(items, kind, **context options) -> a page from a file, watched for errors and requests.

    `beside=page` opens a second tab of that page's browser; every other call is a machine of its own.
    """
    from lib import annotate

    contexts = []

    def open_it(items, kind="spans", beside=None, guidelines=None, **options):
        path = annotate.write(items, tmp_path / f"{kind}.html", kind, guidelines=guidelines)
        if beside is None:
            contexts.append(chromium.new_context(accept_downloads=True, **options))
        page = (contexts[-1] if beside is None else beside.context).new_page()
        page.set_default_timeout(30_000)
        page.faults = []
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("request", lambda r: page.faults.append(r.url) if "http" in r.url[:5] else None)
        page.on("dialog", lambda dialog: page.faults.append(dialog.message))
        page.goto(path.as_uri())
        return page

    yield open_it
    for context in contexts:
        assert not [fault for page in context.pages for fault in page.faults]
        context.close()
