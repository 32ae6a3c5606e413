"""The frozen teacher: in eval mode, without gradients, its logits rounded to float16."""

import copy

import torch
from torch import Tensor, nn

from distill.errors import UserError, out_of_memory
from distill.files import checkpoint
from distill.models.classifier import Classifier, count_parameters
from distill.models.fusion import rewrite
from distill.parallel.devices import choose_precision, devices, images_at_once
from distill.parallel.processes import world_size

FLOAT16_MAX = 65504.0
BLOCK = {"cpu": 64, "cuda": 512}  # images of up to 224 pixels at a time: on a CPU as many as its caches like


class Teacher:
    """Gives images their logits. Its weights stay: `check_untouched` raises if a parameter or buffer has changed.

    The logits of an image depend on that image alone: the network always sees `block` images at once, the last of them
    repeated where there are fewer, and the logits are rounded to float16 before any use. So a run depends neither on
    which images come together, nor on whether logits are computed or come from a store.
    `device_name`, as of parallel.devices: where it names several GPUs of one process, they compute whole blocks in
    turn; None is the network's own device.
    """

    def __init__(self, network: Classifier, device_name: str | None = None, block: int | None = None) -> None:
        self.parameters = count_parameters(network.network)  # before none is to be learned
        self.network = network.eval().requires_grad_(False)
        self.block = block or images_at_once(BLOCK[network.mean.device.type], network.spec.size)
        self.digest = self._content()
        own = network.mean.device
        self._devices = devices(device_name) if device_name and own.type == "cuda" and world_size() == 1 else [own]
        self._fast: list[nn.Module] = []  # on each device the network as it is called; a full store never calls it

    @property
    def at_once(self) -> int:
        """The number of images to compute together, so that every device has a block."""
        return self.block * len(self._devices)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Returns the logits of images uint8 (B, H, W, 3) as float32 (B, C) with values that float16 has."""
        while not self._fast:
            try:
                self._fast = self._rewritten(images)
            except (RuntimeError, MemoryError) as error:
                if self.block == 1 or not out_of_memory(error):
                    raise
                self.block //= 2
                print(f"teacher: {2 * self.block} images at once are more than the memory holds: {self.block} it is")
        own, parts = self.network.mean.device, []
        for number, part in enumerate(torch.split(images.to(own, non_blocking=True), self.block)):
            missing = self.block - len(part)
            whole = torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) if missing else part
            turn = number % len(self._devices)
            parts.append(self._fast[turn](whole.to(self._devices[turn], non_blocking=True))[: len(part)])
        logits = torch.cat([logits.to(own) for logits in parts])
        return logits.clamp(-FLOAT16_MAX, FLOAT16_MAX).half().float().to(images.device)

    def _rewritten(self, images: Tensor) -> list[nn.Module]:
        """Returns the network as it is called, for each device.

        Raises UserError if the logits of an image depend on the images beside it.
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
