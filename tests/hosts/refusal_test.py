"""What is wrong on one host ends all of them with one line, and hosts that cannot meet say so."""

from __future__ import annotations

import json
import socket
import sys
import time

import pytest

from deptjax import start_hosts
from deptjax.distributed import hosts_named
from deptjax.errors import UserError
from tests.hosts.launcher import free_port, run_hosts


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "h:1"}, "num_hosts and host_index not given; give all of --coordinator --num-hosts"),
        ({"num_hosts": 2, "host": 0}, "coordinator not given"),
        ({"coordinator": "h", "num_hosts": 2, "host": 0}, "coordinator is 'h'; it must be HOST:PORT"),
        ({"coordinator": "h:99999", "num_hosts": 2, "host": 0}, "coordinator is 'h:99999'"),
        (
            {"coordinator": "h:1", "num_hosts": 2, "host": 2},
            "host_index is 2 and num_hosts 2; hosts are counted",
        ),
        ({"coordinator": "h:1", "num_hosts": "two", "host": 0}, "num_hosts is 'two'; it must be a whole number"),
        ({"coordinator": "h:1", "num_hosts": 2, "host": "-1"}, "host_index is '-1'; it must be a whole number"),
    ],
)
def test_wrong_arguments(given: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        start_hosts(**given)  # type: ignore[arg-type]


def test_alone_nothing_is_started() -> None:
    """Neither by default on this machine, nor where one host is asked for whatever the cluster says."""
    start_hosts()
    start_hosts(num_hosts=1)


@pytest.mark.parametrize(
    ("env", "several"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "2"}, False),  # not inside of srun
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "1"}, True),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "n1", "SLURM_PROCID": "0"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "t-0.x,t-1.x"}, True),
        ({"DEPTJAX_NUM_HOSTS": "2"}, True),
    ],
)
def test_where_several_hosts_are_named(env: dict[str, str], several: bool) -> None:
    assert hosts_named(env) is several


def test_a_coordinator_that_is_not_there() -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match=r"coordinator 127.0.0.1:\d+ was not reached in 1 s"):
        start_hosts(f"127.0.0.1:{free_port()}", 2, 1, timeout=1)
    assert time.monotonic() - began < 10


def test_hosts_that_do_not_come_and_a_port_that_is_taken() -> None:
    place = {"DEPTJAX_NUM_HOSTS": "2", "DEPTJAX_HOST_INDEX": "0", "DEPTJAX_HOST_TIMEOUT": "3"}
    alone = run_hosts("say", "x", hosts=1, DEPTJAX_COORDINATOR=f"127.0.0.1:{free_port()}", **place)[0]
    assert alone.status == 2, alone.err
    assert len(alone.lines) == 1
    assert "not all hosts came together at 127.0.0.1:" in alone.lines[0]
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        alone = run_hosts("say", "x", hosts=1, DEPTJAX_COORDINATOR=f"127.0.0.1:{port}", **place)[0]
    assert (alone.status, len(alone.lines)) == (2, 1), alone.err
    assert (
        f"port {port} of this host cannot be listened at (Address already in use); choose another, on" in alone.lines[0]
    )


def test_the_first_speaks_and_all_know() -> None:
    ends = run_hosts("say", "x", hosts=3)
    assert [end.status for end in ends] == [0, 0, 0], [end.err for end in ends]
    assert [json.loads(end.out) for end in ends] == [{"said": "x", "by": 0}] * 3
    assert all(end.lines == [] for end in ends)


@pytest.mark.parametrize("where", ["first", "second"])
def test_a_refusal_of_one_is_one_of_all(where: str) -> None:
    ends = run_hosts("refuse", where)
    line = "deptjax: error: this folder holds something else; choose another"
    assert [end.status for end in ends] == [2, 2], [end.err for end in ends]
    heard = "" if where == "first" else " (host 1)"
    assert [end.lines for end in ends] == [[line + heard], [line]]


def test_commands_for_one_host_and_for_several(tmp_path: object) -> None:
    for command in ("predict", "export"):
        program = [sys.executable, "-m", f"deptjax.{command}"]
        end = run_hosts("--prompt", str(tmp_path), hosts=1, program=program, DEPTJAX_NUM_HOSTS="2")[0]
        assert (end.status, len(end.lines)) == (2, 1), end.err
        assert f"{command} is for one host" in end.err
