"""Judges that are models, or read with one: perplexity, guard, classifier.

The models of the last two are made by hand: a network of one layer that adds nothing to a one-hot
embedding, so that each word decides the next (guard) or the label (classifier).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from moesteer.chat import render_prompt
from moesteer.contrast import Message
from moesteer.errors import MoesteerError
from moesteer.evaluation.judges import KINDS, Context
from moesteer.evaluation.task import Item, Judge
from moesteer.records import check_record

WORDS = ["<pad>", "<end>", "User:", "Agent:"]
WORDS += ["good", "bad", "odd", "safe", "unsafe", "S9", "\n", "how", "nice"]
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('user and assistant only') }}{% endif %}"
    "{{ {'user': 'User: ', 'assistant': 'Agent: '}[m.role] }}"
    "{{ m.content }}{% if not loop.last %} {% endif %}{% endfor %}"
)


def item(prompt: str, *before: Message) -> Item:
    return Item((*before, Message("user", prompt)), {}, "made:1")


def make(kind: str, context: Context | None = None, /, **settings: Any) -> Judge:
    return check_record(KINDS[kind], settings, "card").judge(context or Context())


# --- perplexity -----------------------------------------------------------------------------------


def test_perplexity_against_the_model_itself(model_folder: Path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from moesteer.engines.transformers_engine import load_transformers

    items = [item("Tell me one."), item("Tell me.", Message("system", "Be short.")), item("No?")]
    replies = ["Yes, sure: one", "No", "  "]
    judge = make("perplexity", Context(load_transformers(str(model_folder))), most=1e9)
    verdicts = judge(items, replies)
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    for asked, reply, verdict in zip(items[:2], replies, verdicts, strict=False):
        before = tokenizer(render_prompt(asked.messages, tokenizer)).input_ids
        said = tokenizer(reply).input_ids
        ids = torch.tensor([before + said])
        labels = torch.tensor([[-100] * len(before) + said])
        with torch.no_grad():
            loss = float(model(ids, labels=labels).loss)
        assert verdict.score == pytest.approx(math.exp(loss), rel=1e-4)
        assert verdict.outcome == "fluent"
        strict = make("perplexity", Context(load_transformers(str(model_folder))), most=1.01)
        assert strict([asked], [reply])[0].outcome == "degenerate"
    assert (verdicts[2].outcome, verdicts[2].note) == ("degenerate", "empty")


def test_chat_options_reach_the_perplexity(model_folder: Path):
    from moesteer.engines.transformers_engine import load_transformers

    engine = load_transformers(str(model_folder))
    scores = {
        make("perplexity", Context(engine, options), most=9.0)([item("Hi")], ["Yes"])[0].score
        for options in ({}, {"opening": "Well. "})
    }
    assert len(scores) == 2


def test_perplexity_needs_a_model():
    with pytest.raises(MoesteerError, match="--model"):
        make("perplexity", most=2.0)


# --- guard and classifier -------------------------------------------------------------------------


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="odd"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(" "), "removed")
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", chat_template=TEMPLATE
    ).save_pretrained(folder)


def one_hot_model(cls: Any, **more: Any) -> Any:
    """Embeddings are the identity and the layer adds nothing: the last word decides."""
    import torch
    from transformers import LlamaConfig

    size = len(WORDS) + len(WORDS) % 2
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=size,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        **more,
    )
    model = cls(config).eval()
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(WORDS), size))
    return model


@pytest.fixture(scope="session")
def guard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Says safe after `good`, unsafe and S9 after `bad`, and something else after any other."""
    import torch
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("guard")
    model = one_hot_model(LlamaForCausalLM)
    after: dict[str, str] = {
        "good": "safe",
        "safe": "<end>",
        "bad": "unsafe",
        "unsafe": "\n",
        "\n": "S9",
    }
    with torch.no_grad():
        model.lm_head.weight.zero_()
        for word, following in after.items():
            model.lm_head.weight[WORDS.index(following), WORDS.index(word)] = 9.0
        for word in set(WORDS) - set(after):
            following = "<end>" if word == "S9" else "nice"
            model.lm_head.weight[WORDS.index(following), WORDS.index(word)] = 9.0
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def test_guard(guard_folder: Path):
    judge = make("guard", model=str(guard_folder), safe="kept", unsafe="lost", batch_size=2)
    asked = [item("how"), item("nice bad"), item("how how how"), item("how")]
    asked.append(item("how", Message("system", "a system message that the guard must not see")))
    replies = ["nice good", "bad", "odd", "how nice how nice good", "bad"]
    verdicts = judge(asked, replies)
    assert [v.outcome for v in verdicts] == ["kept", "lost", None, "kept", "lost"]
    assert verdicts[1].note == "S9"
    assert "neither safe nor unsafe: 'nice" in verdicts[2].note
    assert judge.outcomes == ("kept", "lost")
    assert str(guard_folder) in judge.name


@pytest.fixture(scope="session")
def classifier_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Label FINE after `good`, BROKEN after `bad`, UNSURE after any other."""
    import torch
    from transformers import LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("classifier")
    model = one_hot_model(
        LlamaForSequenceClassification,
        num_labels=3,
        id2label={0: "FINE", 1: "BROKEN", 2: "UNSURE"},
        label2id={"FINE": 0, "BROKEN": 1, "UNSURE": 2},
    )
    with torch.no_grad():
        model.score.weight.zero_()
        model.score.weight[2] += 1.0
        model.score.weight[:, WORDS.index("good")] = torch.tensor([2.0, 0.0, 0.0])
        model.score.weight[:, WORDS.index("bad")] = torch.tensor([0.0, 2.0, 0.0])
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize("reads", ["reply", "prompt and reply"])
def test_classifier(classifier_folder: Path, reads: str):
    judge = make(
        "classifier",
        model=str(classifier_folder),
        labels={"FINE": "ok", "BROKEN": "not ok"},
        reads=reads,
        batch_size=2,
    )
    replies: Sequence[str] = ["nice good", "how how bad", "nice", "good"]
    verdicts = judge([item("how")] * 4, replies)
    assert [v.outcome for v in verdicts] == ["ok", "not ok", None, "ok"]
    assert "UNSURE" in verdicts[2].note
    # RMSNorm makes the one-hot vector √14 long: softmax over the logits (2√14, 0, 0).
    size = len(WORDS) + len(WORDS) % 2
    top = math.exp(2 * math.sqrt(size))
    assert verdicts[0].score == pytest.approx(top / (top + 2), rel=1e-3)
    assert judge.outcomes == ("ok", "not ok")


def test_classifier_of_unknown_labels(classifier_folder: Path):
    with pytest.raises(MoesteerError, match="no label 'GOOD'; it has FINE, BROKEN, UNSURE"):
        make("classifier", model=str(classifier_folder), labels={"GOOD": "ok"})


@pytest.mark.parametrize("kind", ["guard", "classifier"])
def test_judges_that_can_not_be_loaded(kind: str, tmp_path: Path):
    more: dict[str, Any] = {"labels": {"a": "b"}} if kind == "classifier" else {}
    with pytest.raises(MoesteerError, match="can't be loaded"):
        make(kind, model=str(tmp_path / "nothing"), **more)


def test_a_classifier_without_its_head_is_refused(classifier_folder: Path, tmp_path: Path):
    from transformers import AutoModel, AutoTokenizer

    AutoModel.from_pretrained(classifier_folder).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(classifier_folder).save_pretrained(tmp_path)
    with pytest.raises(MoesteerError, match=r"holds no weights .*, so it is no trained"):
        make("classifier", model=str(tmp_path), labels={"LABEL_0": "ok"})
