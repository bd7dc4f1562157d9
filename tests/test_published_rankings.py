"""A stranger's pickle: the numbers come out, and nothing in it ever runs."""

import bz2
import copyreg
import functools
import gzip
import lzma
import os
import pickle
import re
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesteer.errors import MoesteerError
from moesteer.published_rankings import PublishedRanking, read_published_ranking

FOLDER = Path(__file__).parent / "data" / "rankings"
FILES = sorted(FOLDER.glob("pandas-*"))
PLAIN = [file for file in FILES if file.suffix == ".pkl"]
PATTERN = FOLDER / "pandas-2.3.3-protocol5-totals.pkl"

# The table that make.py writes.
TABLE: dict[str, list[int]] = {
    "layer": [1, 1, 1, 3, 3, 3],
    "expert": [0, 1, 2, 0, 1, 2],
    "a1": [30, 7, 3, 0, 25, 15],
    "a2": [10, 25, 15, 20, 5, 25],
    "d1": [40] * 6,
    "d2": [50] * 6,
}
RISK_DIFF = [a1 / 40 - a2 / 50 for a1, a2 in zip(TABLE["a1"], TABLE["a2"], strict=True)]

Write = Callable[[bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_file(content: bytes) -> Path:
        (tmp_path / "ranking.pkl").write_bytes(content)
        return tmp_path / "ranking.pkl"

    return to_file


def table(risk_diff: Sequence[float] | None = None, **columns: list[int]) -> bytes:
    """The pattern file with other numbers of the same size in it."""

    def numbers(table: dict[str, list[int]]) -> bytes:
        return np.array(list(table.values()), "<i8").tobytes()

    content = PATTERN.read_bytes()
    assert numbers(TABLE) in content
    assert np.array(RISK_DIFF).tobytes() in content
    content = content.replace(numbers(TABLE), numbers(TABLE | columns))
    return content.replace(
        np.array(RISK_DIFF).tobytes(), np.array(risk_diff or RISK_DIFF, "<f8").tobytes()
    )


def rates(*sides: tuple[list[int], list[int]]) -> list[float]:
    (a1, n1), (a2, n2) = sides
    return [a / n - b / m for a, n, b, m in zip(a1, n1, a2, n2, strict=True)]


# ---------------------------------------- files as pandas writes


def test_every_writer_is_there():
    writers = {file.name.split("-protocol")[0] for file in FILES}
    assert writers == {
        "pandas-1.0.5",
        "pandas-1.5.3",
        "pandas-2.3.3",
        "pandas-3.1.1",
        "pandas-3.1.1-pyarrow",
    }
    assert len(FILES) == 6 * len(writers)
    assert all(file.stat().st_size < 3000 for file in FILES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_reads_what_pandas_wrote(file: Path):
    ranking = read_published_ranking(file)
    rows = np.lexsort((ranking.expert, ranking.layer))
    for name in ("layer", "expert", "a1", "a2"):
        assert getattr(ranking, name)[rows].tolist() == TABLE[name], name
        assert getattr(ranking, name).dtype == np.int64
    assert ranking.n1.tolist() == [40] * 6  # whichever way the file counts
    assert ranking.n2.tolist() == [50] * 6
    np.testing.assert_allclose(ranking.risk_diff[rows], RISK_DIFF, atol=1e-7)
    assert ranking.risk_diff.dtype == np.float64
    if "others" in file.name:  # the file's own order is kept
        assert ranking.risk_diff.tolist() == sorted(RISK_DIFF, reverse=True)


def test_pandas_is_not_needed():
    script = """if True:
        import sys
        sys.modules["pandas"] = sys.modules["pyarrow"] = None  # importing them now fails
        from moesteer.published_rankings import read_published_ranking
        for file in sys.argv[1:]:
            read_published_ranking(file)
    """
    subprocess.run([sys.executable, "-c", script, *map(str, FILES)], check=True)


def test_column_by_column_and_the_other_endian(write: Write):
    counts = np.array(list(TABLE.values()), "<i8")
    content = table().replace(b"\x8c\x01C", b"\x8c\x01F").replace(b"\x8c\x01<", b"\x8c\x01>")
    content = content.replace(counts.tobytes(), counts.astype(">i8").tobytes(order="F"))
    content = content.replace(np.array(RISK_DIFF).tobytes(), np.array(RISK_DIFF, ">f8").tobytes())
    ranking = read_published_ranking(write(content))
    assert [ranking.layer.tolist(), ranking.a2.tolist()] == [TABLE["layer"], TABLE["a2"]]
    assert ranking.risk_diff.tolist() == RISK_DIFF


def test_a_block_in_no_place(write: Write):
    content = (FOLDER / "pandas-2.3.3-protocol5-others.pkl").read_bytes()
    places = struct.pack("<6q", 1, 3, 4, 5, 6, 7)
    assert places in content
    for wrong in (8, -1, 2**62):
        elsewhere = content.replace(places, struct.pack("<6q", 1, 3, 4, 5, 6, wrong))
        with pytest.raises(MoesteerError, match="column d1 is not an array"):
            read_published_ranking(write(elsewhere))


def test_takes_a_string_for_a_path():
    assert len(read_published_ranking(str(PATTERN)).layer) == 6


# ---------------------------------------- what the numbers say


def test_d_may_leave_the_selecting_tokens_out(write: Write):
    others = {"d1": [40 - a for a in TABLE["a1"]], "d2": [50 - a for a in TABLE["a2"]]}
    ranking = read_published_ranking(write(table(**others)))
    assert ranking.n1.tolist() == [40] * 6
    assert ranking.n2.tolist() == [50] * 6


def test_an_expert_that_is_always_selected(write: Write):
    a1 = [40, 0, 0, 40, 0, 0]
    risk_diff = rates((a1, TABLE["d1"]), (TABLE["a2"], TABLE["d2"]))
    left = {"d1": [40 - a for a in a1], "d2": [50 - a for a in TABLE["a2"]]}  # with zeros
    assert read_published_ranking(write(table(risk_diff, a1=a1, **left))).n1.tolist() == [40] * 6
    assert read_published_ranking(write(table(risk_diff, a1=a1))).n1.tolist() == [40] * 6


def test_nothing_selected_has_one_meaning_only(write: Write):
    never = {"a1": [0] * 6, "a2": [0] * 6}
    ranking = read_published_ranking(write(table([0.0] * 6, **never)))
    assert ranking.n1.tolist() == [40] * 6


def test_two_possible_meanings_are_none(write: Write):
    same = {"a1": [5] * 6, "a2": [5] * 6, "d1": [40] * 6, "d2": [40] * 6}
    with pytest.raises(MoesteerError, match="cannot be told"):
        read_published_ranking(write(table([0.0] * 6, **same)))


def test_a_contradiction_names_row_and_numbers(write: Write):
    wrong = [*RISK_DIFF[:4], 0.25, RISK_DIFF[5]]
    with pytest.raises(MoesteerError) as raised:
        read_published_ranking(write(table(wrong)))
    assert "row 4 (layer 3, expert 1): risk_diff is 0.25, but" in str(raised.value)
    assert "a1/d1 - a2/d2 = 0.525 " in str(raised.value)
    assert "ranking.pkl: " in str(raised.value)


def test_selections_cannot_outnumber_tokens(write: Write):
    a1 = [60, *TABLE["a1"][1:]]
    risk_diff = rates((a1, TABLE["d1"]), (TABLE["a2"], TABLE["d2"]))
    with pytest.raises(MoesteerError, match=r"row 0 .*a1=60, d1=40"):
        read_published_ranking(write(table(risk_diff, a1=a1)))


def test_a_side_without_tokens(write: Write):
    empty = {"a1": [0] * 6, "d1": [0] * 6}
    risk_diff = [-a / 50 for a in TABLE["a2"]]
    with pytest.raises(MoesteerError, match=r"row 0 .*a1=0, d1=0"):
        read_published_ranking(write(table(risk_diff, **empty)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_risk_diff_must_be_finite(write: Write, bad: float):
    with pytest.raises(MoesteerError, match=f"row 2: risk_diff is {bad}"):
        read_published_ranking(write(table([*RISK_DIFF[:2], bad, *RISK_DIFF[3:]])))


@pytest.mark.parametrize("bad", [-1, 2**53 + 2, -(2**63)])
@pytest.mark.parametrize("name", list(TABLE))
def test_counts_must_be_counts(write: Write, name: str, bad: int):
    column = [*TABLE[name][:3], bad, *TABLE[name][4:]]
    with pytest.raises(MoesteerError, match=f"row 3: {name} is {bad}, not a whole number"):
        read_published_ranking(write(table(**{name: column})))


def test_counts_must_be_whole(write: Write):
    content = bz2.decompress((FOLDER / "pandas-2.3.3-protocol3-floats.pkl.bz2").read_bytes())
    whole, half = struct.pack("<d", 25.0), struct.pack("<d", 25.5)
    assert whole in content
    with pytest.raises(MoesteerError, match=r"row 4: a1 is 25\.5, not a whole number"):
        read_published_ranking(write(content.replace(whole, half)))


def test_no_expert_twice(write: Write):
    with pytest.raises(MoesteerError, match="rows 3 and 5 are both layer 3, expert 0"):
        read_published_ranking(write(table(expert=[0, 1, 2, 0, 1, 0])))


def test_no_expert_missing(write: Write):
    with pytest.raises(MoesteerError, match=r"layer 1 has 3 of the 4 experts .* expert 3 is miss"):
        read_published_ranking(write(table(expert=[0, 1, 2, 0, 1, 3])))


# ---------------------------------------- files that are no table


def test_missing_columns_are_listed(write: Write):
    content = table().replace(b"\x8c\x02a2", b"\x8c\x02b2").replace(b"risk_diff", b"rosk_diff")
    with pytest.raises(MoesteerError, match="lacks the columns a2, risk_diff; a ranking has"):
        read_published_ranking(write(content))


def test_a_column_twice(write: Write):
    with pytest.raises(MoesteerError, match="2 columns named d1"):
        read_published_ranking(write(table().replace(b"\x8c\x02d2", b"\x8c\x02d1")))


def test_a_column_of_words(write: Write):
    content = (FOLDER / "pandas-2.3.3-protocol5-others.pkl").read_bytes()
    content = content.replace(b"\x8c\x02a2", b"\x8c\x02b2").replace(b"\x8c\x05model", b"\x8c\x02a2")
    content = b"\x80\x05" + content[11:]  # frames are optional, and this one's length is off now
    with pytest.raises(MoesteerError, match="column a2 holds values of type 'O8', not plain num"):
        read_published_ranking(write(content))


@pytest.mark.parametrize(
    ("thing", "says"),
    [([1, 2], "list"), ({"layer": [0]}, "dict"), (None, "NoneType")],
)
def test_other_pickles(write: Write, thing: object, says: str):
    with pytest.raises(MoesteerError, match=rf"no pandas DataFrame \({says} instead"):
        read_published_ranking(write(pickle.dumps(thing)))


def test_a_series_is_named(write: Write):
    with pytest.raises(MoesteerError, match=r"it asks for pandas\.core\.series\.Series; moesteer"):
        read_published_ranking(write(program(name("pandas.core.series", "Series"), b")R")))


@pytest.mark.parametrize("content", [b"", b"layer,expert\n0,1\n", b"PK\x03\x04", b"(lp0\n."])
def test_not_a_pickle(write: Write, content: bytes):
    with pytest.raises(MoesteerError, match=r"ranking\.pkl: it is not a pickle"):
        read_published_ranking(write(content))


@pytest.mark.parametrize("file", PLAIN, ids=lambda file: file.name)
def test_cut_short_anywhere(write: Write, file: Path):
    content = file.read_bytes()
    for length in range(1, len(content), 7):
        with pytest.raises(MoesteerError, match="cut short"):
            read_published_ranking(write(content[:length]))


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_and_damaged(write: Write, pack: Callable[[bytes], bytes]):
    packed = pack(table())
    assert len(read_published_ranking(write(packed)).layer) == 6
    for length in (7, len(packed) // 2, len(packed) - 1):
        with pytest.raises(MoesteerError, match=r"cut short|damaged"):
            read_published_ranking(write(packed[:length]))
    with pytest.raises(MoesteerError, match=r"cut short|damaged"):
        read_published_ranking(write(packed[:9] + b"\xff\x00\xff" + packed[12:]))


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_a_decompression_bomb(write: Write, pack: Callable[[bytes], bytes]):
    with pytest.raises(MoesteerError, match="more than 64 MiB"):
        read_published_ranking(write(pack(b"\x80" + bytes(65 * 2**20))))


def test_no_file(tmp_path: Path):
    with pytest.raises(MoesteerError, match="cannot be read"):
        read_published_ranking(tmp_path / "none.pkl")
    with pytest.raises(MoesteerError, match="not a file"):
        read_published_ranking(tmp_path)


def test_a_file_too_large(tmp_path: Path):
    with (tmp_path / "zeros.pkl").open("wb") as file:
        file.truncate(64 * 2**20 + 1)  # sparse: it takes no room
    with pytest.raises(MoesteerError, match="more than 64 MiB"):
        read_published_ranking(tmp_path / "zeros.pkl")


# ---------------------------------------- files that mean harm


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def name(module: str, attribute: str) -> bytes:
    return text(module) + text(attribute) + b"\x93"


def program(*steps: bytes) -> bytes:
    return b"\x80\x05" + b"".join(steps) + b"."


class Harm:
    """What a plain `pickle.loads` would call while it reads."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def harms(mark: Path) -> dict[str, Harm]:
    """Programs that leave a mark when they run, by the name that must be refused."""
    touch = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    return {
        f"{os.name}.system": Harm(os.system, f"touch {mark}"),
        "builtins.eval": Harm(eval, touch),
        "builtins.exec": Harm(exec, touch),
        "builtins.getattr": Harm(getattr, Harm(eval, touch), "x", None),
        "functools.partial": Harm(functools.partial(eval, touch)),
        "numpy.save": Harm(np.save, str(mark), 1),
    }


HARMS = list(harms(Path()))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("asked", HARMS)
def test_harm_is_refused_by_name(write: Write, tmp_path: Path, asked: str, protocol: int):
    content = pickle.dumps(harms(tmp_path / "mark")[asked], protocol=protocol)
    asked = asked.replace("builtins", "__builtin__") if protocol == 2 else asked
    refused = re.escape(f"it asks for {asked}; moesteer reads tables only; nothing was run")
    with pytest.raises(MoesteerError, match=refused):
        read_published_ranking(write(content))
    assert not list(tmp_path.glob("mark*"))


@pytest.mark.parametrize("asked", HARMS)
def test_the_harm_is_real(tmp_path: Path, asked: str):
    pickle.loads(pickle.dumps(harms(tmp_path / "mark")[asked]))
    assert list(tmp_path.glob("mark*"))


@pytest.mark.parametrize(
    "spot",
    [
        b"X\x05\x00\x00\x00layer",  # among the column labels: an element of an object array
        b"X\x06\x00\x00\x00latin1",  # an argument of a name that is allowed
        b"X\x04\x00\x00\x00_typ",  # a key of the frame's state
        b"N",  # the first thing that says nothing
    ],
)
def test_harm_inside_a_good_table(write: Write, tmp_path: Path, spot: bytes):
    mark = tmp_path / "mark"
    good = (FOLDER / "pandas-2.3.3-protocol2-totals.pkl").read_bytes()
    assert spot in good
    harm = pickle.dumps(Harm(eval, f"open({str(mark)!r}, 'w').close()"), protocol=2)[2:-1]
    with pytest.raises(MoesteerError, match=r"it asks for __builtin__\.eval;"):
        read_published_ranking(write(good.replace(spot, harm, 1)))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("module", "attribute"),
    [
        ("numpy", "load"),
        ("numpy", "fromfile"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy", "ndarray.tofile"),
        ("builtins", "slice.__class__"),
        ("builtins", "bytearray.__subclasses__"),
        ("pandas.core.frame", "DataFrame.__init__.__globals__"),
        ("pandas", "read_pickle"),
        ("pandas.core.frame", "DataFrame.to_pickle"),
        ("moesteer.published_rankings", "_Part"),
        ("copyreg", "_reconstructor"),
        ("", ""),
    ],
)
def test_near_misses_are_refused(write: Write, module: str, attribute: str):
    with pytest.raises(MoesteerError, match=r"it asks for .*nothing was run"):
        read_published_ranking(write(program(name(module, attribute), b")R")))


def test_a_refused_name_cannot_write_to_the_terminal(write: Write):
    with pytest.raises(MoesteerError) as raised:
        read_published_ranking(write(program(name("\x1b[2J\n" * 99, "é"), b")R")))
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize(
    ("steps", "operation"),
    [
        (b"\x82\x07", "EXT1"),
        (b"\x83\x07\x00", "EXT2"),
        (b"\x84\x07\x00\x00\x00", "EXT4"),
        (b"Pelsewhere\n", "PERSID"),
        (b"NQ", "BINPERSID"),
        (b"\x97", "NEXT_BUFFER"),
        (b"(ios\nsystem\n", "INST"),
        (b"(N0o", "POP"),
        (b"N2", "DUP"),
        (b"I01\n", "INT"),
    ],
)
def test_operations_that_no_table_needs(
    write: Write, steps: bytes, operation: str, monkeypatch: pytest.MonkeyPatch
):
    # A registered extension that is cached comes back without any question of its name.
    called: list[object] = []
    cache: dict[int, object] = vars(copyreg)["_extension_cache"]
    monkeypatch.setitem(cache, 7, called.append)
    with pytest.raises(MoesteerError, match=f"operation {operation}, which no table needs"):
        read_published_ranking(write(program(steps, b"N\x85R")))
    assert called == []


FRAME = name("pandas", "DataFrame")


@pytest.mark.parametrize(
    "steps",
    [
        FRAME + b"N}" + text("role") + text("array") + b"s\x86b",  # set attributes of a name
        FRAME + b"N}" + text("__setstate__") + FRAME + b"s\x86b",
        FRAME + b"}" + text("role") + text("array") + b"sb",
        FRAME + b")\x81" + text("a") + b"a",  # append to a part
        FRAME + b")\x81" + text("a") + text("b") + b"s",  # put an item into a part
        FRAME + b")\x81)R",  # call a part
        FRAME + b")\x81)\x81",  # make a new one of a part
        text("word") + b")R",
        b"]})s",  # an empty tuple, then nothing to put it in
        b"]\x94h\x00a",  # a list of itself
        FRAME + b")\x81\x94}" + text("_mgr") + b"h\x00sb",  # a frame that manages itself
        b"h\x09",  # what was never remembered
        b"\x93",  # nothing to name
    ],
)
def test_misused_parts_leave_nothing_behind(write: Write, steps: bytes):
    with pytest.raises(MoesteerError):
        read_published_ranking(write(program(steps)))
    assert read_published_ranking(PATTERN).layer.tolist() == TABLE["layer"]


HUGE = b"\x8a\x06" + (2**40).to_bytes(6, "little")
SHAPE = b"K\x06K\x06\x86"  # of the whole numbers in the pattern: six columns, six rows


PLACE = b"K\x00K\x06K\x01\x87"  # of its columns: from 0 up to 6, one by one
BOMBS = [
    (r"\(bytearray instead\)", program(name("builtins", "bytearray"), HUGE, b"\x85R")),
    (r"\(array kind instead\)", program(name("numpy", "ndarray"), HUGE, b"\x85\x85R")),
    (r"\(dtype instead\)", program(name("numpy", "dtype"), text("V1099511627776"), b"\x85R")),
    ("cut short", program(b"\x8e" + struct.pack("<Q", 2**40))),  # says a terabyte follows
    ("cut short", program(b"\x96" + struct.pack("<Q", 2**62))),
    ("cut short", b"\x80\x05\x95" + struct.pack("<Q", 2**62) + b"N."),
    ("10000 steps", program(b"Nr\xff\xff\xff\xff")),  # remembered as number four billion
    ("10000 steps", program(b")", b"\x85" * 300_000, b"}\x94h\x00h\x00Ns")),  # a deep key
    ("10000 steps", program(b"](" + b"N" * 300_000 + b"e")),
    ("another size", table().replace(SHAPE, HUGE + HUGE + b"\x86")),
    ("another size", table().replace(SHAPE, HUGE + b"K\x00\x86")),
    ("a shape that", table().replace(SHAPE, b"J\xff\xff\xff\xffJ\xdc\xff\xff\xff\x86")),
    ("outside its block", table().replace(SHAPE, b"K\x01K\x24\x86")),
    ("differ in length", table().replace(SHAPE, b"K\x24K\x01\x86")),
    ("another size", table().replace(b"\x8c\x02i8", b"\x8c\x02i4")),
    ("of type 'O8'", table().replace(b"\x8c\x02i8", b"\x8c\x02O8")),
    ("of type 'c8'", table().replace(b"\x8c\x02i8", b"\x8c\x02c8")),
    ("the same column", table().replace(PLACE, b"K\x00K\x07K\x01\x87")),
    ("the same column", table().replace(PLACE, b"K\x00" + HUGE + b"K\x01\x87")),
    ("position of a block", table().replace(PLACE, b"K\x00K\x06K\x00\x87")),
]


@pytest.mark.parametrize(("says", "content"), BOMBS, ids=[str(i) for i in range(len(BOMBS))])
def test_bombs_do_not_go_off(write: Write, says: str, content: bytes):
    # Frames are optional, and the lengths of these are off once something in them is replaced.
    content = re.sub(rb"^\x80\x05\x95..\0\0\0\0\0\0", b"\x80\x05", content, flags=re.DOTALL)
    file = write(content)
    tracemalloc.start()
    try:
        with pytest.raises(MoesteerError, match=says):
            read_published_ranking(file)
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()


def test_arrow_names_that_overlap(write: Write):
    """Strings that start anywhere could each span the whole file."""
    content = (FOLDER / "pandas-3.1.1-pyarrow-protocol5-totals.pkl").read_bytes()
    starts = struct.pack("<8q", 0, 5, 11, 13, 15, 17, 19, 28)
    assert starts in content
    for wrong in (
        (0, 11, 5, 13, 15, 17, 19, 28),
        (0, 5, 11, 13, 15, 17, 19, 2**60),
        (-(2**63), 5, 11, 13, 15, 17, 19, 28),
    ):
        with pytest.raises(MoesteerError, match="overlap"):
            read_published_ranking(write(content.replace(starts, struct.pack("<8q", *wrong))))


# ---------------------------------------- chance


@pytest.fixture(scope="module")
def spare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chance") / "ranking.pkl"


def read_or_refuse(file: Path, content: bytes) -> PublishedRanking | None:
    file.write_bytes(content)
    try:
        ranking = read_published_ranking(file)
    except MoesteerError:
        return None
    risk_diff = ranking.a1 / ranking.n1 - ranking.a2 / ranking.n2
    np.testing.assert_allclose(ranking.risk_diff, risk_diff, atol=1e-6)
    for name in ("layer", "expert", "a1", "a2", "n1", "n2"):
        assert getattr(ranking, name).shape == risk_diff.shape
        assert (getattr(ranking, name) >= 0).all()
    assert len(set(zip(ranking.layer, ranking.expert, strict=True))) == len(risk_diff)
    return ranking


CHANCE = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@CHANCE
@given(
    file=st.sampled_from(PLAIN),
    edits=st.lists(
        st.tuples(st.integers(0, 1800), st.integers(0, 2), st.binary(max_size=3)),
        min_size=1,
        max_size=4,
    ),
)
def test_any_damage_is_a_ranking_or_refused(
    spare: Path, file: Path, edits: list[tuple[int, int, bytes]]
):
    content = file.read_bytes()
    for start, cut, put in edits:
        start %= len(content)
        content = content[:start] + put + content[start + cut :]
    read_or_refuse(spare, content)


NUMPY, CORE = "numpy._core", "pandas.core"
STEPS = [
    *(bytes([code]) for code in b"()]}NRb\x81\x85\x86\x87\x88\x94\x93taesu"),
    *(b"h" + bytes([index]) for index in range(4)),
    *(b"K" + bytes([number]) for number in (0, 1, 2, 6)),
    HUGE,
    *(text(word) for word in ("_mgr", "_data", "data", "0.14.1", "axes", "blocks", "i8", "<")),
    *(text(word) for word in ("layer", "latin1", "mgr_locs", "values", "C", "_pa_array")),
    name("pandas", "DataFrame"),
    name(f"{CORE}.internals.managers", "BlockManager"),
    name("pandas._libs.internals", "_unpickle_block"),
    name(f"{CORE}.indexes.base", "_new_Index"),
    name(f"{NUMPY}.multiarray", "_reconstruct"),
    name(f"{NUMPY}.numeric", "_frombuffer"),
    name("numpy", "dtype"),
    name("builtins", "slice"),
    name("builtins", "bytearray"),
    name("_codecs", "encode"),
    name("pyarrow.lib", "_restore_array"),
]


@CHANCE
@given(steps=st.lists(st.sampled_from(STEPS), max_size=25))
def test_any_program_of_allowed_steps_is_refused(spare: Path, steps: list[bytes]):
    assert read_or_refuse(spare, program(*steps)) is None


@CHANCE
@given(
    a1=st.lists(st.integers(0, 40), min_size=6, max_size=6),
    a2=st.lists(st.integers(0, 50), min_size=6, max_size=6),
    others=st.booleans(),
)
def test_totals_come_back_whatever_d_means(spare: Path, a1: list[int], a2: list[int], others: bool):
    columns = {"a1": a1, "a2": a2}
    if others:
        columns |= {"d1": [40 - a for a in a1], "d2": [50 - a for a in a2]}
    ranking = read_or_refuse(spare, table(rates((a1, [40] * 6), (a2, [50] * 6)), **columns))
    # Refused only where both meanings give the same rates: 5 a1 = 4 a2 in every row can.
    assert ranking or all(a == 0 or b == 0 or 5 * a == 4 * b for a, b in zip(a1, a2, strict=True))
    if ranking:
        assert ranking.n1.tolist() == [40] * 6
        assert ranking.n2.tolist() == [50] * 6
