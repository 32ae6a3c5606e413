"""The sheet of views: what a run trains on, and the right classes beside it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifar10.data import load_data, prepare
from distill.config.recipe import Recipe
from distill.errors import UserError
from scripts import show_views
from tests.runs import CPU

pytestmark = pytest.mark.usefixtures("home")


def tile(sheet: Path, row: int, column: int, size: int, factor: int) -> np.ndarray:
    """The pixels of one image of a sheet, at their own size."""
    step = factor * size + show_views.GAP
    left, top = show_views.GAP + column * step, show_views.GAP + row * (step + show_views.LINE) + show_views.LINE
    with Image.open(sheet) as opened:
        picture = np.asarray(opened)
    return picture[top : top + factor * size : factor, left : left + factor * size : factor]


def test_the_sheet_has_what_a_run_trains_on(
    small_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each tile is the image in the batch of that epoch that trains on it."""
    sheet, data = tmp_path / "views.png", load_data(str(small_npz))
    flags = ["--data", str(small_npz), "--mixup", "--cutout", "8", "--batch-size", "8"]
    show_views.main([*flags, "-o", str(sheet), "--images", "6", "--columns", "3"])
    assert "6 images in 3 views of 32 pixels, policy crop_flip+cutout8" in capsys.readouterr().out
    training, _ = prepare(data, Recipe(mixup=True, cutout=8, batch_size=8), CPU)
    numbers = show_views.choose(training.plan.indices, data, 6)
    assert data.train_labels[numbers].tolist() == [0, 1, 2, 3, 0, 1]
    for epoch in range(3):
        for batch in training.batches(epoch):
            for number, image in zip(batch.indices.tolist(), batch.images, strict=True):
                if number in numbers:
                    assert np.array_equal(tile(sheet, numbers.index(number), epoch, 32, 3), image.numpy())


@pytest.mark.slow
def test_photos(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--dataset", "imagenet", str(photos), "--workers", "0", "--batch-size", "4", "--render-size", "48"]
    show_views.main([*flags, "-o", str(tmp_path / "views.png"), "--images", "3", "--columns", "2"])
    assert "3 images in 2 views of 48 pixels, policy crop" in capsys.readouterr().out
    with Image.open(tmp_path / "views.png") as picture:
        assert picture.size[0] == show_views.GAP + 2 * (2 * 48 + show_views.GAP)


def test_where_it_cannot_be_written(small_npz: Path, tmp_path: Path) -> None:
    flags = ["--data", str(small_npz), "--batch-size", "8"]
    with pytest.raises(UserError, match=r"--sheet .*: there is no such directory"):
        show_views.main([*flags, "-o", str(tmp_path / "none" / "views.png")])
    with pytest.raises(UserError, match=r"--sheet .*: unknown file extension"):
        show_views.main([*flags, "-o", str(tmp_path / "views.xyz")])
