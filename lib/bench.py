"""Speed, measured beside what a reader would use instead: `python -m lib bench [NAME ...]`.

A benchmark has our side and one or more peers on the same model, inputs and dtype.  After a warm-up of
each, all sides run in turn, at least five times.  Rates count useful units only: response tokens that
were asked for, never padding or tokens after the end.  `share` is the least time the machine could need
(arithmetic at the matrix rate, or weights at the memory bandwidth, both measured in the same run) over
the time taken; for `feedback` it is the share of the server's limit.

Simplified: the least time leaves out attention and activations, so `share` is a lower bound.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import ctypes
import gc
import inspect
import itertools
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    pipeline,
)

from lib import (
    data,
    encoding,
    feedback,
    generation,
    logprobs,
    losses,
    models,
    plots,
    ppo,
    reward_models,
    rloo,
    runtime,
    scorers,
    sft,
)
from lib.course import assets
from lib.course.record import SHOWN_PACKAGES

SIZES = ("real", "tiny")  # "tiny": random models and few rows, to test the machinery
SAMPLES, NEW_TOKENS = 8, 48
ROUNDS = 5


@dataclass(frozen=True)
class Work:
    """What one run did: useful units, and the arithmetic and weight bytes that these need at least."""

    units: float
    flops: float = 0.0
    moved: float = 0.0


Thunk = Callable[[], Work]


@dataclass
class Benchmark:
    """Sides by name, ours first; each gives, untimed, the function that is timed."""

    unit: str
    goal: float  # how many times as fast as the first peer
    what: str
    sides: dict[str, Callable[[], Thunk]]
    dtype: torch.dtype = torch.float32
    limit: float | None = None  # units a second that no side can pass
    growth: dict[int, Thunk] = field(default_factory=dict)  # size -> our side on that many
    grows: str = ""  # what the sizes count


# --- measuring -----------------------------------------------------------------------------------


def ceilings(dtype: torch.dtype, device: torch.device | None = None) -> dict[str, float]:
    """Matrix arithmetic (flop/s) in `dtype` and memory copies (byte/s) of this machine, measured now."""
    device = device or runtime.get_device()
    size, items = (8192, 2**28) if device.type == "cuda" else (2048, 2**26)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.empty(items, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    matrix = min(_seconds(lambda: left @ right, device) for _ in range(5))
    copying = min(_seconds(lambda: target.copy_(source), device) for _ in range(5))
    return {"flops_per_s": 2 * size**3 / matrix, "bytes_per_s": 2 * items / copying}


def _seconds(work: Callable, device: torch.device) -> float:
    _finish(device)
    started = time.perf_counter()
    work()
    _finish(device)
    return time.perf_counter() - started


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PeakMemory:
    """Within: the rise of memory in use, in bytes, as `.rise` afterwards; NaN where it cannot be had.

    CUDA: the allocator's peak.  Linux: the process's resident peak, after freed memory went back.
    """

    STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def __enter__(self):
        gc.collect()
        self.rise, self.cuda = float("nan"), torch.cuda.is_available()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)
                self.RESET.write_text("5")
            self.before = self._resident("VmRSS")
        return self

    def __exit__(self, *_):
        peak = torch.cuda.max_memory_allocated() if self.cuda else self._resident("VmHWM")
        self.rise = max(0.0, peak - self.before)

    def _resident(self, name: str) -> float:
        with contextlib.suppress(OSError):
            lines = self.STATUS.read_text().splitlines()
            return 1024.0 * next(int(x.split()[1]) for x in lines if x.startswith(name))
        return float("nan")


@contextlib.contextmanager
def _quietly():
    """Within: no advice about arguments that are being renamed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def measure(name: str, benchmark: Benchmark, rounds: int = ROUNDS) -> dict:
    """Run all sides in turn, `rounds` times after a warm-up, in changing order; the record of it.

    Raises ValueError for fewer than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; at least one is needed.")
    runs, sides, top = [], [*benchmark.sides], ceilings(benchmark.dtype)
    bar = runtime.progress(total=(rounds + 1) * len(sides), label=name, unit="run")
    for number in range(rounds + 1):  # number 0 warms up
        for side in sides if number % 2 else reversed(sides):
            row = {"round": number, "side": side, **_run(benchmark.sides[side]())}
            runs += [row] if number else []
            bar.update(1)
    bar.close()
    growth = [{"size": size, **_run(thunk)} for size, thunk in benchmark.growth.items()]
    record = {"name": name, "unit": benchmark.unit, "goal": benchmark.goal, "what": benchmark.what}
    record |= {"limit": benchmark.limit, "dtype": str(benchmark.dtype).removeprefix("torch.")}
    packages = {p: metadata.version(p) for p in SHOWN_PACKAGES}
    record |= {"device": runtime.describe_device(), "versions": packages, "ceilings": top}
    record |= {"commit": runtime.git_commit(), "plain": runtime.plain_mode(), "growth": growth}
    record |= {"grows": benchmark.grows}
    record |= {"date": time.strftime("%Y-%m-%d", time.gmtime()), "runs": runs}
    return record


def _run(thunk: Thunk) -> dict[str, float]:
    with PeakMemory() as memory, _quietly():
        _finish(device := runtime.get_device())
        started = time.perf_counter()
        work = thunk()
        _finish(device)
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "memory": memory.rise, **vars(work)}


def summary(record: dict) -> pd.DataFrame:
    """One row a side: rate, ours / this side (median, low, high over rounds), memory, share, n."""
    runs, top = pd.DataFrame(record["runs"]), record["ceilings"]
    runs["rate"] = runs["units"] / runs["seconds"]
    least = np.maximum(runs["flops"] / top["flops_per_s"], runs["moved"] / top["bytes_per_s"])
    runs["share"] = runs["rate"] / record["limit"] if record["limit"] else least / runs["seconds"]
    rates, rows = runs.pivot(index="round", columns="side", values="rate"), []
    for side in ["ours", *(name for name in rates if name != "ours")]:
        mine, ratio = runs[runs["side"] == side], rates["ours"] / rates[side]
        row = {"benchmark": record["name"], "side": side, "unit": record["unit"]}
        row |= {"rate": mine["rate"].median(), "ratio": ratio.median(), "low": ratio.min()}
        row |= {"high": ratio.max(), "memory": mine["memory"].median()}
        rows.append({**row, "share": mine["share"].median(), "n": len(mine)})
    return pd.DataFrame(rows)


def growth_fit(record: dict) -> dict[str, float]:
    """Exponent b of time ~ size^b over the record's sizes (1 = linear), and the largest rise of memory."""
    table = pd.DataFrame(record["growth"])
    slope = np.polyfit(np.log(table["size"]), np.log(table["seconds"]), 1)[0]
    spread = table["memory"].max() - table["memory"].min()
    return {"time_exponent": float(slope), "memory_spread": float(spread)}


def to_text(record: dict) -> str:
    """The record as lines to read."""
    lines = [f"{record['name']}: {record['what']}"]
    for row in summary(record).itertuples():
        ratio = f"ours is {row.ratio:.2f}x [{row.low:.2f}, {row.high:.2f}]"
        lines.append(
            f"  {row.side:<34} {row.rate:10.1f} {row.unit}/s  {ratio:<30} memory {row.memory / 1e6:7.0f} MB"
            f"  share of ceiling {row.share:6.1%}  n = {row.n}"
        )
    if record["growth"]:
        fit = growth_fit(record)
        sizes = ", ".join(f"{row['size']:,}" for row in record["growth"])
        lines.append(
            f"  growth over {sizes} {record['grows']}: time ~ size^{fit['time_exponent']:.2f}, memory "
            f"differs by {fit['memory_spread'] / 1e6:.0f} MB"
        )
    return "\n".join(lines)


# --- inputs --------------------------------------------------------------------------------------


def load(size: str, dtype: torch.dtype | None = None):
    """The policy of a size and its tokenizer.  Raises ValueError for an unknown size."""
    if size not in SIZES:
        raise ValueError(f"size is {size!r}; allowed: {', '.join(SIZES)}.")
    return models.load_policy("policy" if size == "real" else "tiny", dtype=dtype)


@lru_cache(maxsize=8)
def articles(n: int, size: str = "real") -> list[str]:
    """n real texts of mixed length (Wikipedia leads, cut to 3 to 100 words), or sample prompts."""
    if size == "tiny":
        return [*itertools.islice(itertools.cycle(models.sample_words()[50:90]), n)]
    rows, draw = data.load_wikipedia(), np.random.default_rng(0)
    texts = [rows[int(i)]["text"] for i in draw.integers(0, len(rows), n)]
    return [
        " ".join(t.split()[: int(k)]) for t, k in zip(texts, draw.integers(3, 101, n), strict=True)
    ]


def mixed_prompts(tokenizer, n: int, size: str) -> list[str]:
    """n prompts: half of them beginnings to continue, half questions about a text, in chat form."""
    if size == "tiny":
        return articles(n, size)
    starts = data.load_prompts("realtoxicityprompts", n=n // 2, seed=1)["prompt"]
    asked = [f"{text}\n\nSay in one sentence what this is about." for text in articles(n - n // 2)]
    return [*starts, *data.apply_template(asked, tokenizer, "chat")]


def model_work(model, units: float, seen: float, scored: float, steps: float = 1) -> Work:
    """Least work of a decoder: `seen` tokens through its layers, `scored` through its output layer,
    its weights read `steps` times."""
    head = model.get_output_embeddings().weight
    layers = sum(p.numel() for p in models.decoder_layers(model).parameters())
    weight_bytes = (layers + head.numel()) * head.element_size()
    return Work(units, 2 * (layers * seen + head.numel() * scored), weight_bytes * steps)


# --- sampling ------------------------------------------------------------------------------------


def _generated(model, tokenizer, prompts, n: int, at_once: int, new_tokens: int, **options) -> list:
    """Rows of new token ids by `generate`, cut after the end token, `at_once` prompts a batch."""
    rows, end = [], tokenizer.eos_token_id
    how = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, **options}
    for start in range(0, len(prompts), at_once):
        batch = tokenizer(prompts[start : start + at_once], return_tensors="pt", padding=True)
        inputs = {k: v.to(model.device) for k, v in batch.items() if k != "token_type_ids"}
        with torch.inference_mode():
            found = model.generate(
                **inputs, num_return_sequences=n, max_new_tokens=new_tokens,
                pad_token_id=tokenizer.pad_token_id, **how,
            )  # fmt: skip
        for row in found[:, inputs["input_ids"].shape[1] :].tolist():
            rows.append(row[: row.index(end) + 1] if end in row else row)
    return rows


def sample_benchmark(size: str) -> Benchmark:
    """`generation.sample` and `model.generate`; the peer's batch of 4 prompts is its fastest here."""
    model, tokenizer = load(size)
    prompts = mixed_prompts(tokenizer, 64 if size == "real" else 4, size)
    seen, steps = sum(len(tokenizer(p)["input_ids"]) for p in prompts), NEW_TOKENS

    def work(rows: list) -> Work:
        new = sum(map(len, rows))
        return model_work(model, new, seen + new, new, steps)

    def ours() -> Work:
        how = {"n": SAMPLES, "max_new_tokens": NEW_TOKENS}
        return work(generation.sample(model, tokenizer, prompts, **how).response_ids)

    def peer(at_once: int) -> Work:
        return work(_generated(model, tokenizer, prompts, SAMPLES, at_once, NEW_TOKENS))

    long = sorted((tokenizer(p)["input_ids"] for p in prompts), key=len)[-(len(prompts) // 4) :]
    alike = [ids[: len(long[0])] for ids in long]  # one length: all batches need the same

    def grown(n: int) -> Work:  # few tokens, for time
        more = [*itertools.islice(itertools.cycle(alike), n)]
        found = generation.sample(model, tokenizer, more, n=SAMPLES, max_new_tokens=NEW_TOKENS // 4)
        return Work(len(found))

    what = f"{len(prompts)} prompts x {SAMPLES} samples, up to {NEW_TOKENS} tokens, natural stops"
    sides = {"ours": lambda: ours, "generate, 4 prompts a batch": lambda: partial(peer, 4)}
    few = len(prompts) // 4
    growth = {n: partial(grown, n) for n in (few, 10 * few)}
    return Benchmark("tokens", 2.5, what, sides, model.dtype, growth=growth, grows="prompts")


# --- log-probabilities ---------------------------------------------------------------------------


def _trl_log_probs(model, pad_id: int, prompts, responses, at_once: int) -> list[torch.Tensor]:
    """TRL's pass: prompts padded on the left, responses on the right, `at_once` rows at a time."""
    import trl

    before, before_mask = encoding.pad_rows(prompts, pad_id, "left")
    after, after_mask = encoding.pad_rows(responses, pad_id, "right")
    ids, mask = torch.cat([before, after], 1), torch.cat([before_mask, after_mask], 1)
    stand_in = type("Trainer", (), {})()  # the method reads nothing else of a trainer
    stand_in.accelerator = type("Accelerator", (), {"autocast": contextlib.nullcontext})()
    log_probs = inspect.unwrap(trl.RLOOTrainer._get_per_token_logps_and_entropies)
    with torch.inference_mode():
        found = log_probs(
            stand_in, model, ids.to(model.device), mask.to(model.device), after.shape[1], at_once
        )[0]
    return [row[: len(ids)] for row, ids in zip(found.cpu(), responses, strict=True)]


def logprob_benchmark(size: str) -> Benchmark:
    """`logprobs.token_log_probs` and TRL's log-probability pass (its chunked output layer)."""
    from trl.trainer.utils import add_fused_lm_head

    model, tokenizer = load(size)
    prompts = mixed_prompts(tokenizer, 64 if size == "real" else 4, size)
    prompts = [tokenizer(p)["input_ids"] for p in prompts]
    lengths = np.random.default_rng(1).integers(4, NEW_TOKENS + 1, len(prompts))
    texts = [" ".join(articles(2 * NEW_TOKENS, size)[i:]) for i in range(len(prompts))]
    responses = [tokenizer(t[:500])["input_ids"][:n] for t, n in zip(texts, lengths, strict=True)]
    theirs = copy.deepcopy(model)  # TRL changes the model's forward
    add_fused_lm_head(theirs)
    units = sum(map(len, responses))
    work = model_work(model, units, sum(map(len, prompts)) + units, units)

    def ours() -> Work:
        logprobs.token_log_probs(model, prompts, responses)
        return work

    def peer(at_once: int) -> Work:
        _trl_log_probs(theirs, tokenizer.pad_token_id, prompts, responses, at_once)
        return work

    what = f"{len(prompts)} rows of mixed length, {units:,} response tokens"
    sides = {f"TRL, {n} rows a batch": lambda n=n: partial(peer, n) for n in (8, 64)}
    return Benchmark("tokens", 2.0, what, {"ours": lambda: ours, **sides}, model.dtype)


# --- scoring texts -------------------------------------------------------------------------------


def _classifier(size: str):
    """A sequence classifier on the offline sentence encoder (its head is random), or a tiny one."""
    labels = {"id2label": {0: "fine", 1: "toxic"}, "label2id": {"fine": 0, "toxic": 1}}
    folder = assets.fetch("encoder") if size == "real" else None
    if folder is None:
        tokenizer = models.tiny_tokenizer()
        config = BertConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64, **labels,
        )  # fmt: skip
        return BertForSequenceClassification(config).eval(), tokenizer
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=runtime.inference_dtype(), use_safetensors=True, **labels
    )
    return model.to(runtime.get_device()).eval(), AutoTokenizer.from_pretrained(folder)


def score_benchmark(size: str) -> Benchmark:
    """`ClassifierScorer` and `transformers.pipeline("text-classification", batch_size=32)`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, tokenizer = _classifier(size)
    count, more = (5_000, 100_000) if size == "real" else (40, 800)
    texts, longest = articles(count, size), min(tokenizer.model_max_length, 512)
    scorer = scorers.ClassifierScorer(model, tokenizer, name="bench")
    pipe = pipeline("text-classification", model=model, tokenizer=tokenizer, batch_size=32)
    layers = sum(p.numel() for n, p in model.named_parameters() if "embeddings" not in n)
    tokens = sum(map(len, tokenizer(texts, truncation=True, max_length=longest)["input_ids"]))

    def ours() -> Work:
        scorer.score(texts)
        return Work(count, 2 * layers * tokens)

    def peer() -> Work:
        pipe(texts, truncation=True, max_length=longest)
        return Work(count, 2 * layers * tokens)

    def grown(n: int) -> Work:  # short texts, for time
        scorer.score([text[:24] for text in itertools.islice(itertools.cycle(texts), n)])
        return Work(n)

    what = f"{count:,} texts of mixed length, {tokens / count:.0f} tokens on average"
    sides = {"ours": lambda: ours, "pipeline, 32 texts a batch": lambda: peer}
    growth = {n: partial(grown, n) for n in (more // 20, more)}
    return Benchmark("texts", 3.0, what, sides, model.dtype, growth=growth, grows="texts")


def best_of_n_benchmark(size: str) -> Benchmark:
    """Sample n answers to each prompt and score them; the peer encodes each prompt n times."""
    model, tokenizer = load(size)
    n, count, new_tokens = (64, 2, NEW_TOKENS) if size == "real" else (4, 2, 8)
    prompts = mixed_prompts(tokenizer, 2 * count, size)[-count:]
    scorer = reward_models.RewardModel(copy.deepcopy(model).base_model, tokenizer)
    seen = sum(len(tokenizer(p)["input_ids"]) for p in prompts)

    def work(
        new: int,
    ) -> Work:  # both networks see all tokens; weights read at each step, then once
        return model_work(model, n * count, 2 * (seen + new), new, new_tokens + 1)

    def ours() -> Work:
        drawn = generation.sample(model, tokenizer, prompts, n=n, max_new_tokens=new_tokens)
        scorer.score(drawn.prompts, drawn.texts)
        return work(drawn.tokens)

    @torch.inference_mode()
    def peer() -> Work:
        rows = _generated(model, tokenizer, prompts, n, 1, new_tokens)
        texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
        encoded = scorer.encode([prompt for prompt in prompts for _ in range(n)], texts)
        for start in range(0, len(encoded), 32):
            scorer(**scorer.batch(encoded[start : start + 32])).logits.cpu()
        return work(sum(map(len, rows)))

    def grown(many: int) -> Work:
        drawn = generation.sample(
            model, tokenizer, prompts[:1], n=many, max_new_tokens=new_tokens // 4
        )
        scorer.score(drawn.prompts, drawn.texts)
        return Work(many)

    what = (
        f"{count} prompts x {n} samples of up to {new_tokens} tokens, each scored by a reward model"
    )
    sides = {"ours": lambda: ours, "generate, then 32 rows a batch": lambda: peer}
    growth = {many: partial(grown, many) for many in (2 * n, 20 * n)}
    options = {"growth": growth, "grows": "samples of a prompt"}
    return Benchmark("samples", 3.0, what, sides, model.dtype, **options)


# --- asking an endpoint --------------------------------------------------------------------------


@contextlib.contextmanager
def _endpoint(**options) -> Iterator[str]:
    """The tests' loopback endpoint in a process of its own; gives its address."""
    script = runtime.project_root() / "tests" / "endpoint.py"
    command = [sys.executable, str(script), json.dumps(options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.kill()


def feedback_benchmark(size: str) -> Benchmark:
    """`ChatClient.ask` and one request after another, at an endpoint with a rate limit and faults."""
    count, few, rate, faults = (5_000, 30, 150, 0.3) if size == "real" else (20, 5, 200, 0.0)
    options, numbers = {"rate": rate, "faults": faults, "seed": 0}, itertools.count()

    def ours() -> Thunk:
        def run() -> Work:
            with ready:
                client.ask([feedback.chat(f"text {next(numbers)}") for _ in range(count)])
            return Work(count)

        ready = contextlib.ExitStack()
        folder = ready.enter_context(tempfile.TemporaryDirectory())
        client = feedback.ChatClient(
            "bench", base_url=ready.enter_context(_endpoint(**options)), timeout=2.0,
            first_pause=0.05, concurrency=64, requests_per_second=rate,
            cache=Path(folder) / "replies.sqlite",
        )  # fmt: skip
        return run

    def peer() -> Thunk:
        def run() -> Work:
            with ready:
                for _ in range(few):
                    message = {"role": "user", "content": f"text {next(numbers)}"}
                    while not _answered(chat, message):
                        pass
            return Work(few)

        import openai

        ready = contextlib.ExitStack()
        url = ready.enter_context(_endpoint(**options))
        chat = openai.OpenAI(base_url=url, api_key="none", timeout=2.0, max_retries=20)
        return run

    what = f"{count:,} calls, {faults:.0%} of them fail, limit {rate}/s over good and bad"
    sides = {"ours": ours, f"one after another ({few} calls)": peer}
    return Benchmark("calls", 0.0, what, sides, limit=rate * (1 - faults))


def _answered(chat, message: dict) -> bool:
    """One call of the openai client; malformed answers pass its own tries."""
    try:
        found = chat.chat.completions.create(model="bench", messages=[message])
        return bool(found.choices)
    except (ValueError, LookupError, TypeError, AttributeError):
        return False


# --- reinforcement learning ----------------------------------------------------------------------

EPISODES = {"prompts_per_step": 8, "samples_per_prompt": 2, "max_new_tokens": 32}
UPDATES = {"epochs": 2, "minibatch_size": 8, "train": "lora", "layers": 2}


def _distinct(samples: generation.Samples) -> np.ndarray:
    """A reward that costs nothing: the share of different tokens in each response."""
    return np.array([len(set(ids)) / max(1, len(ids)) for ids in samples.response_ids])


def _rl(size: str, **changes):
    """A function that loads the policy anew, prompts, and the settings both sides use."""
    config = ppo.PPOConfig(steps=1, seed=0, **{**EPISODES, **UPDATES, **changes})
    tokenizer = load(size)[1]
    return partial(load, size), mixed_prompts(tokenizer, 32, size)[:16], config  # beginnings


def _episodes(model, config: ppo.PPOConfig, new: float) -> Work:
    """Least work: every sampled token goes through the network once."""
    units = config.steps * config.batch
    return model_work(model, units, new, new, config.steps * config.max_new_tokens)


def ppo_benchmark(size: str) -> Benchmark:
    """`ppo.train_ppo` and `trl.RLOOTrainer` through `rloo.train_rloo`, without and with checkpointing."""
    fresh, prompts, config = _rl(size)
    checkpointing = {name: True for name in sft.PLAIN if name.endswith("checkpointing")}

    def side(train: Callable, **options) -> Callable[[], Thunk]:
        def make() -> Thunk:
            model, tokenizer = fresh()

            def run() -> Work:
                history = train(model, tokenizer, prompts, _distinct, config, **options)
                return _episodes(model, config, float(history["tokens_sample"].sum()))

            return run

        return make

    what = (
        f"{config.steps} steps of {config.batch} episodes of up to {config.max_new_tokens} tokens, "
        f"{config.epochs * config.batch // config.minibatch_size} updates each, LoRA on 2 layers"
    )
    sides = {
        "ours": side(ppo.train_ppo),
        "TRL, no checkpointing": side(rloo.train_rloo),
        "TRL, no checkpointing, bf16": side(rloo.train_rloo, bf16=True),
        "TRL, its defaults": side(rloo.train_rloo, bf16=None, **checkpointing),
    }
    return Benchmark("episodes", 3.0, what, sides, runtime.inference_dtype())


class _Separate:
    """The arrangement of the papers' code: policy, reference and value model apart, each row sampled to
    its last step, logits of prompt and response kept for policy and reference.  The losses are ours.
    """

    def __init__(self, model, tokenizer, config: ppo.PPOConfig):
        self.tokenizer, self.config = tokenizer, config
        self.reference = copy.deepcopy(model).requires_grad_(False)
        self.value = copy.deepcopy(model).float()
        self.value.set_output_embeddings(torch.nn.Linear(model.config.hidden_size, 1, bias=False))
        self.value.to(model.device)
        models.set_trainable(model, config.train, layers=config.layers, lora_rank=config.lora_rank)
        self.policy = model
        trained = [p for p in [*model.parameters(), *self.value.parameters()] if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=config.learning_rate)

    def step(self, prompts: Sequence[str]) -> float:
        """Sample, score, advantages, updates; returns the response tokens up to the end tokens."""
        config, pad = self.config, self.tokenizer.pad_token_id
        batch = self.tokenizer(prompts, return_tensors="pt", padding=True).to(self.policy.device)
        with torch.no_grad():
            whole = self.policy.generate(
                **batch, num_return_sequences=config.samples_per_prompt, do_sample=True, top_k=0,
                max_new_tokens=config.max_new_tokens, eos_token_id=[], pad_token_id=pad,
            )  # fmt: skip
        width = batch["input_ids"].shape[1]
        seen = batch["attention_mask"].repeat_interleave(config.samples_per_prompt, 0)
        seen = torch.cat([seen, torch.ones_like(whole[:, width:])], 1)
        ends = (whole[:, width:] == self.tokenizer.eos_token_id).long()
        mask = (ends.cumsum(1) - ends == 0).float()
        with torch.no_grad():
            old, values, _ = self.forward(self.policy, whole, seen, width)
            before = self.forward(self.reference, whole, seen, width)[0]
        paid = torch.zeros_like(mask)
        paid[range(len(mask)), mask.sum(1).long() - 1] = mask.sum(1) / mask.shape[1]
        total = paid - config.kl_coef * (old - before)
        advantages, returns = losses.gae(total, values, mask, config.gamma, config.lam)
        rows = (whole, seen, mask, old, values, losses.whiten(advantages, mask), returns)
        for _ in range(config.epochs):
            for index in torch.randperm(len(mask)).split(config.minibatch_size):
                self.update(width, *(x[index] for x in rows))
        return float(mask.sum())

    def forward(self, model, whole, seen, width: int):
        """Log-probabilities and values of the response tokens, and all logits."""
        inputs = {"input_ids": whole, "attention_mask": seen, "use_cache": False}
        logits = model(**inputs).logits.float()
        log_probs = logits[:, :-1].log_softmax(-1).gather(-1, whole[:, 1:, None])[..., 0]
        values = self.value(**inputs).logits[:, width - 1 : -1, 0]
        return log_probs[:, width - 1 :], values, logits

    def update(self, width, whole, seen, mask, old, old_values, advantages, returns) -> None:
        """One optimizer step."""
        log_probs, values, _ = self.forward(self.policy, whole, seen, width)
        loss = losses.policy_loss(log_probs, old, advantages, mask, self.config.clip)
        loss = loss + losses.value_loss(values, old_values, returns, mask, self.config.value_clip)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def ppo_reference_benchmark(size: str) -> Benchmark:
    """`ppo.train_ppo` and the arrangement of the papers' code (`_Separate`), on the same settings."""
    fresh, prompts, config = _rl(size, train="top", samples_per_prompt=1, prompts_per_step=16)

    def ours() -> Thunk:
        def run() -> Work:
            history = ppo.train_ppo(model, tokenizer, prompts, _distinct, config)
            return _episodes(model, config, float(history["tokens_sample"].sum()))

        model, tokenizer = fresh()
        return run

    def peer() -> Thunk:
        def run() -> Work:
            chosen = prompts[: config.prompts_per_step]
            new = sum(arrangement.step(chosen) for _ in range(config.steps))
            return _episodes(arrangement.policy, config, new)

        arrangement = _Separate(*fresh(), config)
        return run

    what = (
        f"{config.steps} steps of {config.batch} episodes of up to {config.max_new_tokens} tokens"
    )
    sides = {"ours": ours, "separate models": peer}
    return Benchmark("episodes", 3.0, what, sides, runtime.inference_dtype())


# --- the command ---------------------------------------------------------------------------------

BENCHMARKS: dict[str, Callable[[str], Benchmark]] = {
    "sample": sample_benchmark,
    "logprob": logprob_benchmark,
    "score": score_benchmark,
    "ppo": ppo_benchmark,
    "ppo-reference": ppo_reference_benchmark,
    "best-of-n": best_of_n_benchmark,
    "feedback": feedback_benchmark,
}


def course_table() -> str:
    """Markdown: wall time and peak memory of each notebook's last finished run at demo scale."""
    lines = ["| notebook | time | memory | device |", "|---|---|---|---|"]
    for path in sorted((runtime.project_root() / "runs" / "demo").glob("*/run.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        if run["status"] == "finished":
            spent, peak = run["wall_seconds"] / 60, run["peak_memory_bytes"] / 1e9
            device = f"{run['device']}, {run['cpu_count']} cores"
            lines.append(f"| {run['notebook']} | {spent:.1f} min | {peak:.1f} GB | {device} |")
    return "\n".join(lines)


def speed_table(records: Sequence[dict]) -> str:
    """Markdown: ours beside each peer."""
    lines = ["| benchmark | beside | times as fast [least, most] | memory added, ours / theirs |"]
    lines += ["|---|---|---|---|"]
    for record in records:
        ours, *peers = summary(record).itertuples()
        for peer in peers:
            ratio = f"{peer.ratio:.1f} [{peer.low:.1f}, {peer.high:.1f}]"
            memory = f"{ours.memory / 1e6:.0f} / {peer.memory / 1e6:.0f} MB"
            lines.append(f"| `{record['name']}` | {peer.side} | {ratio} | {memory} |")
    return "\n".join(lines)


def figure(records: Sequence[dict]):
    """Ours over each peer, median and range over rounds, of kept records."""
    rows = pd.concat([summary(record) for record in records])
    rows = rows[rows["side"] != "ours"]
    table = rows.assign(group=rows["benchmark"] + ": " + rows["side"], value=rows["ratio"])
    table = table.assign(condition="ours / peer, useful units per second")
    title = f"Speed beside what a reader would use instead, {records[0]['device']}"
    return plots.interval_plot(table, xlabel="times as fast", title=title, reference=1)


def kept() -> list[dict]:
    """The records in `data/results/bench/`, in the order of `BENCHMARKS`."""
    folder = runtime.project_root() / "data" / "results" / "bench"
    paths = [folder / f"{name}.json" for name in BENCHMARKS]
    return [json.loads(p.read_text(encoding="utf-8")) for p in paths if p.exists()]


def run(
    names: Sequence[str], kept_in: str | None = None, *, rounds=ROUNDS, size="real"
) -> list[dict]:
    """Measure the benchmarks named (all if none), print each, and keep the records where asked.

    `course` prints `course_table`, `table` the `speed_table` of the kept results, and `figure` draws them
    into `plots/`.  Raises ValueError for other names.
    """
    commands = {"course": lambda: print(course_table()), "figure": _draw}
    commands["table"] = lambda: print(speed_table(kept()))
    if unknown := [name for name in names if name not in {**BENCHMARKS, **commands}]:
        allowed = ", ".join([*BENCHMARKS, *commands])
        raise ValueError(f"unknown benchmark {', '.join(unknown)}; allowed: {allowed}.")
    records = []
    for name in names or BENCHMARKS:
        if name in commands:
            commands[name]()
            continue
        records.append(_apart(name, size, rounds))
        print(to_text(records[-1]), flush=True)
        if kept_in and Path(kept_in).is_dir():
            runtime.write_atomic(Path(kept_in) / f"{name}.json", runtime.to_json(records[-1]))
        elif kept_in:
            runtime.write_atomic(kept_in, runtime.to_json(records))
    return records


def _apart(name: str, size: str, rounds: int) -> dict:
    """`measure` in a process of its own: what one benchmark leaves in the heap would count in the memory
    of the next (seen: 272 MB in place of 85)."""
    start = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=start) as process:
        return process.submit(_made, name, size, rounds).result()


def _made(name: str, size: str, rounds: int) -> dict:
    runtime.quiet_libraries()
    return measure(name, BENCHMARKS[name](size), rounds)


def _draw() -> None:
    drawn, folder = figure(kept()), runtime.project_root() / "plots"
    for kind, metadata_ in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        drawn.savefig(
            folder / f"bench_speed.{kind}", dpi=120, bbox_inches="tight", metadata=metadata_
        )
    print(f"Figure: {folder / 'bench_speed.png'}")
