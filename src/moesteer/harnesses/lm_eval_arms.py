"""`moesteer lm-eval`: tasks of lm-evaluation-harness, by a profile beside its controls.

The unsteered model, the profile and random controls answer the same documents. What lm-eval found
of an arm stands in ARM.json, all of it, samples included, and the comparison in `summary.json`. An
interrupted run is taken up at the arm where it stopped.
"""

import json
import logging
import random
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval import evaluate
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, setup_logging

from moesteer.engines.base import Engine
from moesteer.engines.transformers_engine import TransformersEngine
from moesteer.errors import MoesteerError, MoesteerWarning
from moesteer.evaluation.comparison import STEERED, UNSTEERED, ArmFacts
from moesteer.evaluation.controls import random_control
from moesteer.files import write_text
from moesteer.harnesses.lm_eval import SteeredLM, check_runs
from moesteer.harnesses.paired import SuiteComparison, compare
from moesteer.options import check_least
from moesteer.profile import Profile
from moesteer.profile_fit import check_model
from moesteer.provenance import about
from moesteer.records import first_line
from moesteer.runs import open_run

SUMMARY = "summary.json"
STDERR_RESAMPLES = 1000
"""Of lm-eval's own standard errors of what is no mean."""

NO_TEMPLATE = (
    "prompts are given as the tasks write them, without the model's chat template, which is"
    " lm-eval's default; --apply-chat-template puts them into it"
)


def compare_on_tasks(
    engine: Engine,
    profile: Profile,
    tasks: Sequence[str],
    *,
    out: str | Path,
    include_path: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 16,
    apply_chat_template: bool = False,
    chat_options: Mapping[str, bool | int | float | str] | None = None,
    seeds: int = 3,
    say: Callable[[str], None] | None = None,
    command: str = "",
) -> SuiteComparison:
    """What lm-eval says of a model steered by a profile, unsteered, and under random controls.

    `tasks` are names of lm-eval's tasks and groups, or of those in the folder `include_path`;
    `limit` asks only the first so many documents of each, `seeds` is how many random controls there
    are. `say` is told what is run. Raises MoesteerError where a task can't be loaded, where the
    profile steers nothing, doesn't fit or has a gate, where another engine than that of
    transformers is given, and where `out` holds anything else; DidNotFire as SteeredLM does.
    """
    if not isinstance(engine, TransformersEngine):
        raise MoesteerError("lm-eval's arms run in the transformers engine.")
    check_least(1, limit=limit, batch_size=batch_size)
    check_least(0, num_fewshot=num_fewshot, seeds=seeds)
    check_runs(profile)
    check_model(profile, engine.facts)
    setup_logging(logging.WARNING)
    logging.getLogger("lm_eval.api.task").setLevel(logging.ERROR)  # which metric has which default
    manager = _manager(tasks, include_path)
    loaded = _load(manager, tasks, num_fewshot)  # before the work, not in it
    options = dict(profile.chat_options) | dict(chat_options or {})
    by_name, notes = _arms(profile, engine, seeds)
    if not apply_chat_template:
        notes.append(NO_TEMPLATE)
    never = [name for name, task in loaded["tasks"].items() if task.get_config("num_fewshot") == 0]
    if num_fewshot and never:
        notes.append(f"--num-fewshot {num_fewshot} is not for {', '.join(never)}: they say 0")
    for note in notes:
        warnings.warn(note, MoesteerWarning, stacklevel=2)
    asked = {
        "tasks": list(tasks),
        "limit": limit,
        "num_fewshot": num_fewshot,
        "batch_size": batch_size,
        "apply_chat_template": apply_chat_template,
        "lm_eval": version("lm_eval"),
    }
    settings = asked | {
        "model": engine.facts.id,
        "model_facts": asdict(engine.facts),
        "profile": json.loads(profile.to_json()),
        "chat_options": options,
        "seeds": seeds,
    }
    with open_run(out, "lm-eval", settings, about(command)) as run:
        lm = SteeredLM(engine, batch_size=batch_size, chat_template_args=options)
        lm.quiet = not sys.stderr.isatty()
        found = {}
        for arm, steering in by_name.items():
            file = run.folder / f"{arm.replace(' ', '-')}.json"
            if not file.exists():
                if say is not None:
                    say(f"{arm}: {len(found) + 1} of {len(by_name)} arms")
                lm.steer_by(steering)
                results = _results(lm, _load(manager, tasks, num_fewshot), arm, asked)
                write_text(file, results)
            found[arm] = _read(file)
        measures, values, differences = compare(found, run.folder)
        summary = SuiteComparison(
            model=engine.facts.id,
            profile=profile.name,
            harness=f"lm-eval {asked['lm_eval']}",
            measures=tuple(measures),
            arms=tuple(_arm_facts(arm, by_name[arm], found[arm]) for arm in by_name),
            values=tuple(values),
            differences=tuple(differences),
            notes=tuple(notes),
        )
        write_text(run.folder / SUMMARY, summary.to_json() + "\n")
    return summary


def _arms(
    profile: Profile, engine: Engine, seeds: int
) -> tuple[dict[str, Profile | None], list[str]]:
    """The arms by name, and what is to be said of controls that are missing."""
    found: dict[str, Profile | None] = {UNSTEERED: None, STEERED: profile}
    if not seeds:
        return found, ["without a random control, what any steering of this size does is unknown"]
    try:
        for seed in range(seeds):
            found[f"random {seed}"] = random_control(profile, engine.facts.layers, seed)
    except MoesteerError as error:
        return found, [f"no random control: {error}"]
    return found, []


def _manager(tasks: Sequence[str], include_path: str | None) -> TaskManager:
    """Knows the tasks; lm-eval's own thousands are looked through only where they are needed."""
    if not tasks:
        raise MoesteerError("there is no task to measure; give one with --tasks.")
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise MoesteerError(f"--include-path {include_path} is no folder.")
        own = TaskManager(include_path=include_path, include_defaults=False)
        if all(task in own.all_tasks for task in tasks):
            return own
    manager = TaskManager(include_path=include_path)
    if lost := [task for task in tasks if task not in manager.all_tasks]:
        where = "" if include_path is None else f", nor in {include_path}"
        raise MoesteerError(
            f"there is no task {lost[0]!r} among those of lm-eval {version('lm_eval')}{where};"
            " `lm-eval ls tasks` lists them. The name is the one that the task's YAML gives."
        )
    return manager


def _load(manager: TaskManager, tasks: Sequence[str], num_fewshot: int | None) -> Any:
    """The tasks with their documents, anew for each arm: they keep what they were answered."""
    try:
        loaded = manager.load(list(tasks))
    except Exception as error:  # whatever lm-eval and datasets say of other people's files
        raise MoesteerError(
            f"lm-eval can't load {', '.join(tasks)}: {first_line(error)}"
        ) from error
    for task in loaded["tasks"].values():  # as lm_eval.simple_evaluate does
        own = task.get_config("num_fewshot")
        if num_fewshot is not None and own != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    return loaded


def _results(lm: SteeredLM, loaded: Any, arm: str, asked: Mapping[str, Any]) -> str:
    """What lm-eval finds of one arm, as JSON, with the evidence that it was steered."""
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    try:
        results: Any = evaluate(
            lm,
            loaded,
            limit=asked["limit"],
            bootstrap_iters=STDERR_RESAMPLES,
            apply_chat_template=asked["apply_chat_template"],
            fewshot_as_multiturn=asked["apply_chat_template"],
        )
    except (AssertionError, ValueError) as error:
        raise MoesteerError(f"lm-eval stopped in the arm {arm}: {first_line(error)}") from error
    told = {"config": {**asked, "arm": arm, "moesteer": lm.told()}}
    return json.dumps(results | told, default=handle_non_serializable, ensure_ascii=False) + "\n"


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MoesteerError(
            f"{file} can't be read: {error}. Delete it to run the arm again."
        ) from None


def _arm_facts(arm: str, profile: Profile | None, results: Mapping[str, Any]) -> ArmFacts:
    if profile is None:
        return ArmFacts(arm)
    fired = results["config"]["moesteer"]["fired"]
    return ArmFacts(
        arm,
        profile.activated,
        profile.deactivated,
        tokens=max(seen["tokens"] for seen in fired),
        obeyed=all(seen["obeyed"] for seen in fired),
        note=profile.name,
        directions=tuple(direction.words for direction in profile.directions),
    )
