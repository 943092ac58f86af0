"""What is trained is kept: each kind of training, saved and loaded by this library and by plain ones."""

import copy
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import WORDS
from peft import PeftModel
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from lib import adapters, models, ppo, reward_models, rloo, runtime, scorers, sft
from lib.papers.fine_grained import models as fine_grained
from lib.reward_models import Feedback, RewardModel, TrainConfig

PROMPTS = ["the cat", "you are", "a dog sat on", "nice"]
ANSWERS = ["sat .", "kind", "the mat", "stupid idiot ."]
PPO = dict(
    steps=2, prompts_per_step=4, samples_per_prompt=2, minibatch_size=4, max_new_tokens=4, epochs=1,
    layers=1, lora_rank=2, learning_rate=0.05,
)  # fmt: skip


def by_length(samples):
    return [len(text) / 10 for text in samples.texts]


@pytest.fixture
def named(tmp_path):
    """A folder that holds a tiny model, which a user would have trained from."""
    model, tokenizer = models.build_tiny_model("tiny", words=WORDS, seed=3)
    models.save(model, tokenizer, tmp_path / "start")
    return str(tmp_path / "start")


def logits(model, seq2seq=False):
    ids = torch.tensor([[6, 7, 8, 9], [9, 8, 7, 6]])
    extra = {"decoder_input_ids": ids} if seq2seq else {}
    with torch.no_grad():
        return model(input_ids=ids, **extra).logits.float()


def check_same(left, right, seq2seq=False):
    torch.testing.assert_close(logits(left, seq2seq), logits(right, seq2seq), atol=1e-5, rtol=0)


def check_moved(model, name):
    before = models.load_policy(name, dtype=torch.float32)[0]
    assert (logits(model) - logits(before)).abs().max() > 1e-2


def train_by(way, model, tokenizer, train):
    if way == "sft":
        models.set_trainable(model, train, layers=1, lora_rank=2)
        rows = sft.encode_completions(tokenizer, PROMPTS, ANSWERS)
        sft.train_sft(model, tokenizer, rows, max_steps=3, learning_rate=0.05)
    elif way == "ppo":
        config = ppo.PPOConfig(**PPO, train=train)
        ppo.train_ppo(model, tokenizer, PROMPTS, by_length, config)
    else:
        config = ppo.PPOConfig(**PPO, train=train)
        rloo.train_rloo(model, tokenizer, PROMPTS, by_length, config)


# --- policies ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "train"),
    [(way, train) for way in ("sft", "ppo") for train in ("all", "top", "lora")]
    + [("rloo", "lora")],
)
def test_a_trained_policy_is_kept(named, tmp_path, way, train):
    model, tokenizer = models.load_policy(named, dtype=torch.float32)
    train_by(way, model, tokenizer, train)
    check_moved(model, named)
    folder = models.save(model, tokenizer, tmp_path / "kept", card={"licence": "MIT"})
    again, words = models.load_policy(str(folder), dtype=torch.float32)
    check_same(again, model)
    assert words("the cat")["input_ids"] == tokenizer("the cat")["input_ids"]
    check_same(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), model)
    assert (folder / "adapter_model.safetensors").exists() == (train == "lora")
    assert not [*folder.rglob("*.bin")] and not (folder / "base").exists()
    if train == "lora":
        base = AutoModelForCausalLM.from_pretrained(named, dtype=torch.float32)
        check_same(PeftModel.from_pretrained(base, folder), model)
    check_moved(again, named)


def test_a_bfloat16_trunk_is_kept_as_it_is_and_what_trained_in_float32(named, tmp_path):
    model, tokenizer = models.load_policy(named, dtype=torch.bfloat16)
    models.set_trainable(model, "top", layers=1)
    train_by("ppo", model, tokenizer, "top")
    folder = models.save(model, tokenizer, tmp_path / "kept")
    again, _ = models.load_policy(str(folder), dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert plain.dtype == torch.float32  # nothing of what trained is rounded
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight.float())
        assert torch.equal(plain.state_dict()[name], weight.float())


def test_an_encoder_decoder_is_kept(tmp_path):
    for train in ("top", "lora"):
        model, tokenizer = models.build_tiny_model("tiny-encoder-decoder", words=WORDS)
        train_by("ppo", model, tokenizer, train)
        folder = models.save(model, tokenizer, tmp_path / train)
        again, _ = models.load_policy(str(folder), dtype=torch.float32)
        check_same(again, model, seq2seq=True)
        plain = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32)
        check_same(plain, model, seq2seq=True)


def test_adapters_over_a_model_without_a_name_bring_it_along(tmp_path):
    model, tokenizer = models.build_tiny_model("tiny", words=WORDS, seed=5)
    train_by("sft", model, tokenizer, "lora")
    models.save(model, tokenizer, tmp_path / "kept")
    shutil.move(tmp_path / "kept", tmp_path / "moved")  # to another machine, say
    check_same(models.load_policy(str(tmp_path / "moved"), dtype=torch.float32)[0], model)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "moved" / "base")
    check_same(PeftModel.from_pretrained(base, tmp_path / "moved"), model)


def test_adapters_over_weights_that_trained_before_bring_these_along(named, tmp_path):
    model, tokenizer = models.load_policy(named, dtype=torch.float32)
    assert models.is_unchanged(model)
    train_by("sft", model, tokenizer, "top")
    assert not models.is_unchanged(model)
    train_by("sft", model, tokenizer, "lora")
    folder = models.save(model, tokenizer, tmp_path / "kept")
    assert (folder / "base" / "model.safetensors").exists()
    check_same(models.load_policy(str(folder), dtype=torch.float32)[0], model)


def test_rounding_is_no_training(named):
    for dtype in (torch.bfloat16, torch.float16):
        model, _ = models.load_policy(named, dtype=torch.float32)
        models.to_dtype(model, dtype)
        models.to_dtype(model, torch.float32)
        assert models.is_unchanged(model)


def test_kept_adapters_go_on(named, tmp_path):
    model, tokenizer = models.load_policy(named, dtype=torch.float32)
    train_by("sft", model, tokenizer, "lora")
    folder = models.save(model, tokenizer, tmp_path / "first")
    again, _ = models.load_policy(str(folder), dtype=torch.float32)
    trained = copy.deepcopy(adapters.base_weights(again))
    train_by("ppo", again, tokenizer, "lora")  # of the same size: these adapters
    assert len(adapters.adapted_layers(again)) == len(adapters.adapted_layers(model))
    for name, weight in adapters.base_weights(again).items():
        assert torch.equal(weight, trained[name])
    assert (logits(again) - logits(model)).abs().max() > 1e-2
    second = models.save(again, tokenizer, tmp_path / "second")
    check_same(models.load_policy(str(second), dtype=torch.float32)[0], again)


@pytest.mark.parametrize(("way", "train"), [("ppo", "top"), ("rloo", "lora")])
def test_other_training_goes_on_from_the_sum_of_weights_and_adapters(named, tmp_path, way, train):
    model, tokenizer = models.load_policy(named, dtype=torch.float32)
    train_by("sft", model, tokenizer, "lora")
    merged = copy.deepcopy(model)
    adapters.merge(merged)
    check_same(merged, model)
    assert not adapters.adapted_layers(merged)
    train_by(way, model, tokenizer, train)
    folder = models.save(model, tokenizer, tmp_path / "kept")
    check_same(models.load_policy(str(folder), dtype=torch.float32)[0], model)
    check_same(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), model)


def test_saving_twice_in_one_place_keeps_the_later(named, tmp_path):
    model, tokenizer = models.load_policy(named, dtype=torch.float32)
    models.save(model, tokenizer, tmp_path / "kept")
    train_by("sft", model, tokenizer, "lora")
    folder = models.save(model, tokenizer, tmp_path / "kept")
    assert not (folder / "model.safetensors").exists()
    check_same(models.load_policy(str(folder), dtype=torch.float32)[0], model)


def test_a_model_saved_over_its_own_start_is_whole(named, tmp_path):
    model, tokenizer = models.load_policy(named, dtype=torch.float32)
    train_by("sft", model, tokenizer, "lora")
    models.save(model, tokenizer, named)  # where its base was
    check_same(models.load_policy(named, dtype=torch.float32)[0], model)


def test_what_cannot_be_loaded_is_refused_in_words(named, tmp_path):
    model, tokenizer = models.load_policy(named, dtype=torch.float32)
    train_by("sft", model, tokenizer, "lora")
    folder = models.save(model, tokenizer, tmp_path / "kept")
    other, words = models.build_tiny_model("tiny", words=WORDS, hidden_size=32)
    models.save(other, words, tmp_path / "other")
    with pytest.raises(ValueError, match="belong to another model.*base="):
        models.load_policy(str(folder), base=str(tmp_path / "other"))
    shutil.move(named, tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="start', which was not loaded.*base="):
        models.load_policy(str(folder))
    again, _ = models.load_policy(
        str(folder), base=str(tmp_path / "elsewhere"), dtype=torch.float32
    )
    check_same(again, model)
    body = AutoModel.from_pretrained(tmp_path / "elsewhere")  # no output layer
    models.save(body, tokenizer, tmp_path / "body")
    with pytest.raises(ValueError, match="no whole language model.*lm_head.weight"):
        models.load_policy(str(tmp_path / "body"))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="no adapter_model.safetensors: it is not whole"):
        models.load_policy(str(folder), base=str(tmp_path / "elsewhere"))


KILLED = """
import os, signal, sys
import torch
from lib import models
from transformers import PreTrainedModel
model, tokenizer = models.load_policy(sys.argv[1], dtype=torch.float32)
tokenizer.save_pretrained = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
models.save(model, tokenizer, sys.argv[2])
"""


def test_a_killed_save_leaves_no_half_folder(named, tmp_path):
    target = tmp_path / "runs" / "kept"
    done = subprocess.run([sys.executable, "-c", KILLED, named, str(target)], capture_output=True)
    assert done.returncode == -9, done.stderr
    assert not target.exists() and not [*target.parent.glob("[!.]*")]
    model, tokenizer = models.load_policy(named, dtype=torch.float32)
    models.save(model, tokenizer, target)
    assert [path.name for path in target.parent.iterdir()] == ["kept"]


# --- the card ------------------------------------------------------------------------------------


def test_the_card_says_what_the_model_is_and_comes_from(named, tmp_path):
    model, tokenizer = models.load_policy(named, dtype=torch.float32)
    train_by("sft", model, tokenizer, "lora")
    card = {
        "data": PROMPTS, "settings": {"learning_rate": 0.05}, "metrics": {"reward": np.float32(0.5)},
        "licence": "Apache-2.0", "notebook": "11",
    }  # fmt: skip
    folder = models.save(model, tokenizer, tmp_path / "kept", card=card)
    told = json.loads((folder / "card.json").read_text())
    assert told["base"]["name"] == named and told["training"] == "lora" and told["kind"] == "policy"
    assert told["data_hash"] == runtime.content_hash(PROMPTS) and "data" not in told
    assert told["settings"] == {"learning_rate": 0.05} and told["metrics"] == {"reward": 0.5}
    page = (folder / "README.md").read_text()
    assert (
        page.startswith('---\nlicense: "Apache-2.0"\nbase_model: ') and "library_name: peft" in page
    )
    assert "| learning_rate | 0.05 |" in page and "| notebook | 11 |" in page
    with pytest.raises(ValueError, match=r"card\['metrics'\] is 3; give a dict"):
        models.save(model, tokenizer, tmp_path / "kept", card={"metrics": 3})
    (folder / "card.json").write_text("{")
    with pytest.raises(ValueError, match=r"card.json is damaged"):
        models.load_policy(str(folder))


# --- value functions -----------------------------------------------------------------------------


@pytest.mark.parametrize("own_model", [False, True])
def test_a_value_function_is_kept_and_goes_on(named, tmp_path, own_model):
    policy, tokenizer = models.load_policy(named, dtype=torch.float32)
    value_model = None
    if own_model:
        value_model, _ = models.build_tiny_model("tiny", words=WORDS, hidden_size=32, seed=7)
    config = ppo.PPOConfig(**PPO, train="top")
    ppo.train_ppo(policy, tokenizer, PROMPTS, by_length, config, value_model=value_model)
    folder = models.save(policy, tokenizer, tmp_path / "kept")
    again, _ = models.load_policy(str(folder), dtype=torch.float32)
    state = again.value_function.head.state_dict()
    for name, weight in policy.value_function.head.state_dict().items():
        assert torch.equal(state[name], weight)
    assert state["3.weight"].abs().max() > 0  # it learned
    if own_model:
        check_same(again.value_function.model, policy.value_function.model)
        check_same(AutoModelForCausalLM.from_pretrained(folder / "value_model"), value_model)
    check_same(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), policy)
    learner = ppo.make_learner(again, tokenizer, config, again.value_function)
    assert learner.shared.value_head is again.value_function.head
    assert learner.shared.value_model is again.value_function.model
    runtime.free_memory(again)
    assert not hasattr(again, "value_function")


# --- reward models -------------------------------------------------------------------------------


def feedback():
    group = np.arange(4) // 2
    return Feedback(PROMPTS, ANSWERS, group, targets=np.array([1, 0, 0.5, 0], dtype=np.float32))


@pytest.mark.parametrize("name", models.TINY_MODELS)
@pytest.mark.parametrize("train", ["head", "top", "lora", "all"])
def test_a_reward_model_is_kept(tmp_path, name, train):
    backbone, tokenizer = reward_models.load_backbone(name)
    if train == "head":
        backbone.requires_grad_(False)
    else:
        models.set_trainable(backbone, train, layers=1, lora_rank=2)
    model = RewardModel(backbone, tokenizer)
    reward_models.train(model, feedback(), TrainConfig(learning_rate=0.05, epochs=3))
    folder = models.save(model, tokenizer, tmp_path / "kept", card={"metrics": {"accuracy": 1.0}})
    again = reward_models.load(folder)
    expected = model.score(PROMPTS, ANSWERS)
    np.testing.assert_allclose(again.score(PROMPTS, ANSWERS), expected, atol=1e-5)
    assert np.ptp(expected) > 1e-3
    written = {path.name for path in folder.iterdir()}
    assert ("model.safetensors" in written) == (train in ("top", "all"))
    assert ("adapter_model.safetensors" in written) == (train == "lora")
    with pytest.raises(ValueError, match=r"holds a reward model. Load it with reward_models.load"):
        models.load_policy(str(folder))
    with pytest.raises(
        ValueError, match=r"holds a reward model, which scores responses to prompts"
    ):
        scorers.load_scorer(str(folder))
    if name == "tiny" and train != "head":  # plain transformers and peft read the backbone
        start = folder / "base" if train == "lora" else folder
        plain = AutoModel.from_pretrained(start)
        plain = PeftModel.from_pretrained(plain, folder) if train == "lora" else plain
        batch = model.batch(model.encode(PROMPTS, ANSWERS))
        ids, mask = batch["input_ids"], batch["attention_mask"]
        states = plain(input_ids=ids, attention_mask=mask).last_hidden_state
        expected = model.hidden(ids, mask)
        real = mask.bool()
        torch.testing.assert_close(states[real], expected[real], atol=1e-5, rtol=0)


@pytest.mark.parametrize("unit", ["sequence", "sentence"])
@pytest.mark.parametrize("train", ["head", "lora"])
def test_a_fine_grained_reward_model_is_kept(tmp_path, unit, train):
    backbone, tokenizer = reward_models.load_backbone("tiny-encoder-decoder")
    if train == "lora":
        models.set_trainable(backbone, "lora", layers=1)
    model = fine_grained.FineGrainedModel(backbone, tokenizer, unit=unit, relations=False)
    torch.nn.init.normal_(model.head.weight)
    model.fit_normaliser([np.array([1.0, 3.0])])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    folder = models.save(model.eval(), tokenizer, tmp_path / "kept")
    again = fine_grained.load(folder)
    texts = ["the cat sat . a dog ran .", "you are nice ."]
    scores, expected = (m.score_segments(PROMPTS[:2], texts) for m in (again, model))
    for row in range(2):
        np.testing.assert_allclose(scores[row], expected[row], atol=1e-5)
    assert (again.mean, again.std) == (model.mean, model.std) == (2.0, 1.0)
    with pytest.raises(ValueError, match="holds a FineGrainedModel.*fine_grained.models.load"):
        reward_models.load(folder)


def test_a_kept_policy_is_the_start_of_a_reward_model(named, tmp_path):
    model, tokenizer = models.load_policy(named, dtype=torch.float32)
    train_by("sft", model, tokenizer, "lora")
    folder = models.save(model, tokenizer, tmp_path / "policy")
    backbone, words = reward_models.load_backbone(str(folder))
    ids = torch.tensor([[6, 7, 8]])
    expected = model.base_model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(backbone(input_ids=ids).last_hidden_state, expected)
    reward = RewardModel(backbone.requires_grad_(False), words)
    torch.nn.init.normal_(reward.head.weight)
    again = reward_models.load(models.save(reward, words, tmp_path / "reward"))
    scores = reward.score(PROMPTS, ANSWERS)
    np.testing.assert_allclose(again.score(PROMPTS, ANSWERS), scores, atol=1e-5)
