"""Several runs of the same instances beside each other: each run's arms become arms of one summary.

A run is named by its folder. Whatever they differ in (the model, a profile, the mask, the units) is
compared instance by instance, as arms are.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moesteer.errors import MoesteerError
from moesteer.rationale.explain import KIND, SUMMARY, readings_of
from moesteer.rationale.reading import Reading
from moesteer.rationale.summary import Summary, summarise
from moesteer.runs import read_run


def compare_runs(folders: Sequence[str | Path], seed: int = 0) -> Summary:
    """The summary of all arms of the runs in these folders, each compared with the first.

    With several runs an arm is named by its folder, `FOLDER: ARM` where that holds several.
    Raises MoesteerError where a folder holds no finished run of rationales, where two have the same
    name, and where their instances differ.
    """
    paths = [Path(folder) for folder in folders]
    names = [path.resolve().name for path in paths]
    if twice := [name for name in names if names.count(name) > 1]:
        raise MoesteerError(f"two runs are named {twice[0]}; give folders of different names.")
    readings: list[Reading] = []
    first = None
    for path, name in zip(paths, names, strict=True):
        run = read_run(path)
        if run.kind != KIND:
            raise MoesteerError(f"{path} is a run of `{run.kind}`, not of `{KIND}`.")
        if not (path / SUMMARY).is_file():
            command = run.about.get("command") or f"moesteer {KIND} …"
            raise MoesteerError(f"{path} is not finished; go on with it by its command: {command}")
        first = first or run
        if run.settings.get("instances") != first.settings.get("instances"):
            raise MoesteerError(
                f"{first.folder} and {path} are of different instances; compare runs of the same"
                " --task."
            )
        own = readings_of(run)
        if len(paths) > 1:
            alone = len({reading.arm for reading in own}) == 1
            own = [replace(r, arm=name if alone else f"{name}: {r.arm}") for r in own]
        readings += own
    return summarise(readings, seed)
