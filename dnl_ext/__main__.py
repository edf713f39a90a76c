"""``python -m dnl_ext`` and the console script ``dnl-ext``."""

from dnl_ext.cli import main

if __name__ == "__main__":
    main()
