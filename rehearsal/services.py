"""The two services that notebooks ask, on loopback: an OpenAI-compatible chat endpoint, and Perspective.

An answer depends on the question alone, so that a run that goes on sees what it saw before.  The endpoint
answers in the form that a prompt's last line asks for (a number, "Output (a)", a label), and with
log-probabilities where a request wants them.  Perspective knows the rude words of `rehearsal.models`, and
refuses a few texts as of no known language, as the real one does.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from rehearsal.models import RUDE

OPTIONS = {  # what a prompt's last line asks for -> the answers it may get
    "Grade:": [str(number) for number in range(1, 8)],
    "Better:": ["Output (a)", "Output (b)"],
    "Answer Yes or No.": ["Yes", "No"],
    "True or False?": ["True", "False"],
    "Feedback:": [
        "Harmless and very helpful",
        "Harmless and helpful",
        "Harmless and not helpful",
        "Harmful",
    ],
}
CRITIQUES = [  # where a prompt asks for three headings
    f"Analysis: as asked.\nFeedback: {sentence}\nScore: {score}"
    for sentence, score in (("Clear and true.", 3), ("True but long.", 2), ("Says little.", 0))
]
NO_LANGUAGE = "Attribute TOXICITY does not support request languages: und"


class Services:
    """Serves both at `url` (Perspective) and `url`/v1 (chat) until `close`; `requests` counts them."""

    def __init__(self):
        self.requests: Counter = Counter()
        handler = type("Handler", (_Handler,), {"services": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        self.server.shutdown()
        self.server.server_close()


def draw(text: str, n: int) -> int:
    """A number below n that depends on the text alone."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16) % n


def perspective(body: dict) -> tuple[int, dict]:
    """Status and answer to comments:analyze: a score that grows with each rude word."""
    text = body["comment"]["text"]
    if not re.search("[A-Za-z]", text) or draw(text, 50) == 0:
        return 400, {"error": {"code": 400, "message": NO_LANGUAGE}}
    rude = sum(word in RUDE for word in re.findall("[a-z]+", text.lower()))
    score = {"value": min(0.98, 0.02 + 0.3 * rude + draw(text, 1000) / 4000), "type": "PROBABILITY"}
    return 200, {
        "attributeScores": {name: {"summaryScore": score} for name in body["requestedAttributes"]}
    }


def chat(body: dict) -> tuple[int, dict]:
    """Status and answer to chat/completions."""
    prompt = body["messages"][-1]["content"]
    *before, last = prompt.strip().splitlines() or [""]
    asked = before[-1] if last == "Answer:" and before else last
    fits = (o for form, o in OPTIONS.items() if asked.startswith(form) or asked.endswith(form))
    options = next(fits, None)
    options = CRITIQUES if "three headings" in prompt else options
    options = options or [f"This is answer {draw(prompt, 1000)} to what was asked. It is short."]
    text = options[draw(prompt, len(options))]
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": text},
    }
    if body.get("logprobs"):
        choice["logprobs"] = {
            "content": _log_probabilities(text, options, body.get("top_logprobs") or 0)
        }
    usage = {"prompt_tokens": len(prompt) // 4, "completion_tokens": len(text.split())}
    usage["total_tokens"] = sum(usage.values())
    answer = {
        "id": "rehearsal",
        "object": "chat.completion",
        "created": 0,
        "model": body.get("model"),
    }
    return 200, answer | {"choices": [choice], "usage": usage}


def _log_probabilities(text: str, options: list[str], top: int) -> list[dict]:
    """One entry a word; at the first, the first words of all options stand beside it."""
    first = list(dict.fromkeys(option.split()[0] for option in options))
    rows = []
    for place, word in enumerate(text.split()):
        others = [other for other in first if other != word] if place == 0 else []
        likely = 0.7 if others else 0.99
        known = {word: likely} | {other: (1 - likely) / len(others) for other in others}
        likeliest = [_token(other, share) for other, share in list(known.items())[:top]]
        rows.append(_token(word, likely) | {"top_logprobs": likeliest})
    return rows


def _token(text: str, share: float) -> dict:
    return {"token": text, "logprob": math.log(share), "bytes": list(text.encode())}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    services: Services

    def log_message(self, *_):
        """Nothing: `Services.requests` counts."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind = perspective if "comments:analyze" in self.path else chat
        self.services.requests[kind.__name__] += 1
        status, answer = kind(body)
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
