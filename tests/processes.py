"""What test_processes.py starts in one process and in two: python tests/processes.py CASE NPZ DIRECTORY.

gradient: one step with BatchNorm in eval mode, then an evaluation; both are written to DIRECTORY.
nan: the loss of the last process is not a number in step 2.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

from cifar10.data import load_data, prepare
from cifar10.models import build_student
from distill import cli, parallel
from distill.engine import evaluate, fit
from distill.objectives import CrossEntropy, Step
from distill.recipe import Options, Recipe
from distill.run_dir import RunDirectory
from distill.stop import Stopped
from distill.views import Batch


class Unlucky(CrossEntropy):
    """NaN from its second call on, in the last process alone."""

    calls = 0

    def __call__(self, student: nn.Module, batch: Batch) -> Step:
        step = super().__call__(student, batch)
        Unlucky.calls += 1
        bad = Unlucky.calls > 1 and parallel.rank() == parallel.world_size() - 1
        return step._replace(loss=step.loss * float("nan")) if bad else step


def main(argv: list[str]) -> None:
    case, npz, directory = argv[0], argv[1], Path(argv[2])
    recipe = Recipe(epochs=2, batch_size=8, lr=0.01, warmup=0, dropout=0.0)
    device = parallel.start("cpu")
    data = load_data(npz)
    training, tests = prepare(data, recipe, device)
    student, _ = build_student(recipe, len(data.classes), None, device)
    if case == "gradient":
        for module in student.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
                module.train = lambda _mode=True, module=module: module  # type: ignore[method-assign]
    objective = CrossEntropy() if case == "gradient" else Unlucky()
    options = Options(steps=1 if case == "gradient" else None)
    with RunDirectory(directory / f"run{parallel.world_size()}") as run:
        try:
            fit(
                run,
                recipe,
                options,
                student=student,
                objective=objective,
                data=training,
                tests=tests,
                facts={"world_size": parallel.world_size()},
            )
        except Stopped:
            if case == "nan":
                unchanged = torch.stack([p.detach().double().sum() for p in student.parameters()])
                torch.save(unchanged, directory / f"weights-{parallel.rank()}.pt")
                raise
        found = evaluate(student, tests["test"])
        gradients = {k: p.grad for k, p in student.named_parameters() if p.grad is not None}
        result = {"gradients": gradients, "predictions": found.predictions, "found": found.to_dict()}
        torch.save(result, directory / f"{parallel.world_size()}-{parallel.rank()}.pt")


if __name__ == "__main__":
    cli.run(main)
