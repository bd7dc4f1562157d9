"""The HTML page: whole, escaped, sealed from the network, and in order for a screen reader."""

import base64
import hashlib
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from made_runs import WICKED, all_runs, evaluate_run, profile, task

from moesteer.cli import main
from moesteer.errors import MoesteerError
from moesteer.report.write_report import write_report

VOID = {"meta", "rect", "circle", "line", "polyline"}


class Tree(HTMLParser):
    """Checks that tags close in order; keeps tags with attributes, and text outside of scripts."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs")
    write_report(all_runs(folder), folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


def test_what_comes_from_outside_is_escaped(page: str):
    tree = Tree(page)
    assert page.count("<script") == 1
    assert "alert(" in page
    assert WICKED in "".join(tree.text)


def test_headings_are_in_order(page: str):
    levels = [int(name[1]) for name, _ in Tree(page).tags if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))


def test_tables_have_captions_scopes_and_sortable_headings(page: str):
    tree = Tree(page)
    assert len(tree.all("table")) == len(tree.all("caption")) > 8
    assert {heading["scope"] for heading in tree.all("th")} == {"col", "row"}
    columns = [heading for heading in tree.all("th") if heading["scope"] == "col"]
    assert {heading["aria-sort"] for heading in columns} == {"none"}


def test_every_drawing_has_title_description_and_a_table(page: str):
    tree = Tree(page)
    ids = {attributes["id"] for _, attributes in tree.tags if "id" in attributes}
    assert len(ids) == sum("id" in attributes for _, attributes in tree.tags)
    for drawing in tree.all("svg"):
        assert drawing["role"] == "img"
        assert set((drawing["aria-labelledby"] or "").split()) <= ids
    figures = re.findall(r"<figure>.*?</figure>", page, re.DOTALL)
    assert len(figures) == len(tree.all("figure")) >= 6
    assert all("<svg" in figure and "<table" in figure for figure in figures)


def test_the_page_asks_nothing_of_the_network(page: str):
    tree = Tree(page)
    for name, attributes in tree.tags:
        assert name not in ("link", "img", "iframe")
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
    assert "url(" not in page
    assert "@import" not in page


def test_only_our_script_may_run(page: str):
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in page
    assert f"script-src 'sha256-{digest}'" in page


def test_replies_of_tasks_not_marked_harmless_are_shown_only_when_asked_for(tmp_path: Path):
    run = evaluate_run(tmp_path / "run", tasks=[task(harmless=False), task("sums", "price")])
    for show in (False, True):
        for path in write_report([run], tmp_path / "report.html", show_replies=show):
            written = path.read_text(encoding="utf-8")
            assert ("towns 1?" in written) is show
            assert ("are not shown" in written) is not show
            assert "no" in written  # the counts of outcomes stay


def test_a_page_of_a_profile_alone_claims_nothing(tmp_path: Path):
    profile().save(tmp_path / "made.safetensors")
    path, _ = write_report([tmp_path / "made.safetensors"], tmp_path / "report.html")
    assert "Nothing is claimed" in path.read_text(encoding="utf-8")


def test_a_profile_without_scores_is_reported(tmp_path: Path):
    from dataclasses import replace

    replace(profile(), scores=None).save(tmp_path / "made.safetensors")
    path, _ = write_report([tmp_path / "made.safetensors"], tmp_path / "report.html")
    assert "Nothing is claimed" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("out", "what"),
    [("report.pdf", "give a name in .html"), ("none/report.html", "does not exist")],
)
def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path, out: str, what: str):
    profile().save(tmp_path / "made.safetensors")
    with pytest.raises(MoesteerError, match=what):
        write_report([tmp_path / "made.safetensors"], tmp_path / out)


def test_the_command_writes_both_files(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    evaluate_run(in_tmp_path / "run")
    main(["report", "run", "--out", "report.html"])
    assert capsys.readouterr().out == "written: report.html and report.md\n"
    assert Path("report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert Path("report.md").read_text(encoding="utf-8").startswith("# All towns")


def test_the_command_refuses_two_models(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from made_runs import facts

    evaluate_run(in_tmp_path / "run")
    evaluate_run(in_tmp_path / "other", model=facts("other/model", norm=2.0))
    with pytest.raises(SystemExit) as exit_:
        main(["report", "run", "other", "--out", "report.html"])
    assert exit_.value.code == 2
    assert "run is of made/model and other of other/model" in capsys.readouterr().err
    assert not Path("report.html").exists()


def test_a_real_evaluation_of_the_bundled_model_is_reported(
    in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    commands = [
        "detect testbed --pairs testbed:document:dev --out scores.safetensors",
        "select scores.safetensors --activate 5 --toward a --out a.safetensors",
        "evaluate testbed --with a.safetensors --tasks testbed-document --tasks testbed-facts"
        " --out run --limit 16 --seeds 2",
        "report run scores.safetensors --out report.html",
    ]
    for command in commands:
        monkeypatch.setattr("sys.argv", ["moesteer", *command.split()])
        main(command.split())
    capsys.readouterr()
    written = Path("report.md").read_text(encoding="utf-8")
    sentence = "**Steering (a.safetensors) raises the share of “document” on testbed-document"
    assert sentence in written
    assert "say nothing about real models" in written
    assert "```sh\n" + "".join(f"moesteer {command}\n" for command in commands[:3]) in written
    Tree(Path("report.html").read_text(encoding="utf-8"))
