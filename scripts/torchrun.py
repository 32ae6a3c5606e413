"""Start a file in the processes that NPROC, NNODES, ... ask for, by torchrun: python scripts/torchrun.py FILE [flags]

The exit code is that of the process that failed first, and there is no traceback of torchrun's own. Called by
launch.sh, which says what the variables of the environment mean.
"""

import argparse
import fcntl
import logging
import os
import signal
import socket
import struct
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from distill.config import cli  # noqa: E402
from distill.config.environment import PLACE, announced, cores, not_met  # noqa: E402
from distill.errors import UserError  # noqa: E402

SIOCGIFADDR = 0x8915  # Linux: asks for the address of an interface
ELSEWHERE = "198.51.100.1"  # an address of no machine (RFC 5737), to which the default route leads


@dataclass(frozen=True)
class Launch:
    """How many processes, 0 for as many as there are devices, and where they meet."""

    processes: int
    nodes: int = 1
    node: int = 0
    address: str = ""
    port: int = 29500
    restarts: int = 0


def read(environment: Mapping[str, str]) -> Launch:
    """What the environment asks for. Raises UserError, naming the variable."""
    automatic = environment.get("NPROC", "").strip() == "auto"
    processes = 0 if automatic else _number(environment, "NPROC", 1, least=1, other="auto, or ")
    restarts = _number(environment, "MAX_RESTARTS", 0)
    nodes = _number(environment, "NNODES", 1, least=1)
    if nodes == 1:
        return Launch(processes, restarts=restarts)
    address = environment.get("MASTER_ADDR", "").strip()
    if not address:
        raise UserError(f"MASTER_ADDR must be the address of machine 0, since NNODES is {nodes}")
    node = _number(environment, "NODE_RANK", None, most=nodes - 1)
    port = _number(environment, "MASTER_PORT", 29500, least=1, most=65535)
    return Launch(processes, nodes, node, address, port, restarts)


def _number(
    environment: Mapping[str, str], name: str, default: int | None, least: int = 0, most: int = 10**6, other: str = ""
) -> int:
    text = environment.get(name, "").strip()
    if not text and default is not None:
        return default
    if not text.isdecimal() or not least <= int(text) <= most:
        limit = f"from {least} to {most}" if most < 10**6 else f"at least {least}"
        raise UserError(f"{name} must be {other}an integer, {limit}, got {text!r}")
    return int(text)


def main(argv: Sequence[str]) -> int:
    launch = read(os.environ)
    for name in PLACE:  # of this process, where a platform sets them
        os.environ.pop(name, None)
    processes = launch.processes or _devices(argv)
    # torch 2.15 and before: with one store for all starts, a restarted process may read the address of a dead one
    # (pytorch/pytorch#135712)
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # of each process, or DistributedDataParallel's C++ tells that it found no unused parameters (training/wrap.py)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # seconds after a signal until torchrun kills: a long step and a save on a slow disk must fit (its default is 30)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "240")
    os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores() // processes))
    heard = ["SIGTERM", "SIGINT", "SIGQUIT", "SIGUSR1"]
    heard += ["SIGHUP"] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []  # nohup has it ignored
    if launch.nodes == 1 and "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # or gloo, too, asks a name server for this machine's address
    elif launch.nodes > 1 and (interface := _interface(launch.address, launch.port)):
        # or gloo tells the others what this machine's name stands for, which by Debian's /etc/hosts is 127.0.1.1
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    words = ["--nproc-per-node", str(processes), "--signals-to-handle", ",".join(heard)]
    words += ["--max-restarts", str(launch.restarts)]
    with tempfile.TemporaryDirectory(prefix="distill-torchrun-") as logs:  # torchrun's own would stay
        return start([*_meeting(launch), *words, "--log-dir", logs, *argv], launch)


def _interface(address: str, port: int) -> str | None:
    """Returns the name of this machine's interface that leads to `address`, or away from it, if that is its own.

    None where that cannot be told.
    """
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, port))  # sends nothing
        own = probe.getsockname()[0]
        if own.startswith("127.") and not address.startswith(("127.", "localhost")):
            return _interface(ELSEWHERE, port)  # machine 0 asks for its own name
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no address
                asked = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(asked[20:24]) == own:
                    return name
    return None


def _devices(argv: Sequence[str]) -> int:
    """The GPUs of --device in `argv`, or the cores that may be used."""
    from distill.parallel.devices import devices

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", default="auto")
    found = devices(parser.parse_known_args(argv)[0].device)
    return len(found) if found[0].type == "cuda" else cores()


def _meeting(launch: Launch) -> list[str]:
    """torchrun's words for where processes meet; on one machine nothing is asked of its name, which may not resolve."""
    if launch.nodes == 1:
        return ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    where = ["--master-addr", launch.address, "--master-port", str(launch.port)]
    return ["--nnodes", str(launch.nodes), "--node-rank", str(launch.node), *where]


def start(words: Sequence[str], launch: Launch) -> int:
    """Run torchrun. Returns the exit code of the process that failed first, 128 + N after signal N."""
    # torchrun tells events, which nobody reads, its name in full: a name server that is not there would hold up each
    socket.getfqdn = lambda name="": name or socket.gethostname()
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import main as torchrun

    logging.disable(logging.ERROR)  # each process tells its error itself
    where = f"{launch.address or '127.0.0.1'}:{launch.port}"
    others = f"the {launch.nodes} machines of NNODES to meet at {where}; this is number {launch.node} by its NODE_RANK"
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        # torchrun waits for machines where Python does not come to its handler; it sets its own when they have met
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with announced(others, unless=_has_children):
            torchrun(words)
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        if failure.exitcode > 0:  # it has told why
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        print(f"error: process {number} was ended by {name}; what was saved is kept", file=sys.stderr)
        return 128 - failure.exitcode
    except SignalException as error:  # torchrun passed it on; the processes have saved and ended
        return 128 + error.sigval
    except (DistError, RendezvousError) as error:
        raise not_met(others, launch.port, error) from None
    return 0


def _has_children() -> bool:
    """Whether this process has started others: then the machines have met."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


if __name__ == "__main__":
    cli.run(main)
