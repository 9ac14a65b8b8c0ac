"""Several hosts: how they find each other, and what they do as one.

Each host runs the same program with the same arguments, on its own devices; `jax.distributed` makes of all of them one
set of devices. What is written for people (logs, prompts, results) is written by the first host alone; checkpoints are
written by all. The hosts' folders must be one shared folder.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import itertools
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax

from deptjax.errors import UserError
from deptjax.watch import LOST_SECONDS, Watch, coordination, listens, on_abort, quieten

CONNECT_SECONDS = 300
_TURNS = itertools.count()
_WATCH: list[Watch] = []  # the one of this process, once there is one
T = TypeVar("T")


def start_hosts(
    coordinator: str | None = None,
    num_hosts: int | str | None = None,
    host: int | str | None = None,
    timeout: float | str | None = None,
) -> None:
    """Makes this process one of several hosts, where there are several; else it does nothing.

    Without arguments it looks at `DEPTJAX_COORDINATOR`, `DEPTJAX_NUM_HOSTS` and `DEPTJAX_HOST_INDEX`, and then, as
    `jax.distributed.initialize` does, for a cluster: SLURM, Open MPI, Cloud TPU, Kubernetes. It must be called before
    jax is used. Entry points call it themselves.

    Args:
      coordinator: `HOST:PORT` of the first host, any free port.
      num_hosts: how many there are; 1 is alone, whatever the cluster says.
      host: the index of this one, from 0.
      timeout: how many seconds to wait for the others; also `DEPTJAX_HOST_TIMEOUT`, by default 300.

    Raises:
      UserError: for arguments that are wrong or incomplete; for hosts that cannot be reached.
    """
    if jax.distributed.is_initialized():
        watch()
        return
    coordinator = coordinator or os.environ.get("DEPTJAX_COORDINATOR")
    hosts = _whole("num_hosts", os.environ.get("DEPTJAX_NUM_HOSTS") if num_hosts is None else num_hosts)
    index = _whole("host_index", os.environ.get("DEPTJAX_HOST_INDEX") if host is None else host)
    given_timeout = os.environ.get("DEPTJAX_HOST_TIMEOUT") if timeout is None else timeout
    seconds = _whole("host_timeout", given_timeout) or CONNECT_SECONDS
    if hosts == 1 and index in (None, 0):
        return
    if coordinator is None and hosts is None and index is None:
        if not several_hosts_around(os.environ):
            return
        _initialize(seconds)
    else:
        _check(coordinator, hosts, index)
        assert coordinator is not None
        if index:
            _wait_for(coordinator, seconds)
        else:
            _check_free(_port(coordinator))
        _initialize(
            seconds,
            coordinator_address=coordinator,
            num_processes=hosts,
            process_id=index,
            cluster_detection_method="deactivate",
        )
    watch()


def several_hosts_around(env: Mapping[str, str]) -> bool:
    """Returns whether this may be one process of several, in a cluster that jax can find its way in."""
    kubernetes = "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env
    return hosts_named(env) or kubernetes or (_on_a_tpu_vm() and "TPU_SKIP_MDS_QUERY" not in env)


def hosts_named(env: Mapping[str, str]) -> bool:
    """Returns whether the environment itself says that there are several hosts.

    >>> hosts_named({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "n[1-4]", "SLURM_PROCID": "0"})
    True
    >>> hosts_named({"SLURM_NTASKS": "4", "DEPTJAX_NUM_HOSTS": "1"})
    False
    """

    def above_one(name: str) -> bool:
        return env.get(name, "").isdecimal() and int(env[name]) > 1

    if "DEPTJAX_NUM_HOSTS" in env:
        return above_one("DEPTJAX_NUM_HOSTS")
    slurm = above_one("SLURM_NTASKS") and "SLURM_STEP_NODELIST" in env and "SLURM_PROCID" in env  # inside of srun
    open_mpi = above_one("OMPI_COMM_WORLD_SIZE") and "OMPI_MCA_orte_hnp_uri" in env
    return slurm or open_mpi or "," in env.get("TPU_WORKER_HOSTNAMES", "") or above_one("MEGASCALE_NUM_SLICES")


def first_host() -> bool:
    """Returns whether this is the host that writes what is for people; the only one is the first."""
    return jax.process_index() == 0


def on_first_host(action: Callable[[], T]) -> T:
    """Returns, on every host, what `action` returns on the first, which alone runs it; plain values, as JSON has them.

    The others wait for it, so it is a place at which all may rely on what the first has written before. Every host must
    call it, at the same place. An error on the first host is an error on all: a `UserError` with the same message.
    """
    if jax.process_count() == 1:
        return action()
    key = f"deptjax/first/{next(_TURNS)}"
    client, _ = coordination()
    if first_host():
        try:
            value = action()
        except Exception as error:
            client.key_value_set(key, json.dumps({"error": str(error) or type(error).__name__}))
            raise
        client.key_value_set(key, json.dumps({"value": value}))
        return value
    told = json.loads(_patiently(client, key))
    if "error" in told:
        raise UserError(told["error"])
    return told["value"]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What ends the work inside on one host ends it on all, with the same line; no host waits for one that is gone."""
    if jax.process_count() == 1:
        yield
        return
    mine = watch()
    assert mine is not None
    with mine.together():
        yield


def watch() -> Watch | None:
    """Returns what keeps an eye on the other hosts, started where it was not; `None` where there are none."""
    if not _WATCH and jax.distributed.is_initialized() and jax.process_count() > 1:
        client, address = coordination()
        _WATCH.append(Watch(client, jax.process_index(), jax.process_count(), address))
        _WATCH[0].start()
    return _WATCH[0] if _WATCH else None


def leave(message: str, status: int) -> None:
    """Tells the other hosts that this one ends with a message, so that they do as well; alone it does nothing."""
    if _WATCH:
        _WATCH[0].leave(message, status)


def _patiently(client: Any, key: str) -> str:
    """Returns what another host puts there; meanwhile signals are heard, and the watch sees whether it is lost."""
    while True:
        try:
            return str(client.blocking_key_value_get(key, 2000))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _whole(name: str, given: int | float | str | None) -> int | None:
    if given is None:
        return None
    if isinstance(given, bool) or not str(given).strip().isdecimal():
        raise UserError(f"{name} is '{given}'; it must be a whole number of at least 0")
    return int(given)


def _check(coordinator: str | None, hosts: int | None, index: int | None) -> None:
    """Raises `UserError` for what does not name one host among several."""
    given = {"coordinator": coordinator, "num_hosts": hosts, "host_index": index}
    missing = [name for name, value in given.items() if value is None]
    if missing or coordinator is None or hosts is None or index is None:
        flags = " ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UserError(f"several hosts: {' and '.join(missing)} not given; give all of {flags}, on every host")
    if not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^\s:]+):\d{1,5}", coordinator) or not 0 < _port(coordinator) < 65536:
        raise UserError(
            f"coordinator is '{coordinator}'; it must be HOST:PORT of the first host, such as 10.0.0.1:8476"
        )
    if hosts < 1 or index >= hosts:
        raise UserError(f"host_index is {index} and num_hosts {hosts}; hosts are counted from 0 to num_hosts - 1")


def _port(coordinator: str) -> int:
    return int(coordinator.rpartition(":")[2])


def _wait_for(coordinator: str, seconds: int) -> None:
    """Returns when somebody listens at the coordinator's address. Raises `UserError` when nobody does."""
    deadline = time.monotonic() + seconds
    while not listens(coordinator, min(seconds, 10)):
        if time.monotonic() > deadline:
            raise UserError(
                f"coordinator {coordinator} was not reached in {seconds} s; check that host 0 runs the same command, "
                "and that the address and its port are open to this host"
            )
        time.sleep(0.2)


def _check_free(port: int) -> None:
    """Raises `UserError` where the first host cannot listen at a port; jax itself may crash where it cannot."""
    with socket.socket() as here:
        here.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            here.bind(("", port))
        except OSError as error:
            raise UserError(
                f"coordinator: port {port} of this host cannot be listened at ({error.strerror}); choose another, on "
                "every host"
            ) from None


def _initialize(seconds: int, **options: Any) -> None:
    """Joins the hosts. Raises `UserError` where that cannot be."""
    # jax would take SIGTERM for itself; here a signal is agreed on by the hosts' watches (`deptjax.watch`).
    jax.config.update("jax_enable_preemption_service", False)
    quieten()
    where = options.get("coordinator_address", "the coordinator")
    on_abort(f"not all hosts came together at {where} in {seconds} s; start the same command on every host", 2)
    try:
        jax.distributed.initialize(
            **options, initialization_timeout=seconds, heartbeat_timeout_seconds=2 * int(LOST_SECONDS)
        )
    except (RuntimeError, ValueError, OSError) as error:
        told = " ".join(str(error).split())
        if "coordinator_address should be defined" in told:
            return  # jax looked closer: there is no cluster
        if "before" in told and "initialize" in told:
            raise UserError("start_hosts comes too late: jax is in use already; call it first") from error
        raise UserError(f"hosts could not be joined: {told}") from error


def _on_a_tpu_vm() -> bool:
    chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None
