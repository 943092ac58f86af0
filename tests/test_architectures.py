"""Everything a policy goes through, for a tiny model of each architecture that the papers and users name."""

import numpy as np
import pytest
import torch
import transformers as tf
from conftest import WORDS

from lib import (
    adapters,
    classifiers,
    encoding,
    generation,
    logprobs,
    models,
    ppo,
    reward_models,
    rloo,
    sft,
)
from lib.reward_models import Feedback, RewardModel, TrainConfig

PROMPTS = ["the cat sat", "a dog", "you", "are you nice . the mat"]
ANSWERS = ["nice .", "the cat", "kind stupid", "a"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8}
GPT2_NAMES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
ENCODER = {**SIZES, "intermediate_size": 48, "max_position_embeddings": 66, "type_vocab_size": 1}
POLICIES = {
    "gpt2": GPT2_NAMES,
    "gptj": {**GPT2_NAMES, "rotary_dim": 4},
    "gpt_neo": {
        "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 4,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64,
    },
    "gpt_neox": {**SIZES, "intermediate_size": 48},  # Pythia, RedPajama
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": SIZES,
    "opt": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 16},  # narrower than its layers, as OPT-350m
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": {name: size for name, size in GROUPED.items() if name != "head_dim"},
    "gemma": GROUPED,
    "gemma2": GROUPED,  # changes logits after its output layer, and masks by the least float
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
}  # fmt: skip
ENCODERS = {"roberta": ENCODER, "longformer": {**ENCODER, "attention_window": [4, 4]}}
CONFIG = dict(
    steps=1, prompts_per_step=4, samples_per_prompt=2, minibatch_size=4, max_new_tokens=4, epochs=1,
    layers=1, lora_rank=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    words = models.tiny_tokenizer(WORDS)
    words.add_special_tokens({"cls_token": "<system>", "sep_token": "<user>"})
    return words


def configure(kind, tokenizer, **more):
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    spread = {
        "initializer_factor" if kind == "t5" else "initializer_range": 0.3 if kind != "t5" else 1.0
    }
    sizes = POLICIES.get(kind) or ENCODERS[kind]
    config = tf.AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), bos_token_id=None, **special, **spread, **sizes, **more
    )
    if config.is_encoder_decoder:
        config.decoder_start_token_id = tokenizer.pad_token_id
    return config


def build(kind, tokenizer):
    """A policy with two layers of random weights whose next tokens differ in probability."""
    config = configure(kind, tokenizer)
    family = tf.AutoModelForSeq2SeqLM if config.is_encoder_decoder else tf.AutoModelForCausalLM
    torch.manual_seed(0)
    return family.from_config(config).float().eval()


def by_length(samples):
    return [len(text) / 10 for text in samples.texts]


def finite(history):
    numbers = history.drop(columns="explained_variance", errors="ignore")
    return np.isfinite(numbers.select_dtypes("number").dropna(axis=1, how="all")).all(axis=None)


@pytest.mark.parametrize("kind", POLICIES)
def test_samples_are_those_of_transformers_in_any_batch(kind, tokenizer):
    model = build(kind, tokenizer)
    greedy = generation.sample(model, tokenizer, PROMPTS, max_new_tokens=4, temperature=0)
    for prompt, ids in zip(PROMPTS, greedy.response_ids, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0]
        start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        assert expected[start:].tolist() == ids
    drawn = generation.sample(model, tokenizer, PROMPTS, n=2, max_new_tokens=4)
    scored = logprobs.token_log_probs(model, drawn.prompt_ids, drawn.response_ids)
    for one, other in zip(scored, drawn.model_log_probs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)


@pytest.mark.parametrize("train", ["top", "lora"])
@pytest.mark.parametrize("kind", POLICIES)
def test_ppo_over_a_frozen_trunk(kind, train, tokenizer):
    model = build(kind, tokenizer)
    config = ppo.PPOConfig(**CONFIG, train=train)
    check = ppo.before_update(model, tokenizer, PROMPTS, config)
    assert check["ratio_error"] < 1e-3 and check["kl"] < 1e-3 and check["sampler_error"] < 1e-3
    frozen = model.get_decoder() if not model.config.is_encoder_decoder else model.get_encoder()
    lowest = next(frozen.modules()).state_dict()
    before = {n: x.clone() for n, x in lowest.items() if ".0." in n and "lora" not in n}
    assert finite(ppo.train_ppo(model, tokenizer, PROMPTS, by_length, config))
    assert before and all(torch.equal(x, frozen.state_dict()[n]) for n, x in before.items())


@pytest.mark.parametrize("kind", POLICIES)
def test_ppo_over_a_bfloat16_trunk(kind, tokenizer):
    model = build(kind, tokenizer).to(torch.bfloat16)
    config = ppo.PPOConfig(**CONFIG, train="top")
    assert ppo.before_update(model, tokenizer, PROMPTS, config)["ratio_error"] < 1e-3
    assert finite(ppo.train_ppo(model, tokenizer, PROMPTS, by_length, config))


@pytest.mark.parametrize("kind", POLICIES)
def test_fine_tuned_adapters_are_kept(kind, tokenizer, tmp_path):
    model = build(kind, tokenizer)
    models.set_trainable(model, "lora", layers=1, lora_rank=2)
    rows = sft.encode_completions(tokenizer, PROMPTS, ANSWERS)
    assert finite(sft.train_sft(model, tokenizer, rows, max_steps=2, learning_rate=0.1))
    folder = models.save(model, tokenizer, tmp_path / kind)
    again, _ = models.load_policy(str(folder), dtype=torch.float32)
    ids = torch.tensor([[6, 7, 8]])
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    outputs = [m(input_ids=ids, **extra).logits for m in (again, model)]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)
    adapters.merge(model)
    torch.testing.assert_close(model(input_ids=ids, **extra).logits, outputs[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", POLICIES)
def test_rloo(kind, tokenizer):
    model = build(kind, tokenizer)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    rloo.train_rloo(model, tokenizer, PROMPTS, by_length, ppo.PPOConfig(**CONFIG))
    after = model.state_dict()
    assert all(weight.isfinite().all() for weight in after.values())
    assert any(not torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("kind", [*POLICIES, *ENCODERS])
def test_a_reward_model_trains_and_scores(kind, tokenizer):
    torch.manual_seed(0)
    backbone = tf.AutoModel.from_config(configure(kind, tokenizer)).float().eval()
    backbone = backbone.get_encoder() if backbone.config.is_encoder_decoder else backbone
    models.set_trainable(backbone, "top", layers=1)
    model = RewardModel(backbone, tokenizer)
    targets = np.array([1, 0, 0.5, 0], dtype=np.float32)
    feedback = Feedback(PROMPTS, ANSWERS, np.arange(4) // 2, targets)
    history = reward_models.train(model, feedback, TrainConfig(epochs=4, learning_rate=0.01))
    assert history["loss"].iloc[-1] < history["loss"].iloc[0]
    together = model.eval().score(PROMPTS, ANSWERS)
    alone = [model.score([p], [a])[0] for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    np.testing.assert_allclose(together, alone, atol=1e-3)


@pytest.mark.parametrize("kind", [*POLICIES, *ENCODERS])
def test_a_classifier_scores_alike_in_any_batch(kind, tokenizer):
    torch.manual_seed(0)
    config = configure(kind, tokenizer, num_labels=2)
    model = tf.AutoModelForSequenceClassification.from_config(config).float().eval()
    rows = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in PROMPTS]
    sides = ["right"] if kind in ENCODERS or kind == "t5" else ["right", "left"]
    with torch.no_grad():
        for pad in (tokenizer.pad_token_id, tokenizer.eos_token_id):
            model.config.pad_token_id = config.pad_token_id if kind in ENCODERS else pad
            if kind == "t5":  # reads the one end token of a text, so padding must be another
                pad = tokenizer.pad_token_id
            alone = [
                classifiers.classify(model, torch.tensor([r]), torch.ones(1, len(r)).long())
                for r in rows
            ]
            for side in sides:
                ids, mask = encoding.pad_rows(rows, pad, side)
                together = classifiers.classify(model, ids, mask)
                torch.testing.assert_close(together, torch.cat(alone), atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_is_no_policy(kind, tokenizer, tmp_path):
    tf.AutoModelForMaskedLM.from_config(configure(kind, tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=f"is an encoder .{kind}.: .*no policy. Use it as a reward model"
    ):
        models.load_policy(str(tmp_path))
    backbone, _ = reward_models.load_backbone(str(tmp_path))
    model = tf.AutoModelForMaskedLM.from_pretrained(tmp_path)
    for action in (
        lambda: generation.sample(model, tokenizer, PROMPTS),
        lambda: sft.train_sft(
            model, tokenizer, sft.encode_completions(tokenizer, PROMPTS, ANSWERS)
        ),
        lambda: ppo.train_ppo(model, tokenizer, PROMPTS, by_length, ppo.PPOConfig(**CONFIG)),
        lambda: rloo.train_rloo(model, tokenizer, PROMPTS, by_length, ppo.PPOConfig(**CONFIG)),
        lambda: generation.sample(backbone, tokenizer, PROMPTS),
    ):
        with pytest.raises(ValueError, match="is an encoder"):
            action()
