"""What a process may use of its machine; when it is one of several; where several meet."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig

from distill.config.environment import Ranks, announced, cores, find_ranks, is_joined
from distill.errors import UserError
from distill.parallel import devices
from scripts import torchrun

ROOT = Path(__file__).resolve().parents[2]
SET = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "1"},
        {"RANK": ""},
        {"RANK": "worker", "LOCAL_RANK": "x"},
        {"RANK": "1", "WORLD_SIZE": "1"},
        {**SET, "WORLD_SIZE": ""},
    ],
)
def test_what_a_platform_sets_for_nobody_is_not_heeded(environment: dict[str, str]) -> None:
    assert find_ranks(environment) == Ranks()
    assert not is_joined(environment)


def test_a_complete_set_is_a_place() -> None:
    assert find_ranks(SET) == Ranks(1, 0, 2)
    assert is_joined(SET)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"LOCAL_RANK": "", "MASTER_PORT": ""}, "WORLD_SIZE=2 is in the environment, but LOCAL_RANK, MASTER_PORT not"),
        ({"RANK": "worker"}, "RANK is 'worker'"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"RANK": "2"}, "RANK is 2"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
    ],
)
def test_an_incomplete_set_is_refused(change: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**SET, **change}.items():
        monkeypatch.setenv(name, value)
    assert not is_joined()
    with pytest.raises(UserError, match=f"{re.escape(message)}.*`unset WORLD_SIZE` for one process"):
        devices.start("cpu")


def test_a_rank_for_nobody_prints() -> None:
    """RANK alone silenced every process; so did a rank that is no number end it."""
    code = "from distill.config import cli; cli.run(lambda argv: print(*argv))"
    for rank in ("1", "worker"):
        words, settings = [sys.executable, "-c", code, "heard"], {**os.environ, "RANK": rank}
        found = subprocess.run(words, cwd=ROOT, env=settings, capture_output=True, text=True, check=False)
        assert (found.returncode, found.stdout, found.stderr) == (0, "heard\n", "")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "250000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        (
            {
                "proc/self/cgroup": "3:cpuset:/c\n2:cpu,cpuacct:/a\n",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "400000",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            4,
        ),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "1600000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 8),
        ({"sys/fs/cgroup/cpu.max": "not what it should be"}, 8),
    ],
)
def test_cores(files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 by the affinity; less by the quota of a cgroup v2 or v1, of its own or of one above it."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for name, text in files.items():
        write(tmp_path / name, text)
    assert cores(tmp_path) == expected


def test_threads_are_no_more_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(devices, "cores", lambda: 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    devices.start("cpu")
    monkeypatch.delenv("OMP_NUM_THREADS")
    devices.start("cpu")
    assert chosen == [3]


def test_a_long_wait_says_for_what(capsys: pytest.CaptureFixture[str]) -> None:
    for seconds, unless in ((0.01, False), (0.01, True), (60.0, False)):
        with announced("the others", seconds, lambda unless=unless: unless):  # type: ignore[misc]
            time.sleep(0.2)
    assert capsys.readouterr().err == "waiting for the others\n"


# -------------------------------------------------------------------------------------------------------- torchrun.py
MANY = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "host0"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"NPROC": "2"}, torchrun.Launch(2)),
        (
            {"NPROC": " 4 ", "MAX_RESTARTS": "3", "MASTER_PORT": "taken", "NODE_RANK": "x"},
            torchrun.Launch(4, restarts=3),
        ),
        ({"NPROC": "auto"}, torchrun.Launch(0)),
        ({**MANY, "NPROC": ""}, torchrun.Launch(1, 2, 1, "host0")),
        ({**MANY, "MASTER_PORT": "1234"}, torchrun.Launch(1, 2, 1, "host0", 1234)),
    ],
)
def test_what_the_environment_asks_for(environment: dict[str, str], expected: torchrun.Launch) -> None:
    assert torchrun.read(environment) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_the_interface_that_leads_to_an_address() -> None:
    assert torchrun._interface("127.0.0.1", 29500) == "lo"
    assert torchrun._interface("no.such.host.invalid", 29500) is None


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_the_interface_of_machine_0_is_not_that_of_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """By Debian's /etc/hosts its name is 127.0.1.1, which the other machines cannot reach."""

    class Socket(socket.socket):
        def connect(self, address: Any) -> None:
            super().connect(("127.0.1.1", *address[1:]) if address[0] == "host0" else address)

    monkeypatch.setattr(torchrun.socket, "socket", Socket)
    found = torchrun._interface("host0", 29500)
    assert found == torchrun._interface(torchrun.ELSEWHERE, 29500)  # None without a default route
    assert found != "lo"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"NPROC": "0"}, "NPROC must be auto, or an integer, at least 1, got '0'"),
        ({"NPROC": "2.5"}, "NPROC must be auto, or an integer, at least 1, got '2.5'"),
        ({"NPROC": "x"}, "NPROC must be auto, or an integer, at least 1, got 'x'"),
        ({"NNODES": "two"}, "NNODES must be an integer, at least 1, got 'two'"),
        ({"NPROC": "2", "MAX_RESTARTS": "-1"}, "MAX_RESTARTS must be an integer, at least 0, got '-1'"),
        ({**MANY, "MASTER_ADDR": ""}, "MASTER_ADDR must be the address of machine 0, since NNODES is 2"),
        ({**MANY, "NODE_RANK": ""}, "NODE_RANK must be an integer, from 0 to 1, got ''"),
        ({**MANY, "NODE_RANK": "2"}, "NODE_RANK must be an integer, from 0 to 1, got '2'"),
        ({**MANY, "MASTER_PORT": "65536"}, "MASTER_PORT must be an integer, from 1 to 65535, got '65536'"),
    ],
)
def test_a_wrong_launch_is_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        torchrun.read(environment)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Nothing that torchrun.py sets stays."""
    monkeypatch.setattr(socket, "getfqdn", socket.getfqdn)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for name in (*SET, "NPROC", "NNODES", "OMP_NUM_THREADS"):
        os.environ.pop(name, None)
    return monkeypatch


@pytest.mark.parametrize(("flags", "gpus", "expected"), [([], 0, 6), ([], 2, 2), (["--device", "cpu"], 2, 6)])
def test_auto_is_a_process_for_each_gpu_or_core(
    flags: list[str], gpus: int, expected: int, launched: pytest.MonkeyPatch
) -> None:
    launched.setattr(torchrun, "cores", lambda: 6)
    launched.setattr(torch.cuda, "device_count", lambda: gpus)
    launched.setattr(torch.cuda, "is_available", lambda: True)
    found: list[str] = []
    launched.setattr("torch.distributed.run.main", found.extend)
    os.environ["NPROC"], os.environ["RANK"] = "auto", "7"
    assert torchrun.main(["train.py", *flags]) == 0
    assert found[found.index("--nproc-per-node") + 1] == str(expected)
    assert os.environ["OMP_NUM_THREADS"] == str(6 // expected)
    assert "RANK" not in os.environ


@pytest.mark.skipif("shutdown_timeout" not in LaunchConfig.__annotations__, reason="torch 2.11: always 30 s")
def test_there_is_time_to_save_after_a_signal(launched: pytest.MonkeyPatch) -> None:
    found: list[int | None] = []
    launched.setattr("torch.distributed.run.main", lambda _: found.append(LaunchConfig(1, 1, 1).shutdown_timeout))
    os.environ["NPROC"] = "2"
    torchrun.main(["train.py"])
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "7"
    torchrun.main(["train.py"])
    assert found == [240, 7]


def test_one_machine_meets_without_its_name(launched: pytest.MonkeyPatch) -> None:
    """Where it does not resolve, each question takes as long as its name servers are waited for."""
    asked: list[object] = []
    launched.setattr(socket, "gethostbyaddr", lambda *name: asked.append(name))
    found: list[str] = []
    launched.setattr("torch.distributed.run.main", lambda words: found.extend([*words, socket.getfqdn()]))
    os.environ["NPROC"] = "2"
    torchrun.main(["train.py"])
    assert found[:6] == ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    assert found[-1] == socket.gethostname()
    assert asked == []
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"


def test_a_port_in_use_is_named(launched: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        given = {**MANY, "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NPROC": "1"}
        launched.setattr(os, "environ", {**os.environ, **given})
        with pytest.raises(UserError, match=f"MASTER_PORT {port} is in use on this machine"):
            torchrun.main(["train.py"])
        os.environ.update({"RANK": "0", "WORLD_SIZE": "2"})
        launched.setattr(devices, "ctypes", MagicMock())  # this process is not to end with its parent
        with pytest.raises(UserError, match=f"MASTER_PORT {port} is in use on this machine"):
            devices._join(Ranks(0, 0, 2), torch.device("cpu"))
