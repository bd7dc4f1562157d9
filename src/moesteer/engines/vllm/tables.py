"""The tensors that the seam reads and writes on the device: allocated once, written in place.

torch.compile and CUDA graphs remember addresses, so nothing here is ever replaced. Each running
request that is steered or counted has a *row* of its own; row 0 belongs to all others, steers
nothing, and what is counted in it is thrown away.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moesteer.model_facts import LayerShape


class Tables:
    """`rows` rows (row 0 included), `tokens` tokens a step at most, `layers` of this worker.

    `static` says that the seam's Python runs only while graphs are captured, so that it must do
    everything always; else it may leave out what nobody in the batch needs.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        rows: int,
        tokens: int,
        device: torch.device,
        *,
        static: bool,
    ) -> None:
        experts = max((shape.experts for shape in layers), default=1)  # of a dense model, none
        top_k = max((shape.top_k for shape in layers), default=1)
        number = len(layers)

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.static = static
        # Which row steers each token of the running step, and which counts it
        self.steering_rows = zeros(tokens, dtype=torch.int64)
        self.counting_rows = zeros(tokens, dtype=torch.int64)
        # What each row does
        self.activated = zeros(number, rows, experts, dtype=torch.bool)
        self.deactivated = zeros(number, rows, experts, dtype=torch.bool)
        self.promised = zeros(rows, 1, dtype=torch.bool)
        self.paper = zeros(rows, 1, dtype=torch.bool)
        self.dose = torch.ones(rows, 1, device=device)
        # What the routers of the running step chose
        self.chosen = zeros(number, tokens, top_k, dtype=torch.int32)
        self.weights = zeros(number, tokens, top_k, dtype=torch.float32)
        # What was counted, by row
        self.selected = zeros(rows, number, experts, dtype=torch.int32)
        self.probability = zeros(rows, number, experts, dtype=torch.float32)
        self.tokens = zeros(rows, dtype=torch.int32)
        # What the running batch needs
        self.lifted_layers: frozenset[int] = frozenset()
        self.lowered_layers: frozenset[int] = frozenset()
        self.any_counted = self.any_paper = self.any_partial = self.any_probability = False
