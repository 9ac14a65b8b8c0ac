"""Metrics against values worked out by hand, and against scikit-learn on valid answers."""

from __future__ import annotations

import pytest
from sklearn import metrics as reference

from deptjax.data.metrics import METRICS, compute_metrics
from deptjax.errors import UserError

LABELS = ["neg", "pos"]


def score(name, predictions, references, labels=LABELS, positive=None):
    return compute_metrics([name], predictions, references, labels, positive)[name]


def test_valid_answers_agree_with_scikit_learn():
    said = ["pos", "neg", "pos", "pos", "neg", "neg", "pos"]
    truth = ["pos", "pos", "neg", "pos", "neg", "neg", "pos"]
    got = compute_metrics(["accuracy", "f1", "macro_f1", "matthews"], said, truth, LABELS)
    assert got["accuracy"] == pytest.approx(5 / 7, abs=1e-12)
    assert got["f1"] == pytest.approx(reference.f1_score(truth, said, pos_label="pos"), abs=1e-12)
    assert got["macro_f1"] == pytest.approx(reference.f1_score(truth, said, average="macro"), abs=1e-12)
    assert got["matthews"] == pytest.approx(reference.matthews_corrcoef(truth, said), abs=1e-12)
    assert score("f1", said, truth, positive="neg") == pytest.approx(
        reference.f1_score(truth, said, pos_label="neg"), abs=1e-12
    )


@pytest.mark.parametrize("name", ["accuracy", "f1", "macro_f1", "matthews"])
def test_an_answer_that_is_no_label_is_as_wrong_as_the_wrong_label(name):
    truth = ["pos", "neg", "pos", "neg", "pos"]
    right = score(name, truth, truth)
    invalid = score(name, ["pos", "oops", "pos", "neg", ""], truth)
    assert right == 1.0
    assert invalid < right
    if name in ("f1", "matthews"):
        assert invalid == score(name, ["pos", "pos", "pos", "neg", "neg"], truth)


def test_f1_by_hand_with_an_invalid_answer():
    # said pos, -, neg; truth pos, neg, pos: "-" counts as pos, so tp 1, fp 1, fn 1.
    assert score("f1", ["pos", "-", "neg"], ["pos", "neg", "pos"]) == pytest.approx(0.5)


def test_macro_f1_leaves_out_labels_nobody_uses():
    assert score("macro_f1", ["a", "b"], ["a", "b"], labels=["a", "b", "c"]) == 1.0
    # a: F1 2/3, b: 0, c predicted once and wrong: 0
    assert score("macro_f1", ["a", "a", "c"], ["a", "b", "a"], labels=["a", "b", "c"]) == pytest.approx(
        (0.5 + 0 + 0) / 3
    )


def test_matthews_with_three_labels():
    said, truth = ["a", "b", "c", "x"], ["a", "b", "b", "c"]
    assert score("matthews", said, truth, labels=["a", "b", "c"]) == pytest.approx(
        reference.matthews_corrcoef(truth, said)
    )


def test_correlations():
    truth = ["1.0", "2.0", "3.0", "4.0"]
    assert score("pearson", ["2", "4", "6", "8"], truth) == pytest.approx(1.0)
    assert score("spearman", ["1", "4", "9", "16"], truth) == pytest.approx(1.0)
    assert score("pearson", ["1", "4", "9", "16"], truth) == pytest.approx(0.984374038697, abs=1e-9)
    assert score("pearson", ["3", "3", "3", "3"], truth) == 0.0
    for name in ("pearson", "spearman"):
        assert score(name, ["1", "2", "3", "none"], truth) == score(name, ["1", "2", "3", "1"], truth)
        assert score(name, ["nan", "2", "3", "4"], truth) == score(name, ["4", "2", "3", "4"], truth)
    with pytest.raises(UserError, match=r"metric 'pearson' needs numbers, and a reference is 'x'"):
        score("pearson", ["1"], ["x"])


def test_squad_metrics():
    said = ["The Eiffel Tower!", "in Paris, France", "", "london"]
    truth = ["eiffel tower", "Paris", "", "Rome"]
    got = compute_metrics(["exact_match", "token_f1"], said, truth)
    assert got["exact_match"] == 0.5
    assert got["token_f1"] == pytest.approx((1 + 2 * 1 / (3 + 1) + 1 + 0) / 4)


def test_errors():
    with pytest.raises(UserError, match=r"'acuracy' is not one of .*Did you mean 'accuracy'"):
        compute_metrics(["acuracy"], ["a"], ["a"])
    with pytest.raises(UserError, match="'f1' needs two labels"):
        score("f1", ["a"], ["a"], labels=["a", "b", "c"])
    for name in ("f1", "macro_f1", "matthews"):
        with pytest.raises(UserError, match="needs a task with labels"):
            score(name, ["a"], ["a"], labels=None)
    with pytest.raises(ValueError, match="2 predictions for 1 references"):
        score("accuracy", ["a", "b"], ["a"])
    with pytest.raises(ValueError, match="0 predictions"):
        score("accuracy", [], [])


@pytest.mark.parametrize("name", sorted(METRICS))
def test_every_metric_of_perfect_answers_is_one(name):
    answers = ["1", "2", "1", "2", "2"]
    assert score(name, answers, answers, labels=["1", "2"]) == pytest.approx(1.0)
