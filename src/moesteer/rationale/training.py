"""Teaching a causal LM to say an instance's label: one epoch over the instances.

The loss is the mean −log P of the tokens of the label's words, and of the end of the turn, after
the prompt; nothing else of the text counts, and the LM head is applied nowhere else. A routed
model's load-balancing loss takes no part: the experts' shares are free to follow the task. Steps
are those of AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) without decay; the rate rises over
the first steps and falls from then on, to 0 one step after the last.

What an epoch does follows from the weights, the optimiser's state, the seed and the epoch's number
alone, so that an interrupted run can be taken up at any epoch.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import ceil

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesteer.chat import NO_OPTIONS, encode
from moesteer.contrast import Conversation, Message, Span
from moesteer.engines.readouts import Term
from moesteer.engines.transformers.backward import checkpointed
from moesteer.engines.transformers.reading import Piece, log_probabilities
from moesteer.errors import MoesteerError
from moesteer.rationale.instances import Instance, filled
from moesteer.rationale.layout import Laid

WARMUP = 0.05
"""The share of the steps over which the rate rises."""
MAX_NORM = 1.0
"""What a step's gradient is cut down to."""


@dataclass(frozen=True)
class Training:
    """How a model is fine-tuned; all of it decides the result.

    rate: the highest of AdamW. full: all weights, else adapters of `rank`.
    """

    rate: float
    epochs: int = 10
    full: bool = False
    batch_size: int = 16
    rank: int = 16
    seed: int = 0


def end_of_turn(
    instance: Instance,
    tokenizer: PreTrainedTokenizerBase,
    *,
    plain: bool = False,
    chat_options: Mapping[str, object] = NO_OPTIONS,
) -> tuple[int, ...]:
    """The token that ends a reply: the first special one that the chat template writes after it.

    Without one, and without a template, the tokenizer's end of text; none where it has no such.
    """
    if not plain:
        words = instance.labels[instance.label]
        messages = (Message("user", filled(instance)[0]), Message("assistant", words))
        reply = Conversation(messages, "reply", (Span(1, 0, len(words)),))
        (said,) = encode([(instance.source, reply)], tokenizer, chat_options)
        for token, (start, _) in zip(said.ids, said.offsets, strict=True):
            if start >= said.ranges[0][1] and token in tokenizer.added_tokens_decoder:
                return (token,)
    end = tokenizer.eos_token_id
    return (end,) if isinstance(end, int) else ()


def example(laid: Laid, end: Sequence[int]) -> Piece:
    """The instance's prompt with its right label, whose tokens, and the end, are to be learnt."""
    tokens = (*laid.labels[laid.instance.label], *end)
    first = len(laid.ids)
    terms = tuple(Term(first + at, token, 1.0) for at, token in enumerate(tokens))
    return Piece((*laid.ids, *tokens[:-1]), first, terms, (0,) * len(terms))


def loss_of(model: PreTrainedModel, batch: Sequence[Piece]) -> Float[Tensor, ""]:
    """Mean −log P, in nats, of all tokens of a batch that are to be learnt."""
    return -log_probabilities(model, batch)[0].mean()


@contextmanager
def flags_restored(model: PreTrainedModel) -> Iterator[None]:
    """The weights are as open to gradients afterwards as they are now, and hold none."""
    flags = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        yield
    finally:
        for weight, flag in flags:
            weight.requires_grad_(flag)
        model.zero_grad()


def optimiser_of(model: PreTrainedModel, training: Training) -> torch.optim.AdamW:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.optim.AdamW(weights, lr=training.rate, weight_decay=0.0)


def train_epoch(
    model: PreTrainedModel,
    optimiser: torch.optim.Optimizer,
    examples: Sequence[Piece],
    training: Training,
    epoch: int,
    *,
    again: Sequence[nn.Module] = (),
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Every example once, in an order of the epoch's own; epochs count from 1.

    `again`: decoder layers that run twice, in less memory.
    Raises MoesteerError where the loss or a weight is no number any more, or where a batch doesn't
    fit into memory.
    """
    order = list(examples)
    random.Random(f"{training.seed} {epoch}").shuffle(order)
    torch.manual_seed(training.seed + epoch)  # what a model drops out by its own config
    size = training.batch_size
    per_epoch = ceil(len(order) / size)
    steps = training.epochs * per_epoch
    weights = [weight for group in optimiser.param_groups for weight in group["params"]]
    with _training_mode(model, again):
        for turn in range(per_epoch):
            batch = order[turn * size : (turn + 1) * size]
            number = (epoch - 1) * per_epoch + turn
            for group in optimiser.param_groups:
                group["lr"] = training.rate * rate_share(number, steps)
            try:
                loss = loss_of(model, batch)
                loss.backward()
            except torch.OutOfMemoryError:
                raise _too_large(batch, bool(again)) from None
            if not loss.isfinite():
                raise MoesteerError(
                    f"epoch {epoch}, step {number + 1} of {steps}: the loss is {loss.item()};"
                    f" take a lower rate than {training.rate:g}."
                )
            torch.nn.utils.clip_grad_norm_(weights, MAX_NORM)
            optimiser.step()
            optimiser.zero_grad()
            if progress is not None:
                progress(min((turn + 1) * size, len(order)), len(order))
    if not all(weight.isfinite().all() for weight in weights):
        raise MoesteerError(
            f"epoch {epoch}: the last step left weights that are no numbers; take a lower rate than"
            f" {training.rate:g}."
        )


def rate_share(step: int, steps: int) -> float:
    """Which share of the highest rate a step has, from 0: up in a line, then down in a line."""
    warmup = ceil(WARMUP * steps)
    return min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))


@contextmanager
def _training_mode(
    model: PreTrainedModel, checkpointed_layers: Sequence[nn.Module]
) -> Iterator[None]:
    with ExitStack() as stack:
        stack.callback(model.train, model.training)
        model.train()
        stack.enter_context(torch.enable_grad())
        stack.enter_context(checkpointed(checkpointed_layers, drops_out=True))
        yield


def _too_large(batch: Sequence[Piece], checkpointing: bool) -> MoesteerError:
    longest = max(len(piece.ids) for piece in batch)
    also = "" if checkpointing else ", or turn on checkpointing"
    return MoesteerError(
        f"a batch of {len(batch)} texts of up to {longest} tokens doesn't fit into memory to be"
        f" trained on; take a smaller batch size{also}."
    )
