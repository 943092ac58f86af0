"""Models in 8 bits: rows that do not depend on each other, each way of training, saving, freeing.

With bitsandbytes alone, which computes on a CPU too (`pip install bitsandbytes`); skipped without it.
"""

import pytest
import torch
from conftest import WORDS

from lib import generation, int8, logprobs, models, ppo, reward_models, rloo, runtime, sft

PROMPTS = ["the cat", "you are", "a dog sat on", "nice"]
ANSWERS = ["sat .", "kind", "the mat", "stupid idiot ."]
CONFIG = ppo.PPOConfig(
    steps=1, prompts_per_step=4, samples_per_prompt=2, minibatch_size=4, max_new_tokens=4, epochs=1,
    layers=1, lora_rank=2, train="lora", learning_rate=0.05, forward_rows=3,
)  # fmt: skip


def by_length(samples):
    return [len(text) / 10 for text in samples.texts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A kept tiny model with outliers in its states, which is what makes integers depend on the batch."""
    model, tokenizer = models.build_tiny_model("tiny", words=WORDS, seed=3, initializer_range=0.3)
    with torch.no_grad():
        model.model.embed_tokens.weight[6::3, 5] = 40.0
    return str(models.save(model, tokenizer, tmp_path_factory.mktemp("models") / "start"))


@pytest.fixture
def eight(folder):
    pytest.importorskip("bitsandbytes")
    return models.load_policy(folder, eight_bit=True, dtype=torch.float32)


def test_unpacked_weights_are_the_weights_up_to_their_scale():
    weight = torch.randn(5, 7)
    scale = weight.abs().amax(1)
    integers = (weight / scale[:, None] * 127).round().to(torch.int8)
    floats = int8.unpack(integers, scale, torch.float32)
    assert (floats - weight).abs().max() <= 0.5 * scale.max() / 127 + 1e-6
    x = torch.randn(3, 7, requires_grad=True)
    out = int8._Product.apply(x, integers, scale, None)
    torch.testing.assert_close(out, x @ floats.T)
    out.square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * out.detach() @ floats)


def test_a_row_does_not_depend_on_the_rows_beside_it(eight, folder):
    model, tokenizer = eight
    assert models.is_eight_bit(model) and models.is_eight_bit(model.base_model)
    drawn = generation.sample(model, tokenizer, PROMPTS, n=2, max_new_tokens=4)
    pairs = (drawn.prompt_ids, drawn.response_ids)
    together = logprobs.token_log_probs(model, *pairs)
    for row, values in enumerate(together):
        alone = logprobs.token_log_probs(model, pairs[0][row : row + 1], pairs[1][row : row + 1])[0]
        torch.testing.assert_close(torch.tensor(alone), torch.tensor(values), atol=1e-4, rtol=0)
    full, _ = models.load_policy(folder, dtype=torch.float32)
    near = logprobs.token_log_probs(full, *pairs)
    gaps = [abs(a - b).max() for a, b in zip(together, near, strict=True)]
    assert 0 < max(gaps) < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_before_ppo_ratios_are_one(folder, dtype):
    pytest.importorskip("bitsandbytes")
    model, tokenizer = models.load_policy(folder, eight_bit=True, dtype=dtype)
    check = ppo.before_update(model, tokenizer, PROMPTS, CONFIG)
    assert check["ratio_error"] < 1e-3 and check["kl"] < 1e-3
    assert check["sampler_error"] < 0.03  # the bound of notebook 11


@pytest.mark.parametrize("way", ["sft", "ppo", "rloo"])
def test_adapters_train_over_eight_bits_and_are_kept(eight, folder, tmp_path, way):
    model, tokenizer = eight
    if way == "sft":
        models.set_trainable(model, "lora", layers=1, lora_rank=2)
        rows = sft.encode_completions(tokenizer, PROMPTS, ANSWERS)
        sft.train_sft(model, tokenizer, rows, max_steps=2, learning_rate=0.05)
    elif way == "ppo":
        ppo.train_ppo(model, tokenizer, PROMPTS, by_length, CONFIG)
    else:
        rloo.train_rloo(model, tokenizer, PROMPTS, by_length, CONFIG)
    trained = {n: x for n, x in model.named_parameters() if "lora_" in n}
    assert {x.dtype for x in trained.values()} == {torch.float32}
    assert any(x.abs().max() > 0 for n, x in trained.items() if "lora_B" in n)
    kept = models.save(model, tokenizer, tmp_path / "kept")
    assert not (kept / "base").exists()
    again, _ = models.load_policy(str(kept), dtype=torch.float32)  # the card says: in 8 bits
    assert models.is_eight_bit(again)
    ids = torch.tensor([[6, 7, 8, 9]])
    with torch.no_grad():
        outputs = [m(input_ids=ids).logits.float() for m in (again, model)]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)
    plain, _ = models.load_policy(str(kept), dtype=torch.float32, eight_bit=False)
    assert not models.is_eight_bit(plain)


def test_a_reward_model_trains_over_eight_bits_and_is_kept(folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    backbone, tokenizer = reward_models.load_backbone(folder, eight_bit=True, dtype=torch.float32)
    assert models.is_eight_bit(backbone)
    models.set_trainable(backbone, "lora", layers=1, lora_rank=2)
    model = reward_models.RewardModel(backbone, tokenizer)
    feedback = reward_models.Feedback(
        PROMPTS, ANSWERS, torch.arange(4).numpy() // 2, torch.tensor([1.0, 0, 0.5, 0]).numpy()
    )
    config = reward_models.TrainConfig(epochs=2, learning_rate=0.05)
    reward_models.train(model, feedback, config)
    again = reward_models.load(models.save(model.eval(), tokenizer, tmp_path / "kept"))
    assert models.is_eight_bit(again.backbone)
    expected = torch.tensor(model.score(PROMPTS, ANSWERS))
    torch.testing.assert_close(
        torch.tensor(again.score(PROMPTS, ANSWERS)), expected, atol=1e-5, rtol=0
    )


def test_what_eight_bits_cannot_do_is_refused_with_what_can(eight, tmp_path, monkeypatch):
    model, tokenizer = eight
    with pytest.raises(
        ValueError, match="in 8 bits without adapters holds nothing that was trained"
    ):
        models.save(model, tokenizer, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
    for train in ("top", "all"):
        with pytest.raises(
            ValueError, match=f"train is '{train}'; a model in 8 bits trains with 'lora'"
        ):
            models.set_trainable(model, train, layers=1)


def test_free_memory_releases_eight_bits(eight):
    model, _ = eight
    layers = [m for m in model.modules() if hasattr(getattr(m, "state", None), "CB")]
    runtime.free_memory(model)
    assert layers and all(m.state.CB is None and m.state.SCB is None for m in layers)
    assert {p.device.type for p in model.parameters()} == {"meta"}
