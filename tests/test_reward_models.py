"""Reward models: encoding, padding, losses, training, storage, best of n."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import WORDS, asset
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, BertTokenizerFast

from lib import losses, models, preferences, reward_models, stats
from lib.papers.sparse_feedback import conversions
from lib.reward_models import Feedback, RewardModel, TrainConfig

PROMPTS = ["the cat sat", "a dog ran on the mat .", "you", ""]
RESPONSES = ["you are kind", "stupid", "the dog is nice . you are nice", "a cat"]


def decoder(**options):
    backbone, tokenizer = models.build_tiny_model("tiny", words=WORDS)
    return RewardModel(backbone.base_model, tokenizer, **options)


def encoder(**options):
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = BertTokenizerFast(vocab={w: i for i, w in enumerate([*special, *WORDS, "is"])})
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    return RewardModel(BertModel(config).eval(), tokenizer, **options)


def random_head(model, seed=0):
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(seed))
    return model.eval()


def toy_feedback(n_prompts=24, kind="targets", seed=0):
    """Prompts with five responses each; a response is as good as its share of nice words."""
    rng = np.random.default_rng(seed)
    prompts, responses, group, targets = [], [], [], []
    for number in range(n_prompts):
        prompt = " ".join(rng.choice(WORDS[:8], 4))
        for good in range(5):
            words = ["nice"] * good + ["stupid"] * (4 - good)
            prompts.append(f"{prompt} {number}")
            responses.append(" ".join(rng.permutation(words)))
            group.append(number)
            targets.append(good / 4)
    group, targets = np.array(group), np.array(targets, dtype=np.float32)
    if kind == "targets":
        return Feedback(prompts, responses, group, targets)
    one = np.array([(better, worse) for worse, better in itertools.combinations(range(5), 2)])
    pairs = np.concatenate([5 * number + one for number in range(n_prompts)])
    return Feedback(prompts, responses, group, pairs=pairs)


# --- encoding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("build", [decoder, encoder])
def test_a_score_does_not_depend_on_padding(build, pooling, side):
    model = random_head(build(pooling=pooling, padding_side=side))
    together = model.score(PROMPTS, RESPONSES)
    alone = [model.score([p], [r])[0] for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.ptp(together) > 1e-3  # the scores differ, so the comparison says something
    in_training = model(**model.batch(model.encode(PROMPTS, RESPONSES))).logits[:, 0]
    np.testing.assert_allclose(in_training.detach(), alone, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_prompt_computed_once_gives_the_same_features(monkeypatch, pooling):
    prompts = [p for p in PROMPTS[:3] for _ in RESPONSES]
    model, responses = decoder(pooling=pooling), RESPONSES * 3
    fast = model.features(prompts, responses, tokens_per_batch=60)
    calls = []
    hook = model.backbone.register_forward_hook(lambda *_: calls.append(1))
    model.features(prompts, responses)
    hook.remove()
    assert len(calls) == 2  # all prompts, then all responses
    monkeypatch.setenv("LIB_PLAIN", "1")
    torch.testing.assert_close(fast, model.features(prompts, responses), atol=1e-5, rtol=1e-4)
    assert fast.std(0).max() > 1e-3


def test_features_are_kept():
    store = reward_models.FeatureStore(decoder())
    first = store(["you", "the cat", "you"], ["nice", "ran", "nice"])
    torch.testing.assert_close(first[0], first[2])
    hook = store.model.backbone.register_forward_hook(lambda *_: pytest.fail("computed again"))
    torch.testing.assert_close(store(["the cat"], ["ran"])[0], first[1])
    hook.remove()
    assert len(store.rows) == 2


def test_both_padding_sides_give_the_same_score():
    for build in (decoder, encoder):
        left, right = (random_head(build(padding_side=s)) for s in ("left", "right"))
        a, b = left.score(PROMPTS, RESPONSES), right.score(PROMPTS, RESPONSES)
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_encoder_of_an_encoder_decoder_can_be_a_backbone():
    backbone, tokenizer = reward_models.load_backbone("tiny-encoder-decoder")
    model = random_head(RewardModel(backbone, tokenizer))
    together = model.score(PROMPTS, RESPONSES)
    alone = [model.score([p], [r])[0] for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    np.testing.assert_allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("name", ["encoder", "policy"])
def test_padding_invariance_of_the_real_backbones(name):
    asset(name)
    keep = 2 if name == "policy" else None
    model = random_head(RewardModel(*reward_models.load_backbone(name, keep_layers=keep)))
    together = model.score(PROMPTS, RESPONSES)
    alone = [model.score([p], [r])[0] for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    np.testing.assert_allclose(together, alone, atol=2e-3 * np.abs(together).max())


def test_mean_pools_the_response_and_nothing_else():
    model = decoder()
    rows = model.encode(["the cat sat on"], ["the mat"])
    batch = model.batch(rows)
    assert batch["response_mask"].sum() == 3  # two words and the end token
    hidden = model.hidden(**batch)
    pooled = reward_models.pool(hidden, batch["attention_mask"], batch["response_mask"], "mean")
    torch.testing.assert_close(pooled[0], hidden[0, -3:].mean(0))


def test_a_long_prompt_loses_its_beginning_and_never_the_response():
    model = random_head(decoder(max_length=8))
    with pytest.warns(UserWarning, match="cut to 8 tokens: 1 prompts of 2"):
        z = model.score(["dog " * 50 + "the cat sat on", "you"], ["you are kind", "nice"])
    assert model.truncated == {"prompts": 1, "responses": 0}
    assert z[0] == pytest.approx(model.score(["the cat sat on"], ["you are kind"])[0], abs=1e-6)
    with pytest.warns(UserWarning, match="1 prompts, 1 responses"):
        model.score(["the cat"], ["kind " * 20])
    assert model.truncated["responses"] == 1
    (context, response), *_ = model.encode(["the cat"], ["nice " + "kind " * 20])
    assert context == [] and len(response) == 8 and model.tokenizer.decode(response[0]) == "nice"


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="pooling is 'max'; allowed: mean, last"):
        decoder(pooling="max")
    with pytest.raises(ValueError, match=r"texts\[1\] is float"):
        decoder().score(["a", "b"], ["x", float("nan")])
    batch = decoder().batch([([1], [2])])
    with pytest.raises(ValueError, match="Try pooling='last'"):
        decoder()(batch["input_ids"], batch["attention_mask"])


# --- feedback ------------------------------------------------------------------------------------


def test_ratings_as_training_data():
    table = pd.DataFrame(
        [("q", "", "a", 1), ("q", "", "b", 7), ("q", "", "a", 5), ("r", "x", "a", 4)],
        columns=preferences.RATING,
    )
    found = reward_models.from_ratings(table)
    assert found.responses == ["a", "b", "a"] and found.group.tolist() == [0, 0, 1]
    np.testing.assert_allclose(found.targets, [0, 1, 0.5])  # the first rating of a response counts
    assert found.prompts[2] == preferences.alpaca_prompt("r", "x")
    with pytest.raises(ValueError, match=r"outside \[1, 7\]"):
        reward_models.from_ratings(table.assign(score=8))


def test_rankings_as_training_data():
    rows = [("q", "", "a", "b", "(a)"), ("q", "", "a", "c", "(b)"), ("q", "", "b", "c", "equal")]
    table = pd.DataFrame(
        [*rows, rows[0], ("r", "", "a", "b", "equal")], columns=preferences.RANKING
    )
    found = reward_models.from_rankings(table)
    assert found.responses == ["a", "b", "c"] and found.pairs.tolist() == [[0, 1], [2, 0]]
    assert found.group.tolist() == [0, 0, 0]
    released = conversions.to_rankings_rm(
        table
    )  # the conversion of the reference keeps the same pairs
    texts = [[found.responses[i] for i in pair] for pair in found.pairs]
    assert [entry["sentences"] for entry in released.values()] == [texts]
    with pytest.raises(ValueError, match="every verdict is 'equal'"):
        reward_models.from_rankings(table[table["verdict"] == "equal"])


def test_what_nobody_judged_trains_nothing():
    rankings = pd.DataFrame(
        [("q", "", "a", "b", "(a)"), ("q", "", "c", "d", None)], columns=preferences.RANKING
    )
    found = reward_models.from_rankings(rankings)
    assert [[found.responses[i] for i in pair] for pair in found.pairs] == [["a", "b"]]
    with pytest.raises(ValueError, match="or missing"):
        reward_models.from_rankings(rankings[1:])
    ratings = pd.DataFrame([("q", "", "a", None), ("q", "", "b", 7)], columns=preferences.RATING)
    assert reward_models.from_ratings(ratings).targets.tolist() == [1.0]
    with pytest.raises(ValueError, match="no row has a score"):
        reward_models.from_ratings(ratings[:1])


def test_shuffled_keeps_what_is_paid_and_turns_pairs():
    ratings, pairs = toy_feedback(), toy_feedback(kind="pairs")
    mixed, turned = reward_models.shuffled(ratings), reward_models.shuffled(pairs)
    assert sorted(mixed.targets) == sorted(ratings.targets)
    assert (mixed.targets != ratings.targets).any()
    same = (turned.pairs == pairs.pairs).all(1)
    assert 0.35 < same.mean() < 0.65
    assert (turned.pairs[~same] == pairs.pairs[~same][:, ::-1]).all()
    assert (ratings.targets == toy_feedback().targets).all()  # the original is left alone


# --- training ------------------------------------------------------------------------------------


def test_losses_before_training():
    """A head of zeros: Bradley-Terry gives ln 2, the rating loss the mean of (t - 1/2)^2."""
    for kind, expected in (("pairs", math.log(2)), ("targets", 0.125)):
        history = reward_models.train(decoder(), toy_feedback(2, kind), TrainConfig(epochs=1))
        assert history["loss"][0] == pytest.approx(expected, abs=1e-6)


def test_batch_loss_takes_all_pairs_of_the_chosen_prompts():
    feedback, model = toy_feedback(4, "pairs"), random_head(decoder())
    z = torch.tensor(model.score(feedback.prompts, feedback.responses))
    encoded = model.encode(feedback.prompts, feedback.responses)
    found = reward_models._batch_loss(model, feedback, np.array([3, 1]), encoded, None)
    pairs = feedback.pairs[np.isin(feedback.group[feedback.pairs[:, 0]], [1, 3])]
    assert len(pairs) == 20
    expected = losses.pairwise_loss(z[pairs[:, 0]], z[pairs[:, 1]])
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("kind", ["targets", "pairs"])
def test_head_learns_and_the_control_does_not(kind):
    learned, test = toy_feedback(40, kind), toy_feedback(10, "pairs", seed=9)
    accuracy = []
    for feedback in (learned, reward_models.shuffled(learned)):
        model = decoder()
        features = model.features(feedback.prompts, feedback.responses)
        config = TrainConfig(learning_rate=0.02)
        history = reward_models.train(model, feedback, config, features=features)
        z = model.score(test.prompts, test.responses)
        accuracy.append((z[test.pairs[:, 0]] > z[test.pairs[:, 1]]).mean())
        assert not any(p.grad is not None for p in model.backbone.parameters())
    assert accuracy[0] > 0.95 > 0.85 > accuracy[1]
    assert list(history) == ["step", "epoch", "loss", "learning_rate", "grad_norm"]
    assert len(history) == 20 * 5 and history["epoch"].iloc[-1] == 20


def test_the_history_stands_on_disk_while_a_reward_model_trains(tmp_path, monkeypatch):
    """After a step that fails, what was trained so far is there; without a folder nothing is written."""
    feedback, config = toy_feedback(8, "pairs"), TrainConfig(epochs=2, prompts_per_batch=4)
    history = reward_models.train(decoder(), feedback, config, folder=tmp_path / "whole")
    kept = pd.read_csv(tmp_path / "whole" / "history.csv")
    pd.testing.assert_frame_equal(kept, history)
    real, steps = reward_models._batch_loss, iter(range(4))

    def fails_at_the_third(*parts):
        return real(*parts) * (np.nan if next(steps) == 2 else 1)

    with pytest.raises(FloatingPointError, match="step 3 of 4"):
        reward_models.train(
            decoder(), feedback, config, batch_loss=fails_at_the_third, folder=tmp_path / "cut"
        )
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "cut" / "history.csv"), history[:2])
    monkeypatch.chdir(tmp_path)
    reward_models.train(decoder(), feedback, config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "whole"]


@pytest.mark.parametrize("kind", ["targets", "pairs"])
def test_a_batch_read_in_parts_is_the_same_batch(kind):
    """Prompts with different numbers of pairs weigh by their pairs, as in one piece."""
    feedback = toy_feedback(6, kind)
    if kind == "pairs":
        keep = np.arange(len(feedback.pairs)) % 3 != 0
        feedback.pairs = feedback.pairs[keep & (feedback.group[feedback.pairs[:, 0]] != 4)]
    histories, heads = [], []
    for size in (None, 1, 2):
        model = random_head(decoder())
        config = TrainConfig(epochs=2, prompts_per_batch=3, prompts_in_memory=size)
        histories.append(reward_models.train(model, feedback, config))
        heads.append(model.head.weight.detach().clone())
    for history, head in zip(histories[1:], heads[1:], strict=True):
        np.testing.assert_allclose(history.loss, histories[0].loss, rtol=1e-4)
        torch.testing.assert_close(head, heads[0], atol=1e-5, rtol=1e-3)


def test_validation_chooses_the_weights_and_a_killed_run_goes_on(tmp_path):
    feedback, config = toy_feedback(8, "pairs"), TrainConfig(epochs=4, prompts_per_batch=4)

    def trained(folder, values):
        model, states = decoder(), []

        def validate():
            if len(states) == len(values):
                raise KeyboardInterrupt
            states.append(model.head.weight.detach().clone())
            return values[len(states) - 1]

        history = reward_models.train(model, feedback, config, validate=validate, folder=folder)
        return model.head.weight.detach(), states, history

    head, states, whole = trained(tmp_path / "whole", [0.2, 0.9, 0.4, 0.9])
    torch.testing.assert_close(head, states[1], atol=0, rtol=0)
    assert whole.validation.dropna().tolist() == [0.2, 0.9, 0.4, 0.9]
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "killed", [0.2, 0.9])
    again, rest, history = trained(tmp_path / "killed", [0.4, 0.9])
    torch.testing.assert_close(again, head, atol=0, rtol=0)
    assert len(rest) == 2
    pd.testing.assert_frame_equal(history, whole)
    other = TrainConfig(epochs=5, prompts_per_batch=4)
    with pytest.raises(ValueError, match="other settings"):
        reward_models.train(
            decoder(), feedback, other, validate=lambda: 0.0, folder=tmp_path / "killed"
        )


def test_cached_features_train_the_same_head_as_the_frozen_backbone():
    feedback, found = toy_feedback(8, "pairs"), []
    for cached in (True, False):
        model = decoder()
        model.backbone.requires_grad_(False)
        features = model.features(feedback.prompts, feedback.responses)
        model.fit_scale(features)
        kept = features if cached else None
        reward_models.train(model, feedback, TrainConfig(epochs=2), features=kept)
        found.append(model.head.weight.detach().clone())
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("value", [0.0, 0.1, 77.7])
def test_a_feature_that_does_not_vary_is_not_blown_up(value):
    model = decoder()
    width = len(model.scale)
    features = torch.randn(7, width)
    features[:, 0] = value
    model.fit_scale(features)
    assert model.scale[0] == 1.0
    torch.testing.assert_close(model.scale[1:], features.std(0)[1:])
    model.fit_scale(features[:1])  # one row has no spread at all
    assert (model.scale == 1).all()


def test_training_stops_where_the_loss_is_not_finite():
    model, feedback = decoder(), toy_feedback(4)
    features = model.features(feedback.prompts, feedback.responses)
    features[7] = float("nan")
    with pytest.raises(FloatingPointError, match=r"nan at step 1 of 20, prompts \["):
        reward_models.train(model, feedback, features=features)
    with pytest.raises(ValueError, match="targets or pairs, not both"):
        reward_models.train(model, Feedback(["a"], ["b"], np.array([0])))


@pytest.mark.parametrize("how", [{"train": "top", "layers": 1}, {"train": "lora", "lora_rank": 4}])
def test_training_inside_the_backbone_and_storage(tmp_path, how):
    backbone, tokenizer = reward_models.load_backbone("tiny", keep_layers=2)
    models.set_trainable(backbone, **how)
    model = RewardModel(backbone, tokenizer, pooling="last", max_length=64)
    feedback = toy_feedback(12, "pairs")
    before = model.state_dict()["backbone.embed_tokens.weight"].clone()
    history = reward_models.train(model, feedback, TrainConfig(learning_rate=0.01, epochs=6))
    assert history["loss"].iloc[-1] < 0.5 * history["loss"].iloc[0]
    torch.testing.assert_close(model.state_dict()["backbone.embed_tokens.weight"], before)
    model.eval()
    folder = model.save(tmp_path, "tiny", **how)
    assert (folder / reward_models.WEIGHTS).stat().st_size < 400_000
    again = reward_models.load(folder)
    expected = model.score(PROMPTS, RESPONSES)
    np.testing.assert_allclose(again.score(PROMPTS, RESPONSES), expected, atol=1e-6)
    assert np.ptp(expected) > 1e-3 and again.pooling == "last"


def test_a_model_can_start_again_from_its_trained_state():
    backbone, tokenizer = reward_models.load_backbone("tiny")
    models.set_trainable(backbone, "lora")
    model, feedback = RewardModel(backbone, tokenizer), toy_feedback(6, "pairs")
    fresh, found = model.trained_state(), []
    assert not any("embed" in name for name in fresh) and any("lora_" in name for name in fresh)
    for _ in range(2):
        model.load_state_dict(fresh, strict=False)
        config = TrainConfig(learning_rate=0.01, epochs=3)
        found.append(reward_models.train(model, feedback, config)["loss"])
    pd.testing.assert_series_equal(*found)


def test_weights_that_the_card_does_not_explain_are_refused(tmp_path):
    backbone, tokenizer = reward_models.load_backbone("tiny")
    folder = RewardModel(backbone, tokenizer).save(tmp_path / "kept", "tiny")
    weights = load_file(folder / reward_models.WEIGHTS)
    save_file(weights | {"lora_A": torch.ones(2)}, folder / reward_models.WEIGHTS)
    with pytest.raises(ValueError, match="weights that the card does not explain, first 'lora_A'"):
        reward_models.load(folder)
    save_file({"centre": weights["centre"]}, folder / reward_models.WEIGHTS)
    with pytest.raises(
        ValueError, match="weights that the card does not explain, first 'head.bias'"
    ):
        reward_models.load(folder)


# --- best of n -----------------------------------------------------------------------------------


def test_expected_best_equals_the_mean_over_all_subsets():
    rng = np.random.default_rng(0)
    scores, values = rng.integers(0, 4, (3, 7)), rng.normal(size=(3, 7))  # with ties
    for k in (1, 3, 7):
        found = stats.per_prompt_best(scores, values, k)
        for row in range(3):
            subsets = itertools.combinations(range(7), k)
            picks = [s[int(scores[row, list(s)].argmax())] for s in subsets]
            assert found[row] == pytest.approx(values[row, picks].mean())
    np.testing.assert_allclose(
        stats.per_prompt_best(values, values, 3), stats.per_prompt_maximum(values, 3)
    )
    with pytest.raises(ValueError, match="has no score"):
        stats.per_prompt_best([[1.0, np.nan]], [[1.0, 2.0]], 1)
