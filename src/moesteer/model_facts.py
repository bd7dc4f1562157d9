"""What a profile knows its model by: the shape of its routing, and what tells its weights apart."""

from dataclasses import dataclass

UNKNOWN = "unknown"
"""What a profile says of its model where the scores' source did not name it; not compared."""


@dataclass(frozen=True)
class LayerShape:
    """A routed layer: its number among all decoder layers, how many experts, how many a token."""

    layer: int
    experts: int
    top_k: int


@dataclass(frozen=True)
class ModelFacts:
    """What a profile must know of its model to refuse another one.

    The norms tell models of one shape apart, whatever dtype they are loaded in: `router_norms` of
    each layer's router (rows weighted by expert, so that renumbered experts show), `layer_norms` of
    the rest of the decoder layer (of stacked experts, the first). Empty where the weights could not
    be read. `dtype` is what the model ran in; it is not compared. `decoder_layers` and `hidden` are
    how many layers the residual stream passes and how wide it is, 0 where that is not known. A
    dense model has no routed `layers`.
    """

    id: str
    revision: str | None
    model_type: str
    config_hash: str
    tokenizer_hash: str
    family: str
    layers: tuple[LayerShape, ...]
    router_norms: tuple[float, ...] = ()
    layer_norms: tuple[float, ...] = ()
    dtype: str = UNKNOWN
    decoder_layers: int = 0
    hidden: int = 0
