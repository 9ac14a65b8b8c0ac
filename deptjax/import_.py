"""`python -m deptjax.import_`, the same as `deptjax import`."""

from __future__ import annotations

if __name__ == "__main__":
    import sys

    from deptjax.cli.import_ import main

    sys.exit(main())
