"""Train a student for each T and w, one after the other; the teacher answers each view once for all of them.

    python scripts/sweep.py --data sample --recipe sample_student_kd --T-list 1,2,3,4 --w-list 0.5,0.8,0.9

The other flags are those of trainKD.sh, with --dataset imagenet those of train.sh --kd; the runs lie side by side, with
--output DIR in that directory. Cut, the same command continues; finished runs are reported.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from distill.config import cli  # noqa: E402
from distill.errors import OtherRunError, UserError  # noqa: E402
from distill.losses.kd_loss import KD  # noqa: E402
from distill.options import flag, option  # noqa: E402
from distill.training.stop import Diverged  # noqa: E402
from scripts.dataset import take_dataset  # noqa: E402

OF_ONE_RUN = ("resume", "evaluate", "show_features")  # flags


@dataclass(frozen=True)
class Sweep:
    """What a sweep goes through."""

    T_list: str = option("1,2,3,4", "temperatures, with commas", group="sweep")
    w_list: str = option("0.5,0.8,0.9", "weights of the KD term, with commas", group="sweep")


def main(argv: Sequence[str]) -> int:
    dataset, argv = take_dataset(argv)
    lists = {"--T": "--T-list", "--tau": "--T-list", "--w": "--w-list"}
    if given := [name for name in lists if name in {token.split("=")[0] for token in argv}]:
        raise UserError(f"{given[0]} is for one run: a sweep takes {lists[given[0]]}")
    recipe, options = cli.parse(
        argv,
        prog="sweep.py",
        recipes=dataset.recipes,
        default=dataset.default_kd,
        description="Train a student for each T and w.",
        examples=(__doc__ or "").split("\n\n", 1)[1].split("\n\n")[0],
        options=dataset.with_flags(Sweep)(),
    )
    if named := [name for name in OF_ONE_RUN if getattr(options, name)]:
        raise UserError(f"{flag(named[0])} is for one run")
    method = recipe.method
    if not isinstance(method, KD) or method.w is None:
        raise UserError(
            "a sweep goes through --T and --w of --method kd, beside --features too: no other --method, no --kd-weight"
        )
    pairs = [(T, w) for T in numbers(options.T_list, "--T-list") for w in numbers(options.w_list, "--w-list")]
    # all of them are checked before the first one trains
    recipes = [replace(recipe, method=replace(method, T=T, w=w)) for T, w in pairs]
    train = dataset.module("train_kd").train
    start, rows = time.perf_counter(), list[tuple[float, float, Any]]()
    for (T, w), each in zip(pairs, recipes, strict=True):
        print(f"== T {T:g}, w {w:g}")
        try:
            output = str(Path(options.output) / each.run_name) if options.output else None
            rows.append((T, w, train(each, replace(options, output=output))))
        except (Diverged, OtherRunError) as error:
            print(error)
            rows.append((T, w, "diverged" if isinstance(error, Diverged) else "another run"))
    measured = {"test accuracy": "test_accuracy"}
    if recipe.val_split:
        measured = {"held-out accuracy, best epoch": "val_accuracy", "test accuracy, best epoch": "test_accuracy"}
    columns = ("T", "w", *measured)
    print("\n| " + " | ".join((*columns, "agreement with the teacher, last epoch", "seconds")) + " |")
    print("|---" * (len(columns) + 2) + "|")
    for T, w, summary in rows:
        if not isinstance(summary, dict):
            print(f"| {T:g} | {w:g} | {' | '.join([summary] * len(measured))} | - | - |")
            continue
        accuracies = summary["best_epoch"] if recipe.val_split else summary
        cells = [f"{T:g}", f"{w:g}", *(f"{accuracies[key]:.2f} %" for key in measured.values())]
        cells += [f"{summary['agreement']:.2f} %", f"{summary['wall_seconds']:.0f}"]
        print(f"| {' | '.join(cells)} |")
    if not recipe.val_split:
        print(
            "\nto choose among them, hold out training images: --val-split N with another --output; the test images "
            "are for the choice made"
        )
    print(f"\n{len(rows)} runs, {time.perf_counter() - start:.0f} s in this call")
    return int(any(summary == "another run" for _, _, summary in rows))


def numbers(text: str, flag: str) -> list[float]:
    """`1,2` -> [1.0, 2.0]. Raises UserError."""
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"{flag} must be numbers with commas between them, got {text!r}") from None


if __name__ == "__main__":
    cli.run(main)
