"""The loss: agreement with recorded values, and the contract that every loss on logits keeps."""

import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torchvision
from torch import Tensor, nn

from distill.config.recipe import Recipe
from distill.files import checkpoint
from distill.losses import METHODS, find_methods
from distill.losses.dist import DIST, dist
from distill.losses.divergence import EXACT_ABOVE, standardize
from distill.losses.dkd import dkd
from distill.losses.kd_loss import KD, distillation_loss, kd, kd_top_k
from distill.losses.method import Method
from distill.losses.nkd import nkd
from distill.losses.top_k import TopKLogits, top_k_error, top_k_logits
from distill.models.classifier import Classifier
from distill.training.objectives import build_loss
from tests.runs import SPEC, small_network, teaching

CASES = json.loads((Path(__file__).resolve().parents[1] / "golden" / "golden_losses.json").read_text())


LOSSES = {name: method.defaults() for name, method in METHODS.items() if method.needs_teacher_logits}
LOSSES |= {
    f"{name}, standardised": method.changed({"standardize": True})
    for name, method in LOSSES.items()
    if "standardize" in {f.name for f in fields(method)}
}


def at(name: str, T: float) -> Method:
    """A method at another temperature, if it has one."""
    method = LOSSES[name]
    return method.changed({"T": T}) if "T" in method.numbers else method


def loss_of(name: str, student: Tensor, teacher: Tensor) -> Tensor:
    """The loss of a method with its defaults, as a run computes it."""
    return LOSSES[name](student, teacher, torch.arange(len(student)) % student.shape[1])


@pytest.mark.parametrize("case", [0, 1])
@pytest.mark.parametrize("name", [k for k in CASES[0]["losses"] if k.startswith(("kd_", "dkd_", "nkd_", "dist_"))])
def test_agrees_with_the_reference_in_value_and_gradient(case: int, name: str) -> None:
    inputs, expected = CASES[case]["inputs"], CASES[case]["losses"][name]
    student, teacher = (
        torch.tensor(inputs["student_logits"], requires_grad=True),
        torch.tensor(inputs["teacher_logits"]),
    )
    given = {"T" if key == "tau" else key: value for key, value in expected["hp"].items()}
    labels = torch.tensor(inputs["labels"])
    if name.startswith("kd_standardized"):
        loss = kd(standardize(student), standardize(teacher), **given)
    elif name.startswith(("dkd_", "nkd_")):
        loss = (dkd if name.startswith("dkd_") else nkd)(student, teacher, labels, **given)
    else:
        loss = (dist if name.startswith("dist_") else kd)(student, teacher, **given)
    assert loss.item() == pytest.approx(expected["value"], rel=1e-5)
    loss.backward()
    assert student.grad is not None
    assert student.grad.norm().item() == pytest.approx(expected["grad_norm"], rel=1e-5)
    torch.testing.assert_close(student.grad.flatten()[:5], torch.tensor(expected["grad_head"]), rtol=1e-4, atol=1e-7)


def test_dkd_is_kd_where_its_parts_weigh_alike() -> None:
    """KL = KL of (label, not label) + (1 - p_t(label)) * KL over the others, the paper's equation."""
    student, teacher, labels = torch.randn(1, 7), torch.randn(1, 7), torch.tensor([2])
    share = 1 - teacher.softmax(1)[0, 2].item()
    found = dkd(student, teacher, labels, alpha=1, beta=share, T=1)
    torch.testing.assert_close(found, kd(student, teacher, T=1), rtol=1e-5, atol=1e-6)


def test_dkd_of_a_sure_student() -> None:
    """A gap of 300: 1 - p would be 0, its logarithm infinite."""
    student = torch.zeros(2, 5).index_fill_(1, torch.tensor([1]), 300.0).requires_grad_()
    loss = dkd(student, torch.randn(2, 5), torch.tensor([1, 1]), alpha=1, beta=8, T=1)
    loss.backward()
    assert torch.isfinite(loss)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def exact(method: str, student: Tensor, teacher: Tensor, labels: Tensor, T: float) -> Tensor:
    """The loss of a method by its formula, in float64, with the weights of test_high_temperatures."""
    log_s, log_t = (student / T).log_softmax(1), (teacher / T).log_softmax(1)
    s, t, column = log_s.exp(), log_t.exp(), labels.view(-1, 1)
    if method == "dist":
        pairs = [[rows - rows.mean(1, keepdim=True) for rows in pair] for pair in ((s, t), (s.T, t.T))]
        found = [((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)).mean() for a, b in pairs]
        return T**2 * (2 - found[0] - found[1])
    if method == "kd":
        return T**2 * (t * (log_t - log_s)).sum(1).mean()
    here = torch.zeros_like(s, dtype=torch.bool).scatter(1, column, True)
    others = [(logits.masked_fill(here, -torch.inf) / T).log_softmax(1) for logits in (student, teacher)]
    q, log_q, log_own = others[1].exp(), others[1].masked_fill(here, 0), others[0].masked_fill(here, 0)
    if method == "nkd":
        label = -(teacher.softmax(1).gather(1, column) * student.log_softmax(1).gather(1, column)).mean()
        return label - 2 * T**2 * (q * log_own).sum(1).mean()
    b_s, b_t = (
        torch.cat([logs.gather(1, column), logs.masked_fill(here, -torch.inf).logsumexp(1, keepdim=True)], 1)
        for logs in (log_s, log_t)
    )
    binary = (b_t.exp() * (b_t - b_s)).sum(1).mean()
    return T**2 * (binary + 3 * (q * (log_q - log_own)).sum(1).mean())


@pytest.mark.parametrize("temperature", [1, 4, 10.5, 100, 1e4])
@pytest.mark.parametrize("classes", [10, 1000])
@pytest.mark.parametrize("method", ["kd", "dkd", "nkd", "dist"])
def test_high_temperatures(method: str, classes: int, temperature: float) -> None:
    """Value and gradient to 1e-3 of those in float64, a student like its teacher or not, by a constant beside it, and
    with gaps of hundreds."""
    labels = torch.arange(32) % classes
    weights = {"kd": {}, "dkd": {"alpha": 1.0, "beta": 3.0}, "nkd": {"gamma": 2.0}, "dist": {"gamma": 1.0}}[method]
    loss = METHODS[method].defaults().changed({"T": temperature, **weights})
    for size, apart, constant in ((4, 1, 0), (4, 0.1, 5), (120, 1, 0), (12 * temperature, 1, 0)):
        teacher = size * torch.randn(32, classes)
        student = (teacher + constant + apart * size * torch.randn(32, classes)).requires_grad_()
        wide = student.detach().double().requires_grad_()
        expected = exact(method, wide, teacher.double(), labels, temperature)
        found = loss(student, teacher, labels)
        assert found.item() == pytest.approx(expected.item(), rel=1e-3)
        (gradient,), (right,) = torch.autograd.grad(found, student), torch.autograd.grad(expected, wide)
        assert (gradient - right).norm() < 1e-3 * right.norm()


def test_usual_temperatures_keep_their_bits() -> None:
    """Results are recorded with T 1 to 4: there the loss is torch's kl_div of two log_softmaxes."""
    student, teacher = 5 * torch.randn(64, 10), 5 * torch.randn(64, 10)
    for T in (1, 2, 3, 4, EXACT_ABOVE):
        logs = [(logits / T).log_softmax(1) for logits in (student, teacher)]
        expected = T**2 * torch.nn.functional.kl_div(*logs, reduction="batchmean", log_target=True)
        assert torch.equal(kd(student, teacher, T=T), expected)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("temperature", [1e-4, 1e4])
def test_finite_at_the_ends_of_the_temperatures(name: str, temperature: float) -> None:
    method = at(name, temperature)
    student = (60_000 * torch.randn(8, 10).clamp(-1, 1)).requires_grad_()
    loss = method(student, 60_000 * torch.randn(8, 10).clamp(-1, 1), torch.arange(8))
    loss.backward()
    assert torch.isfinite(loss)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 1e2, 1e4])
def test_finite_for_large_logits(name: str, dtype: torch.dtype, size: float) -> None:
    student = (torch.randn(8, 10).clamp(-1, 1) * size).to(dtype).requires_grad_()
    loss = loss_of(name, student, (torch.randn(8, 10).clamp(-1, 1) * size).to(dtype))
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_to_the_student_only_least_at_equality_and_independent_of_order(name: str) -> None:
    student, teacher = torch.randn(8, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    loss = loss_of(name, student, teacher)
    loss.backward()
    assert teacher.grad is None
    # rows and classes turned by one place alike, so that the labels, row mod C, turn with them
    turned = [logits.detach().roll((1, 1), (0, 1)) for logits in (student, teacher)]
    torch.testing.assert_close(loss_of(name, *turned), loss.detach())
    same = teacher.detach().clone().requires_grad_()
    least = loss_of(name, same, teacher)
    least.backward()
    assert same.grad is not None
    assert student.grad is not None
    assert least < loss
    if LOSSES[name].zero_at_equality:
        assert same.grad.abs().max() < 1e-4 * student.grad.abs().max()
        assert least.item() == pytest.approx(0, abs=1e-4 * loss.item())


@pytest.mark.parametrize("name", LOSSES)
def test_logits_that_are_all_alike(name: str) -> None:
    """As those of a last layer that starts from zeros."""
    student = torch.zeros(8, 10, requires_grad=True)
    loss = loss_of(name, student, torch.randn(8, 10))
    loss.backward()
    assert torch.isfinite(loss)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize(
    "given", [{"method": "dist"}, {"standardize": True}, {"method": "dkd", "standardize": True}], ids=str
)
@pytest.mark.parametrize("size", [0.0, 0.001])
def test_a_last_layer_of_zeros(given: dict[str, Any], size: float, capsys: pytest.CaptureFixture[str]) -> None:
    """As that of torchvision's vision transformers: a loss that divides by the logits' deviation wants some."""
    recipe = Recipe(arch="vit", teacher_arch="teacher", method=KD()).with_flags(given)
    gradients = []
    for _ in range(2):
        torch.manual_seed(0)
        network = torchvision.models.VisionTransformer(32, 8, 1, 2, 64, 64, num_classes=10)
        nn.init.normal_(network.heads.head.weight, 0, size / 8)
        student = Classifier(network, SPEC)
        build_loss(recipe, student, teaching(), SimpleNamespace(labelled=True))  # type: ignore[arg-type]
        images = torch.randint(0, 256, (16, 32, 32, 3), dtype=torch.uint8)
        assert recipe.method
        recipe.method(student(images), 3 * torch.randn(16, 10), torch.arange(16) % 10).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
    assert gradients[0].norm() < 1000  # in place of millions
    assert torch.equal(*gradients)
    assert "heads.head of vit starts from small random weights" in capsys.readouterr().out


@pytest.mark.parametrize("method", [DIST(), KD()], ids=str)
def test_last_layers_that_stay_as_they_are(method: Method) -> None:
    """Usual weights, whatever the loss; and zeros, where nothing is divided by a deviation."""
    student = small_network()
    if not method.divides_by_deviation:
        nn.init.zeros_(student.network[-1].weight)  # type: ignore[index, arg-type]
    before = checkpoint.digest(student.network.state_dict())
    recipe = Recipe(teacher_arch="teacher", method=method)
    build_loss(recipe, student, teaching(), SimpleNamespace(labelled=True))  # type: ignore[arg-type]
    assert checkpoint.digest(student.network.state_dict()) == before


@pytest.mark.parametrize("name", LOSSES)
def test_mismatched_shapes(name: str) -> None:
    with pytest.raises(ValueError, match=r"\(4, 10\) and \(4, 9\)"):
        loss_of(name, torch.zeros(4, 10), torch.zeros(4, 9))
    with pytest.raises(ValueError, match=r"labels must be \(4,\), got \(3,\)"):
        dkd(torch.zeros(4, 9), torch.zeros(4, 9), torch.zeros(3), alpha=1, beta=1, T=1)


def test_is_the_formula() -> None:
    student, teacher = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    s, t = (student / 3).softmax(1), (teacher / 3).softmax(1)
    expected = 9 * (t * (t / s).log()).sum(1).mean()
    torch.testing.assert_close(kd(student, teacher, T=3).double(), expected, rtol=1e-5, atol=1e-6)


def test_the_whole_loss_is_the_formula() -> None:
    student, teacher, labels = torch.randn(5, 7), torch.randn(5, 7), torch.arange(5)
    ce = torch.nn.functional.cross_entropy(student, labels)
    torch.testing.assert_close(distillation_loss(student, teacher, labels), 0.8 * kd(student, teacher, T=3) + 0.2 * ce)
    assert torch.equal(distillation_loss(student, teacher, labels, T=4, w=1), kd(student, teacher, T=4))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_what_a_method_says_of_itself(method: type[Method]) -> None:
    """Its own name, formula and source; defaults in range; a record of it is itself."""
    assert [name for name, other in METHODS.items() if other is method] == [method.name]
    assert bool(method.formula) == bool(method.source) == method.needs_teacher_logits
    for photos in (False, True):
        values = method.defaults(photos).to_dict()
        assert METHODS[values.pop("name")](**values) == method.defaults(photos)
        assert any(method.defaults(photos).weights)


def test_zero_at_equality_up_to_a_constant() -> None:
    logits = torch.randn(6, 10)
    assert kd(logits, logits, T=3).item() == pytest.approx(0, abs=1e-6)
    assert kd(logits + 5, logits, T=3).item() == pytest.approx(0, abs=1e-5)
    assert kd(torch.randn(6, 10), logits, T=3).item() > 0


@pytest.mark.parametrize(
    ("student", "teacher", "temperature", "message"),
    [
        ((4, 10), (4, 9), 3, r"\(4, 10\) and \(4, 9\)"),
        ((4, 10), (3, 10), 3, r"\(4, 10\) and \(3, 10\)"),
        ((10,), (10,), 3, r"must both be \(B, C\)"),
        ((4, 10), (4, 10), 0, "temperature must be above 0"),
        ((4, 10), (4, 10), -1, "temperature must be above 0"),
        ((4, 10), (4, 10), float("nan"), "temperature must be above 0"),
    ],
)
def test_wrong_input(student: tuple[int], teacher: tuple[int], temperature: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kd(torch.zeros(student), torch.zeros(teacher), T=temperature)


# ---------------------------------------------------------------------------------------------------------------- top k
@pytest.mark.parametrize("temperature", [1, 2, 3, 4])
def test_top_k_is_kl_with_the_rest_as_one_class(temperature: float) -> None:
    student, teacher = torch.randn(6, 10, dtype=torch.float64), torch.randn(6, 10, dtype=torch.float64)
    known = top_k_logits(teacher, torch.arange(6), 3)
    assert torch.equal(known.label.double(), teacher.float().double().gather(1, torch.arange(6).view(-1, 1)).squeeze(1))
    s, t = (student / temperature).softmax(1), (teacher / temperature).softmax(1)
    classes = teacher.topk(3).indices
    p, q = t.gather(1, classes), s.gather(1, classes)
    p, q = torch.cat([p, 1 - p.sum(1, keepdim=True)], 1), torch.cat([q, 1 - q.sum(1, keepdim=True)], 1)
    expected = temperature**2 * (p * (p / q).log()).sum(1).mean()
    found = kd_top_k(student, known, T=temperature)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert found <= kd(student, teacher, T=temperature)


def test_top_k_contract() -> None:
    student, teacher = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10, requires_grad=True)
    known = top_k_logits(teacher, torch.zeros(8, dtype=torch.long), 4)
    kd_top_k(student, known, T=4).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert kd_top_k(teacher, known, T=2).item() == pytest.approx(0, abs=1e-6)
    order = torch.randperm(8)
    shuffled = TopKLogits(*(part[order] for part in known))
    torch.testing.assert_close(kd_top_k(student[order], shuffled, T=4), kd_top_k(student, known, T=4))
    with pytest.raises(ValueError, match="T 1, 2, 3 and 4, not 2"):
        kd_top_k(student, known, T=2.5)


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_top_k_is_finite(size: float) -> None:
    student = (size * torch.randn(8, 10)).requires_grad_()
    known = top_k_logits(size * torch.randn(8, 10), torch.full((8,), -1), 2)
    loss = kd_top_k(student, known, T=1)
    loss.backward()
    assert torch.isfinite(loss)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


TOP_K = [name for name, method in LOSSES.items() if method.supports_top_k and not method.standardize]


@pytest.mark.parametrize("name", TOP_K)
@pytest.mark.parametrize("temperature", [1, 2, 4])
def test_top_k_with_all_but_one_is_the_loss_itself(name: str, temperature: float) -> None:
    """Whether the label is among the largest logits or not."""
    student, teacher = torch.randn(12, 6, requires_grad=True), 3 * torch.randn(12, 6)
    labels = torch.arange(12) % 6
    assert 0 < (teacher.argmin(1) == labels).sum() < 12
    loss = at(name, float(temperature))
    known = top_k_logits(teacher, labels, 5)
    torch.testing.assert_close(loss(student, known, labels), loss(student, teacher, labels), rtol=1e-5, atol=1e-6)
    assert top_k_error(loss, student, teacher, labels, 5) < 1e-5


@pytest.mark.parametrize("name", TOP_K)
def test_top_k_error_falls_with_k(name: str) -> None:
    student, teacher, labels = torch.randn(64, 100), 3 * torch.randn(64, 100), torch.arange(64)
    loss = at(name, 1.0)
    errors = [top_k_error(loss, student, teacher, labels, k) for k in (2, 10, 50, 99)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.01
    assert errors[-1] < 1e-5


@pytest.mark.parametrize("name", TOP_K)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 1e2, 1e4])
def test_top_k_losses_are_finite(name: str, dtype: torch.dtype, size: float) -> None:
    student, labels = (size * torch.randn(8, 10).clamp(-1, 1)).to(dtype).requires_grad_(), torch.arange(8)
    loss = LOSSES[name](student, top_k_logits(size * torch.randn(8, 10), labels, 1 + 2), labels)
    loss.backward()
    assert torch.isfinite(loss)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_a_variant_is_a_method_too_and_names_differ() -> None:
    class Base(Method):
        name: ClassVar[str] = "base"

    class First(Base):
        name: ClassVar[str] = "first"

    assert find_methods(Base) == {"first": First}
    type("Second", (First,), {})
    with pytest.raises(ValueError, match="first is the name of two methods"):
        find_methods(Base)
