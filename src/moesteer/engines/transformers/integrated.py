"""Integrated gradients: a score for each token, which add up to what the tokens together do.

Intuition: take the tokens' embeddings down to nothing and bring them back along a straight line; a
token's score is what its own coming back added. From e at the tokens asked for (x' has 0 there),

    score_t  =  Σ_h e_th · ∫₀¹ ∂R/∂e_th (x' + α (x − x')) dα,      Σ_t score_t  =  R(x) − R(x')

(Sundararajan et al. 2017, arXiv 1703.01365). Norms divide an embedding by its own length, so that R
changes as much from α = 10⁻⁶ to 10⁻³ as from there to 1: the integral is taken over u with
α = (e^(14u) − 1) / (e¹⁴ − 1), by Gauss and Legendre's nodes, whose number doubles until the scores
sum to the difference. (captum spreads its steps evenly over α, gives every text as many, and lets a
routed model change its experts.)

In a routed model R jumps where a token changes its experts on the way, and no gradient sees a jump:
the scores would miss what the jumps did. So each token keeps the experts that it has at x
(`holding.py`), x' included; their weights go on being the router's own.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moesteer.engines.readouts import Readout
from moesteer.engines.transformers.holding import Held, held, taken_down
from moesteer.engines.transformers.memory import by_length, in_batches
from moesteer.engines.transformers.reading import Piece
from moesteer.engines.transformers.routers import input_device
from moesteer.engines.transformers.token_gradients import (
    Subject,
    embedded,
    gradient_of,
    pieces_of,
    values_of,
)
from moesteer.errors import MoesteerError

MOST_STEPS = 512
"""Where a text's scores don't sum to the difference even so, the gap says it."""
_BEND = 14.0
"""Powers of e that the path spreads evenly: α from 10⁻⁶ to 1."""


@dataclass(frozen=True, eq=False)
class _Group:
    """Texts that are read together: the tokens that come back, and the routing that is held."""

    pieces: list[Piece]
    numbers: list[int]
    """Which text each is, from 0."""
    back: Float[Tensor, "text position"]
    """1 where the embedding comes back."""
    selected: Held

    def chosen(self, rows: Int[Tensor, " row"]) -> list[Piece]:
        return [self.pieces[row] for row in rows.tolist()]


def integrated_gradients(
    subject: Subject,
    readouts: Sequence[Readout],
    positions: Sequence[Sequence[int]],
    *,
    steps: int,
    tolerance: float,
    hold: bool = True,
) -> Iterator[tuple[int, Float[Tensor, " token"], float]]:
    """See `Engine.integrated_gradients`. `hold`: False lets tokens change their experts."""
    pieces = pieces_of(readouts)
    for number, (piece, places) in enumerate(zip(pieces, positions, strict=True), start=1):
        beyond = [place for place in places if not 0 <= place < len(piece.ids)]
        if beyond:
            raise MoesteerError(
                f"readout {number} has {len(piece.ids)} tokens, and no position {beyond[0]}."
            )
    for numbers in by_length(range(len(pieces)), lambda number: len(pieces[number].ids)):
        yield from _of_group(
            subject,
            [pieces[number] for number in numbers],
            numbers,
            [positions[number] for number in numbers],
            steps,
            tolerance,
            hold,
        )


def _of_group(
    subject: Subject,
    pieces: list[Piece],
    numbers: list[int],
    positions: Sequence[Sequence[int]],
    steps: int,
    tolerance: float,
    hold: bool,
) -> Iterator[tuple[int, Float[Tensor, " token"], float]]:
    layers = subject.layers if hold else []
    back = torch.zeros(len(pieces), max(len(piece.ids) for piece in pieces))
    for row, places in enumerate(positions):
        back[row, list(places)] = 1
    with torch.no_grad(), subject.steered(pieces), taken_down(layers, len(pieces)) as selected:
        there = values_of(subject.model, pieces).double().cpu()
    group = _Group(pieces, numbers, back, selected)
    everyone = torch.arange(len(pieces))
    with torch.no_grad(), _on_the_way(subject, group, everyone, torch.zeros(len(pieces))):
        difference = there - values_of(subject.model, pieces).double().cpu()
    waiting = list(range(len(pieces)))
    while waiting:
        scores = _integrated(subject, group, waiting, steps)
        unfinished = []
        for text in waiting:
            own = scores[text][: len(pieces[text].ids)]
            missing, whole = (own.sum() - difference[text]).abs(), difference[text].abs()
            gap = float(missing / whole) if missing else 0.0
            if gap <= tolerance or 2 * steps > MOST_STEPS:
                yield numbers[text], own.float(), gap
            else:
                unfinished.append(text)
        waiting, steps = unfinished, 2 * steps


def _integrated(
    subject: Subject, group: _Group, texts: Sequence[int], steps: int
) -> dict[int, Float[Tensor, " position"]]:
    """The scores of each text, by so many steps."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    u = (nodes + 1) / 2
    alphas, slopes = np.expm1(_BEND * u), _BEND * np.exp(_BEND * u)
    along = list(zip(alphas / np.expm1(_BEND), weights / 2 * slopes / np.expm1(_BEND), strict=True))
    scores = {text: torch.zeros(group.back.shape[1], dtype=torch.float64) for text in texts}

    def compute(batch: list[tuple[int, float, float]]) -> list[None]:
        rows = torch.tensor([text for text, _, _ in batch])
        alphas = torch.tensor([alpha for _, alpha, _ in batch])
        share = torch.tensor([weight for _, _, weight in batch], dtype=torch.float64)
        found = _products(subject, group, rows, alphas).double() * share.unsqueeze(-1)
        for row, text in enumerate(rows.tolist()):
            scores[text][: found.shape[1]] += found[row]
        return []

    rows = [(text, alpha, weight) for text in texts for alpha, weight in along]
    list(
        in_batches(
            rows,
            lambda row: len(group.pieces[row[0]].ids),
            lambda row: group.numbers[row[0]],
            input_device(subject.model),
            compute,
            subject.advice,
        )
    )
    return scores


def _products(
    subject: Subject, group: _Group, rows: Int[Tensor, " row"], alphas: Float[Tensor, " row"]
) -> Float[Tensor, "row position"]:
    """Each token's embedding times its gradient, somewhere on the way."""
    model = subject.model
    with subject.differentiable(), _on_the_way(subject, group, rows, alphas) as met:
        (gradient,) = gradient_of(model, values_of(model, group.chosen(rows)), met[1:])
    products = (met[0].float() * gradient.float()).sum(-1).cpu()
    return products * group.back[rows, : products.shape[1]]


@contextmanager
def _on_the_way(
    subject: Subject, group: _Group, rows: Int[Tensor, " row"], alphas: Float[Tensor, " row"]
) -> Iterator[list[Tensor]]:
    """Rows of texts of the group, each so far on its way; the embedding whole, and as it is there,
    once the model has run."""
    pieces = group.chosen(rows)
    longest = max(len(piece.ids) for piece in pieces)
    back = group.back[rows, :longest]
    scale = 1 - back + back * alphas.unsqueeze(-1)  # exact for the smallest α
    selected = {layer: tuple(v[rows, :longest] for v in of) for layer, of in group.selected.items()}
    layers = [layer for layer in subject.layers if layer.layer in selected]
    met: list[Tensor] = []

    def move(output: Tensor) -> Tensor:
        whole = output.detach()
        met[:] = [whole, (whole * scale.to(whole).unsqueeze(-1)).requires_grad_()]
        return met[1]

    with (
        subject.steered(pieces),
        held(layers, selected),
        embedded(subject.model, move),
    ):
        yield met
