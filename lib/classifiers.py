"""Sequence classifiers of any size, from the Hub or a folder: reward models and scorers of others.

A decoder's head reads the last real token of a text.  Which one that is, the attention mask says: the pad
token does not, for many models pad with their end token or name none, and then transformers reads another
token as soon as a batch is padded.  Encoders read what they were made to read.

CarperAI's TL;DR reward model, which ALT pays by, is no transformers model: one pickled file with a GPT-J
under `transformer.*` and a linear map `v_head` without bias.  `convert_trlx` makes one of it.
"""

from __future__ import annotations

import copy
import inspect
import json
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lib import adapters, cards, encoding, hub, models, runtime
from lib.text import check_texts

MAX_TOKENS = 2048  # read of prompt and response, where the model names no other limit
TRLX_BASE = "EleutherAI/gpt-j-6b"  # whose configuration and tokenizer CarperAI's reward model uses
TRLX_START = "<|startoftext|>"  # stood before each text it was trained on; its last token is read
HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")  # (labels, width)
# what trlx's reward model holds besides weights: buffers of an older transformers
TRLX_BUFFERS = (".attn.bias", ".attn.masked_bias")


# --- the model -----------------------------------------------------------------------------------


def load_classifier(
    name: str | Path,
    *,
    revision: str | None = None,
    tokenizer: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence classifier in eval mode and its tokenizer, by folder or Hub id (`name@revision`).

    Adapters (LoRA) come on the model they were trained over.  Raises ValueError for a model that is none (its
    head would be random numbers) and AssetError where it cannot be had.
    """
    device = device or runtime.get_device()
    dtype = dtype or runtime.inference_dtype(device)
    folder = hub.resolve_model(name, revision)
    if cards.read(folder).get("kind") == "reward model":
        raise ValueError(
            f"{name} holds a reward model, which scores responses to prompts. Load it with "
            "reward_models.load."
        )
    if is_trlx(folder):
        folder = convert_trlx(folder, tokenizer or TRLX_BASE)
        tokenizer = None
    if adapters.is_folder(folder):
        return _load_over_base(folder, tokenizer, dtype, device)
    config = hub.read_config(folder)
    model, report = AutoModelForSequenceClassification.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        output_loading_info=True,
        use_safetensors=True,
        **hub.SAFE,
    )
    if report["missing_keys"]:
        raise ValueError(
            f"{name} is no sequence classifier: {sorted(report['missing_keys'])[0]!r} is not among its "
            f"weights (it says it is {', '.join(config.architectures or ['unknown'])}). A language model is "
            "loaded by models.load_policy, a backbone to train on by reward_models.load_backbone."
        )
    return model.to(device).eval(), models.load_tokenizer(tokenizer or folder)


def _load_over_base(folder: Path, tokenizer: str | None, dtype, device):
    """A classifier whose adapters, with its head, a folder holds, over the model they were trained on."""
    config = json.loads((folder / adapters.CONFIG).read_text(encoding="utf-8"))
    base = hub.resolve_model(config["base_model_name_or_path"], config.get("revision"))
    heads = [x for n, x in load_file(folder / adapters.WEIGHTS).items() if n.endswith(HEADS)]
    if not heads:
        raise ValueError(
            f"{folder} holds adapters without a classifier's head. Load them with models.load_policy."
        )
    options = {"num_labels": len(heads[0]), "dtype": dtype, "use_safetensors": True, **hub.SAFE}
    model = AutoModelForSequenceClassification.from_pretrained(base, **options)
    adapters.attach(model, folder)
    own_words = folder if [*folder.glob("tokenizer*")] else base
    return model.to(device).eval(), models.load_tokenizer(tokenizer or own_words)


def label_names(model: PreTrainedModel) -> list[str]:
    """The model's labels in the order of its logits."""
    return [str(model.config.id2label[i]) for i in range(model.config.num_labels)]


def reads_last_token(model: PreTrainedModel) -> bool:
    """Whether this classifier is a decoder with a linear head on one token's state."""
    return isinstance(getattr(model, "score", None), torch.nn.Linear)


def classify(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor | None = None
) -> torch.Tensor:
    """Token ids and mask (texts, time), padded on either side -> logits (texts, labels).

    `types`: which of two texts each token belongs to, for encoders that ask.
    """
    if not reads_last_token(model):
        extra = {} if types is None else {"token_type_ids": types}
        return model(input_ids=ids, attention_mask=mask, **extra).logits
    body, extra = model.base_model, {}
    if "position_ids" in inspect.signature(body.forward).parameters:
        extra["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    states = body(input_ids=ids, attention_mask=mask, use_cache=False, **extra).last_hidden_state
    return model.score(last_real(states, mask))


def last_real(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """States (texts, time, width) -> (texts, width) at the last position that the mask counts."""
    places = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * places).argmax(-1)
    return states[torch.arange(len(states), device=states.device), last]


# --- as a reward model ---------------------------------------------------------------------------


class _Row(NamedTuple):
    ids: list[int]
    types: list[int] | None


class ClassifierReward:
    """A reward model of others: one score for a prompt and a response, as `RewardModel.score` gives it.

    One label: its logit.  Several: the log-odds of `label` (a name, or its number), which is then needed.
    A text is what the tokenizer's chat template writes; without one an encoder gets prompt and response as
    a pair, a decoder prompt, response and end token.  `template(prompt, response)` writes it otherwise.
    Texts longer than `max_length` tokens lose their beginning; `truncated` counts them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        label: str | None = None,
        template: Callable[[str, str], str] | None = None,
        max_length: int = MAX_TOKENS,
    ):
        self.model = model.eval()
        self.tokenizer = copy.copy(tokenizer)
        self.tokenizer.truncation_side = "left"
        self._pair = not reads_last_token(model)
        self._types = getattr(model.config, "type_vocab_size", 0) > 1
        start = getattr(model.config, "text_start", None)  # of a converted model
        if template is None and start is not None:
            template = partial("{}{}{}".format, start)
        self.template = template
        self.column = _column(label_names(model), label)
        self.max_length = min(max_length, models.longest_text(model.config, max_length))
        self.truncated = 0

    def encode(self, prompt: str, response: str) -> _Row:
        """Token ids of one text, cut to `max_length`, and for encoders which part each belongs to."""
        if self.template is None and self.tokenizer.chat_template is None and self._pair:
            return self._encode_pair(prompt, response)
        ids = self._encode_text(prompt, response)
        self.truncated += len(ids) > self.max_length
        return _Row(ids[-self.max_length :], None)

    def _encode_text(self, prompt: str, response: str) -> list[int]:
        tokenizer = self.tokenizer
        if self.template is not None:
            return list(tokenizer(self.template(prompt, response), verbose=False)["input_ids"])
        if tokenizer.chat_template is not None:
            turns = [("user", prompt), ("assistant", response)]
            messages = [{"role": role, "content": text} for role, text in turns]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            first = encoding.start_ids(tokenizer) if encoding.writes_start(tokenizer) else []
            return encoding.one_start(tokenizer, first + encoding.bare_ids(tokenizer, text))
        before, after = encoding.encode(tokenizer, prompt, response, joined=True)
        return before + encoding.with_end(after, encoding.end_tokens(tokenizer))

    def _encode_pair(self, prompt: str, response: str) -> _Row:
        both = {"verbose": False, "return_token_type_ids": self._types}
        row = self.tokenizer(prompt, response, **both)
        if len(row["input_ids"]) > self.max_length:
            self.truncated += 1
            cut = {"truncation": "longest_first", "max_length": self.max_length}
            row = self.tokenizer(prompt, response, **both, **cut)
        types = list(row["token_type_ids"]) if self._types else None
        return _Row(list(row["input_ids"]), types)

    @torch.inference_mode()
    def score(
        self, prompts: Sequence[str], responses: Sequence[str], *, tokens_per_batch: int = 8192
    ) -> np.ndarray:
        """Score of each response, float64 (rows,); warns of texts that were cut."""
        check_texts(prompts)
        check_texts(responses)
        before = self.truncated
        rows = [self.encode(*pair) for pair in zip(prompts, responses, strict=True)]
        if cut := self.truncated - before:
            warnings.warn(f"{cut} of {len(rows)} texts cut to {self.max_length}.", stacklevel=2)
        scores = np.empty(len(rows))
        for batch in encoding.token_batches([len(row.ids) for row in rows], tokens_per_batch):
            logits = classify(self.model, *self._tensors([rows[i] for i in batch])).double()
            scores[batch] = self._reward(logits).cpu().numpy()
        return scores

    def _tensors(self, rows: Sequence[_Row]) -> list[torch.Tensor | None]:
        """Ids, mask and types of some rows, each (rows, time); types only where all rows have them."""
        device = self.model.device
        ids, mask = encoding.pad_rows(
            [row.ids for row in rows], encoding.pad_id(self.tokenizer), "right"
        )
        if any(row.types is None for row in rows):
            return [ids.to(device), mask.to(device), None]
        types, _ = encoding.pad_rows([row.types for row in rows], 0, "right")
        return [ids.to(device), mask.to(device), types.to(device)]

    def _reward(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (texts, labels) -> the logit, or log-odds, of the one label (texts,)."""
        chosen = logits[:, self.column]
        several = self.model.config.problem_type == "multi_label_classification"
        if several or logits.shape[1] == 1:
            return chosen
        others = torch.arange(logits.shape[1], device=logits.device) != self.column
        return chosen - logits[:, others].logsumexp(-1)


def _column(labels: Sequence[str], label: str | None) -> int:
    """Number of the label that is meant; ValueError where that is undecided."""
    if label is None and len(labels) == 1:
        return 0
    if label in labels:
        return list(labels).index(label)
    if label is not None and label.isdecimal() and int(label) < len(labels):
        return int(label)
    meant = f"has no label {label!r}" if label is not None else "has several labels"
    raise ValueError(
        f"this model {meant}; it has {', '.join(labels)}. Name one: label=..., or in the model's name: "
        "name#label."
    )


# --- CarperAI's checkpoint ------------------------------------------------------------------------


def is_trlx(folder: Path) -> bool:
    """Whether a folder holds a reward model as trlx wrote it: weights alone, a GPT-J and `v_head`."""
    if (folder / "config.json").exists():
        return False
    path = folder / "model.safetensors"
    return path.exists() and "v_head.weight" in hub.tensor_names(path)


def convert_trlx(folder: Path, base: str = TRLX_BASE) -> Path:
    """A folder in the cache with the same model as `GPTJForSequenceClassification`; made once.

    `base` names the model whose configuration and tokenizer it shares (the checkpoint has none).  What it
    scores is `<|startoftext|>`, prompt and summary, read at the summary's last token: trlx writes an end
    token after it and reads the token before.  Raises ValueError where sizes differ from the base's.
    """
    key = runtime.content_hash(str(folder), base)[:16]
    return hub.converted(f"trlx-{key}", lambda staging: _write_trlx(folder, base, staging))


def _write_trlx(folder: Path, base: str, staging: Path) -> None:
    small = hub.resolve_model(base, weights=False)
    config = hub.read_config(small)
    config.num_labels = 1
    config.architectures = ["GPTJForSequenceClassification"]
    config.text_start = TRLX_START
    tensors = _trlx_tensors(folder / "model.safetensors", config)
    save_file(tensors, staging / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(staging)
    models.load_tokenizer(small).save_pretrained(staging)
    facts = {"kind": "classifier", "base": {"name": base}, "converted": str(folder)}
    cards.write(staging, cards.describe(facts))


def _trlx_tensors(path: Path, config) -> dict[str, torch.Tensor]:
    """The checkpoint's weights under transformers' names."""
    tensors = load_file(path)
    head = tensors.pop("v_head.weight")
    named = {n: x for n, x in tensors.items() if not n.endswith(TRLX_BUFFERS)}
    foreign = [name for name in named if not name.startswith("transformer.")]
    vocabulary, width = named["transformer.wte.weight"].shape
    sizes = {"vocab_size": vocabulary, "n_embd": width}
    sizes["n_layer"] = len({name.split(".")[2] for name in named if ".h." in name})
    differing = {
        n: (size, getattr(config, n)) for n, size in sizes.items() if size != getattr(config, n)
    }
    if foreign or differing or head.shape != (1, width):
        raise ValueError(
            f"{path.parent} is no trlx reward model over this base: "
            f"{foreign or differing or {'v_head': tuple(head.shape)}} (here, in the base). Name the model it "
            "was trained from: tokenizer='namespace/name'."
        )
    return named | {"score.weight": head}
