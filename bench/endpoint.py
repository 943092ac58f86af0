"""A chat endpoint on loopback, for tests and benchmark: a rate limit, faults at random, a log of all it saw.

`python endpoint.py '{"rate": 150, "faults": 0.3, "seed": 0}'` prints its port.  It answers a prompt with
`say` (default: the prompt, reversed).  GET /log: one row a request, [time, prompt, outcome].
"""

import asyncio
import json
import random
import sys
import time

FAULTS = ("429", "500", "timeout", "half", "malformed", "no choices")


class Endpoint:
    def __init__(self, rate=None, faults=0.0, seed=0, say=None, usage=True, delay=0.01, script=()):
        self.rate, self.faults, self.say, self.usage = rate, faults, say, usage
        self.delay, self.script, self.random = delay, list(script), random.Random(seed)
        self.log, self.left, self.at = [], 0.0, time.monotonic()
        self.seen = {}  # the last request's body and headers

    def outcome(self):
        """What becomes of the next request: "over" the rate limit, a fault, or "ok"."""
        if self.rate:
            now = time.monotonic()
            self.left = min(self.rate, self.left + (now - self.at) * self.rate)  # a second at most
            self.at = now
            if self.left < 1:
                return "over"
            self.left -= 1
        if self.script:
            return self.script.pop(0)
        return self.random.choice(FAULTS) if self.random.random() < self.faults else "ok"

    def answer(self, prompt, body):
        text = self.say if self.say is not None else prompt[::-1]
        answer = {"choices": [{"message": {"role": "assistant", "content": text}}]}
        if self.usage:
            answer["usage"] = {"prompt_tokens": 100, "completion_tokens": 10}
        return json.dumps({"model": body.get("model"), **answer}).encode()

    async def serve(self, reader, writer):
        try:
            while await self.one(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def one(self, reader, writer):
        """Serve one request; True where the connection stays open."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
        if head.startswith("GET"):
            return await self.reply(writer, 200, json.dumps(self.log).encode())
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        prompt, kind = body["messages"][-1]["content"], self.outcome()
        self.seen = {"body": body, "headers": headers}
        await asyncio.sleep(self.delay)
        self.log.append([time.time(), prompt, kind])
        if kind == "timeout":
            await asyncio.sleep(20)
            return False
        if kind == "half":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{")
            await writer.drain()
            return False
        if kind in ("ok", "malformed", "no choices"):
            content = {
                "ok": self.answer(prompt, body),
                "malformed": b'{"choices": [',
                "no choices": b"{}",
            }
            return await self.reply(writer, 200, content[kind])
        return await self.refuse(writer, kind)

    async def refuse(self, writer, kind):
        """An error status; "429:2" names a Retry-After, "401!sk-x" a message."""
        if kind == "over":
            return await self.reply(writer, 429, b"{}", "retry-after-ms: 20\r\n")
        status, _, message = kind.partition("!")
        status, _, wait = status.partition(":")
        extra = f"Retry-After: {wait}\r\n" if wait else ""
        content = json.dumps({"error": {"message": message or "no"}}).encode()
        return await self.reply(writer, int(status), content, extra)

    async def reply(self, writer, status, content, extra=""):
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{extra}"
        writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        await writer.drain()
        return True

    async def start(self):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        return self.server.sockets[0].getsockname()[1]


async def main():
    print(await (endpoint := Endpoint(**json.loads(sys.argv[1]))).start(), flush=True)
    await endpoint.server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
