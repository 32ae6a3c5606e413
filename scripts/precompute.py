"""Let a teacher answer views ahead of time, so that students need not wait for it; look after what is stored.

    python scripts/precompute.py --teacher-arch resnet152 --data DIR --views 40     fill, or continue to fill, a store
    python scripts/precompute.py --list                                             the stores, their size and coverage
    python scripts/precompute.py --teacher-arch resnet152 --data DIR --verify 1000  ask again for a sample, and compare
    python scripts/precompute.py --prune NAME                                       remove a store, after asking

The flags are those of trainKD.sh, with --dataset imagenet those of train.sh --kd: what a view is, and which teacher
answers, must be the same as in training.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from distill.config import cli  # noqa: E402
from distill.errors import UserError  # noqa: E402
from distill.losses.kd_loss import KD  # noqa: E402
from distill.options import option  # noqa: E402
from scripts.dataset import take_dataset  # noqa: E402


@dataclass(frozen=True)
class Stores:
    """What is done with stores."""

    list: bool = option(False, "show the stores and exit", group="stores")
    verify: int | None = option(None, "ask again for this many stored answers, and compare", group="stores", least=1)
    prune: str | None = option(None, "remove the store of this name, after asking", group="stores")
    yes: bool = option(False, "remove without asking", group="stores")


def main(argv: Sequence[str]) -> int:
    dataset, argv = take_dataset(argv)
    recipe, options = cli.parse(
        argv,
        prog="precompute.py",
        recipes=dataset.recipes,
        default=dataset.default_kd,
        description="Let a teacher answer views ahead of time.",
        examples=(__doc__ or "").split("\n\n", 1)[1].split("\n\n")[0],
        options=dataset.with_flags(Stores)(),
    )
    if options.list:
        return show()
    if options.prune:
        return prune(options.prune, options.yes)
    if len(recipe.teacher_archs) > 1:
        raise UserError(
            "precompute.py fills the store of one teacher: call it for each of --teacher-arch, for photos with the "
            "--render-size of the largest"
        )
    # Logits do not depend on the method, and this one takes images without labels; one image a step leaves out none.
    recipe = replace(recipe, method=KD(w=1.0), features=None, sizes=None)  # of the student alone
    with dataset.open(replace(recipe, batch_size=1, accumulate=1), options) as task:
        return work(task, options)


def stores() -> dict[str, dict[str, Any]]:
    from distill.teacher.cached import STORES
    from distill.teacher.store import list_stores

    return {store["path"].name: store for store in list_stores(STORES)}


def show() -> int:
    from distill.teacher.store import size

    for name, store in stores().items():
        print(f"{name}: {size(store['bytes'])}, {store['views']} views, {store['answers']:,} answers")
        print(f"  {json.dumps(store['key']) if isinstance(store['key'], dict) else store['key']}")
    if not stores():
        print("there are no stores")
    return 0


def prune(name: str, sure: bool) -> int:
    found = stores()
    if name not in found:
        raise UserError(f"there is no store {name!r}; --list shows them")
    question = f"remove {found[name]['path']} with {found[name]['answers']:,} answers? [y/N] "
    try:
        sure = sure or input(question).strip().lower() == "y"
    except EOFError:
        raise UserError("nobody answers: --yes removes without asking") from None
    if not sure:
        print("kept")
        return 0
    shutil.rmtree(found[name]["path"])
    print("removed")
    return 0


def work(task: Any, options: Any) -> int:
    """Fill the store of the teacher of `task` for its views, or ask again for a sample of it."""
    from tqdm import tqdm

    from distill.teacher.cached import cache_teachers
    from distill.teacher.ensemble import Ensemble

    recipe = task.recipe
    training, _ = task.prepare(task.find(recipe.arch).spec)
    teacher, report = task.load_teacher(recipe, options)
    # as many as the run of these flags shows, or as --views says
    view_count = recipe.views or min(recipe.epochs, training.plan.order.view_count or recipe.epochs)
    recipe, options = replace(recipe, epochs=view_count), replace(options, store=True)
    cached = cache_teachers(recipe, options, task.data, training, Ensemble(recipe.teacher_archs, (teacher,), report))
    assert cached
    (cache,) = cached.caches
    if not cache.store:
        raise UserError("nothing was stored; --store-limit GB allows more, --views K takes less")
    if options.verify:
        compared, equal, largest = cache.verify(training, options.verify)
        if not compared:
            raise UserError(f"{cache.store.path} has nothing of these views: there is nothing to ask again")
        print(
            f"{compared:,} answers asked again: {equal:,} the same to the bit, the others differ by "
            f"{largest:.3g} of the largest logit at most"
        )
        return int(largest > 0.03)  # a rounding in bfloat16 is 0.008 at most
    total = view_count * len(training.plan.indices)
    with tqdm(total=total, unit=" views", unit_scale=True, disable=None, smoothing=0.05) as bar:
        for view in range(view_count):
            for count in cached.fill(view):
                bar.update(count)
                check_stored(cache)
            check_stored(cache)  # what was left is written at the end of a view
            if bar.disable:
                print(f"view {view + 1} of {view_count}: {cache.misses:,} computed by this call")
    print(f"{total:,} views are in {cache.store.path}, {cache.misses:,} of them computed by this call")
    return 0


def check_stored(cache: Any) -> None:
    """Raises UserError once logits cannot be stored, which has been said by then."""
    if not cache.store.writes:
        raise UserError(f"{cache.store.path} has what was stored before that; the same command continues")


if __name__ == "__main__":
    cli.run(main)
