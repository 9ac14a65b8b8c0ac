"""`python -m deptjax.export`, the same as `deptjax export`."""

from __future__ import annotations

if __name__ == "__main__":
    import sys

    from deptjax.cli.export import main

    sys.exit(main())
