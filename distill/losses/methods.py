"""The methods of distillation on logits by name, with the flags of each. Knows no torch: flags are checked at once.

To add one: a function in kd_loss.py, and an entry in METHODS under the function's name. Its flags become the function's
keywords (T and tau its `temperature`, where it has no tau); a flag of another name goes into SETTINGS, and is a new
field of Recipe as well.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from distill.options import flag

SETTINGS = ("T", "w", "alpha", "beta", "gamma", "tau", "ramp", "kd_weight", "ce_weight")  # flags of the methods
WEIGHTS = {"ramp": 0.0, "kd_weight": 1.0, "ce_weight": 1.0}  # ce_weight * CE + kd_weight * min(epoch / ramp, 1) * term
FEATURE_WEIGHT = {False: 1e-3, True: 1e-4}  # of --overhaul, on small images and on photos: its authors' (overhaul.py)


@dataclass(frozen=True)
class Method:
    """A loss on logits. `formula`: of its term, and a `note` on what stands in it. `small`, `photos`: its flags, with
    its authors' values on CIFAR and on ImageNet; `weights`: those that weigh it against CE.
    """

    formula: str
    source: str
    small: Mapping[str, float]
    photos: Mapping[str, float]
    weights: Mapping[str, float] = field(default_factory=lambda: WEIGHTS)
    note: str = ""
    labels: bool = False  # it wants one label for each image
    top_k: bool = False  # there is a function NAME_top_k for answers of which only the largest logits are kept
    standardized: Mapping[str, float] | None = None  # what --standardize changes of the defaults; None: not to be had
    zero_at_equality: bool = True  # else the least that it can be depends on the teacher
    by_deviation: bool = False  # it divides by the deviation of the student's logits, as --standardize does

    def __post_init__(self) -> None:
        assert self.small.keys() == self.photos.keys(), "small and photos must have the same flags"
        unknown = {*self.small, *self.weights, *(self.standardized or {})} - {*SETTINGS}
        assert not unknown, f"{unknown} must be in SETTINGS, and fields of Recipe"

    def defaults(self, photos: bool, standardize: bool) -> dict[str, float]:
        """Every flag of the method with its default."""
        own = self.photos if photos else self.small
        return {**own, **self.weights, **own, **((self.standardized or {}) if standardize else {})}

    def __str__(self) -> str:
        """Its flags and defaults, as --help shows them."""
        pairs = [
            f"{flag(k)} {v:g}" + (f" ({self.photos[k]:g})" if self.photos[k] != v else "")
            for k, v in self.small.items()
        ]
        return ", ".join(pairs)


METHODS = {
    "kd": Method(
        "T^2 * KL(softmax(t/T) || softmax(s/T))",
        "Hinton et al. 2015, arXiv:1503.02531",
        small={"T": 3.0, "w": 0.8},
        photos={"T": 1.0, "w": 0.5},
        weights={},
        top_k=True,
        standardized={"T": 2.0},
    ),
    "dkd": Method(
        "tau^2 * (alpha * KL(label or not) + beta * KL(other classes))",
        "Zhao et al. 2022, arXiv:2203.08679",
        small={"alpha": 1.0, "beta": 8.0, "tau": 4.0, "ramp": 20.0},
        photos={"alpha": 1.0, "beta": 0.5, "tau": 1.0, "ramp": 1.0},
        note="distributions at temperature tau",
        labels=True,
        top_k=True,
        standardized={"tau": 2.0},
    ),
    "nkd": Method(
        "(-p_t(y) log p_s(y) + gamma * tau^2 * CE(other classes))",
        "Yang et al. 2023, arXiv:2303.13005",
        small={"gamma": 3.5, "tau": 3.0},
        photos={"gamma": 1.5, "tau": 1.0},
        note="other classes at temperature tau",
        labels=True,
        top_k=True,
        zero_at_equality=False,
    ),
    "dist": Method(
        "tau^2 * (beta * (1 - r across classes) + gamma * (1 - r across images))",
        "Huang et al. 2022, arXiv:2205.10536",
        small={"beta": 1.0, "gamma": 1.0, "tau": 4.0, "kd_weight": 2.0},
        photos={"beta": 1.0, "gamma": 1.0, "tau": 1.0, "kd_weight": 2.0},
        note="r of softmax(s/tau) and softmax(t/tau)",
        by_deviation=True,
    ),
    "none": Method("0", "", small={}, photos={}, weights={"ce_weight": 1.0}),  # with --overhaul
}
STANDARDIZED = "s and t standardised, Sun et al. 2024, arXiv:2403.01427"
FEATURES_SOURCE = "Heo et al. 2019, arXiv:1904.01866"


def settle(
    given: Mapping[str, float | None], method: str, *, photos: bool, standardize: bool
) -> dict[str, float | None]:
    """Every one of SETTINGS as `method` uses it: what is given (not None), else its default, else None.

    Plain kd shares out the loss by `w`, or weighs it by `kd_weight` and `ce_weight` where one of them is given. Raises
    ValueError naming the flag for one that the method does not use.
    """
    known = METHODS[method].defaults(photos, standardize)
    if "w" in known and (given["kd_weight"] is not None or given["ce_weight"] is not None):
        if given["w"] is not None:
            raise ValueError("--w shares out the loss, --kd-weight and --ce-weight weigh it: give one or the other")
        known = {"T": known["T"], "kd_weight": 1.0, "ce_weight": 1.0}
    for name, value in given.items():
        if value is not None and name not in known:
            takes = ", ".join(flag(other) for other in known)
            more = ", or --kd-weight and --ce-weight for --w" if "w" in known else ""
            raise ValueError(f"{flag(name)} is no flag of --method {method}, which takes {takes}{more}")
    return {name: known.get(name) if given[name] is None else given[name] for name in SETTINGS}
