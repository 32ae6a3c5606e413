"""What there is to say of photos before the first step: each is decoded once, and what was found is remembered."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from distill.data.folders import Labelled
from distill.data.pixels import FIRST, say_dim, say_turned
from distill.errors import BrokenImage, CheckpointError, UserError
from distill.files import checkpoint
from distill.parallel.processes import first_here
from distill.run.directory import CHECKPOINTS
from distill.training.evaluation import raise_broken
from imagenet.loader import PART, Findings, Workers

SECTION = 20_000
"""Photos that are remembered together: what was cut decodes no more of them again."""


class Photos(Protocol):
    """What is known of photos here."""

    @property
    def files(self) -> Sequence[str]:
        """Returns the paths."""
        ...


def survey(training: Photos, tests: Mapping[str, Photos], workers: Workers) -> None:
    """Decodes all photos of `tests` and the first 1,000 of `training`, and print what is odd about them.

    Of several processes on a machine one decodes. Raises BrokenImage with all that cannot be decoded.
    """
    start = list(training.files[:FIRST])
    with first_here():
        evaluated = look([file for test in tests.values() for file in test.files], "photos to evaluate on", workers)
        trained = look(start, "training photos", workers)
    raise_broken(evaluated.broken | trained.broken)
    say_turned(trained.turned, len(start))
    say_dim(evaluated.dim + trained.dim)


def look(files: list[str], what: str, workers: Workers) -> Findings:
    """What is to be said of files; remembered as long as none of them changes, wherever they are called from."""
    sections = [files[begin : begin + SECTION] for begin in range(0, len(files), SECTION)]
    caches = [CHECKPOINTS / "cache" / f"survey-{_stamp(section)}.pt" for section in sections]
    found = {cache: _remembered(cache, workers) for cache in caches}
    new = {cache: section for cache, section in zip(caches, sections, strict=True) if found[cache] is None}
    if new:
        start, count = time.perf_counter(), sum(map(len, new.values()))
        parts = sum(-(-len(section) // PART) for section in new.values())
        with tqdm(desc=f"decoding {what}", total=parts, disable=None) as bar:
            for cache, section in new.items():
                findings = Findings()
                for part in workers.examine(section, "torchvision"):
                    findings += part
                    bar.update()
                broken = {os.path.abspath(file): cause for file, cause in findings.broken.items()}
                dim = [os.path.abspath(file) for file in findings.dim]
                found[cache] = Findings(broken, findings.turned, dim)
                checkpoint.save_cache(cache, {"broken": broken, "turned": findings.turned, "dim": dim})
        print(f"{count} {what} decoded once, in {time.perf_counter() - start:.1f} s")
    total = sum(filter(None, found.values()), Findings())
    named = {os.path.abspath(file): file for file in files} if total.broken or total.dim else {}
    broken = {named[file]: cause for file, cause in total.broken.items()}
    return Findings(broken, total.turned, [named[file] for file in total.dim])


def _remembered(cache: Path, workers: Workers) -> Findings | None:
    """Returns what `cache` says; the files that were broken are looked at again, as a disk may have recovered."""
    if not cache.exists():
        return None
    try:
        cached = checkpoint.load(cache)
    except CheckpointError as error:
        print(f"{error}; looking at its photos again")
        return None
    again = sum(workers.examine(list(cached["broken"]), "torchvision"), Findings())
    return Findings({}, cached["turned"], cached["dim"]) + again


def without_broken(listed: dict[str, Labelled], workers: Workers) -> dict[str, Labelled]:
    """The photos that can be decoded, of both splits; the others are named. Raises UserError if they are many."""
    kept = {}
    for split, pairs in listed.items():
        broken = look([file for file, _ in pairs], f"{split} photos", workers).broken
        if len(broken) > max(1, len(pairs) // 1000):
            counts = f"{len(broken)} of {len(pairs)} {split} photos are broken, more than 0.1 %"
            raise UserError(f"{counts}: {BrokenImage(broken).causes}")
        for file, cause in broken.items():
            print(f"left out: cannot decode {file}: {cause}")
        kept[split] = [(file, label) for file, label in pairs if file not in broken]
    return kept


def _stamp(files: list[str]) -> str:
    """Digest of where files lie, of their sizes and times."""
    parts: list[object] = [2]  # of what is remembered
    for file in files:
        try:
            status = os.stat(file)
        except OSError:  # decoding says what is wrong
            parts.append(os.path.abspath(file))
        else:
            parts += [os.path.abspath(file), status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    return checkpoint.digest(parts)[:32]
