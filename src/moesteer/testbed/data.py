"""The testbed's pairs and prompts as data: by name for the commands, or as files for the user."""

import json
from dataclasses import asdict
from pathlib import Path

from moesteer.errors import MoesteerError
from moesteer.files import write_text
from moesteer.testbed import classification
from moesteer.testbed.world import BEHAVIOURS, SPLITS, TASKS, contrast_pairs, probes


def built_in_pairs(name: str) -> list[tuple[str, dict[str, object]]]:
    """The (place, record) pairs of `testbed:BEHAVIOUR` (fit split) or `testbed:BEHAVIOUR:SPLIT`.

    Raises MoesteerError, with the names there are, for another name.
    """
    behaviour, _, split = name.removeprefix("testbed:").partition(":")
    split = split or "fit"
    if behaviour not in BEHAVIOURS or split not in SPLITS:
        raise MoesteerError(
            f"there is no built-in set {name!r}; it is testbed:BEHAVIOUR or"
            f" testbed:BEHAVIOUR:SPLIT, with {', '.join(BEHAVIOURS)} and {', '.join(SPLITS)}."
        )
    records = contrast_pairs(behaviour, split)
    return [(f"{name}:{number}", {**record}) for number, record in enumerate(records, start=1)]


def built_in_instances(name: str) -> list[tuple[str, dict[str, object]]]:
    """The (place, record) instances of `testbed:TASK` (test split) or `testbed:TASK:SPLIT`.

    Raises MoesteerError, with the names there are, for another name.
    """
    task, _, split = name.removeprefix("testbed:").partition(":")
    split = split or "test"
    if task not in classification.SETS or split not in SPLITS:
        raise MoesteerError(
            f"there is no built-in task {name!r}; it is testbed:TASK or testbed:TASK:SPLIT, with"
            f" {', '.join(classification.SETS)} and {', '.join(SPLITS)}."
        )
    records = classification.records(task, split)
    return [(f"{name}:{number}", record) for number, record in enumerate(records, start=1)]


def export_data(folder: str) -> list[Path]:
    """Write every set of pairs, prompts and instances to JSON lines in an existing folder; the
    files made."""
    sets: dict[str, list[dict[str, object]]] = {}
    for split in SPLITS:
        for behaviour in BEHAVIOURS:
            sets[f"pairs-{behaviour}-{split}"] = [{**r} for r in contrast_pairs(behaviour, split)]
        for task in TASKS:
            sets[f"prompts-{task}-{split}"] = [asdict(probe) for probe in probes(task, split)]
        for task in classification.SETS:
            sets[f"tasks-{task}-{split}"] = classification.records(task, split)
    files = []
    for name, records in sets.items():
        path = Path(folder) / f"{name}.jsonl"
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        write_text(path, "\n".join(lines) + "\n")
        files.append(path)
    return files
