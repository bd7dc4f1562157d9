"""What can't be steered is refused, with the reason; what nobody steers runs as it always did."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from engine import running
from torch import nn
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.v1.worker.gpu_worker import Worker

from moesteer import testbed
from moesteer.engines.facts import facts_of_checkpoint
from moesteer.engines.vllm import attach, evidence, load_profile, profiles, remove_profile, worker
from moesteer.engines.vllm.names import SHOWN_NAMES
from moesteer.engines.vllm_engine import VllmEngine, load_vllm
from moesteer.errors import MoesteerError
from moesteer.model_facts import LayerShape
from moesteer.profile import Profile

ONE = Profile(activated=((1, 2),))
EXPLICIT: dict[str, Any] = {"additional_config": {"moesteer": {}}}


def ask(llm: LLM, **extra: Any) -> list[int]:
    parameters = SamplingParams(temperature=0, max_tokens=4, extra_args=extra or None)
    prompt = TokensPrompt(prompt_token_ids=[5, 6, 7])
    return list(llm.generate([prompt], parameters, use_tqdm=False)[0].outputs[0].token_ids)


@contextmanager
def refused(reason: str) -> Iterator[None]:
    """An engine that does not start; what it left behind is put away."""
    try:
        with pytest.raises(MoesteerError, match=reason):
            yield
    finally:
        cleanup_dist_env_and_memory()


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def ernie(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write("ernie4_5_moe", tmp_path_factory.mktemp("models") / "ernie")


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """A plain one, as its users start it."""
    with running(testbed.model_path()) as llm:
        yield llm


# -- engines that can't be steered ---------------------------------------------------------------


def test_a_dense_model_runs_and_refuses_profiles(dense: Path) -> None:
    with running(dense) as llm:
        assert len(ask(llm)) == 4
        with pytest.raises(VLLMValidationError, match="no profile is named 'mine'; none is loaded"):
            ask(llm, moesteer="mine")
        with pytest.raises(MoesteerError, match="it is not a Mixture-of-Experts model"):
            load_profile(llm, "mine", ONE)
        assert profiles(llm) == {}
        described = llm.collective_rpc("moesteer_describe")[0]
        assert "it is not a Mixture-of-Experts model" in described["refused"]
        assert len(ask(llm)) == 4


def test_a_dense_model_does_not_start_steered(dense: Path) -> None:
    with (
        refused("this engine can't be steered: LlamaForCausalLM has no layer that routes"),
        running(dense, **EXPLICIT),
    ):
        pass


def test_the_transformers_backend_is_refused() -> None:
    """In a process of its own: that backend changes classes of transformers."""
    said = python("""
        backend = {"model_impl": "transformers"}
        with running(testbed.model_path(), **backend) as llm:
            llm.generate("Hi.", use_tqdm=False)
            try:
                load_profile(llm, "mine", Profile(activated=((1, 2),)))
            except MoesteerError as refused:
                print(refused)
        try:
            with running(testbed.model_path(), **backend, additional_config={"moesteer": {}}):
                print("started")
        except MoesteerError as refused:
            print(refused)
    """)
    assert len(said.splitlines()) == 2
    for line in said.splitlines():
        assert "this engine can't be steered: " in line
        assert "Transformers backend" in line


def python(script: str, **environment: str) -> str:
    """What a script prints in a process of its own."""
    head = """
        import conftest
        from engine import running
        from moesteer import testbed
        from moesteer.engines.vllm import load_profile
        from moesteer.errors import MoesteerError
        from moesteer.profile import Profile
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(script)],
        env=os.environ | environment,
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def test_a_router_that_drops_its_bias_is_refused(ernie: Path) -> None:
    """On a CPU vLLM runs ERNIE 4.5 without its selection bias; what it chose would be made up."""
    with refused(r"layer 1 \(CPURouter\) chooses experts otherwise"), running(ernie, **EXPLICIT):
        pass


def test_a_router_that_does_not_obey_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    def by_position(self: Any, hidden: Any, logits: torch.Tensor, *_: Any, **__: Any) -> tuple:
        index = torch.arange(logits.shape[0] * self.top_k).view(-1, self.top_k) % logits.shape[1]
        return torch.ones_like(index, dtype=torch.float32), index.int()

    monkeypatch.setattr(CPURouter, "_compute_routing", by_position)
    with (
        refused(r"layer 0 \(CPURouter\) does not obey"),
        running(testbed.model_path(), **EXPLICIT),
    ):
        pass


def test_a_router_that_fails_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    def fail(*_: Any, **__: Any) -> tuple:
        raise ValueError("an odd shape")

    monkeypatch.setattr(CPURouter, "_compute_routing", fail)
    with refused("can't be tested: an odd shape"), running(testbed.model_path(), **EXPLICIT):
        pass


@pytest.mark.parametrize("field", ["use_ubatching", "use_sequence_parallel_moe"])
def test_ways_of_running_that_split_a_steps_tokens_are_refused(field: str) -> None:
    from types import SimpleNamespace

    parallel = {"use_ubatching": False, "use_sequence_parallel_moe": False}
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel | {field: True}, prefill_context_parallel_size=1)
    )
    with pytest.raises(MoesteerError, match="split the tokens of a step"):
        attach.check_config(config)


def test_a_vllm_that_lacks_a_method_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    load = Worker.load_model
    after_load = worker.after_load

    def lacking(this: Any, missing: list[str]) -> None:
        after_load(this, [*missing, "attribute 'prepare_inputs'"])

    monkeypatch.setattr("moesteer.engines.vllm.worker.after_load", lacking)
    inner = [c.cell_contents for c in load.__closure__ or () if callable(c.cell_contents)]
    around = next(f for f in inner if f.__qualname__.startswith("_patch_worker"))
    cell = next(c for c in around.__closure__ or () if c.cell_contents is after_load)
    cell.cell_contents = lacking
    try:
        with (
            refused("this vLLM has no attribute 'prepare_inputs'"),
            running(testbed.model_path(), **EXPLICIT),
        ):
            pass
    finally:
        cell.cell_contents = after_load


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"profile": {}}, "must be an object with profiles and directions"),
        ("profiles", "must be an object"),
        ({"profiles": ["a.safetensors"]}, "must name a file for each"),
        ({"profiles": {"a": 3}}, "must name a file for each"),
        ({"directions": True}, "must be how many vectors"),
        ({"directions": -1}, "must be how many vectors"),
        ({"profiles": {"a": "missing.safetensors"}}, "there is no such profile file"),
    ],
)
def test_what_an_engine_is_started_with_is_checked(entry: Any, said: str) -> None:
    with (
        refused(said),
        running(testbed.model_path(), additional_config={"moesteer": entry}),
    ):
        pass


def test_the_reason_is_told_where_the_engine_runs_in_a_process_of_its_own() -> None:
    """As it does for everybody but these tests."""
    options = "--engine vllm --engine-option model_impl=transformers"
    ended = subprocess.run(
        [sys.executable, "-m", "moesteer", "generate", "testbed", "Hi.", *options.split()],
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode == 2
    assert "Transformers backend" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


def test_disabled_nothing_of_ours_is_there() -> None:
    """What it says is compared bit by bit in test_parity.py."""
    script = """
        from vllm.v1.worker.gpu_worker import Worker
        with running(testbed.model_path()) as llm:
            try:
                load_profile(llm, "mine", Profile(activated=((1, 2),)))
            except MoesteerError as refused:
                print(refused, hasattr(Worker, "moesteer_load"))
    """
    said = python(script, MOESTEER_DISABLE="1")
    assert "plugin is not loaded in this engine: MOESTEER_DISABLE is set" in said
    assert said.endswith("False")


# -- configurations and layers, without an engine -------------------------------------------------


def config(**differences: Any) -> SimpleNamespace:
    """As much of a VllmConfig as is asked, with nothing in it that is refused."""
    parts = {
        "use_ubatching": False,
        "use_sequence_parallel_moe": False,
        "prefill_context_parallel_size": 1,
        "kv_sharing_fast_prefill": False,
        "speculative_config": None,
        "kv_transfer_config": None,
    } | differences
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**parts),
        cache_config=SimpleNamespace(**parts),
        speculative_config=parts["speculative_config"],
        kv_transfer_config=parts["kv_transfer_config"],
    )


def connector(name: str, *inner: str) -> SimpleNamespace:
    within = {"connectors": [{"kv_connector": one} for one in inner]}
    return SimpleNamespace(kv_connector=name, kv_connector_extra_config=within)


@pytest.mark.parametrize(
    ("difference", "said"),
    [
        ({"use_ubatching": True}, "--enable-dbo"),
        ({"use_sequence_parallel_moe": True}, "sequence-parallel experts"),
        ({"prefill_context_parallel_size": 2}, "prefill context parallelism"),
        ({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
        (
            {"speculative_config": SimpleNamespace(enable_adaptive_verification=True)},
            "adaptive verification",
        ),
        ({"kv_transfer_config": connector("LMCacheConnectorV1")}, "LMCacheConnectorV1 keeps"),
        (
            {
                "kv_transfer_config": connector(
                    "MultiConnector", "NixlConnector", "HF3FSKVConnector"
                )
            },
            "HF3FSKVConnector keeps",
        ),
    ],
)
def test_ways_of_running_that_lose_sight_of_tokens(difference: dict, said: str) -> None:
    attach.check_config(config())
    attach.check_config(config(kv_transfer_config=connector("NixlConnector")))
    with pytest.raises(MoesteerError, match=said):
        attach.check_config(config(**difference))


def runner(kind: type[MoERunner] = MoERunner, **router: Any) -> Any:
    """A routed layer of vLLM's, made without a model."""
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    made.layer_name = "model.layers.3.mlp.experts"
    made.router = CPURouter(top_k=2, global_num_experts=8)
    vars(made.router).update(router)
    quant_method = SimpleNamespace(is_monolithic=False)
    made.routed_experts = SimpleNamespace(quant_method=quant_method)  # pyright: ignore
    return made


class OwnWay(MoERunner):
    def _apply_quant_method(self, *args: Any, **kwargs: Any) -> Any: ...


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (runner(num_fused_shared_experts=1), "appends its shared experts"),
        (runner(_hash_indices_table=torch.zeros(1)), "routes by token id"),
        (runner(zero_expert_type="identity"), "zero experts"),
        (runner(e_score_correction_bias=torch.ones(8), scoring_func="tanh"), "scores experts by"),
        (runner(OwnWay), "is a OwnWay, which runs experts in its own way"),
    ],
)
def test_layers_that_choose_in_ways_we_can_not_follow(layer: Any, said: str) -> None:
    shape = LayerShape(3, 8, 2)
    assert attach._selection(runner(), shape) is None
    with pytest.raises(MoesteerError, match=said):
        attach._selection(layer, shape)


def test_several_sets_of_experts_in_a_layer() -> None:
    assert len(attach.find_runners(nn.ModuleList([runner()]))) == 1
    with pytest.raises(MoesteerError, match="several sets of experts in layer 3"):
        attach.find_runners(nn.ModuleList([runner(), runner()]))


@pytest.mark.parametrize("explicit", [True, False])
def test_what_goes_wrong_unforeseen_stops_only_engines_that_were_to_be_steered(
    explicit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise AttributeError("no attribute 'layer_id'")

    monkeypatch.setattr(worker, "attach", fail)
    loaded = SimpleNamespace(
        vllm_config=SimpleNamespace(additional_config={"moesteer": {}} if explicit else {}),
        model_runner=SimpleNamespace(get_model=lambda: None, device="cpu"),
    )
    if explicit:
        with pytest.raises(Exception, match="layer_id"):
            worker.after_load(loaded, [])
    else:
        worker.after_load(loaded, [])
        assert "layer_id" in loaded.moesteer_refused


# -- requests ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"moesteer": "nobody"}, "no profile is named 'nobody'; known: first, second"),
        ({"moesteer": "x" * 100_000}, "named 'xxx"),
        ({"moesteer": {"fingerprint": ONE.fingerprint, "key": "k"}}, "must be the name"),
        ({"moesteer": ["first"]}, "must be the name"),
        ({"moesteer": ""}, "no profile is named ''"),
        ({"moesteer": "first", "moesteer_key": "theirs"}, "'moesteer_key' is not known"),
        ({"moesteer_count": {"counted": "top-k", "spans": []}}, "'moesteer_count' is not known"),
        ({"moesteer_keep": [1]}, "'moesteer_keep' is not known"),
        ({"moesteer_fingerprint": "0" * 16}, "'moesteer_fingerprint' is not known"),
    ],
)
def test_a_request_can_name_a_profile_and_nothing_else(llm: LLM, extra: dict, said: str) -> None:
    load_profile(llm, "first", ONE)
    load_profile(llm, "second", ONE.reversed())
    with pytest.raises(VLLMValidationError, match=said) as refusal:
        ask(llm, **extra)
    assert len(str(refusal.value)) < 500
    assert len(ask(llm, moesteer="first")) == 4


def test_extra_arguments_of_others_are_let_through(llm: LLM) -> None:
    assert ask(llm, other={"a": 1}) == ask(llm)


def test_of_many_names_a_few_are_shown(llm: LLM) -> None:
    for number in range(SHOWN_NAMES + 5):
        load_profile(llm, f"n{number}", ONE)
    with pytest.raises(VLLMValidationError, match=r"known: .* and \d+ more"):
        ask(llm, moesteer="nobody")
    for number in range(SHOWN_NAMES + 5):
        remove_profile(llm, f"n{number}")


def test_names_that_are_not_loaded(llm: LLM) -> None:
    for call in (remove_profile, evidence):
        with pytest.raises(MoesteerError, match="no profile is named 'nobody'; loaded:"):
            call(llm, "nobody")


# -- profiles that don't fit ---------------------------------------------------------------------


def unfit() -> list[tuple[Profile, str]]:
    facts = facts_of_checkpoint("testbed")
    other = replace(facts, id="another", router_norms=(9.0,) * len(facts.router_norms))
    return [
        (replace(ONE, model=other), "was made on another"),
        (replace(ONE, model=facts_of_checkpoint("testbed-twin")), "was made on testbed-twin"),
        (Profile(activated=((9, 0),)), "names layer 9"),
        (Profile(activated=((1, 99),)), "does not exist"),
        (Profile(deactivated=tuple((1, e) for e in range(16))), "16 of 16 experts"),
    ]


def test_a_profile_of_another_model_is_refused(llm: LLM) -> None:
    for profile, said in unfit():
        with pytest.raises(MoesteerError, match=said):
            load_profile(llm, "mine", profile)
    assert "mine" not in profiles(llm)


def test_the_engine_refuses_it_too(llm: LLM) -> None:
    from moesteer.engines.checkpoint import read_tokenizer

    facts = facts_of_checkpoint("testbed")
    engine = VllmEngine(llm, read_tokenizer(str(testbed.model_path()), None, None), facts)
    for profile, said in unfit():
        with pytest.raises(MoesteerError, match=said):
            engine.generate(["Hi."], profile, max_new_tokens=1)
        with pytest.raises(MoesteerError, match=said):
            engine.read([], [profile])
    with pytest.raises(MoesteerError, match="vLLM computes no gradients"):
        engine.gate_gradients([])
    with pytest.raises(MoesteerError, match="over the model's context"):
        engine.generate(["Hi. " * 500], max_new_tokens=1)


def test_an_engine_of_other_layers_is_refused(llm: LLM) -> None:
    facts = facts_of_checkpoint("testbed")
    with pytest.raises(
        MoesteerError, match=r"routes otherwise in vLLM: its 3 layers .* and 4 there"
    ):
        VllmEngine(llm, None, replace(facts, layers=facts.layers[1:]))


def test_what_vllm_says_of_its_options_is_passed_on() -> None:
    with refused("has no engine argument no_such_option"):
        load_vllm("testbed", options={"no_such_option": 1})
    with refused("vLLM can't run testbed: .*max_model_len"):
        load_vllm("testbed", options={"max_model_len": 10**9})
