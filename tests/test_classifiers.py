"""Reward models and scorers of others: which token is read, which label pays, what text is shown."""

import numpy as np
import peft
import pytest
import torch
import transformers as tf
from conftest import WORDS
from tokenizers.processors import TemplateProcessing

from lib import classifiers, hub, models, reward_models, scorers
from lib.classifiers import ClassifierReward
from rehearsal.hub import Hub, Revision

PROMPTS = ["the cat", "you are", "a dog sat on", "nice"]
ANSWERS = ["sat .", "kind nice kind", "the mat", "stupid idiot ."]
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)


def decoder(labels=1, pad=None, **more):
    """A Llama classifier of random weights; its configuration names the pad token `pad`, or none."""
    tokenizer = models.tiny_tokenizer(WORDS)
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=len(tokenizer), num_key_value_heads=2, pad_token_id=pad, num_labels=labels,
        bos_token_id=None, eos_token_id=1, initializer_range=0.3, **SIZES, **more,
    )  # fmt: skip
    tokenizer.chat_template = None
    return tf.LlamaForSequenceClassification(config).eval(), tokenizer


def encoder(labels=1, kind="roberta"):
    """An encoder classifier that reads a prompt and a response as a pair."""
    tokenizer = models.tiny_tokenizer(WORDS)
    tokenizer.chat_template = None
    tokenizer.add_special_tokens({"cls_token": "<system>", "sep_token": "<user>"})
    special = [("<system>", 3), ("<user>", 4)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<system> $A <user>", pair="<system> $A <user> $B:1 <user>:1", special_tokens=special
    )
    torch.manual_seed(0)
    config = tf.AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), pad_token_id=0, num_labels=labels,
        type_vocab_size=1 + (kind == "bert"), max_position_embeddings=40, initializer_range=0.3, **SIZES,
    )  # fmt: skip
    return tf.AutoModelForSequenceClassification.from_config(config).eval(), tokenizer


def saved(built, folder):
    model, tokenizer = built
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEEDBACK_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)


# --- which token ---------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [None, 0, 1])  # none, its own, the end token
def test_a_decoder_reads_the_last_real_token_whatever_pads(pad):
    model, tokenizer = decoder(pad=pad)
    tokenizer.pad_token = None if pad is None else tokenizer.convert_ids_to_tokens(pad)
    reward = ClassifierReward(model, tokenizer)
    together = reward.score(PROMPTS, ANSWERS)
    alone = [reward.score([p], [a])[0] for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    for row, score in zip(zip(PROMPTS, ANSWERS, strict=True), together, strict=True):
        ids = tokenizer(" ".join(row))["input_ids"] + [1]
        states = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        assert score == pytest.approx(model.score(states).item(), abs=1e-5)
    scorer = scorers.ClassifierScorer(model, tokenizer, name="tiny")
    texts = [" ".join(row) for row in zip(PROMPTS, ANSWERS, strict=True)]
    expected = [scorer.score([text])[0] for text in texts]
    np.testing.assert_allclose(scorer.score(texts), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_an_encoder_reads_a_pair(kind):
    model, tokenizer = encoder(kind=kind)
    reward = ClassifierReward(model, tokenizer)
    expected = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        pair = tokenizer(prompt, answer, return_tensors="pt", return_token_type_ids=kind == "bert")
        expected.append(model(**pair).logits[0, 0].item())
    np.testing.assert_allclose(reward.score(PROMPTS, ANSWERS), expected, atol=1e-4)


# --- which text ----------------------------------------------------------------------------------


def test_the_text_is_what_the_chat_template_or_the_given_template_writes():
    model, tokenizer = decoder()
    tokenizer.chat_template = models.TINY_CHAT_TEMPLATE
    shown = tokenizer.decode(ClassifierReward(model, tokenizer).encode("the cat", "sat").ids)
    assert shown == "<user> the cat <assistant> sat"
    reward = ClassifierReward(
        model, tokenizer, template=lambda prompt, answer: f"{answer} {prompt}"
    )
    assert tokenizer.decode(reward.encode("the cat", "sat").ids) == "sat the cat"


def test_long_texts_lose_their_beginning_and_are_counted():
    for model, tokenizer in (decoder(max_position_embeddings=8), encoder()):
        reward = ClassifierReward(model, tokenizer)
        prompt = "the cat " * 30
        with pytest.warns(UserWarning, match=f"1 of 2 texts cut to {reward.max_length}"):
            reward.score([prompt, "nice"], ["sat .", "kind"])
        assert reward.truncated == 1
        ids = reward.encode(prompt, "sat .").ids
        assert len(ids) == reward.max_length and "sat ." in tokenizer.decode(ids)


# --- which label ---------------------------------------------------------------------------------


def test_the_label_is_named_with_the_model(tmp_path):
    names = {0: "toxic", 1: "fine", 2: "helpful"}
    folder = saved(decoder(labels=3, pad=0, id2label=names), tmp_path / "model")
    with pytest.raises(
        ValueError, match="has several labels; it has toxic, fine, helpful.*name#label"
    ):
        reward_models.load(folder)
    with pytest.raises(ValueError, match="has no label 'good'"):
        reward_models.load(f"{folder}#good")
    reward = reward_models.load(f"{folder}#helpful")
    logits = decoder(labels=3, pad=0, id2label=names)[0]
    expected = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        ids = torch.tensor([reward.encode(prompt, answer).ids])
        share = classifiers.classify(logits, ids, torch.ones_like(ids)).softmax(-1)[0, 2]
        expected.append(torch.logit(share).item())
    np.testing.assert_allclose(reward.score(PROMPTS, ANSWERS), expected, atol=0.1)  # bfloat16
    for label in ("helpful", "2"):
        assert reward_models.load(folder, label=label).column == 2
    assert scorers.load_scorer(folder).column == 0  # its name says so
    scorer = scorers.load_scorer(f"{folder}#fine", role="judge")
    assert scorer.column == 1 and scorer.name == folder and scorer.role == "judge"


def test_with_one_label_there_is_nothing_to_choose(tmp_path):
    folder = saved(decoder(pad=0), tmp_path / "model")
    assert reward_models.load(folder).column == 0
    assert scorers.load_scorer(folder).column == 0


def test_revision_label_and_tokenizer_of_a_model_on_the_hub(tmp_path, cache, monkeypatch):
    server = Hub(tmp_path / "hub")
    home = server.root / "models" / "some"
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    model, tokenizer = decoder(labels=2, pad=0)
    saved((model, tokenizer), home / "rewards@v2")
    for path in (home / "rewards@v2").glob("*token*"):
        path.unlink()
    saved(models.build_tiny_model("tiny", words=WORDS), home / "words")
    name = "some/rewards@v2#LABEL_1"
    reward = reward_models.load(name, tokenizer="some/words")
    assert reward.column == 1 and torch.isfinite(torch.tensor(reward.score(PROMPTS, ANSWERS))).all()
    scorer = scorers.load_scorer(name, tokenizer="some/words")
    commit = Revision(home / "rewards@v2").commit
    assert scorer.column == 1 and scorer.version == commit[:12] and scorer.name == "some/rewards"
    server.close()


def test_adapters_of_a_classifier_come_on_their_base(tmp_path):
    base, tokenizer = models.build_tiny_model("tiny", words=WORDS)
    saved((base, tokenizer), tmp_path / "base")
    model = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj", "v_proj"])
    trained = peft.get_peft_model(model, config)  # as TRL and others save a reward model
    for parameter in trained.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    trained.eval().save_pretrained(tmp_path / "adapters")
    reward = reward_models.load(f"{tmp_path / 'adapters'}#1")
    reward.model.float()
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        ids = torch.tensor([reward.encode(prompt, answer).ids])
        trained.config.pad_token_id = None
        logits = trained(input_ids=ids).logits[0]
        expected = (logits[1] - logits[0]).item()
        assert reward.score([prompt], [answer])[0] == pytest.approx(expected, rel=0.05, abs=0.05)
    with pytest.raises(ValueError, match="adapters without a classifier's head.*load_policy"):
        policy, words = models.load_policy(str(tmp_path / "base"), dtype=torch.float32)
        models.set_trainable(policy, "lora", layers=1)
        reward_models.load(models.save(policy, words, tmp_path / "policy"))


# --- what is no classifier -----------------------------------------------------------------------


def test_a_model_without_a_trained_head_is_refused(tmp_path):
    folder = saved(models.build_tiny_model("tiny", words=WORDS), tmp_path / "policy")
    for load in (reward_models.load, lambda name: scorers.load_scorer(name, label="LABEL_0")):
        with pytest.raises(ValueError, match="no sequence classifier: 'score.weight'.*load_policy"):
            load(folder)
    folder = saved(decoder(pad=0), tmp_path / "classifier")
    with pytest.raises(ValueError, match="no whole language model.*load_scorer"):
        models.load_policy(folder)
    with pytest.raises(ValueError, match="cannot be loaded.*config.json"):
        reward_models.load(tmp_path)


def test_a_model_that_brings_its_own_code_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "strange", "auto_map": {"AutoConfig": "code.Config"}, "architectures": ["X"]}'
    )
    (tmp_path / "code.py").write_text("raise SystemExit('was run')")
    for load in (models.load_policy, reward_models.load, reward_models.load_backbone):
        with pytest.raises(ValueError, match="code of its own, which is never run here"):
            load(str(tmp_path))


# --- CarperAI's TL;DR reward model ----------------------------------------------------------------


def gptj(**more):
    tokenizer = models.tiny_tokenizer([*WORDS, "startoftext", "|", "<", ">"])
    tokenizer.pad_token = tokenizer.eos_token  # as with GPT-J's
    tokenizer.chat_template = None
    torch.manual_seed(0)
    sizes = dict(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64) | more
    config = tf.GPTJConfig(vocab_size=len(tokenizer), initializer_range=0.3, **sizes)
    return tf.GPTJModel(config).eval(), tokenizer


def write_trlx(folder, model, head):
    """A checkpoint with the keys that trlx's GPTRewardModel has: GPT-J's, its buffers, and `v_head`."""
    state = {f"transformer.{name}": tensor for name, tensor in model.state_dict().items()}
    for layer in range(model.config.n_layer):
        state[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
        state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e9)
    folder.mkdir(parents=True)
    torch.save(state | {"v_head.weight": head}, folder / "pytorch_model.bin")


def test_a_trlx_reward_model_is_converted_and_scores_as_trlx_does(tmp_path, cache):
    model, tokenizer = gptj()
    head = torch.randn(1, 32)
    base = saved((tf.GPTJForCausalLM(model.config), tokenizer), tmp_path / "base")
    write_trlx(tmp_path / "checkpoint", model, head)
    reward = reward_models.load(str(tmp_path / "checkpoint"), tokenizer=base)
    expected = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        # trlx: the text between two marks, the second of which also pads; the token before it is read
        text = f"<|startoftext|>{prompt}{answer}"
        ids = tokenizer(text)["input_ids"] + 3 * [tokenizer.eos_token_id]
        rewards = model(torch.tensor([ids])).last_hidden_state @ head.T
        expected.append(rewards[0, ids.index(tokenizer.eos_token_id) - 1].item())
    again = reward_models.load(str(tmp_path / "checkpoint"), tokenizer=base)  # converted before
    for one in (reward, again):
        one.model.float()
        np.testing.assert_allclose(one.score(PROMPTS, ANSWERS), expected, atol=0.05)  # bfloat16
    assert np.ptp(expected) > 0.5
    folder = classifiers.convert_trlx(hub.resolve_model(tmp_path / "checkpoint"), base)
    plain, report = tf.AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(plain.score.weight, head)
    assert torch.equal(plain.transformer.wte.weight, model.wte.weight)


def test_a_trlx_checkpoint_over_another_base_is_refused(tmp_path, cache):
    model, tokenizer = gptj()
    other, _ = gptj(n_layer=1)
    base = saved((tf.GPTJForCausalLM(other.config), tokenizer), tmp_path / "base")
    write_trlx(tmp_path / "checkpoint", model, torch.randn(1, 32))
    with pytest.raises(ValueError, match=r"'n_layer': \(2, 1\).*tokenizer='namespace/name'"):
        reward_models.load(str(tmp_path / "checkpoint"), tokenizer=base)
