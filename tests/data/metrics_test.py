"""Metrics against values worked out by hand, and against scikit-learn on valid answers."""

from __future__ import annotations

import random

import pytest
from scipy import stats
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


def test_matthews_of_one_label_is_not_defined(recwarn):
    assert score("matthews", ["pos", "pos"], ["pos", "pos"]) == 0.0
    assert score("matthews", ["pos", "pos"], ["neg", "neg"]) == reference.matthews_corrcoef([0, 0], [1, 1]) == 0.0
    assert not recwarn.list


def test_correlations():
    truth = ["1.0", "2.0", "3.0", "4.0"]
    assert score("pearson", ["2", "4", "6", "8"], truth) == pytest.approx(1.0)
    assert score("spearman", ["1", "4", "9", "16"], truth) == pytest.approx(1.0)
    assert score("pearson", ["1", "4", "9", "16"], truth) == pytest.approx(0.984374038697, abs=1e-9)
    assert score("pearson", ["3", "3", "3", "3"], truth) == 0.0
    for name in ("pearson", "spearman"):
        assert score(name, ["1", "2", "3", "none"], truth) == score(name, ["1", "2", "3", "1"], truth)
        assert score(name, ["nan", "2", "3", "4"], truth) == score(name, ["4", "2", "3", "4"], truth)
    assert score("pearson", ["1e308", "1e308", "1e308", "4"], truth) == 0.0  # they have no sum
    with pytest.raises(UserError, match=r"metric 'pearson' needs numbers, and a reference is 'x'"):
        score("pearson", ["1"], ["x"])


def test_squad_metrics():
    said = ["The Eiffel Tower!", "in Paris, France", "", "london"]
    truth = ["eiffel tower", "Paris", "", "Rome"]
    got = compute_metrics(["exact_match", "token_f1"], said, truth)
    assert got["exact_match"] == 0.5
    assert got["token_f1"] == pytest.approx((1 + 2 * 1 / (3 + 1) + 1 + 0) / 4)


def drawn(seed: int, choices: list[str], count: int = 60) -> tuple[list[str], list[str]]:
    """Returns predictions, of which about two in three are right, and references."""
    draw = random.Random(seed)
    truth = [draw.choice(choices) for _ in range(count)]
    return [text if draw.random() < 0.5 else draw.choice(choices) for text in truth], truth


@pytest.mark.parametrize("seed", range(3))
def test_drawn_answers_agree_with_scikit_learn_and_scipy(seed):
    said, truth = drawn(seed, ["0", "1"])
    got = compute_metrics(["f1", "multirc_f1a", "macro_f1", "matthews"], said, truth, ["0", "1"])
    assert got["f1"] == pytest.approx(reference.f1_score(truth, said, pos_label="1"), abs=1e-12)
    assert got["multirc_f1a"] == got["f1"]
    assert got["macro_f1"] == pytest.approx(reference.f1_score(truth, said, average="macro"), abs=1e-12)
    assert got["matthews"] == pytest.approx(reference.matthews_corrcoef(truth, said), abs=1e-12)
    said, truth = drawn(seed, ["a", "b", "c", "d"])
    got = compute_metrics(["macro_f1", "matthews"], said, truth, ["a", "b", "c", "d"])
    assert got["macro_f1"] == pytest.approx(reference.f1_score(truth, said, average="macro"), abs=1e-12)
    assert got["matthews"] == pytest.approx(reference.matthews_corrcoef(truth, said), abs=1e-12)
    said, truth = drawn(seed, [f"{tenth / 5:.1f}" for tenth in range(26)])  # STS-B's scale, with ties
    got = compute_metrics(["pearson", "spearman"], said, truth)
    numbers = list(map(float, said)), list(map(float, truth))
    assert got["pearson"] == pytest.approx(stats.pearsonr(*numbers).statistic, abs=1e-12)
    assert got["spearman"] == pytest.approx(stats.spearmanr(*numbers).statistic, abs=1e-12)


# What SQuAD's script of evaluation (version 1.1) does, worked out by hand: lower case, then no punctuation, then no
# articles, then single spaces; F1 of the bag of words; the best over the accepted answers.
SQUAD = [
    ("The  U.S.A.", ["usa"], 1.0, 1.0),
    ("An apple-pie", ["applepie", "pie"], 1.0, 1.0),
    ("Denver Broncos", ["the Denver Broncos", "Broncos"], 1.0, 1.0),
    ("Santa Clara", ["Levi's Stadium", "Santa Clara, California"], 0.0, 2 * 2 / (2 + 3)),
    ("theater", ["the ater"], 0.0, 0.0),  # an article is a word, not the front of one
    ("gold gold", ["gold"], 0.0, 2 * 1 / (2 + 1)),  # a word counts as often as both have it
    ("", ["a"], 1.0, 1.0),  # nothing is left of either
    ("no", [""], 0.0, 0.0),
]


@pytest.mark.parametrize(("said", "accepted", "exact", "f1"), SQUAD)
def test_squad_cases(said, accepted, exact, f1):
    got = compute_metrics(["exact_match", "token_f1"], [said], [accepted[0]], accepted=[accepted])
    assert got == pytest.approx({"exact_match": exact, "token_f1": f1}, abs=1e-12)


def test_squad_is_the_mean_over_rows():
    said, accepted, exact, f1 = map(list, zip(*SQUAD, strict=True))
    got = compute_metrics(["exact_match", "token_f1"], said, ["unused"] * len(said), accepted=accepted)
    assert got == pytest.approx({"exact_match": sum(exact) / 8, "token_f1": sum(f1) / 8}, abs=1e-12)


def test_multirc_by_hand():
    # Question p: all three options right. q: one of two wrong. r: its one option answered with no label.
    groups = ["p", "q", "p", "r", "q", "p"]
    truth = ["1", "1", "0", "0", "0", "1"]
    said = ["1", "1", "0", "maybe", "1", "1"]
    got = compute_metrics(["multirc_f1a", "multirc_em"], said, truth, ["0", "1"], groups=groups)
    # Over all options: 3 true positives, and 2 false ones: the wrong one, and the one that is no label.
    assert got == pytest.approx({"multirc_f1a": 2 * 3 / (2 * 3 + 2), "multirc_em": 1 / 3}, abs=1e-12)


def test_errors():
    with pytest.raises(UserError, match=r"'multirc_em' needs the task's group, such as group='\{question_id\}'"):
        score("multirc_em", ["a"], ["a"])
    with pytest.raises(ValueError, match="2 groups for 1 references"):
        compute_metrics(["accuracy"], ["a"], ["a"], groups=["x", "y"])
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
    got = compute_metrics([name], answers, answers, ["1", "2"], groups=["a", "a", "b", "b", "c"])
    assert got == {name: pytest.approx(1.0)}
