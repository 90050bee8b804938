"""A rank, started by path: for launchers that cannot start a module."""

import sys
from pathlib import Path

sys.path = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]  # no module of ours

from ki_ds.cli.main import main  # noqa: E402

if __name__ == "__main__":
    main()
