"""A checkpoint's facts are those of the model that transformers loads from it."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_architectures import REFUSED, TYPES
from test_transformers_engine import tokenizer
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moesteer.engines.checkpoint import without_weights
from moesteer.engines.facts import facts_of_checkpoint
from moesteer.engines.tiny import tiny_config, tiny_model
from moesteer.engines.transformers.routers import trace_layers
from moesteer.engines.transformers.steering import layer_shapes
from moesteer.engines.transformers.weightless import trace_without_weights
from moesteer.engines.transformers_engine import load_transformers
from moesteer.errors import MoesteerError
from moesteer.model_facts import ModelFacts
from moesteer.profile import Profile
from moesteer.profile_fit import check_model
from moesteer.testbed import model_path

WEIGHTS = "model.safetensors"


def config_of(model_type: str, **entries: Any) -> PreTrainedConfig:
    config_class: Any = CONFIG_MAPPING[model_type]
    return config_class(**entries)


def saved(folder: Path, model_type: str = "qwen3_moe", **options: Any) -> str:
    """A tiny model in a folder, as transformers writes it."""
    tiny_model(model_type, dtype=options.pop("dtype", torch.float32)).save_pretrained(
        folder, **options
    )
    tokenizer().save_pretrained(folder)
    return str(folder)


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> str:
    """The testbed in another folder, the tensors of its file changed."""
    shutil.copytree(model_path(), folder)
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return str(folder)


def check_same(found: ModelFacts, expected: ModelFacts) -> None:
    """Equal in all but rounding, every norm known, and at one for profiles made on either."""
    for what in ("router_norms", "layer_norms"):
        norms = getattr(expected, what)
        assert len(norms) == len(expected.layers)
        assert getattr(found, what) == pytest.approx(norms, rel=1e-9)
    bare = {"router_norms": (), "layer_norms": ()}
    assert replace(found, **bare) == replace(expected, **bare)
    check_silent(found, expected)


def check_silent(one: ModelFacts, other: ModelFacts) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_model(Profile(model=one), other)
        check_model(Profile(model=other), one)


# -- the same facts ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["testbed", "testbed-twin"])
def test_bundled_models(name: str) -> None:
    found = facts_of_checkpoint(name)
    check_same(found, load_transformers(name).facts)
    assert found.id == name


def test_another_chat_template_changes_the_tokenizer_hash() -> None:
    template = "{{ messages }}"
    found = facts_of_checkpoint("testbed", chat_template=template)
    check_same(found, load_transformers("testbed", chat_template=template).facts)
    assert found.tokenizer_hash != facts_of_checkpoint("testbed").tokenizer_hash


@pytest.mark.parametrize("name", TYPES)
def test_every_architecture(name: str, tmp_path: Path) -> None:
    path = saved(tmp_path, name)
    check_same(facts_of_checkpoint(path), load_transformers(path).facts)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_steered_is_refused_alike(name: str, tmp_path: Path) -> None:
    path = saved(tmp_path, name)
    with pytest.raises(MoesteerError, match=REFUSED[name]):
        facts_of_checkpoint(path)


@pytest.mark.parametrize(
    "name", ["deepseek_v3", "dbrx", "gpt_oss", "inkling2_text", "mixtral", "qwen3_5_moe_text"]
)
def test_shards_in_half_precision(name: str, tmp_path: Path) -> None:
    """The experts that make one parameter lie in several files."""
    path = saved(tmp_path, name, dtype=torch.bfloat16, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    found = facts_of_checkpoint(path)
    check_same(found, load_transformers(path).facts)
    assert found.dtype == "bfloat16"


@pytest.mark.parametrize("name", ["qwen3_moe", "inkling_text"])
def test_weights_are_cast_as_loading_casts_them(name: str, tmp_path: Path) -> None:
    """Convolutions of the second stay in float32 whatever the config says."""
    path = saved(tmp_path, name)
    exact = facts_of_checkpoint(path)
    config = json.loads((tmp_path / "config.json").read_text())
    for dtype in ("bfloat16", None):
        (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
        found = facts_of_checkpoint(path)
        check_same(found, load_transformers(path).facts)
        assert (found == exact) == (dtype is None)


def test_a_model_that_also_sees(tmp_path: Path) -> None:
    """Its text part alone is loaded, whose weights have other names in the files."""
    text = tiny_config(config_of("qwen3_5_moe_text")).to_dict()
    config = config_of("qwen3_5_moe", text_config=text, vision_config={"depth": 1})
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    assert any("language_model.layers" in name for name in load_file(tmp_path / WEIGHTS))
    check_same(facts_of_checkpoint(str(tmp_path)), load_transformers(str(tmp_path)).facts)


def test_a_model_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--somebody--something"
    shutil.copytree(model_path(), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    script = (
        "from moesteer.engines.facts import facts_of_checkpoint\n"
        "from moesteer.engines.transformers_engine import load_transformers\n"
        "facts = facts_of_checkpoint('somebody/something')\n"
        "assert facts == load_transformers('somebody/something').facts\n"
        "print(facts.revision, *facts.router_norms, *facts.layer_norms)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    revision, *norms = done.stdout.split()
    expected = facts_of_checkpoint("testbed")
    assert revision == commit
    assert tuple(map(float, norms)) == (*expected.router_norms, *expected.layer_norms)


def test_a_large_model_is_traced_without_its_weights() -> None:
    """Sizes of a real model of 10^12 weights; it routes as a tiny one does."""
    config = config_of("deepseek_v3", num_hidden_layers=90)
    layers = trace_without_weights(without_weights(config))
    assert [(layer.layer, layer.num_experts, layer.top_k) for layer in layers] == [
        (number, 256, 8) for number in range(3, 90)
    ]
    (family,) = {layer.family for layer in trace_layers(tiny_model(config))}
    assert {layer.family for layer in layers} == {family}


def test_tracing_leaves_the_model_as_it_was() -> None:
    """What stands in for the experts during the trace is taken off again."""
    model = tiny_model("qwen3_moe")
    outline = without_weights(model.config)
    expected = layer_shapes(trace_layers(model))
    for _ in range(2):
        assert layer_shapes(trace_without_weights(outline)) == expected
    for module in outline.modules():
        assert "forward" not in vars(module)
        assert not module._forward_pre_hooks


# -- other weights -------------------------------------------------------------------------------


def first(tensors: dict[str, Tensor], end: str) -> str:
    return next(name for name in sorted(tensors) if name.endswith(end))


def test_another_router_shows(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        name = first(tensors, "mlp.gate.weight")
        tensors[name] = tensors[name].flip(0).contiguous()  # the same experts in another order

    path, before = rewritten(tmp_path / "model", change), facts_of_checkpoint("testbed")
    found = facts_of_checkpoint(path)
    check_same(found, load_transformers(path).facts)
    assert found.router_norms[0] != before.router_norms[0]
    assert found.router_norms[1:] == before.router_norms[1:]
    assert found.layer_norms == before.layer_norms
    with pytest.raises(MoesteerError, match="the router of layer 0"):
        check_model(Profile(model=before), found)


@pytest.mark.parametrize("end", ["q_proj.weight", "experts.0.up_proj.weight"])
def test_other_weights_beside_the_routers_show(end: str, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[first(tensors, end)].mul_(2)

    path, before = rewritten(tmp_path / "model", change), facts_of_checkpoint("testbed")
    found = facts_of_checkpoint(path)
    check_same(found, load_transformers(path).facts)
    assert found.router_norms == before.router_norms
    assert found.layer_norms[0] > before.layer_norms[0] * 1.001
    assert found.layer_norms[1:] == before.layer_norms[1:]


# -- norms that can't be read --------------------------------------------------------------------


def check_without_norms(found: ModelFacts) -> None:
    known = facts_of_checkpoint("testbed")
    assert not found.router_norms
    assert not found.layer_norms
    assert found == replace(known, id=found.id, router_norms=(), layer_norms=())


def test_no_safetensors(tmp_path: Path) -> None:
    path = shutil.copytree(model_path(), tmp_path / "model")
    tensors = load_file(path / WEIGHTS)
    (path / WEIGHTS).unlink()
    torch.save(tensors, path / "pytorch_model.bin")
    check_without_norms(facts_of_checkpoint(str(path)))


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_file_that_holds_no_tensors(content: bytes, tmp_path: Path) -> None:
    path = shutil.copytree(model_path(), tmp_path / "model")
    (path / WEIGHTS).write_bytes(content)
    check_without_norms(facts_of_checkpoint(str(path)))


@pytest.mark.parametrize(
    "index", ["", "{}", '{"weight_map": {"a": "not-there.safetensors"}}', '{"weight_map": 3}']
)
def test_an_index_of_files_that_are_not_there(index: str, tmp_path: Path) -> None:
    path = shutil.copytree(model_path(), tmp_path / "model")
    (path / WEIGHTS).unlink()
    (path / f"{WEIGHTS}.index.json").write_text(index)
    check_without_norms(facts_of_checkpoint(str(path)))


def test_weights_of_another_shape(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if "layers.1." in name:
                tensors[name] = tensors[name][..., :-1].contiguous()

    check_without_norms(facts_of_checkpoint(rewritten(tmp_path / "model", change)))


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.int8])
def test_quantised_weights_leave_the_routers_known(stored: torch.dtype, tmp_path: Path) -> None:
    """As FP8 checkpoints are: the experts in 8 bits beside their scales, the routers as they were.

    What is known still tells models apart, and nothing is said of the rest.
    """

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            tensors[f"{name}_scale_inv"] = torch.ones(1)
            tensors[name] = tensors[name].to(stored)

    path = Path(rewritten(tmp_path / "model", change))
    config = json.loads((path / "config.json").read_text())
    quantised = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    known, found = facts_of_checkpoint("testbed"), facts_of_checkpoint(str(path))
    assert found == replace(known, id=found.id, layer_norms=())
    check_silent(found, known)


def test_quantised_routers_have_no_norms(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith(("_proj.weight", "gate.weight")):
                tensors[name] = tensors[name].to(torch.int8)

    check_without_norms(facts_of_checkpoint(rewritten(tmp_path / "model", change)))


def test_what_has_no_config_or_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MoesteerError, match="holds no model"):
        facts_of_checkpoint(str(tmp_path))
    path = shutil.copytree(model_path(), tmp_path / "model")
    (path / "tokenizer.json").write_text("{")
    with pytest.raises(MoesteerError, match="has no tokenizer"):
        facts_of_checkpoint(str(path))
    with pytest.raises(MoesteerError, match="no revisions"):
        facts_of_checkpoint(str(path), revision="main")
