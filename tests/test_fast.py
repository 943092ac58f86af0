"""Speed changes no number: each trick of `lib.fast` beside the plain way, and `lib` without the file."""

import copy
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_texts, tiny_classifier
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from lib import fast, generation, losses, models, scorers
from lib.generation import Decoding, sample

ROOT = Path(__file__).parents[1]
PROMPTS = ["the cat", "a dog sat on", "you are", "stupid idiot ran on the mat . you"]


# --- without the file ------------------------------------------------------------------------------

WORK = """
import json
from conftest import random_texts, tiny_classifier
from lib import generation, logprobs, models, ppo, reward_models, runtime, scorers, sft

words = "the a cat dog sat ran on mat you are nice kind stupid idiot .".split()
model, tokenizer = models.build_tiny_model("tiny", words=words)
prompts = ["the cat", "a dog sat on", "you are", "stupid idiot ran on the mat . you"]
results = {"fast": runtime.fast_module() is not None}
for name, how in (("plain", {}), ("top-p", {"top_p": 0.9}), ("cold", {"temperature": 0.5})):
    drawn = generation.sample(model, tokenizer, prompts, n=6, max_new_tokens=12, seed=1, **how)
    results[name] = [drawn.response_ids, [x.tolist() for x in drawn.log_probs]]
scores = logprobs.token_log_probs(model, drawn.prompt_ids, drawn.response_ids)
results["log p"] = [row.tolist() for row in scores]
judge = reward_models.RewardModel(model.model, tokenizer)
results["features"] = judge.features(drawn.prompts, drawn.texts).tolist()
scorer = scorers.ClassifierScorer(*tiny_classifier(), name="tiny")
scorer.TOKENS_PER_BATCH = {"cpu": 200}
results["classifier"] = scorer.score(random_texts(60, 50)).tolist()
rows = sft.encode_completions(tokenizer, prompts, ["nice .", "kind", "the cat", "."])
results["sft"] = sft.train_sft(model, tokenizer, rows, max_steps=2)["loss"].tolist()
reward = lambda samples: [float(len(set(ids))) for ids in samples.response_ids]
config = ppo.PPOConfig(steps=2, prompts_per_step=4, minibatch_size=2, max_new_tokens=6, epochs=2)
history = ppo.train_ppo(model, tokenizer, prompts, reward, config)
clocks = [name for name in history if name.startswith("seconds")]
results["ppo"] = history.drop(columns=clocks).astype(float).to_numpy().tolist()
print(json.dumps(results))
"""


def results_here(capsys) -> dict:
    """What `WORK` gives in this process."""
    exec(WORK, {})
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def results_without_the_file(folder: Path) -> dict:
    """What `WORK` gives in a copy of the library that has no fast.py."""
    shutil.copytree(ROOT / "lib", folder / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "lib" / "fast.py").unlink()
    environment = dict(os.environ, FEEDBACK_ROOT=str(ROOT))
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (folder, ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, "-c", WORK], env=environment, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def close(ours, theirs, tolerance: float) -> bool:
    if isinstance(ours, list):
        same_length = len(ours) == len(theirs)
        return same_length and all(
            close(a, b, tolerance) for a, b in zip(ours, theirs, strict=True)
        )
    return ours == pytest.approx(theirs, rel=tolerance, abs=tolerance, nan_ok=True)


def test_without_the_file_all_results_stay(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fast, "FIRST_CANDIDATES", 5)
    monkeypatch.setattr(fast, "LARGE", 1)
    with_it = results_here(capsys)
    monkeypatch.setenv("LIB_PLAIN", "1")
    switched_off = results_here(capsys)
    without = results_without_the_file(tmp_path)
    assert [r.pop("fast") for r in (with_it, switched_off, without)] == [True, False, False]
    for name, numbers in without.items():
        assert close(switched_off[name], numbers, 1e-6), name
        assert close(with_it[name], numbers, 1e-3), name


def test_every_marked_function_has_a_namesake_and_nobody_else_imports_the_file():
    marked = []
    for path in sorted((ROOT / "lib").rglob("*.py")):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert path.name == "fast.py" or not any("import fast" in line for line in lines), path
        for i, line in enumerate(lines):
            if line.strip() == "@runtime.accelerated":
                named = next(x for x in lines[i:] if x.startswith("def "))
                marked.append(named.removeprefix("def ").partition("(")[0])
    assert len(marked) >= 5
    assert [name for name in marked if not callable(getattr(fast, name, None))] == []


# --- weights ---------------------------------------------------------------------------------------


def test_sampling_takes_the_trunks_dtype_and_gives_the_weights_back(tiny, monkeypatch):
    model = copy.deepcopy(tiny[0]).to(torch.bfloat16)
    models.set_trainable(model, "top", layers=1)
    output, seen = model.get_output_embeddings(), []
    output.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    values = [p.detach().clone() for p in model.parameters()]
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])

    def logits():
        with torch.inference_mode():
            return model(input_ids=ids, logits_to_keep=1).logits

    plain = logits()
    with models.for_sampling(model):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        fast = logits()
    assert seen == [torch.float32, torch.bfloat16]
    bound = 2**-7 * plain.abs().max()  # two roundings of bfloat16
    torch.testing.assert_close(fast.float(), plain, atol=float(bound), rtol=0)
    assert before == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert all(map(torch.equal, values, model.parameters()))
    with pytest.raises(RuntimeError, match="in between"), models.for_sampling(model):
        raise RuntimeError("in between")
    assert all(map(torch.equal, values, model.parameters()))
    monkeypatch.setenv("LIB_PLAIN", "1")
    with models.for_sampling(model):
        assert torch.equal(logits(), plain)


def test_packed_weights_give_the_same_numbers(tiny, monkeypatch):
    model = copy.deepcopy(tiny[0]).to(torch.bfloat16)
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])

    def packed():
        return sum("forward" in vars(module) for module in linear)

    with torch.inference_mode():
        plain = model(input_ids=ids).logits
        with fast.packed(model):
            usable = torch.ops.mkldnn._is_mkldnn_bf16_supported()
            assert packed() == (len(linear) if usable else 0)
            assert torch.equal(model(input_ids=ids).logits, plain)
            with fast.packed(model):
                pass  # an inner one takes nothing away
            assert packed() == (len(linear) if usable else 0)
    assert packed() == 0
    with pytest.raises(RuntimeError, match="in between"), fast.packed(model):
        raise RuntimeError("in between")
    assert packed() == 0
    with monkeypatch.context() as without:  # a build of torch without oneDNN
        without.setattr(torch.ops, "mkldnn", object())
        with fast.packed(model):
            assert packed() == 0
    high = copy.deepcopy(model).float()
    with fast.packed(high):
        assert not any("forward" in vars(m) for m in high.modules())
    monkeypatch.setattr(fast, "PACKED_BYTES", 100)
    with fast.packed(model):
        assert packed() == 0


def test_fast_float32_is_float32(monkeypatch):
    wide = torch.nn.Sequential(torch.nn.Linear(300, 600), torch.nn.GELU(), torch.nn.Linear(600, 7))
    inputs, found = torch.randn(50, 300), {}
    for plain in ("0", "1"):
        monkeypatch.setenv("LIB_PLAIN", plain)
        wide.zero_grad()
        with models.fast_float32(wide):
            used = torch.get_float32_matmul_precision()
            out = wide(inputs)
            out.square().sum().backward()
        assert used == ("medium" if plain == "0" and fast.medium_is_exact() else "highest")
        assert torch.get_float32_matmul_precision() == "highest"
        found[plain] = [out.detach(), *(p.grad.clone() for p in wide.parameters())]
    for quick, slow in zip(found["0"], found["1"], strict=True):
        torch.testing.assert_close(quick, slow, rtol=1e-5, atol=1e-5 * float(slow.abs().max()))


def test_fast_float32_leaves_small_models_and_ends_with_an_error(monkeypatch):
    monkeypatch.setattr(fast, "medium_is_exact", lambda: True)
    with models.fast_float32(models.build_tiny_model("tiny")[0]):
        assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(KeyError), models.fast_float32(torch.nn.Linear(400, 400)):
        assert torch.get_float32_matmul_precision() == "medium"
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"


def test_asking_for_the_precision_draws_no_random_number():
    fast.medium_is_exact.cache_clear()
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    assert fast.medium_is_exact() in (True, False) and torch.rand(1) == wanted


# --- sampling --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*fast.SHARED_PROMPT, "gpt2"])
def test_prompts_stored_once_in_every_architecture(kind, tiny, monkeypatch):
    """Fast path, rows dropped on the way, and plain one give the same; gpt2 has no fast one."""
    _, tokenizer = tiny
    sizes = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=len(tokenizer)
    )
    if kind != "gpt2":
        sizes |= dict(num_key_value_heads=2, intermediate_size=48, head_dim=8, sliding_window=None)
    torch.manual_seed(0)
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    config = AutoConfig.for_model(kind, **sizes, **ends)
    model = AutoModelForCausalLM.from_config(config).eval()
    used, attend = [], fast._shared_attention
    monkeypatch.setitem(
        AttentionInterface._global_mapping, "shared_prompt",
        lambda *args, **kwargs: used.append(len(args[1])) or attend(*args, **kwargs),
    )  # fmt: skip
    before = config._attn_implementation
    drawn = sample(model, tokenizer, PROMPTS, n=6, max_new_tokens=40, seed=1)
    assert bool(used) == (kind != "gpt2") and model.config._attn_implementation == before
    assert not used or len(set(used)) > 1, "no row was dropped"
    monkeypatch.setenv("LIB_PLAIN", "1")
    plain = sample(model, tokenizer, PROMPTS, n=6, max_new_tokens=40, seed=1)
    assert drawn.response_ids == plain.response_ids
    for ours, theirs in zip(drawn.model_log_probs, plain.model_log_probs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("filters", [{"top_p": 0.9}, {"top_k": 50, "top_p": 0.8}, {"top_k": 1500}])
def test_wide_and_narrow_nuclei_are_drawn_alike(spread, filters, monkeypatch):
    monkeypatch.setattr(fast, "FIRST_CANDIDATES", 500)
    torch.manual_seed(0)
    logits, noise = torch.randn(64, 2_000) * spread, torch.rand(64)
    drawn = generation.draw_tokens(logits, noise, Decoding(**filters))
    monkeypatch.setenv("LIB_PLAIN", "1")
    plain = generation.draw_tokens(logits, noise, Decoding(**filters))
    assert torch.equal(drawn[0], plain[0])
    torch.testing.assert_close(drawn[1], plain[1], atol=1e-5, rtol=0)


# --- scoring texts ---------------------------------------------------------------------------------


def random_encoder(kind: str):
    """A random classifier of an architecture whose head reads the first token."""
    config = AutoConfig.for_model(
        kind, vocab_size=204, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=66, initializer_range=0.5, num_labels=2,
        id2label={0: "nothate", 1: "hate"}, label2id={"nothate": 0, "hate": 1}, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(config).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", fast.FIRST_TOKEN)
def test_a_last_layer_of_one_token_changes_no_score(kind, attention, monkeypatch):
    model, widths = random_encoder(kind), []
    model.set_attn_implementation(attention)
    scorer = scorers.ClassifierScorer(model, tiny_classifier()[1], name=kind)
    scorer.TOKENS_PER_BATCH = {"cpu": 300}
    last = model.base_model.encoder.layer[-1].intermediate
    last.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    texts = random_texts(40, 50)
    quick = scorer.score(texts)
    assert set(widths) == {1}
    monkeypatch.setenv("LIB_PLAIN", "1")
    plain = scorer.score(texts)
    assert widths[-1] > 1 and np.std(plain) > 0.01
    np.testing.assert_allclose(quick, plain, atol=1e-5)


def test_the_first_token_alone_is_computed_only_where_the_head_reads_no_other():
    gpt = AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=2, vocab_size=204)
    gpt = AutoModelForSequenceClassification.from_config(gpt)
    for model in (gpt, tiny_classifier(is_decoder=True)[0]):
        with models.for_scoring(model, 9):
            assert not any("forward" in vars(module) for module in model.modules())


# --- log-probabilities from hidden states ----------------------------------------------------------


@pytest.mark.parametrize("size", [0.1, 1.0, 300.0])  # logits up to thousands: one word has it all
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("block", [1, 4, 7, 100])  # words at once, of 23
def test_chosen_log_probs_are_those_of_the_logits(block, temperature, size, monkeypatch):
    monkeypatch.setattr(fast, "VOCABULARY_AT_ONCE", block)
    generator = torch.Generator().manual_seed(block)
    states, upstream = (torch.randn(9, *k, generator=generator).double() for k in ((6,), ()))
    weight = size * torch.randn(23, 6, generator=generator).double()
    chosen = torch.randint(0, 23, (9,), generator=generator)
    found = []
    for quick in (True, False):
        given = states.clone().requires_grad_()
        if quick:
            log_probs, spread = fast.chosen_log_probs(given, weight, chosen, temperature, True)
            assert not spread.requires_grad
        else:
            logits = given @ weight.T / temperature
            log_probs = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
            spread = losses.entropy(logits.detach())
        (log_probs * upstream).sum().backward()
        found.append((log_probs.detach(), spread, given.grad))
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-9, rtol=1e-9)


def test_chosen_log_probs_without_entropy_or_gradient():
    states, weight = torch.randn(3, 4), torch.randn(5, 4)
    log_probs, spread = fast.chosen_log_probs(states, weight, torch.tensor([0, 4, 2]))
    assert spread is None and not log_probs.requires_grad
    uniform = fast.chosen_log_probs(torch.zeros(1, 4), weight, torch.tensor([1]), entropy=True)
    torch.testing.assert_close(torch.cat(uniform), torch.tensor([-math.log(5), math.log(5)]))
