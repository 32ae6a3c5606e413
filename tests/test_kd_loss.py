"""The loss: agreement with recorded values, and the contract that every loss on logits keeps."""

import json
from pathlib import Path

import pytest
import torch

from distill.kd_loss import kd

CASES = json.loads((Path(__file__).parent / "data" / "golden_losses.json").read_text())


@pytest.mark.parametrize("case", [0, 1])
@pytest.mark.parametrize("name", ["kd_T1", "kd_T3", "kd_T4"])
def test_agrees_with_the_reference_in_value_and_gradient(case: int, name: str) -> None:
    inputs, expected = CASES[case]["inputs"], CASES[case]["losses"][name]
    student = torch.tensor(inputs["student_logits"], requires_grad=True)
    loss = kd(student, torch.tensor(inputs["teacher_logits"]), temperature=expected["hp"]["T"])
    assert loss.item() == pytest.approx(expected["value"], rel=1e-5)
    loss.backward()
    assert student.grad is not None
    assert student.grad.norm().item() == pytest.approx(expected["grad_norm"], rel=1e-5)
    torch.testing.assert_close(student.grad.flatten()[:5], torch.tensor(expected["grad_head"]), rtol=1e-4, atol=1e-7)


def test_is_the_formula() -> None:
    student, teacher = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    s, t = (student / 3).softmax(1), (teacher / 3).softmax(1)
    expected = 9 * (t * (t / s).log()).sum(1).mean()
    torch.testing.assert_close(kd(student, teacher, temperature=3).double(), expected, rtol=1e-5, atol=1e-6)


def test_zero_at_equality_up_to_a_constant() -> None:
    logits = torch.randn(6, 10)
    assert kd(logits, logits, temperature=3).item() == pytest.approx(0, abs=1e-6)
    assert kd(logits + 5, logits, temperature=3).item() == pytest.approx(0, abs=1e-5)
    assert kd(torch.randn(6, 10), logits, temperature=3).item() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 1e2, 1e4])
def test_finite_for_large_logits(dtype: torch.dtype, size: float) -> None:
    student = (torch.randn(8, 10).clamp(-1, 1) * size).to(dtype).requires_grad_()
    loss = kd(student, (torch.randn(8, 10).clamp(-1, 1) * size).to(dtype), temperature=1)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_gradient_to_the_student_only_and_independent_of_order() -> None:
    student, teacher = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10, requires_grad=True)
    loss = kd(student, teacher, temperature=4)
    loss.backward()
    assert teacher.grad is None
    order = torch.randperm(8)
    torch.testing.assert_close(kd(student[order], teacher[order], temperature=4), loss)


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
        kd(torch.zeros(student), torch.zeros(teacher), temperature=temperature)
