"""`python -m deptjax.train`, the same as `deptjax train`. Imported, it stays the function `deptjax.train`."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from deptjax.cli.train import main

    sys.exit(main())
else:
    from deptjax.training.run import train

    # The import system binds what stands here to the package's attribute, which is the function already.
    sys.modules[__name__] = train  # type: ignore[assignment]
