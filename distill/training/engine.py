"""fit, train_epoch: the only training loop, and the only backward(), of the repository."""

import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from distill.config.output import format_duration
from distill.config.recipe import LAST_FLAT_COMMIT
from distill.data.datasets import Batch, TestData, TrainingData
from distill.errors import BrokenImage, CannotReadError, CheckpointError, UserError
from distill.files import checkpoint
from distill.models.class_order import shortened
from distill.models.classifier import Classifier
from distill.parallel.devices import generator_states, restore_generators, seed_generators
from distill.parallel.processes import any_of, gather, on_main, rank, reduce, world_size
from distill.run.identity import differing, disallowed, format_diff
from distill.run.outcome import BEST, best_epoch, diverged, format_divergence
from distill.run.run import Run
from distill.teacher.cached import CachedTeacher
from distill.training.evaluation import Evaluation, EvaluationStopped, evaluate, raise_broken
from distill.training.metrics import Tally
from distill.training.objectives import Objective
from distill.training.optim import build_optimizer, learning_rate
from distill.training.stop import Diverged, Stopped, StopRequest, memory_advice
from distill.training.wrap import TrainedModel

FORMAT = 2  # of a run's checkpoint
LOOK = 50  # steps between two looks at a flag on a CUDA device; each look waits for the device
ASK = 10  # steps after which the processes of several GPUs ask each other whether to stop or save


@dataclass
class State:
    """What changes in a run, beside the model, the optimiser and torch's generators."""

    tally: Tally  # of the current epoch so far, and of this process
    epoch: int = 0
    step: int = 0  # within the epoch
    records: list[dict[str, Any]] = field(default_factory=list)  # one an epoch: the lines of metrics.jsonl
    timings: dict[str, float] = field(default_factory=lambda: {"train": 0.0, "wall": 0.0, "epoch": 0.0})  # seconds
    first_loss: float | None = None  # of the run's first step


@dataclass(frozen=True)
class Fitted:
    """The outcome of fit: the lines of metrics.jsonl, the last test evaluation, speeds, the first step's loss."""

    records: list[dict[str, Any]]
    test: Evaluation
    images_per_second: float
    wall_seconds: float
    first_loss: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns what a summary says. With a validation part also its best epoch (the first of equals, as best.pt)."""
        named: dict[str, Any] = {
            "test_accuracy": self.test.accuracy,
            "test_top5": self.test.top5,
            "test_loss": self.test.loss,
            "diverged": diverged(self.records, self.first_loss),
        }
        if "raw_test_accuracy" in self.records[-1]:
            named["raw_test_accuracy"] = self.records[-1]["raw_test_accuracy"]
        if best := best_epoch(self.records):
            named["best_epoch"] = {key: best[key] for key in ("epoch", "val_accuracy", "test_accuracy")}
        return {**named, "train_images_per_second": self.images_per_second, "wall_seconds": self.wall_seconds}


class Trainer:
    """One run in progress. Use through fit()."""

    def __init__(
        self,
        run: Run,
        student: Classifier,
        loss: Objective,
        data: TrainingData,
        teacher: CachedTeacher | None = None,
    ) -> None:
        self.run, self.recipe, self.options = run, run.recipe, run.options
        self.loss, self.data, self.teacher = loss, data, teacher
        self.model = TrainedModel(student, loss.model, run.recipe, run.options.device, loss.memory)
        self.device = self.model.device
        self.writer = run.open_tensorboard() if run.options.tensorboard else None
        self.optimizer = build_optimizer(self.model.module, run.recipe)
        self.state = State(Tally(self.device, loss.parts))
        self.steps_left = run.options.steps
        self.first_bad_step = torch.full((), -1, dtype=torch.int64, device=self.device)
        self.last_save = time.monotonic()
        self.evaluation_seconds = 0.0  # of the last epoch

    # ------------------------------------------------------------------------------------------------ save and restore
    def save(self) -> None:
        """Writes last.pt. Raises Diverged instead if the state is not finite: the last good checkpoint stays."""
        self.check_state()
        state = self.state
        of_rank = {"generators": generator_states(self.options.device), "tally": state.tally.sums.cpu()}
        payload = {
            "format": FORMAT,
            "recipe": self.recipe.to_dict(),
            "facts": self.run.facts,
            **self.model.student.described(),
            **self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ranks": gather(of_rank),
            "epoch": state.epoch,
            "step": state.step,
            "records": state.records,
            "timings": state.timings,
            "first_loss": state.first_loss,
        }
        on_main(checkpoint.save)(self.run.path / checkpoint.LAST, payload, keep_previous=True)
        self.run.accept()
        self.last_save = time.monotonic()

    def check_state(self) -> None:
        """Raises Diverged if a loss was not finite, or a weight or running statistic is not."""
        self._check_finite()
        if not self.model.is_finite():
            raise self._not_finite("a weight")

    @on_main
    def _newest(self) -> tuple[dict[str, Any] | None, str]:
        """Returns the newest whole checkpoint of the run, else --resume, if there is one; and where it is from."""
        named, payload = self.options.resume, None
        start = checkpoint.load(Path(named)) if named else None  # a wrong path is an error in any case
        try:
            payload, warnings = checkpoint.load_latest(self.run.path)
        except CheckpointError as error:
            if not named or isinstance(error, CannotReadError):
                raise
            warnings = [str(error)]
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        source = str(self.run.path)
        if payload and named:
            print(f"continuing from the run's own checkpoint, not from {named}, where it may have begun")
        elif named:
            payload, source = start, named
        if payload:
            self._check_same_run(payload, source)
        return payload, source

    def restore(self) -> None:
        """Continues from the newest whole checkpoint of the run, else from --resume, if there is one."""
        payload, source = self._newest()
        if payload is None:
            return
        try:
            self.model.load_state_dict(payload, source)
            self.optimizer.load_state_dict(payload["optimizer"])
            of_rank = payload["ranks"][rank()]
            restore_generators(of_rank["generators"], self.options.device)
            if of_rank["tally"].shape != self.state.tally.sums.shape:
                raise ValueError(f"sums of {tuple(of_rank['tally'].shape)}")
            self.state.tally.sums.copy_(of_rank["tally"])
            epoch, step, records = payload["epoch"], payload["step"], payload["records"]
            if self.options.allow_data_change:
                step = min(step, self.data.steps_per_epoch)  # with fewer images an epoch may be shorter
            last_epoch, last_step = self.recipe.epochs, self.data.steps_per_epoch
            if not 0 <= epoch <= last_epoch or not 0 <= step <= last_step or len(records) != epoch:
                raise ValueError(f"epoch {epoch}, step {step}, {len(records)} records")
            self.state.epoch, self.state.step, self.state.records = epoch, step, records
            self.state.timings, self.state.first_loss = payload["timings"], payload["first_loss"]
            if source == self.options.resume and (best := best_epoch(records)):
                self.run.take_best(Path(source).parent, best["epoch"])
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise CheckpointError(f"{source} does not hold a state of this run ({error!r:.160})") from None
        self._publish()  # a kill may have come between the checkpoint and these files

    def _publish(self) -> None:
        """Makes metrics.jsonl, and TensorBoard's files, what the checkpoint's records are."""
        self.run.write_metrics(self.state.records)
        if self.writer:
            self.writer.show(self.state.records)

    def _check_same_run(self, payload: dict[str, Any], source: str) -> None:
        if payload.get("format") == 1 and "ranks" in payload:
            reader = f"commit {LAST_FLAT_COMMIT} is the last that reads it"
            raise CheckpointError(f"{source} is a checkpoint of format 1, not {FORMAT}: {reader}")
        try:
            before = {**type(self.recipe).from_dict(payload["recipe"]).to_dict(), **payload["facts"]}
        except (KeyError, TypeError):
            raise CheckpointError(f"{source} is no checkpoint of a run") from None
        now = {**self.recipe.to_dict(), **self.run.facts}
        if changed := disallowed(before, now, self.recipe, self.options):
            longer = changed == ["epochs"] and now["epochs"] > before["epochs"]
            hint = "; --extend allows more epochs" if longer else ""
            raise CheckpointError(f"{source} is of another run: {format_diff(changed, before, now)}{hint}")
        ours = list(self.model.student.classes)
        theirs = payload.get("classes", ours)
        if theirs != ours:  # other images may be allowed, but not outputs that stand for other things
            raise CheckpointError(f"{source} is of a run on the classes {shortened(theirs)}, not {shortened(ours)}")
        ranks = payload.get("ranks")
        count = len(ranks) if isinstance(ranks, list) else 0
        if count not in (0, world_size()):  # several GPUs may be of one process, or of several
            raise CheckpointError(
                f"{source} is of a run in {count} processes, this is one in {world_size()}: NPROC={count} continues it"
            )

    # ------------------------------------------------------------------------------------------------------- the steps
    def train_epoch(self, stop: StopRequest) -> bool:
        """Trains from the state's step to the end of its epoch. Returns False if asked to stop before that."""
        state = self.state
        self.model.train(self.recipe.size_at(state.epoch))
        images_before, start = int(state.tally.sums[0].item()), time.perf_counter()
        steps, shown = self.data.steps_per_epoch, 0.0
        batches = (self.teacher or self.data).batches(state.epoch, state.step)
        hidden = None if rank() == 0 else True  # None: on a terminal it is shown
        bar = tqdm(total=steps, initial=state.step, desc=f"epoch {state.epoch + 1}", leave=False, disable=hidden)
        stopping, due = any_of(stop.asked(), False)
        while state.step < steps and not stopping and self.steps_left != 0:
            try:
                batch = self._next(batches)
            except BrokenImage:
                bar.close()
                self._add_time(start)
                raise
            self.train_step(batch)
            state.step += 1
            if state.epoch == 0 and state.step == 1:
                images, loss = reduce(state.tally.sums[:2].clone()).tolist()
                state.first_loss = loss / images
            bar.update()
            if self.steps_left is not None:
                self.steps_left -= 1
            if self.device.type == "cpu" or world_size() == 1 or state.step % ASK == 0:
                late = time.monotonic() - self.last_save >= 60 * self.options.save_minutes
                stopping, due = any_of(stop.asked(), late)
            if not bar.disable and time.monotonic() - shown > 1:  # reading the sums waits for the device
                mean, shown = state.tally.summary(), time.monotonic()
                rate = world_size() * (mean["images"] - images_before) / (time.perf_counter() - start)
                left = self.seconds_left(self.recipe.batch_size / max(rate, 1e-9))
                said = f"loss {mean['loss']:.3f} accuracy {mean['accuracy']:.1f} % {rate:.0f} images/s"
                bar.set_postfix_str(f"{said}, {format_duration(left)} left")
            if due and state.step < steps:
                due = False
                self._add_time(start)
                start, images_before = time.perf_counter(), int(state.tally.sums[0].item())
                self.save()
        bar.close()
        self._check_finite()  # waits for the device, so that the time is that of finished work
        self._add_time(start)
        return state.step == steps

    def seconds_left(self, step_seconds: float) -> float:
        """Returns about how long the run will still take, where a step of the last epoch begun takes `step_seconds`."""
        state, whole = self.state, self.model.student.spec.size
        begun = self.recipe.size_at(max(0, state.epoch - (state.step == 0))) or whole
        epochs = self.recipe.whole_epochs(whole, state.epoch) * (whole / begun) ** 2
        training = step_seconds * (epochs * self.data.steps_per_epoch - state.step)
        return training + self.evaluation_seconds * (self.recipe.epochs - state.epoch)

    def _next(self, batches: Iterator[Batch]) -> Batch:
        """Returns the next batch. If one process raises BrokenImage, all do, before the step of any."""
        if not self.data.from_files:
            return next(batches)
        batch, broken = None, dict[str, str]()
        try:
            batch = next(batches)
        except BrokenImage as error:
            broken = error.files
        raise_broken(broken)
        assert batch
        return batch

    def train_step(self, batch: Batch) -> None:
        """Makes one update, unless the loss is not finite."""
        state, accumulate = self.state, self.recipe.accumulate
        position = state.epoch * self.data.steps_per_epoch + state.step
        for group in self.optimizer.param_groups:
            rate = learning_rate(position, self.recipe, self.data.steps_per_epoch)
            group["lr"] = rate * group.get("lr_factor", 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        micro_batches = batch.split(accumulate) if accumulate > 1 else [batch]
        for number, micro_batch in enumerate(micro_batches, start=1):  # their gradients add up to that of their mean
            with self.model.adds_up(last=number == accumulate):
                step = self.loss(self.model.wrapped, micro_batch)
                (step.loss / accumulate).backward()  # type: ignore[no-untyped-call]
            finite &= torch.isfinite(step.loss.detach())
            state.tally.add(step.logits.detach(), micro_batch.labels, step.loss.detach(), step.parts)
        if self.recipe.clip_norm:
            norm = torch.nn.utils.clip_grad_norm_(self.model.module.parameters(), self.recipe.clip_norm)
            finite &= torch.isfinite(norm)
        self.first_bad_step.masked_fill_((self.first_bad_step < 0) & ~finite, position)
        reduce(self.first_bad_step, "max")  # one process is enough to stop all of them
        if self.device.type == "cpu" and not self.optimizer.defaults.get("fused"):
            self._check_finite()
        # torch's fused optimisers leave out an update where this flag is set, and read it on the device itself. After
        # one by another that was not left out the run ends at the next look, and its last checkpoint is a good one.
        self.optimizer.found_inf = (self.first_bad_step >= 0).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        if self.model.average:
            self.model.average.update(position)
        if self.device.type == "cpu" or position % LOOK == 0:
            self._check_finite()

    def _add_time(self, start: float) -> None:
        passed = time.perf_counter() - start
        for name in ("train", "wall", "epoch"):
            self.state.timings[name] += passed

    def _check_finite(self) -> None:
        if self.first_bad_step.item() >= 0:
            raise self._not_finite("the loss or its gradient")

    def _not_finite(self, what: str) -> Diverged:
        step = int(self.first_bad_step.item())
        step = step if step >= 0 else self.state.epoch * self.data.steps_per_epoch + self.state.step
        rate = learning_rate(step, self.recipe, self.data.steps_per_epoch)
        last = self.run.path / checkpoint.LAST
        kept = f"the last good checkpoint is {last}" if last.exists() else "there is no checkpoint yet"
        message = f"{what} is not finite at step {step} (lr {rate:.4g}); {kept}; try a lower --lr"
        return Diverged(message, step, already_reported=rank() > 0)

    # -------------------------------------------------------------------------------------------- the end of an epoch
    def evaluate(self, tests: Mapping[str, TestData], stop: StopRequest) -> dict[str, Evaluation] | None:
        """Evaluates the model on each of `tests`; with an average also the raw weights. None if asked to stop."""
        start = time.perf_counter()
        try:
            evaluations = {name: evaluate(self.model.evaluated, test, stop.asked) for name, test in tests.items()}
            if self.model.average:
                evaluations["raw_test"] = evaluate(self.model.student, tests["test"], stop.asked)
        except EvaluationStopped:
            return None
        self.evaluation_seconds = time.perf_counter() - start
        self.state.timings["wall"] += self.evaluation_seconds
        return evaluations

    def record_epoch(self, evaluations: dict[str, Evaluation]) -> None:
        """Closes the epoch: its line of metrics.jsonl, and the best weights where a validation part decides."""
        self.check_state()
        state = self.state
        reduce(state.tally.sums)
        trained: dict[str, Any] = state.tally.summary()
        seconds, images = state.timings["epoch"], trained.pop("images")
        step = (state.epoch + 1) * self.data.steps_per_epoch
        record: dict[str, Any] = {"epoch": state.epoch + 1, "step": step, "lr": self.optimizer.param_groups[0]["lr"]}
        if not self.data.labelled:
            trained |= {"accuracy": None, "top5": None}
        record |= {f"train_{name}": value for name, value in trained.items()}
        for name, result in evaluations.items():
            record |= {f"{name}_loss": result.loss, f"{name}_accuracy": result.accuracy, f"{name}_top5": result.top5}
        record |= {"seconds": seconds, "images_per_second": images / max(seconds, 1e-9)}
        best = best_epoch(state.records)
        if "val" in evaluations and (not best or evaluations["val"].accuracy > best["val_accuracy"]):
            network = self.model.evaluated
            weights = {"student": network.network.state_dict(), "arch": self.recipe.arch, "epoch": state.epoch + 1}
            weights |= {"recipe": self.recipe.to_dict(), **network.described()}
            on_main(checkpoint.save)(self.run.path / BEST, weights)
        state.records.append(record)
        state.epoch, state.step = state.epoch + 1, 0
        state.tally.sums.zero_()
        state.timings["epoch"] = 0.0
        self.save()
        self._publish()
        accuracy = f"accuracy {record['train_accuracy']:.2f} %  " if self.data.labelled else ""
        measured = "  ".join(f"{name} {result.accuracy:.2f} %" for name, result in evaluations.items())
        print(
            f"epoch {record['epoch']}/{self.recipe.epochs}  loss {record['train_loss']:.4f}  "
            f"{accuracy}{measured}  lr {record['lr']:.4g}  "
            f"{record['images_per_second']:.0f} images/s  {seconds:.1f} s{self._time_left(seconds)}",
        )
        if (divergence := diverged(state.records, state.first_loss)) and divergence["epoch"] == record["epoch"]:
            print(f"warning: {format_divergence(divergence)}; try a lower --lr, or --clip-norm 1")

    def _time_left(self, epoch_seconds: float) -> str:
        """Returns `, 3 min left` for the line of an epoch that took so long to train, nothing for the last one."""
        if self.state.epoch == self.recipe.epochs:
            return ""
        return f", {format_duration(self.seconds_left(epoch_seconds / self.data.steps_per_epoch))} left"


def fit(
    run: Run,
    *,
    student: Classifier,
    loss: Objective,
    data: TrainingData,
    teacher: CachedTeacher | None = None,
    tests: Mapping[str, TestData],
) -> Fitted:
    """Trains `student` to the end of the run's recipe, from the run's checkpoint on, and evaluates each epoch.

    `teacher` gives the batches of `data` their teacher logits, where the loss wants some. `tests` is what each epoch is
    evaluated on, by name; `test` must be there, and with `val` the weights of its best epoch are kept in best.pt. With
    an average of the weights (recipe.ema) it is the average that is evaluated and counts; the raw weights stand beside
    it as `raw_test`. Continuing gives bit for bit what an uninterrupted run gives, on the same machine and torch (on
    CUDA with --deterministic).
    Raises Diverged when the loss is not finite (exit code 1), and Stopped after a signal (128 + N), after --steps (0),
    or when an image file cannot be decoded (2).
    """
    recipe = run.recipe
    if any(differing(run.facts, other) for other in gather(run.facts)):
        raise UserError("the processes of this run do not have the same data, teacher or initial weights")
    # What a teacher drew before, trained in this process or not, plays no part; the ranks draw different numbers.
    seed_generators(recipe.seed, run.options.device)
    trainer = Trainer(run, student, loss, data, teacher)
    trainer.restore()
    state, evaluations = trainer.state, None
    if state.epoch or state.step:
        print(f"continuing at epoch {state.epoch + 1}, step {state.step} of {data.steps_per_epoch}")
    with StopRequest() as stop, memory_advice(recipe, run.path):
        while state.epoch < recipe.epochs:
            try:
                evaluations = trainer.evaluate(tests, stop) if trainer.train_epoch(stop) else None
            except BrokenImage as broken:
                raise _broken(trainer, broken) from None
            if evaluations is None:
                trainer.save()
                raise _stopped(trainer, stop)
            trainer.record_epoch(evaluations)
    if teacher:
        teacher.print_statistics()
    test = evaluations["test"] if evaluations else evaluate(trainer.model.evaluated, tests["test"])
    images = state.epoch * data.steps_per_epoch * recipe.batch_size
    speed, wall = images / max(state.timings["train"], 1e-9), state.timings["wall"]
    return Fitted(state.records, test, speed, wall, state.first_loss)


def _stopped(trainer: Trainer, stop: StopRequest) -> Stopped:
    number = max(number or 0 for number in gather(stop.signal))
    why = f"by {signal.Signals(number).name}" if number else f"after {trainer.options.steps} steps"
    message = f"{trainer.recipe.arch} stopped {why} at {_where(trainer)}; {_same_command(trainer)} continues"
    return Stopped(message, 128 + number if number else 0, already_reported=rank() > 0)


def _broken(trainer: Trainer, error: BrokenImage) -> UserError:
    """What ends a run that has met broken images: as after a signal, everything up to there is saved."""
    if not trainer.state.epoch and not trainer.state.step:
        return error
    trainer.save()
    trainer.run.record_broken(error.files)
    message = f"{trainer.recipe.arch} stopped at {_where(trainer)}: {error.named}; mended, {_same_command(trainer)} "
    message += "continues"
    if not trainer.recipe.remembers_images:
        message += "; without them it does with --skip-bad-images --allow-data-change"
    return Stopped(message, 2, already_reported=rank() > 0)


def _where(trainer: Trainer) -> str:
    state = trainer.state
    step = f"step {state.step} of {trainer.data.steps_per_epoch}"
    return f"epoch {state.epoch + 1}, {step}; saved in {trainer.run.path}"


def _same_command(trainer: Trainer) -> str:
    return f"--output {trainer.run.path} in place of --fresh" if trainer.options.fresh else "the same command"
