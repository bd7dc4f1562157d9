"""Memory of detection from ten thousand to a million target tokens.

A process counts the few tokens and then the many, and reads its peak from the operating system
after each. As a script: prints the two peaks in bytes.
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
    peaks = [_measured() for _ in range(ROUNDS)]
    few, many = peaks[-1]
    return [
        Figure(
            "Memory of detection",
            f"peak of the process at {MANY:,} target tokens in units of {FEW:,}",
            Ratio(tuple(many / few for few, many in peaks)),
            bar=1.10,
            at_most=True,
            note=f"last round: {few / 2**20:.0f} MiB grew by {(many - few) / 2**20:.0f}",
        )
    ]


def _measured() -> tuple[int, int]:
    # glibc then returns what is freed at once, and the peak shows what is held rather than how the
    # heap is cut up (which moves it by tens of per cent from run to run).
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    few, many = subprocess.check_output(
        [sys.executable, __file__], env=environment, text=True
    ).split()
    return int(few), int(many)


def _peaks() -> list[int]:
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
    pair = TokenisedPair(text, text, "")
    peaks = []
    for tokens in (FEW, MANY):
        counts = count_routing(engine, [pair] * (tokens // TEXT_TOKENS // 2))
        assert counts.tokens.sum() == tokens
        peaks.append(_peak())
    return peaks


def _peak() -> int:
    """The process's largest resident size so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    print(*_peaks())
