"""Is what was built whole, and no more? `make release-check` builds dist/ and asks.

The wheel must hold the files of src/moesteer that git tracks and no others, the sdist all tracked
ones but those of the checkout itself; both bear the version of src/moesteer/version.py.
"""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from moesteer.version import __version__

ROOT = Path(__file__).parent.parent
OF_THE_CHECKOUT = {".ci/run", ".pre-commit-config.yaml"}


def main(dist: Path) -> None:
    """Print what was built; exit with 1 where a file is missing, or one too many."""
    listed = ["git", "-C", str(ROOT), "ls-files"]
    tracked = set(subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split())
    name = f"moesteer-{__version__}"
    wheel, sdist = dist / f"{name}-py3-none-any.whl", dist / f"{name}.tar.gz"
    about = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
    with zipfile.ZipFile(wheel) as file:
        expected = {path.removeprefix("src/") for path in tracked if path.startswith("src/")}
        expected |= {f"{name}.dist-info/{part}" for part in about}
        wrong = expected ^ set(file.namelist())
    with tarfile.open(sdist) as file:
        expected = (tracked - OF_THE_CHECKOUT) | {"PKG-INFO"}
        wrong |= expected ^ {path.partition("/")[2] for path in file.getnames()}
    for path in (wheel, sdist):
        print(f"{path.name}: {path.stat().st_size / 2**20:.1f} MiB")
    if wrong:
        sys.exit(f"missing, or not tracked by git: {', '.join(sorted(wrong)[:20])}")
    print("both hold what git tracks, and nothing else")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
