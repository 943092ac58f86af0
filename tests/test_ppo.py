"""PPO on a toy with a known optimum, its parts by hand, stops, resuming after kill -9, two processes."""

import copy
import dataclasses
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers

from lib import fast, generation, losses, models, policy, ppo, rewards, rloo, training

ROOT = Path(__file__).parents[1]
WORDS = ["a", "b", "c", "d", "e", "yes", "no", "."]
PROMPTS = [f"{x} {y}" for x in WORDS for y in WORDS] + ["a b c d e", "yes"]
TOY = ppo.PPOConfig(
    steps=60, prompts_per_step=16, max_new_tokens=8, train="all", learning_rate=1e-3,
    value_learning_rate=3e-3, kl_coef=0.01,
)  # fmt: skip
SHORT = dataclasses.replace(TOY, steps=3, prompts_per_step=8, minibatch_size=4, epochs=2)


def toy(name="tiny"):
    return models.build_tiny_model(name, words=WORDS)


def share_of_yes(samples):
    """The toy reward: share of "yes" in the response; the optimum is 1."""
    return {"yes": [text.split().count("yes") / len(ids) for text, ids in both(samples)]}


def both(samples):
    return zip(samples.texts, samples.response_ids, strict=True)


def train(config=TOY, reward_fn=share_of_yes, **options):
    model, tokenizer = toy()
    return ppo.train_ppo(model, tokenizer, PROMPTS, reward_fn, config, **options)


def started(config=SHORT, name="tiny", **options):
    """A learner, its first samples and their rollout."""
    learner = ppo.make_learner(*toy(name), config, **options)
    samples = ppo.sample(learner, PROMPTS, 0)
    return learner, samples, ppo.roll_out(learner, samples)


def advantages_of(learner, samples, rollout, reward_fn=share_of_yes):
    """Advantages and returns, as in `train_ppo`."""
    scores, _ = rewards.place_rewards(reward_fn(samples), samples)
    pair = (rollout.log_probs, rollout.ref_log_probs)
    paid = ppo.penalise(scores, *pair, learner.config.kl_coef)
    return ppo.estimate_advantages(learner, paid, rollout.values, rollout.mask)


def policy_gradient(learner):
    return torch.cat([p.grad.flatten() for p in learner.shared.parameter_groups()[0]])


def without_times(history):
    return history.drop(columns=[c for c in history if c.startswith("seconds_")])


# --- learning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo_reaches_90_percent_of_the_optimum_within_60_steps(seed):
    history = train(dataclasses.replace(TOY, seed=seed))
    assert history["reward"][0] < 0.2
    assert history["reward"].tail(5).mean() >= 0.9


def test_with_shuffled_rewards_it_does_not_move():
    history = train(reward_fn=rewards.shuffled(share_of_yes))
    assert history["reward"].tail(10).mean() < 0.25


def test_flipping_the_reward_flips_the_trend():
    def minus(samples):
        return [-value for value in share_of_yes(samples)["yes"]]

    config = dataclasses.replace(TOY, steps=20)
    up, down = train(config)["reward"], -train(config, minus)["reward"]  # both: share of "yes"
    assert up.tail(5).mean() > up[0] + 0.2
    assert down.tail(5).mean() < down[0] / 2


def test_an_encoder_decoder_with_frozen_encoder_learns():
    model, tokenizer = toy("tiny-encoder-decoder")
    before = copy.deepcopy(model.get_encoder().state_dict())
    config = dataclasses.replace(TOY, steps=25, train="top", layers=2, learning_rate=1e-2)
    history = ppo.train_ppo(model, tokenizer, PROMPTS, share_of_yes, config)
    assert history["reward"].tail(5).mean() > history["reward"][0] + 0.2
    for name, weight in model.get_encoder().state_dict().items():
        assert torch.equal(weight, before[name])


def test_a_separate_value_model_learns_what_the_prompt_tells():
    def paid_for_the_prompt(samples):
        return [float("yes" in prompt) for prompt in samples.prompts]

    value_model = models.build_tiny_model("tiny", words=WORDS, seed=5)[0]
    config = dataclasses.replace(
        TOY, steps=30, learning_rate=1e-9, value_learning_rate=1e-3, lam=1.0
    )
    history = train(config, paid_for_the_prompt, value_model=value_model)
    assert history["explained_variance"].tail(5).mean() > 0.5


def other_value_model(kind):
    """A value model of another width or class than the policy, over the same tokens."""
    if kind == "T5 base":  # fine-grained RLHF: T5-base beside T5-large
        return models.build_tiny_model("tiny-encoder-decoder", words=WORDS, seed=3, d_model=32)[0]
    if kind == "small Llama":
        return models.build_tiny_model("tiny", words=WORDS, seed=3, hidden_size=32)[0]
    sizes = {"vocab_size": 14, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    if kind == "GPT-2":
        config = transformers.GPT2Config(n_embd=48, n_layer=2, n_head=4, **sizes)
        return transformers.GPT2LMHeadModel(config)
    config = transformers.OPTConfig(  # what its output layer reads is narrower than its layers
        hidden_size=32, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2,
        do_layer_norm_before=False, **sizes,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


@pytest.mark.parametrize("kind", ["T5 base", "small Llama", "GPT-2", "OPT"])
@pytest.mark.parametrize("name", ["tiny", "tiny-encoder-decoder"])
def test_a_value_model_may_have_another_size_and_class(name, kind):
    value_model = other_value_model(kind)
    learner, _, _ = started(SHORT, name, value_model=value_model)
    torch.nn.init.normal_(learner.shared.value_head[-1].weight)
    prompts = ["a", "a b c d e", "yes", "no yes a", "a b", "b", "c", "a b c"]
    samples = generation.sample(
        learner.policy, learner.tokenizer, prompts, seed=0, max_new_tokens=8
    )
    together = ppo.roll_out(learner, samples)
    alone = [ppo.evaluate(learner, together.tokens.rows(torch.tensor([i])))[1] for i in range(8)]
    mask = together.mask
    torch.testing.assert_close(torch.cat(alone) * mask, together.values * mask, atol=1e-5, rtol=0)
    assert (together.values * mask).std() > 0.1

    before = {n: p.detach().clone() for n, p in value_model.named_parameters()}
    history = ppo.train_ppo(
        *toy(name),
        PROMPTS,
        share_of_yes,
        dataclasses.replace(SHORT, steps=2),
        value_model=value_model,
    )
    assert np.isfinite(history["value_loss"]).all()
    learned = {n for n, p in value_model.named_parameters() if not torch.equal(p, before[n])}
    assert len(learned) > len(before) / 2 and "lm_head.weight" not in learned


def test_a_value_model_of_other_tokens_is_refused():
    small = models.build_tiny_model("tiny", words=WORDS[:3])[0]
    with pytest.raises(ValueError, match="value_model knows 9 tokens, the policy's tokenizer 14"):
        train(SHORT, value_model=small)
    with pytest.raises(ValueError, match="LlamaModel, which has no output layer"):
        train(SHORT, value_model=toy()[0].model)


# --- rewards -------------------------------------------------------------------------------------


def fake_samples(*lengths):
    none = [np.zeros(n, dtype=np.float32) for n in lengths]
    names = [f"text {i}" for i in range(len(lengths))]
    return generation.Samples(
        prompts=names, prompt_index=[*range(len(lengths))], prompt_ids=[[1]] * len(lengths),
        response_ids=[[7] * n for n in lengths], texts=names, log_probs=none, model_log_probs=none,
        finished=[True] * len(lengths),
    )  # fmt: skip


def test_a_number_is_paid_at_the_last_real_token_and_components_are_added():
    given = {"whole": [1.0, 2.0], "tokens": [np.array([0.5, 0, 0.25]), [4.0]]}
    paid, sums = rewards.place_rewards(given, fake_samples(3, 1))
    assert paid.tolist() == [[0.5, 0, 1.25], [6, 0, 0]]
    assert {k: v.tolist() for k, v in sums.items()} == {"whole": [1, 2], "tokens": [0.75, 4]}


def test_rewards_of_segments_that_meet_are_added():
    assert rewards.segment_rewards([1, 3, 3], [0.3, -0.3, 0.5], 5).tolist() == [0, 0.3, 0, 0.2, 0]
    with pytest.raises(ValueError, match="outside the 3 response tokens"):
        rewards.segment_rewards([3], [1.0], 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1.0], "has 1 rows for 2 samples"),
        ([1.0, [1.0, 2.0]], "sample 1 is .* each of its 1 response tokens"),
        ({"x": [math.nan, 0.0]}, "'x' of sample 0"),
    ],
)
def test_rewards_that_do_not_fit_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        rewards.place_rewards(given, fake_samples(3, 1))


def test_shuffled_rewards_are_the_same_numbers_in_other_rows():
    samples = fake_samples(*[2] * 20)
    given = rewards.shuffled(lambda s: [float(i) for i in range(20)])(samples)["reward"]
    assert sorted(given) == list(range(20)) and list(given) != list(range(20))


def test_dense_and_final_reward_of_the_same_total():
    """Equal returns at the first token for gamma = lambda = 1, but another gradient."""

    def dense(samples):
        return [[float(t == "yes") for t in tokens(ids)] for ids in samples.response_ids]

    def final(samples):
        return [float(sum(row)) for row in dense(samples)]

    def tokens(ids):
        return toy()[1].convert_ids_to_tokens(ids)

    config = dataclasses.replace(SHORT, gamma=1.0, lam=1.0, whiten_advantages=False)
    gradients, returns = [], []
    for reward_fn in (dense, final):
        learner, samples, rollout = started(config)
        targets = advantages_of(learner, samples, rollout, reward_fn)
        returns.append(targets[1])
        ppo.backward(learner, rollout, *targets)
        gradients.append(policy_gradient(learner))
    torch.testing.assert_close(returns[0][:, 0], returns[1][:, 0])
    assert returns[0].sum() > 0 and not torch.allclose(returns[0], returns[1])
    assert (gradients[0] - gradients[1]).norm() > 0.1 * gradients[1].norm()


def test_ppo_learns_nothing_from_equal_rewards():
    """Neither from equal numbers nor from the rounding of their mean: the policy stands still."""
    model, tokenizer = toy()
    before = {n: p.clone() for n, p in model.named_parameters()}
    config = dataclasses.replace(
        SHORT, steps=1, prompts_per_step=6, minibatch_size=3, max_new_tokens=1, lam=1.0, kl_coef=0.0,
        epochs=1,
    )  # fmt: skip
    prompts = ["yes no"] * 6  # a value head that starts at 0 expects the same of each
    ppo.train_ppo(model, tokenizer, prompts, lambda s: [77.7] * len(s), config)
    moved = max((p - before[n]).abs().max().item() for n, p in model.named_parameters())
    assert moved < 1e-5


# --- the shared trunk ----------------------------------------------------------------------------

KINDS = [
    ("tiny", "top", 1), ("tiny", "lora", 1), ("tiny", "lora", 2), ("tiny", "all", 1),
    ("tiny-encoder-decoder", "top", 1), ("tiny-encoder-decoder", "lora", 2),
    ("tiny-encoder-decoder", "all", 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind", "layers"), KINDS)
def test_before_the_first_update_the_ratio_is_1_and_kl_is_0(name, kind, layers):
    config = dataclasses.replace(SHORT, train=kind, layers=layers, temperature=0.7)
    found = ppo.before_update(*toy(name), PROMPTS, config)
    assert found["ratio_error"] < 1e-5 and found["kl"] == 0
    assert found["sampler_error"] < 1e-4


def test_the_check_sees_filters_that_the_ratio_does_not():
    for filters in ({"top_k": 3}, {"top_p": 0.5}):
        config = dataclasses.replace(SHORT, **filters)
        found = ppo.before_update(*toy(), PROMPTS, config)
        assert found["ratio_error"] < 1e-5 and found["kl"] == 0
        assert found["sampler_error"] > 0.3  # half of the mass kept: all kept gain ln 2


def test_adapters_of_the_check_are_those_that_train():
    """As in a notebook: the check, a run, and a second run that goes on from the first."""
    model, tokenizer = toy()
    config = dataclasses.replace(SHORT, train="lora", layers=2, learning_rate=1e-2)
    ppo.before_update(model, tokenizer, PROMPTS, config)
    size = models.count_parameters(model)["total"]
    first = ppo.train_ppo(model, tokenizer, PROMPTS, share_of_yes, config)
    second = ppo.train_ppo(model, tokenizer, PROMPTS, share_of_yes, config)
    assert models.count_parameters(model)["total"] == size
    assert first["kl_k3"].iloc[-1] > 0 and second["kl_k3"][0] == 0  # each starts at its reference


def test_the_check_sees_a_changed_policy():
    learner, samples, rollout = started()
    with torch.no_grad():
        learner.shared.parameter_groups()[0][0].add_(0.1)
    means = ppo.backward(learner, rollout, *advantages_of(learner, samples, rollout))
    assert means["ratio_error"] > 1e-3
    again = ppo.roll_out(learner, ppo.sample(learner, PROMPTS, 0))
    assert (again.log_probs - again.ref_log_probs).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "kind", "layers"), KINDS)
def test_log_probs_are_those_of_the_model_and_of_the_sampler(name, kind, layers):
    """Trunk, padding and chunks change nothing: each row equals a plain forward pass of its own."""
    config = dataclasses.replace(SHORT, train=kind, layers=layers, forward_rows=3)
    _, samples, rollout = started(config, name)
    plain = toy(name)[0]
    for i, (prompt, response) in enumerate(
        zip(samples.prompt_ids, samples.response_ids, strict=True)
    ):
        prompt, response = torch.tensor([prompt]), torch.tensor([response])
        with torch.no_grad():
            if plain.config.is_encoder_decoder:
                start = torch.tensor([[plain.config.decoder_start_token_id]])
                shifted = torch.cat([start, response[:, :-1]], 1)
                logits = plain(input_ids=prompt, decoder_input_ids=shifted).logits
            else:
                logits = plain(torch.cat([prompt, response], 1)).logits[:, prompt.shape[1] - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, response[..., None])[0, :, 0]
        found = rollout.log_probs[i, : response.shape[1]]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        sampled = torch.from_numpy(samples.log_probs[i])
        torch.testing.assert_close(found, sampled, atol=1e-5, rtol=1e-5)
    assert rollout.log_probs.requires_grad is False


def test_log_probs_follow_the_temperature():
    _, samples, rollout = started(dataclasses.replace(SHORT, temperature=0.5))
    sampled, mask = samples.padded("log_probs")
    torch.testing.assert_close(rollout.log_probs * mask, sampled, atol=1e-5, rtol=1e-5)


def test_the_trunk_is_computed_once_and_never_trained(monkeypatch):
    learner, samples, _ = started(dataclasses.replace(SHORT, train="top", layers=1))
    before, computed = {n: p.clone() for n, p in learner.policy.named_parameters()}, []
    lower = models.decoder_layers(learner.policy)[0]
    monkeypatch.setattr(lower.mlp, "forward", counted(lower.mlp.forward, computed))
    rollout = ppo.roll_out(learner, samples)
    ppo.update(learner, rollout, *advantages_of(learner, samples, rollout), 0)
    assert len(computed) == 1  # one chunk: once for policy, reference, value and both epochs
    changed = {n for n, p in learner.policy.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all(n.startswith(("model.layers.1.", "model.norm")) for n in changed)


def counted(function, calls):
    def call(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    return call


def test_dropout_is_off_even_in_a_model_handed_over_in_training_mode():
    model, tokenizer = toy("tiny-encoder-decoder")
    for module in model.train().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    found = ppo.before_update(model, tokenizer, PROMPTS, SHORT)
    assert found["ratio_error"] < 1e-5 and found["kl"] == 0


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("name", ["tiny", "tiny-encoder-decoder"])
def test_a_value_sees_the_tokens_before_it_and_no_others(name, separate):
    value_model = models.build_tiny_model(name, words=WORDS, seed=3)[0] if separate else None
    learner, _, rollout = started(SHORT, name, value_model=value_model)
    torch.nn.init.normal_(learner.shared.value_head[-1].weight)
    changed = dataclasses.replace(rollout.tokens, response_ids=rollout.tokens.response_ids.clone())
    changed.response_ids[:, 3] = (changed.response_ids[:, 3] + 1) % 14
    with torch.no_grad():
        before, after = (ppo.evaluate(learner, x)[1] for x in (rollout.tokens, changed))
    torch.testing.assert_close(before[:, :4], after[:, :4])
    long = rollout.mask[:, 4] == 1
    assert long.any() and ((before[long, 4] - after[long, 4]).abs() > 1e-4).all()


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("train", ["top", "lora", "all"])
@pytest.mark.parametrize("name", ["tiny", "tiny-encoder-decoder"])
def test_padding_is_not_computed_and_changes_nothing(name, train, separate, monkeypatch):
    """Prompts and responses of 1 to 8 tokens: values and gradients of the fast path, and of a plain one that
    computes padding too."""
    value_model = models.build_tiny_model(name, words=WORDS, seed=3)[0] if separate else None
    how = {"layers": 1, "forward_rows": 3, "temperature": 0.8}
    config = dataclasses.replace(SHORT, train=train, **how)
    monkeypatch.setattr(fast, "VOCABULARY_AT_ONCE", 4)
    learner, _, _ = started(config, name, value_model=value_model)
    assert fast._reads_states(learner.policy) == (train != "all")
    torch.nn.init.normal_(learner.shared.value_head[-1].weight)
    prompts = ["a", "a b c d e", "yes", "no yes a", "a b", "b", "c", "a b c"]
    samples = generation.sample(
        learner.policy, learner.tokenizer, prompts, seed=0, max_new_tokens=8
    )
    for row in (1, 4):
        samples.response_ids[row] = samples.response_ids[row][:2]
    found, computed = {}, {}
    for plain in ("0", "1"):
        if plain == "1":
            monkeypatch.setenv("LIB_PLAIN", "1")
            everywhere = property(lambda tokens: torch.ones_like(tokens.response_mask.bool()))
            monkeypatch.setattr(policy.TokenBatch, "places", everywhere)
            monkeypatch.setattr(policy.TokenBatch, "_padding", lambda tokens, index: (0, 0))
        rollout = ppo.roll_out(learner, samples)
        part = rollout.rows(torch.tensor([2, 0, 5]))
        computed[plain] = part.tokens.prompt_ids.shape[1]
        log_probs, values, _ = ppo.evaluate(learner, part.tokens)
        learner.optimizer.zero_grad()
        ((log_probs.exp() + values) * part.mask).sum().backward()
        gradients = [p.grad for p in learner.network.parameters() if p.grad is not None]
        parts = (rollout.log_probs, rollout.ref_log_probs, rollout.values, rollout.entropy)
        found[plain] = [x * rollout.mask for x in parts]
        found[plain] += [log_probs * part.mask, values * part.mask, *gradients]
    assert computed["0"] < computed["1"], "these three prompts are shorter than the longest"
    for quick, slow in zip(*found.values(), strict=True):
        torch.testing.assert_close(quick, slow, atol=1e-4, rtol=1e-4)


def test_the_reference_stays_the_initial_policy():
    learner, samples, rollout = started(dataclasses.replace(SHORT, train="lora", layers=2))
    ppo.update(learner, rollout, *advantages_of(learner, samples, rollout), 0)
    again = ppo.roll_out(learner, samples)
    torch.testing.assert_close(again.ref_log_probs, rollout.log_probs)
    assert not torch.allclose(again.log_probs, rollout.log_probs, atol=1e-3)


def test_a_bfloat16_trunk_under_float32_layers():
    """Mixed dtypes sample and train, and stay near the float32 policy."""
    plain = started(dataclasses.replace(SHORT, train="top", layers=1))[2]
    model, tokenizer = toy()
    config = dataclasses.replace(SHORT, train="top", layers=1)
    found = ppo.before_update(model.bfloat16(), tokenizer, PROMPTS, config)
    assert found["ratio_error"] < 1e-5 and found["kl"] == 0
    dtypes = [next(layer.parameters()).dtype for layer in models.decoder_layers(model)]
    assert dtypes == [torch.bfloat16, torch.float32] and model.lm_head.weight.dtype == torch.float32
    with torch.no_grad():
        shared = policy.SharedTrunkPolicy(model, frozen=1)
        logits, _ = shared(dataclasses.replace(plain.tokens, trunk=None))
    logits = plain.tokens.spread(logits)
    chosen = logits.log_softmax(-1).gather(-1, plain.tokens.response_ids[..., None])[..., 0]
    assert ((chosen - plain.log_probs).abs() * plain.mask).max() < 0.05


def test_set_trainable_refuses_what_it_cannot_do():
    model = toy()[0]
    with pytest.raises(ValueError, match="allowed: 'top', 'lora', 'all'"):
        models.set_trainable(model, "some")
    with pytest.raises(ValueError, match="give 1 to 2"):
        models.set_trainable(model, "top", layers=3)
    models.set_trainable(model, "lora", layers=1)
    models.set_trainable(model, "lora", layers=1)  # the same again: goes on with these adapters
    assert 0 < models.count_parameters(model)["trainable"] < 10_000
    with pytest.raises(ValueError, match="carries adapters already"):
        models.set_trainable(model, "lora", layers=2)


# --- one step, piece by piece --------------------------------------------------------------------


def test_advantages_are_those_of_reward_less_kl_penalty():
    config = dataclasses.replace(SHORT, kl_coef=0.5, gamma=0.9, lam=0.8, whiten_advantages=False)
    learner, samples, rollout = started(config)
    rollout.ref_log_probs = rollout.log_probs - 0.3
    advantages, _ = advantages_of(learner, samples, rollout)
    scores, _ = rewards.place_rewards(share_of_yes(samples), samples)
    expected, _ = losses.gae(scores - 0.5 * 0.3, rollout.values, rollout.mask, 0.9, 0.8)
    torch.testing.assert_close(advantages, expected)


@pytest.mark.parametrize("rows_at_once", [1, 3, 16])
def test_micro_batches_add_up_to_the_minibatch(rows_at_once):
    gradients = []
    for rows in (rows_at_once, 8):
        learner, samples, rollout = started(dataclasses.replace(SHORT, forward_rows=rows))
        ppo.backward(learner, rollout, *advantages_of(learner, samples, rollout))
        gradients.append(policy_gradient(learner))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)


def test_minibatches_hold_every_row_once_whatever_the_number_of_processes():
    whole = ppo.minibatches(SHORT, 3, 1)  # 8 rows in minibatches of 4
    assert sorted(whole.flatten().tolist()) == list(range(8)) and whole.shape == (2, 4)
    assert not torch.equal(whole, ppo.minibatches(SHORT, 3, 0))

    shares = [ppo.minibatches(SHORT, 3, 1, rank, world=2) + 4 * rank for rank in (0, 1)]
    assert torch.equal(torch.cat(shares, 1), whole)


def test_prompts_go_round_without_repetition():
    learner = ppo.make_learner(*toy(), SHORT)
    seen = [ppo.sample(learner, PROMPTS[:16], step).prompts for step in range(4)]
    assert sorted(seen[0] + seen[1]) == sorted(PROMPTS[:16]) == sorted(seen[2] + seen[3])
    assert seen[:2] != seen[2:]


def test_history_has_every_column_and_counts_tokens():
    config = dataclasses.replace(SHORT, samples_per_prompt=2, kl_target=6.0, kl_horizon=1000)
    history = train(config, lambda s: {"yes": share_of_yes(s)["yes"], "short": [-0.1] * len(s)})
    wanted = """step reward reward/yes reward/short kl kl_k3 entropy length finished kl_coef
        policy_loss value_loss clip_fraction explained_variance ratio_error grad_norm learning_rate"""
    stages = [f"{unit}_{stage}" for unit in ("tokens", "seconds") for stage in ppo.STAGES]
    assert set(wanted.split() + stages) == set(history.columns)
    np.testing.assert_allclose(
        history["reward"], history["reward/yes"] + history["reward/short"], atol=1e-6
    )
    np.testing.assert_allclose(history["tokens_sample"], history["length"] * 16)
    assert history["kl"][0] == 0 and (history["kl_k3"] >= 0).all() and history["kl_k3"][2] > 0
    # KL is far below the target, so beta falls by 20% x 16 / 1000 a step
    np.testing.assert_allclose(history["kl_coef"], 0.01 * 0.9968 ** np.arange(3))
    assert history.attrs["ratio_distribution"] == "softmax(logits / temperature)"


def test_filtered_sampling_is_declared():
    history = train(dataclasses.replace(SHORT, steps=1, top_k=5))
    assert "unfiltered, unlike sampling" in history.attrs["ratio_distribution"]


def test_adaptive_kl_reproduces_rewardlm_s_final_coefficient():
    beta = 0.2
    for _ in range(128):
        beta = ppo.adapt_kl_coef(beta, kl=0.0, target=6.0, episodes=64, horizon=10_000)
    assert beta == pytest.approx(0.16976, abs=5e-6)
    assert ppo.adapt_kl_coef(0.1, 6.6, 6.0, 100, 1000) == pytest.approx(0.1 * (1 + 0.1 * 0.1))


# --- stops, best weights, resuming ---------------------------------------------------------------


def test_it_stops_at_the_kl_limit():
    by_kl = train(dataclasses.replace(TOY, stop_kl=0.5))
    assert 1 < len(by_kl) < 60 and by_kl["kl_k3"].iloc[-1] > 0.5 > by_kl["kl_k3"].iloc[-2]
    assert "above stop_kl 0.5" in by_kl.attrs["stopped"]


def test_a_loss_that_is_not_finite_names_step_and_minibatch():
    learner, samples, rollout = started()
    advantages, returns = advantages_of(learner, samples, rollout)
    with pytest.raises(FloatingPointError, match="step 5, epoch 0, minibatch 0"):
        ppo.update(learner, rollout, advantages + math.inf, returns, 4)


def test_held_out_answers_are_greedy_where_asked(monkeypatch):
    drawn = []
    real = ppo.generation.sample

    def spy(*arguments, **options):
        drawn.append((options["temperature"], len(arguments[2])))
        return real(*arguments, **options)

    monkeypatch.setattr(ppo.generation, "sample", spy)
    model, tokenizer = models.build_tiny_model("tiny")
    reward = rewards.from_judge(lambda prompts, texts: np.zeros(len(texts)))
    options = {"steps": 1, "prompts_per_step": 4, "minibatch_size": 4, "max_new_tokens": 3}
    for greedy in (False, True):
        config = ppo.PPOConfig(**options, greedy_held_out=greedy, eval_every=1, temperature=0.7)
        ppo.train_ppo(model, tokenizer, PROMPTS[:6], reward, config, held_out=PROMPTS[6:8])
    assert drawn == [(0.7, 2), (0.7, 4), (0.7, 2), (0.0, 2), (0.7, 4), (0.0, 2)]


def test_the_policy_ends_with_the_best_held_out_weights():
    model, tokenizer = toy()
    scripted, weights = iter([1.0, 5.0, 2.0]), []

    def reward(samples):
        if samples.prompts != ["yes"]:
            return share_of_yes(samples)
        weights.append(copy.deepcopy(model.state_dict()))
        return [next(scripted)]

    config = dataclasses.replace(SHORT, steps=2, eval_every=1)
    history = ppo.train_ppo(model, tokenizer, PROMPTS[:-1], reward, config, held_out=["yes"])
    assert history["held_out_reward"].tolist() == [5.0, 2.0]
    assert history.attrs["held_out_start"] == 1.0 and history.attrs["best_step"] == 1
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[1][name])
    assert any(not torch.equal(weights[1][name], weights[2][name]) for name in weights[1])


RESUMED = dataclasses.replace(
    SHORT, steps=6, checkpoint_every=2, eval_every=2, kl_target=1.0, kl_horizon=100,
)  # fmt: skip


def train_resumable(folder):
    """History and final weights of a short run that keeps checkpoints."""
    model, tokenizer = toy()
    reward = rewards.shuffled(share_of_yes)  # draws random numbers, which resuming must repeat
    options = {"held_out": PROMPTS[:4], "folder": folder}
    history = ppo.train_ppo(model, tokenizer, PROMPTS, reward, RESUMED, **options)
    return history, model.state_dict()


KILLED_RUN = """
import os, signal, sys
from lib import ppo
from tests import test_ppo

update = ppo.update
def killing_update(learner, rollout, advantages, returns, step):
    if step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return update(learner, rollout, advantages, returns, step)
ppo.update = killing_update
test_ppo.train_resumable(sys.argv[1])
"""


def run_python(*arguments, timeout=240):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CI": "1"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # gloo stays on loopback
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True,
        timeout=timeout,
    )  # fmt: skip


def test_a_run_killed_with_sigkill_continues_to_the_same_history_and_weights(tmp_path):
    killed = run_python("-c", KILLED_RUN, str(tmp_path / "killed"))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    newest = training.newest_checkpoint(tmp_path / "killed")
    assert newest.name == "checkpoint-000002" and (newest / "weights.safetensors").exists()
    assert len(pd.read_csv(tmp_path / "killed" / "history.csv")) == 3  # written as the run goes
    resumed, weights = train_resumable(tmp_path / "killed")
    whole, expected = train_resumable(tmp_path / "whole")
    assert len(whole) == 6
    pd.testing.assert_frame_equal(without_times(resumed), without_times(whole), rtol=1e-5)
    assert resumed.attrs == whole.attrs
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, atol=1e-5, rtol=1e-5)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    train(dataclasses.replace(SHORT, steps=1), folder=tmp_path)
    with pytest.raises(ValueError, match="holds a run with other settings"):
        train(dataclasses.replace(SHORT, steps=1, kl_coef=0.3), folder=tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0; it must be above 0"),
        ({"lam": 1.5}, "lam is 1.5"),
        ({"kl_coef": -1.0}, "kl_coef is -1.0; it must be at least 0"),
        ({"minibatch_size": 5}, "minibatch_size 5 does not divide"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SHORT, **changes)


def test_too_few_prompts_are_refused():
    with pytest.raises(ValueError, match="2 prompts are fewer than prompts_per_step 8"):
        ppo.train_ppo(*toy(), PROMPTS[:2], share_of_yes, SHORT)


# --- several processes, and TRL's RLOO -----------------------------------------------------------


def test_rloo_learns_from_the_same_reward_function(tmp_path):
    config = dataclasses.replace(TOY, steps=12, prompts_per_step=4, samples_per_prompt=4)
    model, tokenizer = toy()
    history = rloo.train_rloo(model, tokenizer, PROMPTS, share_of_yes, config, folder=tmp_path)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "history.csv"), history, check_dtype=False)
    assert history["step"].tolist() == list(range(1, 13))
    assert history["reward"].tail(3).mean() > history["reward"].head(3).mean() + 0.05
    np.testing.assert_allclose(history["reward"], history["reward/yes"], rtol=1e-5)
    values = {"explained_variance", "value_loss"}
    assert set(history.columns) == set(train(SHORT).columns) - values
    assert not hasattr(model, "value_function")


def test_rloo_s_advantages_count_the_kl_and_compare_within_a_prompt():
    config = dataclasses.replace(
        SHORT, prompts_per_step=2, samples_per_prompt=2, whiten_advantages=False
    )
    learner = ppo.make_learner(*toy(), config)
    mask = torch.tensor([[1.0, 1], [1, 0], [1, 1], [1, 1]])
    paid = torch.tensor([[0.5, 0.5], [3.0, math.nan], [1.0, 0.0], [0.0, 1.0]])
    advantages = rloo.estimate_advantages(learner, paid, mask)
    torch.testing.assert_close(advantages, torch.tensor([[-2.0, -2], [2, 0], [0, 0], [0, 0]]))


def test_rloo_needs_two_samples_of_a_prompt():
    with pytest.raises(ValueError, match="samples_per_prompt is 1"):
        rloo.train_rloo(*toy(), PROMPTS, share_of_yes, SHORT)
