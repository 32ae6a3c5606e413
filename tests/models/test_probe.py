"""What a network is found to need by trying a copy of it; the network, and the run's generators, stay as they are."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from cifar10.models import CIFAR_INPUT, MODELS
from distill.config.recipe import Recipe
from distill.errors import UserError
from distill.files import checkpoint
from distill.models import probe as trial
from distill.models.classifier import Classifier
from distill.parallel import devices
from distill.training.wrap import check_batch_norm


def network(*head: nn.Module) -> Classifier:
    """A convolution, and after the average over the image `head`, with 4 channels."""
    return Classifier(nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head), CIFAR_INPUT)


def test_one_image_is_too_few_for_one_value_a_channel() -> None:
    """By what the network does, not by its name; frozen statistics want nothing."""
    frozen = nn.BatchNorm1d(4).eval()
    frozen.train = lambda _mode=True: frozen  # type: ignore[method-assign]
    assert trial.wants_two(network(nn.BatchNorm1d(4)))
    assert trial.wants_two(network(nn.Dropout(0.5), nn.Unflatten(1, (4, 1, 1)), nn.BatchNorm2d(4), nn.Flatten()))
    assert not trial.wants_two(network(nn.Linear(4, 2)))
    assert not trial.wants_two(network(frozen))
    assert trial.wants_two(network(nn.Linear(4, 2)), work=network(nn.BatchNorm1d(4)))
    assert not trial.wants_two(Classifier(MODELS.build("efficientnet_b0", 10), CIFAR_INPUT))


def test_a_trial_moves_nothing() -> None:
    tried = network(nn.Dropout(0.5), nn.BatchNorm1d(4)).eval()
    before, drawn = checkpoint.digest(tried.state_dict()), torch.get_rng_state()
    assert trial.wants_two(tried)
    assert checkpoint.digest(tried.state_dict()) == before
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not any(module.training for module in tried.modules())


def test_another_error_of_a_network_is_its_own() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        trial.wants_two(network(nn.Linear(5, 2)))


@pytest.mark.parametrize(
    ("recipe", "processes", "gpus", "message"),
    [
        (Recipe(batch_size=1), 1, 1, "--batch-size 1 is one image at a time, .* net .*: --batch-size 2 is the least"),
        (Recipe(batch_size=4, accumulate=4), 1, 1, "--batch-size 4 in 4 parts of --accumulate is .*: --batch-size 8 "),
        (Recipe(batch_size=2), 2, 1, "--batch-size 2 over 2 processes is one image"),
        (Recipe(batch_size=6, accumulate=2), 3, 1, "in 2 parts of --accumulate and over 3 processes is one image"),
        (Recipe(batch_size=5), 1, 4, "--batch-size 5 over 4 GPUs is one image"),
        (Recipe(batch_size=9), 1, 4, None),  # 3, 3, 3 and a GPU that has none
        (Recipe(batch_size=10), 1, 4, "--batch-size 10 over 4 GPUs is one image"),  # 3, 3, 3, 1
        (Recipe(batch_size=8, accumulate=2), 2, 1, None),
        (replace(Recipe(batch_size=2), sync_bn=True), 2, 1, None),
    ],
)
def test_the_smallest_part_of_a_batch(
    recipe: Recipe, processes: int, gpus: int, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("distill.parallel.devices", "distill.training.wrap"):
        monkeypatch.setattr(f"{module}.world_size", lambda: processes)
    monkeypatch.setattr(devices, "devices", lambda _: [torch.device("cpu")] * gpus)
    tried = network(nn.BatchNorm1d(4))
    if message is None:
        check_batch_norm(tried, "net", recipe, "auto")
        return
    with pytest.raises(UserError, match=message):
        check_batch_norm(tried, "net", recipe, "auto")
    check_batch_norm(network(nn.Linear(4, 2)), "net", recipe, "auto")
