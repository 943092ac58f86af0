"""The authors' released reward models as reward models of this library.

Wu et al. (NeurIPS 2023) give four folders of Longformer checkpoints.  `rel_rm` (R1) and `fact_rm` (R2)
classify tokens: the input is `question: Q [context: ...] answer: </s> segment </s> segment ...`, and the
logits at the `</s>` before a segment are its scores.  Of three labels, in the order of the alphabet, one
("Ignore") never trained; a segment is right where the logit of "O" is above that of the error, so here the
score is their difference.  `comp_rm` (R3) and `baseline_rm` (preferences) score a whole answer: a layer with
tanh and a linear map on the state of the first token of `question: ... answer: ANSWER`.

`convert` reads such a folder (safetensors, or `pytorch_model.bin` with weights_only=True) and makes a
`ReleasedModel` of it, which scores, pays and is kept like any `FineGrainedModel`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LongformerModel

from lib import cards, encoding, hub, models, reward_models, runtime
from lib.papers.fine_grained import models as fine_grained

UNITS = {name: fine_grained.UNITS[kind] for name, kind in fine_grained.REWARDS.items()}
UNITS |= {"preference": "sequence"}
FOLDERS = {"R1": "rel_rm", "R2": "fact_rm", "R3": "comp_rm", "preference": "baseline_rm"}
LABELS = {"R1": ["Ignore", "NF-ERR", "O"], "R2": ["F-ERR", "Ignore", "O"]}
RIGHT = "O"
TRUNK = "longformer."
MEAN_STD = "mean_std.txt"  # beside a model that the authors' script scored its training pairs with
# what it held, of the two models that they released, as their PPO settings say
NORMALISERS = {"R3": (-0.44677691, 8.30116062), "preference": (0.92240574, 1.56055909)}


class ReleasedModel(fine_grained.FineGrainedModel):
    """A checkpoint of the authors: segments read at the separators before them, answers at the start."""

    def __init__(self, backbone, tokenizer, **options):
        super().__init__(backbone, tokenizer, **options | {"relations": False})
        self._inputs.segments = False  # one kind of token, wherever it stands
        if self.segmenter.unit == "sequence":
            self.dense = torch.nn.Linear(backbone.config.hidden_size, backbone.config.hidden_size)
            self.to(backbone.device)
        else:  # a token classifier has no token that sees all
            self._inputs.global_attention = False

    def _row(self, prompt: str, response: str) -> fine_grained._Row:
        """Token ids of a row; `owner` says of each response token whether a segment is read there."""
        spans = self.segmenter.spans(response)
        question = prompt.partition(" context: ")[0]
        asked = " ".join((prompt if self.context else question).split()) + " answer:"
        start, stop = self._marks
        if self.segmenter.unit == "sequence":
            before = encoding.bare_ids(self.tokenizer, asked)
            after = encoding.bare_ids(self.tokenizer, f" {response}") if response else []
            read = []
        else:
            before = encoding.bare_ids(self.tokenizer, f" {asked}")
            after, read = [], []
            for first, last in spans:
                read.append(len(after))
                words = " ".join(response[first:last].split())
                after += stop + encoding.bare_ids(self.tokenizer, f" {words}")
        room = self.max_length - len(start) - len(stop)
        self.truncated["responses"] += len(after) > room
        after = after[:room]
        self.truncated["prompts"] += len(before) > room - len(after)
        before = before[: room - len(after)]
        self.truncated["segments"] += sum(place >= len(after) for place in read)
        context = start + before
        return fine_grained._Row(context, after + stop, read, len(spans), len(context))

    def _features(
        self, rows: Sequence[fine_grained._Row], read: dict | None = None
    ) -> list[torch.Tensor]:
        """(segments, width) of each row; NaN for a segment that was cut off."""
        pairs = [(row.context, row.response) for row in rows]
        inputs = reward_models.RewardModel.batch(self, pairs)
        hidden = self.hidden(**inputs)
        padding = inputs["attention_mask"].argmax(1).tolist()
        return [
            self._features_of(states[p:], row)
            for states, p, row in zip(hidden, padding, rows, strict=True)
        ]

    def _features_of(self, states: torch.Tensor, row: fine_grained._Row) -> torch.Tensor:
        if self.segmenter.unit == "sequence":
            return torch.tanh(self.dense(states[:1]))[: row.segments]
        start, end = len(row.context), len(row.context) + len(row.response) - 1
        features = states.new_full((row.segments, states.shape[1]), torch.nan)
        inside = [start + place for place in row.owner if start + place < end]
        features[: len(inside)] = states[inside]
        return features

    def settings(self) -> dict[str, object]:
        own = super().settings()
        del own["relations"]
        return own


def convert(folder: Path | str, kind: str, *, max_length: int = 4094) -> ReleasedModel:
    """The released model in a folder (or Hub id) as "R1", "R2", "R3" or "preference".

    Mean and deviation of R3's and the preference model's scores come from the file that the authors' script
    leaves beside a model, else from their settings.  Raises ValueError for another kind, for a model of
    another class than the kind's, and where weights are missing or left over.
    """
    if kind not in UNITS:
        raise ValueError(f"kind is {kind!r}; allowed: {', '.join(UNITS)}.")
    folder = hub.resolve_model(folder)
    config = hub.read_config(folder)
    state = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= load_file(path)
    buffers = (f"{TRUNK}embeddings.position_ids", f"{TRUNK}pooler.")
    state = {name: value for name, value in state.items() if not name.startswith(buffers)}
    backbone = LongformerModel(config, add_pooling_layer=False)
    trunk = {name.removeprefix(TRUNK): x for name, x in state.items() if name.startswith(TRUNK)}
    head = {name: x for name, x in state.items() if not name.startswith(TRUNK)}
    _check_names(folder, kind, trunk, backbone.state_dict(), head)
    backbone.load_state_dict(trunk, strict=False)
    backbone.to(runtime.get_device())
    size = {"unit": UNITS[kind], "context": kind != "R1", "max_length": max_length}
    model = ReleasedModel(backbone.eval(), models.load_tokenizer(folder), **size)
    _load_head(model, head, kind, config)
    if kind in NORMALISERS:
        mean, std = _normaliser(folder, kind)
        model.normaliser.copy_(torch.tensor([mean, std], dtype=torch.float64))
    return model.eval()


def _check_names(folder: Path, kind: str, trunk: dict, expected: dict, head: dict) -> None:
    """Raise ValueError unless these are the weights of a model of this kind."""
    layers = ("classifier.",)
    if UNITS[kind] == "sequence":
        layers = ("classifier.dense.", "classifier.out_proj.")
    wanted = {f"{layer}{name}" for layer in layers for name in ("weight", "bias")}
    expected = {name for name in expected if name != "embeddings.position_ids"}
    differing = sorted((expected ^ set(trunk)) | (wanted ^ set(head)))
    if differing:
        raise ValueError(
            f"{folder} holds no {kind} of the authors' form: {len(differing)} weights are missing or left "
            f"over, first {differing[0]!r}. {kind} is in the folder that they call {FOLDERS[kind]!r}."
        )


def _load_head(model: ReleasedModel, head: dict, kind: str, config) -> None:
    """The released output layer as one logit for each segment or answer."""
    with torch.no_grad():
        if UNITS[kind] == "sequence":
            model.dense.weight.copy_(head["classifier.dense.weight"])
            model.dense.bias.copy_(head["classifier.dense.bias"])
            model.head.weight.copy_(head["classifier.out_proj.weight"])
            model.head.bias.copy_(head["classifier.out_proj.bias"])
            return
        right, wrong = _labels(config, kind)
        for name, target in (("weight", model.head.weight), ("bias", model.head.bias)):
            rows = head[f"classifier.{name}"]
            target.copy_((rows[right] - rows[wrong]).reshape(target.shape))


def _labels(config, kind: str) -> tuple[int, int]:
    """Numbers of the labels "right" and "error": as the configuration names them, else by the alphabet."""
    names = [str(config.id2label.get(i)) for i in range(config.num_labels)]
    if set(names) != set(LABELS[kind]):
        names = LABELS[kind]
    if config.num_labels != len(names):
        raise ValueError(
            f"the model has {config.num_labels} labels; {kind} has {', '.join(LABELS[kind])}."
        )
    error = next(name for name in names if name.endswith("ERR"))
    return names.index(RIGHT), names.index(error)


def _normaliser(folder: Path, kind: str) -> tuple[float, float]:
    """Mean and deviation of the model's scores."""
    path = folder / MEAN_STD
    if not path.exists():
        return NORMALISERS[kind]
    mean, std = (float(line) for line in path.read_text(encoding="utf-8").split())
    return mean, std


def load(folder: Path | str) -> fine_grained.FineGrainedModel:
    """A kept reward model of either form: trained here, or converted."""
    kinds = {kind.__name__: kind for kind in (fine_grained.FineGrainedModel, ReleasedModel)}
    kind = cards.read(folder).get("class")
    return reward_models.load(folder, kinds.get(kind, fine_grained.FineGrainedModel))
