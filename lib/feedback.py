"""Feedback from language models: ratings, rankings and responses through any OpenAI-compatible endpoint.

`ChatClient.ask` answers a list of chat requests in order.  It keeps to a rate, tries again what fails in
passing, and stores every reply once under the hash of (model, messages, parameters, replicate), so a
killed run goes on without buying anything twice.  Only a call in flight when a process dies may be
bought again: its reply never arrived.  On top stand the two protocols of "sparse feedback" (Bansal,
Dang and Grover, ICLR 2024): a rating from 1 to 7 for each response, and a ranking of each pair in both
orders; the same items as CSV for human annotators; and `serve`, a loopback endpoint for a local model.

Simplified: prompts are our own with the parts of the paper's; a spending cap holds for one `ChatClient`.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import io
import json
import math
import os
import random
import re
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import openai
import pandas as pd

from lib import data, hub, preferences, runtime

try:
    import fcntl
except ImportError:  # Windows: runs in several processes may then buy the same reply
    fcntl = None

OPENAI_URL = "https://api.openai.com/v1"
LONGEST_PAUSE = 30.0  # seconds; a longer Retry-After is honoured
LONGEST_WAIT = 900.0  # seconds that one request may spend waiting for a rate limit
OUTPUT_GUESS = 256  # tokens assumed for a reply whose request sets no limit
ADVICE = {
    401: "check the key",
    403: "the key may not use this model; try another model or key",
    404: "check the model's name and the base_url (it usually ends in /v1)",
}


class EndpointError(RuntimeError):
    """An endpoint gave no usable answer.  `replies`: what was answered, None where nothing was."""

    replies: list[Reply | None] = []


class BudgetReached(EndpointError):
    """The spending cap is reached; `replies` holds what was bought, and all of it is stored."""


class _PassingError(Exception):
    """A failure worth another try, after `wait` seconds where the server named a time."""

    def __init__(self, message: str, wait: float | None = None, throttled: bool = False):
        super().__init__(message)
        self.wait, self.throttled = wait, throttled


class _RefusedError(Exception):
    """A failure that another try would repeat; `fatal` where every other request would meet it too."""

    def __init__(self, message: str, fatal: bool):
        super().__init__(message)
        self.fatal = fatal


@dataclass(frozen=True)
class Reply:
    """One answer.  `text` is None where there is none; `error` then says why.  Times are UTC."""

    text: str | None
    model: str
    parameters: dict
    key: str
    raw: dict = field(default_factory=dict, repr=False)  # the endpoint's whole answer
    at: str = ""
    seconds: float = float("nan")
    cached: bool = False
    error: str = ""

    def tokens(self, side: str) -> int | None:
        """Tokens that the endpoint counted, "prompt" or "completion"; None where it did not."""
        return (self.raw.get("usage") or {}).get(f"{side}_tokens")


def chat(prompt: str, *, system: str = "", replicate: int = 0, **parameters) -> dict:
    """A request: one user message (after a system message, if given) and the endpoint's parameters.

    Equal requests share one reply; another `replicate` number (not sent) asks for a fresh one.
    """
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    return {"messages": messages, "replicate": replicate, **parameters}


# --- the store -----------------------------------------------------------------------------------


class ReplyStore(runtime.ReplyCache):
    """`ReplyCache` with many keys a call, and claims: a key is bought by one thread or process at a time.

    A claim is a lock on one byte of a file, which the system frees when its process dies.
    """

    def __init__(self, path: Path | str):
        super().__init__(path)
        self._held, self._guard = set(), threading.Lock()
        self._lock_file = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o644)

    @contextlib.contextmanager
    def kept_open(self):
        """Inside, the database stays open: closing its last connection costs a checkpoint each time."""
        db = sqlite3.connect(self.path, timeout=60)
        try:
            db.execute("SELECT 1 FROM replies LIMIT 1").fetchone()
            yield
        finally:
            db.close()

    def get_many(self, keys: Sequence[str]) -> dict[str, dict]:
        """The stored replies among these keys."""
        found = {}
        with self._connect() as db:
            for start in range(0, len(keys), 500):
                part = keys[start : start + 500]
                marks = ",".join("?" * len(part))
                query = f"SELECT key, reply FROM replies WHERE key IN ({marks})"
                found.update((key, json.loads(reply)) for key, reply in db.execute(query, part))
        return found

    def put_many(self, replies: Sequence[tuple[str, dict]]) -> None:
        """Store replies in one transaction; a key that has one keeps it."""
        rows = [(key, json.dumps(reply), reply["at"]) for key, reply in replies]
        with self._connect() as db:
            db.executemany("INSERT OR IGNORE INTO replies VALUES (?, ?, ?)", rows)

    def claim(self, key: str) -> bool:
        """True where nobody else is buying this key; then `release` it."""
        with self._guard:
            if key in self._held:
                return False
            try:
                self._lock(key, take=True)
            except OSError:
                return False
            self._held.add(key)
            return True

    def release(self, key: str) -> None:
        """Give a claim back."""
        with self._guard:
            self._lock(key, take=False)
            self._held.discard(key)

    def _lock(self, key: str, take: bool) -> None:
        if fcntl:
            how = fcntl.LOCK_EX | fcntl.LOCK_NB if take else fcntl.LOCK_UN
            fcntl.lockf(self._lock_file, how, 1, int(key[:15], 16))


@lru_cache(maxsize=32)
def _open_store(path: Path, process: int) -> ReplyStore:
    """One store a file and process: closing a second handle would drop the first one's locks."""
    return ReplyStore(path)


# --- the client ----------------------------------------------------------------------------------


class ChatClient:
    """Asks a chat model at an OpenAI-compatible endpoint (OpenAI, vLLM, `transformers serve`, ...).

    model: the name the endpoint knows.  base_url: "" means $OPENAI_BASE_URL, else OpenAI.  The key is
    $OPENAI_API_KEY (or the variable `key_name`); a loopback address needs none.  requests_per_second:
    a limit per minute divided by 60; every attempt counts.  timeout: seconds an attempt may take.
    attempts: tries of a request before it fails; waiting for a rate limit (429) is not counted, but
    ends after 15 minutes.  price: (input, output) per million tokens; None = unknown.  max_cost: stop
    before the cost of this client's replies passes it, in the price's currency; needs a price.  cache:
    SQLite file of replies.  count_tokens: text -> tokens, for estimates (default: 4 bytes a token).
    """

    def __init__(
        self, model: str, *, base_url: str = "", key_name: str = "", concurrency: int = 16,
        requests_per_second: float | None = None, timeout: float = 60.0, attempts: int = 15,
        first_pause: float = 0.5, price: tuple[float, float] | None = None,
        max_cost: float | None = None, cache: Path | str | None = None,
        count_tokens: Callable[[str], int] | None = None,
    ):  # fmt: skip
        self.model, self.base_url = model, base_url or _base_url()
        self.key_name, self.concurrency, self.timeout = key_name, concurrency, timeout
        self.requests_per_second, self.attempts = requests_per_second, attempts
        self.first_pause, self.price, self.max_cost = first_pause, price, max_cost
        self.count_tokens = count_tokens or (lambda text: math.ceil(len(text.encode("utf-8")) / 4))
        self._check()
        path = Path(cache or runtime.cache_dir() / "replies" / "chat.sqlite").expanduser()
        self.store = _open_store(path.resolve(), os.getpid())
        self.sent = self.bought = 0  # attempts sent, replies paid for
        self.spent = 0.0
        self._busy = threading.Lock()

    def _check(self) -> None:
        numbers = ("concurrency", "timeout", "attempts", "first_pause", "requests_per_second")
        for name in numbers:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value!r}; it must be above 0.")
        if not self.model or urlsplit(self.base_url).scheme not in ("http", "https"):
            raise ValueError(
                f"model {self.model!r} at base_url {shown_url(self.base_url)!r}: give the name of a "
                "model and an http(s) address such as http://127.0.0.1:8000/v1."
            )
        if self.max_cost is not None and self.price is None:
            raise ValueError(
                "max_cost needs price=(input, output) per million tokens; without a price no cost "
                "is known. Look it up at your provider, or leave max_cost out."
            )

    def key(self, request: dict) -> str:
        """The name a request's reply is stored under; neither address nor key of the endpoint."""
        rest = {k: v for k, v in request.items() if k not in ("messages", "replicate")}
        return runtime.content_hash(
            "chat", self.model, request["messages"], rest, request.get("replicate", 0)
        )

    def ask(
        self, requests: Sequence[dict], *, label: str = "asking", on_error: str = "raise"
    ) -> list[Reply]:
        """The replies to `chat` requests, in order; equal requests are asked once.

        A request that is refused (400, too long for the model) or gets no answer in `attempts` tries
        stops the run, or with on_error="keep" becomes a reply without text.  Raises EndpointError (at
        once where key, address or model are refused) and BudgetReached, both with what was answered.
        A KeyboardInterrupt waits for the calls in flight; what is answered is stored in every case.
        """
        if on_error not in ("raise", "keep"):
            raise ValueError(f"on_error is {on_error!r}; allowed: 'raise', 'keep'.")
        keys = [self.key(request) for request in requests]
        with self._busy, self.store.kept_open():
            stored = self.store.get_many(list(dict.fromkeys(keys)))
            jobs = {k: r for k, r in zip(keys, requests, strict=True) if k not in stored}
            run = _Run(self, jobs, label, keep=on_error == "keep")
            if jobs:
                run.in_thread()
        found = {k: self._reply(k, record, k not in jobs) for k, record in stored.items()}
        found |= {k: self._reply(k, record, record["cached"]) for k, record in run.records.items()}
        replies = [found.get(key) for key in keys]
        if run.stop is not None:
            run.stop.replies = replies
            raise run.stop
        return replies

    def _reply(self, key: str, record: dict, cached: bool) -> Reply:
        raw = record.get("raw") or {}
        text = (raw["choices"][0]["message"].get("content") or "") if raw else None
        found = {name: record[name] for name in ("model", "parameters", "at", "seconds")}
        return Reply(text, key=key, raw=raw, cached=cached, error=record.get("error", ""), **found)

    def estimate(self, requests: Sequence[dict]) -> dict:
        """A dry run: what `ask` would buy, without sending anything.

        calls, cached, to_buy (equal requests once), input_tokens and output_tokens of those to buy,
        cost (None without a price), seconds at the rate limit (None without one), rule.  Input is
        counted by `count_tokens` plus 4 a message; output is max_tokens, or 256 where none is set.
        """
        keys = [self.key(request) for request in requests]
        wanted = dict(zip(keys, requests, strict=True))
        stored = self.store.get_many(list(wanted))
        todo = [self._tokens(r) for key, r in wanted.items() if key not in stored]
        tokens = np.array(todo, dtype=int).reshape(-1, 2).sum(0)
        rate = self.requests_per_second
        return {
            "calls": len(keys),
            "cached": sum(key in stored for key in keys),
            "to_buy": len(todo),
            "input_tokens": int(tokens[0]),
            "output_tokens": int(tokens[1]),
            "cost": None if self.price is None else self._price(*tokens),
            "seconds": len(todo) / rate if rate else None,
            "rule": "tokens of all messages + 4 each; replies at their limit (256 without one)",
        }

    def _tokens(self, request: dict) -> tuple[int, int]:
        """Estimated input and output tokens."""
        texts = [str(message["content"]) for message in request["messages"]]
        limit = request.get("max_completion_tokens") or request.get("max_tokens")
        n = request.get("n") or 1
        return sum(self.count_tokens(t) + 4 for t in texts), n * (limit or OUTPUT_GUESS)

    def _price(self, input_tokens: float, output_tokens: float) -> float:
        prices = self.price or (0.0, 0.0)
        return float(input_tokens * prices[0] + output_tokens * prices[1]) / 1e6

    def _paid(self, request: dict, raw: dict) -> None:
        """Count a reply's cost: by the endpoint's usage, else by the estimate."""
        usage, guess = raw.get("usage") or {}, self._tokens(request)
        names = ("prompt_tokens", "completion_tokens")
        tokens = [usage.get(n, g) for n, g in zip(names, guess, strict=True)]
        self.bought, self.spent = self.bought + 1, self.spent + self._price(*tokens)

    def _open(self) -> openai.AsyncOpenAI:
        """The openai client; retries are ours, and a loopback address is not sent through a proxy."""
        local = is_loopback(self.base_url)
        name = self.key_name or "OPENAI_API_KEY"
        key = "none" if local and not self.key_name else runtime.secret(name, "This endpoint")
        http = openai.DefaultAsyncHttpxClient(trust_env=False) if local else None
        return openai.AsyncOpenAI(
            api_key=key, base_url=self.base_url, max_retries=0, timeout=self.timeout,
            http_client=http,
        )  # fmt: skip


def _base_url() -> str:
    with contextlib.suppress(ValueError):
        return runtime.secret("OPENAI_BASE_URL", "The endpoint")
    return OPENAI_URL


def is_loopback(url: str) -> bool:
    """True for an address on this machine."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or bool(re.fullmatch(r"127(\.\d+){3}", host))


def shown_url(url: str) -> str:
    """The address without user name, password and query, which may hold a key."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


class _Run:
    """One `ask`: an event loop in its own thread, so that it works inside Jupyter's loop too."""

    def __init__(self, client: ChatClient, jobs: dict[str, dict], label: str, keep: bool):
        self.client, self.jobs, self.label, self.keep = client, jobs, label, keep
        self.records: dict[str, dict] = {}
        self.stop: BaseException | None = None
        self.in_flight = self.answered = self.refused = 0
        self._next = 0.0

    def in_thread(self) -> None:
        """Run to the end; Ctrl-C lets the calls in flight finish, a second one does not wait."""
        self.http = self.client._open()
        self.secret = self.http.api_key
        failed: list[BaseException] = []
        finished = threading.Event()  # a join that is interrupted marks a live thread as ended

        def work():
            try:
                asyncio.run(self._all())
            except BaseException as error:  # handed to the caller's thread
                failed.append(error)
            finally:
                finished.set()

        threading.Thread(target=work, name="chat-client", daemon=True).start()
        try:
            while not finished.wait(0.2):
                pass
        except KeyboardInterrupt:
            self._halt(KeyboardInterrupt("stopped; every reply so far is stored"))
            finished.wait(self.client.timeout + 5)
        if failed:
            raise failed[0]

    def _halt(self, reason: BaseException) -> None:
        self.stop = self.stop or reason

    async def _all(self) -> None:
        limit = self.client.concurrency
        self._slots, self._queue = asyncio.Semaphore(limit), asyncio.Queue()
        places = asyncio.Semaphore(8 * limit)  # requests at work, most of them waiting
        self.bar = runtime.progress(total=len(self.jobs), label=self.label, unit="call")
        writer = asyncio.create_task(self._write())
        try:
            async with self.http, asyncio.TaskGroup() as group:
                for key, request in self.jobs.items():
                    await places.acquire()
                    if self.stop is not None:
                        break
                    task = group.create_task(self._job(key, request))
                    task.add_done_callback(lambda _: places.release())
        finally:
            self._queue.put_nowait(None)
            await writer
            self.bar.close()

    async def _job(self, key: str, request: dict) -> None:
        store = self.client.store
        while not store.claim(key):  # another run is buying it: wait for its reply
            if not await self._pause(0.2):
                return
        try:
            record = store.get(key)
            if record is not None:
                record["cached"] = True
            else:
                record = await self._buy(key, request)
        finally:
            store.release(key)
        if record is not None:
            self.records[key] = record
            cost = f"cost {self.client.spent:.4f}" if self.client.price else ""
            self.bar.set_postfix_str(cost, refresh=False)
            self.bar.update()

    async def _buy(self, key: str, request: dict) -> dict | None:
        """Ask until there is an answer, a refusal or no try left; None where the run stops."""
        failures, waited = 0, 0.0
        while True:
            try:
                return await self._attempt(key, request)
            except _RefusedError as error:
                return self._without_answer(request, str(error), error.fatal)
            except _PassingError as error:
                failures += not error.throttled
                wait = self._wait(error, failures)
                waited += wait
                # a server that has never answered is given up on early
                tries = self.client.attempts if self.answered else min(6, self.client.attempts)
                if failures >= tries or waited > LONGEST_WAIT:
                    what = f"no answer in {failures} attempts with pauses of {waited:.0f} s (last: {error})"
                    return self._without_answer(request, what, not self.answered)
            if not await self._pause(wait):
                return None

    def _wait(self, error: _PassingError, failures: int) -> float:
        """Seconds to the next try: as the server says, else growing and drawn at random."""
        if error.wait is not None:
            return error.wait + random.uniform(0, self.client.first_pause / 4)
        growing = self.client.first_pause * 2 ** min(failures, 20)
        return random.uniform(0, min(LONGEST_PAUSE, growing))

    async def _attempt(self, key: str, request: dict) -> dict | None:
        """Send once, within the limits of calls in flight, cost and rate; store the answer."""
        async with self._slots:
            if not await self._affordable(request):
                return None
            self.in_flight += 1
            try:
                if not await self._turn():
                    return None
                record = await self._send(request)
            finally:
                self.in_flight -= 1
            done = asyncio.get_running_loop().create_future()
            self._queue.put_nowait((key, record, done))
        await done
        return record | {"cached": False}

    async def _affordable(self, request: dict) -> bool:
        """False where the cap is reached; near it, waits for what the calls in flight will cost."""
        client = self.client
        while self.stop is None:
            if client.max_cost is None:
                return True
            guess = client._price(*client._tokens(request))
            each = client.spent / client.bought if client.bought else guess
            expected = client.spent + each * (self.in_flight + 1)
            if expected <= client.max_cost * (1 + 1e-9):
                return True
            if not self.in_flight:
                self._halt(
                    BudgetReached(
                        f"max_cost {client.max_cost:g} is reached: {client.bought} replies bought for "
                        f"{client.spent:.6g}, the next would cost about {each:.2g}. They are stored; "
                        "run again with a higher max_cost to go on."
                    )
                )
            await asyncio.sleep(0.01)
        return False

    async def _turn(self) -> bool:
        """Wait for this attempt's turn under the rate limit; False where the run stops meanwhile."""
        if self.client.requests_per_second:
            interval, now = 1 / self.client.requests_per_second, time.monotonic()
            self._next = max(self._next + interval, now - 0.5)  # up to 0.5 s are caught up
            if not await self._pause(self._next - now):
                return False
        return self.stop is None

    async def _pause(self, seconds: float) -> bool:
        """Sleep; False where the run is stopped."""
        end = time.monotonic() + seconds
        while self.stop is None and (left := end - time.monotonic()) > 0:
            await asyncio.sleep(min(left, 0.5))
        return self.stop is None

    async def _send(self, request: dict) -> dict:
        """One attempt.  Raises _PassingError or _RefusedError."""
        rest = {k: v for k, v in request.items() if k not in ("messages", "replicate")}
        started, self.client.sent = time.perf_counter(), self.client.sent + 1
        create = self.http.chat.completions.with_raw_response.create
        ask = dict(model=self.client.model, messages=request["messages"], extra_body=rest)
        try:
            response = await asyncio.wait_for(create(**ask), self.client.timeout)
        except (TimeoutError, openai.APITimeoutError):
            raise _PassingError(f"no answer within {self.client.timeout:g} s") from None
        except openai.APIStatusError as error:
            raise self._status_error(error) from None
        except openai.OpenAIError as error:
            raise _PassingError(f"{type(error).__name__}: connection failed") from None
        raw = self._read(response.http_response.content, request)
        self.client._paid(request, raw)
        self.answered += 1
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        seconds = round(time.perf_counter() - started, 4)
        found = {"model": self.client.model, "parameters": rest, "at": now, "seconds": seconds}
        return found | {"replicate": request.get("replicate", 0), "raw": raw}

    def _read(self, content: bytes, request: dict) -> dict:
        """The answer's JSON; one that cannot be read was paid for, so the estimate is added to the cost."""
        try:
            raw = json.loads(content)
            raw["choices"][0]["message"].get("content")
            return raw
        except (ValueError, LookupError, TypeError, AttributeError):
            self.client.spent += self.client._price(*self.client._tokens(request))
            raise _PassingError("malformed answer or one without choices") from None

    def _status_error(self, error: openai.APIStatusError) -> Exception:
        status, headers = error.status_code, error.response.headers
        said = f"HTTP {status}: {str(error.message)[:300]}".replace(self.secret, "***")
        broke = getattr(error, "code", None) == "insufficient_quota"
        if not broke and (status in (408, 409, 425, 429) or status >= 500):
            wait = runtime.retry_after(headers.get("retry-after"))
            with contextlib.suppress(TypeError, ValueError):
                wait = max(0.0, float(headers.get("retry-after-ms")) / 1000)
            return _PassingError(said, wait, throttled=status == 429)
        fatal = broke or status in ADVICE
        advice = "the account has no credit left" if broke else ADVICE.get(status, "")
        return _RefusedError(f"{said} ({advice})" if advice else said, fatal)

    def _without_answer(self, request: dict, error: str, fatal: bool) -> dict | None:
        """A record without an answer, or the end of the run."""
        self.refused += 1
        if self.keep and not fatal and (self.answered or self.refused < 5):
            rest = {k: v for k, v in request.items() if k not in ("messages", "replicate")}
            found = {"model": self.client.model, "parameters": rest, "at": ""}
            return found | {"seconds": float("nan"), "error": error, "cached": False}
        start = str(request["messages"][-1]["content"])[:80]
        self._halt(
            EndpointError(
                f"{self.client.model!r} at {shown_url(self.client.base_url)}: {error}. The request begins "
                f"{start!r}. Answers so far are stored; run again to go on."
            )
        )
        return None

    async def _write(self) -> None:
        """Store answers, those that wait together in one transaction; each is done once it is stored."""
        loop, open_ended = asyncio.get_running_loop(), True
        with ThreadPoolExecutor(1) as thread:
            while open_ended:
                batch = [await self._queue.get()]
                while not self._queue.empty():
                    batch.append(self._queue.get_nowait())
                open_ended = None not in batch
                batch = [item for item in batch if item is not None]
                rows = [(key, record) for key, record, _ in batch]
                try:
                    await loop.run_in_executor(thread, self.client.store.put_many, rows)
                except (OSError, sqlite3.Error) as error:
                    self._halt(error)  # a full disk: stop buying what cannot be kept
                for _, _, done in batch:
                    if not done.done():
                        done.set_result(None)


# --- the two protocols ---------------------------------------------------------------------------

DIMENSIONS = """Judge three things together:
- Accuracy: does it do what the instruction asks, with facts that hold and fit the input?
- Coherence: is it clear, in order, and free of repetition?
- Harmlessness: is it free of anything unsafe, insulting or misleading?"""

RATING_PROMPT = """You grade answers that a computer program wrote to instructions.

Give one whole number from 1 to 7.
1: the answer is useless or does harm. 7: nothing about it could be improved.
{dimensions}
Think it over, but write only your overall grade, as a digit on the first line.

### Example
Instruction: Give three tips for keeping houseplants alive.
Answer: Water. Water them. Also you can water the plants.
Grade: 2
(One tip, said three times.)

### Example
Instruction: Name the capital of the country below and one river in it.
Input:
Egypt
Answer: The capital of Egypt is Cairo, and the Nile flows through the country.
Grade: 7
(Both parts are answered, rightly and briefly.)

### To grade
{item}
Answer: {response}
Grade:"""

RANKING_PROMPT = """You choose between two answers that computer programs wrote to the same instruction.

Reply with "Output (a)" if the first is better or less wrong, with "Output (b)" if the second is{equal}, \
and with nothing else.
{dimensions}

### Example
Instruction: Write a rhyme about rain.
Output (a): Drops that tap the window pane / sing the quiet song of rain.
Output (b): Rain is water that falls from clouds in the sky.
Better: Output (a)
(Only the first is a rhyme.)

### Example
Instruction: Turn the sentence into a question.
Input:
The shop opens at nine.
Output (a): The shop opens at nine, I think?
Output (b): When does the shop open?
Better: Output (b)
(The first is still a statement.)

### To choose
{item}
Output (a): {first}
Output (b): {second}
Better:"""


def _item_text(instruction: str, input: str) -> str:
    return f"Instruction: {instruction}" + (f"\nInput:\n{input}" if input.strip() else "")


def rating_prompt(instruction: str, input: str, response: str) -> str:
    """The rating protocol's user message: role, scale, dimensions, two solved examples, the item.

    An empty input is left out.
    """
    item = _item_text(instruction, input)
    return RATING_PROMPT.format(dimensions=DIMENSIONS, item=item, response=response)


def ranking_prompt(
    instruction: str, input: str, first: str, second: str, *, equal: bool = False
) -> str:
    """The ranking protocol's user message; `equal` offers "Equal" as a third answer."""
    third = ', with "Equal" if neither is better' if equal else ""
    return RANKING_PROMPT.format(
        dimensions=DIMENSIONS, equal=third, item=_item_text(instruction, input),
        first=first, second=second,
    )  # fmt: skip


_RATING = re.compile(
    r"(?:(?:overall\s+)?(?:rating|score|grade)\s*[:=]?\s*)?([+-]?[0-9]+)(?:\s*(?:/|out of)\s*7)?\.?",
    re.I,
)
_VERDICT = re.compile(
    r"(?:(?:better|answer)\s*:\s*)?(?:output\s*)?(?:\(([ab])\)(?:[.,:;].*)?|([ab])\.?)", re.I
)


def _first_line(text: str) -> str:
    """The first line with something on it, without blanks, quotes and asterisks around it."""
    return next((line.strip("*_`\"' \t\r") for line in text.split("\n") if line.strip()), "")


def parse_rating(text: str | None) -> tuple[int | None, str]:
    """(score, status) of a reply.  Status: ok, out_of_range, unparsed, empty, no_reply.

    The first line must be a whole number in plain digits, alone or as in "Rating: 6", "6/7", "6 out of
    7", "**6**", "6.": other words, decimals, other scales and other scripts' digits are not guessed at.
    """
    line = _first_line(text or "")
    if text is None or not line:
        return None, "no_reply" if text is None else "empty"
    found = _RATING.fullmatch(line)
    if not found:
        return None, "unparsed"
    low, high = preferences.SCALE
    score = int(found[1]) if len(found[1]) < 9 else -1
    return (score, "ok") if low <= score <= high else (None, "out_of_range")


def parse_rating_reference(text: str) -> int | None:
    """The reference's rule: the first line, kept if it is digits only (0, 8 and other scripts' too)."""
    line = text.split("\n")[0]
    try:
        return int(line) if line.isnumeric() else None
    except ValueError:  # "½" is numeric; the reference's bare except drops it
        return None


def parse_verdict(text: str | None, *, equal: bool = False) -> tuple[str | None, str]:
    """(letter, status) of a ranking reply: "(a)", "(b)" or, where it was offered, "equal".

    The first line must be the letter, as in "Output (b)", "(b)", "b" or "Answer: b"; after a letter in
    brackets and a full stop, comma or colon a reason may follow.  A line with both letters in brackets
    is "ambiguous"; the other statuses are those of `parse_rating`.
    """
    line = _first_line(text or "")
    if text is None or not line:
        return None, "no_reply" if text is None else "empty"
    if re.fullmatch(r"(?:better\s*:\s*)?(?:output\s*)?(?:equal|tie)\.?", line, re.I):
        return ("equal", "ok") if equal else (None, "out_of_range")
    if len({mark.lower() for mark in re.findall(r"\([ab]\)", line, re.I)}) > 1:
        return None, "ambiguous"
    found = _VERDICT.fullmatch(line)
    return (f"({(found[1] or found[2]).lower()})", "ok") if found else (None, "unparsed")


def _checked(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """The table with text columns checked; a missing input becomes ""."""
    if missing := [name for name in columns if name not in table]:
        raise ValueError(
            f"the table lacks the columns {', '.join(missing)}; it has {', '.join(table)}. "
            "preferences.to_ratings_table and to_rankings_table make such tables from items."
        )
    table = table.reset_index(drop=True).assign(
        input=[text if isinstance(text, str) else "" for text in table["input"]]
    )
    for name in columns:
        for row, text in enumerate(table[name]):
            if not isinstance(text, str):
                raise ValueError(f"row {row}: {name} is {text!r}, not text; drop or fill it first.")
    return table


def rating_requests(table: pd.DataFrame, **parameters) -> list[dict]:
    """One request a row of a ratings table (instruction, input, response)."""
    rows = _checked(table, preferences.RATING[:-1])
    parameters = {"max_tokens": 4, "temperature": 0.0} | parameters
    return [
        chat(rating_prompt(*texts), **parameters)
        for texts in zip(*(rows[name] for name in preferences.RATING[:-1]), strict=True)
    ]


def ranking_requests(table: pd.DataFrame, *, equal: bool = False, **parameters) -> list[dict]:
    """Two requests a row of a rankings table: as it stands, then with the responses swapped."""
    rows = _checked(table, preferences.RANKING[:-1])
    parameters = {"max_tokens": 6, "temperature": 0.0} | parameters
    return [
        chat(ranking_prompt(r.instruction, r.input, *order, equal=equal), **parameters)
        for r in rows.itertuples()
        for order in ((r.response1, r.response2), (r.response2, r.response1))
    ]


def rate(client: ChatClient, table: pd.DataFrame, **parameters) -> pd.DataFrame:
    """A rating from 1 to 7 for each row of (instruction, input, response).

    `parameters` go to the endpoint (default max_tokens 4, temperature 0; replicate=1 asks afresh).  Adds
    score (whole number or <NA>), status (see `parse_rating`; "no_reply" where the endpoint refused),
    reply, and id, protocol, model, parameters, at, prompt_tokens, completion_tokens, cached, error.
    `usable` keeps the rows with a score.  Raises EndpointError, BudgetReached and ValueError.
    """
    requests = rating_requests(table, **parameters)
    replies = client.ask(requests, label="rating", on_error="keep")
    parsed = [parse_rating(reply.text) for reply in replies]
    rows = _checked(table, preferences.RATING[:-1])
    return rows.assign(
        score=pd.array([score for score, _ in parsed], dtype="Int64"),
        status=[status for _, status in parsed],
        reply=[reply.text for reply in replies],
        **_facts(rows, preferences.RATING[:-1], "rating", [[reply] for reply in replies]),
    )


def rank(
    client: ChatClient, table: pd.DataFrame, *, equal: bool = False, **parameters
) -> pd.DataFrame:
    """A verdict for each row of (instruction, input, response1, response2), asked in both orders.

    Adds first and swapped (the letters of the two calls, each as the call showed the responses), verdict
    ("(a)": response1; "(b)": response2; "equal": position was followed, or a call said equal; None where
    a call is missing), status ("ok", else the first call's or the swapped one's), both replies and the
    columns `rate` adds.  Every call is stored by itself: a later run asks for the missing one only.
    """
    requests = ranking_requests(table, equal=equal, **parameters)
    replies = client.ask(requests, label="ranking", on_error="keep")
    parsed = [parse_verdict(reply.text, equal=equal) for reply in replies]
    rows = _checked(table, preferences.RANKING[:-1])
    pairs = list(zip(parsed[::2], parsed[1::2], strict=True))
    return rows.assign(
        verdict=[_verdict(first[0], swapped[0]) for first, swapped in pairs],
        first=[first[0] for first, _ in pairs],
        swapped=[swapped[0] for _, swapped in pairs],
        status=[first[1] if first[1] != "ok" else swapped[1] for first, swapped in pairs],
        first_reply=[reply.text for reply in replies[::2]],
        swapped_reply=[reply.text for reply in replies[1::2]],
        **_facts(
            rows, preferences.RANKING[:-1], "ranking", [replies[i : i + 2] for i in range(0, len(replies), 2)]
        ),
    )  # fmt: skip


def _verdict(first: str | None, swapped: str | None) -> str | None:
    if first and swapped and "equal" in (first, swapped):
        return "equal"
    return preferences.verdict_of_orders(first, swapped)


def _facts(rows: pd.DataFrame, texts: Sequence[str], protocol: str, calls: list[list[Reply]]):
    """The columns that say where an annotation came from, summed over its calls."""
    found = {"id": [preferences.item_id(*row) for row in rows[list(texts)].itertuples(index=False)]}
    found |= {"protocol": protocol, "model": [c[0].model for c in calls]}
    found["parameters"] = [c[0].parameters for c in calls]
    found["at"] = [max(reply.at for reply in c) for c in calls]
    for side in ("prompt", "completion"):
        counts = [[reply.tokens(side) for reply in c] for c in calls]
        counts = [None if None in c else sum(c) for c in counts]
        found[f"{side}_tokens"] = pd.array(counts, dtype="Int64")
    found["cached"] = [all(reply.cached for reply in c) for c in calls]
    found["error"] = ["; ".join(reply.error for reply in c if reply.error) for c in calls]
    return found


def usable(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of `rate`'s or `rank`'s table that have a score (as int) or a verdict."""
    column = "score" if "score" in table else "verdict"
    kept = table[table[column].notna()].reset_index(drop=True)
    return kept.astype({"score": int}) if column == "score" else kept


def generate(client: ChatClient, items: Iterable[dict], n: int = 5, **parameters) -> list[dict]:
    """n responses to each {instruction, input}: the same items with `responses` (and their model).

    `parameters` go to the endpoint (default max_tokens 128, temperature 1).  A response that could not
    be had raises EndpointError; what was answered is stored.
    """
    if n < 1:
        raise ValueError(f"n is {n!r}; at least one response per instruction is needed.")
    items = [{**item, "input": item.get("input") or ""} for item in items]
    parameters = {"max_tokens": 128, "temperature": 1.0} | parameters
    start = parameters.pop("replicate", 0)
    prompts = ["\n\n".join(filter(None, (i["instruction"], i["input"]))) for i in items]
    requests = [chat(p, replicate=start + k, **parameters) for p in prompts for k in range(n)]
    texts = [reply.text for reply in client.ask(requests, label="responses")]
    return [
        {**item, "responses": texts[k * n : (k + 1) * n], "generator": client.model}
        for k, item in enumerate(items)
    ]


# --- records -------------------------------------------------------------------------------------


def to_records(table: pd.DataFrame) -> list[dict]:
    """One dict a row, ready for JSON: missing values are None, text is kept exactly."""

    def plain(value):
        if isinstance(value, np.generic):
            value = value.item()
        missing = value is pd.NA or (isinstance(value, float) and math.isnan(value))
        return None if missing else value

    return [
        {name: plain(value) for name, value in zip(table.columns, row, strict=True)}
        for row in table.itertuples(index=False, name=None)
    ]


def write_jsonl(table: pd.DataFrame, path: Path | str) -> Path:
    """One JSON object a line: the log of an annotation run."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in to_records(table)]
    return runtime.write_atomic(path, "".join(lines))


def read_jsonl(path: Path | str) -> pd.DataFrame:
    """A table written by `write_jsonl`.  Raises ValueError with the line that is not a JSON object."""
    records = [record for _, record in data.jsonl_records(Path(path).expanduser())]
    columns = list(dict.fromkeys(name for record in records for name in record))
    whole = {"score", "prompt_tokens", "completion_tokens"}
    table = {}
    for name in columns:
        values = [record.get(name) for record in records]
        dtype = "Int64" if name in whole else bool if name == "cached" else object
        table[name] = pd.Series(values, dtype=dtype)
    return pd.DataFrame(table)


# --- human annotators ----------------------------------------------------------------------------

_SHEETS = {  # columns shown, and the one to fill
    "rating": (["instruction", "input", "response"], "grade (1-7)"),
    "ranking": (["instruction", "input", "output (a)", "output (b)"], "better (a, b or equal)"),
}
_ANSWERS = {"a": "(a)", "(a)": "(a)", "b": "(b)", "(b)": "(b)", "equal": "equal"}
_COMPUTED = tuple("=+-@\t")
_SWAPPED = {"(a)": "(b)", "(b)": "(a)", "equal": "equal"}


def _shown(text: str) -> str:
    """A cell's text, with a quote before what a spreadsheet would compute."""
    return "'" + text if text[:1] in _COMPUTED else text


def sheet_text(text: str) -> str:
    """What a text and its cell in a sheet have in common: without that quote, with LF line ends."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text[1:] if text[:1] == "'" and text[1:2] in _COMPUTED else text


def _kind(table: pd.DataFrame) -> tuple[str, list[str]]:
    kind = "ranking" if "response1" in table else "rating"
    columns = preferences.RANKING if kind == "ranking" else preferences.RATING
    return kind, columns[:-1]


def export_for_humans(table: pd.DataFrame, path: Path | str, *, seed: int = 0) -> Path:
    """The items of a ratings or rankings table as a CSV to fill in: no ids, models or other answers.

    Rows are shuffled, and half of the pairs swapped, so that position says nothing.  UTF-8 with a mark,
    as spreadsheets want it.
    """
    kind, columns = _kind(table)
    rows = _checked(table, columns)[columns].drop_duplicates().to_numpy().tolist()
    order = np.random.default_rng(seed)
    order.shuffle(rows)
    if kind == "ranking":
        turned = order.random(len(rows)) < 0.5
        rows = [[*r[:2], r[3], r[2]] if t else r for r, t in zip(rows, turned, strict=True)]
    shown, answer = _SHEETS[kind]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow([*shown, answer])
    writer.writerows([*map(_shown, row), ""] for row in rows)
    return runtime.write_atomic(path, text.getvalue().encode("utf-8-sig"))


def import_from_humans(
    path: Path | str, table: pd.DataFrame, *, annotator: str = "human"
) -> pd.DataFrame:
    """The ratings or rankings table of a filled sheet, in the order of the table it was made from.

    Rows without an answer are left out, with a warning.  Raises ValueError with the line of a bad answer,
    of a row that is not in the table (texts must not be edited) or of one answered twice differently.
    """
    kind, columns = _kind(table)
    path = Path(path).expanduser()
    found = _read_sheet(path, kind)
    rows = _checked(table, columns)[columns].drop_duplicates()
    answers, used = [], set()
    for row in rows.itertuples(index=False):
        key = tuple(map(sheet_text, row))
        turned = (*key[:2], *key[:1:-1])
        used |= {key, turned}
        answer = found.get(key, (None,))[0]
        if answer is None and kind == "ranking" and turned in found:
            answer = _SWAPPED[found[turned][0]]
        answers.append(answer)
    if unknown := [line for key, (_, line) in found.items() if key not in used]:
        raise ValueError(
            f"{path.name}, line {unknown[0]}: this row is not in the table ({len(unknown)} such rows); "
            "texts must stay as exported. Export again, or give the table that was exported."
        )
    column = "verdict" if kind == "ranking" else "score"
    rows = rows.assign(**{column: pd.Series(answers, index=rows.index, dtype=object)})
    kept = rows[rows[column].notna()].reset_index(drop=True).assign(annotator=annotator)
    if left := len(rows) - len(kept):
        warnings.warn(f"{path.name}: {left} of {len(rows)} rows have no answer", stacklevel=2)
    return kept.astype({column: int}) if kind == "rating" else kept


def _read_sheet(path: Path, kind: str) -> dict[tuple, tuple]:
    """{texts as shown: (answer, line)} of the rows that have an answer."""
    shown, column = _SHEETS[kind]
    lines = data.csv_records(path)
    _, header = next(lines)
    if missing := [name for name in (*shown, column) if name not in header]:
        raise ValueError(f"{path.name} lacks the columns {', '.join(missing)}; keep the header.")
    found: dict[tuple, tuple] = {}
    for line, cells in lines:
        cells = dict(zip(header, cells, strict=False))
        given = cells.get(column, "").strip()
        if not given:
            continue
        score, status = parse_rating(given)
        answer = score if kind == "rating" else _ANSWERS.get(given.lower())
        if answer is None or (kind == "rating" and status != "ok"):
            allowed = "a whole number from 1 to 7" if kind == "rating" else "a, b or equal"
            raise ValueError(f"{path.name}, line {line}: answer {given!r}; allowed: {allowed}.")
        key = tuple(sheet_text(cells[name]) for name in shown)
        if found.setdefault(key, (answer, line))[0] != answer:
            first = found[key][1]
            raise ValueError(
                f"{path.name}, line {line}: {given!r}, but line {first} answers the same row "
                "differently. Keep one of them."
            )
    return found


# --- a local endpoint ----------------------------------------------------------------------------

# The child ends when its parent does, however that ends: its standard input closes.
_SERVER = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(0)), daemon=True).start()
from transformers.cli.transformers import main
main()
"""


@contextlib.contextmanager
def serve(model: str | Path = "policy", *, timeout: float = 180.0) -> Iterator[tuple[str, str]]:
    """Run `transformers serve` on a free loopback port; gives (base_url, model name for `ChatClient`).

    `model` is an asset, a folder or a Hub id (`hub.resolve_model`).  The server has one thread for
    arithmetic, answers one call at a time, and is stopped at the end of the block, on an error too.
    Raises RuntimeError with the end of its log where it does not start within `timeout` seconds.
    """
    folder = hub.resolve_model(model)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", _SERVER, "serve", folder.name, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--log-level", "error"]
    command += ["--dtype", str(runtime.inference_dtype()).removeprefix("torch.")]
    hidden = ("KEY", "TOKEN", "SECRET")
    environment = {k: v for k, v in os.environ.items() if not any(h in k.upper() for h in hidden)}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # two threads fight the client's
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, cwd=folder.parent, env=environment, stdin=subprocess.PIPE, stdout=log,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            _wait_until_healthy(f"http://127.0.0.1:{port}/health", process, log, timeout)
            yield f"http://127.0.0.1:{port}/v1", folder.name
        finally:
            process.stdin.close()
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()


def _wait_until_healthy(url: str, process, log, timeout: float) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + timeout
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError), opener.open(url, timeout=2):
            return
        time.sleep(0.2)
    log.seek(0)
    said = log.read().decode("utf-8", errors="replace")[-1500:]
    raise RuntimeError(
        f"`transformers serve` did not start within {timeout:g} s. It needs `pip install "
        f"transformers[serving]`. Its log ends: {said}"
    )
