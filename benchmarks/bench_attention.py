"""The benchmark of dnl_ext, from a checkout: the same as `python -m dnl_ext bench`. See README.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dnl_ext.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "bench")
    main()
