"""Fixtures shared by the tests: tiny models (no download) and the real policy where it can be had."""

import os
import signal
from pathlib import Path

os.environ.setdefault("FEEDBACK_HEADLESS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch

from lib import models
from lib.course import assets

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
