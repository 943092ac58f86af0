"""log p(response | prompt) in every form: of tokens, answers and texts; perplexity; KL between two models.

All of it goes through one pass (`response_states`), and so do reward models: prompts that begin alike have
that beginning encoded once (and a beginning within it, too), the output layer reads no more than what
predicts a response, and rows come in batches of like length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from lib import encoding, generation, models, runtime
from lib.text import is_empty

LEAST_START = 32  # tokens from which on a shared start is worth a pass of its own
LOGITS_AT_ONCE = 128  # response tokens whose logits stand in memory together
# settings of models that change logits after their output layer
AFTER_OUTPUT_LAYER = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "output_multiplier",
    "lm_head_multiplier",
)


# --- the pass ------------------------------------------------------------------------------------


def response_states(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    tokens_per_batch: int,
) -> Iterator[tuple[list[int], list[torch.Tensor]]]:
    """Row numbers of a batch and the last states at each row's response tokens, (tokens, width) a row.

    Prompts and responses are token ids; no response is empty.  The states are those that the output layer
    reads, logits for a model that `changes_logits`, and the last hidden states of a network without output
    layer.  An encoder-decoder has the prompt in its encoder, the response in its decoder.
    """
    starts, order = nested_starts(prompts)
    if model.config.is_encoder_decoder:
        starts = [()] * len(prompts)
    read = _read_decoder if model.config.is_encoder_decoder else _read_after_starts
    alone = [i for i in range(len(prompts)) if not starts[i]]
    sharing = [i for i in range(len(prompts)) if starts[i]]
    for rows in (sharing, alone):
        lengths = [len(prompts[i]) + len(responses[i]) for i in rows]
        together = [order[i] for i in rows]
        for batch in encoding.token_batches(lengths, tokens_per_batch, together=together):
            places = [rows[j] for j in batch]
            yield places, read(model, [(prompts[i], responses[i], starts[i]) for i in places])


def nested_starts(
    prompts: Sequence[list[int]],
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The starts that each prompt shares with others, one within the other, and a key that sorts sharers.

    Starts are numbers of first tokens: (220, 360) for a question that shares 220 tokens, a text, with all
    questions about it, and 140 more, two answers, with those about the same answers.  A start is shared where
    it is at least half of the prompt, or so long that a pass of its own pays (`LEAST_START`).
    """
    starts: list[tuple[int, ...]] = [()] * len(prompts)
    order: list[tuple[int, ...]] = [()] * len(prompts)
    for number, (start, rows) in enumerate(shared_starts(prompts)):
        if not start:
            continue
        for i, inner, key in zip(
            rows, *nested_starts([prompts[i][start:] for i in rows]), strict=True
        ):
            longer = [start + more for more in inner if inner[0] >= LEAST_START]
            starts[i], order[i] = (start, *longer), (-start, number, *key)
    return starts, order


def shared_starts(prompts: Sequence[list[int]]) -> list[tuple[int, list[int]]]:
    """Runs of prompts that begin alike: how many first tokens a run shares, and its prompts' numbers.

    Samples of one prompt, questions about one text.  A prompt that is alone in its run shares nothing.
    """
    runs: list[list[int]] = []
    alike = sorted(range(len(prompts)), key=prompts.__getitem__)  # what begins alike is adjacent
    for i in alike:
        if runs:
            first, prompt = prompts[runs[-1][0]], prompts[i]
            common = encoding.count_shared([first, prompt])
            if common >= LEAST_START or 0 < max(len(first), len(prompt)) <= 2 * common:
                runs[-1].append(i)
                continue
        runs.append([i])
    counts = [encoding.count_shared([prompts[i] for i in run]) for run in runs]
    return [(n if len(run) > 1 else 0, run) for n, run in zip(counts, runs, strict=True)]


Rows = Sequence[tuple[list[int], list[int], tuple[int, ...]]]  # prompt, response, shared starts


def _read_after_starts(model, rows: Rows) -> list[torch.Tensor]:
    """States of a decoder's (prompt, response, shared starts) rows; each start goes through it once.

    All rows have a start to share, or none has.
    """
    cache = seen = None
    *levels, (rest, parents) = _levels(rows)
    for parts, above in levels:
        ids, mask = (x.to(model.device) for x in encoding.pad_rows(parts, 0, "left"))
        cache, seen = _grown(cache, seen, above, mask)
        inputs = encoding.decoder_inputs(model, ids, seen, cache, use_cache=True)
        _, cache = last_states(model, inputs, 1)
    ids, mask = (x.to(model.device) for x in encoding.pad_rows(rest, 0, "right"))
    cache, mask = _grown(cache, seen, parents, mask)
    skips = [len(part) - len(row[1]) for part, row in zip(rest, rows, strict=True)]
    keep = ids.shape[1] - min(skips)
    states, _ = last_states(model, encoding.decoder_inputs(model, ids, mask, cache), keep)
    first = ids.shape[1] - states.shape[1]  # position of the first state that was handed out
    return [
        row[skip - first : skip - first + len(response)]
        for row, skip, (_, response, _) in zip(states, skips, rows, strict=True)
    ]


def _levels(rows: Rows) -> list[tuple[list[list[int]], list[int]]]:
    """The passes that read some rows: their parts, and the number of the part that each follows.

    The last pass has a part for each row.  The parts of a pass are padded to the longest, so not every
    shared start is worth a pass: all, the first and the last, or the first, whichever reads fewest tokens.
    """
    starts = [own for *_, own in rows]
    plans = [starts, [own[:1] + own[1:][-1:] for own in starts], [own[:1] for own in starts]]
    passes = [_passes(rows, plan) for plan in plans]
    return min(passes, key=lambda plan: sum(len(x) * max(map(len, x)) for x, _ in plan))


def _passes(rows: Rows, starts: Sequence[tuple[int, ...]]) -> list:
    """`_levels` by these shared starts."""
    passes, begun, number = [], [()] * len(rows), {(): 0}  # what of each prompt is read; its place
    for level in range(max(map(len, starts))):
        ends = [own[min(level, len(own) - 1)] for own in starts]
        longer = [tuple(prompt[:end]) for (prompt, *_), end in zip(rows, ends, strict=True)]
        before = dict(zip(longer, begun, strict=True))
        parts = [list(start[len(old) :]) for start, old in before.items()]
        passes.append((parts, [number[old] for old in before.values()]))
        begun, number = longer, {start: i for i, start in enumerate(before)}
    rest = [prompt[len(old) :] + said for (prompt, said, _), old in zip(rows, begun, strict=True)]
    return [*passes, (rest, [number[old] for old in begun])]


def _grown(cache, seen, places: list[int], mask: torch.Tensor) -> tuple:
    """The cache's rows at these places, and the mask of what they hold and of what comes next."""
    if cache is None:
        return None, mask
    rows = torch.tensor(places, device=mask.device)
    cache.batch_select_indices(rows)
    return cache, torch.cat([seen[rows], mask], 1)


def _read_decoder(model, rows: Sequence[tuple[list, list, int]]) -> list[torch.Tensor]:
    """States of an encoder-decoder's (prompt, response) rows; each prompt is encoded once."""
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(tuple(p) for p, *_ in rows))}
    ids, mask = (x.to(model.device) for x in encoding.pad_rows([*number], 0, "right"))
    encoded = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    places = torch.tensor([number[tuple(p)] for p, *_ in rows], device=model.device)
    shown, _ = encoding.pad_rows([response for _, response, _ in rows], 0, "right")
    inputs = {
        "encoder_outputs": BaseModelOutput(encoded[places]),
        "attention_mask": mask[places],
        "decoder_input_ids": shown.to(model.device),
        "use_cache": False,
    }
    states, _ = last_states(model, inputs, shown.shape[1])
    return [row[: len(response)] for row, (_, response, _) in zip(states, rows, strict=True)]


def last_states(model: PreTrainedModel, inputs: dict, keep: int) -> tuple[torch.Tensor, object]:
    """Last states of a forward pass, (rows, time, width), and its cache; see `response_states`.

    No logits are computed, except where the model changes them after its output layer: then the logits of
    the last `keep` positions are handed out, and no others are computed.
    """
    head = model.get_output_embeddings()
    if head is None:
        output = model(**inputs)
        return output.last_hidden_state, encoding.cache_of(output)
    if changes_logits(model):
        output = model(**inputs, logits_to_keep=keep)
        return output.logits, encoding.cache_of(output)
    seen = []
    hook = head.register_forward_pre_hook(
        lambda _, args: seen.append(args[0]) or (args[0][:, :0],)  # the layer gets no position
    )
    try:
        output = model(**inputs)
    finally:
        hook.remove()
    return seen[0], encoding.cache_of(output)


def changes_logits(model: PreTrainedModel) -> bool:
    """Whether this model changes logits after its output layer."""
    return any(getattr(model.config, name, None) is not None for name in AFTER_OUTPUT_LAYER)


def _logits(model, states: torch.Tensor) -> torch.Tensor:
    """(tokens, vocabulary) in float32 from last states (tokens, width)."""
    if changes_logits(model):
        return states.float()
    return model.get_output_embeddings()(states).float()


# --- tokens and perplexity -----------------------------------------------------------------------


@torch.inference_mode()
def token_log_probs(
    model: PreTrainedModel,
    prompt_ids: Sequence[list[int]],
    response_ids: Sequence[list[int]],
    tokens_per_batch: int = 2048,
) -> list[np.ndarray]:
    """log p(token | prompt and earlier tokens) of each response token, float32, (tokens,) per row.

    Softmax in float32 (load the model in float32 where single values matter: bfloat16 weights move
    them by 0.04 on average).  Decoder-only and encoder-decoder models; an empty response gives an
    empty array.  Raises ValueError where a prompt has no token (nothing to condition on).
    """
    results = [np.empty(0, np.float32) for _ in response_ids]
    rows = [i for i, response in enumerate(response_ids) if len(response)]
    prompts, shown = _before_each_token(
        model, [list(prompt_ids[i]) for i in rows], [list(response_ids[i]) for i in rows], rows
    )
    bar = runtime.progress(total=len(rows), label="log-probabilities", unit="text")
    with models.fast_float32(model):
        for batch, states in response_states(model, prompts, shown, tokens_per_batch):
            places = [rows[j] for j in batch]
            log_probs = _chosen_log_probs(model, states, [response_ids[i] for i in places])
            for place, row in zip(places, log_probs, strict=True):
                results[place] = row.cpu().numpy()
            bar.update(len(batch))
    bar.close()
    return results


def _before_each_token(model, prompts, responses, rows) -> tuple[list, list]:
    """(prompts, shown) so that the state at each token of `shown` predicts a token of the response."""
    for row, prompt in zip(rows, prompts, strict=True):
        if not prompt:
            raise ValueError(f"row {row} has an empty prompt; give it a start token at least.")
    if model.config.is_encoder_decoder:
        start = model.config.decoder_start_token_id
        return prompts, [[start, *response[:-1]] for response in responses]
    shown = [
        prompt[-1:] + response[:-1] for prompt, response in zip(prompts, responses, strict=True)
    ]
    return [prompt[:-1] for prompt in prompts], shown


def _chosen_log_probs(model, states: list[torch.Tensor], tokens) -> Sequence[torch.Tensor]:
    """log p of each row's tokens, (tokens,), from its states, (tokens, width); a few logits at a time."""
    chosen = torch.tensor([token for row in tokens for token in row], device=states[0].device)
    parts = []
    for few, ids in zip(
        torch.cat(states).split(LOGITS_AT_ONCE), chosen.split(LOGITS_AT_ONCE), strict=True
    ):
        logits = _logits(model, few)
        parts.append(logits.gather(-1, ids[:, None])[:, 0] - logits.logsumexp(-1))
    return torch.cat(parts).split([len(row) for row in tokens])


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contexts: Sequence[str] | Sequence[list[int]],
    continuations: Sequence[str] | Sequence[list[int]],
) -> pd.DataFrame:
    """Columns nll (mean over tokens, nats), tokens, perplexity = exp(nll) of each continuation.

    Texts, or token ids (scored as they are: sampled ids are not tokenised again).  An empty
    continuation has 0 tokens and NaN.  Raises ValueError for an empty context without a start token.
    """
    pairs = [
        encoding.encode(tokenizer, a, b, joined=True) if isinstance(b, str) else (a, b)
        for a, b in zip(contexts, continuations, strict=True)
    ]
    scores = token_log_probs(model, [p for p, _ in pairs], [r for _, r in pairs])
    nll = np.array([-row.mean(dtype=np.float64) if len(row) else np.nan for row in scores])
    tokens = np.array([len(row) for row in scores], dtype=int)
    return pd.DataFrame({"nll": nll, "tokens": tokens, "perplexity": np.exp(nll)})


# --- answers to a question, and texts ----------------------------------------------------------


@torch.inference_mode()
def answer_log_probs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[str],
    tokens_per_batch: int = 8192,
) -> np.ndarray:
    """log p(answer | prompt) of each answer, (prompts, answers), for any split into tokens.

    Prompt and answer are encoded together; what all answers of a prompt share is its context, and the
    rest of each is scored token by token, the first in float32 whatever the model's precision.  Raises
    ValueError where one answer's tokens are the start of another's.
    """
    contexts, tails = [], []
    for prompt in prompts:
        context, rest = split_answers(tokenizer, prompt, answers)
        contexts.append(context)
        tails.append(rest)
    total = np.zeros((len(prompts), len(answers)))
    if model.config.is_encoder_decoder:
        for k in range(len(answers)):
            rows = token_log_probs(model, contexts, [rest[k] for rest in tails])
            total[:, k] = [row.sum(dtype=np.float64) for row in rows]
        return total
    before, last = _before_each_token(
        model, contexts, [rest[0][:1] for rest in tails], range(len(prompts))
    )
    for batch, states in response_states(model, before, last, tokens_per_batch):
        first = torch.tensor([[tail[0] for tail in tails[i]] for i in batch], device=model.device)
        total[batch] = _exact_log_probs(model, torch.cat(states), first).cpu().numpy()
    for k in range(len(answers)):  # answers of several tokens
        longer = [i for i in range(len(prompts)) if len(tails[i][k]) > 1]
        before = [contexts[i] + tails[i][k][:1] for i in longer]
        rows = token_log_probs(model, before, [tails[i][k][1:] for i in longer])
        total[longer, k] += [row.sum(dtype=np.float64) for row in rows]
    return total


def split_answers(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answers: Sequence[str]
) -> tuple[list[int], list[list[int]]]:
    """The tokens that prompt + answer share for all answers, and the rest of each answer's."""
    wholes = []
    for answer in answers:
        before, after = encoding.encode(tokenizer, prompt, answer, joined=True)
        wholes.append(before + after)
    shared = encoding.count_shared(wholes)
    rest = [whole[shared:] for whole in wholes]
    if not all(rest):
        raise ValueError(
            f"answers {', '.join(map(repr, answers))}: this tokenizer makes one the start of another "
            "(unknown words?). Choose answers that it can tell apart."
        )
    return wholes[0][:shared], rest


def _exact_log_probs(model, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """log p of several candidates (rows, answers) from one state a row (rows, width).

    The output layer of a bfloat16 model rounds a logit to steps of 1/16 to 1/8: answers would tie.  So
    their logits are computed in float32; the normaliser, which the answers of a row share, keeps the
    layer's precision.
    """
    logits = _logits(model, states)
    head = model.get_output_embeddings()
    if changes_logits(model):
        chosen = logits.gather(-1, tokens)
    else:
        chosen = (head.weight[tokens].float() * states.float()[:, None]).sum(-1)
        if getattr(head, "bias", None) is not None:
            chosen = chosen + head.bias[tokens].float()
    return chosen - logits.logsumexp(-1, keepdim=True)


# --- distance between two models ----------------------------------------------------------------


def sequence_kl(
    model: PreTrainedModel,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    n: int,
    max_new_tokens: int = 64,
    seed: int = 0,
) -> pd.DataFrame:
    """Per sampled text the log-ratio whose mean is KL(base || model) or KL(model || base), in nats.

    Texts are sampled without a prompt (the start token alone), at T = 1 and unfiltered; both models score
    the same tokens.  Columns direction ("forward": texts of the base; "reverse": of the model), value,
    tokens.  Empty texts are left out, as in the paper.
    """
    start = encoding.start_ids(tokenizer) or encoding.end_tokens(tokenizer, base)[:1]
    rows = []
    for direction, own, other in (("forward", base, model), ("reverse", model, base)):
        drawn = generation.sample(
            own, tokenizer, [start], n=n, seed=seed, max_new_tokens=max_new_tokens, label="KL"
        )
        filled = [i for i, text in enumerate(drawn.texts) if not is_empty(text)]
        texts = [drawn.prompt_ids[i] for i in filled], [drawn.response_ids[i] for i in filled]
        for mine, its in zip(*(token_log_probs(m, *texts) for m in (own, other)), strict=True):
            value = mine.sum(dtype=np.float64) - its.sum(dtype=np.float64)
            rows.append({"direction": direction, "value": value, "tokens": len(mine)})
    return pd.DataFrame(rows, columns=["direction", "value", "tokens"])
