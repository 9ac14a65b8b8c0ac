"""`python -m deptjax.plan`, the same as `deptjax plan`."""

from __future__ import annotations

if __name__ == "__main__":
    import sys

    from deptjax.cli.plan import main

    sys.exit(main())
