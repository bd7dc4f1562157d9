"""Batches that fit: how much memory a pass through the model holds, and what is free.

What a forward pass holds for the backward pass grows with its tokens. The shortest text goes first
and alone, and what it took says what a batch will take; a batch that wouldn't fit goes in halves. A
text that doesn't fit alone is an error that says how much it needs.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from moesteer.engines.transformers.reading import Piece
from moesteer.errors import MoesteerError

GIB = 2**30
BATCH_TOKENS = 1024
"""Tokens of a batch, padding included; what each layer computed is held until the backward pass.

On a CPU core more of them go slower: what a layer computes then no longer fits into its cache.
"""

_ROOM = 0.9
"""The share of the free memory that a batch may take: the estimate is one of tensors alone."""

Row = TypeVar("Row")
Result = TypeVar("Result")


def in_batches(
    rows: Sequence[Row],
    length: Callable[[Row], int],
    number: Callable[[Row], int],
    device: torch.device,
    compute: Callable[[list[Row]], Iterable[Result]],
    advice: str,
) -> Iterator[Result]:
    """What `compute` gives of all rows: similar lengths together, in batches that fit.

    `length`: a row's tokens; `number`: of its text, from 0. Raises MoesteerError, with the memory
    it needs, that which is free, and the advice, where a single row doesn't fit.
    """
    ordered = sorted(rows, key=length)
    waiting = deque([ordered[:1], *by_length(ordered[1:], length)] if ordered else [])
    per_token = 0.0
    while waiting:
        batch = waiting.popleft()
        tokens = len(batch) * max(map(length, batch))
        needed, free = per_token * tokens, free_memory(device)
        found = None
        if needed <= _ROOM * free:
            try:
                with measured(device) as held:
                    found = list(compute(batch))
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _is_memory(error):
                    raise
                if device.type == "cuda":
                    torch.cuda.empty_cache()
            else:
                per_token = held() / tokens
        if found is not None:
            yield from found
        elif len(batch) > 1:
            half = len(batch) // 2
            waiting.extendleft((batch[half:], batch[:half]))
        else:
            raise _too_large(number(batch[0]), tokens, needed, free, advice)


def texts_in_batches(
    pieces: Sequence[Piece],
    device: torch.device,
    compute: Callable[[Sequence[Piece]], Iterable[Result]],
    advice: str,
) -> Iterator[tuple[int, Result]]:
    """Each text's number, from 0, and what `compute` gives of it: see `in_batches`."""

    def of_batch(batch: list[tuple[int, Piece]]) -> Iterator[tuple[int, Result]]:
        numbers, own = zip(*batch, strict=True)
        return zip(numbers, compute(own), strict=True)

    return in_batches(
        list(enumerate(pieces)),
        lambda row: len(row[1].ids),
        lambda row: row[0],
        device,
        of_batch,
        advice,
    )


@contextmanager
def measured(device: torch.device) -> Iterator[Callable[[], int]]:
    """How many bytes a pass holds, weights aside: on a GPU the peak, else what its graph keeps."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        # The graph keeps weights, too, as views of them, but they are there whatever runs.
        if not isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(seen.values())


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on the device; on a CPU those of the machine or of the process's group,
    whichever are fewer."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = [_available(), _left_in_group()]
    known = [number for number in free if number is not None]
    return min(known, default=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def _left_in_group(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    try:
        most, used = (
            (folder / name).read_text().strip() for name in ("memory.max", "memory.current")
        )
    except OSError:
        return None
    return None if most == "max" else max(0, int(most) - int(used))


def by_length(rows: Iterable[Row], length: Callable[[Row], int]) -> list[list[Row]]:
    """Rows of similar length together, longest first, within the budget of tokens; never none."""
    found: list[list[Row]] = []
    for row in sorted(rows, key=length, reverse=True):
        if found and length(found[-1][0]) * (len(found[-1]) + 1) <= BATCH_TOKENS:
            found[-1].append(row)
        else:
            found.append([row])
    return found


def _is_memory(error: Exception) -> bool:
    """A CPU's allocator says so in words only."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _too_large(number: int, tokens: int, needed: float, free: int, advice: str) -> MoesteerError:
    if needed > free:
        said = f"needs about {needed / GIB:.2f} GiB; {free / GIB:.2f} GiB are free"
    else:
        said = f"needs more than the {free / GIB:.2f} GiB that are free"
    return MoesteerError(f"text {number + 1} with its {tokens} tokens {said}: {advice}.")
