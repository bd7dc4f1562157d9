"""Write the ranking files of this folder with the pandas that runs this script.

One small table of made-up counts, written the ways that people write it: every pickle protocol,
plain and compressed, columns kept together and scattered, `d1`/`d2` as all the tokens ("totals")
and as the tokens that did not select the expert ("others"), counts kept as floats ("floats").
pandas is no dependency of moesteer, so the files are committed; to write them again, use one
throw-away environment for each of

    pandas==1.0.5 numpy==1.20.3      (Python 3.8)
    pandas==1.5.3 numpy==1.26.4
    pandas==2.3.3 numpy==2.2.6
    pandas==3.1.1 numpy==2.4.6
    pandas==3.1.1 numpy==2.4.6 pyarrow

and run `python tests/data/rankings/make.py` in it.
"""

from pathlib import Path

import pandas as pd  # pyright: ignore[reportMissingImports]

try:  # with pyarrow at hand, pandas 3 keeps column names in it
    import pyarrow  # noqa: F401  # pyright: ignore[reportMissingImports]

    writer = f"pandas-{pd.__version__}-pyarrow"
except ImportError:
    writer = f"pandas-{pd.__version__}"

# tests/test_published_rankings.py knows this table by heart.
a1, n1 = [30, 7, 3, 0, 25, 15], [40] * 6
a2, n2 = [10, 25, 15, 20, 5, 25], [50] * 6
grid = {"layer": [1, 1, 1, 3, 3, 3], "expert": [0, 1, 2, 0, 1, 2]}
together = pd.DataFrame({**grid, "a1": a1, "a2": a2, "d1": n1, "d2": n2})
together["risk_diff"] = together["a1"] / n1 - together["a2"] / n2

# Sorted rows have an index of their own, and scattered columns a list of positions.
scattered = together.assign(
    model=["made-up"] * 6,
    d1=together["d1"] - together["a1"],
    d2=together["d2"] - together["a2"],
)[["risk_diff", "a2", "model", "layer", "a1", "expert", "d2", "d1"]]
scattered = pd.DataFrame({name: scattered[name] for name in scattered})
scattered = scattered.sort_values("risk_diff", ascending=False)

floats = together.astype({"a1": "float64", "d1": "float32", "expert": "int32"})
floats = floats.astype({"risk_diff": "float32", "layer": "uint8"})

folder = Path(__file__).parent
for protocol, name, table, suffix in [
    (2, "totals", together, ".pkl"),
    (2, "others", scattered, ".pkl.gz"),
    (3, "floats", floats, ".pkl.bz2"),
    (4, "others", scattered, ".pkl.xz"),
    (5, "totals", together, ".pkl"),
    (5, "others", scattered, ".pkl"),
]:
    table.to_pickle(str(folder / f"{writer}-protocol{protocol}-{name}{suffix}"), protocol=protocol)
