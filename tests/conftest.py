"""Fixtures shared by the tests: tiny models (no download) and the real policy where it can be had."""

import os
import signal
from pathlib import Path

os.environ.setdefault("FEEDBACK_HEADLESS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

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
