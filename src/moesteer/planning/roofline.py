"""What a pass takes on hardware that is not here: by arithmetic, or by the weights that are read.

    seconds = max(operations / (peak · COMPUTED), bytes / (bandwidth · READ))

with two operations a weight and token, of which an expert's count for the tokens that select it,
and every weight read once a pass: of T tokens those experts that any selects, E (1 − (1 − k/E)ᵀ).
Attention's own products, launching kernels and Python are in the two shares of the peaks that are
reached, which are rough. Williams, Waterman, Patterson 2009, Roofline.
"""

from dataclasses import dataclass

from moesteer.engines.transformers.memory import GIB
from moesteer.errors import MoesteerError
from moesteer.planning.measured import Cost
from moesteer.planning.sliced import Outline
from moesteer.planning.work import Pass

COMPUTED = 0.3
READ = 0.3
"""The shares of the peaks that are reckoned with: transformers' loops, not a tuned server."""
UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2**10, "MiB": 2**20, "GiB": GIB}
ACTIVATIONS = 24
"""Numbers of a token that a layer holds at once, in units of the stream's width."""


@dataclass(frozen=True)
class Hardware:
    """Bytes of memory, operations a second and bytes a second."""

    memory: float
    operations: float
    bandwidth: float


def parse_hardware(text: str) -> Hardware:
    """`memory=80GB,tflops=400,bandwidth=3.3TB`; MoesteerError where one is missing, twice
    there or no number."""
    parts = [part.partition("=") for part in text.split(",")]
    given = {name.strip(): value.strip() for name, _, value in parts}
    if set(given) != {"memory", "tflops", "bandwidth"} or len(parts) != len(given):
        raise MoesteerError(
            f"--hardware {text} is not of the form memory=80GB,tflops=400,bandwidth=3.3TB (TFLOP/s"
            " of the dtype the model runs in, bytes a second)."
        )
    return Hardware(
        _bytes(given["memory"]), _number(given["tflops"]) * 1e12, _bytes(given["bandwidth"])
    )


class Roofline:
    """The passes of a model on given hardware; `cost` as of `measured.Measured`."""

    def __init__(self, whole: Outline, hardware: Hardware) -> None:
        self._hardware = hardware
        self._sizes = sizes = whole.sizes
        self._item = whole.dtype.itemsize
        self._hidden = whole.model.config.get_text_config().hidden_size
        experts = {layer.layer: layer for layer in whole.layers}
        self._dense = self._expert = 0.0  # weights of all layers: always used, and of all experts
        for number, module in enumerate(whole.decoder):
            stacked = sum(w.numel() for w in module.parameters() if w.dim() > 2)
            if number in experts and not stacked:  # experts as modules of their own
                own = experts[number].experts
                stacked = 0 if own is None else sum(w.numel() for w in own.parameters())
            self._expert += stacked
            self._dense += sum(w.numel() for w in module.parameters()) - stacked
        self._share = max((s.top_k / s.experts for s in sizes.routed), default=1.0)

    def cost(self, one: Pass) -> Cost:
        """Of one of the `times` that a pass is made; scores are left out, as they take little."""
        if one.kind == "score":
            return Cost(0.0, 0.0)
        part = one.layers / self._sizes.decoder
        tokens = one.rows * one.tokens
        if one.kind == "generate":
            seconds = self._pass(tokens, 1.0, one.rows)
            seconds += (one.new - 1) * self._pass(one.rows, 1.0, one.rows)
            return Cost(seconds, self._held(tokens, one.rows))
        read = one.rows * max(one.new, 1) if one.kind in ("read", "diverge", "gradient") else 0
        seconds = self._pass(tokens, part, read)
        if one.kind == "diverge":
            return Cost(2 * seconds, self._held(tokens, 3 * read))
        if one.kind == "gradient":  # a backward pass is two forward ones, and each layer is held
            return Cost(3 * seconds, self._held(tokens, read) * self._sizes.decoder)
        return Cost(seconds, self._held(tokens, read))

    def _pass(self, tokens: float, part: float, read: float) -> float:
        """Of so many tokens through a part of the layers, the LM head at `read` of them."""
        head = self._sizes.vocabulary * self._hidden
        used = self._dense + self._expert * self._share
        operations = 2 * (tokens * used * part + read * head)
        touched = self._dense + self._expert * (1 - (1 - self._share) ** tokens)
        moved = self._item * (touched * part + (head if read else 0))
        return max(
            operations / (self._hardware.operations * COMPUTED),
            moved / (self._hardware.bandwidth * READ),
        )

    def _held(self, tokens: float, read: float) -> float:
        """Activations of one layer, and logits in fp32 with a copy."""
        return tokens * self._hidden * self._item * ACTIVATIONS + 8 * read * self._sizes.vocabulary


def _bytes(text: str) -> float:
    for unit, size in UNITS.items():
        if text.endswith(unit):
            return _number(text.removesuffix(unit)) * size
    raise MoesteerError(f"--hardware: {text} has no unit; write {text}GB, say.")


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise MoesteerError(f"--hardware: {text!r} is no number above 0.")
    return value
