"""log p(response | prompt) in every form: of tokens, answers and texts; perplexity; KL between two models."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib import generation, models, runtime
from lib.text import is_empty

LOGITS_AT_ONCE = 128  # response tokens whose logits stand in memory together
# settings of models that change logits after their output layer
AFTER_OUTPUT_LAYER = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "output_multiplier",
)
AFTER_OUTPUT_LAYER += ("lm_head_multiplier",)


# --- log-probability and perplexity --------------------------------------------------------------


@torch.inference_mode()
def token_log_probs(
    model: transformers.PreTrainedModel, prompt_ids: Sequence[list[int]],
    response_ids: Sequence[list[int]], tokens_per_batch: int = 2048,
) -> list[np.ndarray]:  # fmt: skip
    """log p(token | prompt and earlier tokens) of each response token, float32, (tokens,) per row.

    Softmax in float32 (load the model in float32 where single values matter: bfloat16 weights move
    them by 0.04 on average).  Decoder-only and encoder-decoder models; an empty response gives an
    empty array.  Raises ValueError where a prompt has no token (nothing to condition on).
    """
    found = [np.empty(0, np.float32) for _ in response_ids]
    rows = [i for i, response in enumerate(response_ids) if len(response)]
    for i in rows:
        if not len(prompt_ids[i]):
            raise ValueError(f"row {i} has an empty prompt; give it a start token at least.")
    bar = runtime.progress(total=len(rows), label="log-probabilities", unit="text")
    lengths = [len(prompt_ids[i]) + len(response_ids[i]) for i in rows]
    with models.fast_float32(model):
        for batch in generation.token_batches(lengths, tokens_per_batch):
            places = [rows[j] for j in batch]
            responses = [list(response_ids[i]) for i in places]
            rows_found = _log_probs(model, [list(prompt_ids[i]) for i in places], responses)
            for place, row in zip(places, rows_found, strict=True):
                found[place] = row.cpu().numpy()
            bar.update(len(batch))
    bar.close()
    return found


def output_layer_input(model: PreTrainedModel, forward: Callable[[], object]) -> torch.Tensor:
    """What the model's output layer reads in `forward()`, (rows, time, width); no logits are computed."""
    seen = []
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: seen.append(args[0]) or (args[0][:, :0],)
    )
    try:
        forward()
    finally:
        hook.remove()
    return seen[0]


def changes_logits(model: transformers.PreTrainedModel) -> bool:
    """Whether this model changes logits after its output layer."""
    return any(getattr(model.config, name, None) is not None for name in AFTER_OUTPUT_LAYER)


def _log_probs(model, prompts, responses) -> Sequence[torch.Tensor]:
    """Per row (response tokens,).  The output layer runs over the response tokens alone, a few at a time,
    unless logits are changed after it (or with LIB_PLAIN=1).
    """
    head = model.get_output_embeddings()
    if runtime.plain_mode() or changes_logits(model) or head is None:
        logits = _forward(model, prompts, responses).logits
        rows = zip(_response_part(model, logits, responses), responses, strict=True)
        return [_chosen_log_probs(row, torch.tensor(ids, device=row.device)) for row, ids in rows]
    read = output_layer_input(model, lambda: _forward(model, prompts, responses))
    states = torch.cat(_response_part(model, read, responses)).split(LOGITS_AT_ONCE)
    tokens = torch.tensor([t for row in responses for t in row], device=read.device)
    parts = zip(states, tokens.split(LOGITS_AT_ONCE), strict=True)
    found = torch.cat([_chosen_log_probs(head(part), ids) for part, ids in parts])
    return found.split([len(row) for row in responses])


def _chosen_log_probs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    logits = logits.float()
    return logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)


def _response_part(model, values: torch.Tensor, responses) -> list[torch.Tensor]:
    """Per row what predicts its response tokens: `values` (rows, time, ...) as `_forward` pads them."""
    rows = zip(values, responses, strict=True)
    if model.config.is_encoder_decoder:
        return [row[: len(ids)] for row, ids in rows]
    return [row[-len(ids) - 1 : -1] for row, ids in rows]


def _forward(model, prompts, responses):
    device = model.device
    if model.config.is_encoder_decoder:
        start = model.config.decoder_start_token_id
        ids, mask = (x.to(device) for x in generation.pad_rows(prompts, 0, "right"))
        shifted, _ = generation.pad_rows([[start, *row[:-1]] for row in responses], start, "right")
        return model(input_ids=ids, attention_mask=mask, decoder_input_ids=shifted.to(device))
    pairs = [prompt + row for prompt, row in zip(prompts, responses, strict=True)]
    ids, mask = (x.to(device) for x in generation.pad_rows(pairs, 0, "left"))
    extra = {}
    if "position_ids" in inspect.signature(model.forward).parameters:
        extra["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    keep = max(map(len, responses)) + 1  # left padding: all responses end at the last position
    return model(input_ids=ids, attention_mask=mask, logits_to_keep=keep, use_cache=False, **extra)


def encode_pair(tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of context + continuation, split where the context's own tokens end.

    A token that joins the end of the one with the start of the other counts as continuation.  A
    start token comes first where the tokenizer sets one, or where nothing else precedes.
    """
    whole, alone = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (context + continuation, context)
    )
    shared = 0
    while shared < min(len(whole), len(alone)) and whole[shared] == alone[shared]:
        shared += 1
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    sets_one = bool(start) and tokenizer("a")["input_ids"][:1] == start
    lead = start if sets_one or not shared else []
    return lead + whole[:shared], whole[shared:]


def perplexity(
    model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase,
    contexts: Sequence[str] | Sequence[list[int]], continuations: Sequence[str] | Sequence[list[int]],
) -> pd.DataFrame:  # fmt: skip
    """Columns nll (mean over tokens, nats), tokens, perplexity = exp(nll) of each continuation.

    Texts, or token ids (scored as they are: sampled ids are not tokenised again).  An empty
    continuation has 0 tokens and NaN.  Raises ValueError for an empty context without a start token.
    """
    pairs = [
        encode_pair(tokenizer, a, b) if isinstance(b, str) else (a, b)
        for a, b in zip(contexts, continuations, strict=True)
    ]
    scores = token_log_probs(model, [p for p, _ in pairs], [r for _, r in pairs])
    nll = np.array([-row.mean(dtype=np.float64) if len(row) else np.nan for row in scores])
    tokens = np.array([len(row) for row in scores], dtype=int)
    return pd.DataFrame({"nll": nll, "tokens": tokens, "perplexity": np.exp(nll)})


def corpus_perplexity(table: pd.DataFrame) -> dict[str, float]:
    """exp(total NLL / total tokens) of `perplexity`'s table, with its tokens and empty rows."""
    tokens, empty = int(table["tokens"].sum()), int((table["tokens"] == 0).sum())
    value = np.exp((table["nll"] * table["tokens"]).sum() / tokens) if tokens else np.nan
    return {"perplexity": float(value), "tokens": tokens, "empty": empty}


# --- answers to a question, and texts ----------------------------------------------------------


def answer_log_probs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str],
    answers: Sequence[str],
) -> np.ndarray:  # fmt: skip
    """log p(answer | prompt) of each answer, (prompts, answers), for any split into tokens.

    Prompt and answer are encoded together; what all answers of a prompt share is its context, and the
    rest of each is scored token by token, the first in float32 whatever the model's precision.
    Consecutive prompts that begin alike share that beginning's computation.  Raises ValueError where one
    answer's tokens are the start of another's.
    """
    contexts, tails = [], []
    for prompt in prompts:
        context, rest = split_answers(tokenizer, prompt, answers)
        contexts.append(context)
        tails.append(rest)
    found = np.zeros((len(prompts), len(answers)))
    if model.config.is_encoder_decoder:
        for k in range(len(answers)):
            rows = token_log_probs(model, contexts, [t[k] for t in tails])
            found[:, k] = [row.sum(dtype=np.float64) for row in rows]
        return found
    firsts = [[rest[0] for rest in t] for t in tails]
    for places in _alike(contexts):
        found[places] = _first_log_probs(
            model, [contexts[i] for i in places], [firsts[i] for i in places]
        )
    for k in range(len(answers)):  # answers of several tokens
        longer = [i for i in range(len(prompts)) if len(tails[i][k]) > 1]
        before = [contexts[i] + tails[i][k][:1] for i in longer]
        rows = token_log_probs(model, before, [tails[i][k][1:] for i in longer])
        found[longer, k] += [row.sum(dtype=np.float64) for row in rows]
    return found


def split_answers(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answers: Sequence[str]
) -> tuple[list[int], list[list[int]]]:
    """The tokens that prompt + answer share for all answers, and the rest of each answer's."""
    wholes = [sum(encode_pair(tokenizer, prompt, answer), []) for answer in answers]
    shared = _shared(wholes)
    rest = [whole[shared:] for whole in wholes]
    if not all(rest):
        raise ValueError(
            f"answers {', '.join(map(repr, answers))}: this tokenizer makes one the start of another "
            "(unknown words?). Choose answers that it can tell apart."
        )
    return wholes[0][:shared], rest


def _shared(rows: Sequence[list[int]]) -> int:
    """How many tokens all rows have in common at the start."""
    columns = zip(*rows, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def _alike(contexts: Sequence[list[int]], most: int = 32) -> list[list[int]]:
    """Runs of consecutive rows that have at least half of their tokens in common at the start."""
    runs: list[list[int]] = []
    for i, context in enumerate(contexts):
        if runs and len(runs[-1]) < most:
            first = contexts[runs[-1][0]]
            if _shared([first, context]) >= max(len(first), len(context)) / 2:
                runs[-1].append(i)
                continue
        runs.append([i])
    return runs


@torch.inference_mode()
def _first_log_probs(model, contexts: list[list[int]], tokens: list[list[int]]) -> np.ndarray:
    """log p of the given next tokens of contexts that begin alike, (rows, tokens)."""
    device, shared = model.device, min(_shared(contexts), min(map(len, contexts)) - 1)
    rows = [context[shared:] for context in contexts]
    ids, mask = (x.to(device) for x in generation.pad_rows(rows, 0, "right"))
    cache, seen = None, mask
    if shared:
        start = torch.tensor([contexts[0][:shared]], device=device)
        cache = model(input_ids=start, use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(rows))
        seen = torch.cat([mask.new_ones(len(rows), shared), mask], 1)
    inputs = {"input_ids": ids, "attention_mask": seen, "past_key_values": cache}
    last = torch.arange(len(rows), device=device), mask.sum(1) - 1
    wanted = torch.tensor(tokens, device=device)
    return _answers(model, inputs, last, wanted).cpu().numpy().astype(np.float64)


def _answers(model, inputs: dict, last: tuple, tokens: torch.Tensor) -> torch.Tensor:
    """log p of the tokens (rows, answers) at the positions `last`, the answers' logits in float32.

    The output layer of a bfloat16 model rounds a logit to steps of 1/16 to 1/8: answers would tie.  The
    normaliser, which the answers of a row share, keeps the layer's precision.
    """
    inputs = inputs | {"use_cache": inputs["past_key_values"] is not None}
    head = model.get_output_embeddings()
    if head is None or changes_logits(model):
        return model(**inputs).logits[last].float().log_softmax(-1).gather(-1, tokens)
    state = output_layer_input(model, lambda: model(**inputs))[last]
    bias = getattr(head, "bias", None)
    logits = (head.weight[tokens].float() * state.float()[:, None]).sum(-1)
    logits = logits if bias is None else logits + bias[tokens].float()
    return logits - head(state).float().logsumexp(-1, keepdim=True)


def text_log_probs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str],
    texts: Sequence[str],
) -> np.ndarray:  # fmt: skip
    """log p(" " + text | prompt), summed over tokens, (rows,)."""
    pairs = [encode_pair(tokenizer, p, f" {t}") for p, t in zip(prompts, texts, strict=True)]
    found = token_log_probs(model, [a for a, _ in pairs], [b for _, b in pairs])
    return np.array([row.sum(dtype=np.float64) for row in found])


# --- distance between two models ----------------------------------------------------------------


def sequence_kl(
    model: PreTrainedModel, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *,
    n: int, max_new_tokens: int = 64, seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """Per sampled text the log-ratio whose mean is KL(base || model) or KL(model || base), in nats.

    Texts are sampled without a prompt (the start token alone), at T = 1 and unfiltered; both models score
    the same tokens.  Columns direction ("forward": texts of the base; "reverse": of the model), value,
    tokens.  Empty texts are left out, as in the paper.
    """
    start = tokenizer.bos_token_id
    start = tokenizer.eos_token_id if start is None else start
    rows = []
    for direction, own, other in (("forward", base, model), ("reverse", model, base)):
        drawn = generation.sample(
            own, tokenizer, [[start]], n=n, seed=seed, max_new_tokens=max_new_tokens, label="KL"
        )
        kept = [i for i, text in enumerate(drawn.texts) if not is_empty(text)]
        texts = [drawn.prompt_ids[i] for i in kept], [drawn.response_ids[i] for i in kept]
        for mine, its in zip(*(token_log_probs(m, *texts) for m in (own, other)), strict=True):
            value = mine.sum(dtype=np.float64) - its.sum(dtype=np.float64)
            rows.append({"direction": direction, "value": value, "tokens": len(mine)})
    return pd.DataFrame(rows, columns=["direction", "value", "tokens"])
