"""The shell scripts, from any directory: flags pass through, relative paths are the caller's."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import teacher_file

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = ["trainCE.sh", "trainKD.sh"]


def bash(script: str, *arguments: str, cwd: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    settings = {**os.environ, **environment}
    command = ["bash", script, *arguments]
    return subprocess.run(command, cwd=cwd, env=settings, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_from_several_directories(launcher: str, tmp_path: Path) -> None:
    results = [
        bash(f"scripts/{launcher}", "--show-recipe", cwd=ROOT),
        bash(launcher, "--show-recipe", cwd=ROOT / "scripts"),
        bash(str(ROOT / "scripts" / launcher), "--show-recipe", cwd=tmp_path, CDPATH="/tmp:/"),
    ]
    assert [r.returncode for r in results] == [0, 0, 0]
    assert '"arch": "efficientnet_b0"' in results[0].stdout
    assert results[0].stdout == results[1].stdout == results[2].stdout
    assert ('"teacher_arch": "resnext29_2x64d"' in results[0].stdout) == (launcher == "trainKD.sh")


def test_relative_paths_are_the_callers(small_npz: Path, tmp_path: Path) -> None:
    shutil.copy(small_npz, tmp_path / "with space.npz")
    flags = ("--data", "with space.npz", "--output", "my run", "--batch_size", "8", "--epochs", "1", "--steps", "1")
    found = bash(str(ROOT / "scripts" / "trainCE.sh"), *flags, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "my run" / "last.pt").exists()


def test_one_process_is_started_again_too() -> None:
    """By torchrun, as several are: it is who reads MAX_RESTARTS."""
    found = bash("scripts/trainCE.sh", "--arch", "airbench94", cwd=ROOT, MAX_RESTARTS="x")
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == "error: MAX_RESTARTS must be an integer, at least 0, got 'x'\n"


def test_python_of_the_caller_without_a_venv(tmp_path: Path) -> None:
    """A copy of the repository without .venv takes $PYTHON."""
    for folder in ("scripts", "distill", "cifar10"):
        shutil.copytree(ROOT / folder, tmp_path / "copy of it" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    script = str(tmp_path / "copy of it" / "scripts" / "trainCE.sh")
    assert bash(script, "--show-recipe", cwd=tmp_path, PYTHON=sys.executable).returncode == 0
    assert bash(script, "--show-recipe", cwd=tmp_path, PYTHON="/bin/false").returncode == 1


@pytest.mark.parametrize("words", [["-m", "cifar10.train_kd"], ["cifar10/train_kd.py"], ["scripts/evaluate.py"]])
def test_python_ways_to_call(words: list[str]) -> None:
    found = subprocess.run([sys.executable, *words, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0
    assert "--arch" in found.stdout


FILES = {
    "trainCE.sh": "cifar10/train_ce.py",
    "trainKD.sh": "cifar10/train_kd.py",
    "train.sh": "imagenet/train_kd.py",
    "reproduce.sh": "scripts/reproduce.py",
}


@pytest.mark.parametrize("launcher", FILES)
def test_links_copies_and_sh(launcher: str, tmp_path: Path) -> None:
    """A batch system runs a copy of the script it was given, which finds the repository from where that was."""
    root, spool = tmp_path / "re po", tmp_path / "spool"
    shutil.copytree(ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("cifar10/train_ce.py", "cifar10/train_kd.py", "imagenet/train_ce.py", "imagenet/train_kd.py"):
        (root / file).parent.mkdir(exist_ok=True)
        (root / file).touch()
    spool.mkdir()
    shutil.copy(root / "scripts" / launcher, spool / "slurm_script")
    (spool / "link").symlink_to(root / "scripts" / launcher)

    def call(command: str, script: Path, cwd: Path = spool, **environment: str) -> "subprocess.CompletedProcess[str]":
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "PBS", "SGE", "N"))}
        words = [command, str(script), "--teacher_arch", "a b"]
        settings = {**kept, "PYTHON": "echo", **environment}  # a Python that tells what it is called with
        return subprocess.run(words, cwd=cwd, env=settings, capture_output=True, text=True, timeout=60, check=False)

    found = [
        call("sh", root / "scripts" / launcher),
        call("bash", spool / "link"),
        call("bash", spool / "slurm_script", SLURM_SUBMIT_DIR=str(root)),
        call("sh", spool / "slurm_script", PBS_O_WORKDIR=str(root / "scripts")),
        call("sh", spool / "slurm_script", cwd=root / "scripts"),
    ]
    assert [run.stdout for run in found] == [f"{root / FILES[launcher]} --teacher_arch a b\n"] * len(found)
    lost = call("sh", spool / "slurm_script")
    assert (lost.returncode, lost.stderr.count("\n")) == (2, 1)
    assert "slurm_script does not find its repository: submit it from there" in lost.stderr


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """The batch job of the scripts' page, with one process on each of its machines."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "scripts" / "README.md").read_text(), flags=re.DOTALL)
    (text,) = [block for block in blocks if "#SBATCH" in block]
    assert text.count("NPROC=auto") == 1
    file = tmp_path / "job.sh"
    file.write_text(text.replace("NPROC=auto", "NPROC=1"))
    return file


def test_the_batch_job_is_sound(job: Path) -> None:
    assert subprocess.run(["bash", "-n", job], check=False).returncode == 0
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not shellcheck:
        pytest.skip("without shellcheck")
    found = subprocess.run([shellcheck, "-e", "SC2016", job], capture_output=True, text=True, check=False)
    assert found.stdout == ""


@pytest.mark.parametrize(
    ("code", "asked"),
    [(0, ""), (2, ""), (138, "scontrol requeue 7\n"), (143, "sleep 3600\n")],
    ids=["done", "failed", "before its time is over", "preempted"],
)
def test_what_the_batch_job_asks_of_slurm(code: int, asked: str, job: Path, tmp_path: Path) -> None:
    """Preempted, it waits for Slurm, which does not queue again what has ended by itself."""
    for name in ("srun", "scontrol", "sleep"):
        said = f'[ {name} = scontrol ] && [ "$1" = show ] || echo {name} "$@" >> {tmp_path}/asked\n'
        (tmp_path / name).write_text(f"#!/bin/sh\n{f'exit {code}' if name == 'srun' else said}")
        (tmp_path / name).chmod(0o755)
    settings = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_NNODES": "1"}
    settings |= {"SLURM_CPUS_PER_TASK": "1", "SLURM_JOB_NODELIST": "host0"}
    found = bash(str(job), cwd=ROOT, **settings)
    assert found.returncode == code, found.stderr
    file = tmp_path / "asked"
    assert (file.read_text() if file.exists() else "") == asked


SRUN = """#!{python}
# As Slurm's: the command on two machines; in the first start SIGUSR1 to their processes when they have saved.
import os, pathlib, signal, subprocess, sys, time
output = pathlib.Path(os.environ["OUTPUT"])
first = not output.exists()
nodes = [subprocess.Popen(sys.argv[1:], env={{**os.environ, "SLURM_NODEID": str(k)}}) for k in range(2)]
while first and not (output / "last.pt").exists() and all(node.poll() is None for node in nodes):
    time.sleep(0.01)
for node in nodes:
    if first:
        node.send_signal(signal.SIGUSR1)
sys.exit(max(node.wait() for node in nodes))
"""


@pytest.mark.slow
def test_the_batch_job_saves_and_is_queued_again(job: Path, small_npz: Path, tmp_path: Path) -> None:
    output, commands = tmp_path / "run", tmp_path / "bin"
    commands.mkdir()
    scontrol = '#!/bin/sh\n[ "$1" = requeue ] && echo "$2" >> "$OUTPUT.requeued" || echo 127.0.0.1\n'
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", scontrol)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    settings = {"PATH": f"{commands}:{os.environ['PATH']}", "OUTPUT": str(output), "PYTHON": sys.executable}
    settings |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "host[0-1]"}
    settings["OMP_NUM_THREADS"] = "1"  # both machines are this one: with as many threads as cores they wait on another
    flags = ["--data", str(small_npz), "--arch", "densenet_cifar", "--batch-size", "8", "--device", "cpu"]
    flags += ["--teacher-arch", "densenet_cifar", "--teacher-checkpoint", teacher_file(tmp_path / "teacher.pth")]
    flags += ["--epochs", "2", "--save-minutes", "0", "--output", str(output)]
    found = bash(str(job), *flags, cwd=ROOT, **settings)
    assert found.returncode == 138, found.stderr
    assert found.stderr.count("stopped by SIGUSR1") == 1
    assert Path(f"{output}.requeued").read_text() == f"{os.getpid()}\n"
    found = bash(str(job), *flags, cwd=ROOT, **settings)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("continuing at epoch") == 1
    assert (output / "summary.json").exists()
