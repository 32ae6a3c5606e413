"""How fast a training step is, beside the step of the original repository: everything measured in turn in one call.

    python scripts/benchmark.py --arch efficientnet_b0 --teacher-arch resnet152 [--batch-size 256] [--json FILE]

Each row runs in a process of its own, which waits while another one is measured; a round takes each row once. The
table has the medians over the rounds, and the range of the ratio within a round. Random weights: they cost the same.
On a CPU our teacher answers 64 images at once: with smaller batches --seconds must hold several steps.

original        KD as the original repository ran it: float32, contiguous, its transforms by PIL in 2 loader workers,
                the teacher in train mode under no_grad in each step
original_eval   the same with the teacher in eval mode
usual           today's usual switches: channels_last, bfloat16 autocast, the same loader, the teacher in each step
ce              our CE step
empty_store     our KD step where no view is answered yet
full_store      our KD step where all are
ce_torch        with --only ce_torch: the same without models/depthwise.py
ce_contiguous   with --contiguous: CE in float32, contiguous, as the original's
kd_standardized, dkd, nkd, dist, overhaul, at, crd, ...
                with --methods: our step by other methods, the store full where they want logits; each process takes
                memory: --only at,sp,vid measures some
torchdistill, timm, timm_switches
                with --peers: KD by these libraries; benchmark_peers.py says by which settings
"""

import importlib.util
import io
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from distill import losses  # noqa: E402
from distill.config import cli  # noqa: E402
from distill.config.recipe import Options, Recipe  # noqa: E402
from distill.errors import UserError  # noqa: E402
from distill.losses.kd_loss import KD  # noqa: E402
from distill.options import option, validate  # noqa: E402

ROWS = ("original", "original_eval", "usual", "ce", "empty_store", "full_store")
PEERS = {"torchdistill": "torchdistill", "timm": "timm", "timm_switches": "timm"}
"""The package of each row of --peers."""
METHODS: dict[str, dict[str, Any]] = {
    "kd_standardized": {"standardize": True},
    **{name: {"method": name} for name in losses.METHODS if name not in ("kd", "none")},
    **{name: {"features": name} for name in losses.FEATURES},
}


@dataclass(frozen=True)
class Benchmark:
    """The flags of this script."""

    arch: str = option("efficientnet_b0", "the student", group="what", flags=("-a",))
    teacher_arch: str = option("resnet152", "the teacher", group="what")
    batch_size: int = option(256, "images a step", group="what", flags=("-b",), least=2, most=2000)
    contiguous: bool = option(False, "also a CE step in the memory format of the original", group="what")
    methods: bool = option(False, "also a step of each other method", group="what")
    peers: bool = option(False, "also a KD step of other libraries (the extra peers)", group="what")
    only: str | None = option(None, "these rows, with commas between them, and ce", group="what")
    profile: bool = option(False, "also where the time of a full_store step goes", group="what")
    device: str = option("auto", "auto, cpu, cuda or cuda:N", group="how")
    rounds: int = option(5, "how often each row is measured", group="how", least=1)
    seconds: float = option(4.0, "how long a row takes steps in a round, one at least", group="how", least=0)
    json: str | None = option(None, "write the figures to this file", group="how")

    def __post_init__(self) -> None:
        validate(self)


def main(argv: Sequence[str]) -> None:
    options = cli.parse_flags(argv, Benchmark(), prog="benchmark.py", description=__doc__ or "")
    from cifar10.models import MODELS
    from distill.parallel.devices import describe_device, devices

    device = devices(options.device)[0]
    for arch in (options.arch, options.teacher_arch):
        MODELS.resolve(arch)  # a wrong name is told before anything starts
    cli.check_file(options.json)
    rows = chosen(options)
    missing = sorted({PEERS[row] for row in rows if row in PEERS and importlib.util.find_spec(PEERS[row]) is None})
    if missing:
        raise UserError(
            f"the rows of peers need {', '.join(missing)}: pip install {' '.join(missing)}, or '.[peers]' for both"
        )
    print(f"{options.teacher_arch} -> {options.arch}, batch {options.batch_size}, {describe_device(device)}")
    seconds, memory, profile = measure(rows, options)
    found = summarise(seconds, memory, options.batch_size)
    show(found)
    print(profile, end="")
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=2) + "\n")


def chosen(options: Benchmark) -> tuple[str, ...]:
    """Returns the rows that the flags ask for. Raises UserError for a name that is none."""
    if options.only is None:
        asked = ((options.contiguous, ("ce_contiguous",)), (options.peers, PEERS), (options.methods, METHODS))
        return (*ROWS, *(row for wanted, more in asked if wanted for row in more))
    every = (*ROWS, "ce_torch", "ce_contiguous", *PEERS, *METHODS)
    if options.contiguous or options.peers or options.methods:
        raise UserError("--only names all rows: leave out --contiguous, --peers and --methods")
    names = options.only.split(",")
    if wrong := [name for name in names if name not in every]:
        raise UserError(f"--only must be of {', '.join(every)}, got {wrong[0]!r}")
    if options.profile and "full_store" not in names:
        raise UserError("--profile is of the row full_store: --only must name it")
    return tuple(row for row in every if row in names or row == "ce")


# ------------------------------------------------------------------------------------------------------------ measuring
def measure(rows: Sequence[str], options: Benchmark) -> tuple[dict[str, list[float]], dict[str, float], str]:
    """Seconds a step of each row and round, the peak memory of each row in bytes, and the profile if asked for."""
    from tqdm import tqdm

    spawn = multiprocessing.get_context("spawn")
    processes, pipes = [], {}
    for row in rows:
        pipes[row], theirs = spawn.Pipe()
        processes.append(spawn.Process(target=serve, args=(theirs, row, options)))
        processes[-1].start()
        theirs.close()
    seconds: dict[str, list[float]] = {row: [] for row in rows}
    bar = tqdm(total=len(rows) * (options.rounds + 1), desc="steps", leave=False, disable=None)
    try:
        for number in range(options.rounds + 1):  # the first one warms up
            for row in rows:
                pipes[row].send("step")
                passed = pipes[row].recv()
                if number:
                    seconds[row].append(passed)
                bar.update()
        profile = ""
        if options.profile:
            pipes["full_store"].send("profile")
            profile = pipes["full_store"].recv()
        for pipe in pipes.values():
            pipe.send("memory")
        return seconds, {row: pipe.recv() for row, pipe in pipes.items()}, profile
    except EOFError:
        raise UserError("a row's process has ended; with a smaller --batch-size it may not") from None
    finally:
        bar.close()
        for process, pipe in zip(processes, pipes.values(), strict=True):
            with suppress(OSError):
                pipe.send("end")
            process.join(10)
            process.terminate()


def serve(pipe: Connection, row: str, options: Benchmark) -> None:
    """In the process of a row: a step, the memory or a profile, as often as it is asked for."""
    import torch

    from distill.parallel.devices import devices, start

    is_ours = row in ("ce", "ce_torch", "empty_store", "full_store", *METHODS)
    device = start(options.device) if is_ours else devices(options.device)[0]
    torch.manual_seed(0)
    steps: Iterator[None]
    if is_ours:
        steps = ours(options, row, device)
    else:
        from scripts import benchmark_peers

        steps = benchmark_peers.steps(row, options.arch, options.teacher_arch, options.batch_size, device)
    while True:
        asked = pipe.recv()
        if asked == "end":
            return
        if asked == "memory":
            most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            pipe.send(torch.cuda.max_memory_allocated(device) if device.type == "cuda" else most)
        elif asked == "profile":
            with torch.profiler.profile() as profile:
                next(steps)
            pipe.send(
                profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=44)
            )
        else:
            began = time.perf_counter()
            count, passed = 0, 0.0
            at_once = 20 if device.type == "cuda" else 1  # training does not wait for a GPU in each step
            while not count or passed < options.seconds:
                for _ in range(at_once):
                    next(steps)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                count, passed = count + at_once, time.perf_counter() - began
            pipe.send(passed / count)
            time.sleep(min(1, options.seconds))  # loader workers fill their queue: not in the time of the next row


def ours(options: Benchmark, row: str, device: Any) -> Iterator[None]:
    """Steps of our engine on the embedded images; with the store empty, or with answers to every view in it."""
    import numpy as np
    import torch

    from cifar10.data import load_data, prepare
    from cifar10.models import MODELS, build_student, find
    from distill.data.datasets import TrainingData
    from distill.models import classifier
    from distill.models.classifier import Classifier
    from distill.parallel.devices import choose_teacher_precision
    from distill.run.run import Run
    from distill.teacher.cached import CachedTeacher, LogitCache
    from distill.teacher.store import Encoding, LogitStore
    from distill.teacher.teacher import Teacher
    from distill.training.engine import Trainer
    from distill.training.objectives import CrossEntropy, Objective, build_loss

    recipe = Recipe(
        arch=MODELS.resolve(options.arch),
        teacher_arch=options.teacher_arch,
        method=KD(),
        batch_size=options.batch_size,
        epochs=100_000,
        warmup=0,
    )
    images = load_data("sample")
    if device.type == "cuda":  # an epoch as long as CIFAR-10's: the ends of short ones would outweigh a GPU's steps
        pixels, labels = images.train_images.repeat(25, 1, 1, 1), images.train_labels.repeat(25)
        images = replace(images, train_images=pixels, train_labels=labels)
    data: TrainingData
    recipe = recipe.with_flags(METHODS.get(row, {}))
    data, _ = prepare(images, recipe, device)
    student, _ = build_student(recipe, images.classes, Options(), device)
    aim: Objective = CrossEntropy()
    cached: CachedTeacher | None = None
    if row == "ce_torch":
        setattr(classifier, "SmallMaps", nullcontext)  # noqa: B010 mypy knows it as no name of that module
    with tempfile.TemporaryDirectory() as name:
        if row not in ("ce", "ce_torch"):
            network = find(MODELS.resolve(options.teacher_arch))
            built, precision = network.build(len(images.classes)), choose_teacher_precision("auto", device)
            teacher = Teacher(Classifier(built, network.spec, precision).to(device))
            key = {"data": "benchmark", "teacher": row, "images": len(images.train_labels), "classes": 10}
            store, encoding = LogitStore(Path(name), key), Encoding(10)
            if row != "empty_store":
                every = np.arange(len(images.train_labels))
                logits = torch.randn(len(every), 10).half()
                for slot in range(162):
                    store.write(slot, every, logits)
            with redirect_stdout(io.StringIO()):  # the table has the names
                aim = build_loss(recipe, student, teacher, data)
            cache = LogitCache(teacher, store, encoding)
            cached = CachedTeacher(data, [cache]) if recipe.uses_teacher_logits else None
        settings = Options(device=str(device))  # one GPU, as the other rows
        trainer = Trainer(Run(Path(name), recipe, settings), student, aim, data, cached)
        trainer.model.train(None)
        for epoch in range(recipe.epochs):
            if row == "empty_store" and cached:
                cache.store = LogitStore(Path(name) / str(epoch), key)  # views come again after 162 epochs
            for batch in (cached or data).batches(epoch):
                trainer.train_step(batch)
                trainer.state.step += 1
                yield
            trainer.state.step = 0


# ------------------------------------------------------------------------------------------------------------ reporting
def summarise(
    seconds: dict[str, list[float]], memory: dict[str, float], batch_size: int
) -> dict[str, dict[str, float | list[float]]]:
    """Of each row: seconds a step and images_per_second (median), to_original and to_ce (how many times faster, median
    of the rounds' ratios, and their range), with --peers to_fastest_peer (the one of the smallest median), peak_memory
    in bytes; with --only no ratio to a row that is not measured."""
    compared = {"original": "original", "ce": "ce"} if "original" in seconds else {"ce": "ce"}
    fastest = fastest_peer({row: statistics.median(times) for row, times in seconds.items()})
    if fastest:
        compared["fastest_peer"] = fastest
    found: dict[str, dict[str, float | list[float]]] = {}
    for row, times in seconds.items():
        median = statistics.median(times)
        found[row] = {"seconds": median, "images_per_second": batch_size / median, "peak_memory": memory[row]}
        for name, other in compared.items():
            ratios = [theirs / own for theirs, own in zip(seconds[other], times, strict=True)]
            found[row][f"to_{name}"] = statistics.median(ratios)
            found[row][f"to_{name}_range"] = [min(ratios), max(ratios)]
    return found


def fastest_peer(seconds: dict[str, float]) -> str | None:
    """The row of --peers with the fewest seconds, None without such rows."""
    return min((row for row in PEERS if row in seconds), key=lambda row: seconds[row], default=None)


def show(found: dict[str, dict[str, Any]]) -> None:
    columns = {"to_original": "times the original"} if "original" in found else {}
    columns["to_ce"] = "times CE"
    fastest = fastest_peer({row: figures["seconds"] for row, figures in found.items()})
    if fastest:
        columns["to_fastest_peer"] = f"times the fastest peer ({fastest})"
    print(f"| step | images/s | ms | {' | '.join(columns.values())} | peak memory |")
    print("|---" * (4 + len(columns)) + "|")
    for row, figures in found.items():
        cells = [row, f"{figures['images_per_second']:.1f}", f"{1000 * figures['seconds']:.0f}"]
        for name in columns:
            low, high = figures[f"{name}_range"]
            cells.append(f"{figures[name]:.2f} ({low:.2f} to {high:.2f})")
        print("| " + " | ".join([*cells, f"{figures['peak_memory'] / 1e9:.2f} GB"]) + " |")


if __name__ == "__main__":
    cli.run(main)
