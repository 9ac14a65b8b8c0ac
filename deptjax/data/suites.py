"""Suites: tasks that are trained and reported together, by name."""

from __future__ import annotations

from deptjax.errors import UserError, nearest

SUITES: dict[str, tuple[str, ...]] = {
    # Labelled English text of several kinds that needs no account and no data hub (`deptjax.data.packaged_sets`).
    "packaged": (
        "trec6",
        "sms_spam",
        "movie_sentiment",
        "amazon_sentiment",
        "tweet_sentiment",
        "nyt_sentiment",
        "sarcasm",
        "quartz",
        "social_iqa",
        "bbc_topics",
    ),
    # Those of the paper of DePT, arXiv 2309.05173 (`deptjax.data.paper_tasks`); read from the Hugging Face hub.
    "glue": ("mnli", "qqp", "qnli", "sst2", "stsb", "mrpc", "rte", "cola"),
    "superglue": ("multirc", "boolq", "wic", "wsc", "cb"),
    "mrqa": ("nq", "hotpotqa", "searchqa", "newsqa"),
    "others": ("winogrande", "yelp_polarity", "scitail", "paws"),
    "transfer_sources": ("mnli", "qqp", "sst2", "squad", "record"),  # whose prompts few-shot tasks start from
}


def suite(name: str) -> tuple[str, ...]:
    """Returns the names of a suite's tasks, for `get_task`, in the order of its table.

    Raises `UserError` with the nearest name when there is no such suite.
    """
    if name not in SUITES:
        raise UserError(f"no suite is named '{name}'; there are {', '.join(suite_names())}.{nearest(name, SUITES)}")
    return SUITES[name]


def suite_names() -> tuple[str, ...]:
    """Returns the names of all suites, sorted."""
    return tuple(sorted(SUITES))
