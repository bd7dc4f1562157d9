"""Fine-tuning: the loss, a step and an epoch by hand; a run that is killed anywhere; adapters."""

import copy
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from moesteer.commands.finetuning import finetune as command
from moesteer.engines.checkpoint import adapter_base, read_config
from moesteer.engines.readouts import Readout
from moesteer.engines.transformers.adapters import add_adapter, attention_projections
from moesteer.engines.transformers.stream import find_decoder
from moesteer.engines.transformers_engine import TransformersEngine, load_transformers
from moesteer.errors import MoesteerError, MoesteerWarning
from moesteer.profile import Profile
from moesteer.rationale import finetune as module
from moesteer.rationale.explain import Settings
from moesteer.rationale.finetune import finetune
from moesteer.rationale.instances import Instance, parse_instance, read_instances
from moesteer.rationale.labels import decide, score_labels
from moesteer.rationale.layout import lay_out
from moesteer.rationale.training import (
    Training,
    end_of_turn,
    example,
    flags_restored,
    loss_of,
    optimiser_of,
    rate_share,
    train_epoch,
)
from moesteer.runs import read_run

SETTINGS = Settings(methods=("input-x-gradient", "occlusion"), seeds=1, shares=(0.5,))
FULL = Training(rate=3e-3, epochs=2, full=True, batch_size=8)
LORA = Training(rate=1e-2, epochs=2, batch_size=8, rank=4)
WORDS = {"warm": "red hot sunny".split(), "cold": "blue icy snowy".split()}
THINGS = "cup hat day sea bag room".split()


def record(label: str, word: str, thing: str) -> dict[str, Any]:
    return {
        "texts": {"said": f"a {word} {thing}"},
        "label": label,
        "labels": {"warm": "Yes, sure", "cold": "No"},
        "rationale": [{"text": "said", "start": 2, "end": 2 + len(word)}],
        "prompt": "Is {said} warm?",
    }


def made(things: Sequence[str], where: str) -> list[Instance]:
    records = [record(label, w, t) for t in things for label in WORDS for w in WORDS[label]]
    return [parse_instance(one, f"{where}:{n}") for n, one in enumerate(records, start=1)]


TRAIN, DEV = made(THINGS[:5], "train.jsonl"), made(THINGS[5:], "dev.jsonl")


@pytest.fixture
def engine(model_folder: Path) -> TransformersEngine:
    return load_transformers(str(model_folder))


def examples_of(engine: TransformersEngine, instances: list[Instance]):
    end = end_of_turn(instances[0], engine.tokenizer)
    return [example(item, end) for item in lay_out(instances, engine.tokenizer)]


# -- the loss, a step, an epoch ------------------------------------------------------------------


def torch_loss(engine: TransformersEngine, instances: list[Instance], model: Any = None) -> Any:
    """Cross-entropy over the whole text with all but label words and end masked out."""
    rows, labels = [], []
    for instance in instances:
        said = instance.prompt.format(**instance.texts)
        head = engine.tokenizer(f"<|user|>{said}<|end|><|assistant|>")["input_ids"]
        tail = engine.tokenizer(instance.labels[instance.label] + "<|end|>")["input_ids"]
        rows.append(head + tail)
        labels.append([-100] * len(head) + tail)
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    wanted = torch.tensor([row + [-100] * (longest - len(row)) for row in labels])
    logits = (model or engine.model)(input_ids=ids, attention_mask=mask).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), wanted[:, 1:].flatten())


def test_the_loss_is_that_of_label_words_and_end_alone(engine: TransformersEngine) -> None:
    pieces = examples_of(engine, TRAIN[:9])
    words = engine.tokenizer("Yes, sure")["input_ids"]
    assert [term.token for term in pieces[0].terms] == [*words, engine.tokenizer.eos_token_id]
    assert len({len(piece.ids) for piece in pieces}) > 1
    with torch.no_grad():
        torch.testing.assert_close(loss_of(engine.model, pieces), torch_loss(engine, TRAIN[:9]))


def test_a_step_is_that_of_torch(engine: TransformersEngine) -> None:
    training = Training(rate=1e-2, epochs=1, full=True, batch_size=6)
    by_hand = copy.deepcopy(engine.model)
    optimiser = torch.optim.AdamW(by_hand.parameters(), lr=1e-2 * rate_share(0, 1), weight_decay=0)
    torch_loss(engine, TRAIN[:6], by_hand).backward()
    torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
    optimiser.step()
    own = optimiser_of(engine.model, training)
    train_epoch(engine.model, own, examples_of(engine, TRAIN[:6]), training, 1)
    for name, weight in engine.model.named_parameters():
        # A first step of Adam has the size of the rate wherever the gradient is not 0, so that
        # rounding of next to nothing shows.
        off = (weight - by_hand.get_parameter(name)).abs()
        assert (off > 1e-4).float().mean() < 1e-3, name


def test_the_rate_rises_and_falls() -> None:
    shares = [rate_share(step, 100) for step in range(100)]
    assert shares[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert shares[5] == pytest.approx(95 / 96)
    assert shares[99] == pytest.approx(1 / 96)
    assert rate_share(0, 1) == 1.0


def test_checkpointed_layers_train_alike(engine: TransformersEngine) -> None:
    pieces = examples_of(engine, TRAIN)
    layers = find_decoder(engine.model, engine.layers)
    models = []
    for again in ((), layers):
        before = {name: weight.clone() for name, weight in engine.model.state_dict().items()}
        optimiser = optimiser_of(engine.model, FULL)
        train_epoch(engine.model, optimiser, pieces, FULL, 1, again=again)
        models.append({name: w.clone() for name, w in engine.model.state_dict().items()})
        engine.model.load_state_dict(before)
    for name, weight in models[0].items():
        torch.testing.assert_close(weight, models[1][name])
    assert not any("forward" in layer.__dict__ for layer in layers)


def test_the_model_is_left_as_it_was(engine: TransformersEngine) -> None:
    frozen = engine.model.get_parameter("model.embed_tokens.weight")
    frozen.requires_grad_(False)
    before = frozen.clone()
    with flags_restored(engine.model):
        training = Training(rate=1e-3, epochs=1)
        optimiser = optimiser_of(engine.model, training)
        train_epoch(engine.model, optimiser, examples_of(engine, TRAIN), training, 1)
        assert torch.equal(frozen, before)
        frozen.requires_grad_(True)
    assert not frozen.requires_grad
    assert sum(not weight.requires_grad for weight in engine.model.parameters()) == 1
    assert all(weight.grad is None for weight in engine.model.parameters())
    assert not any(part.training for part in engine.model.modules())


def test_a_loss_that_is_no_number_is_said(engine: TransformersEngine) -> None:
    training = Training(rate=1e30, epochs=1, full=True, batch_size=4)
    with pytest.raises(MoesteerError, match=r"epoch 1, step \d+ of 8: the loss is nan.*1e\+30"):
        train_epoch(
            engine.model,
            optimiser_of(engine.model, training),
            examples_of(engine, TRAIN),
            training,
            1,
        )


def test_the_end_of_a_turn_is_the_templates(engine: TransformersEngine) -> None:
    tokenizer = engine.tokenizer
    assert end_of_turn(TRAIN[0], tokenizer) == (tokenizer.convert_tokens_to_ids("<|end|>"),)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|system|>\n{% endfor %}"
    assert end_of_turn(TRAIN[0], tokenizer) == (tokenizer.convert_tokens_to_ids("<|system|>"),)
    assert end_of_turn(TRAIN[0], tokenizer, plain=True) == (tokenizer.eos_token_id,)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert end_of_turn(TRAIN[0], tokenizer) == (tokenizer.eos_token_id,)
    tokenizer.eos_token = None
    assert end_of_turn(TRAIN[0], tokenizer, plain=True) == ()


# -- a whole run ---------------------------------------------------------------------------------


def run(
    folder: Path, out: Path, training: Training, *, killed_in: str = "", command: str = ""
) -> list[Any]:
    """The run in `out`; with `killed_in`, killed in the middle of the stage of that title."""

    @contextmanager
    def stage(title: str) -> Iterator[Any]:
        def progress(done: int, total: int) -> None:
            if title == killed_in and done:
                raise KeyboardInterrupt

        yield progress

    engine = load_transformers(str(folder))
    return finetune(engine, TRAIN, DEV, training, SETTINGS, out=out, command=command, stage=stage)


def test_an_easy_task_is_learnt(model_folder: Path, tmp_path: Path) -> None:
    training = Training(rate=5e-3, epochs=5, full=True, batch_size=4)
    found = run(model_folder, tmp_path / "out", training)
    accuracy = [summary.arms[0].accuracy for _, summary in found]
    assert accuracy[0] == 0.5
    assert accuracy[-1] > 0.8


def results(out: Path, weights: str) -> dict[str, Any]:
    found: dict[str, Any] = {"epochs": (out / "epochs.jsonl").read_text()}
    for folder in sorted(out.glob("epoch-*")):
        found[folder.name] = (folder / "readings.jsonl").read_text()
        found[f"{folder.name}, summary"] = (folder / "summary.json").read_text()
    for folder in sorted(out.glob("checkpoints/epoch-*")):
        found[f"{folder.name}, weights"] = load_file(folder / weights)
    return found


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize(
    ("training", "weights"),
    [(FULL, "model.safetensors"), (LORA, "adapter_model.safetensors")],
    ids=["full", "adapter"],
)
def test_a_killed_run_comes_to_the_same(
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    training: Training,
    weights: str,
) -> None:
    whole = run(model_folder, tmp_path / "whole", training)
    assert [epoch for epoch, _ in whole] == [0, 1, 2]
    assert not list((tmp_path / "whole").glob("checkpoints/*/optimizer.pt"))

    out = tmp_path / "killed"
    for title in ("rationales after epoch 0", "epoch 1", "epoch 2"):
        with pytest.raises(KeyboardInterrupt):
            run(model_folder, out, training, killed_in=title)
    assert [path.name for path in out.glob("checkpoints/*")] == ["epoch-1"]
    (out / "checkpoints" / ".unfinished").mkdir()  # killed as a checkpoint was written
    with monkeypatch.context() as patch:
        # Between the last checkpoint and its measurement.
        patch.setattr(module, "explain", lambda *_args, **_kwargs: (_ for _ in ()).throw(EOFError))
        with pytest.raises(EOFError):
            run(model_folder, out, training)
    assert (out / "checkpoints" / "epoch-2").is_dir()
    assert not (out / "epoch-2").exists()
    assert run(model_folder, out, training) == whole
    assert same(results(out, weights), results(tmp_path / "whole", weights))

    # What is finished is neither trained nor measured again.
    monkeypatch.setattr(module, "explain", None)
    monkeypatch.setattr(module, "train_epoch", None)
    assert run(model_folder, out, training) == whole
    assert read_run(out).kind == "rationale finetune"
    with pytest.raises(MoesteerError, match=r"training\.batch_size was 8 and is 16"):
        run(model_folder, out, Training(rate=1e-3, epochs=2, full=True))


# -- checkpoints as models -----------------------------------------------------------------------


@pytest.mark.parametrize("training", [FULL, LORA], ids=["full", "adapter"])
def test_a_checkpoint_is_a_model(
    engine: TransformersEngine, tmp_path: Path, training: Training
) -> None:
    out = tmp_path / "out"
    once = Training(**{**vars(training), "epochs": 1})
    finetune(engine, TRAIN, DEV, once, SETTINGS, out=out)
    folder = out / "checkpoints" / "epoch-1"
    loaded = load_transformers(str(folder))
    assert loaded.facts.config_hash == engine.facts.config_hash
    laid = lay_out(DEV, engine.tokenizer)
    asked = [(item, item.ids) for item in laid]
    lines = (out / "epoch-1" / "readings.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    for item, scores, reading in zip(laid, score_labels(loaded, asked), told, strict=True):
        assert decide(item, scores).probabilities == pytest.approx(reading["probabilities"])
    assert not any(part.training for part in loaded.model.modules())
    if not training.full:
        base = adapter_base(str(folder))
        assert base is not None
        assert Path(base.model).is_absolute()
        routers = [layer.module for layer in loaded.layers]
        assert not any("lora" in n for router in routers for n, _ in router.named_parameters())
        with pytest.raises(MoesteerError, match="has no revisions"):
            load_transformers(str(folder), revision="main")
        with pytest.raises(MoesteerError, match="holds an adapter and no model"):
            read_config(str(folder))
        with pytest.raises(MoesteerError, match="holds an adapter already"):
            finetune(loaded, TRAIN, DEV, once, SETTINGS, out=tmp_path / "again")


def test_an_adapter_of_a_bundled_model_is_found(tmp_path: Path) -> None:
    engine = load_transformers("testbed")
    adapter = add_adapter(engine.model, 2, "testbed")
    adapter.save_pretrained(str(tmp_path), save_embedding_layers=False)
    engine.tokenizer.save_pretrained(tmp_path)
    again = load_transformers(str(tmp_path))
    assert again.facts.layers == engine.facts.layers
    config = tmp_path / "adapter_config.json"
    kind = {"peft_type": "PREFIX_TUNING", "base_model_name_or_path": "testbed"}
    config.write_text(json.dumps(kind))
    with pytest.raises(MoesteerError, match="PREFIX_TUNING, which writes into the prompt"):
        load_transformers(str(tmp_path))
    config.write_text("{}")
    with pytest.raises(MoesteerError, match="base_model_name_or_path"):
        load_transformers(str(tmp_path))


def test_an_adapted_model_reads_and_steers_as_a_merged_one(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    adapter = add_adapter(engine.model, 4, str(engine.facts.id))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in adapter.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    before = TransformersEngine(load_transformers(str(engine.facts.id)).model, engine.tokenizer)
    beside = TransformersEngine(engine.model, engine.tokenizer)
    merged = TransformersEngine(copy.deepcopy(adapter).merge_and_unload(), engine.tokenizer)
    shapes = engine.facts.layers
    profile = Profile(((shapes[0].layer, 1), (shapes[2].layer, 3)), ((shapes[1].layer, 2),))
    readouts = [Readout(piece.ids, piece.terms) for piece in examples_of(engine, TRAIN[:4])]
    values = [e.read(readouts, [None, profile]) for e in (beside, merged, before)]
    assert values[0] == pytest.approx(values[1], abs=1e-4)
    assert abs(values[0] - values[2]).min() > 1e-3
    assert abs(values[0][0] - values[0][1]).min() > 1e-3
    for steering in (None, profile):
        gradients = [
            dict(e.token_gradients(readouts, steering, gates=True)) for e in (beside, merged)
        ]
        for number in range(len(readouts)):
            one, other = (found[number] for found in gradients)
            torch.testing.assert_close(one.gradient, other.gradient, atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(one.gates, other.gates, atol=1e-4, rtol=1e-3)
    trained = [name for name, w in engine.model.named_parameters() if w.requires_grad]
    assert trained
    assert all("lora" in name for name in trained)


def test_adapters_stand_beside_attention_alone(engine: TransformersEngine) -> None:
    names = attention_projections(engine.model)
    ends = {name.rsplit(".", 1)[1] for name in names}
    assert ends == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert len(names) == 4 * len(engine.facts.layers)
    old = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11))
    assert {name.rsplit(".", 1)[1] for name in attention_projections(old)} == {"c_attn", "c_proj"}
    adapter = add_adapter(old, 2, "old")
    assert all("lora" in name for name, w in adapter.named_parameters() if w.requires_grad)
    for layer in find_decoder(engine.model, engine.layers):
        layer.self_attn = torch.nn.Identity()
    with pytest.raises(MoesteerError, match=r"no attention.*--full"):
        attention_projections(engine.model)


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"rate": 0.0}, "rate is 0"),
        ({"rate": float("nan")}, "rate is nan"),
        ({"rate": float("inf")}, "rate is inf"),
        ({"batch_size": 0}, "batch size is 0"),
        ({"rank": 0}, "rank is 0"),
    ],
)
def test_numbers_out_of_range_are_refused(
    engine: TransformersEngine, tmp_path: Path, wrong: dict[str, Any], said: str
) -> None:
    training = Training(**{"rate": 1e-3, **wrong})
    with pytest.raises(MoesteerError, match=said):
        finetune(engine, TRAIN, DEV, training, SETTINGS, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_instances_that_cannot_be_trained_on_are_refused(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    def tried(train: list[Instance], dev: list[Instance]) -> None:
        finetune(engine, train, dev, FULL, SETTINGS, out=tmp_path / "out")

    with pytest.raises(MoesteerError, match=r"train.jsonl:3 is to be measured.*\(train.jsonl:3\)"):
        tried(TRAIN, [*DEV, *TRAIN[2:4]])
    with pytest.raises(MoesteerError, match=r"all 3 instances.*'warm'"):
        tried(TRAIN[:3], DEV)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_refused(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(MoesteerError, match=r"holds notes.txt"):
        finetune(engine, TRAIN, DEV, FULL, SETTINGS, out=tmp_path)


def test_without_peft_its_extra_is_named(
    engine: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MoesteerError, match=r'pip install "moesteer\[finetune\]"'):
        finetune(engine, TRAIN, DEV, LORA, SETTINGS, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_all_weights_in_half_precision_are_warned_of(model_folder: Path, tmp_path: Path) -> None:
    half = load_transformers(str(model_folder), dtype="bfloat16")
    once = Training(rate=1e-3, epochs=1, full=True)
    with pytest.warns(MoesteerWarning, match="trained in bfloat16"):
        finetune(half, TRAIN, DEV[:2], once, SETTINGS, out=tmp_path / "full")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        half = load_transformers(str(model_folder), dtype="bfloat16")
        adapters = Training(rate=1e-3, epochs=1, rank=2)
        finetune(half, TRAIN, DEV[:2], adapters, SETTINGS, out=tmp_path / "adapter")


# -- the command ---------------------------------------------------------------------------------


def test_the_command_prints_a_table_over_epochs(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, things in (("train", THINGS[:5]), ("dev", THINGS[5:])):
        lines = [record(a, w, t) for t in things for a in WORDS for w in WORDS[a]]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert len(read_instances(str(tmp_path / "dev.jsonl"))) == 6
    command(
        str(model_folder),
        task=str(tmp_path / "train.jsonl"),
        dev=str(tmp_path / "dev.jsonl"),
        out=str(tmp_path / "out"),
        epochs=1,
        rank=2,
        limit_dev=4,
        methods=["saliency-l2"],
    )
    said = capsys.readouterr()
    assert "saliency-l2" in said.out
    assert "random" in said.out
    assert "rationales after epoch 1: 4 of 4 instances" in said.err
    settings = read_run(tmp_path / "out").settings
    assert settings["training"]["rate"] == 2e-4
