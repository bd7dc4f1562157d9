"""What a number for each expert says of each token: summed over the experts that it selects."""

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moesteer.engines.transformers.memory import texts_in_batches
from moesteer.engines.transformers.reading import Piece, padded
from moesteer.engines.transformers.routers import input_device
from moesteer.engines.transformers.seam import observe
from moesteer.engines.transformers.token_gradients import Subject, whole_prompts
from moesteer.errors import MoesteerError


def weigh_selections(
    subject: Subject,
    texts: Sequence[Sequence[int]],
    table: Float[np.ndarray, "layer expert"],
) -> list[Float[np.ndarray, " token"]]:
    """See `Engine.weigh_selections`. As in routing counts, an expert of weight 0 isn't selected."""
    model, layers = subject.model, subject.layers
    widest = max(layer.num_experts for layer in layers)
    if table.shape != (len(layers), widest):
        raise MoesteerError(
            f"the table has a number for each of {table.shape[0]} layers and {table.shape[1]}"
            f" experts; the model routes in {len(layers)} layers to {widest} experts."
        )
    numbers = torch.tensor(table, dtype=torch.float64)

    def compute(pieces: Sequence[Piece]) -> list[np.ndarray]:
        ids, attention = padded([piece.ids for piece in pieces], input_device(model))
        total = torch.zeros(ids.numel(), dtype=torch.float64)

        def see(row: Tensor, index: Int[Tensor, "token k"], weights: Tensor) -> None:
            total.add_((row[index.cpu().long()] * (weights != 0).cpu()).sum(-1))

        with torch.inference_mode(), subject.steered(pieces), ExitStack() as stack:
            for layer, row in zip(layers, numbers, strict=True):
                stack.callback(observe(layer, lambda i, w, row=row: see(row, i, w)))
            model.base_model(input_ids=ids, attention_mask=attention, use_cache=False)
        by_row = total.view(ids.shape).numpy()
        return [by_row[row, : len(piece.ids)] for row, piece in enumerate(pieces)]

    pieces = whole_prompts(texts)
    found = dict(texts_in_batches(pieces, input_device(model), compute, "shorten it"))
    return [found[number] for number in range(len(texts))]
