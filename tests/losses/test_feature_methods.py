"""Losses on features, as functions of tensors: recorded values, formulas written another way, what all must keep."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.losses import FEATURES
from distill.losses.at import at
from distill.losses.crd import contrast
from distill.losses.feature_method import FeatureContext, FeatureMethod
from distill.losses.fitnet import fitnet
from distill.losses.nst import nst
from distill.losses.pkt import pkt
from distill.losses.reviewkd import hierarchical_context
from distill.losses.rkd import rkd
from distill.losses.sp import sp
from distill.losses.vid import vid

CASES = json.loads((Path(__file__).resolve().parents[1] / "golden" / "golden_losses.json").read_text())
Loss = Callable[[Tensor, Tensor], Tensor]
MAPS: dict[str, Loss] = {
    "at": lambda s, t: at(s, t, p=2),
    "sp": sp,
    "nst": nst,
    "fitnet": fitnet,
    "reviewkd": hierarchical_context,
    "vid": lambda s, t: vid(s, t, torch.full(s.shape[:2], 1.5)),
}
POOLED: dict[str, Loss] = {"rkd": lambda s, t: rkd(s, t, distance=25, angle=50), "pkt": pkt}
RECORDED = {
    "at_p2_stage2": (MAPS["at"], 1),
    "sp": (sp, 2),
    "rkd_25_50": (POOLED["rkd"], None),
    "pkt": (pkt, None),
    "fitnet_mse": (fitnet, 2),
    "nst": (nst, 2),
    "reviewkd_hcl": (hierarchical_context, 1),
}


def wave(shape: tuple[int, ...], amplitude: float, frequency: float, phase: float) -> Tensor:
    k = np.arange(np.prod(shape), dtype=np.float64)
    values = amplitude * np.sin(frequency * k + phase) + 0.3 * amplitude * np.cos(0.11 * k * frequency + 2 * phase)
    return torch.from_numpy(values.astype(np.float32)).reshape(shape)


@pytest.mark.parametrize("case", [0, 1])
@pytest.mark.parametrize("name", RECORDED)
def test_agrees_with_the_reference(name: str, case: int) -> None:
    inputs, expected = CASES[case]["inputs"], CASES[case]["losses"][name]
    loss, stage = RECORDED[name]
    n, phase = inputs["N"], inputs["phase"]
    if stage is None:
        student, teacher = wave((n, 32), 1.0, 0.31, phase), wave((n, 32), 1.1, 0.23, phase + 2)
    else:
        shape = (n, 8 * 2**stage, 16 // 2**stage, 16 // 2**stage)
        student = wave(shape, 1.0, 0.013 * (stage + 1), phase)
        teacher = wave(shape, 1.2, 0.017 * (stage + 1), phase + 1)
    value = loss(student.requires_grad_(), teacher)
    value.backward()
    # the record of nst is a difference of float32 means, 3e-5 from its formula in float64, which a test below has
    assert value.item() == pytest.approx(expected["value"], rel=5e-5 if name == "nst" else 1e-5)
    assert student.grad is not None
    assert student.grad.norm().item() == pytest.approx(expected["grad_norm"], rel=1e-5)
    head = torch.tensor(expected["grad_head"])
    torch.testing.assert_close(student.grad.flatten()[:5], head, rtol=1e-4, atol=1e-5 * expected["grad_norm"])


def features(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_vid_is_the_likelihood_of_a_normal_distribution() -> None:
    """torch.distributions, in float64; its density has the constant log(2 pi) / 2 that the loss leaves out."""
    mean, teacher, softplus = features((3, 4, 5, 5), 0), features((3, 4, 5, 5), 1), features((4,), 2)
    variance = torch.log(1 + torch.exp(softplus.double())) + 1e-5
    normal = torch.distributions.Normal(mean.double(), variance.sqrt().view(1, 4, 1, 1).expand(3, 4, 5, 5))
    expected = -normal.log_prob(teacher.double()).mean() - 0.5 * np.log(2 * np.pi)
    assert vid(mean, teacher, softplus.expand(3, 4)).item() == pytest.approx(expected.item(), rel=1e-6)


def test_contrast_is_a_product_of_probabilities() -> None:
    """Image by image, pair by pair, in float64: is it the pair, or one of K that were drawn from N?"""
    scores, count = features((4, 7), 0).exp(), 50
    total = 0.0
    for row in scores.double().tolist():
        chance = 6 / count
        likelihood = row[0] / (row[0] + chance)
        for other in row[1:]:
            likelihood *= 1 - other / (other + chance)
        total -= np.log(likelihood)
    assert contrast(scores, count).item() == pytest.approx(total / 4, rel=1e-5)


def test_relations_as_loops_have_them() -> None:
    """rkd and nst written out over pairs and triplets."""
    student, teacher = features((4, 6), 0).double(), features((4, 9), 1).double()

    def distances(vectors: Tensor) -> Tensor:
        pairs = torch.tensor([[float((a - b).norm()) for b in vectors] for a in vectors], dtype=torch.float64)
        return pairs / pairs[pairs > 0].mean()

    def angles(vectors: Tensor) -> Tensor:
        found = torch.zeros(4, 4, 4, dtype=torch.float64)
        for i, j, k in np.ndindex(4, 4, 4):
            if i not in (j, k):
                found[i, j, k] = torch.cosine_similarity(vectors[j] - vectors[i], vectors[k] - vectors[i], dim=0)
        return found

    smooth = torch.nn.functional.smooth_l1_loss
    expected = 25 * smooth(distances(student), distances(teacher)) + 50 * smooth(angles(student), angles(teacher))
    assert rkd(student, teacher, distance=25, angle=50).item() == pytest.approx(expected.item(), rel=1e-5)

    own, other = features((2, 3, 2, 2), 2), features((2, 5, 2, 2), 3)
    total = 0.0
    for image in range(2):
        a, b = ([row.flatten() / row.norm() for row in feature[image].double()] for feature in (own, other))
        for first, second, sign in ((b, b, 1), (a, a, 1), (a, b, -2)):
            total += sign * np.mean([float(x @ y) ** 2 for x in first for y in second]) / 2
    assert nst(own, other).item() == pytest.approx(total, rel=1e-6)


# ------------------------------------------------------------------------------------------------- what all must keep
@pytest.mark.parametrize("size", [1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*MAPS, *POOLED])
def test_contract(name: str, dtype: torch.dtype, size: float) -> None:
    """Finite at any size and precision; a gradient to the student alone; images in any order; 0 for equal features."""
    loss = {**MAPS, **POOLED}[name]
    shape = (6, 5, 4, 4) if name in MAPS else (6, 5)
    student, teacher = (size * features(shape, seed) for seed in (0, 1))
    own, other = student.to(dtype).requires_grad_(), teacher.to(dtype).requires_grad_()
    value = loss(own, other)
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    value.backward()
    assert own.grad is not None
    assert torch.isfinite(own.grad).all()
    assert own.grad.any()
    assert other.grad is None
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    assert loss(own[order], other[order]).item() == pytest.approx(value.item(), rel=1e-4)
    if name != "vid":
        assert loss(other, other).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", MAPS)
def test_features_that_are_all_zero(name: str) -> None:
    """As of dead channels at the start of a run: the gradient is finite."""
    student = torch.zeros(3, 5, 4, 4, requires_grad=True)
    MAPS[name](student, features((3, 5, 4, 4), 1)).backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        *((name, ((3, 5, 4), (3, 5, 4))) for name in MAPS),
        *((name, ((3, 5, 4, 4), (2, 5, 4, 4))) for name in MAPS),
        *((name, ((3, 5, 4, 4), (3, 6, 4, 4))) for name in ("fitnet", "reviewkd", "vid")),
        *((name, ((1, 5), (1, 5))) for name in POOLED),
        *((name, ((3, 5), (2, 5))) for name in POOLED),
        ("sp", ((1, 5, 4, 4), (1, 5, 4, 4))),
    ],
)
def test_shapes_that_do_not_fit(name: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    student, teacher = (torch.ones(shape) for shape in shapes)
    with pytest.raises(ValueError, match=r"features|similarities"):
        {**MAPS, **POOLED}[name](student, teacher)


def test_contrast_refuses() -> None:
    with pytest.raises(ValueError, match=r"scores must be \(B, 1 \+ K\)"):
        contrast(torch.ones(3, 1), 10)


@pytest.mark.parametrize("name", FEATURES)
def test_every_learned_parameter_moves(name: str) -> None:
    """Each part that build() makes gets a gradient; maps of other sizes and channels are connected, of a teacher in
    bfloat16 too."""
    method: FeatureMethod = FEATURES[name].defaults()
    own: list[tuple[int, ...]] = [(4, 8, 8), (6, 4, 4), (6,)]
    other: list[tuple[int, ...]] = [(5, 4, 4), (9, 2, 2), (9,)]
    if method.pooled:
        own, other = own[2:], other[2:]
    else:
        chosen = method.choose(3 if method.with_pooled else 2)
        own, other = [own[k] for k in chosen], [other[k] for k in chosen]
    learned: Any = method.build(own, other)
    student = [features((4, *shape), k).requires_grad_() for k, shape in enumerate(own)]
    teacher = [features((4, *shape), 9 + k).bfloat16().requires_grad_() for k, shape in enumerate(other)]
    connected = method.connect(learned, student, teacher)
    assert all(len(tensor) == 4 for tensor in connected)
    context = FeatureContext(margins=[torch.zeros(shape[0]) for shape in other])
    if name == "crd":
        scores = [torch.exp(vectors @ features((128, 9), 5)) for vectors in connected]
        context = FeatureContext(scores=(scores[0], scores[1]), count=20)
    method(connected, [tensor.detach() for tensor in teacher], context).backward()
    for tensor in student:
        assert tensor.grad is not None
        assert tensor.grad.any()
    for parameter, value in learned.named_parameters() if learned is not None else ():
        assert value.grad is not None, parameter
        assert value.grad.any(), parameter
    assert bool(method.learns) == (learned is not None)
