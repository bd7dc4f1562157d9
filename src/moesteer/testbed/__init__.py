"""The testbed: a small Mixture-of-Experts chat model whose behaviours sit in known experts.

It was trained so that three behaviours are carried by chosen, *planted* experts, which a detector
should find and steering should switch; its *twin* read the same text without planting, so there
is nothing in it to find. ``ground_truth()`` says which experts, and what was measured.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
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
class GroundTruth:
    """What is known of the models, by behaviour and by model (``planted`` and ``twin``)."""

    seed: int
    behaviours: dict[str, PlantedBehaviour]
    settings: dict[str, Any]
    training: dict[str, Any]
    measured: dict[str, Any]


def model_path(name: str = "planted") -> Path:
    """The folder of a bundled model, ``planted`` or ``twin``, as ``from_pretrained`` reads it.

    Raises ``ValueError`` for another name and ``FileNotFoundError`` where the weights are missing.
    """
    if name not in ("planted", "twin"):
        raise ValueError(f"unknown testbed model {name!r}; there are 'planted' and 'twin'")
    folder = HERE / "models" / name
    if not (folder / "model.safetensors").exists():
        raise FileNotFoundError(f"no weights in {folder}; run `python -m moesteer.testbed.train`")
    return folder


def ground_truth() -> GroundTruth:
    """Read the ground truth of the bundled models."""
    raw = json.loads((HERE / "ground_truth.json").read_text())
    behaviours = {
        name: PlantedBehaviour(
            b["a"],
            b["b"],
            planted=tuple((layer, expert) for layer, expert in b["planted"]),
            decoys=tuple((layer, expert) for layer, expert in b["decoys"]),
        )
        for name, b in raw["behaviours"].items()
    }
    return GroundTruth(raw["seed"], behaviours, raw["settings"], raw["training"], raw["measured"])
