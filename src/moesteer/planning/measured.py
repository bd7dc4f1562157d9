"""What a pass takes on this machine: run on a slice of the model, and multiplied by its layers.

Each kind of pass is run as the engine itself runs it, at the true length of its texts, and the
clock is read where a decoder layer begins and ends:

    seconds(pass) = everything else + Σ over the model's layers of a layer of its kind

Batches of 1, 4, 16 … texts are run as far as `SECONDS` allows; others lie between them, or beyond
them in a straight line. What a pass holds is the largest size of the process (on a GPU: of its
memory) meanwhile, less what it was before. The least of several runs is taken: other programs only
ever add to it.
"""

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moesteer.chat import TokenisedConversation
from moesteer.detection.counts import RoutingCounts
from moesteer.detection.detect import score_experts
from moesteer.detection.detectors import DETECTORS
from moesteer.engines.readouts import Readout, Term
from moesteer.engines.transformers.reading import log_probabilities, prompts_of, split
from moesteer.engines.transformers.steering import steer
from moesteer.engines.transformers.stream import find_decoder
from moesteer.engines.transformers_engine import TransformersEngine
from moesteer.planning.sliced import Outline
from moesteer.planning.work import Pass
from moesteer.profile import Profile

SECONDS = 0.4
"""No larger batch is measured than the first that takes longer; what is larger is drawn out."""
GROWTH = 4
ROUNDS = 2
SCORED = 4096
"""Pairs; of more, scores take as much longer."""
STEPS = 8
"""Tokens of a reply that are measured; the others are taken to be like them."""

Clock = Callable[[], float]


@dataclass(frozen=True)
class Taken:
    """Seconds of one pass through the slice: of each layer, and of all else; and bytes held."""

    layers: tuple[float, ...]
    rest: float
    held: float


@dataclass(frozen=True)
class Cost:
    """Seconds of a pass, and bytes that it holds beside the weights and the cache."""

    seconds: float
    held: float


class Measured:
    """The passes of a model on the device that its slice is on."""

    def __init__(
        self, whole: Outline, engine: TransformersEngine, clock: Clock = time.perf_counter
    ) -> None:
        self.device = engine.model.device
        self._engine = engine
        self._clock = clock
        self._decoder = find_decoder(engine.model, engine.layers)
        self._whole = whole
        kinds = whole.kinds
        here = kinds[: len(self._decoder)]
        # Of each layer of the model, how much of which layers of the slice.
        self._shares = np.zeros((len(kinds), len(here)))
        for row, kind in enumerate(kinds):
            alike = [column for column, other in enumerate(here) if other == kind]
            self._shares[row, alike] = 1 / len(alike)
        first = engine.layers[0]
        self._profile = Profile(deactivated=((first.layer, 0),), name="one layer")
        self._everywhere = Profile(
            deactivated=tuple((layer.layer, 0) for layer in engine.layers), name="every layer"
        )
        self._points: dict[tuple[str, int, int], dict[int, Taken]] = {}
        self.cost = cache(self._cost)

    def _cost(self, one: Pass) -> Cost:
        """Of one of the `times` that a pass is made."""
        if one.kind == "score":
            return self._scores(one)
        if one.kind == "generate":
            return self._replies(one)
        taken = self._taken(one.kind, one.rows, one.tokens, one.new)
        passes = 2 if one.kind == "diverge" else 1
        layers = self._shares.dot(np.array(taken.layers)).sum() * one.layers / len(self._shares)
        if one.kind == "gradient":  # the backward pass goes through layers, too, and holds each
            drawn = len(self._shares) / len(self._decoder)
            return Cost((sum(taken.layers) + taken.rest) * drawn, taken.held * drawn)
        return Cost(float(layers) * passes + taken.rest, taken.held)

    def _replies(self, one: Pass) -> Cost:
        """A prompt's pass, and as many steps as there are further tokens, the cache half full."""
        prompt = self._taken("count", one.rows, one.tokens, 0)
        middle = one.tokens + max(0, one.new - STEPS) // 2
        step, around, held = self._steps(one.rows, middle, min(STEPS, one.new))
        layers = [float(self._shares.dot(np.array(t)).sum()) for t in (prompt.layers, step.layers)]
        seconds = layers[0] + prompt.rest + around
        held -= self._whole.cache_bytes(one.rows * (middle + STEPS), len(self._decoder))
        return Cost(seconds + (one.new - 1) * (layers[1] + step.rest), max(held, prompt.held))

    def _scores(self, one: Pass) -> Cost:
        """Scores and intervals of the slice's experts, times layers; of many pairs, of a part."""
        rows = min(one.rows, SCORED)
        layers = self._engine.facts.layers
        widest = max(layer.experts for layer in layers)
        generator = np.random.default_rng(0)
        shape = (rows, 2, len(layers), widest)
        counts = RoutingCounts(
            generator.integers(0, 8, size=shape).astype(np.int32),
            np.full((rows, 2), 16, dtype=np.int64),
        )
        chosen = list(DETECTORS.values())[: one.tokens]
        few = RoutingCounts(counts.selected[:2], counts.tokens[:2])
        score_experts(chosen[0], few, layers, seed=0)  # what is set up at the first run
        times = []
        with _growth(self.device) as held:
            for detector in chosen:
                start = self._clock()
                score_experts(detector, counts, layers, seed=0)
                times.append(self._clock() - start)
        drawn = len(self._whole.layers) / len(layers) * one.rows / rows
        return Cost(sum(times) * drawn, held() * drawn)

    def _taken(self, kind: str, rows: int, tokens: int, new: int) -> Taken:
        """Of a batch of so many rows: between two that were measured, or beyond them in a line."""
        points = self._points.setdefault((kind, tokens, new), {})
        while rows > max(points, default=0):
            largest = max(points, default=0)
            if largest and _seconds(points[largest]) > SECONDS and len(points) > 1:
                break
            more = min(rows, max(1, GROWTH * largest))
            points[more] = self._measured(kind, more, tokens, new)
        known = sorted(points)
        if rows in points:
            return points[rows]
        above = next((i for i, n in enumerate(known) if n > rows), len(known) - 1)
        low, high = known[above - 1], known[above]
        share = (rows - low) / (high - low)

        def at(one: float, other: float) -> float:
            return one + max(0.0, other - one) * share

        one, other = points[low], points[high]
        layers = tuple(map(at, one.layers, other.layers))
        return Taken(layers, at(one.rest, other.rest), at(one.held, other.held))

    def _measured(self, kind: str, rows: int, tokens: int, new: int) -> Taken:
        work = partial(getattr(self, f"_{kind}"), *self._texts(rows, tokens, new))
        work()  # what is set up at the first run is no pass's
        found = []
        with _growth(self.device) as held:
            for _ in range(ROUNDS):
                with self._watched() as spans:
                    start = self._clock()
                    work()
                    self._synchronise()
                    whole = self._clock() - start
                layers = tuple(sum(times) / max(1, len(times)) for times in spans)
                found.append(Taken(layers, max(0.0, whole - sum(map(sum, spans))), 0.0))
        least = min(found, key=_seconds)
        return Taken(least.layers, least.rest, held())

    # -- the passes, as the engine makes them ----------------------------------------------------

    def _texts(self, rows: int, tokens: int, new: int) -> tuple[list[TokenisedConversation], int]:
        words = self._whole.sizes.vocabulary
        generator = np.random.default_rng(tokens)
        texts = generator.integers(1, words, size=(rows, tokens)).tolist()
        read = max(new, 1)
        target = (False,) * (tokens - read) + (True,) * read
        return [TokenisedConversation(tuple(text), target[-tokens:]) for text in texts], new

    def _count(self, texts: list[TokenisedConversation], _new: int) -> None:
        self._engine.count_selections(texts)

    def _read(self, texts: list[TokenisedConversation], _new: int) -> None:
        pieces = split(_decisions(texts), 2 * len(texts))
        by_row = [self._profile] * len(texts)
        model, layers = self._engine.model, self._engine.layers
        with torch.inference_mode(), steer(model, by_row, layers, None, prompts_of(pieces)):
            log_probabilities(model, pieces).cpu()

    def _gradient(self, texts: list[TokenisedConversation], _new: int) -> None:
        self._engine.gate_gradients(_decisions(texts))

    def _diverge(self, texts: list[TokenisedConversation], _new: int) -> None:
        self._engine.divergence(texts, self._profile)

    def _steps(self, rows: int, tokens: int, new: int) -> tuple[Taken, float, float]:
        """Of one decoding step; what a batch of replies takes beside its passes; and bytes held."""
        texts, _ = self._texts(rows, tokens, 1)
        prompts = [" ".join(f"w{i}" for i in text.ids) for text in texts]
        best: tuple[float, Taken, float] | None = None
        with _growth(self.device) as held:
            for _ in range(ROUNDS):
                began: list[float] = []
                hook = self._engine.model.base_model.register_forward_pre_hook(
                    lambda *_args, began=began: began.append(self._now())
                )
                with self._watched() as spans:
                    start = self._clock()
                    self._engine.generate(
                        prompts, self._everywhere, max_new_tokens=new, batch_size=rows
                    )
                    whole = self._clock() - start
                hook.remove()
                step = (began[-1] - began[1]) / (len(began) - 2) if len(began) > 2 else 0.0
                layers = tuple(sum(times[1:-1]) / max(1, len(times) - 2) for times in spans)
                first = sum(times[0] for times in spans)
                around = max(0.0, whole - first - (len(began) - 1) * step)
                if best is None or step < best[0]:
                    best = step, Taken(layers, max(0.0, step - sum(layers)), 0.0), around
        assert best is not None
        return best[1], best[2], held()

    # -- the clock -------------------------------------------------------------------------------

    def _now(self) -> float:
        self._synchronise()
        return self._clock()

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def _watched(self) -> Iterator[list[list[float]]]:
        """Seconds of each call of each of the slice's layers."""
        spans: list[list[float]] = [[] for _ in self._decoder]
        with ExitStack() as stack:
            for module, times in zip(self._decoder, spans, strict=True):
                stack.callback(self._watch(module, times))
            yield spans

    def _watch(self, module: nn.Module, times: list[float]) -> Callable[[], None]:
        began: list[float] = []

        def enter(*_args: Any) -> None:
            began.append(self._now())

        def leave(*_args: Any) -> None:
            times.append(self._now() - began.pop())

        first, last = module.register_forward_pre_hook(enter), module.register_forward_hook(leave)

        def undo() -> None:
            first.remove()
            last.remove()

        return undo


def _seconds(taken: Taken) -> float:
    return sum(taken.layers) + taken.rest


def _decisions(texts: list[TokenisedConversation]) -> list[Readout]:
    """Two words, weighed against each other, after each text."""
    return [Readout(t.ids, (Term(len(t.ids), 1, 1.0), Term(len(t.ids), 2, -1.0))) for t in texts]


@contextmanager
def _growth(device: torch.device) -> Iterator[Callable[[], float]]:
    """The most bytes held meanwhile, beside what was held before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: float(torch.cuda.max_memory_allocated(device) - before)
        return
    release()
    start = resident(peak=False)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    yield lambda: float(max(0, resident(peak=True) - start))


def resident(*, peak: bool) -> int:
    """Bytes of this process in memory, now or at most; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    name = "VmHWM:" if peak else "VmRSS:"
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


def release() -> None:
    """Give back what was freed, where the C library keeps it."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
