"""Where runs lie, and how the run of a recipe is found again."""

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill.config.recipe import Options, Recipe
from distill.errors import UserError
from distill.parallel.processes import on_main
from distill.run.directory import CHECKPOINTS, RunDirectory
from distill.run.identity import differing


@on_main
def find_directory(options: Options, recipe: Recipe, data_name: str, data_digest: str) -> Path:
    """Returns the directory of a run: --output, or checkpoints/DATA/ARCH/RUN; with --fresh the next name that is free.

    Where DATA has no such run yet, the run of this recipe on the same images under another name is taken: a job finds
    its run wherever its images are staged. Raises UserError.
    """
    usual = CHECKPOINTS / data_name / recipe.arch / recipe.run_name
    path = Path(options.output) if options.output else usual
    if options.fresh and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        raise UserError("--fresh would start over at each restart: name a new --output in place of it")
    if options.fresh and path.exists():
        path = next_free(path)
        print(f"starting over in {path}; to continue it, --output {path} in place of --fresh")
    if options.fresh or options.output:
        return path
    candidates = runs_on(data_digest, recipe.arch, glob.escape(recipe.run_name), data_name)
    runs = [run for run, config in candidates if _is_of(config, recipe, options.extend)]
    if runs:  # of several under other names the one that is furthest
        path = max(runs, key=lambda run: (run.has_begun(), run.path == usual, len(run.records()))).path
    if path != usual:
        print(f"note: {path} is the run of this recipe on these images, under another name of theirs")
    return path


def _is_of(config: dict[str, Any], recipe: Recipe, extend: bool) -> bool:
    """Returns whether config.json is of `recipe`; with `extend` also if it is of fewer epochs."""
    try:
        before = type(recipe).from_dict(config["recipe"])
    except (UserError, TypeError):  # of another version, or of another kind of images
        return False
    changed = differing(before.to_dict(), recipe.to_dict())
    return not changed or (extend and changed == ["epochs"] and before.epochs < recipe.epochs)


def runs_on(data_digest: str, arch: str, pattern: str, data_name: str) -> Iterator[tuple[RunDirectory, dict[str, Any]]]:
    """Yields the runs of `arch` on images of this digest, each with its config.json.

    `pattern`: of their directories' names. The images may have any name; runs under `data_name` come first, and one of
    these that cannot be read raises UserError.
    """
    for folder in sorted(CHECKPOINTS.glob("*"), key=lambda folder: (folder.name != data_name, folder.name)):
        for path in sorted((folder / arch).glob(pattern)):
            run = RunDirectory(path)
            try:
                config = run.read_config()
            except UserError:
                if folder.name == data_name:
                    raise
                continue
            if config and config["facts"].get("data_digest") == data_digest:
                yield run, config


def next_free(path: Path) -> Path:
    """Returns `path`, or `path` with the first of -2, -3, ... that does not exist yet."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free
