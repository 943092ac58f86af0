"""Chat models behind any OpenAI-compatible endpoint: every reply is stored, and none is bought twice.

`ChatClient.ask` answers a list of `chat` requests in order.  The openai package sends them, waits (it
honours Retry-After) and tries again.  Here is what it does not do: a file of replies, a rate, a cap on
cost, claims between processes, and answers that are read once, where they come in (`answers`).  A run that
is killed buys again at most the calls that were in flight.

Simplified: a spending cap holds for one `ChatClient`; only the first choice of an answer is read.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

import openai

from lib import runtime
from lib.answers import (
    CUT_OFF,
    Outcome,
    count_tokens,
    read_answer,
    read_response,
    without_reasoning,
)
from lib.replies import LONGEST_WAIT, open_store

OPENAI_URL = "https://api.openai.com/v1"
LONGEST_PAUSE = 30.0  # seconds between two tries where the server names no time
OUTPUT_GUESS = 256  # tokens assumed for a reply whose request sets no limit
EARLY = 6  # tries at a server that has answered nobody; replies without a word before a run stops


class EndpointError(RuntimeError):
    """An endpoint gave no usable answer.  `replies`: what was answered, None where nothing was."""

    replies: list[Reply | None] = []


class BudgetReached(EndpointError):
    """The spending cap is reached; `replies` holds what was bought, and all of it is stored."""


def chat(prompt: str, *, system: str = "", replicate: int = 0, **parameters) -> dict:
    """A request: one user message (after a system message, if given) and the endpoint's parameters.

    Equal requests share one reply; another `replicate` number (not sent) asks for a fresh one.  A
    parameter that is None is left out.  Raises ValueError for stream=True: answers are read whole.
    """
    if parameters.get("stream"):
        raise ValueError("stream=True: answers are read whole here. Try to leave it out.")
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    return {"messages": messages, "replicate": replicate} | with_defaults({}, parameters)


def with_defaults(defaults: dict, parameters: dict) -> dict:
    """`parameters` over `defaults`; None takes a default back, max_completion_tokens replaces max_tokens.

    Reasoning models refuse max_tokens, and any temperature but their own.
    """
    merged = defaults | parameters
    if merged.get("max_completion_tokens") is not None:
        merged.pop("max_tokens", None)
    return {name: value for name, value in merged.items() if value is not None}


def _parameters(request: dict) -> dict:
    """What is sent beside model and messages."""
    return {k: v for k, v in request.items() if k not in ("messages", "replicate")}


@dataclass(frozen=True)
class Reply:
    """One answer.  `text` is None where there is none; `error` then says why.  Times are UTC."""

    text: str | None  # as written, reasoning included; "" where the model says nothing
    model: str
    parameters: dict
    key: str
    raw: dict = field(default_factory=dict, repr=False)  # the endpoint's whole answer
    at: str = ""
    seconds: float = float("nan")
    cached: bool = False
    error: str = ""
    finish_reason: str = ""  # the endpoint's ("length": cut off at the token limit), or "refusal"

    @property
    def answer(self) -> str | None:
        """The text after any reasoning."""
        return None if self.text is None else without_reasoning(self.text)

    def tokens(self, side: str) -> int | None:
        """Tokens that the endpoint counted, "prompt" or "completion"; None where it did not."""
        return count_tokens(self.raw, side)


def _reply(key: str, record: dict, outcome: Outcome, cached: bool) -> Reply:
    """The reply that a record of the store holds."""
    facts = {name: record[name] for name in ("model", "parameters", "at", "seconds")}
    return Reply(
        outcome.text,
        key=key,
        raw=record["raw"] or {},
        cached=cached,
        error=outcome.problem,
        finish_reason=outcome.finish_reason,
        **facts,
    )


def _four_bytes_a_token(text: str) -> int:
    return math.ceil(len(text.encode("utf-8")) / 4)


# --- the client ----------------------------------------------------------------------------------


@dataclass(eq=False)
class ChatClient:
    """Asks a chat model at an OpenAI-compatible endpoint (OpenAI, vLLM, `transformers serve`, ...).

    Counts what it did: sent (attempts), bought (replies paid for), spent (in the price's currency).
    Raises ValueError for settings that cannot work.
    """

    model: str  # the name the endpoint knows
    _: KW_ONLY
    base_url: str = ""  # "" means $OPENAI_BASE_URL, else OpenAI
    key_name: str = (
        ""  # variable of the key; "" is OPENAI_API_KEY, which a loopback address needs not
    )
    concurrency: int = 16  # calls in flight
    requests_per_second: float | None = (
        None  # a limit per minute divided by 60; every attempt counts
    )
    timeout: float = 60.0  # seconds without a sign of life after which an attempt has failed
    attempts: int = 15  # tries of a request; a rate limit (429) is waited for, for up to 15 minutes
    first_pause: float = 0.5  # seconds before the second try; the pause doubles with each
    price: tuple[float, float] | None = None  # (input, output) per million tokens; None = unknown
    max_cost: float | None = None  # stop before this client's replies cost more; needs a price
    cache: Path | str | None = None  # SQLite file of replies
    count_tokens: Callable[[str], int] = _four_bytes_a_token  # for estimates
    sent: int = field(default=0, init=False)
    bought: int = field(default=0, init=False)
    spent: float = field(default=0.0, init=False)

    def __post_init__(self):
        self.base_url = (self.base_url or _base_url()).strip()
        self._check()
        self.store = open_store(self.cache or runtime.cache_dir() / "replies" / "chat.sqlite")
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
        replicate = request.get("replicate", 0)
        return runtime.content_hash(
            "chat", self.model, request["messages"], _parameters(request), replicate
        )

    def ask(
        self, requests: Sequence[dict], *, label: str = "asking", on_error: str = "raise"
    ) -> list[Reply]:
        """The replies to `chat` requests, in order; equal requests are asked once.

        A request that is refused (400, too long for the model) or gets no answer in `attempts` tries stops
        the run, or with on_error="keep" becomes a reply without text; an answer that says nothing (a
        refusal, a content filter, three times empty) is a reply with the text "".  Neither is stored: the
        next run asks again.  Raises BudgetReached, and EndpointError: at once where key, address or model
        are refused, credit or a daily limit is used up, or the first replies are cut off before they say
        anything.  Both hold what was answered.  A KeyboardInterrupt waits for the calls in flight; what is
        answered is stored in every case.
        """
        if on_error not in ("raise", "keep"):
            raise ValueError(f"on_error is {on_error!r}; allowed: 'raise', 'keep'.")
        keys = [self.key(request) for request in requests]
        wanted = dict(zip(keys, requests, strict=True))
        with self._busy:
            known = self.stored(wanted)
            jobs = {key: request for key, request in wanted.items() if key not in known}
            run = _Run(self, label, keep=on_error == "keep")
            if jobs:
                run.all(jobs)
        replies = [known.get(key) or run.replies.get(key) for key in keys]
        if run.stop is not None:
            run.stop.replies = replies
            raise run.stop
        return replies

    def stored(self, keys: Iterable[str]) -> dict[str, Reply]:
        """The replies among these keys that the store holds; what is no answer (any more) is left out."""
        replies = {}
        for key, record in self.store.get_many(keys).items():
            reply = _reply(key, record, read_answer(record["raw"]), cached=True)
            if reply.answer:
                replies[key] = reply
        return replies

    def estimate(self, requests: Sequence[dict]) -> dict:
        """A dry run: what `ask` would buy, without sending anything.

        calls, cached, to_buy (equal requests once), input_tokens and output_tokens of those to buy,
        cost (None without a price), seconds at the rate limit (None without one), rule.  Input is
        counted by `count_tokens` plus 4 a message; output is max_tokens, or 256 where none is set.
        """
        keys = [self.key(request) for request in requests]
        wanted = dict(zip(keys, requests, strict=True))
        stored = self.stored(wanted)
        todo = [self.expected_tokens(r) for key, r in wanted.items() if key not in stored]
        input_tokens = sum(tokens for tokens, _ in todo)
        output_tokens = sum(tokens for _, tokens in todo)
        rate = self.requests_per_second
        return {
            "calls": len(keys),
            "cached": sum(key in stored for key in keys),
            "to_buy": len(todo),
            "input_tokens": input_tokens,
            "output_tokens": output_tokens,
            "cost": None if self.price is None else self.cost(input_tokens, output_tokens),
            "seconds": len(todo) / rate if rate else None,
            "rule": "tokens of all messages + 4 each; replies at their limit (256 without one)",
        }

    def expected_tokens(self, request: dict) -> tuple[int, int]:
        """Estimated input and output tokens of a request."""
        texts = [str(message["content"]) for message in request["messages"]]
        limit = request.get("max_completion_tokens") or request.get("max_tokens") or OUTPUT_GUESS
        return sum(self.count_tokens(t) + 4 for t in texts), limit * (request.get("n") or 1)

    def cost(self, input_tokens: float, output_tokens: float) -> float:
        """What so many tokens cost; 0 where no price is known."""
        prices = self.price or (0.0, 0.0)
        return (input_tokens * prices[0] + output_tokens * prices[1]) / 1e6

    def pay(self, request: dict, answer: object) -> None:
        """Add the cost of an answer, usable or not: as the endpoint counted, else as estimated."""
        tokens = list(self.expected_tokens(request))
        for place, side in enumerate(("prompt", "completion")):
            counted = count_tokens(answer, side)
            tokens[place] = tokens[place] if counted is None else counted
        self.spent += self.cost(*tokens)


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


# --- one run -------------------------------------------------------------------------------------


class _Stopped(BaseException):
    """The run was stopped before this attempt; no failure, so nothing tries it again."""


class _Http(openai.DefaultHttpxClient):
    """The openai package's connection: every attempt, its own new tries included, passes `send`."""

    def __init__(self, run: _Run):
        super().__init__(trust_env=not is_loopback(run.client.base_url))  # no proxy to ourselves
        self.run = run

    def send(self, request, **options):
        """Send when the run allows it, read the answer, and say whether the package may try again."""
        run = self.run
        body = json.loads(request.content)
        failures = int(request.headers.get("x-stainless-retry-count", 0))
        run.wait_for_turn(body)
        try:
            response = super().send(request, **options)
            response.read()
        except Exception as error:
            run.landed()
            if run.gives_up(failures):
                raise openai.APIConnectionError(request=request) from error
            raise
        outcome = response.extensions["outcome"] = run.receive(body, response)
        again = outcome.passing and not run.gives_up(failures)
        if outcome.text is not None:
            again = outcome.passing and failures < 2  # an empty answer is asked for three times
        elif outcome.wait is not None and outcome.wait > LONGEST_PAUSE:
            again = False  # `_Run.buy` waits
        response.headers["x-should-retry"] = "true" if again else "false"
        if again and response.status_code == 200:
            response.status_code = 502  # what the failure inside it is
        if again and (outcome.wait is None or "retry-after" not in response.headers):
            pause = outcome.wait  # that the error's own words ask for
            if pause is None:
                pause = min(LONGEST_PAUSE, run.client.first_pause * 2**failures)
                pause *= random.uniform(0.5, 1)
            response.headers.setdefault("retry-after-ms", f"{1000 * pause:.0f}")
        return response


class _Run:
    """One `ask`: a thread for each call in flight, which also waits while the call is tried again."""

    def __init__(self, client: ChatClient, label: str, keep: bool):
        self.client = client
        self.label = label
        self.keep = keep
        self.replies: dict[str, Reply] = {}
        self.stop: BaseException | None = None
        self.stopped = threading.Event()
        self.finished = threading.Event()
        self.lock = threading.Lock()
        self.in_flight = 0  # calls sent whose cost is not counted yet
        self.left = 0  # requests that are not settled
        self.answered = 0
        self.refused = 0
        self.cut_off = 0  # answers that reached their token limit without a word
        self.spoken = 0  # the others
        self.next_turn = 0.0

    def all(self, jobs: dict[str, dict]) -> None:
        """Ask everything; Ctrl-C lets the calls in flight finish and sends nothing more."""
        client = self.client
        named = client.key_name or not is_loopback(client.base_url)
        name = client.key_name or "OPENAI_API_KEY"
        self.secret = runtime.secret(name, "This endpoint") if named else ""
        self.left = len(jobs)
        self.bar = runtime.progress(total=len(jobs), label=self.label, unit="call")
        self.openai = openai.OpenAI(
            api_key=self.secret or "none",
            base_url=client.base_url,
            http_client=_Http(self),
            timeout=client.timeout,
            max_retries=client.attempts - 1,
        )
        with self.openai, self.bar, ThreadPoolExecutor(client.concurrency) as pool:
            try:
                for key, request in jobs.items():
                    pool.submit(self.job, key, request)
                while not self.finished.wait(0.2):  # a wait that Ctrl-C can end
                    pass
            except KeyboardInterrupt:
                self.halt(KeyboardInterrupt("stopped; every reply so far is stored"))

    def halt(self, reason: BaseException) -> None:
        """Send nothing more; the first reason is the one that is raised."""
        self.stop = self.stop or reason
        self.stopped.set()

    def pause(self, seconds: float) -> None:
        """Sleep; raises where the run is stopped."""
        if self.stopped.wait(max(0.0, seconds)):
            raise _Stopped

    def job(self, key: str, request: dict) -> None:
        """One request, unless another run buys or has bought it; an error stops the run."""
        store = self.client.store
        try:
            self.pause(0)
            while not store.claim(key):
                self.pause(0.2)
            try:
                known = self.client.stored([key]).get(key)
                self.replies[key] = known or self.buy(key, request)
            finally:
                store.release(key)
        except _Stopped:
            pass
        except Exception as error:
            self.halt(error)
        with self.lock:
            cost = f"cost {self.client.spent:.4f}" if self.client.price else ""
            self.bar.set_postfix_str(cost, refresh=False)
            self.bar.update()
            self.left -= 1
            if not self.left:
                self.finished.set()

    def wait_for_turn(self, body: dict) -> None:
        """Wait until rate and cap on cost allow this attempt; raises where the run is stopped."""
        if self.client.requests_per_second:
            with self.lock:
                now = time.monotonic()  # up to 0.5 s are caught up
                turn = max(self.next_turn + 1 / self.client.requests_per_second, now - 0.5)
                self.next_turn = turn
            self.pause(turn - now)
        self.pause(0)
        while not self.takes_off(body):
            self.pause(0.01)  # until the calls in flight have told their cost

    def takes_off(self, body: dict) -> bool:
        """Count a call as in flight if the cap on cost leaves room for it beside the others."""
        client = self.client
        with self.lock:
            expected = client.cost(*client.expected_tokens(body)) if client.max_cost else 0.0
            each = client.spent / client.bought if client.bought else expected
            after = client.spent + each * (self.in_flight + 1)
            if client.max_cost is None or after <= client.max_cost * (1 + 1e-9):
                self.in_flight += 1
                client.sent += 1
                return True
            if not self.in_flight:
                self.halt(
                    BudgetReached(
                        f"max_cost {client.max_cost:g} is reached: {client.bought} replies bought "
                        f"for {client.spent:.6g}, the next would cost about {each:.2g}. They are "
                        "stored; run again with a higher max_cost to go on."
                    )
                )
        return False

    def landed(self) -> None:
        """A call is not in flight any more."""
        with self.lock:
            self.in_flight -= 1

    def receive(self, body: dict, response) -> Outcome:
        """Read a response, and count what it costs."""
        outcome, answer = read_response(response)
        with self.lock:
            if response.status_code == 200:
                self.client.pay(body, answer)
            self.client.bought += outcome.text is not None
            self.answered += outcome.text is not None
        self.landed()
        return outcome

    def gives_up(self, failures: int) -> bool:
        """Whether no further try is made: earlier at a server that has answered nobody."""
        attempts = self.client.attempts
        return failures + 1 >= (attempts if self.answered else min(EARLY, attempts))

    def buy(self, key: str, request: dict) -> Reply:
        """Ask until there is an answer, a refusal or no try left.  EndpointError stops the run."""
        record = {"model": self.client.model, "parameters": _parameters(request)}
        record |= {"replicate": request.get("replicate", 0), "raw": None, "at": ""}
        until = time.monotonic() + LONGEST_WAIT
        for turn in itertools.count():
            started = time.perf_counter()
            outcome, record["raw"] = self.send(request["messages"], record["parameters"])
            record["seconds"] = round(time.perf_counter() - started, 4)
            waiting = outcome.passing and (outcome.throttled or outcome.wait)
            if not waiting or time.monotonic() > until:
                break
            self.pause(outcome.wait or min(LONGEST_PAUSE, self.client.first_pause * 2**turn))
        record["at"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return self.settle(key, request, outcome, record)

    def send(self, messages: list, parameters: dict) -> tuple[Outcome, object]:
        """All attempts by the openai package: what came of the last, and its JSON where it is an answer."""
        create = self.openai.chat.completions.with_raw_response.create
        try:
            reply = create(model=self.client.model, messages=messages, extra_body=parameters)
            response = reply.http_response
        except openai.APIStatusError as error:
            response = error.response
        except openai.APIConnectionError as error:
            problem = f"{type(error.__cause__).__name__}, timeout {self.client.timeout:g} s"
            return Outcome(problem=problem, passing=True), None
        outcome = response.extensions["outcome"]
        return outcome, None if outcome.text is None else json.loads(response.content)

    def settle(self, key: str, request: dict, outcome: Outcome, record: dict) -> Reply:
        """Store an answer; a failure becomes a reply without text, or the end of the run."""
        problem = outcome.problem
        if outcome.passing and outcome.text is None:
            tries = self.client.attempts if self.answered else min(EARLY, self.client.attempts)
            problem = f"no answer in {tries} attempts (last: {problem})"
        problem = problem.replace(self.secret or "\0", "***")
        reply = _reply(key, record, replace(outcome, problem=problem), cached=False)
        if reply.answer:
            self.client.store.put(key, record, replace=True)
        with self.lock:
            self.spoken += bool(reply.answer)
            self.cut_off += outcome.problem == CUT_OFF
            self.refused += reply.text is None
        silent = self.cut_off >= EARLY and not self.spoken
        hopeless = outcome.lasting or (
            not self.answered and (outcome.passing or self.refused >= EARLY)
        )
        if silent or (reply.text is None and (hopeless or not self.keep)):
            start = str(request["messages"][-1]["content"])[:80]
            raise EndpointError(
                f"{self.client.model!r} at {shown_url(self.client.base_url)}: {problem or CUT_OFF}. "
                f"The request begins {start!r}. Answers so far are stored; run again to go on."
            )
        return reply
