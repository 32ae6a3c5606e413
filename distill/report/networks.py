"""The networks of a report, and which of them is whose teacher."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

from distill.inference.predictions import Predictions
from distill.inference.trained import Trained
from distill.models.classifier import InputSpec
from distill.options import channels
from distill.teacher.ensemble import joint_digest, mean_logits


@dataclass(frozen=True)
class Reported:
    """A network with what it says to the test images.

    digest: of its weights. precision: of the forward passes, such as `float32`. trained: None for a teacher that was
    not named itself. spec: what it saw. notes: what a reader should know before the figures are used.
    """

    name: str
    arch: str
    predictions: Predictions
    digest: str
    parameters: int
    precision: str = "float32"
    trained: Trained | None = None
    spec: InputSpec | None = None
    notes: tuple[str, ...] = ()

    @property
    def teacher_archs(self) -> tuple[str, ...]:
        """The architectures of its teachers, () where it had none or nobody says."""
        return archs_of(self.trained) if self.trained else ()

    @property
    def by_itself(self) -> bool:
        """Whether it is known to be trained without a teacher."""
        return bool(self.trained and self.trained.recipe and not self.teacher_archs)


@dataclass(frozen=True)
class Student:
    """A network beside its teacher, and beside the same architecture trained by CE; None where these are not there."""

    network: Reported
    teacher: Reported | None = None
    alone: Reported | None = None
    notes: tuple[str, ...] = ()

    @property
    def gain(self) -> float | None:
        """Points of accuracy above the network that was trained by CE."""
        return self.network.predictions.accuracy - self.alone.predictions.accuracy if self.alone else None

    @property
    def gap(self) -> float | None:
        """Points of accuracy below the teacher."""
        return self.teacher.predictions.accuracy - self.network.predictions.accuracy if self.teacher else None


def archs_of(trained: Trained) -> tuple[str, ...]:
    """Returns the architectures of the teachers that a network was taught by, () for none."""
    named = trained.recipe.get("teacher_arch")
    return tuple(named.split(",")) if named else ()


def teacher_digest(trained: Trained) -> str | None:
    """Returns the digest of the weights that taught it, None where nobody says."""
    facts = trained.config.get("facts") or {}
    digest: str | None = facts.get("teacher_digest")
    return digest


def find_teacher(trained: Trained, others: Sequence[Reported]) -> Reported | None:
    """Returns the one of `others` that taught, of several teachers their mean; None if it is not among them.

    It is known by the digest of its weights; where the run does not tell that, by its architecture. One that sees the
    images otherwise than it did as it taught is another one.
    """
    archs, wanted = archs_of(trained), teacher_digest(trained)
    others = [other for other in others if _sees_as_taught(trained, other)]
    if wanted and (known := next((other for other in others if other.digest == wanted), None)):
        return known  # also a mean that was found for another student
    for members in permutations(others, len(archs)) if archs else ():
        digest = joint_digest([member.digest for member in members])
        if tuple(member.arch for member in members) == archs and wanted in (None, digest):
            return members[0] if len(members) == 1 else _mean(trained, members, digest)
    return None


def _sees_as_taught(trained: Trained, other: Reported) -> bool:
    """Returns whether `other` sees images as --teacher-mean, --teacher-std and --teacher-image-size had it."""
    if not other.spec:
        return True
    recipe, spec = trained.recipe, other.spec
    look = [channels(recipe[name]) for name in ("teacher_mean", "teacher_std") if recipe.get(name)]
    size = recipe.get("teacher_image_size") if spec.resized else None  # CIFAR's networks beside others have one size
    return look in ([], [spec.mean, spec.std]) and size in (None, spec.size)


def _mean(trained: Trained, members: Sequence[Reported], digest: str) -> Reported:
    """Returns several teachers as the one that taught (distill/teacher/ensemble.py)."""
    method = trained.recipe.get("method") or {}
    temperature = float(method.get("T") or trained.recipe.get("T") or 1.0)
    logits = mean_logits(
        [member.predictions.logits for member in members], trained.recipe.get("ensemble", "logits"), temperature
    )
    together = Predictions(logits, members[0].predictions.labels, logits.argmax(1))
    name, arch = (" + ".join(getattr(member, field) for member in members) for field in ("name", "arch"))
    parameters = sum(member.parameters for member in members)
    return Reported(f"mean of {name}", arch, together, digest, parameters, members[0].precision)


def as_student(network: Reported, teacher: Reported | None, others: Sequence[Reported]) -> Student:
    """Returns `network` beside `teacher` and beside the one of `others` that is the same architecture trained by CE.

    Of several such networks one of as many epochs is taken, and then one of the same seed.
    """
    trained, notes = network.trained, list[str]()
    if not trained or not network.teacher_archs:
        return Student(network)

    def likeness(other: Reported) -> tuple[bool, ...]:
        theirs = other.trained.recipe if other.trained else {}
        return tuple(theirs.get(name) == trained.recipe.get(name) for name in ("epochs", "seed", "batch_size", "lr"))

    taken = {network.digest, teacher.digest if teacher else ""}
    alike = [other for other in others if other.by_itself and other.arch == network.arch and other.digest not in taken]
    alone = max(alike, key=likeness, default=None)
    if alone and not likeness(alone)[0]:
        assert alone.trained
        epochs = [run.recipe.get("epochs") for run in (trained, alone.trained)]
        notes.append(f"{network.name} was planned for {epochs[0]} epochs, {alone.name} for {epochs[1]}")
    if teacher and teacher_digest(trained) is None:
        notes.append(
            f"{network.name} does not tell which weights taught it: {teacher.name} is taken, of its architecture"
        )
    return Student(network, teacher, alone, tuple(notes))
