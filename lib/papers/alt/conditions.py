"""Labels -> what the policy reads before the prompt: words, a separator, or tokens of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import embedding
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib import encoding, models
from lib.papers.alt import labels

STYLES = ("none", "text", "separator", "token")
TOKENS = "condition_tokens.safetensors"  # beside a kept policy: (tokens, width)


# --- conditions ----------------------------------------------------------------------------------


class ExtendedEmbedding(torch.nn.Module):
    """An input embedding with further rows, ids from `len(base)` on; the output layer keeps its size."""

    def __init__(self, base: torch.nn.Embedding, extra: torch.Tensor):
        super().__init__()
        self.base, self.extra = base, torch.nn.Parameter(extra)

    @property
    def weight(self) -> torch.nn.Parameter:
        """The base rows, which the output layer may share."""
        return self.base.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(batch, time) -> (batch, time, width)."""
        first = len(self.base.weight)
        old = self.base(ids.clamp(max=first - 1))
        new = embedding((ids - first).clamp(min=0), self.extra).to(old.dtype)
        return torch.where((ids < first)[..., None], old, new)


def add_tokens(
    model: PreTrainedModel, count: int, *, like: int | None = None, seed: int = 0
) -> int:
    """Give the model `count` new input tokens, in place; return the id of the first.

    Rows are drawn from a normal distribution with the mean and deviation of the old ones in each
    dimension (Quark), or are copies of the row `like` (ALT's separator starts as the end token).
    Raises ValueError where the model has new tokens already.
    """
    base = model.get_input_embeddings()
    if isinstance(base, ExtendedEmbedding):
        raise ValueError("this model has new tokens already; load it again, or add all at once.")
    old = base.weight.detach().float()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, old.shape[1], generator=generator).to(old.device)
    rows = old.mean(0) + old.std(0) * noise if like is None else old[like].repeat(count, 1)
    model.set_input_embeddings(ExtendedEmbedding(base, rows))
    return len(old)


@dataclass(frozen=True)
class WithTokens:
    """A trained policy for `models.save`: its new tokens, if it has any, stand in a file of their own.

    So `models.load_policy` and plain transformers read the folder; `load_tokens` puts the tokens back.
    """

    policy: PreTrainedModel
    tags: Sequence[str] = ()  # what each token stands for

    def write(self, folder: Path, place: Path) -> dict:
        """Write weights and tokens into `folder`, which will stand at `place`; return what its card says."""
        embeddings = self.policy.get_input_embeddings()
        if not isinstance(embeddings, ExtendedEmbedding):
            return models.write_policy(self.policy, folder, place)
        self.policy.set_input_embeddings(embeddings.base)
        try:
            facts = models.write_policy(self.policy, folder, place)
        finally:
            self.policy.set_input_embeddings(embeddings)
        save_file({"rows": embeddings.extra.detach().contiguous()}, folder / TOKENS)
        return facts | {"condition_tokens": list(self.tags)}


def load_tokens(policy: PreTrainedModel, folder: Path | str) -> int:
    """Give a policy the new tokens that were kept in `folder`, in place; return the id of the first.

    Raises FileNotFoundError where none were kept.
    """
    rows = load_file(Path(folder) / TOKENS)["rows"]
    first = add_tokens(policy, len(rows))
    embeddings = policy.get_input_embeddings()
    embeddings.extra.data.copy_(rows)
    return first


@dataclass(frozen=True)
class Built:
    """A conditioned prompt: token ids, of which ids[start:stop] are the condition."""

    prompt: str
    condition: labels.Condition
    ids: list[int]
    start: int
    stop: int


class Conditioner:
    """Puts a condition before a raw prompt, and takes it off by what is stored.

    style "text": `template` with the tags joined by `join`, as plain words; "separator": the same and
    one new token; "token": one new token for each tag, from `tokens` (factored=False: for all tags of a
    condition, joined); "none": conditions are ignored.
    `first_id` comes from `add_tokens`.  Condition and prompt are tokenised apart; a start token stays
    in front.  Raises ValueError for unknown styles and tags, and new tokens without ids.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, style: str = "text", *,
        template: str = "Feedback: {} Input: ", join: str = ", and ",
        tokens: Sequence[str] = (), first_id: int | None = None, factored: bool = True,
    ):  # fmt: skip
        if style not in STYLES:
            raise ValueError(f"style is {style!r}; allowed: {', '.join(STYLES)}.")
        if style in ("separator", "token") and first_id is None:
            raise ValueError(f"style {style!r} needs first_id, which `add_tokens` returns.")
        self.tokenizer, self.style, self.template, self.join = tokenizer, style, template, join
        self.tokens, self.first_id, self.factored = tuple(tokens), first_id, factored

    @property
    def settings(self) -> tuple:
        """What tells two conditioners apart."""
        return self.style, self.template, self.join, self.tokens, self.first_id, self.factored

    def build(self, prompt: str, condition: labels.Condition = ()) -> Built:
        """The prompt with the condition before it; () adds nothing."""
        raw = encoding.encode(self.tokenizer, prompt).prompt
        first = encoding.start_ids(self.tokenizer)
        start = len(first) if raw[: len(first)] == first else 0
        added = self._ids(condition) if condition and self.style != "none" else []
        ids = raw[:start] + added + raw[start:]
        return Built(prompt, tuple(condition), ids, start, start + len(added))

    @staticmethod
    def strip(built: Built) -> str:
        """The raw prompt, whatever words it and the condition are made of."""
        return built.prompt

    def raw_ids(self, built: Built) -> list[int]:
        """Token ids without the condition's span."""
        return built.ids[: built.start] + built.ids[built.stop :]

    def _ids(self, condition: labels.Condition) -> list[int]:
        if self.style == "token":
            condition = condition if self.factored else (self.join.join(condition),)
            if unknown := [tag for tag in condition if tag not in self.tokens]:
                raise ValueError(f"no token for {unknown}; allowed: {', '.join(self.tokens)}.")
            return [self.first_id + self.tokens.index(tag) for tag in condition]
        text = self.template.format(self.join.join(condition))
        ids = encoding.bare_ids(self.tokenizer, text)
        return ids + [self.first_id] * (self.style == "separator")
