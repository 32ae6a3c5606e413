"""The frozen teacher: in eval mode, without gradients, its answers rounded to float16; and what it knows."""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill import checkpoint
from distill.errors import UserError
from distill.fusion import rewrite
from distill.parallel import choose_precision, devices, first_here, world_size
from distill.registry import Classifier
from distill.views import TestData

FLOAT16_MAX = 65504.0
BLOCK = {"cpu": 64, "cuda": 512}  # images of up to 224 pixels at a time: on a CPU as many as its caches like
COMPARED = 1000  # images on which a rounded teacher is compared with its float32 form


class Teacher:
    """Answers images with logits. It cannot move: `check_untouched` raises if a parameter or buffer ever did.

    An answer is a function of the one image: the network always sees `block` images at once, the last of them
    repeated where there are fewer, and the logits are rounded to float16 before any use. So a run does not depend on
    which images are asked for together, nor on whether an answer is computed or comes from a store.
    `device_name`, as of parallel.devices: where it names several GPUs of one process, they answer whole blocks in turn;
    None is the network's own device.
    """

    def __init__(self, network: Classifier, device_name: str | None = None, block: int | None = None) -> None:
        self.network = network.eval().requires_grad_(False)
        self.block = block or _block(network)
        self.digest = self._content()
        own = network.mean.device
        self._devices = devices(device_name) if device_name and own.type == "cuda" and world_size() == 1 else [own]
        self._fast: list[nn.Module] = []  # on each device the network as it is called; a full store never calls it

    @property
    def at_once(self) -> int:
        """The number of images to ask for together, so that every device has a block."""
        return self.block * len(self._devices)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """images: uint8 (B, H, W, 3), on any device -> float32 (B, C) there, with values that float16 has."""
        if not self._fast:
            self._fast = self._rewritten(images)
        own, found = self.network.mean.device, []
        for number, part in enumerate(torch.split(images.to(own, non_blocking=True), self.block)):
            missing = self.block - len(part)
            whole = torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) if missing else part
            turn = number % len(self._devices)
            found.append(self._fast[turn](whole.to(self._devices[turn], non_blocking=True))[: len(part)])
        return (
            torch.cat([answers.to(own) for answers in found])
            .clamp(-FLOAT16_MAX, FLOAT16_MAX)
            .half()
            .float()
            .to(images.device)
        )

    def _rewritten(self, images: Tensor) -> list[nn.Module]:
        """The network as it is called, for each device.

        Raises UserError if its answer to an image depends on the others beside it.
        """
        slow, shape = self.network, (self.block, *images.shape[1:])
        noise = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        noise = noise.to(slow.mean.device)
        choose_precision("float32", noise.device)  # the rewriting is checked in real float32, not TF32
        fast = Classifier(rewrite(slow.network, slow.precision, slow.normalise(noise)), slow.spec)
        fast = fast.to(slow.mean.device)
        one, other = fast(noise), fast(noise.roll(1, 0)).roll(-1, 0)
        ahead = fast(torch.cat([noise[:1], noise[1:].flip(1)]))[:1]
        if max((one - other).abs().max(), (one[:1] - ahead).abs().max()) > 0.01 * one.abs().max():
            raise UserError("the teacher's answer to an image depends on the images beside it: it cannot teach here")
        return [fast, *(copy.deepcopy(fast).to(device) for device in self._devices[1:])]

    def check_untouched(self) -> None:
        """Raises RuntimeError if parameters or buffers (BatchNorm's running statistics) differ from the start."""
        if self._content() != self.digest:
            raise RuntimeError("the teacher has changed during the run: this is a bug, its results are void")

    def _content(self) -> str:
        return checkpoint.digest(self.network.network.state_dict())


def _block(network: Classifier) -> int:
    """A power of two, of about as many pixels for every size of images."""
    most = BLOCK[network.mean.device.type] * min(1.0, (224 / network.spec.size) ** 2)
    return max(16, 1 << int(math.log2(most)))


@dataclass(frozen=True)
class Known:
    """What a teacher knows of the test images: its accuracy in percent, its logits (N, C). And how its answers compare
    with those in float32: `precision`, `images` compared, `agreement` of the arg max in percent, and `error`,
    the mean absolute difference of a logit."""

    accuracy: float
    logits: Tensor
    precision: dict[str, Any]


def examine(teacher: Teacher, test: TestData, data_digest: str, cache: Path) -> Known:
    """What `teacher` knows, found once for teacher, data, precision and kind of device, and kept under `cache`.

    A damaged file of an earlier call is named and made anew.
    """
    name = str(teacher.network.precision).removeprefix("torch.")
    path = cache / f"{teacher.digest[:24]}-{data_digest[:24]}-{name}-{teacher.network.mean.device.type}.pt"
    found: dict[str, Any] = {}
    if path.exists():
        try:
            found = checkpoint.load(path)
        except checkpoint.CheckpointError as error:
            print(f"{error}; measuring the teacher again")
    if not found.keys() >= {"logits", "precision"}:
        logits, exact = _answers(teacher, test)
        compared = {"images": len(exact), "agreement": agreement(logits[: len(exact)].argmax(1), exact.argmax(1))}
        compared["error"] = (logits[: len(exact)] - exact).abs().mean().item()
        found = {"logits": logits.half(), "precision": {"precision": name, **compared}}
        checkpoint.save_cache(path, found)
    answers = found["logits"].float()
    return Known(accuracy(answers, test.labels.cpu()), answers, found["precision"])


def introduce(teacher: Teacher, test: TestData, data_digest: str, name: str, cache: Path) -> Known:
    """`examine`, and print what is found: accuracy, how its answers compare with float32, and a warning where it knows
    hardly anything. `name`: of the teacher, and where it comes from. One process of a machine examines it."""
    with first_here():
        known = examine(teacher, test, data_digest, cache)
    compared = known.precision
    print(f"teacher: {name}, test accuracy {known.accuracy:.2f} %")
    print(
        f"teacher: in {compared['precision']} its arg max agrees with float32 on {compared['agreement']:.2f} % of "
        f"{compared['images']} test images, a logit differs by {compared['error']:.2g} on average"
    )
    if warning := chance_warning(known.accuracy, known.logits.shape[1]):
        print(warning)
    return known


@torch.no_grad()
def _answers(teacher: Teacher, test: TestData) -> tuple[Tensor, Tensor]:
    """The teacher's logits (N, C) for all images, and for the first of them those of its network in float32."""
    network, found, exact, compared = teacher.network, [], [], 0
    for images, _ in test.batches():
        found.append(teacher.logits(images).cpu())
        if (wanted := COMPARED - compared) > 0:
            precision, network.precision = network.precision, choose_precision("float32", network.mean.device)
            parts = torch.split(images[:wanted].to(network.mean.device), BLOCK["cpu"])
            exact += [network(part).cpu() for part in parts]
            network.precision = precision
            compared += len(images[:wanted])
    return torch.cat(found), torch.cat(exact)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Percent of rows of `logits` (N, C) whose largest entry is at `labels` (N,)."""
    return 100 * (logits.argmax(1) == labels).double().mean().item()


def agreement(predictions: Tensor, other: Tensor) -> float:
    """Percent of images (N,) for which two networks predict the same class."""
    return 100 * (predictions == other).double().mean().item()


def chance_warning(accuracy: float, classes: int) -> str | None:
    """A line of warning for a teacher that is hardly better than guessing: within a tenth of the way to 100 %."""
    chance = 100 / classes
    if accuracy >= chance + 0.1 * (100 - chance):
        return None
    found = f"the teacher's test accuracy, {accuracy:.2f} %, is near chance ({chance:.2f} %)"
    return f"warning: {found}; wrong weights or data?"
