"""Policy, reference and value on one network whose frozen lower part is computed once: what PPO trains."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from lib import encoding, models, values
from lib.values import ValueFunction


@dataclass
class TokenBatch:
    """Prompts and responses as tensors.  Decoder-only prompts are padded on the left, the rest right."""

    prompt_ids: torch.Tensor  # (batch, prompt)
    prompt_mask: torch.Tensor  # (batch, prompt), 1 = real token
    response_ids: torch.Tensor  # (batch, time)
    response_mask: torch.Tensor  # (batch, time), 1 = real token
    trunk: torch.Tensor | None = None  # hidden states on top of the frozen trunk

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompt_ids: Sequence[list[int]],
        response_ids: Sequence[list[int]],
    ) -> TokenBatch:
        """Prompts and responses, a list of token ids each, padded as the model needs it, on its device."""
        side = "right" if model.config.is_encoder_decoder else "left"
        fill = encoding.pad_id(tokenizer)
        padded = encoding.pad_rows(prompt_ids, fill, side)
        padded += encoding.pad_rows(response_ids, fill, "right")
        return cls(*(x.to(model.device) for x in padded))

    @property
    def places(self) -> torch.Tensor:
        """Response positions that are computed, (batch, time): the real ones."""
        return self.response_mask.bool()

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """(places, ...) -> (batch, time, ...), 0 elsewhere."""
        whole = values.new_zeros(*self.places.shape, *values.shape[1:])
        whole[self.places] = values
        return whole

    def rows(self, index: torch.Tensor) -> TokenBatch:
        """The same for some of the rows, without prompt columns in which all of them have padding."""
        left, right = self._padding(index)
        columns = slice(left, self.prompt_ids.shape[1] - right)
        trunk = self.trunk
        if trunk is not None:
            trunk = trunk[index, left : trunk.shape[1] - right]
        prompts = (self.prompt_ids[index, columns], self.prompt_mask[index, columns])
        return TokenBatch(*prompts, self.response_ids[index], self.response_mask[index], trunk)

    def keep_trunk(self, index: torch.Tensor, part: TokenBatch) -> None:
        """Take over the trunk's states that were computed for some of the rows."""
        left, right = self._padding(index)
        width = left + part.trunk.shape[1] + right
        if self.trunk is None:
            self.trunk = part.trunk.new_zeros(len(self.prompt_ids), width, part.trunk.shape[2])
        self.trunk[index, left : width - right] = part.trunk

    def _padding(self, index) -> tuple[int, int]:
        """Numbers of prompt columns, from the left and from the right, that are padding in these rows."""
        used = self.prompt_mask[index].any(0).nonzero()[:, 0]
        if not len(used):
            return 0, 0
        return int(used[0]), self.prompt_mask.shape[1] - 1 - int(used[-1])

    def padded_for(self, model: PreTrainedModel) -> TokenBatch:
        """The same with prompts padded on the left where `model` is decoder-only: there the state that
        predicts the first response token is that of the last prompt column."""
        if model.config.is_encoder_decoder:
            return self
        order = self.prompt_mask.argsort(dim=1, stable=True)  # padding first, tokens as they stand
        ids, mask = (x.gather(1, order) for x in (self.prompt_ids, self.prompt_mask))
        return TokenBatch(ids, mask, self.response_ids, self.response_mask)

    def inputs(self, model: PreTrainedModel) -> dict:
        """Arguments with which `model` predicts every response token."""
        if model.config.is_encoder_decoder:
            start = model.config.decoder_start_token_id
            shifted = torch.nn.functional.pad(self.response_ids[:, :-1], (1, 0), value=start)
            prompt = {"input_ids": self.prompt_ids, "attention_mask": self.prompt_mask}
            return {**prompt, "decoder_input_ids": shifted, "use_cache": False}
        ids = torch.cat([self.prompt_ids, self.response_ids[:, :-1]], 1)
        seen = torch.ones_like(self.response_ids[:, :-1])  # padding after the end is read by nobody
        mask = torch.cat([self.prompt_mask, seen], 1)
        inputs = encoding.decoder_inputs(model, ids, mask)
        return {**inputs, "logits_to_keep": self.response_ids.shape[1]}


class SharedTrunkPolicy(torch.nn.Module):
    """Policy, reference and value on one network whose lower part is frozen and computed once.

    The trunk is what `set_trainable` froze: the lowest layers of a decoder-only model, or the encoder
    of an encoder-decoder.  The reference is the same network with the trainable parameters at their
    initial values.  Values are read by a two-layer head from the hidden state that predicts the
    token, and send no gradient into the policy; or from `value_model`, a language model of any size and
    class over the same tokens that is trained whole but for its output layer, which is not used (fine-grained
    RLHF: T5-base beside T5-large); a `ValueFunction` of an earlier training goes on.  Dropout is off
    everywhere.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        frozen: int,
        value_model: PreTrainedModel | ValueFunction | None = None,
    ):
        super().__init__()
        head = None
        if isinstance(value_model, ValueFunction):
            head, value_model = value_model.head, value_model.model
        self.model, self.value_model = model.eval(), value_model
        self.trunk_layers = (
            [] if model.config.is_encoder_decoder else [*models.decoder_layers(model)[:frozen]]
        )
        self.layers_give_tuples = False
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.initial = {name: parameter.detach().clone() for name, parameter in trainable.items()}
        # what an output layer reads is not always as wide as the layers (OPT)
        width = (self.value_model or model).get_output_embeddings().weight.shape[1]
        self.value_head = values.make_head(width) if head is None else head
        self.value_head.to(model.device)
        if self.value_model is not None:
            self._train_value_model()

    def _train_value_model(self) -> None:
        model = self.value_model.float().requires_grad_(True).eval()
        # its output layer does not train, unless it is one with the embedding, which does
        output_layer = model.get_output_embeddings()
        tied = output_layer.weight is model.get_input_embeddings().weight
        output_layer.requires_grad_(tied)

    def parameter_groups(self) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
        """Trainable parameters of the policy, and of the value function."""
        policy = [p for p in self.model.parameters() if p.requires_grad]
        named = [(n, p) for n, p in self.named_parameters() if n.startswith("value_")]
        return policy, [p for _, p in named if p.requires_grad]

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[PreTrainedModel]:
        """Within: the model is the reference, its trainable parameters at their initial values."""
        trained = {name: p for name, p in self.model.named_parameters() if name in self.initial}
        current = {name: parameter.data for name, parameter in trained.items()}
        try:
            for name, parameter in trained.items():
                parameter.data = self.initial[name]
            yield self.model
        finally:
            for name, parameter in trained.items():
                parameter.data = current[name]

    def forward(
        self, batch: TokenBatch, reference: bool = False, logits: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits (tokens, vocabulary) that predict the response, values (tokens,) before each token.

        The reference has no values: None.  Tokens are `batch.places`, row by row; `batch.spread` puts them
        back.  Without `logits` what the output layer reads, (tokens, width), takes their place.  Fills
        `batch.trunk` where it is empty and takes it from there otherwise.
        """
        places, inputs, seen = batch.places, batch.inputs(self.model), []
        with self._trunk(batch, inputs), _flat_input(self.model, places, seen, logits):
            if reference:
                output = torch.func.functional_call(self.model, self.initial, (), inputs)
            else:
                output = self.model(**inputs)
        if self.model.config.is_encoder_decoder and not self._encoder_trains():
            batch.trunk = output.encoder_last_hidden_state
        read = output.logits.float() if logits else seen[0]
        if reference:
            return read, None
        return read, self.value_head(self._value_states(batch, seen[0]).float())[:, 0]

    def _value_states(self, batch: TokenBatch, states: torch.Tensor) -> torch.Tensor:
        """What values are read from, (tokens, width): the policy's states, or the value model's own."""
        if self.value_model is None:
            return states.detach()
        inputs = batch.padded_for(self.value_model).inputs(self.value_model)
        seen = []
        with _flat_input(self.value_model, batch.places, seen, logits=False):
            self.value_model(**inputs)
        return seen[0]

    def _encoder_trains(self) -> bool:
        return any(p.requires_grad for p in self.model.get_encoder().parameters())

    @contextlib.contextmanager
    def _trunk(self, batch: TokenBatch, inputs: dict):
        """Within: the trunk's layers hand on `batch.trunk`, or store there what they compute."""
        if self.model.config.is_encoder_decoder and batch.trunk is not None:
            inputs["encoder_outputs"] = BaseModelOutput(batch.trunk)
            del inputs["input_ids"]
        hook = None
        if batch.trunk is None and self.trunk_layers:
            hook = self.trunk_layers[-1].register_forward_hook(partial(self._keep_trunk, batch))
        skipped = self.trunk_layers if hook is None else []
        states = (batch.trunk, None) if self.layers_give_tuples else batch.trunk
        for layer in skipped:
            layer.forward = lambda *_, **__: states
        try:
            yield
        finally:
            for layer in skipped:
                del layer.forward
            if hook is not None:
                hook.remove()

    def _keep_trunk(self, batch: TokenBatch, layer, _, output) -> None:
        """Store what the trunk's last layer hands up: its states, or a tuple that starts with them."""
        self.layers_give_tuples = isinstance(output, tuple)  # those of GPT-J, Bloom and others
        batch.trunk = (output[0] if self.layers_give_tuples else output).detach()


@contextlib.contextmanager
def _flat_input(model: PreTrainedModel, places: torch.Tensor, seen: list, logits: bool):
    """Within: the output layer sees the last states at `places` as one matrix, which is kept in `seen`.

    One matrix product instead of a batch of them (1.5 times as fast on a CPU), and none for padding, nor
    any without `logits`.
    """

    def flatten(_, args):
        seen.append(args[0][:, -places.shape[1] :][places])
        return (seen[-1] if logits else seen[-1][:0],)

    hook = model.get_output_embeddings().register_forward_pre_hook(flatten)
    try:
        yield
    finally:
        hook.remove()
