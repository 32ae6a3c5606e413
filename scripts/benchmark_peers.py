"""The rows of benchmark.py that are not ours: KD as other programs take it, on the same networks and images.

Each loop takes (student, teacher, images, batch_size, device) and yields after each step. The loader has PIL transforms
and 2 workers, the teacher is asked in each step, the optimizer is SGD with momentum, T is 3 and the weight of KD 0.8.
What a library's own script does beside the step (it reads the loss, it logs) is left out, in the library's favour.

torchdistill    its DistillationBox on the configuration of its CIFAR-10 examples for KD: WeightedSumLoss of KDLoss,
                requires_grad False for the teacher, float32, contiguous. It leaves the teacher in the mode that it
                gets; it gets it in eval mode, which is faster. No wrapper (DataParallel): one device
timm            its LogitDistillationTask, called as its train.py does: float32, contiguous. The networks' normalisation
                is the same, so that it does not normalise anew for the teacher, which it puts in eval mode
timm_switches   the same with its --channels-last and --amp --amp-dtype bfloat16
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms  # type: ignore[import-untyped]

from cifar10.data import load_data
from cifar10.models import CIFAR_INPUT, MODELS
from distill.losses.kd_loss import distillation_loss

TEMPERATURE, WEIGHT = 3.0, 0.8
LOADER: dict[str, Any] = {"num_workers": 2, "persistent_workers": True, "drop_last": True}
LOADER |= {"multiprocessing_context": "fork"}  # as on Linux by default: a row's process itself would spawn them, slowly
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
OUTPUT = {"path": ".", "io": "output"}  # of a whole network, in a configuration of torchdistill


def steps(row: str, arch: str, teacher_arch: str, batch_size: int, device: torch.device) -> Iterator[None]:
    """Steps of the row on networks with random weights and the embedded images."""
    student, teacher = MODELS.build(arch, 10).to(device), MODELS.build(teacher_arch, 10).to(device)
    yield from LOOPS[row](student, teacher, Images(heavy=row in HEAVY), batch_size, device)


class Images(Dataset[Any]):
    """The embedded images as other programs read them: transformed one by one by PIL; `heavy` as the original did."""

    def __init__(self, *, heavy: bool = False) -> None:
        steps: list[Any] = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
        if heavy:
            steps += [transforms.RandomRotation(15), transforms.ColorJitter(0.2, 0.2, 0.2)]
        steps += [transforms.ToTensor(), transforms.Normalize(CIFAR_INPUT.mean, CIFAR_INPUT.std)]
        self.transform = transforms.Compose([transforms.ToPILImage(), *steps])
        data = load_data("sample")
        self.images, self.labels = data.train_images.permute(0, 3, 1, 2), data.train_labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.images[index]), self.labels[index]


def plain(
    student: nn.Module,
    teacher: nn.Module,
    images: Dataset[Any],
    batch_size: int,
    device: torch.device,
    *,
    taught: bool = True,
    teacher_trains: bool = False,
    switches: bool = False,
) -> Iterator[None]:
    """Steps without a library; switches: today's usual ones, channels_last and bfloat16 autocast."""
    layout = torch.channels_last if switches else torch.contiguous_format
    student.to(memory_format=layout).train()  # type: ignore[call-overload]
    teacher.to(memory_format=layout).train(teacher_trains)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(student.parameters(), **SGD, nesterov=switches)
    batches = DataLoader(images, batch_size, shuffle=True, **LOADER)
    while True:
        for pixels, labels in batches:
            seen, there = pixels.to(device, memory_format=layout), labels.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=switches):
                logits = student(seen).float()
                if taught:
                    with torch.no_grad():
                        answers = teacher(seen).float()
                    loss = distillation_loss(logits, answers, there, T=TEMPERATURE, w=WEIGHT)
                else:
                    loss = F.cross_entropy(logits, there)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            yield


def torchdistill(
    student: nn.Module, teacher: nn.Module, images: Dataset[Any], batch_size: int, device: torch.device
) -> Iterator[None]:
    """Steps of torchdistill's DistillationBox."""
    from torchdistill.core.distillation import DistillationBox

    logits = {f"{who}_module_{key}": value for who in ("student", "teacher") for key, value in OUTPUT.items()}
    kd = {"key": "KDLoss", "kwargs": {**logits, "temperature": TEMPERATURE, "alpha": 1 - WEIGHT}}
    config = {
        "num_epochs": 182,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": RandomSampler},
            "kwargs": {"batch_size": batch_size, "pin_memory": device.type == "cuda", **LOADER},
        },
        "teacher": {"requires_grad": False, "forward_proc": "forward_batch_only"},
        "student": {"requires_grad": True, "forward_proc": "forward_batch_only"},
        "optimizer": {"key": "SGD", "kwargs": {**SGD}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": {"criterion": kd, "weight": 1.0}}}},
    }
    box = DistillationBox(teacher.eval(), student, {"train": images}, config, device, [], False, 1)
    for epoch in itertools.count():
        box.pre_epoch_process(epoch=epoch)
        for pixels, labels, more in box.train_data_loader:
            loss = box.forward_process(pixels.to(device), labels.to(device), more)
            box.post_forward_process(loss=loss)  # backward, and the optimizer's step
            yield
        box.post_epoch_process()


def timm(
    student: nn.Module,
    teacher: nn.Module,
    images: Dataset[Any],
    batch_size: int,
    device: torch.device,
    *,
    switches: bool = False,
) -> Iterator[None]:
    """Steps of timm's LogitDistillationTask; switches: channels_last and bfloat16 autocast."""
    from timm.task import DistillationTeacher, LogitDistillationTask

    layout = torch.channels_last if switches else torch.contiguous_format
    for network in (student, teacher):
        network.to(memory_format=layout)  # type: ignore[call-overload]
        network.pretrained_cfg = {"mean": CIFAR_INPUT.mean, "std": CIFAR_INPUT.std}  # type: ignore[assignment]
    task = LogitDistillationTask(
        student,
        DistillationTeacher(teacher, device=device),
        criterion=nn.CrossEntropyLoss(),
        task_loss_weight=1 - WEIGHT,
        temperature=TEMPERATURE,
        device=device,
        verbose=False,
    )
    optimizer = torch.optim.SGD(student.parameters(), **SGD)
    batches = DataLoader(images, batch_size, shuffle=True, pin_memory=device.type == "cuda", **LOADER)
    while True:
        task.train()
        for pixels, labels in batches:
            seen, there = pixels.to(device, memory_format=layout), labels.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=switches):
                loss = task(seen, there)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield


HEAVY = ("original", "original_eval", "ce_contiguous")
LOOPS: dict[str, Callable[..., Iterator[None]]] = {
    "original": partial(plain, teacher_trains=True),
    "original_eval": plain,
    "usual": partial(plain, switches=True),
    "ce_contiguous": partial(plain, taught=False),
    "torchdistill": torchdistill,
    "timm": timm,
    "timm_switches": partial(timm, switches=True),
}
