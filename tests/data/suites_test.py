"""Suites name tasks that there are."""

from __future__ import annotations

import pytest

from deptjax.data.packaged_sets import packaged_set_names
from deptjax.data.suites import suite, suite_names
from deptjax.data.tasks import get_task
from deptjax.errors import UserError


@pytest.mark.parametrize("name", suite_names())
def test_every_task_of_a_suite_is_registered_once(name):
    tasks = suite(name)
    assert len(set(tasks)) == len(tasks) > 1
    assert [get_task(task).name for task in tasks] == list(tasks)


def test_packaged_holds_every_packaged_set():
    assert sorted(suite("packaged")) == sorted(packaged_set_names())


def test_an_unknown_suite_is_told():
    with pytest.raises(UserError, match=r"no suite is named 'packagd'; there are .*Did you mean 'packaged'"):
        suite("packagd")
