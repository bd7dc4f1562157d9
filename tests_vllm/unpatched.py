"""What vLLM says without moesteer, written to a file: `python unpatched.py OUT FOLDER…`.

A process of its own, because plugins are loaded once a process.
"""

import os
import sys
from pathlib import Path

os.environ["MOESTEER_DISABLE"] = "1"
import conftest  # noqa: F401 (the environment, before vLLM is imported)


def main(out: str, *folders: str) -> None:
    import torch
    from engine import running
    from saying import vllm_says

    found = {}
    for folder in folders:
        with running(Path(folder)) as llm:
            assert not hasattr(llm.llm_engine.input_processor, "moesteer")
            found[Path(folder).name] = [(s.logs, s.reply) for s in vllm_says(llm)]
    torch.save(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
