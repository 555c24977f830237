"""`pipelines/run.py` with the fake stages, for tests that need real processes."""

import sys
from pathlib import Path

sys.path[:1] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from fake_chain import STAGES  # noqa: E402

from pipelines.run import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(None, STAGES))
