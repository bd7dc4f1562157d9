"""The papers' own settings and figures, as data: `paper_tables/NAME.toml`.

What is not in these files was not noted when the papers were read, and is nowhere made up: a cell
of a table is then empty, and the page says why.
"""

import tomllib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal, cast, get_args

HERE = Path(__file__).parent / "paper_tables"

PaperName = Literal["steermoe", "expert-refusal", "rationales"]
PAPERS: tuple[PaperName, ...] = get_args(PaperName)


@dataclass(frozen=True)
class Finding:
    """A claim, its figure in words (empty where none was noted), and of what the figure is.

    `by`: whose it is, where it is not the paper's own.
    """

    key: str
    claim: str
    figure: str
    of: str
    by: str = ""


@dataclass(frozen=True)
class PaperModel:
    """A model of the paper: its shape where it was noted, and what the paper sets for it.

    `numbers` are (activated, deactivated) by aim, `threshold` is in percentage points.
    """

    name: str
    layers: int | None = None
    experts: int | None = None
    top_k: int | None = None
    numbers: dict[str, tuple[int, int]] = field(default_factory=dict)
    threshold: float | None = None


@dataclass(frozen=True)
class Ablation:
    """Shares in percent on one task, by detector and number of deactivated experts."""

    model: str
    task: str
    baseline: int
    deactivated: tuple[int, ...]
    shares: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Paper:
    """`source` says where its figures come from, `not_kept` which were not noted."""

    name: PaperName
    title: str
    arxiv: str
    source: str
    not_kept: str
    findings: tuple[Finding, ...]
    settings: dict[str, int | float | str]
    models: tuple[PaperModel, ...] = ()
    ablation: Ablation | None = None

    def finding(self, key: str) -> Finding:
        """A finding by its key; KeyError where there is none."""
        return {finding.key: finding for finding in self.findings}[key]

    def number(self, key: str) -> int:
        """A setting that is a whole number."""
        return int(cast(int, self.settings[key]))

    def model_of(self, model: str) -> PaperModel | None:
        """The paper's model of this name, whoever's copy it is: the last part of the name counts.

        None for all others, those that were quantised or fine-tuned under another name as well.
        """
        own = Path(model.rstrip("/")).name.casefold()
        return next((one for one in self.models if one.name.casefold() == own), None)


@cache
def read_paper(name: PaperName) -> Paper:
    """A paper's settings and figures."""
    from pydantic import TypeAdapter

    raw = tomllib.loads((HERE / f"{name}.toml").read_text(encoding="utf-8"))
    return TypeAdapter(Paper).validate_python(raw)
