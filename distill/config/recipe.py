"""Everything that defines a run, as frozen and validated dataclasses. Loads no torch, so that it loads at once.

`Recipe` is the identity of a run: two runs with equal recipes, data and teacher are the same run. `Options` is the
rest: where things lie and how far to go this time. cli.py makes one flag from each field.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

from distill.config.method_flags import choose_method
from distill.errors import UserError
from distill.losses import FEATURES, METHODS
from distill.losses.feature_method import FeatureMethod
from distill.losses.kd_loss import KD
from distill.losses.method import STANDARDIZED_SOURCE, Method
from distill.losses.overhaul import Overhaul
from distill.losses.top_k import TEMPERATURES
from distill.options import check_normalisation, option, validate

Self = TypeVar("Self", bound="Recipe")
LAST_FLAT_COMMIT = "1791190"  # the last one whose recipes have the method's flags beside the other fields


@dataclass(frozen=True)
class Recipe:
    """What a run computes. With a teacher it has a `method`, and `features` where those are learned as well.

    Raises UserError, naming the flag, for a value out of range and for flags that do not fit together.
    """

    photos: ClassVar[bool] = False  # whose defaults a method takes

    arch: str = option("efficientnet_b0", "the student (trainCE: the network)", group="networks", flags=("-a",))
    teacher_arch: str | None = option(
        None, "the teacher; of several, with commas, their mean teaches", group="networks"
    )
    method: Method | None = None
    features: FeatureMethod | None = None
    ensemble: str = option(
        "logits",
        "of several teachers: the mean of their logits, or of their probabilities at the loss's temperature",
        group="distillation",
        choices=("logits", "probabilities"),
    )
    teacher_image_size: int | None = option(
        None,
        "pixels that a teacher sees (default: as it was trained, else its own; of ImageNet's networks on small images "
        "96)",
        group="networks",
        least=16,
        most=2048,
    )
    pretrained: bool = option(False, "the student starts from its published ImageNet weights", group="networks")
    image_size: int | None = option(
        None,
        "pixels that the student sees (default: its own; of ImageNet's networks on small images 96)",
        group="networks",
        least=16,
        most=2048,
    )
    epochs: int = option(60, "passes over the training images", group="training", least=1)
    batch_size: int = option(
        128, "images a step; the last partial batch is dropped", group="training", flags=("-b",), least=1
    )
    sizes: str | None = option(
        None,
        "PIXELS:EPOCHS,...: in its first epochs the student sees images of these sizes, then of its own: "
        "24:36 is 36 epochs at 24 pixels, 20:8,24:4 is 8 at 20 and 4 at 24; none is off",
        group="training",
    )
    lr: float = option(0.1, "peak learning rate", group="training", above=0)
    accumulate: int = option(
        1, "parts that a step's images are computed in, one after the other, to save memory", group="training", least=1
    )
    optimizer: str = option(
        "sgd",
        "sgd (Nesterov momentum), adamw, or rmsprop as EfficientNets are trained",
        group="training",
        choices=("sgd", "adamw", "rmsprop"),
    )
    momentum: float = option(
        0.9, "of SGD (Nesterov's form where it is not 0) and RMSprop", group="training", least=0, most=1
    )
    weight_decay: float = option(
        5e-4,
        "weight decay (with adamw decoupled), not on BatchNorm and biases without --decay-all",
        group="training",
        flags=("--wd",),
        least=0,
    )
    decay_all: bool = option(False, "weight decay on BatchNorm and biases too", group="training")
    schedule: str = option(
        "cosine",
        "of the learning rate after the warm-up: cosine to 0; multistep, a tenth at 50 %% and at 75 %% of the run; "
        "step, --decay-rate every --decay-epochs; onecycle, with a warm-up of its own over 30 %% of the run; restarts, "
        "cosine to 0 every 10 epochs",
        group="training",
        choices=("cosine", "multistep", "step", "onecycle", "restarts", "constant"),
    )
    decay_epochs: float = option(30.0, "of --schedule step", group="training", above=0)
    decay_rate: float = option(0.1, "of --schedule step", group="training", above=0, most=1)
    warmup: float = option(
        5.0, "epochs of linear warm-up; a quarter of the run at most", group="training", least=0, most=1e6
    )
    bias_lr: float = option(1.0, "factor on lr for the biases of BatchNorm", group="training", above=0)
    clip_norm: float = option(0.0, "largest norm of the gradient; 0 is off", group="training", least=0)
    ema: float = option(
        0.0,
        "decay a step of the weights' moving average, which then is the result; 0 is off",
        group="training",
        least=0,
        below=1,
    )
    dropout: float | None = option(
        None, "before the classifier of the student (default: its own)", group="training", least=0, below=1
    )
    drop_connect: float | None = option(
        None,
        "stochastic depth: probability that a residual block of the student is skipped, rising from 0 at the first "
        "block to this after the last (default: its own; of CIFAR-10's efficientnet_b0 0)",
        group="training",
        least=0,
        below=1,
    )
    bn_momentum: float | None = option(
        None,
        "rate at which BatchNorm's running statistics follow the batches (default: the network's own, mostly 0.1)",
        group="training",
        above=0,
        most=1,
    )
    label_smoothing: float = option(0.0, "of the CE term", group="training", least=0, most=1)
    precision: str = option(
        "auto",
        "of the forward pass: auto is bfloat16 on a GPU that has it, else float32",
        group="training",
        choices=("auto", "float32", "bfloat16"),
    )
    mean: str | None = option(
        None,
        "mean of pixels in [0, 1] that the student subtracts, one number or three with commas (default: that of --init "
        "FILE where it tells, else the network's)",
        group="networks",
    )
    std: str | None = option(None, "deviation that it then divides by, as --mean", group="networks")
    teacher_mean: str | None = option(
        None, "as --mean, for the teacher (default: that of its file, else the network's)", group="networks"
    )
    teacher_std: str | None = option(None, "as --std, for the teacher", group="networks")
    weights: str | None = option(
        None,
        "of --init FILE: raw or ema, where it holds weights and their average (default: of ours the average); with "
        "--pretrained: which of torchvision's (default: IMAGENET1K_V1)",
        group="networks",
    )
    teacher_weights: str | None = option(None, "as --weights, of --teacher-checkpoint", group="networks")
    teacher_precision: str = option(
        "auto",
        "of the teacher: auto is bfloat16 where the hardware has it, else float32",
        group="distillation",
        choices=("auto", "float32", "bfloat16"),
    )
    top_k: int = option(
        0,
        "keep only the K largest logits of an answer, and what the others sum to; 0 is all",
        group="distillation",
        least=0,
    )
    compile: bool = option(False, "torch.compile the student's step; the first one takes a minute", group="training")
    sync_bn: bool = option(False, "BatchNorm over the images of all processes; on CUDA, with NPROC", group="training")
    augment: str = option(
        "crop_flip",
        "what a view is: crop_flip (162 views), original (crop, flip, rotation, colour jitter), none",
        group="views",
        choices=("crop_flip", "original", "none"),
    )
    padding: int = option(
        4,
        "pixels around a small image before crop_flip cuts it out again: (2 * N + 1)^2 * 2 views",
        group="views",
        least=0,
        most=5,
    )
    reflect: bool = option(False, "this padding shows the image reflected, not black", group="views")
    alternate_flip: bool = option(
        False, "crop_flip shows an image flipped in every other epoch, not at random", group="views"
    )
    cutout: int = option(
        0, "side in pixels of a square in the views that is blotted out; 0 is off", group="views", least=0, most=1000
    )
    mixup: bool = option(False, "views are mixtures of two images, by a share uniform in [0, 1)", group="views")
    views: int | None = option(None, "views of an image that are shown in turn (default: all)", group="views", least=1)
    seed: int = option(0, "of initialisation, order of the images, dropout", group="views", least=0, most=2**32 - 1)
    view_seed: int = option(
        0, "of the views; runs with one view seed share them", group="views", least=0, most=2**32 - 1
    )
    val_split: int = option(0, "training images held out to choose the best epoch on", group="views", least=0)

    def __post_init__(self) -> None:
        validate(self)
        check_normalisation(self, "mean", "std")
        check_normalisation(self, "teacher_mean", "teacher_std")
        if bool(self.teacher_arch) != (self.method is not None):
            raise UserError("a recipe has both a teacher and a method, or neither")
        if self.method:
            self._check_method(self.method)
        self._check_features()
        self._check_teachers()
        self._check_views()

    def _check_method(self, method: Method) -> None:
        if not method.needs_teacher_logits and not self.features:
            raise UserError(f"--method {method.name} is for --features; without both, trainCE trains by cross-entropy")
        if not any(method.weights):
            hint = "add --method kd --w 1" if self.features else "one of them must be more"
            raise UserError(f"--kd-weight 0 and --ce-weight 0 leave the last layer untaught: {hint}")
        if method.correlates_images and self.batch_size < 2 * self.accumulate:
            raise UserError(
                f"--method {method.name} correlates across images: --batch-size must be 2 for each of --accumulate"
            )
        if self.mixup and method.needs_labels:
            raise UserError(f"--method {method.name} wants one label for each image, and --mixup gives it two")
        if self.top_k and (method.standardize or not method.supports_top_k):
            able = ", ".join(name for name, other in METHODS.items() if other.supports_top_k)
            raise UserError(f"--top-k is for --method {able}, and not for --standardize, which wants all logits")
        if self.top_k and method.T not in TEMPERATURES:
            raise UserError(f"--top-k knows what the other classes sum to at --T 1, 2, 3 and 4, not {method.T:g}")

    def _check_features(self) -> None:
        if not self.features:
            return
        name = f"--features {self.features.name}"
        if self.sizes:
            raise UserError(f"{name} compares features of one size: give --sizes none")
        if self.compile:
            raise UserError(f"{name} watches the networks at work, which --compile leaves no trace of: give one")
        if self.features.correlates_images and self.batch_size < 2 * self.accumulate:
            raise UserError(f"{name} correlates across images: --batch-size must be 2 for each of --accumulate")
        if self.mixup and self.features.needs_labels:
            raise UserError(f"{name} wants one label for each image, and --mixup gives it two")

    def _check_teachers(self) -> None:
        if len(self.teacher_archs) > 1 and (self.features or self.top_k):
            raise UserError("--features and --top-k take one teacher")
        if len(self.teacher_archs) > 1 and (self.teacher_mean or self.teacher_weights):
            raise UserError("--teacher-mean, --teacher-std and --teacher-weights are of one teacher, here are several")
        if len(self.teacher_archs) < 2 and self.ensemble != "logits":
            raise UserError("--ensemble is for several teachers: --teacher-arch A,B")

    def _check_views(self) -> None:
        if (self.padding != 4 or self.reflect or self.alternate_flip) and self.augment != "crop_flip":
            raise UserError("--padding, --reflect and --alternate-flip belong to --augment crop_flip of small images")
        if self.alternate_flip and self.views and self.views % 2:
            raise UserError(f"--alternate-flip takes views in pairs: --views must be even, got {self.views}")
        if self.augment == "none" and (self.cutout or self.mixup):
            raise UserError("--augment none shows one view of each image: --cutout and --mixup take another --augment")
        if self.size_at(self.epochs - 1):
            raise UserError(f"--sizes {self.sizes} leaves none of {self.epochs} epochs at full size: give others")

    def with_flags(self: Self, given: Mapping[str, Any]) -> Self:
        """Returns the recipe with the values of the flags `given`, by name.

        Those of the method are among them: choose_method() says what they mean. Raises UserError.
        """
        names = {f.name for f in fields(self)} - {"method", "features"}
        changes = {name: value for name, value in given.items() if name in names}
        if changes.get("sizes") == "none":
            changes["sizes"] = None
        if self.method:
            others = {name: value for name, value in given.items() if name not in names}
            method, features = choose_method(self.method, self.features, others, self.photos)
            return replace(self, **changes, method=method, features=features)
        return replace(self, **changes)

    def size_at(self, epoch: int) -> int | None:
        """Returns the pixels that the student sees in `epoch`, from 0; None where they are its own.

        Raises UserError for --sizes that do not have the form PIXELS:EPOCHS,...
        """
        for part in self.sizes.split(",") if self.sizes else ():
            pixels, _, epochs = part.strip().partition(":")
            if not (pixels.isdecimal() and epochs.isdecimal() and 8 <= int(pixels) <= 2048 and int(epochs)):
                raise UserError(f"--sizes must be PIXELS:EPOCHS,... with 8 to 2048 pixels, got {self.sizes!r}")
            if epoch < int(epochs):
                return int(pixels)
            epoch -= int(epochs)
        return None

    def whole_epochs(self, size: int, first: int = 0) -> float:
        """Returns how many epochs of `size` pixels, the student's own, take as long as those from `first` on.

        An epoch of smaller images (--sizes) takes as much less as it has fewer pixels.
        """
        return sum(((self.size_at(epoch) or size) / size) ** 2 for epoch in range(first, self.epochs))

    @property
    def objective(self) -> str:
        """`kd` with a teacher, else `ce`."""
        return "kd" if self.teacher_arch else "ce"

    @property
    def teacher_archs(self) -> tuple[str, ...]:
        """The architectures of the teachers, in the order in which they are given."""
        return tuple(name.strip() for name in self.teacher_arch.split(",")) if self.teacher_arch else ()

    @property
    def temperature(self) -> float:
        """The temperature of the term on logits; 1 where there is none."""
        return self.method.T if self.method else 1.0

    @property
    def uses_teacher_logits(self) -> bool:
        """Whether the loss has a term on the teacher's logits."""
        return self.method is not None and self.method.needs_teacher_logits

    @property
    def remembers_images(self) -> bool:
        """Whether the loss has a memory of the training images, which these have to stay for."""
        return self.features is not None and self.features.remembers_images

    @property
    def loss_weights(self) -> tuple[float, float]:
        """The weights of the term on logits and of the CE term."""
        return self.method.weights if self.method else (0.0, 1.0)

    @property
    def trained_by(self) -> str:
        """`CE`, `KD from resnet18`, `KD standardized from resnet18`, `DIST and features from resnet18`."""
        if not self.method:
            return "CE"
        words = [self.method.name.upper() + " standardized" * self.method.standardize]
        words = words if self.method.needs_teacher_logits else []
        if self.features:
            words.append("features" if self.features.name == Overhaul.name else self.features.name.upper())
        return f"{' and '.join(words)} from {' + '.join(self.teacher_archs)}"

    @property
    def formula(self) -> str:
        """The loss of the run in a line, with the values in force; empty without a teacher."""
        if not self.method:
            return ""
        terms, values = self.method.terms, self.method.numbers
        if not self.method.kd_warmup:
            values.pop("kd_warmup", None)
        notes = [self.method.note, self.method.source, STANDARDIZED_SOURCE if self.method.standardize else ""]
        if self.features:
            rising = "min(epoch / feature_warmup, 1) * " if self.features.feature_warmup else ""
            terms.append(f"feature_weight * {rising}{self.features.term}")
            values |= self.features.numbers
            if not rising:
                values.pop("feature_warmup", None)
            notes.append(self.features.source)
        shown = ", ".join(f"{name} = {value:g}" for name, value in values.items())
        return "; ".join([f"loss = {' + '.join(terms)}  with {shown}", *filter(None, notes)])

    @property
    def run_name(self) -> str:
        """The name of the run's directory below its student's."""
        if not self.method:
            return f"ce-seed{self.seed}"
        method, features = self.method, self.features
        words = [features.name] if features else []
        words += [f"{method.name}{'-standardized' * method.standardize}"] if method.needs_teacher_logits else []
        words.append("+".join(self.teacher_archs))
        words += [self.ensemble] if self.ensemble != "logits" else []
        usual = method.defaults(self.photos).changed({"standardize": True} if method.standardize else {}, self.photos)
        hidden = {} if isinstance(method, KD) else usual.numbers  # of plain kd T and w are always named
        values = {name: value for name, value in method.numbers.items() if hidden.get(name) != value}
        if features:
            usual_numbers = features.defaults(self.photos).numbers
            values |= {name: value for name, value in features.numbers.items() if usual_numbers[name] != value}
        words += [f"{name.replace('_', '')}{value:g}" for name, value in values.items()]
        words += ["bnbatch"] if features and features.teacher_bn == "batch" else []
        return "-".join([*words, f"seed{self.seed}"])

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as a record holds them, `method` and `features` as dictionaries or None."""
        nested = {"method": self.method, "features": self.features}
        return {**asdict(self), **{name: value.to_dict() if value else None for name, value in nested.items()}}

    @classmethod
    def from_dict(cls: type[Self], values: Mapping[str, Any]) -> Self:
        """Returns the recipe of to_dict(). Raises UserError for fields of another version of this program."""
        if "T" in values:
            raise UserError(f"the recipe is of an earlier version: commit {LAST_FLAT_COMMIT} is the last that reads it")
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise UserError(f"the recipe has fields that this version does not know: {', '.join(unknown)}")
        nested: dict[str, Mapping[str, type[Any]]] = {"method": METHODS, "features": FEATURES}
        built = {name: _build(name, values.get(name), classes) for name, classes in nested.items()}
        return cls(**{**values, **built})  # what an older version did not know is at its default


def _build(field: str, values: Mapping[str, Any] | None, classes: Mapping[str, type[Any]]) -> Any:
    """Returns the object whose to_dict() is `values`. Raises UserError."""
    if values is None:
        return None
    try:
        return classes[values["name"]](**{name: value for name, value in values.items() if name != "name"})
    except (LookupError, TypeError):
        raise UserError(f"the recipe has a {field} that this version does not know: {values}") from None


def flatten(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of Recipe.to_dict() with those of its method and features beside the others, by flag."""
    flat: dict[str, Any] = {}
    for name, value in recipe.items():
        nested = name in ("method", "features") and isinstance(value, Mapping)
        flat |= {name: value["name"], **{k: v for k, v in value.items() if k != "name"}} if nested else {name: value}
    return flat


@dataclass(frozen=True)
class Options:
    """Where things lie and how far to go this time: nothing here changes what a run computes."""

    elsewhere: ClassVar[str] = "--fresh or another --output"  # flags by which another run is started

    data: str | None = option(
        None,
        "'sample' (embedded), a directory with the archive or batches of CIFAR-10 or CIFAR-100 or with train/CLASS/* "
        "and test/CLASS/* images, or a .npz file (default: data/cifar10, downloaded if absent)",
        group="data and files",
    )
    workers: int = option(
        2, "threads that decode a folder of images", group="data and files", flags=("-j",), least=0, most=256
    )
    skip_bad_images: bool = option(False, "leave out broken image files, up to 0.1 %% or one", group="data and files")
    teacher_checkpoint: str | None = option(
        None,
        "the teacher's weights, a file of ours or of others; on small images also 'published'",
        group="data and files",
    )
    store: bool = option(True, "keep the teacher's logits for other runs", group="data and files")
    store_limit: float = option(
        50.0, "gigabytes that a store may take; where it would take more there is none", group="data and files", least=0
    )
    class_order: str = option(
        "names",
        "whether the names of classes in a file of weights decide which output is which",
        group="data and files",
        choices=("names", "ignore"),
    )
    init: str | None = option(
        None,
        "weights that the student starts from, a file or a run; of small images also 'published' (default: from "
        "scratch)",
        group="data and files",
    )
    output: str | None = option(
        None, "the run's directory (default: checkpoints/DATA/ARCH/RUN)", group="data and files", flags=("--save-path",)
    )
    recipe: str | None = option(None, "a named recipe; flags given beside it win", group="running")
    show_recipe: bool = option(False, "print the complete recipe and exit", group="running")
    device: str = option("auto", "auto, cpu, cuda (all visible GPUs), cuda:N or cuda:N,M", group="running")
    deterministic: bool = option(False, "on CUDA too, the same bits each time; slower", group="running")
    steps: int | None = option(None, "stop after N training steps of this call and save", group="running", least=1)
    resume: str | None = option(None, "start from this checkpoint a run that has none of its own yet", group="running")
    save_minutes: float = option(10.0, "minutes between checkpoints within an epoch", group="running", least=0)
    tensorboard: bool = option(False, "also write the metrics for TensorBoard, if that is installed", group="running")
    show_features: bool = option(
        False, "print where --features takes those of teacher and student, and exit", group="running"
    )
    extend: bool = option(False, "allow more epochs than the run was started with", group="running")
    allow_data_change: bool = option(
        False, "go on though the images are not those that the run began with; it is recorded", group="running"
    )
    fresh: bool = option(False, "start over in a new directory beside an existing run", group="running")
    evaluate: bool = option(
        False, "evaluate the run's checkpoint (or --resume, --init) and exit", group="running", flags=("-e",)
    )

    def __post_init__(self) -> None:
        validate(self)
        if self.extend and self.fresh:
            raise UserError("--extend continues a run and --fresh starts a new one: give one of them")
        if self.fresh and self.resume:
            raise UserError("--resume continues a run and --fresh starts a new one: give one of them")
