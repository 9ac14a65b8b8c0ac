"""Scores of predicted texts against reference texts; all are shares (accuracy 0.5, not 50) or correlations.

A prediction that is no answer at all (not one of the labels, not a number) counts as wrong under every metric.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
import string
import warnings
from collections.abc import Callable, Iterable, Sequence

from deptjax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class _Answers:
    predictions: list[str]
    references: list[str]
    labels: tuple[str, ...]  # empty for free text
    positive: str | None
    accepted: list[list[str]]  # all right answers of each row; its reference alone where the task names no others
    groups: list[str] | None

    def wrong_where_invalid(self, positive: str) -> list[bool]:
        """Returns whether each prediction says `positive`; one that is no label says the opposite of its reference."""
        return [
            (said == positive) if said in self.labels else (truth != positive)
            for said, truth in zip(self.predictions, self.references, strict=True)
        ]


def _accuracy(answers: _Answers) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(answers.references, answers.predictions))


def _f1(answers: _Answers) -> float:
    from sklearn.metrics import f1_score

    labels = _need_labels("f1", answers)
    if answers.positive is None and len(labels) > 2:
        raise UserError(f"metric 'f1' needs two labels or positive_label=, and there are {len(labels)}; use 'macro_f1'")
    positive = labels[-1] if answers.positive is None else answers.positive
    truths = [truth == positive for truth in answers.references]
    return float(f1_score(truths, answers.wrong_where_invalid(positive), zero_division=0.0))


def _macro_f1(answers: _Answers) -> float:
    from sklearn.metrics import f1_score

    labels = _need_labels("macro_f1", answers)
    seen = set(answers.references) | set(answers.predictions)
    # A label that neither side uses has no F1; averaging it in as 0 would lower the score of a perfect answer.
    used = [label for label in labels if label in seen]
    return float(f1_score(answers.references, answers.predictions, labels=used, average="macro", zero_division=0.0))


def _matthews(answers: _Answers) -> float:
    from sklearn.metrics import matthews_corrcoef

    labels = _need_labels("matthews", answers)
    if len({*answers.references, *answers.predictions}) == 1:
        return 0.0  # not defined; scikit-learn says so too, with a warning
    if len(labels) == 2:
        truths = [truth == labels[1] for truth in answers.references]
        return float(matthews_corrcoef(truths, answers.wrong_where_invalid(labels[1])))
    return float(matthews_corrcoef(answers.references, answers.predictions))  # an invalid answer is a class of its own


def _correlation(name: str) -> Callable[[_Answers], float]:
    def score(answers: _Answers) -> float:
        from scipy import stats

        numbers = [_number(truth) for truth in answers.references]
        truths = [number for number in numbers if number is not None]
        if len(truths) < len(numbers):
            bad = answers.references[numbers.index(None)]
            raise UserError(f"metric '{name}' needs numbers, and a reference is {bad!r}; use another metric")
        low, high = min(truths), max(truths)
        said = []
        for text, truth in zip(answers.predictions, truths, strict=True):
            number = _number(text)
            # No number: the end of the scale that is farther from the truth, the worst valid answer.
            said.append(number if number is not None else (low if truth - low > high - truth else high))
        if len(truths) < 2 or low == high or min(said) == max(said):
            return 0.0  # a correlation with a constant is not defined; it tells nothing, as 0 does
        statistic = stats.pearsonr if name == "pearson" else stats.spearmanr
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of answers that are nearly constant, or too large to be summed
            value = float(statistic(said, truths).statistic)
        return value if math.isfinite(value) else 0.0

    return score


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _words(text: str) -> list[str]:
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _same_words(said: str, truth: str) -> float:
    return float(_words(said) == _words(truth))


def _shared_words(said: str, truth: str) -> float:
    """Returns F1 of the words: 2 * shared / (said + true)."""
    ours, theirs = _words(said), _words(truth)
    if not ours or not theirs:
        return float(ours == theirs)  # two empty answers agree; F1 itself is not defined
    return 2 * (collections.Counter(ours) & collections.Counter(theirs)).total() / (len(ours) + len(theirs))


def _best_of_accepted(agreement: Callable[[str, str], float]) -> Callable[[_Answers], float]:
    def score(answers: _Answers) -> float:
        pairs = zip(answers.predictions, answers.accepted, strict=True)
        return sum(max(agreement(said, truth) for truth in truths) for said, truths in pairs) / len(answers.predictions)

    return score


def _multirc_em(answers: _Answers) -> float:
    if answers.groups is None:
        raise UserError("metric 'multirc_em' needs the task's group, such as group='{question_id}'")
    all_right: dict[str, bool] = {}
    for said, truth, group in zip(answers.predictions, answers.references, answers.groups, strict=True):
        all_right[group] = all_right.get(group, True) and said == truth
    return sum(all_right.values()) / len(all_right)


def _need_labels(name: str, answers: _Answers) -> tuple[str, ...]:
    if not answers.labels:
        raise UserError(f"metric '{name}' needs a task with labels; for free text use 'exact_match' or 'token_f1'")
    return answers.labels


METRICS: dict[str, Callable[[_Answers], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "macro_f1": _macro_f1,
    "matthews": _matthews,
    "pearson": _correlation("pearson"),
    "spearman": _correlation("spearman"),
    "exact_match": _best_of_accepted(_same_words),
    "token_f1": _best_of_accepted(_shared_words),
    "multirc_f1a": _f1,
    "multirc_em": _multirc_em,
}


def check_metrics(names: Iterable[str]) -> None:
    """Raises `UserError` for a name that is no metric, with the nearest one."""
    for name in names:
        if name not in METRICS:
            raise UserError(f"metrics: '{name}' is not one of {', '.join(METRICS)}.{nearest(name, METRICS)}")


def compute_metrics(
    names: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[str],
    labels: Sequence[str] | None = None,
    positive: str | None = None,
    *,
    accepted: Sequence[Sequence[str]] | None = None,
    groups: Sequence[str] | None = None,
) -> dict[str, float]:
    """Returns the score of each metric in `names`, in that order.

    - `accuracy`: share of predictions equal to their reference, white space around them aside.
    - `f1`: F1 of the label `positive` (default: the last label). A prediction that is no label counts as the wrong one,
      as in the evaluation of T5 (Raffel et al. 2020, arXiv 1910.10683).
    - `macro_f1`: the mean over labels of their F1 (SuperGLUE's CommitmentBank, Wang et al. 2019, arXiv 1905.00537).
    - `matthews`: Matthews' correlation (1975), GLUE's for CoLA (Wang et al. 2019, arXiv 1804.07461).
    - `pearson`, `spearman`: correlation of numbers, GLUE's for STS-B; 0 where it is not defined.
    - `exact_match`, `token_f1`: on lower-cased words without punctuation and articles (SQuAD, Rajpurkar et al. 2016,
      arXiv 1606.05250); where a row has several accepted answers, the best agreement with one of them.
    - `multirc_f1a`: `f1` over the answer options of all questions; `multirc_em`: share of questions all of whose answer
      options are judged right (SuperGLUE's for MultiRC, Khashabi et al. 2018).

    Args:
        names: metrics, keys of `METRICS`.
        predictions, references: texts, at least one, of equal number.
        labels: the labels of the task, or None for free text.
        positive: the label that `f1` is about.
        accepted: for each prediction all answers that are right, at least one; None for the references alone.
        groups: for each prediction the name of its group, such as a question whose answer options are rows.

    Raises `UserError` for an unknown metric or one that does not fit the task, and `ValueError` when the texts are none
    or differ in number.

    >>> compute_metrics(["accuracy"], ["ham", "spam"], ["ham", "ham"], ["ham", "spam"])
    {'accuracy': 0.5}
    """
    check_metrics(names)
    if len(predictions) != len(references) or not references:
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} references; need one each, at least one"
        )
    for name, given in (("accepted", accepted), ("groups", groups)):
        if given is not None and len(given) != len(references):
            raise ValueError(f"{len(given)} {name} for {len(references)} references; need one each")
    answers = _Answers(
        [text.strip() for text in predictions],
        [text.strip() for text in references],
        tuple(label.strip() for label in labels or ()),
        None if positive is None else positive.strip(),
        [[text] for text in references] if accepted is None else [list(texts) for texts in accepted],
        None if groups is None else list(groups),
    )
    return {name: METRICS[name](answers) for name in names}
