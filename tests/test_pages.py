"""The pages: links lead somewhere, files are named, commands are known, code runs."""

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from distill.losses import FEATURES, METHODS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / name for name in ("README.md", *(f"{folder}/README.md" for folder in ("cifar10", "imagenet", "distill")))
]
PAGES += [ROOT / "scripts" / "README.md", ROOT / "checkpoints" / "README.md"]
COMMANDS = ("bash scripts/", "python scripts/")


def blocks(page: Path, language: str) -> list[str]:
    """What a page has between ```language and ```."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links
    for link in links:
        assert "://" not in link, "a page works without a network"
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_front_page_is_short_and_names_every_method() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 250
    title = text.splitlines()[0].removeprefix("# ")
    assert f'description = "{title}"' in (ROOT / "pyproject.toml").read_text()
    for name in METHODS | FEATURES:
        assert name == "none" or f"[`{name}`]" in text, name
    for page in PAGES[1:]:
        assert f"({page.relative_to(ROOT)}" in text


def test_every_file_is_on_its_folders_page() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not listed:
        pytest.skip("not a git checkout")
    for file in listed:
        if not file.startswith(("tests/", ".", "checkpoints/")) and Path(file).name != "__init__.py":
            own = ROOT / file.split("/")[0] / "README.md"
            page = own if own in PAGES else ROOT / "README.md"
            assert Path(file).name in page.read_text(), f"{file} is not on {page}"


@pytest.mark.parametrize("folder", ["cifar10", "imagenet", "distill", "scripts"])
def test_every_file_on_a_page_is_there(folder: str) -> None:
    there = {path.name for path in (ROOT / folder).rglob("*")}
    trees = [tree for tree in blocks(ROOT / folder / "README.md", "") if re.search(r"\w\.py\b", tree)]
    assert trees
    assert set(re.findall(r"\b\w+\.(?:py|sh|webp)\b", "".join(trees))) <= there


def commands() -> list[list[str]]:
    """The words of every command of the pages that calls a script, without what stands before it."""
    found = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                calls = [k for k in range(len(words) - 1) if " ".join(words[k : k + 2]).startswith(COMMANDS)]
                found += [words[calls[0] :]] if calls and "$@" not in line else []
    return found


@cache
def flags(script: str) -> str:
    """What a script says of its flags."""
    program = [sys.executable] if script.endswith(".py") else ["bash"]
    done = subprocess.run([*program, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_commands_are_known() -> None:
    """Each flag of a command is one of its script; the recipe of a run that it would start can be made."""
    found = commands()
    assert len(found) > 50
    for _, script, *words in found:
        assert (ROOT / script).exists(), script
        if script.endswith(("quickstart.sh", "test.sh")):
            continue
        if "train" in script or script.endswith("reproduce.sh"):
            shown = subprocess.run(
                ["bash", script, *words, "--show-recipe"], cwd=ROOT, capture_output=True, text=True, check=False
            )
            said = [line for line in shown.stderr.splitlines() if not line.startswith("note: ")]
            assert (shown.returncode, said) == (0, []), f"{script} {' '.join(words)}"
        else:
            for word in words:
                if word.startswith("--"):
                    name = re.escape(word.partition("=")[0])
                    assert re.search(rf"(?<![\w-]){name}(?![\w-])", flags(script)), f"{script} {word}"


@pytest.mark.slow
def test_commands_on_the_sample_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the embedded images a training command takes a step, one of several runs shows them, others do all."""
    monkeypatch.setenv("DISTILL_CHECKPOINTS", str(tmp_path))
    monkeypatch.setenv("PYTHON", sys.executable)
    found = [words for words in commands() if "--data sample" in " ".join(words)]
    assert len(found) >= 6
    for program, script, *rest in found:
        if "train" in script:
            rest += ["--steps", "1", "--batch-size", "32"]
        elif script.endswith(("sweep.py", "reproduce.sh")):
            rest.append("--show-recipe")
        if "-o" in rest:
            rest[rest.index("-o") + 1] = str(tmp_path / rest[rest.index("-o") + 1])
        command = [{"python": sys.executable}.get(program, program), script, *rest]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{script} {' '.join(rest)}\n{done.stderr}"


EACH_ALONE = """
import os, sys, traceback
import torch, torchvision.ops  # which take seconds to load: once for all

for block in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            exec(block, {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(1)
"""


@pytest.mark.slow
def test_code_on_the_pages_runs() -> None:
    code = [block for page in PAGES for block in blocks(page, "python") if "FeatureMethod" not in block]
    assert len(code) == 3
    # each in a process of its own: the model that is added must not stay for other tests
    command = [sys.executable, "-c", EACH_ALONE, *code]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
