"""The residual stream at the last tokens of texts: what enters decoder layers there."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moesteer.engines.transformers.directing import first_argument
from moesteer.engines.transformers.reading import padded
from moesteer.errors import MoesteerError


def last_tokens(
    texts: Sequence[Sequence[int]], last: int, device: torch.device
) -> tuple[Tensor, Tensor, Int[Tensor, "text position"]]:
    """A batch's ids and attention mask, padded on the right, and the places of the last tokens.

    Raises MoesteerError for a text that has fewer.
    """
    if last < 1:
        raise MoesteerError(f"the last {last} tokens of texts are no tokens; ask for 1 or more.")
    for number, text in enumerate(texts, start=1):
        if len(text) < last:
            raise MoesteerError(
                f"text {number} has {len(text)} tokens, fewer than the last {last} that are read."
            )
    ids, attention = padded(texts, device)
    ends = torch.tensor([len(text) for text in texts])
    return ids, attention, (ends[:, None] - last + torch.arange(last)).to(device)


@contextmanager
def entering(
    decoder: Sequence[nn.Module], places: Int[Tensor, "text position"]
) -> Iterator[list[Float[Tensor, "text position hidden"]]]:
    """Collect what enters each decoder layer at these places in a forward pass, in fp32."""
    found: list[Tensor] = []
    rows = torch.arange(len(places)).unsqueeze(-1)

    def see(_module: object, args: tuple, kwargs: dict) -> None:
        hidden = first_argument(args, kwargs)
        found.append(hidden[rows.to(hidden.device), places.to(hidden.device)].float())

    with ExitStack() as stack:
        for module in decoder:
            stack.callback(module.register_forward_pre_hook(see, with_kwargs=True).remove)
        yield found
