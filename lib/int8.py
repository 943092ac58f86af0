"""Models whose linear weights are held in 8 bits (LLM.int8 by bitsandbytes), and what trains over them.

bitsandbytes multiplies integers: it rounds activations to 8 bits too, except for columns with an outlier
anywhere in the batch.  So a row's logits depend on the rows beside it, and PPO's ratios are noise (measured,
SmolLM2-135M: ratios off by up to 1.55 before any update).  Here each layer's weights are turned back into
floats when they are used, and nothing else is rounded: a row's logits are its own (measured: a ratio error
of 0), and nearer to the model's (mean change of a token's log-probability .06 nats; .15 by integers).
Memory is that of 8 bits and one layer; time is that of the product and of unpacking the weights once more.

Only adapters train over such weights (QLoRA, Dettmers et al. 2023, does the same with 4 bits).
"""

from __future__ import annotations

import importlib.util
import logging

import torch
from transformers import BitsAndBytesConfig

QUANTISED = 127  # the largest 8-bit weight of a row stands for its scale


def check_installed() -> None:
    """Raise ValueError where bitsandbytes is missing.  On a CPU 8 bits save memory, not time."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "eight_bit=True needs bitsandbytes, which is not installed. Try `pip install bitsandbytes`, "
            "or eight_bit=False (in a notebook: in its table SETTINGS)."
        )


def is_eight_bit(model: torch.nn.Module) -> bool:
    """Whether some of the model's weights are held in 8 bits."""
    return any(type(parameter).__name__ == "Int8Params" for parameter in model.parameters())


def loading_options(device: torch.device) -> dict:
    """Arguments of `from_pretrained` that load linear weights in 8 bits onto `device`."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of each cast, each time
    quantization = BitsAndBytesConfig(load_in_8bit=True)
    return {"quantization_config": quantization, "device_map": {"": device}}


def compute_in_floats(model: torch.nn.Module) -> None:
    """Make the model's 8-bit layers multiply by their weights as floats, in place (see the module)."""
    import bitsandbytes

    class Linear(bitsandbytes.nn.Linear8bitLt):
        """The layer as peft knows it, with another product."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scale = self.weight.SCB if self.state.SCB is None else self.state.SCB
            return _Product.apply(x, self.weight.data, scale, self.bias)

    for module in model.modules():
        if type(module) is bitsandbytes.nn.Linear8bitLt:
            module.__class__ = Linear


def unpack(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Integers (out, in) and the scale of each row (out,) as floats (out, in)."""
    return (weight * (scale.float() / QUANTISED)[:, None]).to(dtype)


class _Product(torch.autograd.Function):
    """x W^T + b; keeps the integers for the way back, not the floats made of them."""

    @staticmethod
    def forward(ctx, x, weight, scale, bias):
        ctx.save_for_backward(weight, scale)
        bias = None if bias is None else bias.to(x.dtype)
        return torch.nn.functional.linear(x, unpack(weight, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx, gradient):
        weight, scale = ctx.saved_tensors
        return gradient @ unpack(weight, scale, gradient.dtype), None, None, None
