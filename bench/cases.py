"""The benchmarks: inputs, our side and its peers, on the same model, inputs and dtype."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    pipeline,
)

from bench import measure, trl_rloo
from lib import (
    chat,
    data,
    encoding,
    generation,
    logprobs,
    losses,
    models,
    ppo,
    questions,
    reward_models,
    runtime,
    scorers,
    sft,
)
from lib.course import assets

# "quick": the same models on fewer rows; "tiny": random models and few rows, to test the machinery
SIZES = ("real", "quick", "tiny")
SAMPLES, NEW_TOKENS = 8, 48


# --- inputs --------------------------------------------------------------------------------------


def load(size: str, dtype: torch.dtype | None = None):
    """The policy of a size and its tokenizer.  Raises ValueError for an unknown size."""
    if size not in SIZES:
        raise ValueError(f"size is {size!r}; allowed: {', '.join(SIZES)}.")
    return models.load_policy("tiny" if size == "tiny" else "policy", dtype=dtype)


def count_for(size: str, real: int, quick: int, tiny: int) -> int:
    """How many rows a benchmark has at this size."""
    return dict(zip(SIZES, (real, quick, tiny), strict=True))[size]


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


def model_work(model, units: float, seen: float, scored: float, steps: float = 1) -> measure.Work:
    """Least work of a decoder: `seen` tokens through its layers, `scored` through its output layer,
    its weights read `steps` times."""
    head = model.get_output_embeddings().weight
    layers = sum(p.numel() for p in models.decoder_layers(model).parameters())
    weight_bytes = (layers + head.numel()) * head.element_size()
    return measure.Work(units, 2 * (layers * seen + head.numel() * scored), weight_bytes * steps)


# --- sampling ------------------------------------------------------------------------------------


def _generated(model, tokenizer, prompts, n: int, at_once: int, new_tokens: int, **options) -> list:
    """Rows of new token ids by `generate`, cut after the end token, `at_once` prompts a batch."""
    rows, ends = [], encoding.end_tokens(tokenizer, model)
    decoding = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, **options}
    for start in range(0, len(prompts), at_once):
        batch = tokenizer(prompts[start : start + at_once], return_tensors="pt", padding=True)
        inputs = {k: v.to(model.device) for k, v in batch.items() if k != "token_type_ids"}
        with torch.inference_mode():
            tokens = model.generate(
                **inputs,
                num_return_sequences=n,
                max_new_tokens=new_tokens,
                pad_token_id=encoding.pad_id(tokenizer),
                **decoding,
            )
        for row in tokens[:, inputs["input_ids"].shape[1] :].tolist():
            last = next((i for i, token in enumerate(row) if token in ends), len(row))
            rows.append(row[: last + 1])
    return rows


def sample_benchmark(size: str) -> measure.Benchmark:
    """`generation.sample` and `model.generate`; the peer's batch of 4 prompts is its fastest here."""
    model, tokenizer = load(size)
    prompts = mixed_prompts(tokenizer, count_for(size, 64, 12, 4), size)
    seen, steps = sum(len(tokenizer(p)["input_ids"]) for p in prompts), NEW_TOKENS

    def work(rows: list) -> measure.Work:
        new = sum(map(len, rows))
        return model_work(model, new, seen + new, new, steps)

    def ours() -> measure.Work:
        options = {"n": SAMPLES, "max_new_tokens": NEW_TOKENS}
        return work(generation.sample(model, tokenizer, prompts, **options).response_ids)

    def peer(at_once: int) -> measure.Work:
        return work(_generated(model, tokenizer, prompts, SAMPLES, at_once, NEW_TOKENS))

    long = sorted((tokenizer(p)["input_ids"] for p in prompts), key=len)[-(len(prompts) // 4) :]
    alike = [ids[: len(long[0])] for ids in long]  # one length: all batches need the same

    def grown(n: int) -> measure.Work:  # few tokens, for time
        more = [*itertools.islice(itertools.cycle(alike), n)]
        drawn = generation.sample(model, tokenizer, more, n=SAMPLES, max_new_tokens=NEW_TOKENS // 4)
        return measure.Work(len(drawn))

    what = f"{len(prompts)} prompts x {SAMPLES} samples, up to {NEW_TOKENS} tokens, natural stops"
    sides = {"ours": lambda: ours, "generate, 4 prompts a batch": lambda: partial(peer, 4)}
    few = len(prompts) // 4
    growth = {n: partial(grown, n) for n in (few, 10 * few)}
    return measure.Benchmark(
        "tokens", 2.5, what, sides, model.dtype, growth=growth, grows="prompts"
    )


# --- log-probabilities ---------------------------------------------------------------------------


def _trl_log_probs(model, pad_id: int, prompts, responses, at_once: int) -> list[torch.Tensor]:
    """TRL's pass: prompts padded on the left, responses on the right, `at_once` rows at a time."""
    import trl

    before, before_mask = encoding.pad_rows(prompts, pad_id, "left")
    after, after_mask = encoding.pad_rows(responses, pad_id, "right")
    ids, mask = torch.cat([before, after], 1), torch.cat([before_mask, after_mask], 1)
    stand_in = type("Trainer", (), {})()  # the method reads nothing else of a trainer
    stand_in.accelerator = type("Accelerator", (), {"autocast": contextlib.nullcontext})()
    read = inspect.unwrap(trl.RLOOTrainer._get_per_token_logps_and_entropies)
    with torch.inference_mode():
        log_probs = read(
            stand_in, model, ids.to(model.device), mask.to(model.device), after.shape[1], at_once
        )[0]
    return [row[: len(ids)] for row, ids in zip(log_probs.cpu(), responses, strict=True)]


def logprob_benchmark(size: str) -> measure.Benchmark:
    """`logprobs.token_log_probs` and TRL's log-probability pass (its chunked output layer)."""
    from trl.trainer.utils import add_fused_lm_head

    model, tokenizer = load(size)
    prompts = mixed_prompts(tokenizer, count_for(size, 64, 24, 4), size)
    prompts = [tokenizer(p)["input_ids"] for p in prompts]
    lengths = np.random.default_rng(1).integers(4, NEW_TOKENS + 1, len(prompts))
    texts = [" ".join(articles(2 * NEW_TOKENS, size)[i:]) for i in range(len(prompts))]
    responses = [tokenizer(t[:500])["input_ids"][:n] for t, n in zip(texts, lengths, strict=True)]
    theirs = copy.deepcopy(model)  # TRL changes the model's forward
    add_fused_lm_head(theirs)
    units = sum(map(len, responses))
    work = model_work(model, units, sum(map(len, prompts)) + units, units)

    def ours() -> measure.Work:
        logprobs.token_log_probs(model, prompts, responses)
        return work

    def peer(at_once: int) -> measure.Work:
        _trl_log_probs(theirs, encoding.pad_id(tokenizer), prompts, responses, at_once)
        return work

    what = f"{len(prompts)} rows of mixed length, {units:,} response tokens"
    batches = (8,) if size == "quick" else (8, 64)
    sides = {f"TRL, {n} rows a batch": lambda n=n: partial(peer, n) for n in batches}
    return measure.Benchmark("tokens", 2.0, what, {"ours": lambda: ours, **sides}, model.dtype)


# --- questions about texts -----------------------------------------------------------------------

STATEMENTS = (
    "It is a city.",
    "It began more than a hundred years ago.",
    "It is known all over the world.",
    "A person made it.",
    "It has something to do with water.",
)


def _support_prompts(tokenizer, n: int, size: str) -> list[str]:
    """Five questions about each of n texts of about 150 tokens, as a local annotator asks them."""
    texts = []
    for text in articles(20 * n, size):
        ids = encoding.bare_ids(tokenizer, f"{text} " * (1 + 150 // max(1, len(text.split()))))
        texts.append(tokenizer.decode(ids[:150]))
    asked = [questions.support_question(text, s) for text in texts[:n] for s in STATEMENTS]
    whole = [question.shared + question.rest for question in asked]
    return data.apply_template(whole, tokenizer, "chat+system", system=questions.CHECKER)


def judge_benchmark(size: str) -> measure.Benchmark:
    """`logprobs.answer_log_probs` as the annotator calls it, and one forward pass a prompt."""
    spellings = [word for option in questions.YES_NO for word in option]
    if size == "real":
        model, tokenizer = models.load_policy("qwen-0.5b")
    else:
        load(size)  # refuses unknown sizes
        model, tokenizer = models.build_tiny_model(
            words=sorted({*models.sample_words(), *spellings})
        )
    prompts = _support_prompts(tokenizer, 12 if size == "real" else 2, size)
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    seen = 0
    for first in range(0, len(rows), len(STATEMENTS)):
        about = rows[first : first + len(STATEMENTS)]
        shared = encoding.count_shared(about)
        seen += shared + sum(len(ids) - shared for ids in about)
    work = model_work(model, len(rows), seen, len(rows))

    def ours() -> measure.Work:
        logprobs.answer_log_probs(model, tokenizer, prompts, spellings, 4096)
        return work

    def peer() -> measure.Work:
        for ids in rows:
            shown = torch.tensor([ids], device=model.device)
            with torch.inference_mode():
                model(shown, logits_to_keep=1, use_cache=False).logits[0, -1].float().log_softmax(
                    -1
                )
        return work

    what = f"{len(rows)} questions, {len(STATEMENTS)} about each text of 150 tokens"
    sides = {"ours": lambda: ours, "one prompt at a time": lambda: peer}
    return measure.Benchmark("questions", 2.2, what, sides, model.dtype)


# --- scoring texts -------------------------------------------------------------------------------


def _classifier(size: str):
    """A sequence classifier on the offline sentence encoder (its head is random), or a tiny one."""
    labels = {"id2label": {0: "fine", 1: "toxic"}, "label2id": {"fine": 0, "toxic": 1}}
    folder = None if size == "tiny" else assets.fetch("encoder")
    if folder is None:
        tokenizer = models.tiny_tokenizer()
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            **labels,
        )
        return BertForSequenceClassification(config).eval(), tokenizer
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=runtime.inference_dtype(), use_safetensors=True, **labels
    )
    return model.to(runtime.get_device()).eval(), AutoTokenizer.from_pretrained(folder)


def score_benchmark(size: str) -> measure.Benchmark:
    """`ClassifierScorer` and `transformers.pipeline("text-classification", batch_size=32)`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, tokenizer = _classifier(size)
    count = count_for(size, 5_000, 1_000, 40)
    more = 20 * count
    texts = articles(count, size)
    longest = min(tokenizer.model_max_length, 512)
    scorer = scorers.ClassifierScorer(model, tokenizer, name="bench")
    pipe = pipeline("text-classification", model=model, tokenizer=tokenizer, batch_size=32)
    layers = sum(p.numel() for n, p in model.named_parameters() if "embeddings" not in n)
    tokens = sum(map(len, tokenizer(texts, truncation=True, max_length=longest)["input_ids"]))

    def ours() -> measure.Work:
        scorer.score(texts)
        return measure.Work(count, 2 * layers * tokens)

    def peer() -> measure.Work:
        pipe(texts, truncation=True, max_length=longest)
        return measure.Work(count, 2 * layers * tokens)

    def grown(n: int) -> measure.Work:  # short texts, for time
        scorer.score([text[:24] for text in itertools.islice(itertools.cycle(texts), n)])
        return measure.Work(n)

    what = f"{count:,} texts of mixed length, {tokens / count:.0f} tokens on average"
    sides = {"ours": lambda: ours, "pipeline, 32 texts a batch": lambda: peer}
    growth = {n: partial(grown, n) for n in (more // 20, more)}
    return measure.Benchmark("texts", 3.0, what, sides, model.dtype, growth=growth, grows="texts")


def best_of_n_benchmark(size: str) -> measure.Benchmark:
    """Sample n answers to each prompt and score them; the peer encodes each prompt n times."""
    model, tokenizer = load(size)
    n = count_for(size, 64, 64, 4)
    count = count_for(size, 2, 1, 2)
    new_tokens = count_for(size, NEW_TOKENS, NEW_TOKENS, 8)
    prompts = mixed_prompts(tokenizer, 2 * count, size)[-count:]
    scorer = reward_models.RewardModel(copy.deepcopy(model).base_model, tokenizer)
    seen = sum(len(tokenizer(p)["input_ids"]) for p in prompts)

    def work(
        new: int,
    ) -> measure.Work:  # both networks see all tokens; weights read at each step, then once
        return model_work(model, n * count, 2 * (seen + new), new, new_tokens + 1)

    def ours() -> measure.Work:
        drawn = generation.sample(model, tokenizer, prompts, n=n, max_new_tokens=new_tokens)
        scorer.score(drawn.prompts, drawn.texts)
        return work(drawn.tokens)

    @torch.inference_mode()
    def peer() -> measure.Work:
        rows = _generated(model, tokenizer, prompts, n, 1, new_tokens)
        texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
        encoded = scorer.encode([prompt for prompt in prompts for _ in range(n)], texts)
        for start in range(0, len(encoded), 32):
            scorer(**scorer.batch(encoded[start : start + 32])).logits.cpu()
        return work(sum(map(len, rows)))

    def grown(many: int) -> measure.Work:
        drawn = generation.sample(
            model, tokenizer, prompts[:1], n=many, max_new_tokens=new_tokens // 4
        )
        scorer.score(drawn.prompts, drawn.texts)
        return measure.Work(many)

    what = (
        f"{count} prompts x {n} samples of up to {new_tokens} tokens, each scored by a reward model"
    )
    sides = {"ours": lambda: ours, "generate, then 32 rows a batch": lambda: peer}
    growth = {many: partial(grown, many) for many in (2 * n, 20 * n)}
    options = {"growth": growth, "grows": "samples of a prompt"}
    return measure.Benchmark("samples", 3.0, what, sides, model.dtype, **options)


# --- asking an endpoint --------------------------------------------------------------------------


@contextlib.contextmanager
def _endpoint(**options) -> Iterator[str]:
    """A loopback endpoint in a process of its own; gives its address."""
    script = Path(__file__).with_name("endpoint.py")
    command = [sys.executable, str(script), json.dumps(options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.kill()


def feedback_benchmark(size: str) -> measure.Benchmark:
    """`ChatClient.ask` and one request after another, at an endpoint with a rate limit and faults."""
    count = count_for(size, 5_000, 600, 20)
    few = count_for(size, 30, 10, 5)
    rate, faults = (200, 0.0) if size == "tiny" else (150, 0.3)
    options, numbers = {"rate": rate, "faults": faults, "seed": 0}, itertools.count()

    def ours() -> measure.Thunk:
        def run() -> measure.Work:
            with ready:
                client.ask([chat.chat(f"text {next(numbers)}") for _ in range(count)])
            return measure.Work(count)

        ready = contextlib.ExitStack()
        folder = ready.enter_context(tempfile.TemporaryDirectory())
        client = chat.ChatClient(
            "bench",
            base_url=ready.enter_context(_endpoint(**options)),
            timeout=2.0,
            first_pause=0.05,
            concurrency=64,
            requests_per_second=rate,
            cache=Path(folder) / "replies.sqlite",
        )
        return run

    def peer() -> measure.Thunk:
        def run() -> measure.Work:
            with ready:
                for _ in range(few):
                    message = {"role": "user", "content": f"text {next(numbers)}"}
                    while not _answered(endpoint, message):
                        pass
            return measure.Work(few)

        import openai

        ready = contextlib.ExitStack()
        url = ready.enter_context(_endpoint(**options))
        endpoint = openai.OpenAI(base_url=url, api_key="none", timeout=2.0, max_retries=20)
        return run

    what = f"{count:,} calls, {faults:.0%} of them fail, limit {rate}/s over good and bad"
    sides = {"ours": ours, f"one after another ({few} calls)": peer}
    return measure.Benchmark("calls", 0.0, what, sides, limit=rate * (1 - faults))


def _answered(endpoint, message: dict) -> bool:
    """One call of the openai client; malformed answers pass its own tries."""
    try:
        answer = endpoint.chat.completions.create(model="bench", messages=[message])
        return bool(answer.choices)
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


def _episodes(model, config: ppo.PPOConfig, new: float) -> measure.Work:
    """Least work: every sampled token goes through the network once."""
    units = config.steps * config.batch
    return model_work(model, units, new, new, config.steps * config.max_new_tokens)


def ppo_benchmark(size: str) -> measure.Benchmark:
    """`ppo.train_ppo` and `trl.RLOOTrainer` (`trl_rloo`), without and with checkpointing."""
    fresh, prompts, config = _rl(size)
    checkpointing = {name: True for name in sft.PLAIN if name.endswith("checkpointing")}

    def side(train: Callable, **options) -> Callable[[], measure.Thunk]:
        def make() -> measure.Thunk:
            model, tokenizer = fresh()

            def run() -> measure.Work:
                history = train(model, tokenizer, prompts, _distinct, config, **options)
                return _episodes(model, config, float(history["tokens_sample"].sum()))

            return run

        return make

    what = (
        f"{config.steps} steps of {config.batch} episodes of up to {config.max_new_tokens} tokens, "
        f"{config.epochs * config.batch // config.minibatch_size} updates each, LoRA on 2 layers"
    )
    dtype = runtime.inference_dtype()
    fastest = "bf16" if dtype == torch.bfloat16 else "float32"
    peers = {
        "float32": {"TRL, no checkpointing": side(trl_rloo.train_rloo)},
        "bf16": {"TRL, no checkpointing, bf16": side(trl_rloo.train_rloo, bf16=True)},
        "defaults": {"TRL, its defaults": side(trl_rloo.train_rloo, bf16=None, **checkpointing)},
    }
    sides = {"ours": side(ppo.train_ppo)}
    for name in [fastest] if size == "quick" else peers:
        sides |= peers[name]
    return measure.Benchmark("episodes", 3.0, what, sides, dtype)


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
        config, pad = self.config, encoding.pad_id(self.tokenizer)
        batch = self.tokenizer(prompts, return_tensors="pt", padding=True).to(self.policy.device)
        with torch.no_grad():
            whole = self.policy.generate(
                **batch,
                num_return_sequences=config.samples_per_prompt,
                do_sample=True,
                top_k=0,
                max_new_tokens=config.max_new_tokens,
                eos_token_id=[],
                pad_token_id=pad,
            )
        width = batch["input_ids"].shape[1]
        seen = batch["attention_mask"].repeat_interleave(config.samples_per_prompt, 0)
        seen = torch.cat([seen, torch.ones_like(whole[:, width:])], 1)
        ends = encoding.end_tokens(self.tokenizer, self.policy)
        ended = torch.isin(whole[:, width:], torch.tensor(ends, device=whole.device)).long()
        mask = (ended.cumsum(1) - ended == 0).float()
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


def ppo_reference_benchmark(size: str) -> measure.Benchmark:
    """`ppo.train_ppo` and the arrangement of the papers' code (`_Separate`), on the same settings."""
    episodes = count_for(size, 16, 8, 16)
    fresh, prompts, config = _rl(size, train="top", samples_per_prompt=1, prompts_per_step=episodes)

    def ours() -> measure.Thunk:
        def run() -> measure.Work:
            history = ppo.train_ppo(model, tokenizer, prompts, _distinct, config)
            return _episodes(model, config, float(history["tokens_sample"].sum()))

        model, tokenizer = fresh()
        return run

    def peer() -> measure.Thunk:
        def run() -> measure.Work:
            chosen = prompts[: config.prompts_per_step]
            new = sum(arrangement.step(chosen) for _ in range(config.steps))
            return _episodes(arrangement.policy, config, new)

        arrangement = _Separate(*fresh(), config)
        return run

    what = (
        f"{config.steps} steps of {config.batch} episodes of up to {config.max_new_tokens} tokens"
    )
    sides = {"ours": ours, "separate models": peer}
    return measure.Benchmark("episodes", 3.0, what, sides, runtime.inference_dtype())


# --- the command ---------------------------------------------------------------------------------

BENCHMARKS: dict[str, Callable[[str], measure.Benchmark]] = {
    "sample": sample_benchmark,
    "logprob": logprob_benchmark,
    "judge": judge_benchmark,
    "score": score_benchmark,
    "ppo": ppo_benchmark,
    "ppo-reference": ppo_reference_benchmark,
    "best-of-n": best_of_n_benchmark,
    "feedback": feedback_benchmark,
}
WITH_GOAL = [name for name in BENCHMARKS if name != "feedback"]  # its rate is the server's limit
WITH_GROWTH = ["sample", "score", "best-of-n"]
