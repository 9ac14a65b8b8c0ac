"""`python -m deptjax.train`, the same as `deptjax train`. Nothing imports this module."""

from __future__ import annotations

if __name__ == "__main__":
    import sys

    from deptjax.cli.train import main

    sys.exit(main())
