"""A process that holds a share of a split model, and does what the leader is told (`led.py`).

What fails here in the words of a user fails there, too, and is said there. Anything else ends the
process, and its last words go to the leader through standard output.
"""

import pickle
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import suppress


def main() -> None:
    from moesteer.engines.transformers_engine import load_transformers
    from moesteer.errors import MoesteerError

    told = sys.stdin.buffer
    model, options = pickle.load(told)
    engine = load_transformers(model, **options)
    while True:
        try:
            name, args, kwargs = pickle.load(told)
        except EOFError:
            return
        with suppress(MoesteerError):
            result = getattr(engine, name)(*args, **kwargs)
            if isinstance(result, Iterator):
                deque(result, maxlen=0)


if __name__ == "__main__":
    from moesteer.errors import MoesteerError

    try:
        main()
    except Exception as error:
        print(error if isinstance(error, MoesteerError) else repr(error), flush=True)
        sys.exit(1)
