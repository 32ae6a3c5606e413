"""Flags: their names are frozen, spellings are forgiving, and every mistake is one line that names the flag."""

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from cifar10 import train_ce, train_kd
from cifar10.recipes import RECIPES
from distill.config import cli
from distill.config.method_flags import Choice
from distill.config.recipe import Options, Recipe
from distill.errors import UserError
from distill.losses import FEATURES, METHODS
from distill.losses.dist import DIST
from distill.losses.kd_loss import KD
from distill.losses.overhaul import Overhaul
from distill.options import flag

FLAGS = """--arch --teacher-arch --ensemble --teacher-image-size --pretrained --weights --teacher-weights --image-size
--mean --std --teacher-mean --teacher-std --class-order --allow-data-change
--method --features --overhaul --feature-weight --teacher-bn --show-features --teacher-precision --top-k
--store --store-limit
--epochs --batch-size --accumulate --lr --bias-lr --bn-momentum --optimizer --momentum --weight-decay --decay-all
--sizes --schedule --decay-epochs --decay-rate --warmup --clip-norm --ema
--dropout --drop-connect --label-smoothing --precision --compile --sync-bn
--augment --padding --reflect --alternate-flip --cutout --mixup --views --seed --view-seed --val-split
--data --workers --skip-bad-images --teacher-checkpoint --init --output
--recipe --show-recipe --device --deterministic --steps --resume --save-minutes --tensorboard
--extend --allow-data-change --fresh --evaluate"""
FLAGS_OF_METHODS = "--T --w --standardize --alpha --beta --gamma --tau --kd-warmup --ramp --kd-weight --ce-weight"
COMMANDS: dict[str, Callable[[list[str]], None]] = {"ce": train_ce.main, "kd": train_kd.main}


def parse(argv: list[str], default: str = "kd") -> tuple[Recipe, Options]:
    return cli.parse(argv, prog="x", recipes=RECIPES, default=default, description="", examples="")


def flags_of(*owners: type) -> set[str]:
    """The flags that the fields of dataclasses make, and their hidden spellings."""
    known = [f for owner in owners for f in fields(owner) if f.metadata]
    return {name for f in known for name in (flag(f.name), *f.metadata["aliases"])}


def test_the_set_of_flags_is_frozen() -> None:
    """People have scripts: a flag that goes or changes its name breaks them."""
    assert flags_of(Recipe, Options, Choice, Overhaul) == set(FLAGS.split())
    assert flags_of(*METHODS.values()) >= set(FLAGS_OF_METHODS.split())  # a new method brings its own


def test_flags_for_photos_are_frozen() -> None:
    from imagenet.recipes import ImageNetOptions, ImageNetRecipe

    more = "--render-size --decoder --loader-minutes --kd"
    assert flags_of(ImageNetRecipe, ImageNetOptions, Choice, Overhaul) == set(FLAGS.split()) | set(more.split())


def test_spellings_of_flags() -> None:
    given = (
        "-a resnet18 --teacher_arch=resnet152 --teacher_checkpoint a_b.pt -b 64 -j 4 -e --wd 0.01 --save_path my_run"
    )
    recipe, options = parse(given.split())
    assert (recipe.arch, recipe.teacher_arch) == ("resnet18", "resnet152")
    assert (recipe.batch_size, recipe.weight_decay) == (64, 0.01)
    assert (options.teacher_checkpoint, options.workers, options.evaluate) == ("a_b.pt", 4, True)
    assert options.output == "my_run"


def test_recipes_and_what_is_given_beside_them() -> None:
    assert parse([])[0] == RECIPES["kd"]
    assert parse([], "student")[0] == RECIPES["student"]
    assert parse(["--recipe", "sample-student"])[0] == RECIPES["sample_student_kd"]  # taught, where there is a teacher
    recipe, _ = parse(["--recipe", "sample-student-kd", "--epochs", "3", "--decay-all"])
    assert (recipe.epochs, recipe.decay_all) == (3, True)
    assert recipe.batch_size == RECIPES["sample_student_kd"].batch_size


def test_defaults_of_the_two_commands() -> None:
    assert RECIPES["student"].arch == RECIPES["kd"].arch == "efficientnet_b0"
    assert (RECIPES["kd"].teacher_arch, RECIPES["kd"].method) == ("resnext29_2x64d", KD(T=3.0, w=0.8))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", {"method": "kd", "T": 3, "w": 0.8}),
        ("--method kd --T 4", {"method": "kd", "T": 4, "w": 0.8}),
        ("--standardize", {"method": "kd", "T": 2, "w": 0.8}),
        (
            "--standardize --T 3 --kd-weight 9 --ce-weight 0.1",
            {"method": "kd", "T": 3, "kd_weight": 9, "ce_weight": 0.1},
        ),
        ("--kd-weight 3", {"method": "kd", "T": 3, "kd_weight": 3, "ce_weight": 1}),
        (
            "--method dkd",
            {"method": "dkd", "alpha": 1, "beta": 8, "T": 4, "kd_warmup": 20, "kd_weight": 1, "ce_weight": 1},
        ),
        (
            "--method dkd --standardize",
            {"method": "dkd", "alpha": 1, "beta": 8, "T": 2, "kd_warmup": 20, "kd_weight": 1, "ce_weight": 1},
        ),
        (
            "--method nkd --gamma 1",
            {"method": "nkd", "gamma": 1, "T": 3, "kd_warmup": 0, "kd_weight": 1, "ce_weight": 1},
        ),
        (
            "--method dist",
            {"method": "dist", "beta": 1, "gamma": 1, "T": 4, "kd_warmup": 0, "kd_weight": 2, "ce_weight": 1},
        ),
        ("--overhaul", {"method": "none", "ce_weight": 1, "feature_weight": 1e-3}),
        ("--overhaul --T 4", {"method": "kd", "T": 4, "w": 0.8, "feature_weight": 1e-3}),
        ("--overhaul --kd-weight 1", {"method": "kd", "T": 3, "kd_weight": 1, "ce_weight": 1, "feature_weight": 1e-3}),
        (
            "--overhaul --method dist --tau 1 --ramp 2",
            {
                "method": "dist",
                "beta": 1,
                "gamma": 1,
                "T": 1,
                "kd_warmup": 2,
                "kd_weight": 2,
                "ce_weight": 1,
                "feature_weight": 1e-3,
            },
        ),
    ],
)
def test_methods_come_with_their_own_defaults(given: str, expected: dict[str, Any]) -> None:
    recipe = parse(given.split())[0]
    assert recipe.method
    name, weight = expected.pop("method"), expected.pop("feature_weight", None)
    assert recipe.method.name == name
    assert recipe.method.numbers == expected
    assert recipe.features == (weight and Overhaul(feature_weight=weight))
    for flag_name, value in expected.items():
        assert (f"{flag_name} = {value:g}" in recipe.formula) == bool(value)
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_defaults_on_photos_and_what_a_recipe_says() -> None:
    from imagenet import recipes as photos

    def settings(arguments: str, name: str = "standard") -> dict[str, float]:
        given = ["--recipe", name, *arguments.split()]
        recipes = photos.RECIPES
        found, _ = cli.parse(given, prog="x", recipes=recipes, default="standard_kd", description="", examples="")
        return found.method.numbers  # type: ignore[no-any-return]

    assert settings("") == {"T": 1, "w": 0.5}
    assert settings("--method dkd") == {"alpha": 1, "beta": 0.5, "T": 1, "kd_warmup": 1, "kd_weight": 1, "ce_weight": 1}
    assert settings("--method nkd") == {"gamma": 1.5, "T": 1, "kd_warmup": 0, "kd_weight": 1, "ce_weight": 1}
    assert settings("--method dist")["T"] == 1
    assert settings("--kd-weight 3 --ce-weight 1") == {"T": 1, "kd_weight": 3, "ce_weight": 1}
    assert settings("--method kd", "original") == {"T": 3, "w": 0.8}  # the recipe's own, as the method is the same


@pytest.mark.parametrize("method", [*METHODS, "kd overhaul", "dist overhaul"])
def test_a_recipe_of_another_method(method: str) -> None:
    """Nothing given: nothing changes; what is given means what it would mean beside plain kd."""
    name, *overhaul = method.split()
    recipe = RECIPES["kd"].with_flags({"method": name, "overhaul": bool(overhaul) or name == "none"})
    assert recipe.method
    assert recipe.method.name == name
    assert recipe.with_flags({}) == recipe
    assert recipe.with_flags({"seed": 1}) == replace(recipe, seed=1)
    weight = "w" if name == "kd" else "ce_weight"
    changed = recipe.with_flags({weight: 0.5})
    assert changed == replace(recipe, method=replace(recipe.method, **{weight: 0.5}))
    assert recipe.with_flags({"overhaul": False, "method": "kd"}) == RECIPES["kd"]
    other = "nkd" if name == "dist" else "dist"
    assert recipe.with_flags({"method": other, "overhaul": False}).run_name == f"{other}-resnext29_2x64d-seed0"
    if name == "none":
        assert recipe.with_flags({"overhaul": False}) == RECIPES["kd"]
        assert recipe.with_flags({"w": 0.5}).method == KD(w=0.5)


def test_ways_to_weigh_kd() -> None:
    weighed = RECIPES["kd"].with_flags({"kd_weight": 9.0, "ce_weight": 0.1})
    assert weighed.loss_weights == (9.0, 0.1)
    assert weighed.with_flags({"w": 0.9}).method == KD(w=0.9)
    assert RECIPES["kd"].loss_weights == (0.8, 1 - 0.8)
    assert RECIPES["kd"].with_flags({"standardize": True}).method == KD(T=2.0, standardize=True)
    assert RECIPES["kd"].with_flags({"standardize": True}).with_flags({"method": "dist"}).method == DIST()
    for wrong in ({"kd_weight": 1.0, "ce_weight": 1.0}, {"w": None, "ce_weight": 1.0}):
        with pytest.raises(UserError, match="either w, or both"):
            KD(**wrong)  # type: ignore[arg-type]


def test_recipes_of_earlier_versions_are_refused() -> None:
    old = {"arch": "resnet18", "teacher_arch": "resnet152", "T": 3.0, "w": 0.8, "method": "kd"}
    with pytest.raises(UserError, match="commit 1791190 is the last that reads it"):
        Recipe.from_dict(old)
    new = RECIPES["kd"].to_dict()
    for wrong in ({"name": "fitnet"}, {**new["method"], "p": 2}, {}):
        with pytest.raises(UserError, match="has a method that this version does not know"):
            Recipe.from_dict({**new, "method": wrong})
    with pytest.raises(UserError, match="both a teacher and a method, or neither"):
        Recipe.from_dict({**new, "method": None})


def test_names_of_runs() -> None:
    names = {
        "--teacher-arch resnet18 --T 4 --w 0.9": "kd-resnet18-T4-w0.9-seed0",
        "--teacher-arch resnet18 --kd-weight 9 --ce-weight 0.1": "kd-resnet18-T3-kdweight9-ceweight0.1-seed0",
        "--teacher-arch resnet18 --standardize --seed 2": "kd-standardized-resnet18-T2-w0.8-seed2",
        "--teacher-arch resnet18 --method dkd": "dkd-resnet18-seed0",
        "--teacher-arch resnet18 --method dkd --beta 2": "dkd-resnet18-beta2-seed0",
        "--teacher-arch resnet18 --method dkd --tau 2 --ramp 0": "dkd-resnet18-T2-kdwarmup0-seed0",
        "--teacher-arch resnet18 --method dkd --standardize": "dkd-standardized-resnet18-seed0",
        "--teacher-arch resnet18 --overhaul": "overhaul-resnet18-seed0",
        "--teacher-arch resnet18 --overhaul --method dist --teacher-bn batch": "overhaul-dist-resnet18-bnbatch-seed0",
        "--teacher-arch resnet18 --overhaul --w 1 --feature-weight 1": "overhaul-kd-resnet18-T3-w1-"
        "featureweight1-seed0",
    }
    assert {given: parse(given.split())[0].run_name for given in names} == names


def test_show_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["--show-recipe", "--T", "4"])
    assert stop.value.code == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown.pop("recipe") == "kd"
    assert Recipe.from_dict(shown) == parse(["--T", "4"])[0]


def test_help_is_worth_reading(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_kd.main(["--help"])
    shown = capsys.readouterr().out
    for words in (
        "loss = w * T^2 * KL(softmax(t/T) || softmax(s/T)) + (1 - w) * CE(s, y)",
        "default: 3.0",
        "bash scripts/trainKD.sh",
        "training:",
        "views:",
        "sample_student_kd",
    ):
        assert words in shown
    assert not [name for name in ("--tau", "--ramp", "--alpha", "--gamma") if name in shown]
    with pytest.raises(SystemExit):
        train_kd.main(["--features", "crd", "--help"])
    said = capsys.readouterr().out
    assert "loss = ce_weight * CE(s, y)\n" in said
    assert "--features crd: + feature_weight * (contrast(s, memory of t) + contrast(t, memory of s))" in said
    with pytest.raises(SystemExit):
        train_kd.main(["--method", "dkd", "--help"])
    shown = capsys.readouterr().out
    assert "loss = kd_weight * min(epoch / kd_warmup, 1) * T^2 * (alpha" in shown
    assert not [name for name in ("--w W", "--gamma", "--tau", "--ramp") if name in shown]
    assert not [name for name in ("--alpha", "--beta", "--T T", "--kd-warmup", "--standardize") if name not in shown]
    with pytest.raises(SystemExit):
        train_ce.main(["--help"])
    assert "--teacher" not in capsys.readouterr().out


# fmt: off
MISTAKES = [  # command, arguments, what the line must name
    *[("kd", f"--{name} {value}", f"--{name} must be {allowed}") for name, allowed, values in (
        ("T", "a number, at least 0.0001, at most 10000", ("0", "-1", "1e-40", "1e5", "nan", "inf", "x", "''")),
        ("w", "a number, at least 0, at most 1", ("-0.1", "1.1", "nan", "x")),
        ("epochs", "an integer, at least 1", ("0", "-3", "1.5", "many", "1e3")),
        ("batch-size", "an integer, at least 1", ("0", "-1", "1.5", "x")),
        ("lr", "a number, above 0", ("0", "-0.1", "nan", "inf", "x")),
        ("momentum", "a number, at least 0, at most 1", ("-0.1", "1.5", "x")),
        ("weight-decay", "a number, at least 0", ("-1", "nan", "x")),
        ("warmup", "a number, at least 0", ("-1", "x")),
        ("optimizer", "one of sgd, adamw, rmsprop", ("adam",)),
        ("clip-norm", "a number, at least 0", ("-1", "x")),
        ("ema", "a number, at least 0, below 1", ("1", "-0.5", "x")),
        ("dropout", "a number, at least 0, below 1", ("1", "-0.5", "x")),
        ("drop-connect", "a number, at least 0, below 1", ("1", "x")),
        ("label-smoothing", "a number, at least 0, at most 1", ("-0.1", "2", "x")),
        ("schedule", "one of cosine, multistep, step, onecycle, restarts, constant", ("linear", "''")),
        ("precision", "one of auto, float32, bfloat16", ("float16", "fp32")),
        ("augment", "one of crop_flip, original, none", ("cutout", "None")),
        ("cutout", "an integer, at least 0", ("-1", "8.5", "x")),
        ("views", "an integer, at least 1", ("0", "-1", "all")),
        ("seed", "an integer, at least 0", ("-1", "x", "4294967296")),
        ("view-seed", "an integer, at least 0", ("-1", "x")),
        ("val-split", "an integer, at least 0", ("-5", "0.1")),
        ("workers", "an integer, at least 0", ("-1", "x", "1000")),
        ("steps", "an integer, at least 1", ("0", "-1", "x")),
        ("save-minutes", "a number, at least 0", ("-1", "x")),
        ("device", "auto, cpu, cuda, cuda:N or cuda:N,M", ("tpu", "cpu:x", "mps")),
    ) for value in values],
    ("kd", "--device cuda:99", "--device cuda:99"),
    ("kd", "--recipe best", "--recipe must be one of kd"),
    ("kd", "--recipe cpu_student_finetune", "--recipe cpu_student_finetune_kd goes on from trained weights: give it"),
    ("kd", "--tempreature 3", "unknown argument --tempreature"),
    ("kd", "--teacher resnet18", "unknown argument --teacher; near it: --teacher-arch, --teacher-image-size"),
    ("kd", "--epoch 3", "near it: --epochs"),
    ("ce", "--learning-rate 0.1", "unknown argument --learning-rate; near it: --lr"),
    ("kd", "--temperature 4", "unknown argument --temperature; near it: --T"),
    ("ce", "--temperature 4", "unknown argument --temperature; --help lists the flags"),
    ("kd", "extra", "unknown argument extra"),
    ("kd", "--epochs", "--epochs: expected one argument"),
    ("kd", "--extend --fresh", "--extend continues a run and --fresh"),
    ("kd", "--fresh --resume x", "--resume continues a run and --fresh"),
    ("kd", "--method fit", "--method must be one of " + ", ".join(METHODS)),
    ("kd", "--method fitnet", "--method fitnet is a loss on features: --features fitnet"),
    ("kd", "--features fit", "--features must be one of " + ", ".join(FEATURES)),
    ("kd", "--method dkd --gamma 4", "--gamma is no flag of --method dkd, which takes --alpha, --beta, --T"),
    ("kd", "--method nkd --w 0.5", "--w is no flag of --method nkd, which takes --gamma, --T"),
    ("kd", "--method dist --alpha 1", "--alpha is no flag of --method dist, which takes --beta, --gamma, --T"),
    ("kd", "--beta 8", "--beta is no flag of --method kd, which takes --T, --w, --kd-weight, --ce-weight"),
    ("kd", "--w 0.9 --kd-weight 9", "--w shares out the loss, --kd-weight and --ce-weight weigh it"),
    ("kd", "--method dist --standardize", "--standardize is no flag of --method dist, which takes"),
    ("kd", "--method dkd --mixup", "--method dkd wants one label for each image"),
    ("kd", "--method dist --top-k 5", "--top-k is for --method "),
    ("kd", "--standardize --top-k 5", "not for --standardize, which wants all logits"),
    ("kd", "--method none", "--method none is for --features"),
    ("kd", "--method dkd --tau 0", "--T must be a number, at least 0.0001"),
    ("kd", "--feature-weight 1", "--feature-weight: for a method on features, --features NAME"),
    ("kd", "--features at --distance 1", "--distance is no flag of --features at, which takes --feature-weight"),
    ("kd", "--features at --overhaul", "--overhaul is --features overhaul, and here is --features at"),
    ("kd", "--features sp --batch-size 1", "--features sp correlates across images"),
    ("kd", "--features crd --mixup", "--features crd wants one label for each image"),
    ("kd", "--features vid --sizes 16:1", "--features vid compares features of one size"),
    ("kd", "--teacher-bn batch", "--teacher-bn: for a method on features, --features NAME"),
    ("kd", "--overhaul --ce-weight 0", "leave the last layer untaught: add --method kd --w 1"),
    ("kd", "--overhaul --kd-weight 0 --ce-weight 0", "leave the last layer untaught: add --method kd --w 1"),
    ("kd", "--method dkd --kd-weight 0 --ce-weight 0", "untaught: one of them must be more"),
    ("kd", "--method dist --batch-size 8 --accumulate 8", "--method dist correlates across images"),
    ("kd", "--overhaul --compile", "--features overhaul watches the networks at work"),
    ("ce", "--method dkd", "unknown argument --method without a teacher: it is for trainKD.sh, and train.sh --kd"),
    ("ce", "--overhaul", "unknown argument --overhaul"),
    ("ce", "--T 3", "unknown argument --T"),
    ("ce", "--teacher-arch resnet18", "unknown argument --teacher-arch"),
    ("kd", "--arch resnet51", "unknown architecture 'resnet51'"),
    ("kd", "--teacher-arch vgg15", "unknown architecture 'vgg15'"),
    ("ce", "--data sample --arch resnet18 --dropout 0.3", "--dropout and --drop-connect: resnet18 has neither"),
    ("ce", "--arch ''", "--arch must be text"),
    ("ce", "--data nowhere", "--data nowhere does not exist"),
    ("ce", "--data pyproject.toml", "neither 'sample' nor a directory nor a .npz file"),
    ("ce", "--data distill", "has no directory 'train'"),
    ("ce", "--data sample --batch-size 4000", "--batch-size 4000 is more than the 2000 training images"),
    ("ce", "--data sample --val-split 1950", "--batch-size 128 is more than the 2000 training images less 1950"),
    ("ce", "--data sample --views 163", "--views must be at most 162"),
    ("ce", "--data sample --augment none --views 2", "--views must be at most 1"),
    ("ce", "--augment none --cutout 16", "--augment none shows one view of each image: --cutout"),
    ("ce", "--alternate-flip --views 5", "--alternate-flip takes views in pairs: --views must be even, got 5"),
    ("ce", "--data sample --init nowhere.pt", "cannot read nowhere.pt: No such file"),
    ("ce", "--data sample --init pyproject.toml", "pyproject.toml is damaged or no checkpoint"),
    ("ce", "--data sample --init distill", "distill is a directory without last.pt"),
    ("ce", "--data sample -e --output nowhere", "--evaluate: there is no nowhere/last.pt"),
    ("ce", "--data sample --output pyproject.toml", "cannot use pyproject.toml as a run's directory"),
    ("kd", "--data sample --teacher-checkpoint nowhere.pt", "cannot read nowhere.pt"),
]
# fmt: on


def words(arguments: str) -> list[str]:
    return ["" if word == "''" else word for word in arguments.split()]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "arguments", "named"), MISTAKES, ids=[f"{c} {a}" for c, a, _ in MISTAKES])
def test_mistakes(command: str, arguments: str, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    with pytest.raises(UserError) as error:
        COMMANDS[command](words(arguments))
    assert named in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


def test_at_least_sixty_kinds() -> None:
    assert len({(command, arguments) for command, arguments, _ in MISTAKES}) >= 60


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["--T 0", "--data nowhere", "--arch x --data sample"])
def test_a_mistake_is_one_line_and_exit_code_2(command: Any, arguments: str) -> None:
    found = command("cifar10/train_kd.py", *arguments.split())
    assert found.returncode == 2
    assert found.stderr.startswith("error: ")
    assert found.stderr.count("\n") == 1
    assert "Traceback" not in found.stderr
