"""Time and memory of each step, what it is mostly made of, and what would make it less.

Memory is a sum: the weights, the cache of keys and values where replies are made, and what the
largest pass holds beside them. Time is that of all passes; replies are taken to use all their
tokens, so that what ends earlier takes less.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Protocol

import torch

from moesteer.detection.knocking import layers_to_enter
from moesteer.engines.transformers.memory import free_memory
from moesteer.engines.transformers.stream import find_decoder
from moesteer.errors import MoesteerError
from moesteer.planning.measured import Cost, Measured, resident
from moesteer.planning.roofline import COMPUTED, READ, Hardware, Roofline
from moesteer.planning.sliced import Outline, build
from moesteer.planning.work import STEPS, Job, Pass
from moesteer.records import first_line

MEASURED = 1.3
GIVEN = 3.0
"""By which factor a time may be off either way: measured on a slice, or reckoned from peaks."""

WORDS = {
    "count": "counting routing",
    "read": "reading under profiles",
    "gradient": "gate gradients",
    "generate": "making replies",
    "diverge": "comparing distributions",
    "score": "scores and intervals",
}


class Machine(Protocol):
    """What says what one pass takes."""

    def cost(self, one: Pass) -> Cost:
        """Seconds of one pass, and bytes held beside weights and cache."""
        ...


@dataclass(frozen=True)
class Step:
    """One step: bytes by what they are for, seconds by kind of pass, and passes in all."""

    name: str
    weights: float
    cache: float
    working: float
    seconds: dict[str, float]
    passes: float

    @property
    def memory(self) -> float:
        return self.weights + self.cache + self.working

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def mostly(self) -> str:
        """The kind of pass that takes longest."""
        return max(self.seconds, key=lambda kind: self.seconds[kind])


@dataclass(frozen=True)
class Plan:
    """All steps of a job on one machine; `process` is what a process takes without a model."""

    model: str
    dtype: str
    job: Job
    steps: tuple[Step, ...]
    where: str
    free: float
    process: float
    factor: float

    def fits(self, step: Step) -> bool:
        return step.memory <= self.free

    @property
    def advice(self) -> list[str]:
        """What would make it less, for what is most."""
        found = []
        worst = max(self.steps, key=lambda step: step.memory)
        if not self.fits(worst):
            if worst.weights > self.free:
                found.append(
                    "the weights alone are more than there is: spread them (--device auto, and"
                    " --offload FOLDER, which reads them again in each pass), or split them over"
                    " GPUs (--tensor-parallel N)"
                )
            else:
                found.append("take a smaller --batch-size, or shorter texts")
            if self.dtype == "float32":
                found.append("--dtype bfloat16 halves the weights")
        slow = max(self.steps, key=lambda step: step.total)
        if slow.total > 3600:
            if slow.name == "knock-out":
                found.append("--layers N goes into N layers only; --pairs-used N takes fewer pairs")
            elif slow.mostly == "generate":
                found.append(
                    "replies take most of it: fewer or shorter ones (--limit, --max-new-tokens), a"
                    " larger --batch-size, or --engine vllm, which packs them better"
                )
        return found


def estimate(
    whole: Outline,
    machine: Machine,
    job: Job,
    *,
    where: str,
    free: float,
    process: float = 0.0,
    factor: float = MEASURED,
) -> Plan:
    """What each step takes on a machine that has `free` bytes."""
    _check_lengths(whole, job)
    steps = []
    for name, passes_of in STEPS.items():
        seconds: dict[str, float] = defaultdict(float)
        cache = working = passes = 0.0
        for one in passes_of(whole.sizes, job):
            cost = machine.cost(one)
            seconds[one.kind] += one.times * cost.seconds
            passes += one.times if one.kind != "score" else 0
            held = cost.held
            tokens = one.rows * (one.tokens + one.new)
            cached = whole.cache_bytes(tokens) if one.kind == "generate" else 0.0
            if held + cached > working + cache:
                cache, working = cached, held
        steps.append(Step(name, whole.weights, cache, working, dict(seconds), passes))
    dtype = str(whole.dtype).removeprefix("torch.")
    return Plan(whole.name, dtype, job, tuple(steps), where, free, process, factor)


def plan_here(whole: Outline, job: Job, device: str | None = None) -> Plan:
    """Measured on a slice of the model, here; MoesteerError where that does not fit, or no device
    of that name is there."""
    try:
        chosen = torch.device(device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise MoesteerError(
            f"--device is {device!r}; it names a device, such as cpu or cuda:0."
        ) from None
    process = resident(peak=False)
    layers_to_enter(whole.sizes.routed, job.layers)
    _check_lengths(whole, job)
    try:
        free = free_memory(chosen)
        engine = build(whole, chosen)
    except (RuntimeError, AssertionError) as error:
        raise MoesteerError(f"nothing can be built on {chosen}: {first_line(error)}") from error
    built = f"{len(find_decoder(engine.model, engine.layers))} of {whole.sizes.decoder} layers"
    words = f"{chosen}, {torch.get_num_threads()} threads" if chosen.type == "cpu" else str(chosen)
    return estimate(
        whole,
        Measured(whole, engine),
        job,
        where=f"measured here ({words}) on {built} with random weights",
        free=free,
        process=process,
    )


def plan_given(whole: Outline, job: Job, hardware: Hardware) -> Plan:
    """Reckoned from what hardware can do at most."""
    return estimate(
        whole,
        Roofline(whole, hardware),
        job,
        where=f"reckoned, at {COMPUTED:.0%} of the operations and {READ:.0%} of the bandwidth",
        free=hardware.memory,
        factor=GIVEN,
    )


def _check_lengths(whole: Outline, job: Job) -> None:
    """MoesteerError where a text would be longer than the model's context."""
    longest = getattr(whole.model.config.get_text_config(), "max_position_embeddings", None)
    asked = max(job.pair_tokens, job.prompt_tokens + job.new_tokens)
    if longest is not None and asked > longest:
        raise MoesteerError(
            f"{asked} tokens in a text are over the context of {whole.name}, {longest}; give fewer"
            " --pair-tokens, --prompt-tokens or --new-tokens."
        )
