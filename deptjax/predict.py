"""`python -m deptjax.predict`, the same as `deptjax predict`."""

from __future__ import annotations

if __name__ == "__main__":
    import sys

    from deptjax.cli.predict import main

    sys.exit(main())
