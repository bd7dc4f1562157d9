"""An evaluation made by hand: ten prompts, of which steering turns five."""

import json
from pathlib import Path

from moesteer.evaluation.comparison import ArmFacts, Comparison, TaskFacts, compare
from moesteer.profile import Profile
from moesteer.runs import open_run

ARMS = ("unsteered", "steered", "random 0", "random 1")
TASK = TaskFacts(
    "towns",
    "All towns",
    "yes",
    ("yes", "no"),
    "target",
    False,
    10,
    "not checked: no result lies in /home/someone/checks",
)
SECRET = "what only the folder of results may hold"


def evaluation(folder: Path, profile: Profile, command: str = "moesteer evaluate") -> Path:
    """Unsteered and random experts answer every second prompt with yes, the steered model all."""
    records = [
        {
            "task": "towns",
            "arm": arm,
            "item": item,
            "prompt": SECRET,
            "reply": SECRET,
            "outcome": "yes" if arm == "steered" or item % 2 else "no",
            "verdicts": [],
        }
        for arm in ARMS
        for item in range(10)
    ]
    shares, differences = compare([TASK], ARMS, records, 0)
    arms = tuple(ArmFacts(a, tokens=0 if a == "unsteered" else 99) for a in ARMS)
    found = Comparison(
        "made", profile.name, "test", 0, (TASK,), arms, tuple(shares), tuple(differences)
    )
    about = {"command": command, "versions": {}, "date": "2026-01-01"}
    settings = {"profile": json.loads(profile.to_json())}
    with open_run(folder, "evaluate", settings, about) as run:
        run.add("replies", records)
        (folder / "summary.json").write_text(found.to_json())
    return folder
