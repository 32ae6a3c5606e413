"""Ask a trained network about images.

    python scripts/predict.py RUN IMAGE|DIR ...
    find photos -name '*.jpg' | python scripts/predict.py RUN - --csv answers.csv

RUN is a run's directory, its last.pt, a published file, or a file of others with --arch and --classes (or --data). A
directory is walked; - reads paths from standard input, one a line. Images are prepared exactly as in evaluation. Each
line has a file and its most probable classes. Broken images are named on standard error, the others are answered; the
exit code is 1 then.
"""

import csv
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from distill.config import cli  # noqa: E402
from distill.errors import UserError  # noqa: E402
from distill.options import option  # noqa: E402
from scripts.trained import NetworkFlags, Opened, open_network  # noqa: E402


@dataclass(frozen=True)
class Predict(NetworkFlags):
    """The flags of this script."""

    top: int = option(5, "classes that are named for each image", group="output", least=1)
    json: str | None = option(None, "write the predictions to this file", group="output")
    csv: str | None = option(None, "write them to this file, a line an image", group="output")
    batch_size: int = option(256, "images at a time", group="how", flags=("-b",), least=1)
    precision: str = option("float32", "of the forward pass", group="how", choices=("float32", "bfloat16"))


class BrokenFiles(UserError):
    """Some images could not be read; the others were answered."""

    exit_code = 1


def main(argv: Sequence[str]) -> None:
    words = "RUN IMAGE|DIR ..."
    options, given = cli.parse_words(argv, Predict(), prog="predict.py", description=__doc__ or "", words=words)
    if len(given) < 2:
        raise UserError(f"{words} are needed: a network and images; --help shows an example")
    cli.check_file(options.json)
    cli.check_file(options.csv, "--csv")
    files = list(find_files(given[1:]))
    if not files:
        raise UserError(f"there are no images in {', '.join(given[1:])}")
    with open_network(given[0], options, images=False, precision=options.precision) as opened:
        rows, broken = answer(opened, files, options)
    classes = opened.classifier.classes
    if options.json:
        content = {"network": opened.arch, "from": given[0], "classes": list(classes), "images": rows, "broken": broken}
        write(options.json, json.dumps(content, indent=2) + "\n")
    if options.csv:
        write(options.csv, to_csv(rows, min(options.top, len(classes))))
    if broken:
        raise BrokenFiles(f"{len(broken)} of {len(files)} images could not be read, {len(rows)} are answered")


def find_files(named: Sequence[str]) -> Iterator[str]:
    """Yields the files that the words name: each as it is, a directory's images in order, of - those of its lines."""
    from distill.data.folders import images_below

    for name in named:
        if name == "-":
            yield from (line.rstrip("\r\n") for line in sys.stdin if line.strip())
        elif os.path.isdir(name):
            yield from images_below(name)
        else:
            yield name


def answer(opened: Opened, files: Sequence[str], options: Predict) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Prints a line for each file; returns what was predicted, and file -> cause of those that cannot be read."""
    from tqdm import tqdm

    from distill.data.pixels import FIRST, count_turned, say_turned
    from distill.inference.predict import predict

    classifier, rows, broken = opened.classifier, list[dict[str, Any]](), dict[str, str]()
    top = min(options.top, len(classifier.classes))
    read = partial(opened.task.read_files, spec=classifier.spec)
    hidden = True if sys.stdout.isatty() else None  # lines on a terminal are progress enough
    bar = tqdm(total=len(files), desc="images", disable=hidden, leave=False)
    for file, probabilities, cause in predict(classifier, read, files, options.batch_size):
        bar.update()
        if probabilities is None:
            broken[file] = cause
            print(f"cannot read {file}: {cause}", file=sys.stderr)
            continue
        values, numbers = probabilities.topk(top)
        named = [classifier.classes[number] for number in numbers.tolist()]
        pairs = list(zip(named, values.tolist(), strict=True))
        rows.append({"file": file, "predictions": [{"class": name, "probability": value} for name, value in pairs]})
        print(f"{file}  {'  '.join(f'{name} {100 * value:.2f} %' for name, value in pairs)}")
    bar.close()
    some = [row["file"] for row in rows[:FIRST]]
    say_turned(count_turned(some), len(some), "images", sys.stderr)
    return rows, broken


def to_csv(rows: Sequence[dict[str, Any]], top: int) -> str:
    """Returns a table with the columns file, class_1, probability_1, ..., as many as `top`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", *(f"{column}_{k + 1}" for k in range(top) for column in ("class", "probability"))])
    for row in rows:
        cells = [cell for guess in row["predictions"] for cell in (guess["class"], f"{guess['probability']:.6f}")]
        writer.writerow([row["file"], *cells])
    return text.getvalue()


def write(path: str, text: str) -> None:
    from distill.files import checkpoint

    checkpoint.write_atomically(Path(path), text.encode(errors="surrogateescape"))


if __name__ == "__main__":
    cli.run(main)
