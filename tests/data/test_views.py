"""A view is a pure function of the image and (policy, view seed, i, v); an epoch's order is one of (seed, epoch)."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as reference

from cifar10.augment import CropFlip, Cutout, NoChange, Original, build_policy
from cifar10.data import load_data
from distill.config.recipe import Recipe
from distill.data import draws
from distill.data.datasets import TensorData
from distill.data.draws import ViewDraws, permutation, raw_draws, uniforms
from distill.data.order import EpochPlan, ViewOrder, split_validation
from distill.data.views import ViewPolicy, check_cutout
from distill.errors import UserError

IMAGES = load_data("sample").train_images
RECORDED_DRAWS = [3998611724445730424, 4336785009336206839, 15072604215656766132]
RECORDED_PERMUTATION = [2, 6, 7, 1, 5, 4, 0, 3]
POLICIES: list[ViewPolicy] = [
    CropFlip(),
    CropFlip(2, reflect=True),
    Original(0),
    NoChange(),
    Cutout(CropFlip(), 16, 0),
    Cutout(Original(0), 7, 0),
]


# ------------------------------------------------------------------------------------------------- numbers by counter
def test_draws_are_a_fixed_function() -> None:
    """Recorded once: if these change, every stored run and every stored teacher answer means something else."""
    assert raw_draws(0, "image order", 0, 3).tolist() == RECORDED_DRAWS
    assert permutation(1, "image order", 2, 8).tolist() == RECORDED_PERMUTATION


def test_draws_depend_on_each_key_and_not_on_the_count() -> None:
    draws = raw_draws(3, "a", 5, 100)
    assert np.array_equal(draws[:10], raw_draws(3, "a", 5, 10))
    for other in (raw_draws(4, "a", 5, 100), raw_draws(3, "b", 5, 100), raw_draws(3, "a", 6, 100)):
        assert not np.array_equal(draws, other)
    assert np.array_equal(uniforms(0, "x", 0, (50, 4))[:7], uniforms(0, "x", 0, (7, 4)))


def test_uniforms_are_uniform() -> None:
    numbers = uniforms(0, "x", 0, (100_000,))
    assert 0 <= numbers.min() < 1e-3
    assert 1 - 1e-3 < numbers.max() < 1
    assert np.histogram(numbers, bins=10, range=(0, 1))[0] == pytest.approx(np.full(10, 10_000), abs=500)


# ---------------------------------------------------------------------------------------------------------- view order
def test_every_image_shows_each_of_its_views_once_in_a_cycle() -> None:
    indices = np.arange(100)
    order = ViewOrder(CropFlip(), 0, 100, None)
    shown = np.stack([order.views(epoch, indices) for epoch in range(162)])
    assert (np.sort(shown, axis=0) == np.arange(162)[:, None]).all()
    assert np.array_equal(order.views(162, indices), shown[0])
    assert len(set(map(tuple, shown.T))) == 100  # each image has an order of its own


def test_fewer_views_are_the_first_of_all() -> None:
    indices = np.arange(50)
    every, eight = ViewOrder(CropFlip(), 0, 50, None), ViewOrder(CropFlip(), 0, 50, 8)
    for epoch in range(8):
        assert np.array_equal(every.views(epoch, indices), eight.views(epoch, indices))
    assert np.array_equal(eight.views(8, indices), eight.views(0, indices))


def test_order_does_not_depend_on_the_number_of_images() -> None:
    few, many = ViewOrder(CropFlip(), 0, 10, None), ViewOrder(CropFlip(), 0, 9000, None)
    assert np.array_equal(few.views(3, np.arange(10)), many.views(3, np.arange(10)))


def test_continuous_policies_show_a_new_view_each_epoch() -> None:
    assert ViewOrder(Original(0), 0, 5, None).views(7, np.arange(5)).tolist() == [7] * 5
    assert ViewOrder(Original(0), 0, 5, 3).views(7, np.arange(5)).tolist() == [1] * 5
    assert ViewOrder(NoChange(), 0, 5, None).views(7, np.arange(5)).tolist() == [0] * 5


def test_plan_is_the_same_from_any_step() -> None:
    plan = EpochPlan(np.arange(3, 103), ViewOrder(CropFlip(), 0, 103, None), seed=1, batch_size=8)
    whole = list(plan.shuffle(4)[0])
    assert len(whole) == plan.steps_per_epoch == 12  # the last partial batch is dropped
    dropped = plan.shuffle(4)[1]
    seen = np.concatenate([selection.indices for selection in whole])
    assert len(set(seen)) == 96
    assert set(seen) | set(dropped.indices) == set(plan.indices)
    assert seen.min() >= 3
    for selection, again in zip(whole[5:], plan.shuffle(4, 5)[0], strict=True):
        assert np.array_equal(selection.indices, again.indices)
        assert np.array_equal(selection.views, again.views)
        assert selection.epoch == again.epoch == 4
    assert not np.array_equal(whole[0].indices, next(plan.shuffle(5)[0]).indices)


def test_validation_split_is_one_for_all() -> None:
    trained, held_out = split_validation(100, 10)
    assert sorted([*trained, *held_out]) == list(range(100))
    assert set(held_out) <= set(split_validation(100, 20)[1])


# ------------------------------------------------------------------------------------------------------------ policies
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
def test_view_does_not_depend_on_batch_or_order(policy: ViewPolicy) -> None:
    indices = torch.tensor([5, 1999, 0, 731, 5, 64, 65, 1023, 1024, 12])
    views = torch.tensor([0, 3, 161, 80, 81, 7, 7, 100, 2, 161]) % (policy.view_count or 162)
    together = policy.render(IMAGES[indices], indices, views)
    assert together.dtype == torch.uint8
    assert together.shape == (10, 32, 32, 3)
    order = torch.tensor([9, 3, 1, 0, 7, 8, 5, 2, 6, 4])
    assert torch.equal(policy.render(IMAGES[indices[order]], indices[order], views[order]), together[order])
    for k in range(10):
        alone = policy.render(IMAGES[indices[k : k + 1]], indices[k : k + 1], views[k : k + 1])
        assert torch.equal(alone[0], together[k])


@pytest.mark.parametrize("name", ["crop_flip", "original", "none"])
def test_view_does_not_depend_on_the_position_in_a_run(name: str) -> None:
    """The pixels of (i, v) are the same whichever seed, batch size, epoch or subset of the images brought it up."""
    seen: dict[tuple[int, int], torch.Tensor] = {}
    again = 0
    for seed, batch_size, count in ((0, 16, 64), (1, 7, 64), (2, 32, 40)):
        policy = build_policy(Recipe(augment=name, views=3 if name != "none" else 1))
        order = ViewOrder(policy, 0, 64, 3 if name != "none" else 1)
        plan = EpochPlan(np.arange(count), order, seed, batch_size)
        for epoch in (0, 1, 5):
            for batch in TensorData(IMAGES[:64], torch.zeros(64), plan, policy).batches(epoch, first_step=1):
                views = order.views(epoch, batch.indices.numpy()).tolist()
                for pixels, i, v in zip(batch.images, batch.indices.tolist(), views, strict=True):
                    again += (i, v) in seen
                    assert torch.equal(seen.setdefault((i, v), pixels), pixels)
    assert again > 50


def test_mixture_is_part_of_the_view() -> None:
    """Partner, share and pixels of (i, v) are the same in any batch, and what the formula says."""
    policy, labels = CropFlip(), torch.arange(64)
    order = ViewOrder(policy, 0, 64, 3)
    seen: dict[tuple[int, int], tuple[torch.Tensor, int, float]] = {}
    again = 0
    for seed, batch_size in ((0, 16), (1, 7)):
        plan = EpochPlan(np.arange(4, 60), order, seed, batch_size)
        for epoch in (0, 1, 3):
            for batch in TensorData(IMAGES[:64], labels, plan, policy, ViewDraws(0, "mixup", 2)).batches(epoch):
                assert batch.mixture is not None
                assert torch.equal(batch.labels, batch.indices)
                mixed = zip(
                    batch.images, batch.mixture.labels.tolist(), batch.mixture.coefficient.tolist(), strict=True
                )
                views = order.views(epoch, batch.indices.numpy()).tolist()
                for i, v, found in zip(batch.indices.tolist(), views, mixed, strict=True):
                    again += (i, v) in seen
                    first = seen.setdefault((i, v), found)
                    assert torch.equal(first[0], found[0])
                    assert first[1:] == found[1:]
    assert again > 50
    for (i, v), (pixels, partner, share) in seen.items():
        pair = torch.tensor([i, partner])
        own, other = policy.render(IMAGES[pair], pair, torch.tensor([v, v])).double()
        assert (pixels - (share * own + (1 - share) * other)).abs().max() <= 0.51
    partners, shares = [found[1] for found in seen.values()], [found[2] for found in seen.values()]
    assert 4 <= min(partners) <= max(partners) < 60  # of the images that are trained on
    assert len(set(partners)) > 40
    assert np.mean(shares) == pytest.approx(0.5, abs=0.07)
    assert np.min(shares) < 0.05 < 0.95 < np.max(shares)


def test_view_does_not_depend_on_threads() -> None:
    indices = torch.arange(256)
    threads = torch.get_num_threads()
    try:
        for policy in (CropFlip(), Original(0)):
            found = []
            for number in (1, 2):
                torch.set_num_threads(number)
                found.append(policy.render(IMAGES[:256], indices, indices % 5))
            assert torch.equal(*found)
    finally:
        torch.set_num_threads(threads)


def test_crop_flip_has_exactly_162_views() -> None:
    image = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8)
    views = torch.arange(162)
    rendered = CropFlip().render(image.expand(162, -1, -1, -1), torch.zeros(162, dtype=torch.long), views)
    padded = torch.nn.functional.pad(image, (0, 0, 4, 4, 4, 4))
    for view in range(162):
        row, column = view % 81 // 9, view % 9
        expected = padded[row : row + 32, column : column + 32]
        assert torch.equal(rendered[view], expected.flip(1) if view >= 81 else expected)
    assert len({bytes(v.numpy()) for v in rendered}) == 162
    assert torch.equal(rendered[40], image)  # the middle crop, not flipped


@pytest.mark.parametrize("padding", [0, 2, 5])
def test_reflected_padding(padding: int) -> None:
    image = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8)
    policy = CropFlip(padding, reflect=True)
    side = 2 * padding + 1
    assert policy.view_count == 2 * side**2
    views = torch.arange(policy.view_count)
    rendered = policy.render(image.expand(len(views), -1, -1, -1), torch.zeros_like(views), views)
    padded = np.pad(image.numpy(), ((padding, padding), (padding, padding), (0, 0)), mode="reflect")
    for view in range(side**2):
        row, column = view // side, view % side
        expected = torch.from_numpy(padded[row : row + 32, column : column + 32].copy())
        assert torch.equal(rendered[view], expected)
        assert torch.equal(rendered[view + side**2], expected.flip(1))


@pytest.mark.parametrize("views", [None, 7])
def test_flips_alternate(views: int | None) -> None:
    """Of two epochs one shows an image flipped; which one is a matter of chance, and so are the crops."""
    policy = Cutout(CropFlip(alternating=True), 4, 0)
    order = ViewOrder(policy, 0, 2000, views)
    shown = np.stack([order.views(epoch, np.arange(2000)) for epoch in range(views or 162)])
    flipped = shown >= 81
    assert (flipped[1:] != flipped[:-1]).all()
    assert flipped[0].mean() == pytest.approx(0.5, abs=0.05)
    assert all(len(set(column)) == len(column) for column in shown.T[:50])
    assert len(set(shown[0] % 81)) == 81


def test_policies_that_show_other_views_have_other_names() -> None:
    changes: list[dict[str, Any]] = [{}, {"padding": 2}, {"reflect": True}, {"alternate_flip": True}, {"cutout": 8}]
    assert len({build_policy(Recipe(**change)).name for change in changes}) == len(changes)
    assert build_policy(Recipe()).name == "crop_flip"  # the key of stores that there are
    with pytest.raises(UserError, match="--reflect and --alternate-flip belong to --augment crop_flip"):
        Recipe(augment="original", reflect=True)


def test_original_agrees_with_torchvision_on_pil_images() -> None:
    """The same parameters given to torchvision's PIL transforms give the same pixels, but for rounding at edges."""
    policy, view = Original(0), 3
    indices = torch.arange(60)
    rendered = policy.render(IMAGES[:60], indices, torch.full((60,), view))
    for i, drawn in enumerate(uniforms(0, "original", view, (60, 10))):
        padded = np.pad(IMAGES[i].numpy(), ((4, 4), (4, 4), (0, 0)))
        row, column = (int(k * 9) for k in drawn[:2])
        image = Image.fromarray(np.ascontiguousarray(padded[row : row + 32, column : column + 32]))
        if drawn[2] >= 0.5:
            image = reference.hflip(image)
        image = reference.rotate(image, 15 * (2 * drawn[3] - 1))
        steps = [reference.adjust_brightness, reference.adjust_contrast, reference.adjust_saturation]
        for step in np.argsort(drawn[7:]):
            image = steps[step](image, 1 + 0.2 * (2 * drawn[4 + step] - 1))
        difference = (rendered[i].int() - torch.from_numpy(np.array(image)).int()).abs()
        assert (difference > 2).float().mean() < 0.02


def test_cutout_blots_out_one_square() -> None:
    images, indices = torch.full((2000, 32, 32, 3), 255, dtype=torch.uint8), torch.arange(2000)
    rendered = Cutout(NoChange(), 16, 0).render(images, indices, indices % 7)
    blotted = (rendered == torch.tensor(Cutout.colour)).all(3)
    assert torch.equal(blotted, (rendered != 255).any(3))
    rows, columns = blotted.any(2).sum(1), blotted.any(1).sum(1)
    assert torch.equal(blotted.sum((1, 2)), rows * columns)  # a rectangle: a square that the edge may cut
    assert rows.min() == columns.min() == 8
    assert rows.max() == columns.max() == 16
    centre = blotted.float().mean(0)
    assert centre[16, 16] == pytest.approx(1 / 4, abs=0.04)
    assert centre[0, 0] == pytest.approx(1 / 16 * 1.13, abs=0.03)


@pytest.mark.parametrize("side", [8, 9])
def test_a_cutout_that_leaves_nothing_is_refused_and_one_less_leaves_some(side: int) -> None:
    images, indices = torch.full((2000, side, side, 3), 255, dtype=torch.uint8), torch.arange(2000)
    for size in (2 * side - 2, 2 * side - 1):
        rendered = Cutout(NoChange(), size, 0).render(images, indices, indices * 0)
        assert bool((rendered == 255).any()) == (size < 2 * side - 1)
    check_cutout(2 * side - 2, side)
    for size in (2 * side - 1, 2 * side, 1000):
        with pytest.raises(
            UserError, match=f"--cutout {size} blots out every image of {side} pixels: .* {2 * side - 2} "
        ):
            check_cutout(size, side)


def test_view_seeds_differ() -> None:
    indices = torch.arange(8)
    one, two = (Original(seed).render(IMAGES[:8], indices, indices * 0) for seed in (0, 1))
    assert not torch.equal(one, two)
    assert not np.array_equal(
        ViewOrder(CropFlip(), 0, 8, None).views(0, np.arange(8)),
        ViewOrder(CropFlip(), 1, 8, None).views(0, np.arange(8)),
    )


def test_more_views_than_there_are() -> None:
    with pytest.raises(UserError, match="--views must be at most 162"):
        build_policy(Recipe(views=163))


def test_draws_of_views_that_are_over_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch of continuous views has one of its own; of numbered ones each batch shows many."""
    monkeypatch.setattr(draws, "IDLE", 5)
    indices = torch.arange(30)
    drawn, expected = ViewDraws(0, "x", 2), [ViewDraws(0, "x", 2).rows(indices, torch.full((30,), v)) for v in range(9)]
    for view in range(9):
        for _ in range(10):
            assert np.array_equal(drawn.rows(indices, torch.full((30,), view)), expected[view])
        assert len(drawn._tables) <= 2
    for _ in range(20):
        found = drawn.rows(indices, indices % 9)
        assert all(np.array_equal(row, expected[i % 9][i]) for i, row in enumerate(found))
    assert len(drawn._tables) == 9
