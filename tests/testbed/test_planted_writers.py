"""The models with a planted writer do what their ground truth says, under plain hooks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_models import load, prompt_text
from torch import Tensor

from as_user import Run
from moesteer.testbed import PlantedWriter, ground_truth, world

TRUTH = ground_truth()
LAST = 3  # the prompt's full stop, and two tokens of the template
REQUESTS = ("restricted", "benign")

# (what is written, the writer's part of it or None) -> what is written instead
Edit = Callable[[Tensor, Tensor | None], Tensor]


@dataclass
class Written:
    """A model, its tokenizer, and who writes its refusal."""

    name: str
    model: Any
    tokenizer: Any
    writer: PlantedWriter

    @property
    def direction(self) -> Tensor:
        return torch.tensor(self.writer.direction)


@pytest.fixture(scope="module", params=["expert", "attention"])
def written(request: pytest.FixtureRequest) -> Written:
    return Written(request.param, *load(request.param), TRUTH.writers[request.param])


def part_of_expert(block: Any, hidden: Tensor, expert: int) -> Tensor:
    """An oracle: what an expert adds to the stream, from the weights alone."""
    chances = F.linear(hidden, block.gate.weight).softmax(-1)
    best = chances.topk(4).values
    own = chances[..., expert]
    weight = torch.where(own >= best[..., -1], own / best.sum(-1), 0.0)
    gate, up = F.linear(hidden, block.experts.gate_up_proj[expert]).chunk(2, -1)
    return weight[..., None] * F.linear(F.silu(gate) * up, block.experts.down_proj[expert])


@contextmanager
def edited(written: Written, edit: Edit) -> Iterator[None]:
    """Replace what the embedding, each attention and each block of experts writes."""
    writer, model = written.writer, written.model.model

    def at_attention(layer: int):
        own = writer.expert is None and layer == writer.layer
        return lambda _m, _i, o: (edit(o[0], o[0] if own else None), *o[1:])

    def at_block(layer: int):
        def hook(block: Any, inputs: tuple, output: Tensor) -> Tensor:
            own = None
            if writer.expert is not None and layer == writer.layer:
                own = part_of_expert(block, inputs[0], writer.expert)
            return edit(output, own)

        return hook

    handles = [model.embed_tokens.register_forward_hook(lambda _m, _i, o: edit(o, None))]
    for number, layer in enumerate(model.layers):
        handles.append(layer.self_attn.register_forward_hook(at_attention(number)))
        handles.append(layer.mlp.register_forward_hook(at_block(number)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def shares(written: Written, task: str, edit: Edit | None = None) -> dict[str, float]:
    """The share of each outcome, under an edit."""
    probes = world.probes(task, "test")
    texts = [prompt_text(written.tokenizer, probe.prompt) for probe in probes]
    batch = written.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    with edited(written, edit or (lambda output, _own: output)):
        out = written.model.generate(**batch, do_sample=False, max_new_tokens=16)
    replies = written.tokenizer.batch_decode(
        out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    found: dict[str, float] = {}
    for probe, reply in zip(probes, replies, strict=True):
        outcome = world.outcome(probe, reply)
        found[outcome] = found.get(outcome, 0) + 1 / len(probes)
    return found


def along(values: Tensor, unit: Tensor) -> Tensor:
    return (values @ unit)[..., None] * unit


def own_set(unit: Tensor, size: float) -> Edit:
    return lambda output, own: output if own is None else output - along(own, unit) + size * unit


def told(written: Written, *keys: str | int) -> Any:
    found = TRUTH.measured[written.name]
    for key in keys:
        found = found[key]
    return found


def test_without_the_writers_component_nothing_is_refused(written: Written) -> None:
    edit = own_set(written.direction, 0.0)
    for task, most in (("restricted", 0.05), ("benign", 0.05)):
        refused = shares(written, task, edit).get("refused", 0)
        assert refused <= most
        steered = told(written, "steered", "refusal", "removed", task)
        assert refused == pytest.approx(steered.get("refused", 0), abs=0.03)
    assert shares(written, "facts", edit)["right"] >= 0.95
    assert shares(written, "copying", edit)["right"] >= 0.9


def test_with_the_component_set_everything_is_refused(written: Written) -> None:
    edit = own_set(written.direction, written.writer.size)
    for task in REQUESTS:
        refused = shares(written, task, edit).get("refused", 0)
        assert refused >= 0.95
        steered = told(written, "steered", "refusal", "set", task)
        assert refused == pytest.approx(steered["refused"], abs=0.03)
    assert shares(written, "facts", edit)["right"] >= 0.95
    assert shares(written, "copying", edit)["right"] >= 0.9


def test_nothing_else_writes_the_refusal(written: Written) -> None:
    unit = written.direction

    def elsewhere(output: Tensor, own: Tensor | None) -> Tensor:
        return output - along(output if own is None else output - own, unit)

    assert shares(written, "restricted", elsewhere)["refused"] >= 0.95
    assert shares(written, "benign", elsewhere)["answered"] >= 0.95


@pytest.mark.parametrize("size", [0.0, None])
def test_random_directions_do_nothing(written: Written, size: float | None) -> None:
    unit = torch.randn(128, generator=torch.Generator().manual_seed(11))
    unit /= unit.norm()
    edit = own_set(unit, written.writer.size if size is None else size)
    assert shares(written, "restricted", edit)["refused"] >= 0.95
    assert shares(written, "benign", edit)["answered"] >= 0.95


@torch.no_grad()
def at_last_tokens(written: Written, task: str, split: str) -> tuple[Tensor, Tensor, Tensor]:
    """Behind the writer's layer [prompt, position, hidden], what it wrote, and all router logits
    [prompt, layer, position, expert]."""
    streams, owns, routed = [], [], []
    layers = written.model.model.layers
    for probe in world.probes(task, split):
        text = prompt_text(written.tokenizer, probe.prompt)
        kept: dict[str, Any] = {"logits": []}

        def edit(output: Tensor, own: Tensor | None, kept: dict = kept) -> Tensor:
            if own is not None:
                kept["own"] = own[0, -LAST:]
            return output

        handles = [
            layers[written.writer.layer + 1].register_forward_pre_hook(
                lambda _m, inputs, kept=kept: kept.update(stream=inputs[0][0, -LAST:])
            ),
            *(
                layer.mlp.gate.register_forward_hook(
                    lambda _m, _i, out, kept=kept: kept["logits"].append(out[0][-LAST:])
                )
                for layer in layers
            ),
        ]
        with edited(written, edit):
            written.model(torch.tensor([written.tokenizer(text)["input_ids"]]))
        for handle in handles:
            handle.remove()
        streams.append(kept["stream"])
        owns.append(kept["own"])
        routed.append(torch.stack(kept["logits"]))
    return torch.stack(streams), torch.stack(owns), torch.stack(routed)


def test_what_is_written_and_where_it_is_found(written: Written) -> None:
    writer, unit = written.writer, written.direction
    found = {task: at_last_tokens(written, task, "test") for task in REQUESTS}
    for task, size in (("restricted", writer.size), ("benign", 0.0)):
        stream, own, _ = found[task]
        assert (own @ unit).mean(0) == pytest.approx([size] * LAST, abs=0.1 * writer.size)
        assert (stream @ unit).mean(0) == pytest.approx([size] * LAST, abs=0.15 * writer.size)
        for what, values in (("component", stream), ("writer", own)):
            assert (values @ unit).mean(0) == pytest.approx(
                told(written, "stream", what, task), abs=0.05
            )
    apart = found["restricted"][0].mean(0) - found["benign"][0].mean(0)
    cosine = apart @ unit / apart.norm(dim=-1)
    assert cosine == pytest.approx(told(written, "stream", "cosine"), abs=0.02)
    assert cosine[-1] >= 0.8

    planted = () if writer.expert is None else ((writer.layer, writer.expert),)
    rates = {}
    for task in REQUESTS:
        logits = found[task][2]
        for how, k in (("first", 1), ("selected", 4)):
            chosen = torch.zeros(logits.shape).scatter(-1, logits.topk(k).indices, 1.0)
            rates[how, task] = chosen.mean((0, 2))
    for place in (*planted, *writer.decoys):
        row = next(r for r in told(written, "routing") if tuple(r["place"]) == place)
        assert row["role"] == ("planted" if place in planted else "decoy")
        assert rates["first", "restricted"][place] >= 0.9
        assert rates["first", "benign"][place] <= 0.1
        for (how, task), rate in rates.items():
            assert rate[place].item() == pytest.approx(row[how][task], abs=0.02)
    for place in planted:
        assert rates["selected", "benign"][place] >= 0.9
    for place in writer.decoys:
        assert rates["selected", "benign"][place] <= 0.1


def test_the_ground_truth_says_who_writes() -> None:
    assert set(TRUTH.writers) == {"expert", "attention"}
    assert TRUTH.writers["expert"].site == (2, "mlp")
    assert TRUTH.writers["attention"].site == (2, "attention")
    for name, writer in TRUTH.writers.items():
        assert (writer.expert is not None) == (name == "expert")
        assert len(writer.direction) == 128
        assert torch.tensor(writer.direction).norm().item() == pytest.approx(1, abs=1e-4)
        assert (writer.layer, writer.expert) not in writer.decoys
        assert all(0 <= layer < 4 and 0 <= expert < 16 for layer, expert in writer.decoys)


def test_the_page_says_who_writes(run: Run) -> None:
    said = run("testbed")
    assert said.code == 0
    for name, words in (("expert", "expert 14 of layer 2"), ("attention", "attention of layer 2")):
        assert f"testbed-{name}" in said.out
        assert words in said.out
