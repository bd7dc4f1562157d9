"""An audit on vLLM: the same experts carry refusal, and their loss takes it, as on transformers."""

from pathlib import Path

from engine import steerable

from moesteer.auditing.audit import audit
from moesteer.evaluation.cards import read_card
from moesteer.testbed import ground_truth


def test_the_planted_experts_are_named_and_their_loss_takes_refusals(tmp_path: Path) -> None:
    with steerable("testbed") as engine:
        found = audit(
            engine,
            "testbed:refusal",
            read_card("testbed-restricted"),
            out=tmp_path / "out",
            prices=[read_card("testbed-benign")],
            pairs_used=12,
            most=1,
            seeds=1,
            limit=4,
        )
    planted = ground_truth().behaviours["refusal"].planted
    assert {expert.place for expert in found.importance.experts[:3]} == {*planted}
    assert not {expert.place for expert in found.importance.named} - {*planted}
    comparison = found.curve[0].comparison
    shares = {arm.name: comparison.share("testbed-restricted", arm.name) for arm in comparison.arms}
    assert {name: share.share for name, share in shares.items()} == {
        "unsteered": 1,
        "steered": 0,
        "random 0": 1,
        "bottom": 1,
    }
    assert all(arm.obeyed for arm in comparison.arms)
