"""Writes architectures.md: what moesteer makes of each MoE architecture of transformers.

    python scripts/architectures.py

Each is built tiny and random from its default config and put through the self-test that `doctor`
and `steer` run.
"""

from pathlib import Path

import transformers

from moesteer.engines.tiny import moe_model_types, tiny_model
from moesteer.engines.transformers.routers import describe
from moesteer.engines.transformers.steering import checked_layers
from moesteer.errors import MoesteerError

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "architectures.md"
MADE_WITH = "Made with transformers "

INTRODUCTION = """\
# Architectures

{made_with}{version} by `python scripts/architectures.py`.

Every causal LM of that version whose class records router logits, {supported} of {all} supported.
Each was built tiny and random from its default config and put through moesteer's self-test: in
each layer the expert that was selected most is deactivated and one that was selected least
activated, and the selection is read at the experts' input. `moesteer doctor MODEL` runs the same
test for one model, on its own config.

*Routing* is what one forward pass showed the router to do, in order: how it scores, what moves the
selection alone, where the k best are chosen. *Top-k* says whether it can be guarded; where it
can't, the selection follows from the rewritten logits alone. The self-test is the judge of either.

| model type | class | routing | top-k | supported |
|---|---|---|---|---|
"""


def page() -> str:
    """The page for the installed transformers."""
    rows = [_row(name) for name in moe_model_types()]
    supported = sum("| yes" in row for row in rows)
    introduction = INTRODUCTION.format(
        made_with=MADE_WITH,
        version=transformers.__version__,
        supported=supported,
        all=len(rows),
    )
    return introduction + "\n".join(rows) + "\n"


def _row(name: str) -> str:
    model = tiny_model(name)
    try:
        layers = checked_layers(model)
    except MoesteerError as refusal:
        reason = str(refusal).removeprefix(describe(model)).lstrip(", ")
        routing, top_k, supported = "", "", f"no: {reason}"
    else:
        routing = "; ".join(dict.fromkeys(layer.family for layer in layers))
        top_k = "guarded" if all(layer.guarded for layer in layers) else "not guarded"
        names = [name for name, _ in model.named_modules() if name.endswith(".experts")]
        without = len(names) - len(layers)
        supported = f"yes, but for layers without router logits ({without})" if without else "yes"
    return f"| {name} | {type(model).__name__} | {routing} | {top_k} | {supported} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
