"""What a run of fine-tuning keeps of each epoch: the summary of its rationales."""

import json

from moesteer.rationale.summary import Summary
from moesteer.runs import Run

EPOCHS = "epochs"


def epochs_of(run: Run) -> list[tuple[int, Summary]]:
    """The epochs that were measured; MoesteerError, with its place, for a line that is none."""
    path = run.folder / f"{EPOCHS}.jsonl"
    return [
        (line["epoch"], Summary.from_json(json.dumps(line["summary"]), f"{path}:{number}"))
        for number, line in enumerate(run.lines(EPOCHS, "epoch", "summary"), start=1)
    ]
