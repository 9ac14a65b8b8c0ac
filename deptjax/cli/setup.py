"""What every entry point does first: one line a warning, other libraries silenced, compiled programs kept on disk."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Mapping
from typing import Any

# Read by C++ code while jax is being loaded, so it is set when this module is imported, not in `prepare`.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

NOISY = ("absl", "jax", "jaxlib", "orbax", "flax", "transformers", "huggingface_hub", "tensorboardX", "urllib3")
SMALLEST_PROGRAM_SECONDS = 0.5  # of compiling; what compiles faster is not worth a file


def prepare(debug: bool = False) -> None:
    """Sets up logging and the compilation cache of a program. May be called more than once.

    Args:
      debug: leaves other libraries' warnings and logs as they are.
    """
    logger = logging.getLogger("deptjax")
    if not any(isinstance(handler, _OneLine) for handler in logger.handlers):
        logger.addHandler(_OneLine())
        logger.propagate = False  # absl gives the root a handler of its own, which would say everything once more
    if not debug:
        for name in NOISY:
            # Not even their errors: each comes back as an exception, which is told in one line.
            logging.getLogger(name).setLevel(logging.CRITICAL)
        if not sys.warnoptions:  # what the user asked for with -W holds
            warnings.simplefilter("ignore")
    keep_compiled_programs()


def join_hosts(options: Mapping[str, Any]) -> None:
    """Makes this process one of several hosts, as the flags, the environment or the cluster say.

    Only the first of them says what all of them see alike. Raises `UserError` as `start_hosts` does.
    """
    from deptjax.distributed import start_hosts, watch

    start_hosts(*(options.get(name) for name in ("coordinator", "num_hosts", "host_index", "host_timeout")))
    here = watch()
    if here is not None and here.host:
        logging.getLogger("deptjax").setLevel(logging.ERROR)


def one_host_only(command: str) -> None:
    """Raises `UserError` where a command that does not share its work is started on several hosts."""
    from deptjax.distributed import hosts_named
    from deptjax.errors import UserError

    if hosts_named(os.environ):
        raise UserError(
            f"{command} is for one host, and this is one of several; start it on one, with DEPTJAX_NUM_HOSTS=1"
        )


def keep_compiled_programs() -> None:
    """Turns on jax's compilation cache, in the folder below `cache_folder`, unless one is set already."""
    import jax

    from deptjax.interop.packaged import cache_folder

    if getattr(jax.config, "jax_compilation_cache_dir", None) is not None:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SMALLEST_PROGRAM_SECONDS)


class _OneLine(logging.Handler):
    """Writes `deptjax: warning: ...` to standard error, above a progress bar where one is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        text = " ".join(record.getMessage().split())
        tqdm.write(f"deptjax: {record.levelname.lower()}: {text}", file=sys.stderr)
