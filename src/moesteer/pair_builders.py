"""Contrast pairs of the two kinds of SteerMoE, from data the user has.

Intuition. Whoever has prompts with replies, or documents with questions, need not write pairs by
hand. Safety: A is a refusal, B is the reply that was given. Faithfulness: A asks with the document
before the question, B asks the question alone, and only the question's tokens count.

Paper: SteerMoE (Fayyaz et al. 2025, arXiv 2509.09660). The refusals are our own words.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path

from moesteer.contrast import parse_pair
from moesteer.errors import MoesteerError
from moesteer.files import write_text
from moesteer.records import Record, Text, check_record, read_records, read_text

DEFAULT_REFUSALS: tuple[str, ...] = (
    "I'm sorry, but I can't help with that.",
    "I can't assist with this request.",
    "Sorry, that is not something I can do.",
    "I won't be able to help with that.",
    "I have to decline this one.",
    "That's something I'm not willing to help with.",
    "I must refuse, because this could cause harm.",
    "No, I can't provide that.",
    "I apologise, but I cannot answer this.",
    "This goes against what I can do, so I'll have to say no.",
    "I'm not able to give you instructions for that.",
    "Unfortunately, I cannot fulfil this request.",
)


def refusal_pairs(
    source: str | Path, refusals: Sequence[str] = DEFAULT_REFUSALS, seed: int = 0
) -> list[dict[str, object]]:
    """Records with A = a refusal and B = the reply; the target is the reply.

    `source` holds `{"prompt": …, "reply": …}` a line (JSONL, CSV or a data set). Each refusal is
    used equally often (to within one), in an order drawn from `seed`.

    Raises MoesteerError for a malformed line, with file and line, and for no refusals.
    """
    if not refusals:
        raise MoesteerError("there are no refusals to choose from; give at least one")
    records = read_records(source, required=("prompt", "reply"))
    draw = random.Random(seed)
    order: list[str] = []
    while len(order) < len(records):
        order += draw.sample(refusals, len(refusals))
    pairs: list[dict[str, object]] = []
    for (where, record), refusal in zip(records, order, strict=False):
        answered = check_record(_PromptAndReply, record, where)
        pair: dict[str, object] = {
            "prompt": answered.prompt,
            "a": refusal,
            "b": answered.reply,
            "target": "reply",
        }
        parse_pair(pair, where)  # what we write can be read
        pairs.append(pair)
    return pairs


def read_refusals(path: str | Path) -> tuple[str, ...]:
    """One refusal a line; blank lines and white space around a refusal are dropped."""
    lines = read_text(Path(path)).split("\n")
    refusals = tuple(line.strip() for line in lines if line.strip())
    if not refusals:
        raise MoesteerError(f"{path}: holds no refusals; write one a line")
    return refusals


def document_pairs(source: str | Path) -> list[dict[str, object]]:
    """Records with A = the document before the question and B = the question alone.

    `source` holds `{"document": …, "question": …}` a line (JSONL, CSV or a data set). Both sides
    end with the question, so the target is its *last* occurrence: a document that quotes the
    question does not mislead it.

    Raises MoesteerError for a malformed line, with file and line.
    """
    pairs: list[dict[str, object]] = []
    for where, record in read_records(source, required=("document", "question")):
        asked = check_record(_DocumentAndQuestion, record, where)
        document, question = asked.document.strip(), asked.question.strip()
        pair: dict[str, object] = {
            "a": [{"role": "user", "content": f"Document: {document} Question: {question}"}],
            "b": [{"role": "user", "content": f"Question: {question}"}],
            "target": {"last": question},
        }
        parse_pair(pair, where)  # what we write can be read
        pairs.append(pair)
    return pairs


class _PromptAndReply(Record):
    prompt: Text
    reply: Text


class _DocumentAndQuestion(Record):
    document: Text
    question: Text


def write_pairs(records: Sequence[dict[str, object]], out: str) -> None:
    """Write pairs as JSON lines, atomically."""
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    write_text(Path(out), "\n".join(lines) + "\n")
