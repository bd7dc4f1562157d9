"""Memory of detection from ten thousand to a million target tokens.

Each run is a process of its own, whose peak is read from the operating system before the counting
and after it. As a script: `memory.py TEXTS` prints by how many bytes the peak grew.
"""

import os
import resource
import subprocess
import sys

from paired import Figure, Ratio

TEXT_TOKENS = 100
FEW, MANY = 10_000, 1_000_000
ROUNDS = 3


def figures() -> list[Figure]:
    grown = [(_measured(MANY), _measured(FEW)) for _ in range(ROUNDS)]
    many, few = grown[-1]
    return [
        Figure(
            "Memory of detection",
            f"growth of the peak at {MANY:,} target tokens in units of {FEW:,}",
            Ratio(tuple(many / few for many, few in grown)),
            bar=1.10,
            at_most=True,
            note=f"last round: {many / 2**20:.0f} against {few / 2**20:.0f} MiB",
        )
    ]


def _measured(tokens: int) -> int:
    command = [sys.executable, __file__, str(tokens // TEXT_TOKENS)]
    # glibc then returns what is freed at once, and the peak shows what is held rather than how the
    # heap is cut up (which moves it by tens of per cent from run to run).
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    return int(subprocess.check_output(command, env=environment, text=True))


def _growth(texts: int) -> int:
    import torch
    from transformers import AutoTokenizer

    from moesteer.chat import TokenisedConversation, TokenisedPair
    from moesteer.detection.counts import count_routing
    from moesteer.engines.tiny import tiny_model
    from moesteer.engines.transformers_engine import TransformersEngine
    from moesteer.testbed import model_path

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    engine = TransformersEngine(tiny_model("qwen3_moe"), tokenizer, id="tiny")
    # The same text again and again, so that what grows is what counting keeps, not its input.
    text = TokenisedConversation(
        tuple(7 * i % 100 + 1 for i in range(TEXT_TOKENS)), (True,) * TEXT_TOKENS
    )
    pairs = [TokenisedPair(text, text, "")] * (texts // 2)
    before = _peak()
    counts = count_routing(engine, pairs)
    assert counts.tokens.sum() == texts * TEXT_TOKENS
    return _peak() - before


def _peak() -> int:
    """The process's largest resident size so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    print(_growth(int(sys.argv[1])))
