"""`python -m deptjax.search`, the same as `deptjax search`."""

from __future__ import annotations

if __name__ == "__main__":
    import sys

    from deptjax.cli.search import main

    sys.exit(main())
