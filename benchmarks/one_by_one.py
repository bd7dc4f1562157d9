"""Input×Gradient of many decisions: ours in batches, captum's and inseq's text by text.

Runs where captum and inseq are installed beside moesteer (`rationales.py` makes such a place), and
writes its figures as JSON to the file that it is given. All are timed in one process, on one model,
from a text's tokens to a number for each; inseq begins with the text itself, which it tokenises.
"""

import json
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import inseq  # pyright: ignore[reportMissingImports]
import numpy as np
import torch
from captum.attr import InputXGradient  # pyright: ignore[reportMissingImports]
from jaxtyping import Float
from models import dense_model, middle_model
from paired import Figure, processor_seconds, record_of, relative_speed, wall_seconds
from torch import Tensor, nn

from moesteer.engines.readouts import Readout
from moesteer.engines.transformers_engine import TransformersEngine, load_transformers
from moesteer.rationale.instances import read_instances
from moesteer.rationale.labels import decide, decision_readout, score_labels
from moesteer.rationale.layout import lay_out
from moesteer.rationale.methods.input_x_gradient import input_x_gradient

SECTION = "Rationales: Input×Gradient of every token, in units of one text at a time"
TASKS = ("claims", "inference", "biographies")
CLOSE = 1e-3
"""How far apart two scores of a token may be, in units of the text's largest."""

Scores = list[Float[np.ndarray, " token"]]
"""Of each text a number for each token."""


def main() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # inseq logs what it does with each text
    Path(sys.argv[1]).write_text(json.dumps([record_of(figure) for figure in figures()]))


def figures() -> list[Figure]:
    testbed = load_transformers("testbed", dtype="float32")
    return [
        *_of_model("testbed, fp32, 500 texts", testbed, 500, rounds=5),
        *_of_model("8 × 32 random, fp32, 100 texts", middle_model(), 100, rounds=3),
        *_of_model("8 layers, dense, random, fp32, 100 texts", dense_model(), 100, rounds=3),
    ]


def _of_model(name: str, engine: TransformersEngine, texts: int, rounds: int) -> list[Figure]:
    on_gpu = torch.cuda.is_available()
    nn.Module.to(engine.model, "cuda" if on_gpu else "cpu")
    readouts = decisions(engine, texts)
    ours = partial(in_batches, engine, readouts)
    others = {"captum": by_captum(engine, readouts), "inseq": by_inseq(engine, readouts)}
    found = []
    for package, other in others.items():
        check_same(ours(), other())
        clock = wall_seconds if on_gpu else processor_seconds
        ratio = relative_speed([ours], [other], rounds, seconds=clock)
        asked = f"{name}: {package} {version(package)}{', on a GPU' if on_gpu else ''}"
        found.append(Figure(SECTION, asked, ratio, bar=5 if on_gpu else 1.8))
    return found


def decisions(engine: TransformersEngine, number: int) -> list[Readout]:
    """What the model decides about instances of all tasks in turn."""
    by_task = [read_instances(f"testbed:{task}") for task in TASKS]
    instances = list(chain.from_iterable(zip(*by_task, strict=True)))[:number]
    laid = lay_out(instances, engine.tokenizer)
    scores = score_labels(engine, [(one, one.ids) for one in laid])
    found = [decision_readout(one, decide(one, own)) for one, own in zip(laid, scores, strict=True)]
    assert all(len(readout.terms) == 2 for readout in found), "labels are single tokens"
    return found


# -- the contestants -----------------------------------------------------------------------------


def in_batches(engine: TransformersEngine, readouts: Sequence[Readout]) -> Scores:
    found = {n: input_x_gradient(own) for n, own in engine.token_gradients(readouts)}
    return [found[number] for number in range(len(readouts))]


def by_captum(engine: TransformersEngine, readouts: Sequence[Readout]) -> Callable[[], Scores]:
    model, embedding = engine.model, engine.model.get_input_embeddings()

    def log_odds(embedded: Tensor, chosen: int, other: int) -> Tensor:
        logits = model(inputs_embeds=embedded, use_cache=False).logits[:, -1]
        return logits[:, chosen] - logits[:, other]

    method = InputXGradient(log_odds)

    def of_one(readout: Readout) -> np.ndarray:
        embedded = embedding(torch.tensor([readout.ids], device=model.device)).detach()
        words = tuple(term.token for term in readout.terms)
        found = method.attribute(embedded, additional_forward_args=words)
        return found.sum(-1)[0].detach().cpu().numpy()

    return lambda: [of_one(readout) for readout in readouts]


def by_inseq(engine: TransformersEngine, readouts: Sequence[Readout]) -> Callable[[], Scores]:
    inseq.register_step_function(_log_odds, "log_odds", overwrite=True)
    device = engine.model.device.type
    model = inseq.load_model(
        engine.model, "input_x_gradient", tokenizer=engine.tokenizer, device=device
    )
    decode = engine.tokenizer.decode
    texts = []
    for readout in readouts:
        chosen, other = (term.token for term in readout.terms)
        texts.append((decode([*readout.ids]), decode([*readout.ids, chosen]), other))

    def of_one(text: str, answered: str, other: int) -> np.ndarray:
        found = model.attribute(
            text, answered, attributed_fn="log_odds", other=other, show_progress=False
        )
        # [token, token of the answer, hidden]; the answer's own token is the last.
        scores = found.sequence_attributions[0].target_attributions[:-1, -1]
        return scores.sum(-1).cpu().numpy()

    return lambda: [of_one(*text) for text in texts]


def _log_odds(args, other: int) -> Tensor:
    """Of the answer's token and another, for inseq."""
    logits = args.attribution_model.output2logits(args.forward_output)
    chosen = args.target_ids.reshape(len(logits), 1).to(logits.device)
    return logits.gather(-1, chosen).squeeze(-1) - logits[:, other]


def check_same(ours: Scores, theirs: Scores) -> None:
    for number, (own, other) in enumerate(zip(ours, theirs, strict=True), start=1):
        assert own.shape == other.shape, f"text {number}: {own.shape} and {other.shape}"
        apart = np.abs(own - other).max() / np.abs(own).max()
        assert apart < CLOSE, f"text {number}: scores are {apart} apart"


if __name__ == "__main__":
    main()
