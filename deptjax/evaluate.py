"""`python -m deptjax.evaluate`, the same as `deptjax evaluate`. Imported, it stays the function `deptjax.evaluate`."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from deptjax.cli.evaluate import main

    sys.exit(main())
else:
    from deptjax.inference.predictor import evaluate

    # The import system binds what stands here to the package's attribute, which is the function already.
    sys.modules[__name__] = evaluate  # type: ignore[assignment]
