"""`python -m deptjax COMMAND`, the same as `deptjax COMMAND`."""

from __future__ import annotations

if __name__ == "__main__":
    import sys

    from deptjax.cli.main import main

    sys.exit(main())
