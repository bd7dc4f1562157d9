"""Replies that grow token by token, each row of a batch under its own profile, and which of some
experts each token selected.

transformers' own `generate` runs in a thread, in one batch, under `steer`. What a token selected is
read at the experts' input in the forward pass that reads this very token, by its place in the row;
what becomes of the text on its way to a page can't change it. The last token of a reply that was
cut off is read by no pass: of it nothing is known.

All rows draw with the same dice. A token drawn from softmax(z / T) is argmax(z / T + g) with
Gumbel noise g (Maddison et al. 2014, A* sampling, arXiv 1411.0030), and g is the same for all rows
of a step: rows that would say the same do, and where they part, steering parted them.
"""

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from moesteer.engines.evidence import DirectionEvidence, LayerEvidence
from moesteer.engines.opening import behind_gates
from moesteer.engines.transformers.routers import input_device
from moesteer.engines.transformers.steering import steer
from moesteer.engines.transformers_engine import TransformersEngine
from moesteer.playground.passes import Passes
from moesteer.profile import Expert, Profile
from moesteer.profile_fit import check_model

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes for bytes that are no whole character yet."""


@dataclass(frozen=True)
class Token:
    """A generated token, the characters that it added to the reply, and which of the watched
    experts it selected; None where the model did not read it any more, or has not yet.

    A token that holds part of a character adds nothing, the one that completes it all of it.
    """

    id: int
    text: str
    selected: frozenset[Expert] | None


@dataclass(frozen=True)
class Replies:
    """The replies so far, the tokens of each row; with their proof once they are whole.

    `steered` says then of each row whether a profile steered it; None where no profile has a gate.
    """

    rows: tuple[tuple[Token, ...], ...]
    evidence: tuple[LayerEvidence | DirectionEvidence, ...] | None = None
    steered: tuple[bool, ...] | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple("".join(token.text for token in row) for row in self.rows)


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn; temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0


def stream_replies(
    engine: TransformersEngine,
    prompts: Sequence[str],
    profiles: Sequence[Profile | None],
    sampling: Sampling,
    *,
    watched: Sequence[Expert] = (),
    stop: threading.Event,
    alone: threading.Lock,
) -> Iterator[Replies]:
    """Replies to rendered prompts, each under its own profile, whenever they have grown.

    `stop` ends them at the next token; `alone` is held while the model runs, so that whoever shares
    it waits. The last of what is yielded has the evidence, also where replies were stopped. Raises
    MoesteerError where a profile doesn't fit, DidNotFire where it is not proved to have steered.
    Whoever stops listening stops the model.
    """
    for profile in profiles:
        if profile is not None:
            check_model(profile, engine.facts)
    told: queue.Queue[_Step | _Done] = queue.Queue()
    passes = Passes(watched, rows=len(prompts))

    def run() -> None:
        try:
            with alone:
                told.put(_generate(engine, prompts, profiles, sampling, passes, stop, told))
        except BaseException as error:  # raised again where it is listened to
            told.put(_Done(error=error))

    threading.Thread(target=run, daemon=True).start()
    try:
        texts = [GrowingText(engine.tokenizer, end_tokens(engine)) for _ in prompts]
        while isinstance(said := told.get(), _Step):
            for text, token in zip(texts, said.tokens, strict=True):
                text.add(token)
            if told.empty():
                yield Replies(_rows(texts, passes))
        if said.error is not None:
            raise said.error
        for text in texts:
            text.end()
        yield Replies(_rows(texts, passes), said.evidence, said.steered)
    finally:
        stop.set()


@dataclass(frozen=True)
class _Step:
    tokens: list[int]


@dataclass(frozen=True)
class _Done:
    evidence: tuple[LayerEvidence | DirectionEvidence, ...] = ()
    steered: tuple[bool, ...] | None = None
    error: BaseException | None = None


def _rows(texts: "Sequence[GrowingText]", passes: Passes) -> tuple[tuple[Token, ...], ...]:
    return tuple(
        tuple(
            Token(token, piece, passes.selected(row, place, token))
            for place, (token, piece) in enumerate(zip(text.ids, text.pieces, strict=True))
        )
        for row, text in enumerate(texts)
    )


def _generate(
    engine: TransformersEngine,
    prompts: Sequence[str],
    profiles: Sequence[Profile | None],
    sampling: Sampling,
    passes: Passes,
    stop: threading.Event,
    told: "queue.Queue[_Step | _Done]",
) -> _Done:
    """As the engine generates a left-padded batch, and what it is told on the way."""
    model, tokenizer, device = engine.model, engine.tokenizer, input_device(engine.model)
    encoded = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    ends = [tokenizer.pad_token_id, tokenizer.eos_token_id, 0]
    pad = next(token for token in ends if isinstance(token, int))
    ids, attention = _left_padded(encoded, pad)
    applied, opened = behind_gates(engine, encoded, profiles)
    directed = any(profile is not None and profile.directions for profile in applied)
    stream = engine.stream if directed else None
    passes.begins_at = ids.shape[1]
    with (
        torch.inference_mode(),
        steer(model, applied, engine.layers, stream) as fired,
        passes.seen_in(engine),
    ):
        model.generate(  # pyright: ignore[reportCallIssue]
            ids.to(device),
            attention_mask=attention.to(device),
            max_new_tokens=sampling.max_new_tokens,
            pad_token_id=pad,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            temperature=None,
            top_p=None,
            top_k=None,
            logits_processor=LogitsProcessorList([SameDice(sampling)]),
            stopping_criteria=StoppingCriteriaList([_Stopped(stop)]),
            streamer=_Streamer(told),
        )
    return _Done(tuple(fired.evidence()), None if opened is None else tuple(opened))


class SameDice(LogitsProcessor):
    """Logits z of a step as z / T + g, whose largest is drawn from softmax(z / T); as they are
    where the temperature T is 0. The noise g [1, vocabulary] is one for all rows."""

    def __init__(self, sampling: Sampling) -> None:
        self.temperature = sampling.temperature
        self.dice = torch.Generator().manual_seed(sampling.seed)

    def __call__(
        self, input_ids: Int[Tensor, "row position"], scores: Float[Tensor, "row vocabulary"]
    ) -> Float[Tensor, "row vocabulary"]:
        if not self.temperature:
            return scores
        exponential = torch.empty(1, scores.shape[1], dtype=torch.float64)
        gumbel = -exponential.exponential_(generator=self.dice).log()
        return scores.double() / self.temperature + gumbel.to(scores.device)


class _Stopped(StoppingCriteria):
    def __init__(self, stop: threading.Event) -> None:
        self.stop = stop

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Any:
        return torch.full((len(input_ids),), self.stop.is_set(), device=input_ids.device)


class _Streamer(BaseStreamer):
    """Hands on the tokens of each step; what it is given first is the prompts."""

    def __init__(self, told: "queue.Queue[_Step | _Done]") -> None:
        self.told = told
        self.prompts_are_past = False

    def put(self, value: Tensor) -> None:
        if self.prompts_are_past:
            self.told.put(_Step(value.tolist()))
        self.prompts_are_past = True

    def end(self) -> None: ...


class GrowingText:
    """A reply's tokens up to its end, and the characters that each adds.

    Together the pieces are what the tokenizer makes of all the tokens, special ones left out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: frozenset[int]) -> None:
        self.ids: list[int] = []
        self.pieces: list[str] = []
        self._tokenizer = tokenizer
        self._ends = ends
        self._shown = 0

    def add(self, token: int) -> None:
        """Nothing comes after a token that ends the reply: the batch pads what is whole."""
        if self.ids and self.ids[-1] in self._ends:
            return
        self.ids.append(token)
        text = self._decoded()
        whole = not text.endswith(BROKEN)
        self.pieces.append(text[self._shown :] if whole else "")
        self._shown = len(text) if whole else self._shown

    def end(self) -> None:
        """What is no whole character will not become one: it is shown as it is."""
        if self.pieces:
            self.pieces[-1] += self._decoded()[self._shown :]
            self._shown = len(self._decoded())

    def _decoded(self) -> str:
        return str(
            self._tokenizer.decode(
                self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


def end_tokens(engine: TransformersEngine) -> frozenset[int]:
    """The tokens with which this model ends a reply."""
    ends = getattr(engine.model.generation_config, "eos_token_id", None)
    return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])


def _left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids [row, position] whose last columns are the rows', and where these stand."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows])
    return ids, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
