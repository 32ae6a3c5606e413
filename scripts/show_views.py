"""Draw a sheet of training images in their views, as the networks see them: a look before hours of training.

    python scripts/show_views.py --data DIR --augment original -o views.png
    python scripts/show_views.py --dataset imagenet DATA --augment randaugment -o views.png

A row is an image, under the name of its class; a column is an epoch: the first ones, as a run of these flags shows
them. The flags are those of trainCE.sh and trainKD.sh, with --dataset imagenet those of train.sh; what does not change
views changes nothing.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from distill.config import cli  # noqa: E402
from distill.options import option  # noqa: E402
from scripts.dataset import take_dataset  # noqa: E402

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

SMALL = 96  # pixels that a small image is drawn with, by whole factors
GAP, LINE = 4, 14  # pixels between images, and of a line of text


@dataclass(frozen=True)
class Sheet:
    """What is drawn, and where."""

    sheet: str = option("views.png", "the file to write", group="sheet", flags=("-o",))
    images: int = option(8, "rows", group="sheet", least=1, most=64)
    columns: int = option(8, "epochs that are shown, from the first", group="sheet", least=1, most=64)


def main(argv: Sequence[str]) -> None:
    dataset, argv = take_dataset(argv)
    teacher = any(word.replace("_", "-").startswith("--teacher-arch") for word in argv)
    recipe, options = cli.parse(
        argv,
        prog="show_views.py",
        recipes=dataset.recipes,
        default=dataset.default_kd if teacher else dataset.default_ce,
        description="Draw a sheet of training images in their views.",
        examples=(__doc__ or "").split("\n\n", 1)[1].split("\n\n")[0],
        options=dataset.with_flags(Sheet)(),
        positional="data" if dataset.published else None,
    )
    cli.check_file(options.sheet, "--sheet")
    with dataset.open(replace(recipe, batch_size=2, accumulate=1), options) as task:  # nothing is trained
        training, _ = task.prepare(task.find(recipe.arch).spec)
        numbers = choose(training.plan.indices, task.data, options.images)
        views = [render(training, numbers, epoch) for epoch in range(options.columns)]
        labels = [task.data.train_labels[number].item() for number in numbers]
    names = [task.data.classes[label] if label >= 0 else "no label" for label in labels]
    picture = draw(views, names)
    try:
        picture.save(options.sheet)
    except (OSError, ValueError) as error:
        from distill.errors import UserError

        raise UserError(f"--sheet {options.sheet}: {error}") from None
    shape = f"{len(numbers)} images in {options.columns} views of {views[0].shape[1]} pixels"
    print(f"{options.sheet}: {shape}, policy {training.policy.name}")


def choose(indices: Any, images: Any, count: int) -> list[int]:
    """Returns numbers of training images: of as many classes as there are rows, then the next image of each."""
    labels = images.train_labels[indices].tolist()
    places: dict[int, list[int]] = {}
    for number, label in zip(indices.tolist(), labels, strict=True):
        places.setdefault(label, []).append(number)
    classes = sorted(places)
    wanted = [classes[k * len(classes) // count] for k in range(count)] if len(classes) > count else classes
    chosen = [places[label][turn] for turn in range(count) for label in wanted if turn < len(places[label])]
    return chosen[:count]


def render(training: Any, numbers: Sequence[int], epoch: int) -> "Tensor":
    """Returns the images `numbers` in the views that `epoch` shows, uint8 (B, H, W, 3), as a run renders them."""
    import numpy as np

    selection = training.plan.select(epoch, np.array(numbers, dtype=np.int64))
    (batch,) = training.render([selection])
    return batch.images.cpu()


def draw(views: Sequence["Tensor"], names: Sequence[str]) -> "Image.Image":
    """Returns the sheet: a row for each image, with its name above, a column for each of `views`."""
    from PIL import Image, ImageDraw

    size = views[0].shape[1]
    factor = max(1, SMALL // size)
    step = factor * size + GAP
    sheet = Image.new("RGB", (GAP + step * len(views), (step + LINE) * len(names) + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for row, name in enumerate(names):
        top = GAP + row * (step + LINE)
        pen.text((GAP, top), name, fill="black")
        for column, images in enumerate(views):
            tile = Image.fromarray(images[row].numpy()).resize((factor * size,) * 2, Image.Resampling.NEAREST)
            sheet.paste(tile, (GAP + column * step, top + LINE))
    return sheet


if __name__ == "__main__":
    cli.run(main)
