"""What `moesteer plan` foretells of a step, in units of what it takes: processor time, and memory.

Foretold and measured in turn, each in a process of its own. The models are random, in three sizes;
of the larger ones the plan sees a part of the layers only. As a script: prints the figures of one
process as JSON, `plan.py foretold SIZE` or `plan.py measured SIZE`.
"""

import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from paired import Figure, Ratio

SECTION = "Foretold"
LOW, HIGH = 0.7, 1.3
ROUNDS = 3
STEPS = ("detection", "knock-out", "evaluation")

SIZES: dict[str, dict[str, Any]] = {
    "6 × 16, fp32": {"hidden": 256, "layers": 6, "experts": 16, "k": 4, "dtype": "float32"},
    "8 × 32, fp32": {"hidden": 512, "layers": 8, "experts": 32, "k": 4, "dtype": "float32"},
    "12 × 32, bf16": {"hidden": 768, "layers": 12, "experts": 32, "k": 4, "dtype": "bfloat16"},
}
JOBS: dict[str, dict[str, int]] = {
    "6 × 16, fp32": {"pairs": 64, "prompts": 24, "layers": 2},
    "8 × 32, fp32": {"pairs": 32, "prompts": 8, "layers": 1},
    "12 × 32, bf16": {"pairs": 16, "prompts": 8, "layers": 1},
}
TOKENS = {"pair_tokens": 64, "prompt_tokens": 32, "new_tokens": 24, "batch_size": 8, "seeds": 1}


def figures() -> list[Figure]:
    found = []
    for size in SIZES:
        rounds = [(_alone("foretold", size), _alone("measured", size)) for _ in range(ROUNDS)]
        for step in STEPS:
            for number, what in enumerate(("processor time", "memory")):
                ratio = Ratio(
                    tuple(ours[step][number] / took[step][number] for ours, took in rounds)
                )
                name = f"{size} random, {step}: {what} foretold in units of measured"
                found += [
                    Figure(SECTION, name, ratio, bar=LOW),
                    Figure(SECTION, name, ratio, bar=HIGH, at_most=True),
                ]
    return found


def _alone(what: str, size: str) -> dict[str, list[float]]:
    command = [sys.executable, __file__, what, size]
    return json.loads(subprocess.check_output(command, text=True))


def _job(size: str) -> Any:
    from moesteer.planning.work import Job

    return Job(**JOBS[size], **TOKENS, tasks=2)


def _config(folder: str, size: str) -> str:
    from transformers import Qwen3MoeConfig

    shape = SIZES[size]
    config: Any = Qwen3MoeConfig
    config(
        vocab_size=8000,
        hidden_size=shape["hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["hidden"] // 64,
        num_key_value_heads=shape["hidden"] // 64,
        head_dim=64,
        num_experts=shape["experts"],
        num_experts_per_tok=shape["k"],
        moe_intermediate_size=shape["hidden"] // 2,
        dtype=shape["dtype"],
    ).save_pretrained(folder)
    return folder


def foretold(size: str) -> dict[str, list[float]]:
    """Seconds and bytes of each step, as planned on at most half of the layers."""
    import torch

    from moesteer.planning import sliced
    from moesteer.planning.estimate import estimate
    from moesteer.planning.measured import Measured, resident

    with tempfile.TemporaryDirectory() as folder:
        whole = sliced.outline(_config(folder, size))
        process = resident(peak=False)
        # By default so small a model would be measured whole.
        sliced.SLICE = whole.weights // 2
        engine = sliced.build(whole, torch.device("cpu"))
        machine = Measured(whole, engine, clock=time.process_time)
        plan = estimate(whole, machine, _job(size), where="", free=0, process=process)
    return {s.name: [s.total, plan.process + s.memory] for s in plan.steps if s.name in STEPS}


def measured(size: str) -> dict[str, list[float]]:
    """Seconds of each step, and bytes of the process at most."""
    import torch

    from moesteer.detection.comparing import compare_detectors, measurement
    from moesteer.detection.detect import detect
    from moesteer.detection.selecting import select_experts
    from moesteer.evaluation.evaluate import evaluate
    from moesteer.planning import sliced
    from moesteer.planning.measured import release, resident

    job = _job(size)
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        sliced.SLICE = 2**40
        engine = sliced.build(sliced.outline(_config(folder, size)), torch.device("cpu"))
        engine.tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
        pairs = _pairs(job)
        scored = detect(engine, pairs[:2])  # what is set up at the first run

        def run(step: str, work: Callable[[], Any]) -> Any:
            release()
            Path("/proc/self/clear_refs").write_text("5")
            start = time.process_time()
            result = work()
            found[step] = [time.process_time() - start, float(resident(peak=True))]
            return result

        scored = run("detection", lambda: detect(engine, pairs))
        read = measurement(engine, pairs)
        run("knock-out", lambda: compare_detectors(engine, pairs, read, into=job.layers))
        profile = select_experts(scored, activate=2, deactivate=6, toward="a")
        cards, data = _tasks(Path(folder), job)
        run(
            "evaluation",
            lambda: evaluate(
                engine,
                profile,
                cards,
                out=Path(folder) / "run",
                data=data,
                seeds=job.seeds,
                batch_size=job.batch_size,
                max_new_tokens=job.new_tokens,
                limit=job.prompts,
            ),
        )
    return found


def _words(number: int, length: int) -> str:
    return " ".join(f"w{1 + (7 * number + 13 * i) % 900}" for i in range(length))


def _pairs(job: Any) -> list[Any]:
    from moesteer.contrast import parse_pair

    rest = job.pair_tokens - job.prompt_tokens
    return [
        parse_pair(
            {
                "prompt": _words(i, job.prompt_tokens),
                "a": f"w901 {_words(3 * i, rest - 1)}",
                "b": f"w902 {_words(5 * i, rest - 1)}",
            },
            f"pair {i}",
        )
        for i in range(job.pairs)
    ]


def _tasks(folder: Path, job: Any) -> tuple[list[Any], dict[str, str]]:
    from moesteer.evaluation.cards import read_card

    cards, data = [], {}
    for role in ("target", "price"):
        cards.append(replace(read_card("harmless-100"), name=role, role=role))
        lines = [{"prompt": _words(i + len(cards), job.prompt_tokens)} for i in range(400)]
        file = folder / f"{role}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        data[role] = str(file)
    return cards, data


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps({"foretold": foretold, "measured": measured}[sys.argv[1]](sys.argv[2])))
