"""Everything that defines a run, as frozen and validated dataclasses. Knows no torch, so that it loads at once.

`Recipe` is the identity of a run: two runs with equal recipes, data and teacher are the same run. `Options` is the
rest: where things lie and how far to go this time. cli.py makes one flag from each field.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

from distill.errors import UserError
from distill.losses.methods import FEATURE_WEIGHT, FEATURES_SOURCE, METHODS, SETTINGS, STANDARDIZED, settle
from distill.options import check_normalisation, option, validate

Self = TypeVar("Self", bound="Recipe")


@dataclass(frozen=True)
class Recipe:
    """What a run computes. Raises UserError, naming the flag, for a value out of range, and for a flag that the method
    does not use. Flags of the method that are None become its authors' defaults for the kind of images (methods.py).
    """

    photos: ClassVar[bool] = False  # whose defaults a method takes

    arch: str = option("efficientnet_b0", "the student (trainCE: the network)", group="networks", flags=("-a",))
    teacher_arch: str | None = option(
        None, "the teacher; of several, with commas, their mean teaches", group="networks"
    )
    ensemble: str = option(
        "logits",
        "of several teachers: the mean of their logits, or of their probabilities at the loss's temperature",
        group="distillation",
        choices=("logits", "probabilities"),
    )
    teacher_image_size: int | None = option(
        None,
        "pixels that a teacher sees of small images, one of ImageNet's networks (default: as it was trained, else 96)",
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
    T: float | None = option(None, "temperature of both softmaxes", group="distillation", least=1e-4, most=1e4)
    w: float | None = option(None, "share of the KD term; the CE term has 1 - w", group="distillation", least=0, most=1)
    method: str | None = option(
        None,
        "loss on logits, with the flags that it takes and their defaults (on photos): "
        + "; ".join(f"{name}: {method}" for name, method in METHODS.items() if str(method))
        + "; none: with --overhaul",
        group="distillation",
        choices=tuple(METHODS),
    )
    standardize: bool = option(
        False, "kd and dkd on logits less their mean, over their deviation, image by image", group="distillation"
    )
    alpha: float | None = option(None, "of dkd: weight of (label, not label)", group="distillation", least=0)
    beta: float | None = option(
        None, "of dkd: weight of the other classes; of dist: of the classes' correlation", group="distillation", least=0
    )
    gamma: float | None = option(
        None, "of nkd: weight of the other classes; of dist: of the images' correlation", group="distillation", least=0
    )
    tau: float | None = option(None, "temperature of dkd, nkd, dist", group="distillation", least=1e-4, most=1e4)
    ramp: float | None = option(
        None, "of dkd, nkd, dist: epochs over which the weight rises, 1/N in the first", group="distillation", least=0
    )
    kd_weight: float | None = option(
        None, "of the term on logits; with kd in place of --w", group="distillation", least=0
    )
    ce_weight: float | None = option(None, "of the CE term; with kd in place of --w", group="distillation", least=0)
    overhaul: bool = option(
        False,
        "learn the teacher's features as well; without a method given, in place of its logits",
        group="distillation",
    )
    feature_weight: float | None = option(
        None, "of --overhaul, per image (default: 1e-3, on ImageNet 1e-4)", group="distillation", least=0
    )
    teacher_bn: str = option(
        "eval",
        "statistics that the teacher's BatchNorm uses for features: its own (eval), or the batch's, as the authors of "
        "overhaul have it",
        group="distillation",
        choices=("eval", "batch"),
    )
    epochs: int = option(60, "passes over the training images", group="training", least=1)
    batch_size: int = option(
        128, "images a step; the last partial batch is dropped", group="training", flags=("-b",), least=1
    )
    sizes: str | None = option(
        None,
        "PIXELS:EPOCHS,...: in its first epochs the student sees images of these sizes, then of its own: "
        "16:8,24:4 is 8 epochs at 16 pixels and 4 at 24",
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
        5e-4, "L2 penalty, not on BatchNorm and biases", group="training", flags=("--wd",), least=0
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
        "rate at the last block of the student at which it is skipped, rising from 0 (default: its own; of CIFAR-10's "
        "efficientnet_b0 0)",
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
        "of pixels in [0, 1] that the student subtracts, one number or three with commas (default: that of --init FILE "
        "where it tells, else the network's)",
        group="networks",
    )
    std: str | None = option(None, "that it divides by then", group="networks")
    teacher_mean: str | None = option(
        None, "the same of the teacher (default: of its file where that tells, else the network's)", group="networks"
    )
    teacher_std: str | None = option(None, "that it divides by then", group="networks")
    weights: str | None = option(
        None,
        "of --init FILE: raw or ema, where it holds weights and their average (default: of ours the average); with "
        "--pretrained: which of torchvision's (default: IMAGENET1K_V1)",
        group="networks",
    )
    teacher_weights: str | None = option(None, "the same of the teacher's file", group="networks")
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
        given = {name: getattr(self, name) for name in SETTINGS}
        wanted = {"T", "w", "kd_weight"} & {name for name, value in given.items() if value is not None}
        method = self.method or ("kd" if wanted or not self.overhaul else "none")
        try:
            settled = settle(given, method, photos=self.photos, standardize=self.standardize)
        except ValueError as error:
            raise UserError(str(error)) from None
        weight = FEATURE_WEIGHT[self.photos] if self.overhaul and self.feature_weight is None else self.feature_weight
        for name, value in {**settled, "method": method, "feature_weight": weight}.items():
            object.__setattr__(self, name, value)
        validate(self)
        self._check_method(method)

    def _check_method(self, method: str) -> None:
        known = METHODS[method]
        if method == "none" and not self.overhaul:
            raise UserError("--method none is for --overhaul; without both, trainCE trains by cross-entropy")
        if not self.overhaul and (self.feature_weight is not None or self.teacher_bn != "eval"):
            raise UserError("--feature-weight and --teacher-bn belong to --overhaul")
        if self.teacher_arch and not any(self.shares):
            hint = "add --method kd --w 1" if self.overhaul else "one of them must be more"
            raise UserError(f"--kd-weight 0 and --ce-weight 0 leave the last layer untaught: {hint}")
        if method == "dist" and self.batch_size < 2 * self.accumulate:
            raise UserError("--method dist correlates across images: --batch-size must be 2 for each of --accumulate")
        if (self.padding != 4 or self.reflect or self.alternate_flip) and self.augment != "crop_flip":
            raise UserError("--padding, --reflect and --alternate-flip belong to --augment crop_flip of small images")
        if self.size_at(self.epochs - 1):
            raise UserError(f"--sizes {self.sizes} leaves none of {self.epochs} epochs at the student's own size")
        if self.overhaul and self.sizes:
            raise UserError("--overhaul compares features of one size: leave out --sizes")
        if len(self.teacher_archs) > 1 and (self.overhaul or self.top_k):
            raise UserError("--overhaul and --top-k take one teacher")
        if len(self.teacher_archs) > 1 and (self.teacher_mean or self.teacher_weights):
            raise UserError("--teacher-mean, --teacher-std and --teacher-weights are of one teacher, here are several")
        if len(self.teacher_archs) < 2 and self.ensemble != "logits":
            raise UserError("--ensemble is for several teachers: --teacher-arch A,B")
        if self.overhaul and self.compile:
            raise UserError("--overhaul watches the networks at work, which --compile leaves no trace of: give one")
        if self.standardize and known.standardized is None:
            raise UserError(f"--standardize is for kd and dkd, not for --method {method}")
        if self.mixup and known.labels:
            raise UserError(f"--method {method} wants one label for each image, and --mixup gives it two")
        if self.top_k and (self.standardize or not known.top_k):
            able = ", ".join(name for name, other in METHODS.items() if other.top_k)
            raise UserError(f"--top-k is for --method {able}, and not for --standardize, which wants all logits")
        if self.top_k and (self.T or self.tau) not in (1, 2, 3, 4):
            name, value = ("--T", self.T) if self.T else ("--tau", self.tau)
            raise UserError(f"--top-k knows what the other classes sum to at {name} 1, 2, 3 and 4, not {value:g}")

    def changed(self: Self, given: Mapping[str, Any]) -> Self:
        """The recipe with the fields `given`. Where that means another method, it comes with its own defaults, not with
        what this one's flags are; replace() would keep them.
        """
        given = dict(given)
        overhaul = given.get("overhaul", self.overhaul)
        asks_for_logits = bool({"T", "w", "kd_weight"} & given.keys())
        method = given.get("method") or self.method
        if not given.get("method"):
            if overhaul and not self.overhaul and not asks_for_logits:
                method = "none"
            elif method == "none" and (asks_for_logits or not overhaul):
                method = "kd"
        if method != self.method:
            given = {**dict.fromkeys(SETTINGS), **given, "method": method}
            if method in METHODS and METHODS[method].standardized is None:
                given.setdefault("standardize", False)
        elif {"kd_weight", "ce_weight"} & given.keys() and method == "kd":
            given.setdefault("w", None)
        elif "w" in given:
            given = {"kd_weight": None, "ce_weight": None, **given}
        if given.get("standardize", self.standardize) != self.standardize:
            given = {"T": None, "tau": None, **given}
        if not overhaul and self.overhaul:
            given = {"feature_weight": None, "teacher_bn": "eval", **given}
        return replace(self, **given)

    def size_at(self, epoch: int) -> int | None:
        """Pixels that the student sees in `epoch`, from 0; None where they are its own. Raises UserError for --sizes
        that do not have the form PIXELS:EPOCHS,...
        """
        for part in self.sizes.split(",") if self.sizes else ():
            pixels, _, epochs = part.strip().partition(":")
            if not (pixels.isdecimal() and epochs.isdecimal() and 8 <= int(pixels) <= 2048 and int(epochs)):
                raise UserError(f"--sizes must be PIXELS:EPOCHS,... with 8 to 2048 pixels, got {self.sizes!r}")
            if epoch < int(epochs):
                return int(pixels)
            epoch -= int(epochs)
        return None

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
        """Of the term on logits; 1 where there is none."""
        return self.T or self.tau or 1.0

    @property
    def trained_by(self) -> str:
        """`CE`, `KD from resnet18`, `KD standardized from resnet18`, `DIST and features from resnet18`."""
        if self.objective == "ce":
            return "CE"
        words = [] if self.method == "none" else [f"{self.method}".upper() + " standardized" * self.standardize]
        words += ["features"] if self.overhaul else []
        return f"{' and '.join(words)} from {' + '.join(self.teacher_archs)}"

    @property
    def shares(self) -> tuple[float, float]:
        """(of the term on logits, of the CE term)."""
        if self.w is not None:
            return self.w, 1 - self.w
        return self.kd_weight or 0.0, self.ce_weight or 0.0

    @property
    def settings(self) -> dict[str, float]:
        """The flags of the method, as they are in force."""
        found = {name: getattr(self, name) for name in SETTINGS}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def formula(self) -> str:
        """The loss of the run in a line, with the values in force."""
        method, values = METHODS[self.method or ""], self.settings
        shares = ("w", "(1 - w)") if self.w is not None else ("kd_weight", "ce_weight")
        rising = "min(epoch / ramp, 1) * " if self.ramp else ""
        if not self.ramp:
            values.pop("ramp", None)
        terms = [] if self.method == "none" else [f"{shares[0]} * {rising}{method.formula}"]
        terms.append(f"{shares[1]} * CE(s, y)")
        if self.overhaul:
            terms.append("feature_weight * sum over stages of partial_l2 / (2^(stages after it) * B)")
            values["feature_weight"] = self.feature_weight or 0.0
        notes = [method.note, method.source, STANDARDIZED if self.standardize else ""]
        notes += [FEATURES_SOURCE] if self.overhaul else []
        shown = ", ".join(f"{name} = {value:g}" for name, value in values.items())
        return "; ".join([f"loss = {' + '.join(terms)}  with {shown}", *filter(None, notes)])

    @property
    def run_name(self) -> str:
        """The name of the run's directory below its student's."""
        if self.objective == "ce":
            return f"ce-seed{self.seed}"
        words = ["overhaul"] if self.overhaul else []
        words += [] if self.method == "none" else [f"{self.method}{'-standardized' if self.standardize else ''}"]
        words.append("+".join(self.teacher_archs))
        words += [self.ensemble] if self.ensemble != "logits" else []
        usual = {} if self.method == "kd" else METHODS[self.method or ""].defaults(self.photos, self.standardize)
        values = {name: value for name, value in self.settings.items() if usual.get(name) != value}
        if self.overhaul and self.feature_weight != FEATURE_WEIGHT[self.photos]:
            values["feature_weight"] = self.feature_weight or 0.0
        words += [f"{name.replace('_', '')}{value:g}" for name, value in values.items()]
        words += ["bnbatch"] if self.teacher_bn == "batch" else []
        return "-".join([*words, f"seed{self.seed}"])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """The inverse of to_dict. Raises UserError for fields of another version of this program."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise UserError(f"the recipe has fields that this version does not know: {', '.join(unknown)}")
        return cls(**values)  # what an older version did not know is at its default


@dataclass(frozen=True)
class Options:
    """Where things lie and how far to go this time: nothing here changes what a run computes."""

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
    store: bool = option(True, "keep the teacher's answers for other runs", group="data and files")
    store_limit: float = option(
        50.0, "gigabytes that a store may take; where it would take more there is none", group="data and files", least=0
    )
    class_order: str = option(
        "names",
        "whether the names of classes in a file of weights decide which output is which",
        group="data and files",
        choices=("names", "ignore"),
    )
    init: str | None = option(None, "weights the student starts from (default: from scratch)", group="data and files")
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
        False, "print where --overhaul takes features of teacher and student, and exit", group="running"
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

    @property
    def allowed(self) -> dict[str, bool]:
        """In what a run may differ from what it began as, in the words of RunDirectory.check."""
        return {"extend": self.extend, "allow_data_change": self.allow_data_change}
