"""Checkpoints with the keys and shapes of the authors' reward models give the original head's scores."""

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import (
    LongformerConfig,
    LongformerForSequenceClassification,
    LongformerForTokenClassification,
)

from lib import models
from lib.papers.fine_grained import released
from lib.segments import Segmenter

PASSAGES = "context: wikipage: T text: the cat and the dog and a man"
PROMPTS = [f"question: who saw the cat {PASSAGES}", f"question: where is it {PASSAGES} and king"]
ANSWERS = [
    "the man saw a cat and a king, but the dog was not there at all. A king was.",
    "A cat. the dog and a king are there.",
]


def tokenizer():
    """Words, with the special tokens of the real one's tokenizer."""
    words = models.tiny_tokenizer()
    words.add_special_tokens({"cls_token": "<s>", "sep_token": "</s>"})
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return words


def write(folder, family, words, *, pickled=False, **config):
    """A tiny checkpoint as `save_pretrained` of the authors' transformers wrote it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "attention_window": [8, 8], "max_position_embeddings": 130}
    sizes |= {"pad_token_id": words.pad_token_id, "sep_token_id": words.sep_token_id}
    model = family(LongformerConfig(vocab_size=len(words), **sizes, **config)).eval()
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    if pickled:
        (folder / "model.safetensors").unlink()
        state = model.state_dict()
        state["longformer.embeddings.position_ids"] = torch.arange(130)[None]  # an older buffer
        torch.save(state, folder / "pytorch_model.bin")
    return model


def logits(model, words, text, **options):
    """The original model's logits of one text; `</s>` in it is the separator."""
    ids = [words.cls_token_id]
    for i, part in enumerate(text.split("</s>")):
        ids += [words.sep_token_id] * bool(i)
        ids += words(part, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*ids, words.sep_token_id]])
    with torch.no_grad():
        return ids[0], model(ids, attention_mask=torch.ones_like(ids), **options).logits[0]


@pytest.mark.parametrize("kind, right, wrong", [("R1", 2, 1), ("R2", 2, 0)])
@pytest.mark.parametrize("pickled", [False, True])
def test_token_classifiers_become_one_logit_a_segment(kind, right, wrong, pickled, tmp_path):
    words = tokenizer()
    model = write(
        tmp_path / "rm", LongformerForTokenClassification, words, pickled=pickled, num_labels=3
    )
    ours = released.convert(tmp_path / "rm", kind)
    cut = Segmenter(released.UNITS[kind]).texts
    scores = ours.score_segments(PROMPTS, ANSWERS)
    for prompt, answer, row in zip(PROMPTS, ANSWERS, scores, strict=True):
        asked = prompt.partition(" context:")[0] if kind == "R1" else prompt
        text = f"{asked} answer: " + " ".join(f"</s> {part}" for part in cut(answer))
        ids, theirs = logits(model, words, text)
        places = (ids == words.sep_token_id).nonzero()[:-1, 0]
        expected = theirs[places, right] - theirs[places, wrong]
        assert len(row) == len(cut(answer)) == len(expected)
        np.testing.assert_allclose(row, expected.numpy(), atol=1e-5)
        chosen = theirs[places][:, sorted([wrong, right])].argmax(1)
        signs = ours.signs([prompt], [answer])[0]
        assert signs.tolist() == [1 if label == 1 else -1 for label in chosen.tolist()]
    assert [len(row) for row in ours.score_segments(PROMPTS[:1], [""])] == [0]


@pytest.mark.parametrize("kind", ["R3", "preference"])
def test_sequence_models_keep_their_head_and_normaliser(kind, tmp_path):
    words = tokenizer()
    folder = tmp_path / "rm"
    model = write(folder, LongformerForSequenceClassification, words, num_labels=1)
    ours = released.convert(folder, kind)
    assert (ours.mean, ours.std) == released.NORMALISERS[kind]
    scores = ours.score(PROMPTS, ANSWERS)
    for prompt, answer, score in zip(PROMPTS, ANSWERS, scores, strict=True):
        _, theirs = logits(model, words, f"{prompt} answer: {answer}")
        np.testing.assert_allclose(score, theirs[0].item(), atol=1e-5)
    (folder / "mean_std.txt").write_text("0.5\n2.0\n")
    ours = released.convert(folder, kind)
    assert (ours.mean, ours.std) == (0.5, 2.0)
    models.save(ours, words, tmp_path / "kept")
    again = released.load(tmp_path / "kept")
    assert isinstance(again, released.ReleasedModel) and again.std == 2.0
    np.testing.assert_allclose(again.score(PROMPTS, ANSWERS), scores, atol=1e-6)


def test_labels_named_in_the_configuration_go_first(tmp_path):
    words = tokenizer()
    names = {0: "O", 1: "Ignore", 2: "NF-ERR"}
    model = write(tmp_path / "rm", LongformerForTokenClassification, words, id2label=names)
    head = released.convert(tmp_path / "rm", "R1").head
    weight = model.classifier.weight
    torch.testing.assert_close(head.weight.detach()[0], (weight[0] - weight[2]).detach())


def test_a_long_prompt_loses_its_end_and_never_a_segment(tmp_path):
    words = tokenizer()
    write(tmp_path / "rm", LongformerForTokenClassification, words, num_labels=3)
    ours = released.convert(tmp_path / "rm", "R2", max_length=40)
    long = f"{PROMPTS[0]} {'the dog ' * 40}"
    assert np.isfinite(np.concatenate(ours.score_segments([long], ANSWERS[:1]))).all()
    assert ours.truncated["prompts"] == 1 and ours.truncated["segments"] == 0
    with pytest.warns(UserWarning, match="segments"):
        ours.score_segments(PROMPTS[:1], [ANSWERS[0] + " A cat was a king." * 10])


def test_another_form_is_refused(tmp_path):
    words = tokenizer()
    write(tmp_path / "rm", LongformerForTokenClassification, words, num_labels=3)
    with pytest.raises(ValueError, match="comp_rm"):
        released.convert(tmp_path / "rm", "R3")
    with pytest.raises(ValueError, match="allowed: R1"):
        released.convert(tmp_path / "rm", "R4")
