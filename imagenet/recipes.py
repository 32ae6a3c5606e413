"""Named recipes for photos: --recipe NAME, with whatever flags beside it. Knows no torch: flags are parsed first.

None of them has been run on all of ImageNet here. Accuracies are those of others, with their source.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from distill.config.recipe import Options, Recipe
from distill.losses.kd_loss import KD
from distill.options import option


@dataclass(frozen=True)
class ImageNetRecipe(Recipe):
    """What a run on photos computes: a Recipe, and these fields."""

    photos: ClassVar[bool] = True

    arch: str = option(
        "efficientnet-b0",
        "the student: a network of torchvision (resnet18), efficientnet-b0 to b8 of efficientnet-pytorch, "
        "efficientnet-lite0 to lite2, resnext101_32x8d_wsl, or timm:NAME",
        group="networks",
        flags=("-a",),
    )
    teacher_weights: str | None = option(
        None,
        "which of torchvision's weights the teacher has (default: IMAGENET1K_V1); of its file: raw or ema",
        group="networks",
    )
    augment: str = option(
        "crop",
        "what a view is: crop (random-resized crop and flip), and after it colour jitter, RandAugment or "
        "ImageNet's AutoAugment; none",
        group="views",
        choices=("crop", "crop_jitter", "randaugment", "autoaugment", "none"),
    )
    render_size: int | None = option(
        None, "of a view (default: the teacher's, without one the student's)", group="views", least=16, most=2048
    )
    decoder: str = option(
        "torchvision",
        "of JPEG files; part of what a view is",
        group="views",
        choices=("torchvision", "pillow", "simplejpeg"),
    )


@dataclass(frozen=True)
class ImageNetOptions(Options):
    """Options, as they are for photos."""

    data: str | None = option(
        None, "directory with train/CLASS/* and val/CLASS/* images", group="data and files", flags=("-d",)
    )
    workers: int = option(
        8, "decoders of each process; 0: it decodes itself", group="data and files", flags=("-j",), least=0, most=256
    )
    loader_minutes: float = option(
        5.0, "minutes to wait for a batch of the workers; then the run ends", group="data and files", above=0
    )
    kd: bool = option(False, "train by KD (--teacher-arch says so as well)", group="running")


STANDARD = ImageNetRecipe(
    epochs=100,
    batch_size=256,
    lr=0.1,
    weight_decay=1e-4,
    decay_all=True,
    schedule="step",
    warmup=0.0,
)
"""What ResNets are trained by, and KD is compared on: SGD 0.1 at 256 images, a tenth at epochs 30, 60, 90, weight decay
1e-4 on everything (He et al. 2015, arXiv:1512.03385).

bash scripts/train.sh DATA --arch resnet18
Published: resnet18 69.76 (torchvision, 90 epochs). Not run here.
"""

STANDARD_KD = replace(STANDARD, teacher_arch="resnet152", method=KD(T=1.0, w=0.5))
"""The same, taught. T = 1 and w = 0.5 are those that torchdistill takes for resnet18 from resnet34.

bash scripts/train.sh DATA --arch resnet18 --teacher-arch resnet34
Published: 71.37 (torchdistill, kd-resnet18_from_resnet34.yaml, without Nesterov's form). Not run here.
"""

ORIGINAL = ImageNetRecipe(
    epochs=100,
    batch_size=256,
    lr=0.1,
    weight_decay=1e-5,
    schedule="step",
    warmup=0.0,
    augment="autoaugment",
)
"""As the original repository trained from scratch: SGD 0.1, weight decay 1e-5, a tenth every 30 epochs, AutoAugment.
Its momentum, batch and epochs are not known to us: Nesterov 0.9, 256, 100.

bash scripts/train.sh DATA --recipe original
76.3 there, which are the published weights'. Not run here.
"""

ORIGINAL_KD = replace(ORIGINAL, teacher_arch="resnet152", method=KD(T=3.0, w=0.8))
"""bash scripts/train.sh DATA --recipe original --kd. Its code divided the KL term by the 1,000 classes as well."""

FINETUNE = replace(ORIGINAL, epochs=10, lr=0.01, schedule="cosine", pretrained=True)
"""As it finetuned the published EfficientNet-B0: cosine over 10 epochs; lr 0.01 is ours.

bash scripts/train.sh DATA --recipe finetune
"""

FINETUNE_KD = replace(FINETUNE, teacher_arch="resnet152", method=KD(T=3.0, w=0.8))
"""bash scripts/train.sh DATA --recipe finetune --kd
77.07 there, from ResNet152 (78.31), with the KL term divided by 1,000. Not run here.
"""

STRONG = ImageNetRecipe(
    epochs=450,
    batch_size=768,
    lr=0.048,
    optimizer="rmsprop",
    weight_decay=1e-5,
    schedule="step",
    decay_epochs=2.4,
    decay_rate=0.97,
    warmup=5.0,
    augment="randaugment",
    dropout=0.2,
    drop_connect=0.2,
    ema=0.9999,
)
"""EfficientNet's own (Tan and Le 2019, arXiv:1905.11946), with RandAugment (Cubuk et al. 2019, arXiv:1909.13719):
RMSprop 0.016 per 256 images, times 0.97 every 2.4 epochs, average of the weights 0.9999, 450 epochs as timm trains it.

bash scripts/train.sh DATA --recipe strong
Not run here. timm's efficientnet_b0 came to 77.7 by the same settings with stronger views: its magnitude 9 is of 10,
that of torchvision's RandAugment, which is taken here, of 30; and it erases a part of every fifth photo.
"""

STRONG_KD = replace(STRONG, teacher_arch="resnet152", method=KD(T=1.0, w=0.5))
"""bash scripts/train.sh DATA --recipe strong --kd"""

RECIPES = {
    "standard": STANDARD,
    "standard_kd": STANDARD_KD,
    "original": ORIGINAL,
    "original_kd": ORIGINAL_KD,
    "finetune": FINETUNE,
    "finetune_kd": FINETUNE_KD,
    "strong": STRONG,
    "strong_kd": STRONG_KD,
}
