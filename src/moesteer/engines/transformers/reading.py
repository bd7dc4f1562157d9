"""Numbers read off texts: log-probabilities of tokens, under many profiles at once.

A batch holds every text of a group once for each of several profiles, padded on the right, each
row steered by its own profile. The LM head is applied only where a log-probability is asked for: a
hook hands it those positions and no others, and what the model does to its logits afterwards
(scales, soft caps) stays the model's. Layers below the lowest steered one are computed once for
all profiles (`replay.py`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from moesteer.engines.readouts import Readout, Term, reaching
from moesteer.engines.transformers.replay import Replay
from moesteer.engines.transformers.routers import MoELayer, input_device
from moesteer.engines.transformers.steering import UNSTEERED, steer
from moesteer.engines.transformers.stream import Stream
from moesteer.errors import MoesteerError
from moesteer.profile import Profile

BATCH_TOKENS = 8192
"""Tokens of a batch, padding included."""
BATCH_LOGITS = 2**27
"""Logits of a batch (positions × vocabulary): half a gigabyte in fp32."""


@dataclass(frozen=True)
class Piece:
    """A text, and terms of readouts to read off it; `numbers` says each term's readout.

    Its first `prompt` tokens are the prompt: what stands before the first token that is read.
    """

    ids: tuple[int, ...]
    prompt: int
    terms: tuple[Term, ...]
    numbers: tuple[int, ...]


def read(
    model: PreTrainedModel,
    layers: Sequence[MoELayer],
    stream: Stream | None,
    replay: Replay,
    readouts: Sequence[Readout],
    profiles: Sequence[Profile | None],
    progress: Callable[[int], None] | None = None,
) -> Float[np.ndarray, "profile readout"]:
    """See `Engine.read`."""
    values = np.zeros((len(profiles), len(readouts)))
    missing = np.array([len(readout.terms) for readout in readouts])
    if progress is not None:
        progress(int((missing == 0).sum()) * len(profiles))
    for pieces in batches(split(readouts, most_terms(model)), most_terms(model)):
        numbers, weights = _flat(pieces)
        np.subtract.at(missing, numbers, 1)
        finished = int((missing[np.unique(numbers)] == 0).sum())
        for which, logs in _runs(model, layers, stream, replay, pieces, profiles):
            for profile, row in zip(which, logs.double().cpu().numpy(), strict=True):
                np.add.at(values[profile], numbers, weights * row)
            if progress is not None:
                progress(finished * len(which))
    return values


def divergence(
    model: PreTrainedModel,
    layers: Sequence[MoELayer],
    stream: Stream | None,
    replay: Replay,
    texts: Sequence[Readout],
    profile: Profile,
) -> Float[np.ndarray, " text"]:
    """Mean KL(unsteered ‖ steered) in nats of the distributions that predict each text's terms.

    KL(p ‖ q) = Σ_w p(w) (log p(w) − log q(w)), over the whole vocabulary, in fp32.
    """
    total = np.zeros(len(texts))
    start = profile.lowest_layer
    if start is None:
        return total
    starts = {start} if replay.saves(start) else set()
    # Both distributions are held at once.
    for pieces in batches(split(texts, most_terms(model) // 2), most_terms(model) // 2):
        steering = _reaching(profile, pieces)
        if steering.lowest_layer is None:
            continue
        ids, attention = padded([piece.ids for piece in pieces], input_device(model))
        row, position, _ = _places(pieces, 1)
        with torch.inference_mode(), replay.keep(starts) as kept:
            before = logits_at(model, ids, attention, row, position).log_softmax(-1)
        with (
            torch.inference_mode(),
            steer(model, [steering] * len(pieces), layers, stream, prompts_of(pieces)),
            replay.put(start, kept.get(start), 1),
        ):
            after = logits_at(model, ids, attention, row, position).log_softmax(-1)
        # Words that the model itself rules out have log-probability −inf on both sides.
        terms = torch.where(before.isneginf(), 0.0, before.exp() * (before - after)).sum(-1)
        np.add.at(total, _flat(pieces)[0], terms.clamp(min=0).double().cpu().numpy())
    return total / np.array([len(text.terms) for text in texts])


def log_probabilities(
    model: PreTrainedModel, pieces: Sequence[Piece], copies: int = 1
) -> Float[Tensor, "copy term"]:
    """log P of each term's token in fp32, of a batch that holds the pieces `copies` times over."""
    ids, attention = padded([piece.ids for piece in pieces], input_device(model))
    row, position, token = _places(pieces, copies)
    logits = logits_at(model, ids.repeat(copies, 1), attention.repeat(copies, 1), row, position)
    logs = logits.log_softmax(-1).gather(-1, token.to(logits.device).unsqueeze(-1))
    return logs.view(copies, -1)


def logits_at(
    model: PreTrainedModel, ids: Tensor, attention: Tensor, row: Tensor, position: Tensor
) -> Float[Tensor, "place word"]:
    """The logits, in fp32, that follow `position[i]` of row `row[i]`, and no others.

    Raises MoesteerError where the model has no LM head that can be asked for some positions only.
    """
    head = model.get_output_embeddings()
    assert head is not None, f"{type(model).__name__} is a causal LM without an LM head"
    seen = []

    def keep(_module: object, args: tuple) -> tuple:
        hidden = args[0]
        seen.append(hidden)
        return hidden[row.to(hidden.device), position.to(hidden.device)].unsqueeze(0), *args[1:]

    handle = head.register_forward_pre_hook(keep)
    try:
        output = model(input_ids=ids, attention_mask=attention, use_cache=False)
    finally:
        handle.remove()
    logits = output.logits
    if len(seen) != 1 or logits.shape[:-1] != (1, len(row)):
        raise MoesteerError(
            f"{type(model).__name__} calls its LM head {len(seen)} times in a forward pass and"
            f" returns logits of shape {tuple(logits.shape)} for {len(row)} positions: what it"
            " predicts can't be read."
        )
    return logits[0].float()


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask [row, position]; padding on the right leaves positions as they are."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    attention = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids.to(device), attention.to(device)


def _runs(
    model: PreTrainedModel,
    layers: Sequence[MoELayer],
    stream: Stream | None,
    replay: Replay,
    pieces: Sequence[Piece],
    profiles: Sequence[Profile | None],
) -> Iterator[tuple[Sequence[int], Float[Tensor, "profile term"]]]:
    """Numbers of profiles, and the log-probability of each term under them, until all are run."""
    profiles = [_reaching(profile or UNSTEERED, pieces) for profile in profiles]
    unsteered, steered = _by_lowest_layer(profiles)
    starts = {start for start in steered if replay.saves(start)}
    kept: Mapping[int, Tensor] = {}
    if unsteered or starts:
        with torch.inference_mode(), replay.keep(starts) as kept:
            logs = log_probabilities(model, pieces)
        yield unsteered, logs.expand(len(unsteered), -1)
    for start, members in steered.items():
        for which in _chunks(members, _copies(pieces, model)):
            by_row = [profiles[number] for number in which for _ in pieces]
            with (
                torch.inference_mode(),
                steer(model, by_row, layers, stream, prompts_of(pieces) * len(which)),
                replay.put(start, kept.get(start), len(which)),
            ):
                logs = log_probabilities(model, pieces, len(which))
            yield which, logs


# -- what goes together --------------------------------------------------------------------------


def split(readouts: Sequence[Readout], most: int, *, merge: bool = True) -> list[Piece]:
    """The texts of all readouts, each up to the last token that is needed, once if `merge`.

    A text with more than `most` terms comes in several pieces.
    """
    found: dict[object, list[tuple[Term, int]]] = {}
    ids_of: dict[object, tuple[tuple[int, ...], int]] = {}
    for number, readout in enumerate(readouts):
        if readout.terms:
            places = [term.position for term in readout.terms]
            ids = readout.ids[: max(places)]
            key = (ids, min(places)) if merge else number
            ids_of[key] = (ids, min(places))
            found.setdefault(key, []).extend((term, number) for term in readout.terms)
    return [
        Piece(*ids_of[key], *zip(*part, strict=True))
        for key, terms in found.items()
        for part in _chunks(terms, most)
    ]


def batches(
    pieces: Sequence[Piece], most: int, tokens: int = BATCH_TOKENS
) -> Iterator[list[Piece]]:
    """Pieces of similar length together, longest first, within both budgets; never none."""
    batch: list[Piece] = []
    for piece in sorted(pieces, key=lambda piece: -len(piece.ids)):
        terms = sum(len(other.terms) for other in batch) + len(piece.terms)
        if batch and (len(batch[0].ids) * (len(batch) + 1) > tokens or terms > most):
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch


def most_terms(model: PreTrainedModel) -> int:
    """How many positions' logits a batch may hold."""
    return max(2, BATCH_LOGITS // vocabulary_of(model))


def vocabulary_of(model: PreTrainedModel) -> int:
    """How many words the model's embedding has."""
    return model.get_input_embeddings().num_embeddings  # pyright: ignore


def _reaching(profile: Profile, pieces: Sequence[Piece]) -> Profile:
    return reaching(profile, any(len(piece.ids) > piece.prompt for piece in pieces))


def _by_lowest_layer(
    profiles: Sequence[Profile],
) -> tuple[list[int], dict[int, list[int]]]:
    """Which profiles steer nothing, and which steer from which layer on."""
    unsteered: list[int] = []
    steered: dict[int, list[int]] = {}
    for number, profile in enumerate(profiles):
        lowest = profile.lowest_layer
        (unsteered if lowest is None else steered.setdefault(lowest, [])).append(number)
    return unsteered, steered


def prompts_of(pieces: Sequence[Piece]) -> list[int]:
    """How many tokens of each text are its prompt."""
    return [piece.prompt for piece in pieces]


def _copies(pieces: Sequence[Piece], model: PreTrainedModel) -> int:
    """How often the pieces fit into one batch."""
    tokens = max(len(piece.ids) for piece in pieces) * len(pieces)
    terms = sum(len(piece.terms) for piece in pieces)
    return max(1, min(BATCH_TOKENS // tokens, most_terms(model) // terms))


def _chunks(items: Sequence, size: int) -> Iterator[Sequence]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _places(pieces: Sequence[Piece], copies: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row, position and token [copy × term] to be read; a token is predicted one before it."""
    places = [(row, t.position - 1, t.token) for row, p in enumerate(pieces) for t in p.terms]
    row, position, token = torch.tensor(places).T
    shift = torch.arange(copies).repeat_interleave(len(places)) * len(pieces)
    return row.repeat(copies) + shift, position.repeat(copies), token.repeat(copies)


def _flat(pieces: Sequence[Piece]) -> tuple[np.ndarray, np.ndarray]:
    """Readout number and weight of each term."""
    numbers = [number for piece in pieces for number in piece.numbers]
    return np.array(numbers), np.array([term.weight for piece in pieces for term in piece.terms])
