"""Flags: their names are frozen, spellings are forgiving, and every mistake is one line that names the flag."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cifar10 import train_ce, train_kd
from cifar10.recipes import RECIPES
from distill.config import cli
from distill.config.recipe import Options, Recipe
from distill.errors import UserError
from distill.losses.methods import METHODS
from distill.options import flag

FLAGS = """--arch --teacher-arch --ensemble --teacher-image-size --pretrained --weights --teacher-weights --image-size
--mean --std --teacher-mean --teacher-std --class-order --allow-data-change
--T --w --method --standardize --alpha --beta --gamma --tau --ramp
--kd-weight --ce-weight --overhaul --feature-weight --teacher-bn --show-features --teacher-precision --top-k
--store --store-limit
--epochs --batch-size --accumulate --lr --bias-lr --bn-momentum --optimizer --momentum --weight-decay --decay-all
--sizes --schedule --decay-epochs --decay-rate --warmup --clip-norm --ema
--dropout --drop-connect --label-smoothing --precision --compile --sync-bn
--augment --padding --reflect --alternate-flip --cutout --mixup --views --seed --view-seed --val-split
--data --workers --skip-bad-images --teacher-checkpoint --init --output
--recipe --show-recipe --device --deterministic --steps --resume --save-minutes --tensorboard
--extend --allow-data-change --fresh --evaluate"""
COMMANDS: dict[str, Callable[[list[str]], None]] = {"ce": train_ce.main, "kd": train_kd.main}


def parse(argv: list[str], default: str = "kd") -> tuple[Recipe, Options]:
    return cli.parse(argv, prog="x", recipes=RECIPES, default=default, description="", examples="")


def test_the_set_of_flags_is_frozen() -> None:
    """People have scripts: a flag that goes or changes its name breaks them."""
    from dataclasses import fields

    flags = {flag(f.name) for owner in (Recipe, Options) for f in fields(owner)}
    assert flags == set(FLAGS.split())


def test_flags_for_photos_are_frozen() -> None:
    from dataclasses import fields

    from imagenet.recipes import ImageNetOptions, ImageNetRecipe

    flags = {flag(f.name) for owner in (ImageNetRecipe, ImageNetOptions) for f in fields(owner)}
    more = "--render-size --decoder --loader-minutes --kd"
    assert flags == set(FLAGS.split()) | set(more.split())


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
    assert (RECIPES["kd"].teacher_arch, RECIPES["kd"].T, RECIPES["kd"].w) == (
        "resnext29_2x64d",
        3.0,
        0.8,
    )


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
        ("--method dkd", {"alpha": 1, "beta": 8, "tau": 4, "ramp": 20, "kd_weight": 1, "ce_weight": 1}),
        ("--method dkd --standardize", {"alpha": 1, "beta": 8, "tau": 2, "ramp": 20, "kd_weight": 1, "ce_weight": 1}),
        ("--method nkd --gamma 1", {"gamma": 1, "tau": 3, "ramp": 0, "kd_weight": 1, "ce_weight": 1}),
        ("--method dist", {"beta": 1, "gamma": 1, "tau": 4, "ramp": 0, "kd_weight": 2, "ce_weight": 1}),
        ("--overhaul", {"method": "none", "ce_weight": 1, "feature_weight": 1e-3}),
        ("--overhaul --T 4", {"method": "kd", "T": 4, "w": 0.8, "feature_weight": 1e-3}),
        ("--overhaul --kd-weight 1", {"method": "kd", "T": 3, "kd_weight": 1, "ce_weight": 1, "feature_weight": 1e-3}),
        (
            "--overhaul --method dist --tau 1",
            {"beta": 1, "gamma": 1, "tau": 1, "ramp": 0, "kd_weight": 2, "ce_weight": 1},
        ),
    ],
)
def test_methods_come_with_their_own_defaults(given: str, expected: dict[str, Any]) -> None:
    recipe = parse(given.split())[0]
    named = {name: value for name, value in expected.items() if name not in ("method", "feature_weight")}
    assert recipe.settings == named
    for name, value in expected.items():
        assert getattr(recipe, name) == value
        if isinstance(value, (int, float)) and name not in ("ramp",):
            assert f"{name} = {value:g}" in recipe.formula
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert replace(recipe, seed=1).settings == named


def test_defaults_on_photos_and_what_a_recipe_says() -> None:
    from imagenet import recipes as photos

    def settings(arguments: str, name: str = "standard") -> dict[str, float]:
        given = ["--recipe", name, *arguments.split()]
        recipes = photos.RECIPES
        found, _ = cli.parse(given, prog="x", recipes=recipes, default="standard_kd", description="", examples="")
        return found.settings  # type: ignore[no-any-return]

    assert settings("") == {"T": 1, "w": 0.5}
    assert settings("--method dkd") == {"alpha": 1, "beta": 0.5, "tau": 1, "ramp": 1, "kd_weight": 1, "ce_weight": 1}
    assert settings("--method nkd") == {"gamma": 1.5, "tau": 1, "ramp": 0, "kd_weight": 1, "ce_weight": 1}
    assert settings("--method dist")["tau"] == 1
    assert settings("--kd-weight 3 --ce-weight 1") == {"T": 1, "kd_weight": 3, "ce_weight": 1}
    assert settings("--method kd", "original") == {"T": 3, "w": 0.8}  # the recipe's own, as the method is the same


@pytest.mark.parametrize("method", [*METHODS, "kd overhaul", "dist overhaul"])
def test_a_recipe_of_another_method(method: str) -> None:
    """Nothing given: nothing changes; what is given means what it would mean beside plain kd."""
    name, *overhaul = method.split()
    recipe = RECIPES["kd"].changed({"method": name, "overhaul": bool(overhaul) or name == "none"})
    for given in ({}, {"seed": 1}, {"ce_weight": 0.5} if recipe.w is None else {"w": 0.5}):
        changed = recipe.changed(given)
        assert changed == replace(recipe, **given)
        assert changed.method == name
    back = recipe.changed({"overhaul": False, "method": "kd"})
    assert back == RECIPES["kd"]
    other = recipe.changed({"method": "nkd" if name == "dist" else "dist", "overhaul": False})
    assert other.run_name == f"{'nkd' if name == 'dist' else 'dist'}-resnext29_2x64d-seed0"
    if name == "none":
        assert recipe.changed({"overhaul": False}) == RECIPES["kd"]
        assert recipe.changed({"w": 0.5}).method == "kd"


def test_ways_to_weigh_kd() -> None:
    weighed = RECIPES["kd"].changed({"kd_weight": 9.0, "ce_weight": 0.1})
    assert weighed.shares == (9.0, 0.1)
    assert weighed.changed({"w": 0.9}).settings == {"T": 3, "w": 0.9}
    assert RECIPES["kd"].changed({"standardize": True}).changed({"method": "nkd"}).standardize is False


def test_names_of_runs() -> None:
    names = {
        "--teacher-arch resnet18 --T 4 --w 0.9": "kd-resnet18-T4-w0.9-seed0",
        "--teacher-arch resnet18 --kd-weight 9 --ce-weight 0.1": "kd-resnet18-T3-kdweight9-ceweight0.1-seed0",
        "--teacher-arch resnet18 --standardize --seed 2": "kd-standardized-resnet18-T2-w0.8-seed2",
        "--teacher-arch resnet18 --method dkd": "dkd-resnet18-seed0",
        "--teacher-arch resnet18 --method dkd --beta 2": "dkd-resnet18-beta2-seed0",
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
        cli.LOSS_FORMULA,
        "default: 3.0",
        "bash scripts/trainKD.sh",
        "training:",
        "views:",
        "sample_student_kd",
    ):
        assert words in shown
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
    ("kd", "--tempreature 3", "unknown argument --tempreature"),
    ("kd", "--teacher resnet18", "unknown argument --teacher; near it: --teacher-arch, --teacher-image-size"),
    ("kd", "--epoch 3", "near it: --epochs"),
    ("kd", "extra", "unknown argument extra"),
    ("kd", "--epochs", "--epochs: expected one argument"),
    ("kd", "--extend --fresh", "--extend continues a run and --fresh"),
    ("kd", "--fresh --resume x", "--resume continues a run and --fresh"),
    ("kd", "--method fitnet", "--method must be one of " + ", ".join(METHODS)),
    ("kd", "--method dkd --T 4", "--T is no flag of --method dkd, which takes --alpha, --beta, --tau"),
    ("kd", "--method nkd --w 0.5", "--w is no flag of --method nkd, which takes --gamma, --tau"),
    ("kd", "--method dist --alpha 1", "--alpha is no flag of --method dist, which takes --beta, --gamma, --tau"),
    ("kd", "--beta 8", "--beta is no flag of --method kd, which takes --T, --w, or --kd-weight and --ce-weight"),
    ("kd", "--w 0.9 --kd-weight 9", "--w shares out the loss, --kd-weight and --ce-weight weigh it"),
    ("kd", "--method dist --standardize", "--standardize is for kd and dkd, not for --method dist"),
    ("kd", "--method dkd --mixup", "--method dkd wants one label for each image"),
    ("kd", "--method dist --top-k 5", "--top-k is for --method kd"),
    ("kd", "--standardize --top-k 5", "--top-k is for --method kd"),
    ("kd", "--method none", "--method none is for --overhaul"),
    ("kd", "--method dkd --tau 0", "--tau must be a number, at least 0.0001"),
    ("kd", "--feature-weight 1", "belong to --overhaul"),
    ("kd", "--teacher-bn batch", "belong to --overhaul"),
    ("kd", "--overhaul --ce-weight 0", "leave the last layer untaught: add --method kd --w 1"),
    ("kd", "--overhaul --kd-weight 0 --ce-weight 0", "leave the last layer untaught: add --method kd --w 1"),
    ("kd", "--method dkd --kd-weight 0 --ce-weight 0", "untaught: one of them must be more"),
    ("kd", "--method dist --batch-size 8 --accumulate 8", "--method dist correlates across images"),
    ("kd", "--overhaul --compile", "--overhaul watches the networks at work"),
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
    ("ce", "--data sample --init nowhere.pt", "cannot read nowhere.pt: No such file"),
    ("ce", "--data sample --init pyproject.toml", "pyproject.toml is damaged or no checkpoint"),
    ("ce", "--data sample --init distill", "distill is not a file"),
    ("ce", "--data sample -e --output nowhere", "cannot read nowhere/last.pt"),
    ("ce", "--data sample --output pyproject.toml", "cannot use pyproject.toml as a run's directory"),
    ("kd", "--data sample --teacher-checkpoint nowhere.pt", "cannot read nowhere.pt"),
]
# fmt: on


def words(arguments: str) -> list[str]:
    return ["" if word == "''" else word for word in arguments.split()]


@pytest.mark.parametrize(("command", "arguments", "named"), MISTAKES, ids=[f"{c} {a}" for c, a, _ in MISTAKES])
def test_mistakes(command: str, arguments: str, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parent.parent)
    with pytest.raises(UserError) as error:
        COMMANDS[command](words(arguments))
    assert named in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


def test_at_least_sixty_kinds() -> None:
    assert len({(command, arguments) for command, arguments, _ in MISTAKES}) >= 60


@pytest.mark.parametrize("arguments", ["--T 0", "--data nowhere", "--arch x --data sample"])
def test_a_mistake_is_one_line_and_exit_code_2(command: Any, arguments: str) -> None:
    found = command("cifar10/train_kd.py", *arguments.split())
    assert found.returncode == 2
    assert found.stderr.startswith("error: ")
    assert found.stderr.count("\n") == 1
    assert "Traceback" not in found.stderr
