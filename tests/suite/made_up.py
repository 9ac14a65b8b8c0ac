"""Results of suites that nobody ran, in the form that `read_results` gives them."""

from __future__ import annotations

from typing import Any

from deptjax.suite.results import ALONE, summarized


def run(task: str, method: str, seed: int, accuracy: float, **fields: Any) -> dict[str, Any]:
    """Returns a run that is done: 20 steps, the best the last, a tenth better on the dev split."""
    return {
        "task": task,
        "method": method,
        "seed": seed,
        "status": "done",
        "dev": {"accuracy": accuracy + 0.1},
        "test": {"accuracy": accuracy, "f1": 0.5},
        "best_step": 20,
        "trainable_parameters": 1234,
        "seconds_per_step": 0.5,
        "peak_mib": 128.0,
        "peak_of": ALONE,
        "wall_seconds": 90.0,
        "device": "1 x cpu",
        "curve": {
            "loss": [[step, 1 / step + 0.1 * seed] for step in range(1, 21)],
            "dev/accuracy": [[step, accuracy + 0.005 * step] for step in (5, 10, 15, 20)],
        },
        **fields,
    }


def failed(task: str, method: str, seed: int, error: str = "the loss is not finite") -> dict[str, Any]:
    """Returns a run that failed."""
    return {"task": task, "method": method, "seed": seed, "status": "failed", "error": error}


def results_of(runs: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """Returns the results of a suite with these runs."""
    return {
        "format": 1,
        "name": None,
        "command": "deptjax suite",
        "model": {"name_or_path": "tiny"},
        "recipes": {f"{of['task']}/{of['method']}": {"train": {"steps": 20}} for of in runs},
        "runs": runs,
        "summary": summarized(runs),
        **fields,
    }
