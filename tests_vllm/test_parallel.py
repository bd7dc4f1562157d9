"""Several workers: what they count is put together, and each steers its own layers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from parallel import said_by

from moesteer.engines.transformers_engine import load_transformers

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    "options",
    [
        ["tensor_parallel_size=2"],
        # Run eagerly, stock vLLM fails on a CPU.
        ["pipeline_parallel_size=2", "enforce_eager=false"],
    ],
    ids=["tensor", "pipeline"],
)
def test_two_workers_say_what_one_says(options: list[str], tmp_path: Path) -> None:
    out = tmp_path / "said"
    subprocess.run(
        [sys.executable, str(HERE / "parallel.py"), str(out), *options],
        env=os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        check=True,
        timeout=200,
    )
    ours = json.loads(out.read_text())
    theirs = json.loads(json.dumps(said_by(load_transformers("testbed", dtype="float32"))))
    for what in ("counts", "replies", "obeyed"):
        assert ours[what] == theirs[what], what
    for what in ("probabilities", "read", "divergence", "moved"):
        np.testing.assert_allclose(ours[what], theirs[what], atol=2e-4, err_msg=what)
