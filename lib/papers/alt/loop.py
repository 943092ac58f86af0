"""Learning from labels that are conditions: Quark and ALT as settings of one loop.

sample -> feedback -> pool -> train -> evaluate.  Every response gets a label, a quantile of its reward
(Quark, Lu et al. 2022) or words (ALT, "Towards Aligning Language Models with Textual Feedback", 2024);
the model learns to write the response given label and prompt, and is asked for the best label later.

A condition is always built from the *stored* raw prompt, so taking it off needs no splitting of text.
New tokens are rows of the input embedding only: they cannot be sampled, no prompt can spell them, and
the vocabulary of the policy stays that of the reference, which sees the raw prompt.

`train_conditional` is the loop; its stages are the plain functions below it, which notebook 50 calls one by
one.  Random numbers depend on (seed, stage, iteration) and on contents, so a killed run needs no generator
state and the order in which samples arrive does not matter.  Several processes (`processes`) share the
prompts that are sampled and the rows of each batch; the main one asks for feedback and judges.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib import generation, logprobs, losses, models, processes, training
from lib.papers.alt import conditions, critics, labels
from lib.policy import SharedTrunkPolicy, TokenBatch
from lib.rewards import Judge

STAGES = ("sample", "feedback", "pool", "train", "evaluate")
MAY_BE_ZERO = {"beta", "alpha", "top_k", "warmup_steps", "per_label", "prompts_per_iteration"}
MAY_BE_ZERO |= {"checkpoint_every", "check_every", "seed", "token_learning_rate"}
ALLOWED = {"direction": ("forward", "reverse"), "normalise": ("token", "sequence")}
ALLOWED["balance"] = ("pool", "prompt")


# --- the loss ------------------------------------------------------------------------------------


def conditional_loss(
    logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor,
    ref_logits: torch.Tensor | None = None, *, beta: float = 0.05, alpha: float = 0.06,
    direction: str = "forward", weights: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """loss = NLL + beta KL - alpha H over response tokens; also nll, kl and entropy, each a scalar.

    logits (batch, time, vocabulary) given feedback and prompt, ids and mask (batch, time); ref_logits
    (batch, time, V) given the prompt alone.  KL is over the first V tokens, so tokens the policy has
    in addition are left out of it and stay in NLL and H; direction as in `losses.kl_divergence`
    ("forward" = KL(reference || policy), the Quark paper's).  `weights`: see `token_weights`.
    """
    weights = token_weights(mask) if weights is None else weights

    def total(values):
        return (values.masked_fill(mask == 0, 0.0) * weights).sum()

    flat = cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none")
    parts = {"nll": total(flat.view_as(mask)), "entropy": total(losses.entropy(logits))}
    parts["kl"] = torch.full_like(parts["nll"], torch.nan)
    loss = parts["nll"] - alpha * parts["entropy"]
    if ref_logits is not None:
        shared = logits[..., : ref_logits.shape[-1]]
        parts["kl"] = total(losses.kl_divergence(shared, ref_logits, direction))
        loss = loss + beta * parts["kl"]
    return {"loss": loss, **parts}


def token_weights(mask: torch.Tensor, normalise: str = "token") -> torch.Tensor:
    """Weights (batch, time) that sum to 1: "token" is equal for all tokens, so long responses weigh
    more (the papers' way); "sequence" gives each response the same total.
    """
    if normalise == "token":
        return mask / mask.sum()
    if normalise == "sequence":
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / (mask.sum(1) > 0).sum()
    raise ValueError(f"normalise is {normalise!r}; allowed: 'token', 'sequence'.")


# --- what an arm is ------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConditioningConfig:
    """Settings of `train_conditional`; notebook 50 has the papers' values beside."""

    iterations: int = 4
    prompts_per_iteration: int = 0  # 0: all of them
    samples_per_prompt: int = 1
    max_new_tokens: int = 20
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    train: str = "all"  # see models.set_trainable
    layers: int = 2
    lora_rank: int = 8
    steps: int = 100  # optimizer steps of an iteration
    batch_size: int = 32
    forward_rows: int = 32  # rows in memory at once; bounds the logits kept
    learning_rate: float = 1e-3
    token_learning_rate: float = 0.0  # of the new tokens' rows; 0: the same
    warmup_steps: int = 0
    decay: bool = False  # linearly to 0, over an iteration if the optimizer is fresh, else over all
    fresh_optimizer: bool = True  # each iteration (TL;DR, HH); False: one for all (toxicity)
    max_grad_norm: float = 1.0
    beta: float = 0.05
    alpha: float = 0.06
    direction: str = "forward"
    normalise: str = "token"
    per_label: int = 0  # training items of each label; 0: all
    balance: str = "pool"  # or "prompt": per_label for each prompt
    fill: bool = False
    only: tuple = ()  # labels that train; filtered behaviour cloning is only=(0,) with style "none"
    without: tuple = ()
    replay: tuple = ("keep",)
    exemplar: str = "best"  # asked for from iteration 2: the best tag, "pool", or a fixed sentence
    eval_samples: int = 1
    check_every: int = (
        0  # optimizer steps between looks at Task.validation; 0: the last weights stay
    )
    checkpoint_every: int = 0  # optimizer steps; 0: at the end of an iteration's training
    seed: int = 0

    def __post_init__(self):
        training.check_numbers(asdict(self), MAY_BE_ZERO)
        for name, allowed in ALLOWED.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}.")


@dataclass
class Task:
    """What an arm learns from, and how it is measured.

    Args:
        prompts: raw: conditions are put before them and never stored in them.
        feedback: (prompts, responses) -> a dict for each, with score, feedback, attributes (`critics`).
        labeller: items -> labels (`labels`).
        conditioner: puts a label's condition before a prompt (`conditions`).
        held_out: prompts that are sampled under every request after each iteration.
        judge: scores those samples.
        requests: name -> condition; None: no condition, and each label's tags.
        validation: prompts that choose the weights with which an iteration ends (`check`).
        first: samples of the first iteration, where they are there already; none: they are drawn.

    Raises ValueError where there is no prompt, or no judge for held-out or validation prompts.
    """

    prompts: Sequence[str]
    feedback: critics.Feedback
    labeller: object
    conditioner: conditions.Conditioner
    held_out: Sequence[str] = ()
    judge: Judge | None = None
    requests: Mapping[str, labels.Condition] | None = None
    validation: Sequence[str] = ()
    first: Sequence[labels.Item] = ()

    def __post_init__(self):
        if not len(self.prompts):
            raise ValueError("there are no prompts to train on.")
        if self.judge is None and (len(self.held_out) or len(self.validation)):
            raise ValueError("held-out and validation prompts need a judge to score their samples.")
        if self.requests is None:
            self.requests = _all_requests(self.labeller)


@dataclass
class Learner:
    """What learns: the policy and its reference on one network, and where in the run its weights stand."""

    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: ConditioningConfig
    shared: SharedTrunkPolicy
    network: torch.nn.Module  # `shared`, or DDP around it
    accelerator: Accelerator
    at_once: training.RowsAtOnce
    new_rows: list[torch.nn.Parameter]  # of the input embedding, for tokens that conditions add
    trunk: list[torch.nn.Module]
    optimizer: torch.optim.Optimizer | None = None
    iteration: int = 0
    step: int = 0  # steps done in the iteration
    log: list[dict] = field(default_factory=list)  # a row for each of them
    best: training.Best = field(default_factory=training.Best)  # of the iteration's checks
    checks: list[dict] = field(default_factory=list)  # of the whole run: iteration, step, value

    def weights(self) -> dict[str, torch.Tensor]:
        """What trains, by name."""
        return {n: p for n, p in self.policy.named_parameters() if p.requires_grad}

    def seed(self, *key) -> int:
        return training.seed_for(self.config.seed, *key)


class Result(NamedTuple):
    """What `train_conditional` returns."""

    history: pd.DataFrame  # a row an iteration; attrs["checks"]: a row for each `check`
    evaluation: (
        pd.DataFrame
    )  # a row for each held-out sample: iteration, and the columns of `measure`
    pool: labels.DataPool


def make_learner(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: ConditioningConfig,
    accelerator: Accelerator | None = None,
) -> Learner:
    """Choose what trains, new tokens' rows included; the reference is the policy as it is now.

    Raises ValueError where a batch has fewer rows than there are processes.
    """
    accelerator = accelerator or processes.begin(policy.device)
    if config.batch_size < accelerator.num_processes:
        raise ValueError(
            f"batch_size is {config.batch_size}; it must be at least the number of processes, "
            f"{accelerator.num_processes}."
        )
    frozen = models.set_trainable(
        policy, config.train, layers=config.layers, lora_rank=config.lora_rank
    )
    embeddings = policy.get_input_embeddings()
    extended = isinstance(embeddings, conditions.ExtendedEmbedding)
    new_rows = [embeddings.extra] if extended else []
    for rows in new_rows:
        rows.requires_grad_(True)
    shared = SharedTrunkPolicy(policy, frozen)
    shared.value_head.requires_grad_(False)  # nothing learns values here
    network = accelerator.prepare(shared)
    at_once = training.RowsAtOnce(config.forward_rows)
    parts = (shared, network, accelerator, at_once, new_rows, shared.trunk_layers)
    return Learner(policy, tokenizer, config, *parts)


def check_task(task: Task, config: ConditioningConfig) -> None:
    """Raise ValueError where a prompt has too few samples for its own quantiles, or a check no prompts."""
    if bool(config.check_every) != bool(len(task.validation)):
        raise ValueError(
            f"check_every is {config.check_every} and there are {len(task.validation)} validation prompts; "
            "give both, or neither."
        )
    local, samples = getattr(task.labeller, "within", ""), config.samples_per_prompt
    if local == "prompt" and samples < len(task.labeller.tags):
        raise ValueError(
            f"{samples} samples a prompt cannot fill {len(task.labeller.tags)} quantiles within a "
            "prompt. Raise samples_per_prompt, or use fewer tags or within='pool'."
        )


def _all_requests(labeller) -> dict[str, labels.Condition]:
    """No condition, and the tags of each label where it has tags."""
    conditions: dict[str, labels.Condition] = {"none": ()}
    if isinstance(labeller, labels.FreeText):
        return conditions
    for label in labeller.labels():
        condition = labeller.condition(None, label)
        conditions[", ".join(condition)] = condition
    return conditions


# --- the loop ------------------------------------------------------------------------------------


def train_conditional(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    config: ConditioningConfig | None = None,
    *,
    folder: Path | str | None = None,
    accelerator: Accelerator | None = None,
) -> Result:
    """Train `policy` in place; return history, evaluation and pool.

    Iteration 1 samples the reference without a condition; later ones ask for `config.exemplar`.  With
    `folder`, every stage's outcome is kept and a killed run goes on from there, to the same pool and
    history; the folder must belong to the same settings (the feedback function is not compared).  Raises
    ValueError for settings that do not fit together, FloatingPointError where a loss is not finite.
    """
    learner = make_learner(policy, tokenizer, config or ConditioningConfig(), accelerator)
    return train(learner, task, folder=folder)


def train(learner: Learner, task: Task, *, folder: Path | str | None = None) -> Result:
    """`train_conditional` for a learner that is made already."""
    config = learner.config
    check_task(task, config)
    store = _Store(folder, learner, task)
    pool, rows, tables = store.finished()
    history = training.History("conditional training", store.folder, asdict(config), rows)
    for iteration in range(len(rows) + 1, config.iterations + 1):
        clock = training.Clock()
        # 1 sample: from the second iteration on the policy is asked for the best there is
        items = store.items(iteration, "sample", sample_items, learner, task, pool, iteration)
        clock.lap("sample")
        # 2 feedback: a score, or words, for each response
        items = store.items(iteration, "feedback", ask, task.feedback, items)
        clock.lap("feedback")
        # 3 pool: all samples so far, labelled afresh
        pool = store.pool(iteration, fill_pool, pool, items)
        clock.lap("pool")
        # 4 train: to write each response given its label and prompt
        chosen = choose(pool, config, iteration)
        asked = (
            exemplars(learner, pool, len(task.validation), iteration) if config.check_every else []
        )
        with models.fast_float32(learner.network):
            train_iteration(learner, task, chosen, asked, iteration, store.folder)
        clock.lap("train")
        # 5 evaluate: held-out prompts under every request
        samples = store.rows(iteration, "evaluate", evaluate, learner, task, pool, iteration)
        clock.lap("evaluate")
        tables.append(pd.DataFrame(samples))
        row = (learner, task, pool, iteration, len(chosen), tables[-1], clock.seconds)
        history.add(store.rows(iteration, "history", describe_iteration, *row)[0])
    history.close()
    tables = [table for table in tables if len(table)]
    evaluation = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    frame = history.frame()
    frame.attrs["checks"] = learner.checks
    return Result(frame, evaluation, pool)


# --- 1 sample ------------------------------------------------------------------------------------


def sample_items(
    learner: Learner, task: Task, pool: labels.DataPool, iteration: int
) -> list[labels.Item]:
    """Items without feedback; prompts go round in a new random order each time through."""
    if iteration == 1 and task.first:
        return list(task.first)
    config = learner.config
    count = config.prompts_per_iteration or len(task.prompts)
    turn = range((iteration - 1) * count, iteration * count)
    places = training.laps(turn, len(task.prompts), config.seed, "order")
    prompts = [task.prompts[place] for place in places]
    wanted = [()] * count if iteration == 1 else exemplars(learner, pool, count, iteration)
    built = [task.conditioner.build(p, c) for p, c in zip(prompts, wanted, strict=True)]
    ids = [one.ids for one in built]
    drawn = draw(learner, ids, config.samples_per_prompt, "sample", iteration)
    return [
        labels.Item(prompts[one.place], one.text, tuple(one.ids), one.finished, iteration)
        for one in drawn
    ]


def exemplars(
    learner: Learner, pool: labels.DataPool, count: int, iteration: int, worst: bool = False
) -> list[labels.Condition]:
    """What sampling asks for: the best tag, a fixed sentence, or feedback of the best label there is.

    worst: that of the worst label, to see whether a request is obeyed.
    """
    config, labeller = learner.config, pool.labeller
    if config.exemplar == "best":
        return [labeller.condition(None, labeller.labels()[-1 if worst else 0])] * count
    if config.exemplar != "pool":
        return [(config.exemplar,)] * count
    present = set(pool.labels())
    ordered = [label for label in labeller.labels() if label in present]
    items = pool.select(only=ordered[-1:] if worst else ordered[:1])
    generator = training.generator_for(config.seed, "exemplar", iteration)
    places = torch.randint(len(items), (count,), generator=generator)
    return [pool.condition(*items[place]) for place in places.tolist()]


class Drawn(NamedTuple):
    """One response to the prompt at `place`."""

    place: int
    text: str
    ids: list[int]
    finished: bool


def draw(learner: Learner, prompt_ids: Sequence[list[int]], n: int, *key) -> list[Drawn]:
    """n responses to each prompt, prompt by prompt, under the config's decoding settings.

    Processes share the prompts; the draws do not depend on the shares.
    """
    decoding = generation.decoding_of(learner.config)
    generator = torch.Generator().manual_seed(learner.seed(*key))
    noise = torch.rand(len(prompt_ids) * n, learner.config.max_new_tokens, generator=generator)
    share = processes.share(len(prompt_ids))
    noise = noise[share.start * n : share.stop * n]
    mine = prompt_ids[share]
    drawn = generation.sample(learner.policy, learner.tokenizer, mine, n=n, noise=noise, **decoding)
    places = [share.start + place for place in drawn.prompt_index]
    rows = zip(places, drawn.texts, drawn.response_ids, drawn.finished, strict=True)
    return processes.joined([Drawn(*row) for row in rows])


# --- 2 feedback, 3 pool --------------------------------------------------------------------------


def ask(feedback: critics.Feedback, items: Sequence[labels.Item]) -> list[labels.Item]:
    """The items with feedback.  Raises ValueError where the provider returns another number."""
    texts = ([item.prompt for item in items], [item.response for item in items])
    verdicts = processes.once(feedback, *texts)
    if len(verdicts) != len(items):
        raise ValueError(f"feedback gave {len(verdicts)} verdicts for {len(items)} samples.")
    return [
        labels.to_item({**asdict(item), **critics.as_plain(verdict)})
        for item, verdict in zip(items, verdicts, strict=True)
    ]


def fill_pool(pool: labels.DataPool, items: Sequence[labels.Item]) -> labels.DataPool:
    """The pool with one more round."""
    pool.add(items)
    return pool


def choose(
    pool: labels.DataPool, config: ConditioningConfig, iteration: int
) -> list[tuple[labels.Item, labels.Label]]:
    """The items that train in this iteration, with their labels.  Raises ValueError where there are none."""
    chosen = pool.select(
        config.per_label, within=config.balance, only=config.only, without=config.without,
        fill=config.fill, seed=training.seed_for(config.seed, "select", iteration),
    )  # fmt: skip
    if not chosen:
        raise ValueError(f"iteration {iteration}: no item of the pool was chosen to train on.")
    return chosen


# --- 4 train -------------------------------------------------------------------------------------


class _Rows:
    """Training sequences as one `TokenBatch`; the frozen trunk's states are kept when first computed."""

    def __init__(self, tokens: TokenBatch):
        self.tokens = tokens
        self.known = torch.zeros(len(tokens.response_ids), dtype=torch.bool)

    def take(self, index: torch.Tensor) -> TokenBatch:
        part = self.tokens.rows(index)
        if not self.known[index].all():
            part.trunk = None
        return part

    def keep(self, index: torch.Tensor, part: TokenBatch) -> None:
        if part.trunk is None or self.known[index].all():
            return
        self.tokens.keep_trunk(index, part)
        self.known[index] = True


class Batch(NamedTuple):
    """The same responses after conditioned and after raw prompts, and their mask, (rows, time)."""

    conditioned: _Rows
    raw: _Rows
    mask: torch.Tensor

    @property
    def ids(self) -> torch.Tensor:
        """The responses' tokens, (rows, time)."""
        return self.raw.tokens.response_ids


def as_batch(
    learner: Learner, task: Task, chosen: Sequence[tuple[labels.Item, labels.Label]]
) -> Batch:
    """Items with their labels as token batches."""
    built = [
        task.conditioner.build(item.prompt, task.labeller.condition(item, label))
        for item, label in chosen
    ]
    responses = [list(item.response_ids) for item, _ in chosen]

    def after(prompts: list[list[int]]) -> TokenBatch:
        return TokenBatch.of(learner.policy, learner.tokenizer, prompts, responses)

    conditioned = after([one.ids for one in built])
    raw = after([task.conditioner.raw_ids(one) for one in built])
    return Batch(_Rows(conditioned), _Rows(raw), raw.response_mask.float())


def train_iteration(
    learner: Learner,
    task: Task,
    chosen: Sequence[tuple[labels.Item, labels.Label]],
    asked: Sequence[labels.Condition],
    iteration: int,
    folder: Path | None = None,
) -> None:
    """The iteration's optimizer steps, from the checkpoint where it stands within them.

    `asked`: the condition of each validation prompt.  Where there are any, the iteration ends with the
    weights of its best check, which may be those it began with.
    """
    config = learner.config
    first = learner.step if learner.iteration == iteration else 0
    if first == config.steps:
        return
    if first == 0:
        learner.log = []
        learner.best = training.Best()
        if learner.optimizer is None or config.fresh_optimizer:
            learner.optimizer = make_optimizer(learner)
        if config.check_every:
            check(learner, task, asked, iteration, 0)
    batch = as_batch(learner, task, chosen)
    for step in range(first, config.steps):
        learner.log.append(update(learner, batch, iteration, step))
        learner.iteration, learner.step = iteration, step + 1
        last = learner.step == config.steps
        if config.check_every and (last or _is_due(learner.step, config.check_every)):
            check(learner, task, asked, iteration, learner.step)
        if last and learner.best.weights is not None:
            training.copy_weights(learner.best.weights, learner.weights())
        if folder and (last or _is_due(learner.step, config.checkpoint_every)):
            if processes.is_main():
                _save(learner, folder)
            processes.wait()


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def check(
    learner: Learner, task: Task, asked: Sequence[labels.Condition], iteration: int, step: int
) -> None:
    """Mean score of validation samples, each prompt under its condition: the best weights are remembered.

    Every check draws with the same random numbers, so that two of them differ by their weights alone.
    """
    pairs = zip(task.validation, asked, strict=True)
    ids = [task.conditioner.build(prompt, condition).ids for prompt, condition in pairs]
    drawn = draw(learner, ids, learner.config.eval_samples, "validation")
    prompts = [task.validation[one.place] for one in drawn]
    scores = processes.once(task.judge, prompts, [one.text for one in drawn])
    value = float(np.mean(np.asarray(scores, dtype=float)))
    done = (iteration - 1) * learner.config.steps + step
    learner.checks.append({"iteration": iteration, "step": done, "value": value})
    learner.best.offer(step, value, learner.weights())


def make_optimizer(learner: Learner) -> torch.optim.AdamW:
    """AdamW without decay; new tokens' rows may have a learning rate of their own."""
    config, new = learner.config, {id(rows) for rows in learner.new_rows}
    groups = [{"params": [p for p in learner.weights().values() if id(p) not in new]}]
    groups += [{"params": learner.new_rows}] if new else []
    rates = (config.learning_rate, config.token_learning_rate or config.learning_rate)
    for group, rate in zip(groups, rates, strict=False):
        group["peak"] = group["lr"] = rate
    return torch.optim.AdamW(groups, weight_decay=0.0)


def update(learner: Learner, batch: Batch, iteration: int, step: int) -> dict[str, float]:
    """One optimizer step on the rows of its turn: laps through all, each in a new random order."""
    config = learner.config
    turn = range(step * config.batch_size, (step + 1) * config.batch_size)
    index = torch.tensor(training.laps(turn, len(batch.mask), config.seed, "mix", iteration))
    # over the whole batch, so that the parts of all processes add up to its loss
    weights = token_weights(batch.mask[index], config.normalise)
    sums = learner.at_once.run(partial(backward, learner, batch, index, weights))
    norm = torch.nn.utils.clip_grad_norm_(learner.weights().values(), config.max_grad_norm)
    row = {**sums, "grad_norm": float(norm)}
    training.check_finite(
        # without beta there is no reference, and kl is NaN
        {"loss": row["loss"], "grad_norm": row["grad_norm"]}, f"iteration {iteration}, step {step}",
        "Lower learning_rate or max_grad_norm, or look at the pool.",
    )  # fmt: skip
    done = step if config.fresh_optimizer else (iteration - 1) * config.steps + step
    total = config.steps * (1 if config.fresh_optimizer else config.iterations)
    share = training.rate_share(done, total, config.warmup_steps, config.decay)
    training.set_rates(learner.optimizer, share)
    learner.optimizer.step()
    learner.optimizer.zero_grad()
    return row


def backward(
    learner: Learner, batch: Batch, index: torch.Tensor, weights: torch.Tensor, rows_at_once: int
) -> dict[str, float]:
    """Gradients of a batch's loss, a few rows at a time; the sums of its parts over all processes."""
    learner.optimizer.zero_grad()  # of an attempt for which memory was too small
    sums: Counter[str] = Counter()
    mine = torch.arange(len(index))[processes.share(len(index))]
    for few in processes.passes(mine.split(rows_at_once), learner.network, learner.accelerator):
        parts = batch_loss(learner, batch, index[few], weights[few])
        loss = parts["loss"] * processes.world()  # DDP averages over processes; we want the sum
        loss.backward()
        sums.update({name: float(value.detach()) for name, value in parts.items()})
    everyone = pd.DataFrame(processes.joined([sums]))
    return everyone.sum(skipna=False).to_dict()  # without beta kl is NaN


def batch_loss(
    learner: Learner, batch: Batch, places: torch.Tensor, weights: torch.Tensor
) -> dict[str, torch.Tensor]:
    """`conditional_loss` of some rows; the reference reads their raw prompts."""
    config, reference = learner.config, None
    if config.beta:
        with torch.no_grad():
            reference = logits_of(learner, batch.raw, places, reference=True)
    logits = logits_of(learner, batch.conditioned, places)
    return conditional_loss(
        logits, batch.ids[places], batch.mask[places], reference, beta=config.beta,
        alpha=config.alpha, direction=config.direction, weights=weights,
    )  # fmt: skip


@torch.no_grad()
def token_table(
    learner: Learner, task: Task, item: labels.Item, label: labels.Label
) -> pd.DataFrame:
    """What the loss of one sample under a label is made of: a row a token, in nats.

    Columns log p(token | label), log p(token) of the reference, KL, entropy, loss; the mean of the last is
    the sample's loss.
    """
    config = learner.config
    batch = as_batch(learner, task, [(item, label)])
    logits = logits_of(learner, batch.conditioned)[0]
    reference = logits_of(learner, batch.raw, reference=True)[0]
    ids = batch.ids[0]
    tokens = [learner.tokenizer.decode([i]).strip() or "(blank)" for i in ids.tolist()]
    table = pd.DataFrame(index=pd.Index(tokens, name="token"))
    places = torch.arange(len(ids))
    table["log p(token | label)"] = logits.log_softmax(-1)[places, ids].cpu().numpy()
    table["log p(token)"] = reference.log_softmax(-1)[places, ids].cpu().numpy()
    table["KL"] = losses.kl_divergence(logits, reference, config.direction).cpu().numpy()
    table["entropy"] = losses.entropy(logits).cpu().numpy()
    penalty = config.beta * table["KL"] - config.alpha * table["entropy"]
    table["loss"] = penalty - table["log p(token | label)"]
    return table


def logits_of(
    learner: Learner, rows: _Rows, places: torch.Tensor | None = None, reference: bool = False
) -> torch.Tensor:
    """Logits that predict the responses of some rows (None: all), (rows, time, vocabulary)."""
    places = torch.arange(len(rows.known)) if places is None else places
    part = rows.take(places)
    # new rows train below the trunk, so a conditioned prompt's states change with them
    fixed = reference or not learner.new_rows
    learner.shared.trunk_layers = learner.trunk if fixed else []
    logits, _ = learner.network(part, reference)
    if fixed:
        rows.keep(places, part)
    return part.spread(logits)


# --- 5 evaluate ----------------------------------------------------------------------------------


def evaluate(learner: Learner, task: Task, pool: labels.DataPool, iteration: int) -> list[dict]:
    """`measure` under the task's requests, as rows; none without held-out prompts."""
    if not len(task.held_out):
        return []
    requests = dict(task.requests)
    if learner.config.exemplar == "pool":
        count = len(task.held_out)
        requests["pool"] = exemplars(learner, pool, count, 0)
        requests["pool, worst"] = exemplars(learner, pool, count, 0, worst=True)
    return measure(learner, task, requests).assign(iteration=iteration).to_dict("records")


def measure(
    learner: Learner,
    task: Task,
    requests: Mapping[str, labels.Condition | list[labels.Condition]],
) -> pd.DataFrame:
    """Samples of the held-out prompts under each request, now: a row a sample.

    A request is one condition, or a list with one for each prompt.  Columns request, prompt_index, sample,
    prompt, text, score (the judge's), tokens, finished, nll (summed, under the reference and the raw prompt:
    exp(sum nll / sum tokens) is the perplexity).
    """
    tables, n = [], learner.config.eval_samples
    for name, condition in requests.items():
        each = condition if isinstance(condition, list) else [condition] * len(task.held_out)
        built = [task.conditioner.build(p, c) for p, c in zip(task.held_out, each, strict=True)]
        drawn = draw(learner, [one.ids for one in built], n, "held out")
        places = [one.place for one in drawn]
        texts = [one.text for one in drawn]
        prompts = [task.held_out[place] for place in places]
        raw = [task.conditioner.raw_ids(built[place]) for place in places]
        scores = processes.once(task.judge, prompts, texts)
        columns = {
            "request": name, "prompt_index": places, "sample": [*range(n)] * len(built),
            "prompt": prompts, "text": texts, "score": np.asarray(scores, dtype=float),
            "tokens": [len(one.ids) for one in drawn], "finished": [one.finished for one in drawn],
            "nll": reference_nll(learner, raw, [one.ids for one in drawn]),
        }  # fmt: skip
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def reference_nll(learner: Learner, prompts, responses) -> list[float]:
    """-log p of each response under the reference, in nats; processes share the rows."""
    share = processes.share(len(prompts))
    with learner.shared.as_reference() as reference:
        log_probs = logprobs.token_log_probs(reference, prompts[share], responses[share])
    return processes.joined([-float(row.sum(dtype=np.float64)) for row in log_probs])


def describe_iteration(
    learner: Learner,
    task: Task,
    pool: labels.DataPool,
    iteration: int,
    selected: int,
    table: pd.DataFrame,
    seconds: Mapping[str, float],
) -> list[dict]:
    """The iteration's row of history: what was sampled, learned and measured."""
    config = learner.config
    scores = [item.score for item in pool.items if item.round == iteration]
    each = config.prompts_per_iteration or len(task.prompts)
    row = {
        "iteration": iteration, "scored": iteration * each * config.samples_per_prompt,
        "missing": pool.missing[iteration], "pool": len(pool),
        "smallest_label": int(pool.counts()["n"].min()), "selected": selected,
        "steps": iteration * config.steps,
        "sampled_score": float(np.mean([s for s in scores if s is not None] or [np.nan])),
        **pd.DataFrame(learner.log).mean().to_dict(), "direction": config.direction,
    }  # fmt: skip
    if learner.best.weights is not None:
        row |= {"best_step": learner.best.step, "validation": learner.best.value}
    if len(table):
        means = table.groupby("request", sort=False)["score"].mean()
        row |= {f"held_out/{name}": value for name, value in means.items()}
    return [row | {f"seconds_{stage}": seconds[stage] for stage in STAGES}]


# --- what a killed run goes on from --------------------------------------------------------------


class _Store:
    """Each stage's outcome as a file, `<iteration>-<stage>.jsonl`, and the weights as checkpoints.

    A stage whose file is there is not done again.  Without a folder nothing is kept.
    """

    def __init__(self, folder: Path | str | None, learner: Learner, task: Task):
        self.task = task
        self.replay = learner.config.replay
        self.folder = None
        if folder:
            start = [p.flatten()[:4].tolist() for p in learner.weights().values()]
            settings = (asdict(learner.config), repr(task.labeller), task.conditioner.settings)
            texts = (
                list(task.prompts),
                list(task.held_out),
                dict(task.requests),
                list(task.validation),
            )
            first = [[item.key for item in task.first]] if task.first else []
            key = (*settings, *texts, *first, start)
            self.folder = training.claim_folder(folder, "conditional training", *key)
            _restore(learner, self.folder)

    def path(self, iteration: int, stage: str) -> Path | None:
        return self.folder and self.folder / f"{iteration:03d}-{stage}.jsonl"

    def rows(self, iteration: int, stage: str, make: Callable, *arguments) -> list[dict]:
        """The stage's rows: as they were stored, or made and stored."""
        path = self.path(iteration, stage)
        if path and processes.is_there(path):
            return training.read_rows(path)
        rows = make(*arguments)
        if path and processes.is_main():
            training.write_rows(path, rows)
        return rows

    def items(self, iteration: int, stage: str, make: Callable, *arguments) -> list[labels.Item]:
        """The same for items."""
        rows = self.rows(iteration, stage, lambda: [asdict(item) for item in make(*arguments)])
        return [labels.to_item(row) for row in rows]

    def pool(self, iteration: int, fill: Callable, pool, items) -> labels.DataPool:
        """The same for the pool."""
        path = self.path(iteration, "pool")
        if path and processes.is_there(path):
            return labels.DataPool.load(path, self.task.labeller, self.replay)
        pool = fill(pool, items)
        if path and processes.is_main():
            pool.save(path)
        return pool

    def finished(self) -> tuple[labels.DataPool, list[dict], list[pd.DataFrame]]:
        """Pool, rows of history and evaluations of the iterations that are done."""
        pool = labels.DataPool(self.task.labeller, self.replay)
        rows, tables, iteration = [], [], 1
        while self.folder and self.path(iteration, "history").exists():
            rows += training.read_rows(self.path(iteration, "history"))
            tables.append(pd.DataFrame(training.read_rows(self.path(iteration, "evaluate"))))
            iteration += 1
        if rows:
            pool = self.pool(iteration - 1, fill_pool, pool, [])
        return pool, rows, tables


def _save(learner: Learner, folder: Path) -> None:
    number = (learner.iteration - 1) * learner.config.steps + learner.step
    state = {"iteration": learner.iteration, "step": learner.step, "log": learner.log}
    state |= {"checks": learner.checks}
    state |= {"best_step": learner.best.step, "best_value": learner.best.value}
    tensors = {"weights": learner.weights()}
    if learner.best.weights is not None:
        tensors["best"] = learner.best.weights
    training.save_checkpoint(folder, number, state, tensors, learner.optimizer.state_dict())


def _restore(learner: Learner, folder: Path) -> None:
    checkpoint = training.load_checkpoint(folder, learner.policy.device)
    if checkpoint is None:
        return
    state = checkpoint.state
    training.copy_weights(checkpoint.tensors["weights"], learner.weights())
    learner.iteration = state["iteration"]
    learner.step = state["step"]
    learner.log = state["log"]
    learner.checks = state["checks"]
    if "best" in checkpoint.tensors:
        best = checkpoint.tensors["best"]
        learner.best = training.Best(state["best_step"], state["best_value"], best)
    learner.optimizer = make_optimizer(learner)
    learner.optimizer.load_state_dict(checkpoint.optimizer)
