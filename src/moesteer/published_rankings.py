"""Rankings that others published, read without letting their file run anything.

A pickle is a little program: reading one the usual way *executes* it, and a hostile one does
whatever it likes. Yet a table of numbers is a dull program. It says "a frame, of a manager, of two
blocks, of these bytes", and nothing in it has to happen for us to understand it. So here every name
the file mentions becomes an inert `_Part`, which records what it was "called" with and does
nothing; the file turns into a tree of parts, and only then do we look whether the tree has the
shape of a table, and lift the numbers out of its bytes.

The names a numeric table needs are listed in `_NAMES`; any other is refused by name. Nothing of
pandas or pyarrow is imported, and numpy sees only sizes that the bytes at hand bear out.
"""

import bz2
import io
import lzma
import math
import pickle
import pickletools
import zlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
from jaxtyping import Float64, Int64

from moesteer.errors import MoesteerError


@dataclass(frozen=True, eq=False)
class PublishedRanking:
    """How often each expert was selected on side A and on side B, one row per expert.

    Files differ in what `d1` and `d2` count: all the tokens of a side, or only those that did not
    select the expert. Here `n1` and `n2` are always all the tokens, so that
    `risk_diff = a1 / n1 - a2 / n2`.
    """

    layer: Int64[np.ndarray, "N"]
    expert: Int64[np.ndarray, "N"]
    a1: Int64[np.ndarray, "N"]
    a2: Int64[np.ndarray, "N"]
    n1: Int64[np.ndarray, "N"]
    n2: Int64[np.ndarray, "N"]
    risk_diff: Float64[np.ndarray, "N"]


def read_published_ranking(path: str | Path) -> PublishedRanking:
    """The ranking in a pandas pickle, plain or compressed with gzip, bzip2 or xz."""
    try:
        return _ranking(_columns(_tree(_content(Path(path)))))
    except MoesteerError as error:
        raise MoesteerError(f"{path}: {error}") from error


# ------------------------------------------------------------------------------- what it says

_COLUMNS = ("layer", "expert", "a1", "a2", "d1", "d2", "risk_diff")
_TOLERANCE = 1e-6  # rates worked out in float32 are 1e-7 off


def _ranking(columns: dict[str, np.ndarray]) -> PublishedRanking:
    with np.errstate(all="ignore"):  # every comparison below refuses nan
        whole = {name: _whole(name, columns[name]) for name in _COLUMNS if name != "risk_diff"}
        risk_diff = columns["risk_diff"].astype(np.float64)
        for row in np.flatnonzero(~np.isfinite(risk_diff)):
            raise MoesteerError(f"row {row}: risk_diff is {risk_diff[row]}, not a finite number")
        _check_grid(whole["layer"], whole["expert"])
        n1, n2 = _tokens(whole, risk_diff)
    selected = {name: whole[name] for name in ("layer", "expert", "a1", "a2")}
    return PublishedRanking(**selected, n1=n1, n2=n2, risk_diff=risk_diff)


def _whole(name: str, column: np.ndarray) -> Int64[np.ndarray, "N"]:
    number = column.astype(np.float64)
    # Above 2**53 a float no longer tells neighbours apart, and sums could leave int64.
    for row in np.flatnonzero(~((number >= 0) & (number <= 2**53) & (number % 1 == 0))):
        raise MoesteerError(f"row {row}: {name} is {column[row]}, not a whole number from 0 up")
    return column.astype(np.int64)


def _check_grid(layer: Int64[np.ndarray, "N"], expert: Int64[np.ndarray, "N"]) -> None:
    """Every layer that is listed lists every expert once: else ranks cannot be compared."""
    order = np.lexsort((expert, layer))
    layers, experts = layer[order], expert[order]
    for twin in np.flatnonzero((layers[1:] == layers[:-1]) & (experts[1:] == experts[:-1])):
        first, second = sorted(int(row) for row in order[twin : twin + 2])
        raise MoesteerError(
            f"rows {first} and {second} are both layer {layers[twin]}, expert {experts[twin]}"
        )
    names, counts = np.unique(layer, return_counts=True)
    everyone = np.unique(expert)
    if len(names) * len(everyone) != len(layer):
        short = names[counts.argmin()]
        missing = np.setdiff1d(everyone, expert[layer == short])[0]
        raise MoesteerError(
            f"layer {short} has {counts.min()} of the {len(everyone)} experts that the file names; "
            f"expert {missing} is missing: give the whole ranking, not a part of it"
        )


def _tokens(
    whole: dict[str, Int64[np.ndarray, "N"]], risk_diff: Float64[np.ndarray, "N"]
) -> tuple[Int64[np.ndarray, "N"], Int64[np.ndarray, "N"]]:
    """All the tokens of each side, under the meaning of d1 and d2 that risk_diff bears out."""
    a1, a2, d1, d2 = (whole[name] for name in ("a1", "a2", "d1", "d2"))
    meanings = (d1, d2), (a1 + d1, a2 + d2)  # all the tokens, or those that did not select
    said = [a1 / n1 - a2 / n2 for n1, n2 in meanings]  # nan where a side has no tokens
    fits = [
        (np.abs(claim - risk_diff) <= _TOLERANCE) & (a1 <= n1) & (a2 <= n2)
        for claim, (n1, n2) in zip(said, meanings, strict=True)
    ]
    right = [meaning for meaning, fit in zip(meanings, fits, strict=True) if fit.all()]
    if len(right) == 1 or (right and not (a1.any() or a2.any())):  # or else they coincide
        return right[0]
    if right:
        raise MoesteerError(
            "risk_diff fits both a1/d1 - a2/d2 and a1/(a1+d1) - a2/(a2+d2) in every row, so it "
            "cannot be told whether d1 and d2 count all tokens or those that did not select"
        )
    row = int(np.argmin(max(fits, key=np.count_nonzero)))  # the better meaning's first misfit
    raise MoesteerError(
        f"row {row} (layer {whole['layer'][row]}, expert {whole['expert'][row]}): risk_diff is "
        f"{risk_diff[row]:.6g}, but a1={a1[row]}, d1={d1[row]}, a2={a2[row]}, d2={d2[row]} give "
        f"a1/d1 - a2/d2 = {said[0][row]:.6g} or a1/(a1+d1) - a2/(a2+d2) = {said[1][row]:.6g}, "
        "and no expert is selected on more tokens than there are"
    )


# ------------------------------------------------------------------ from the tree to the table


def _columns(table: object) -> dict[str, np.ndarray]:
    """The columns of a ranking, lifted out of the parts of a frame."""
    match table:
        case _Part(role="frame", state={"_mgr": _Part(role="manager") as manager}):
            pass
        case _Part(role="frame", state={"_data": _Part(role="manager") as manager}):  # pandas 1.0
            pass
        case _:
            kind = table.role if isinstance(table, _Part) else type(table).__name__
            raise MoesteerError(f"it holds no pandas DataFrame ({kind} instead)")
    index, blocks = _index_and_blocks(manager)
    labels = _labels(index)
    for name in (name for name in _COLUMNS if labels.count(name) > 1):
        raise MoesteerError(f"it has {labels.count(name)} columns named {name}")
    if missing := [name for name in _COLUMNS if name not in labels]:
        raise MoesteerError(
            f"it lacks the columns {', '.join(missing)}; a ranking has {', '.join(_COLUMNS)}"
        )
    owner: dict[int, tuple[object, int]] = {}
    for values, place in blocks:
        for row, position in enumerate(_positions(place, len(labels))):
            if position in owner:  # stops here, so a hostile file cannot make us count for long
                raise _malformed("two blocks hold the same column")
            owner[position] = values, row
    columns: dict[str, np.ndarray] = {}
    for name in _COLUMNS:
        values, row = owner.get(labels.index(name), (None, 0))
        block = _array(values, 2, f"column {name}")
        if row >= len(block):
            raise _malformed(f"column {name} is outside its block")
        columns[name] = block[row]
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise MoesteerError(f"its columns differ in length: {lengths}")
    return columns


def _index_and_blocks(manager: "_Part") -> tuple[object, list[tuple[object, object]]]:
    """The column index, and each block of columns with the positions it fills."""
    pairs: list[tuple[object, object]] = []
    match manager:
        case _Part(args=[tuple(blocks), [index, _]]):
            for block in blocks:
                match block:
                    case _Part(role="block", args=[values, place, 2]):
                        pairs.append((values, place))
                    case _:
                        raise _malformed("a block is not a block of columns")
        case _Part(state=[_, _, _, {"0.14.1": {"axes": [index, _], "blocks": list(blocks)}}]):
            for block in blocks:  # pandas up to 1.2
                match block:
                    case {"values": values, "mgr_locs": place}:
                        pairs.append((values, place))
                    case _:
                        raise _malformed("a block is not a block of columns")
        case _:
            raise _malformed("its blocks and axes are not where pandas puts them")
    return index, pairs


def _positions(place: object, width: int) -> list[int]:
    match place:
        case _Part(role="slice", args=[int(start), int(stop), int(step)]) if step > 0 <= start:
            return list(range(width)[start:stop:step])
    return _array(place, 1, "the position of a block").tolist()


def _labels(index: object) -> list[object]:
    match index:
        case _Part(role="index", args=[_, {"data": data}]):
            pass
        case _:
            raise _malformed("its columns have no plain index")
    match data:
        case _Part(role="strings", state=[_, _Part() as inner, *_]):  # pandas 3
            data = inner
        case _Part(role="arrow strings", state={"_pa_array": arrow}):  # pandas 3 with pyarrow
            return list(_arrow_strings(arrow))
    match data:
        case _Part(role="array", state=[_, [int()], _, _, list(labels)]):
            return labels
        case _:
            raise _malformed("its columns have no names")


def _arrow_strings(arrow: object) -> list[str]:
    """Arrow keeps strings end to end, with a list of where each one starts."""
    match arrow:
        case _Part(
            role="arrow array",
            args=[
                [
                    _Part(role="arrow type", args=["large_string"]),
                    int(length),
                    0,
                    int(offset),
                    [
                        None,
                        _Part(role="arrow buffer", args=[starts]),
                        _Part(role="arrow buffer", args=[text]),
                    ],
                    *_,
                ]
            ],
        ) if length >= 0 <= offset:
            pass
        case _:
            raise _malformed("its column names are not plain strings")
    letters, raw = bytes(_bytes(text)), _bytes(starts)
    if len(raw) % 8 or (offset + length + 1) * 8 > len(raw):
        raise _malformed("its column names are cut short")
    bounds = np.frombuffer(raw, "<i8")[offset : offset + length + 1]
    if bounds[0] < 0 or bounds[-1] > len(letters) or (bounds[1:] < bounds[:-1]).any():
        raise _malformed("its column names overlap")
    try:
        return [letters[a:b].decode() for a, b in pairwise(bounds.tolist())]
    except UnicodeDecodeError:
        raise _malformed("its column names are not text") from None


def _array(part: object, ndim: int, what: str) -> np.ndarray:
    """The numbers of an array; its shape must be the one that its bytes bear out."""
    match part:
        case _Part(role="array", state=[_, tuple(shape), dtype, bool(fortran), raw]):
            pass
        case _Part(role="buffer array", args=[raw, dtype, tuple(shape), "C" | "F" as order]):
            fortran = order == "F"
        case _:
            raise _malformed(f"{what} is not an array")
    match dtype:
        case _Part(role="dtype", args=[str(code), *_], state=[_, "<" | ">" | "|" as ends, *_]):
            pass
        case _:
            raise _malformed(f"{what} has no type")
    if code not in _NUMBERS:
        raise MoesteerError(f"{what} holds values of type {code[:9]!a}, not plain numbers")
    kind = np.dtype(code).newbyteorder(ends)
    if len(shape) != ndim or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise _malformed(f"{what} has a shape that is none")
    content = _bytes(raw)
    if math.prod(shape) * kind.itemsize != len(content):
        raise _malformed(f"{what} says another size than the bytes it has")
    if not content:
        raise MoesteerError("it has no rows")
    return np.frombuffer(content, kind).reshape(shape, order="F" if fortran else "C")


_NUMBERS = {"i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}


def _bytes(raw: object) -> bytes | bytearray:
    """Protocol 2 has no bytes and spells them as text; protocols 3 and 4 have no bytearray."""
    match raw:
        case _Part(role="bytearray", args=[inner]):
            raw = inner
    match raw:
        case bytes() | bytearray():
            return raw
        case _Part(role="bytes", args=[str(text), "latin1"]):
            try:
                return text.encode("latin1")
            except UnicodeEncodeError:
                pass
    raise _malformed("bytes are missing where numbers should be")


def _malformed(what: str) -> MoesteerError:
    return MoesteerError(
        f"it is not a table as pandas writes one ({what}); write it again with df.to_pickle(path)"
    )


# -------------------------------------------------------------------- from the file to the tree

_NUMPY = ("numpy.core", "numpy._core")  # numpy 1, numpy 2
_STRING = "pandas.core.arrays.string_"
_NAMES = {
    "frame": ["pandas.DataFrame", "pandas.core.frame.DataFrame"],
    "manager": ["pandas.core.internals.managers.BlockManager"],
    "block": ["pandas._libs.internals._unpickle_block"],
    "index": ["pandas.core.indexes.base._new_Index"],
    "index kind": [
        "pandas.Index",
        "pandas.RangeIndex",
        "pandas.core.indexes.base.Index",
        "pandas.core.indexes.range.RangeIndex",
        "pandas.core.indexes.numeric.Int64Index",
    ],
    "strings": ["pandas._libs.arrays.__pyx_unpickle_NDArrayBacked"],
    "string kind": [
        "pandas.StringDtype",
        "pandas.arrays.StringArray",
        f"{_STRING}.StringDtype",
        f"{_STRING}.StringArrayNumpySemantics",
    ],
    "arrow strings": ["pandas.arrays.ArrowStringArray"],
    "arrow array": ["pyarrow.lib._restore_array"],
    "arrow type": ["pyarrow.lib.type_for_alias"],
    "arrow buffer": ["pyarrow.lib.py_buffer"],
    "array": [f"{numpy}.multiarray._reconstruct" for numpy in _NUMPY],
    "buffer array": [f"{numpy}.numeric._frombuffer" for numpy in _NUMPY],
    "array kind": ["numpy.ndarray"],
    "dtype": ["numpy.dtype"],
    "slice": ["builtins.slice", "__builtin__.slice"],
    "bytes": ["_codecs.encode"],
    "bytearray": ["builtins.bytearray", "__builtin__.bytearray"],
}
_ROLES = {name: role for role, names in _NAMES.items() for name in names}


class _Part:
    """One thing that the file wants made: its role, and what it was called and filled with."""

    __slots__ = ("args", "state")
    role: ClassVar[str]
    args: tuple[object, ...]
    state: object

    def __new__(cls, *args: object) -> "_Part":
        part = super().__new__(cls)
        part.args, part.state = args, None
        return part

    def __setstate__(self, state: object) -> None:
        self.state = state


class _TableUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[_Part]:
        asked = f"{module}.{name}"
        if asked not in _ROLES:
            # ascii, cut: a hostile name shall not write to the terminal as it pleases.
            raise MoesteerError(
                f"it asks for {ascii(asked[:80])[1:-1]}; moesteer reads tables only; "
                "nothing was run"
            )
        # A fresh class each time: whatever the file does to it is gone with the file.
        return type("_Part", (_Part,), {"role": _ROLES[asked], "__slots__": ()})


# What protocols 2 to 5 write for a table. Left out: persistent ids, the extension registry (whose
# cached objects never pass find_class), old text forms, and whatever else pandas has no use for.
_OPCODES = frozenset(
    """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT
    BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS
    GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD
    BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET
    """.split()
)
# A table of numbers takes some hundred steps however long it is, since its numbers are bytes. The
# limit keeps hostile nests shallower than the C stack.
_STEPS = 10_000


def _tree(content: bytes) -> object:
    if content[:1] != b"\x80":
        raise MoesteerError("it is not a pickle (or one older than protocol 2)")
    try:
        # A first pass only reads, so that bad lengths are known before anything is set aside.
        for step, (opcode, value, _) in enumerate(pickletools.genops(content)):
            if opcode.name not in _OPCODES:
                raise MoesteerError(
                    f"it uses the pickle operation {opcode.name}, which no table needs; "
                    "nothing was run"
                )
            if step > _STEPS or (opcode.name == "LONG_BINPUT" and value and value > _STEPS):
                raise MoesteerError(
                    f"it takes more than {_STEPS} steps to build, where a table of numbers "
                    "takes some hundred; nothing was run"
                )
        return _TableUnpickler(io.BytesIO(content)).load()
    except MoesteerError:
        raise
    except Exception as error:  # broken bytes can raise nearly anything here
        raise MoesteerError(
            f"it is cut short or is not a pickle ({type(error).__name__}); fetch it again"
        ) from error


_LIMIT = 64 * 2**20  # a hundred times the largest model's ranking


def _content(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise MoesteerError("it is not a file")
        too_large = path.stat().st_size > _LIMIT
        content = b"" if too_large else path.read_bytes()
    except OSError as error:
        raise MoesteerError(f"it cannot be read ({error.strerror})") from error
    if content.startswith(b"\x1f\x8b"):
        content = _unpacked(zlib.decompressobj(wbits=31), content)
    elif content.startswith(b"BZh"):
        content = _unpacked(bz2.BZ2Decompressor(), content)
    elif content.startswith(b"\xfd7zXZ\x00"):
        content = _unpacked(lzma.LZMADecompressor(memlimit=2 * _LIMIT), content)
    if too_large or len(content) > _LIMIT:
        raise MoesteerError(f"it holds more than {_LIMIT >> 20} MiB, too much for a ranking")
    return content


def _unpacked(
    decompressor: "zlib._Decompress | bz2.BZ2Decompressor | lzma.LZMADecompressor", packed: bytes
) -> bytes:
    try:
        # The limit is given to the decompressor: a few bytes can hold gigabytes.
        content = decompressor.decompress(packed, _LIMIT + 1)
    except (zlib.error, lzma.LZMAError, OSError, EOFError) as error:
        raise MoesteerError(f"its compressed content is damaged ({error})") from error
    if not decompressor.eof and len(content) <= _LIMIT:
        raise MoesteerError("its compressed content is cut short; fetch it again")
    return content
