"""Texts as vectors: the mean last hidden state of a sentence encoder, of length 1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib import encoding
from lib.text import is_empty


@torch.inference_mode()
def embed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    tokens_per_batch: int = 8192,
) -> np.ndarray:
    """Unit vectors (texts, width), so that a product of two is their cosine; zeros for an empty text.

    `model` as `reward_models.load_backbone` loads it.  A text too long for it loses its end.
    """
    limit = getattr(model.config, "max_position_embeddings", 512)
    ids = [tokenizer(t, truncation=True, max_length=limit)["input_ids"] for t in texts]
    vectors = np.zeros((len(texts), model.config.hidden_size))
    full = [i for i, text in enumerate(texts) if not is_empty(text)]
    for batch in encoding.token_batches([len(ids[i]) for i in full], tokens_per_batch):
        places = [full[j] for j in batch]
        rows, mask = encoding.pad_rows(
            [ids[i] for i in places], encoding.pad_id(tokenizer), "right"
        )
        rows, mask = rows.to(model.device), mask.to(model.device)
        hidden = model(input_ids=rows, attention_mask=mask).last_hidden_state.float()
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        vectors[places] = torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()
    return vectors
