"""The kernels beside cuBLAS and humming-kernels: ``kernels/compare.py`` under the name that ``make bench`` knows."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "kernels"))

from compare import main

if __name__ == "__main__":
    sys.exit(main())
