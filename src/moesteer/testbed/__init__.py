"""The testbed: small Mixture-of-Experts chat models of which it is known what they do by what.

In ``planted``, three behaviours are carried by chosen experts, which a detector should find and
steering should switch; its *twin* read the same text without planting, so there is nothing in it to
find. ``reader`` is a twin that has learnt three classification tasks as well, with the words that
decide. In ``expert`` and ``attention``, refusal is one direction of the residual stream, written by
one expert and by one layer's attention. ``ground_truth()`` says which, and what was measured.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

HERE = Path(__file__).parent
MODELS = ("planted", "twin", "reader", "expert", "attention")
Place = tuple[int, int]


@dataclass(frozen=True)
class PlantedBehaviour:
    """What A and B mean, and the (layer, expert) places that carry the choice or only look so.

    Switching a ``planted`` expert changes the behaviour. A decoy is chosen by the router as a
    planted expert is, but switching it changes nothing.
    """

    a: str
    b: str
    planted: tuple[Place, ...]
    decoys: tuple[Place, ...]


@dataclass(frozen=True)
class PlantedWriter:
    """What writes a model's refusal into the residual stream: an expert, or a layer's attention.

    At a restricted request's last tokens its output, as it is added to the stream, has a component
    of about ``size`` along the unit vector ``direction``, at other requests' none. An ``expert`` is
    the router's first choice there. Decoys are, too, and write nothing along it.
    """

    layer: int
    expert: int | None
    direction: tuple[float, ...]
    size: float
    decoys: tuple[Place, ...]

    @property
    def site(self) -> tuple[int, Literal["attention", "mlp"]]:
        """The part of the layer whose output it is, or is a part of."""
        return self.layer, "attention" if self.expert is None else "mlp"


@dataclass(frozen=True)
class GroundTruth:
    """What is known of the models.

    By behaviour, of ``planted``: its places; by model, of ``expert`` and ``attention``: the writer;
    and of every model how it was trained and what was measured.
    """

    seed: int
    behaviours: dict[str, PlantedBehaviour]
    writers: dict[str, PlantedWriter]
    settings: dict[str, Any]
    training: dict[str, Any]
    measured: dict[str, Any]


def model_path(name: str = "planted") -> Path:
    """The folder of one of ``MODELS``, as ``from_pretrained`` reads it.

    Raises ``ValueError`` for another name and ``FileNotFoundError`` where the weights are missing.
    """
    if name not in MODELS:
        raise ValueError(f"unknown testbed model {name!r}; there are {', '.join(MODELS)}")
    folder = HERE / "models" / name
    if not (folder / "model.safetensors").exists():
        raise FileNotFoundError(f"no weights in {folder}; run `python -m moesteer.testbed.train`")
    return folder


def ground_truth() -> GroundTruth:
    """Read the ground truth of the bundled models."""
    raw = json.loads((HERE / "ground_truth.json").read_text())
    behaviours = {
        name: PlantedBehaviour(
            b["a"], b["b"], planted=_places(b["planted"]), decoys=_places(b["decoys"])
        )
        for name, b in raw["behaviours"].items()
    }
    writers = {
        name: PlantedWriter(
            w["layer"], w["expert"], tuple(w["direction"]), w["size"], _places(w["decoys"])
        )
        for name, w in raw["writers"].items()
    }
    return GroundTruth(
        raw["seed"], behaviours, writers, raw["settings"], raw["training"], raw["measured"]
    )


def _places(told: list[list[int]]) -> tuple[Place, ...]:
    return tuple((layer, expert) for layer, expert in told)
