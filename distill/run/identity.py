"""What tells one run from another: its recipe, and facts about images, weights and processes."""

from typing import Any

from distill.config.method_flags import FEATURE_FLAGS, METHOD_FLAGS
from distill.config.recipe import Options, Recipe, flatten
from distill.data.datasets import Images
from distill.options import flag
from distill.parallel.devices import replicas

NOT_COMPARED = ("data", "images")  # facts for people: the name of the data, how many images it has


def identify(data: Images, init_digest: str | None, device_name: str) -> dict[str, Any]:
    """Returns the facts of a run that do not depend on its teacher.

    These are its images, the weights that it starts from, and into how many parts a batch is divided, each of which has
    BatchNorm statistics of its own. `device_name`: as for parallel.devices.devices.
    """
    facts = {"data": data.name, "data_digest": data.digest, "images": data.counts}
    return {**facts, "init_digest": init_digest, "world_size": replicas(device_name)}


def differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns the fields in which two runs differ; each run is its recipe and facts in one dict.

    Those of the method are named by its flags.
    """
    before, now = flatten(before), flatten(now)
    return [key for key in {**before, **now} if before.get(key) != now.get(key) and key not in NOT_COMPARED]


def disallowed(before: dict[str, Any], now: dict[str, Any], recipe: Recipe, options: Options) -> list[str]:
    """Returns those fields of `differing` that the options do not let differ from what a run began as.

    --extend lets `epochs` grow; --allow-data-change lets the images be others, unless they are remembered one by one.
    """
    allowed = {
        "epochs": options.extend and now["epochs"] > before["epochs"],
        "data_digest": options.allow_data_change and not recipe.remembers_images,
    }
    return [key for key in differing(before, now) if not allowed.get(key)]


def format_diff(changed: list[str], before: dict[str, Any], now: dict[str, Any]) -> str:
    """Returns `--lr was 0.1, is 0.2, data_digest was 1, is 2` for the `changed` fields of two runs."""
    flags = {name for owner in (Recipe, *Recipe.__subclasses__()) for name in vars(owner)["__dataclass_fields__"]}
    flags = flags - {"features"} | {*METHOD_FLAGS, *FEATURE_FLAGS}
    before, now = flatten(before), flatten(now)
    old, new = ({key: str(values.get(key))[:24] for key in changed} for values in (before, now))  # a digest is long
    facts = {"teacher_digest": "--teacher-checkpoint (teacher_digest)", "init_digest": "--init (init_digest)"}
    facts |= {"world_size": "NPROC or the number of GPUs (world_size)"}
    names = {key: flag(key) if key in flags else facts.get(key, key) for key in changed}
    return ", ".join(f"{names[key]} was {old[key]}, is {new[key]}" for key in changed)


def format_counts(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Returns `23 training, 8 test images (24 training, 8 test images before)` from the facts of two runs."""
    same = before.get("images") == now.get("images")
    return f"{now.get('images')} ({'as many, but others,' if same else before.get('images')} before)"
