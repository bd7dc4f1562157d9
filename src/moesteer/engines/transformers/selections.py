"""What a number for each expert says of each token: summed over the experts that it selects."""

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moesteer.engines.transformers.memory import in_batches
from moesteer.engines.transformers.reading import padded
from moesteer.engines.transformers.routers import input_device
from moesteer.engines.transformers.seam import observe
from moesteer.engines.transformers.token_gradients import Attributed, whole_prompts
from moesteer.errors import MoesteerError


def weigh_selections(
    attributed: Attributed,
    texts: Sequence[Sequence[int]],
    table: Float[np.ndarray, "layer expert"],
) -> list[Float[np.ndarray, " token"]]:
    """See `Engine.weigh_selections`. As in routing counts, an expert of weight 0 isn't selected."""
    model, layers = attributed.model, attributed.layers
    widest = max(layer.num_experts for layer in layers)
    if table.shape != (len(layers), widest):
        raise MoesteerError(
            f"the table has a number for each of {table.shape[0]} layers and {table.shape[1]}"
            f" experts; the model routes in {len(layers)} layers to {widest} experts."
        )
    numbers = torch.tensor(table, dtype=torch.float64)

    def compute(batch: list[tuple[int, Sequence[int]]]) -> list[tuple[int, np.ndarray]]:
        rows = [row for _, row in batch]
        ids, attention = padded(rows, input_device(model))
        total = torch.zeros(ids.numel(), dtype=torch.float64)

        def see(row: Tensor, index: Int[Tensor, "token k"], weights: Tensor) -> None:
            total.add_((row[index.cpu().long()] * (weights != 0).cpu()).sum(-1))

        with torch.inference_mode(), attributed.steered(whole_prompts(rows)), ExitStack() as stack:
            for layer, row in zip(layers, numbers, strict=True):
                stack.callback(observe(layer, lambda i, w, row=row: see(row, i, w)))
            model.base_model(input_ids=ids, attention_mask=attention, use_cache=False)
        by_row = total.view(ids.shape).numpy()
        return [(n, by_row[row, : len(text)]) for row, (n, text) in enumerate(batch)]

    found = dict(
        in_batches(
            list(enumerate(texts)),
            lambda row: len(row[1]),
            lambda row: row[0],
            input_device(model),
            compute,
            "shorten it",
        )
    )
    return [found[number] for number in range(len(texts))]
