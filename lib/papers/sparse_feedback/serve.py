"""A local model as a chat endpoint on loopback, for as long as a block lasts."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from lib import hub, runtime

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
