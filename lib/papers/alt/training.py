"""Learning from labels that are conditions: Quark and ALT as settings of one loop.

sample -> feedback -> pool -> train -> evaluate.  Every response gets a label, a quantile of its reward
(Quark, Lu et al. 2022) or words (ALT, "Towards Aligning Language Models with Textual Feedback", 2024);
the model learns to write the response given label and prompt, and is asked for the best label later.

A condition is always built from the *stored* raw prompt, so taking it off needs no splitting of text.
New tokens are rows of the input embedding only: they cannot be sampled, no prompt can spell them, and
the vocabulary of the policy stays that of the reference, which sees the raw prompt.

Random numbers depend on (seed, stage, iteration) and on contents, so a killed run needs no generator
state and the order in which samples arrive does not matter.
"""

from __future__ import annotations

import io
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib import encoding, generation, logprobs, losses, models, runtime, training
from lib.papers.alt import conditions, critics, labels
from lib.policy import SharedTrunkPolicy, TokenBatch

STAGES = ("sample", "feedback", "pool", "train", "evaluate")
DECODING = ("max_new_tokens", "temperature", "top_k", "top_p")
MAY_BE_ZERO = {"beta", "alpha", "top_k", "warmup_steps", "per_label", "prompts_per_iteration"}
MAY_BE_ZERO |= {"checkpoint_every", "seed", "token_learning_rate"}
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


# --- the loop ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConditioningConfig:
    """Settings of `ConditionalTraining`; notebook 50 has the papers' values beside."""

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
    checkpoint_every: int = 0  # optimizer steps; 0: at the end of an iteration's training
    seed: int = 0

    def __post_init__(self):
        for name, value in asdict(self).items():
            number = type(value) in (int, float)
            if number and (value < 0 or (value == 0 and name not in MAY_BE_ZERO)):
                allowed = "at least" if name in MAY_BE_ZERO else "above"
                raise ValueError(f"{name} is {value!r}; it must be {allowed} 0.")
            if value not in (allowed := ALLOWED.get(name, (value,))):
                raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}.")


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


class ConditionalTraining:
    """One arm: `run` trains `policy` in place and returns its history, one row an iteration.

    Iteration 1 samples the reference without a condition; later ones ask for `config.exemplar`.
    After each, `held_out` prompts are sampled under every request of `requests` (name -> condition;
    default: none, and each label's tags) and scored by `judge`: `evaluation`, a row a sample.  With
    `folder`, every stage's outcome is kept and a killed run goes on from there, to the same pool and
    history; the folder must belong to the same settings (the feedback function is not compared).
    """

    def __init__(
        self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str],
        feedback: critics.Feedback, labeller, conditioner: conditions.Conditioner,
        config: ConditioningConfig | None = None, *, held_out: Sequence[str] = (),
        judge: critics.Judge | None = None, requests: Mapping[str, labels.Condition] | None = None,
        folder: Path | str | None = None,
    ):  # fmt: skip
        self.policy, self.tokenizer, self.prompts = policy, tokenizer, list(prompts)
        self.feedback, self.labeller, self.conditioner = feedback, labeller, conditioner
        self.config, self.judge = config or ConditioningConfig(), judge
        self.held_out = list(held_out)
        self.requests = dict(_all_requests(labeller) if requests is None else requests)
        self._check()
        how = {"layers": self.config.layers, "lora_rank": self.config.lora_rank}
        frozen = models.set_trainable(policy, self.config.train, **how)
        embed = policy.get_input_embeddings()
        self.new_rows = [embed.extra] if isinstance(embed, conditions.ExtendedEmbedding) else []
        for rows in self.new_rows:
            rows.requires_grad_(True)
        self.network = SharedTrunkPolicy(policy, frozen)
        self.trunk = self.network.trunk_layers
        self.weights = {n: p for n, p in policy.named_parameters() if p.requires_grad}
        self.pool = labels.DataPool(labeller, self.config.replay)
        self.history: list[dict] = []
        self.tables: list[pd.DataFrame] = []
        self.seconds: dict[str, float] = {}
        self.at, self.log, self.optimizer = (0, 0), [], None  # (iteration, step) of the weights
        self.folder = self._open(folder) if folder else None

    def _check(self) -> None:
        if not self.prompts:
            raise ValueError("there are no prompts to train on.")
        if self.held_out and self.judge is None:
            raise ValueError("held-out prompts need a judge to score their samples.")
        local, samples = getattr(self.labeller, "within", ""), self.config.samples_per_prompt
        if local == "prompt" and samples < len(self.labeller.tags):
            raise ValueError(
                f"{samples} samples a prompt cannot fill {len(self.labeller.tags)} quantiles within a "
                "prompt. Raise samples_per_prompt, or use fewer tags or within='pool'."
            )

    def run(self) -> pd.DataFrame:
        """Train to the end; see the class.  Raises FloatingPointError where a loss is not finite."""
        for iteration in range(len(self.history) + 1, self.config.iterations + 1):
            items = self._stage("sample", iteration, lambda n=iteration: self.sample(n))
            items = self._stage("feedback", iteration, lambda i=items: self.ask(i))
            self._fill_pool(iteration, [labels.to_item(row) for row in items])
            started = time.perf_counter()
            with models.fast_float32(self.network):
                self.train(iteration)
            self.seconds["train"] = time.perf_counter() - started
            rows = self._stage("evaluate", iteration, lambda n=iteration: self.evaluate(n))
            self._finish(iteration, rows)
        return pd.DataFrame(self.history)

    @property
    def evaluation(self) -> pd.DataFrame:
        """A row for each held-out sample: iteration and the columns of `measure`."""
        return pd.concat(self.tables, ignore_index=True) if self.tables else pd.DataFrame()

    # --- stages

    def sample(self, iteration: int) -> list[dict]:
        """Items without feedback; prompts go round in a new random order each time through."""
        config = self.config
        count = config.prompts_per_iteration or len(self.prompts)
        turn = range((iteration - 1) * count, iteration * count)
        prompts = [self.prompts[i] for i in self._laps(turn, len(self.prompts), "order")]
        asked = [()] * count if iteration == 1 else self.exemplars(count, iteration)
        built = [self.conditioner.build(p, c) for p, c in zip(prompts, asked, strict=True)]
        drawn = self._sample([b.ids for b in built], config.samples_per_prompt, "sample", iteration)
        return [
            asdict(labels.Item(prompts[place], text, tuple(ids), finished, iteration))
            for place, text, ids, finished in zip(
                drawn.prompt_index, drawn.texts, drawn.response_ids, drawn.finished, strict=True
            )
        ]

    def exemplars(self, count: int, iteration: int) -> list[labels.Condition]:
        """What sampling asks for: the best tag, a fixed sentence, or feedback of the best label there is."""
        if self.config.exemplar == "best":
            best = self.labeller.labels()[0]
            return [self.labeller.condition(None, best)] * count
        if self.config.exemplar != "pool":
            return [(self.config.exemplar,)] * count
        there = set(self.pool.labels())
        best = [label for label in self.labeller.labels() if label in there][:1]
        found = self.pool.select(only=best)
        draws = torch.randint(
            len(found), (count,), generator=self._generator("exemplar", iteration)
        )
        return [self.pool.condition(*found[i]) for i in draws.tolist()]

    def ask(self, items: list[dict]) -> list[dict]:
        """The items with feedback.  Raises ValueError where the provider returns another number."""
        prompts, responses = ([row[name] for row in items] for name in ("prompt", "response"))
        found = self.feedback(prompts, responses)
        if len(found) != len(items):
            raise ValueError(f"feedback gave {len(found)} verdicts for {len(items)} samples.")
        return [{**row, **verdict} for row, verdict in zip(items, found, strict=True)]

    def _fill_pool(self, iteration: int, items: list[labels.Item]) -> None:
        path = self.folder and self.folder / f"{iteration:03d}-pool.jsonl"
        if path and path.exists():
            self.pool = labels.DataPool.load(path, self.labeller, self.config.replay)
            return
        self.pool.add(items)
        if path:
            self.pool.save(path)

    def train(self, iteration: int) -> None:
        """The iteration's optimizer steps, from the checkpoint where it stands within them."""
        config, done = self.config, self.at[1] if self.at[0] == iteration else 0
        chosen = self.pool.select(
            config.per_label, within=config.balance, only=config.only, without=config.without,
            fill=config.fill, seed=self._seed("select", iteration),
        )  # fmt: skip
        if not chosen:
            raise ValueError(f"iteration {iteration}: no item of the pool was chosen to train on.")
        self.selected = len(chosen)
        if done == config.steps:
            return
        if done == 0:
            self.log = []
        if self.optimizer is None or (done == 0 and config.fresh_optimizer):
            self.optimizer = self._make_optimizer()
        rows = self._rows(chosen)
        for step in range(done, config.steps):
            self._step(iteration, step, *rows)
            every = config.checkpoint_every
            if step + 1 == config.steps or (every and (step + 1) % every == 0):
                self.at = (iteration, step + 1)
                self._save()

    def evaluate(self, iteration: int) -> list[dict]:
        """`measure` on the held-out prompts, as rows."""
        if not self.held_out:
            return []
        requests = self.requests
        if self.config.exemplar == "pool":
            drawn = self.exemplars(len(self.held_out), 0)
            requests = {**requests, "pool": drawn}
        return self.measure(requests).assign(iteration=iteration).to_dict("records")

    def measure(
        self, requests: Mapping[str, labels.Condition | list[labels.Condition]]
    ) -> pd.DataFrame:
        """Samples of the held-out prompts under each request, now: a row a sample.

        Columns request, prompt_index, sample, prompt, text, score (the judge's), tokens, finished, nll
        (summed, under the reference and the raw prompt: exp(sum nll / sum tokens) is the perplexity).
        """
        tables, n = [], self.config.eval_samples
        for name, condition in requests.items():
            asked = condition if isinstance(condition, list) else [condition] * len(self.held_out)
            built = [
                self.conditioner.build(p, c) for p, c in zip(self.held_out, asked, strict=True)
            ]
            drawn = self._sample([b.ids for b in built], n, "held out")
            prompts = [self.held_out[i] for i in drawn.prompt_index]
            raw = [self.conditioner.raw_ids(built[i]) for i in drawn.prompt_index]
            columns = {
                "request": name, "prompt_index": drawn.prompt_index, "sample": [*range(n)] * len(built),
                "prompt": prompts, "text": drawn.texts,
                "score": np.asarray(self.judge(prompts, drawn.texts), dtype=float),
                "tokens": [len(ids) for ids in drawn.response_ids], "finished": drawn.finished,
                "nll": self._reference_nll(raw, drawn.response_ids),
            }  # fmt: skip
            tables.append(pd.DataFrame(columns))
        return pd.concat(tables, ignore_index=True)

    def _finish(self, iteration: int, rows: list[dict]) -> None:
        """The iteration's row of history: what was sampled, learned and measured."""
        config = self.config
        means = pd.DataFrame(self.log).mean().to_dict()
        counts = self.pool.counts().set_index("label")["n"]
        newest = [item.score for item in self.pool.items if item.round == iteration]
        each = config.prompts_per_iteration or len(self.prompts)
        row = {
            "iteration": iteration, "scored": iteration * each * config.samples_per_prompt,
            "missing": self.pool.missing[iteration], "pool": len(self.pool),
            "smallest_label": int(counts.min()), "selected": self.selected,
            "steps": iteration * config.steps,
            "sampled_score": float(np.mean([s for s in newest if s is not None] or [np.nan])),
            **means, "direction": config.direction,
        }  # fmt: skip
        if rows:
            table = pd.DataFrame(rows)
            self.tables.append(table)
            scores = table.groupby("request", sort=False)["score"].mean()
            row |= {f"held_out/{name}": value for name, value in scores.items()}
        row |= {f"seconds_{stage}": self.seconds.get(stage, 0.0) for stage in STAGES}
        self.history.append(row)
        if self.folder:
            lines = "".join(json.dumps(row) + "\n" for row in self.history)
            runtime.write_atomic(self.folder / "history.jsonl", lines)

    # --- one optimizer step

    def _step(self, iteration: int, step: int, conditioned, raw, mask) -> None:
        config = self.config
        index = self._batch(iteration, step, len(mask))
        weights = token_weights(mask[index], config.normalise)
        sums: Counter[str] = Counter()
        for few in torch.arange(len(index)).split(config.forward_rows):
            places = index[few]
            parts = self._loss(conditioned, raw, mask[places], weights[few], places)
            parts["loss"].backward()
            sums.update({name: float(value.detach()) for name, value in parts.items()})
        norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), config.max_grad_norm)
        self.log.append({**sums, "grad_norm": float(norm)})
        if not np.isfinite([sums["loss"], float(norm)]).all():
            raise FloatingPointError(
                f"iteration {iteration}, step {step}: not finite: {self.log[-1]}. Lower learning_rate "
                "or max_grad_norm, or look at the pool."
            )
        done = step if config.fresh_optimizer else (iteration - 1) * config.steps + step
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self._share(done)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _loss(self, conditioned, raw, mask, weights, places) -> dict[str, torch.Tensor]:
        reference = None
        if self.config.beta:
            with torch.no_grad():
                reference = self._logits(raw, places, reference=True)
        logits = self._logits(conditioned, places)
        ids = conditioned.tokens.response_ids[places]
        how = {name: getattr(self.config, name) for name in ("beta", "alpha", "direction")}
        return conditional_loss(logits, ids, mask, reference, weights=weights, **how)

    def _logits(self, rows: _Rows, places: torch.Tensor, reference: bool = False) -> torch.Tensor:
        part = rows.take(places)
        # new rows train below the trunk, so a conditioned prompt's states change with them
        fixed = reference or not self.new_rows
        self.network.trunk_layers = self.trunk if fixed else []
        logits, _ = self.network(part, reference)
        if fixed:
            rows.keep(places, part)
        return part.spread(logits)

    def _share(self, done: int) -> float:
        """Of the peak learning rate, after `done` steps of this optimizer."""
        config = self.config
        total = config.steps * (1 if config.fresh_optimizer else config.iterations)
        rise = min(1.0, (done + 1) / max(1, config.warmup_steps))
        left = (total - done) / max(1, total - config.warmup_steps)
        return rise * (min(1.0, left) if config.decay else 1.0)

    def _batch(self, iteration: int, step: int, count: int) -> torch.Tensor:
        """Row numbers of one step: laps through the rows, each in a new random order."""
        turn = range(step * self.config.batch_size, (step + 1) * self.config.batch_size)
        return torch.tensor(self._laps(turn, count, "mix", iteration))

    def _rows(
        self, chosen: list[tuple[labels.Item, labels.Label]]
    ) -> tuple[_Rows, _Rows, torch.Tensor]:
        """Conditioned and raw sequences, and the response mask (rows, time)."""
        built = [
            self.conditioner.build(item.prompt, self.pool.condition(item, label))
            for item, label in chosen
        ]
        responses = [list(item.response_ids) for item, _ in chosen]
        conditioned, mask = self._tokens([b.ids for b in built], responses)
        raw, _ = self._tokens([self.conditioner.raw_ids(b) for b in built], responses)
        return _Rows(conditioned), _Rows(raw), mask

    def _tokens(self, prompts, responses) -> tuple[TokenBatch, torch.Tensor]:
        side = "right" if self.policy.config.is_encoder_decoder else "left"
        pad, device = encoding.pad_id(self.tokenizer), self.policy.device
        padded = encoding.pad_rows(prompts, pad, side)
        padded += encoding.pad_rows(responses, pad, "right")
        ids, seen, response, mask = (x.to(device) for x in padded)
        return TokenBatch(ids, seen, response, mask), mask.float()

    def _reference_nll(self, prompts, responses) -> list[float]:
        with self.network.as_reference() as reference:
            log_probs = logprobs.token_log_probs(reference, prompts, responses)
        return [-float(row.sum(dtype=np.float64)) for row in log_probs]

    def _sample(self, prompt_ids, n: int, *seed) -> generation.Samples:
        how = {name: getattr(self.config, name) for name in DECODING}
        return generation.sample(
            self.policy, self.tokenizer, prompt_ids, n=n, seed=self._seed(*seed), **how
        )

    # --- stages that were done

    def _stage(self, name: str, iteration: int, make: Callable[[], list[dict]]) -> list[dict]:
        path = self.folder and self.folder / f"{iteration:03d}-{name}.jsonl"
        started = time.perf_counter()
        if path and path.exists():
            return labels.read_lines(path)
        rows = make()
        if path:
            runtime.write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
        self.seconds[name] = time.perf_counter() - started
        return rows

    def _open(self, folder: Path | str) -> Path:
        start = [p.flatten()[:4].tolist() for p in self.weights.values()]
        settings = (asdict(self.config), repr(self.labeller), self.conditioner.settings)
        asked = (self.prompts, self.held_out, self.requests)
        folder = training.claim_folder(folder, "conditional training", *settings, *asked, start)
        if (folder / "checkpoint.pt").exists():
            self._load(folder / "checkpoint.pt")
        if (folder / "history.jsonl").exists():
            self.history = labels.read_lines(folder / "history.jsonl")
            done = [
                labels.read_lines(folder / f"{r['iteration']:03d}-evaluate.jsonl")
                for r in self.history
            ]
            self.tables = [pd.DataFrame(rows) for rows in done if rows]
            pool = folder / f"{len(self.history):03d}-pool.jsonl"
            self.pool = labels.DataPool.load(pool, self.labeller, self.config.replay)
        return folder

    def _make_optimizer(self) -> torch.optim.AdamW:
        config, new = self.config, {id(p) for p in self.new_rows}
        groups = [{"params": [p for p in self.weights.values() if id(p) not in new]}]
        groups += [{"params": self.new_rows}] if new else []
        rates = (config.learning_rate, config.token_learning_rate or config.learning_rate)
        for group, rate in zip(groups, rates, strict=False):
            group["peak"] = group["lr"] = rate
        return torch.optim.AdamW(groups, weight_decay=0.0)

    def _save(self) -> None:
        if self.folder is None:
            return
        state = {"at": self.at, "log": self.log, "weights": self.weights}
        state |= {"optimizer": self.optimizer.state_dict()}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        runtime.write_atomic(self.folder / "checkpoint.pt", buffer.getvalue())

    @torch.no_grad()
    def _load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.policy.device, weights_only=True)
        for name, parameter in self.weights.items():
            parameter.copy_(state["weights"][name])
        self.at, self.log = tuple(state["at"]), state["log"]
        self.optimizer = self._make_optimizer()
        self.optimizer.load_state_dict(state["optimizer"])

    # --- random numbers

    def _seed(self, *key) -> int:
        return int(runtime.content_hash(self.config.seed, *key)[:8], 16)

    def _generator(self, *key) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed(*key))

    def _laps(self, turn: range, count: int, *key) -> list[int]:
        """The turn-th of an endless sequence: 0 to count - 1 in a new random order each lap."""
        places = [divmod(i, count) for i in turn]
        orders = {
            lap: torch.randperm(count, generator=self._generator(*key, lap)).tolist()
            for lap in dict(places)
        }
        return [orders[lap][place] for lap, place in places]


def _all_requests(labeller) -> dict[str, labels.Condition]:
    """No condition, and the tags of each label where it has tags."""
    found: dict[str, labels.Condition] = {"none": ()}
    if isinstance(labeller, labels.FreeText):
        return found
    for label in labeller.labels():
        condition = labeller.condition(None, label)
        found[", ".join(condition)] = condition
    return found
