"""`python -m deptjax.evaluate`, the same as `deptjax evaluate`. Nothing imports this module."""

from __future__ import annotations

if __name__ == "__main__":
    import sys

    from deptjax.cli.evaluate import main

    sys.exit(main())
