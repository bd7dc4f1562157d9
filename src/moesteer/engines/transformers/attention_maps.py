"""Who attends to whom: attention weights of every layer, the mean over heads.

Only the eager implementation of attention gives weights, so a model that runs another is switched
for as long as it takes. The mean is taken in a hook as each layer runs: weights of all heads of all
layers are never held at once. A head with a sink (gpt-oss) leaves a part of its weight there; rows
are divided by what goes to tokens, so that they sum to 1 everywhere.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesteer.engines.readouts import Readout
from moesteer.engines.transformers.memory import texts_in_batches
from moesteer.engines.transformers.reading import Piece, padded
from moesteer.engines.transformers.routers import describe, input_device
from moesteer.engines.transformers.stream import find_decoder
from moesteer.engines.transformers.token_gradients import Subject, pieces_of
from moesteer.errors import MoesteerError, MoesteerWarning


def attention_maps(
    subject: Subject, readouts: Sequence[Readout]
) -> Iterator[tuple[int, Float[Tensor, "layer token token"]]]:
    """See `Engine.attention_maps`."""
    model = subject.model
    decoder = find_decoder(model, subject.layers)

    def compute(pieces: Sequence[Piece]) -> Iterator[Tensor]:
        ids, attention = padded([piece.ids for piece in pieces], input_device(model))
        with (
            torch.inference_mode(),
            subject.steered(pieces),
            _watched(decoder, attention) as seen,
        ):
            model.base_model(input_ids=ids, attention_mask=attention, use_cache=False)
        _check(model, decoder, seen)
        maps = torch.stack([torch.stack(of).mean(0) for of in seen], dim=1)
        for row, piece in enumerate(pieces):
            own = maps[row, :, : len(piece.ids), : len(piece.ids)]
            yield own / own.sum(-1, keepdim=True)

    pieces = pieces_of(readouts)
    with _eager(model):
        yield from texts_in_batches(pieces, input_device(model), compute, "shorten it")


@contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    configured = model.config._attn_implementation
    if configured in (None, "eager"):
        yield
        return
    warnings.warn(
        f"{describe(model)} runs its attention as {configured!r}, which gives no weights; they are"
        " read with 'eager', which rounds otherwise.",
        MoesteerWarning,
        stacklevel=2,
    )
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(configured)


@contextmanager
def _watched(
    decoder: Sequence[nn.Module], attention: Int[Tensor, "row token"]
) -> Iterator[list[list[Float[Tensor, "row token token"]]]]:
    """Collect each decoder layer's attention weights, of which some layers have two."""
    seen: list[list[Tensor]] = [[] for _ in decoder]
    rows, tokens = attention.shape
    own = attention.cpu().unsqueeze(-1)

    with ExitStack() as stack:
        for layer, of in zip(decoder, seen, strict=True):

            def see(_module: object, _args: object, output: Any, of: list[Tensor] = of) -> None:
                weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
                if not isinstance(weights, Tensor) or weights.dim() != 4:
                    return
                if (len(weights), *weights.shape[-2:]) != (rows, tokens, tokens):
                    return
                # What padding attends to says nothing.
                mean = weights.mean(1, dtype=torch.float32).cpu() * own
                # The state of a linear attention may be of that shape, too.
                if not mean.triu(1).any() and mean.min() >= 0 and mean.sum(-1).max() < _OVER_ONE:
                    of.append(mean)

            for module in layer.modules():
                stack.callback(module.register_forward_hook(see).remove)
        yield seen


_OVER_ONE = 1.05
"""What rows in bf16 don't sum to."""


def _check(model: PreTrainedModel, decoder: Sequence[nn.Module], seen: Sequence[list]) -> None:
    missing = [number for number, of in enumerate(seen) if not of]
    if missing:
        mixers = sorted({_mixer(decoder[number]) for number in missing})
        raise MoesteerError(
            f"{describe(model)} shows no attention weights in {len(missing)} of its {len(seen)}"
            f" layers (the first is layer {missing[0]}: {', '.join(mixers)}); use a method of"
            " attribution that needs none."
        )


def _mixer(layer: nn.Module) -> str:
    """The class of a layer's first part that is no norm."""
    parts = [type(part).__name__ for part in layer.children()]
    return next((name for name in parts if not name.endswith("Norm")), type(layer).__name__)
