"""Which experts each generated token selected, read at the experts' input while a batch grows.

A token belongs to the pass that reads it, by its column in the batch: whatever becomes of its text
on the way to a page can't change what is said of it.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from moesteer.engines.transformers.routers import MoELayer
from moesteer.engines.transformers.seam import Undo, observe
from moesteer.engines.transformers_engine import TransformersEngine
from moesteer.profile import Expert


class Passes:
    """Which of some experts the tokens behind the prompts selected, read pass by pass.

    `begins_at` is the column of the first of them in the batch.
    """

    def __init__(self, watched: Sequence[Expert], rows: int) -> None:
        self.begins_at = 0
        self.rows = rows
        self.watched = {
            layer: [expert for where, expert in watched if where == layer]
            for layer in sorted({layer for layer, _ in watched})
        }
        self._columns = self._first = self._width = 0
        self._places: list[_Place] = []

    def seen_in(self, engine: TransformersEngine) -> ExitStack:
        """Watch the model until the stack closes."""
        stack = ExitStack()
        decoder = engine.model.base_model
        stack.callback(decoder.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        for layer in engine.layers:
            if layer.layer in self.watched:
                stack.callback(self._watch(layer))
        return stack

    def selected(self, row: int, place: int, token: int) -> frozenset[Expert] | None:
        """The watched experts that the generated token at this place of its row selected.

        None where no pass has read it: the place is not reached, or another token stands there.
        """
        if place >= len(self._places) or len(self._places[place].selected) < len(self.watched):
            return None
        found = self._places[place].by_row(self.watched)
        return found[row][1] if found[row][0] == token else None

    def _begin(self, _module: object, args: tuple, kwargs: dict) -> None:
        ids: Tensor = args[0] if args else kwargs["input_ids"]
        self._width = ids.shape[1]
        self._first = min(max(0, self.begins_at - self._columns), self._width)
        self._columns += self._width
        self._places += [_Place(ids[:, column]) for column in range(self._first, self._width)]

    def _watch(self, layer: MoELayer) -> Undo:
        wanted = torch.tensor(self.watched[layer.layer], device=layer.device)

        def see(index: Int[Tensor, "token k"], weights: Tensor) -> None:
            # rows × columns, row by row; an expert of weight 0 contributes nothing
            chosen = (index.unsqueeze(-1) == wanted.to(index.device)) & (weights != 0).unsqueeze(-1)
            by_column = chosen.any(1).view(self.rows, self._width, -1).unbind(1)[self._first :]
            new = self._places[len(self._places) - len(by_column) :]
            for place, selected in zip(new, by_column, strict=True):
                place.selected[layer.layer] = selected

        return observe(layer, see)


@dataclass
class _Place:
    """One column of the batch: its tokens, and for each layer [row, watched expert]."""

    ids: Int[Tensor, " row"]
    selected: dict[int, Tensor] = field(default_factory=dict)
    known: list[tuple[int, frozenset[Expert]]] | None = None

    def by_row(self, watched: dict[int, list[int]]) -> list[tuple[int, frozenset[Expert]]]:
        """Each row's token and the experts that it selected, brought to the CPU once."""
        if self.known is None:
            tables = {layer: table.tolist() for layer, table in self.selected.items()}
            self.known = [
                (
                    token,
                    frozenset(
                        (layer, expert)
                        for layer, experts in watched.items()
                        for expert, yes in zip(experts, tables[layer][row], strict=True)
                        if yes
                    ),
                )
                for row, token in enumerate(self.ids.tolist())
            ]
        return self.known
