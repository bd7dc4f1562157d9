"""Split over two processes, a model counts, steers and reads what it does in one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from split import OTHERS, SPLITS, dummy_counts, make_models
from spread_out import check_alike, routing
from torch import Tensor

from as_user import Run, in_own_process
from moesteer.engines.led import _free_port
from moesteer.engines.tiny import tiny_model
from moesteer.engines.transformers.routers import find_routers
from moesteer.engines.transformers.splitting import Split
from moesteer.engines.transformers.steering import checked_layers
from moesteer.engines.transformers_engine import load_transformers
from moesteer.errors import MoesteerError
from moesteer.profile import Profile

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes say together."""
    folder = tmp_path_factory.mktemp("split")
    make_models(folder)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2"}
    shared |= {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "split.py"), str(folder / "said.json")],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=200) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    found = json.loads((folder / "said.json").read_text())
    found["folder"] = folder
    return found


@pytest.mark.parametrize("split", SPLITS)
def test_two_processes_say_what_one_says(said: dict[str, Any], split: Split) -> None:
    whole = load_transformers("testbed", dtype="float32")
    theirs = routing(whole)
    facts = whole.facts

    def closely(one: object, other: object, what: str) -> None:
        np.testing.assert_allclose(np.array(one), np.array(other), atol=2e-5, err_msg=what)

    check_alike({key: said[split][key] for key in theirs}, theirs, closely)
    config_hash, *norms = said[split]["facts"]
    assert config_hash == facts.config_hash
    assert norms == [*facts.layer_norms, *facts.router_norms]


def test_each_process_holds_half_of_the_experts(said: dict[str, Any]) -> None:
    assert said["tensor"]["share"] == [[16, 64, 128], [16, 128, 32]]
    assert said["expert"]["share"] == [[8, 128, 128], [8, 128, 64]]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", OTHERS)
def test_other_families_route_alike(said: dict[str, Any], split: Split, name: str) -> None:
    assert said[split][name] == dummy_counts(load_transformers(str(said["folder"] / name)))


@pytest.mark.parametrize("split", SPLITS)
def test_what_can_t_be_split_is_refused(said: dict[str, Any], split: Split) -> None:
    assert "split over 2 processes" in said[split]["refused"]
    assert "share out evenly" in said[split]["uneven"]


def test_a_router_that_says_numbers_of_a_share_is_refused() -> None:
    """As expert parallelism of transformers up to 5.19 rewrites what routers return."""
    for rank in range(2):
        model = tiny_model("qwen3_moe")
        for router in find_routers(model):
            router.module.forward = _of_share(router.module.forward, rank, 4)
        with pytest.raises(MoesteerError, match="can't be steered"):
            checked_layers(model)


def _of_share(forward: Any, rank: int, own: int) -> Any:
    def share(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, index = forward(hidden)
        elsewhere = index // own != rank
        return logits, weights.masked_fill(elsewhere, 0.0), torch.where(elsewhere, own, index % own)

    return share


def test_a_command_in_two_processes(run: Run, in_tmp_path: Path) -> None:
    """Files and words are one process's; the scores are those of an unsplit model."""
    arguments = ("detect", "testbed", "--pairs", "testbed:refusal:dev", "--dtype", "float32")
    split = in_own_process(*arguments, "--expert-parallel", "2", "--out", "split.safetensors")
    assert (split.returncode, split.stdout.count("written:")) == (0, 1), split.stderr
    assert "moesteer: process" not in split.stderr
    assert [path.name for path in in_tmp_path.iterdir()] == ["split.safetensors"]
    assert run(*arguments, "--out", "whole.safetensors").code == 0
    ours, theirs = (Profile.load(f"{name}.safetensors") for name in ("split", "whole"))
    assert ours.scores is not None
    assert theirs.scores is not None
    np.testing.assert_array_equal(ours.scores.value, theirs.scores.value)
    assert ours.model == theirs.model


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--tensor-parallel", "1"), "must be at least 2"),
        (("--tensor-parallel", "2", "--expert-parallel", "2"), "not both"),
    ],
)
def test_a_split_that_is_none(refused: Run, options: tuple[str, ...], why: str) -> None:
    assert why in refused("generate", "testbed", *options, "Hi.").err


def test_a_split_needs_its_processes() -> None:
    with pytest.raises(MoesteerError, match="torchrun"):
        load_transformers("testbed", split="tensor")
    with pytest.raises(MoesteerError, match="one place in each process"):
        load_transformers("testbed", split="tensor", device_map="cpu")
