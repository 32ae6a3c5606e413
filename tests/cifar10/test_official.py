"""The official archive: downloaded from a loopback server, verified, read without running what is in it."""

import codecs
import hashlib
import io
import os
import pickle
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cifar10 import data as module
from cifar10 import official
from cifar10.data import load_data
from distill.errors import UserError
from distill.files import downloads


class Doubling:
    """What a short pickle would fill the memory with, called on its own result."""

    def __reduce__(self) -> tuple[Any, ...]:
        return codecs.encode, (b"00", "hex")


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/distill-batch-attack",)


def batch(name: str, count: int = 4) -> dict[bytes, Any]:
    generator = np.random.default_rng(len(name) + ord(name[-1]))
    rows = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
    return {b"data": rows, b"labels": [k % 3 for k in range(count)], b"batch_label": b"x", b"filenames": [b"a"] * count}


def members() -> dict[str, Any]:
    names = (*official.CIFAR10.train, official.CIFAR10.test)
    return {**{name: batch(name) for name in names}, "batches.meta": {b"label_names": [b"cat", b"dog", b"frog"]}}


def pickled(content: Any) -> bytes:
    return content if isinstance(content, bytes) else pickle.dumps(content, protocol=2)


def forge(contents: dict[str, Any], prefix: str = "cifar-10-batches-py/") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in contents.items():
            entry = tarfile.TarInfo(name if name.startswith(("/", ".")) else prefix + name)
            if content is None:
                entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(entry)
                continue
            entry.size = len(pickled(content))
            tar.addfile(entry, io.BytesIO(pickled(content)))
    return buffer.getvalue()


def change(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    monkeypatch.setattr(official, "CIFAR10", replace(official.CIFAR10, **values))


def place(directory: Path, archive: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory.mkdir()
    (directory / official.CIFAR10.archive).write_bytes(archive)
    change(monkeypatch, sha256=hashlib.sha256(archive).hexdigest())
    return directory


# ------------------------------------------------------------------------------------------------------------- reading
def test_archive_and_unpacked_batches_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = load_data(str(place(tmp_path / "packed", forge(members()), monkeypatch)))
    assert (packed.name, packed.classes) == ("packed", ("cat", "dog", "frog"))
    assert len(packed.train_images) == 20
    first = batch("data_batch_1")[b"data"][0]
    assert packed.train_images[0, 0, 1].tolist() == [first[1], first[1024 + 1], first[2048 + 1]]
    assert packed.train_images[0, 1, 0, 0] == first[32]
    for folder in (tmp_path / "unpacked" / official.CIFAR10.folder, tmp_path / "flat"):
        folder.mkdir(parents=True)
        for name, content in members().items():
            (folder / name).write_bytes(pickled(content))
        root = folder.parent if folder.name == official.CIFAR10.folder else folder
        assert load_data(str(root)).digest == packed.digest


def renamed(content: dict[bytes, Any]) -> dict[str, Any]:
    """As Python 3 pickles it again: keys are strings."""
    return {key.decode(): value for key, value in content.items()}


LABELS = {
    "list": list,
    "array": np.array,
    "uint8": lambda labels: np.array(labels, np.uint8),
    "column": lambda labels: np.array(labels)[:, None],
    "numbers of numpy": lambda labels: list(np.array(labels)),
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_batches_that_python_3_has_pickled_again(labels: Any, protocol: int, tmp_path: Path) -> None:
    for folder in ("old", "new"):
        (tmp_path / folder).mkdir()
        for name, content in members().items():
            if folder == "new":
                content = renamed(content)
                content |= {"labels": labels(content["labels"])} if "labels" in content else {}
                content |= {"label_names": np.array(["cat", "dog", "frog"])} if "label_names" in content else {}
            (tmp_path / folder / name).write_bytes(pickle.dumps(content, protocol=protocol))
    assert load_data(str(tmp_path / "new")).digest == load_data(str(tmp_path / "old")).digest


def hundred() -> dict[str, Any]:
    rows = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    part = {b"data": rows, b"fine_labels": [2, 0, 1, 2], b"coarse_labels": [0, 0, 0, 0]}
    return {
        "train": part,
        "test": part,
        "meta": {b"fine_label_names": [b"a", b"b", b"c"], b"coarse_label_names": [b"x"]},
    }


def test_cifar100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    archive = forge(hundred(), prefix="cifar-100-python/")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / official.CIFAR100.archive).write_bytes(archive)
    with pytest.raises(UserError, match="instead of 85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7"):
        load_data(str(tmp_path / "packed"))
    digest = hashlib.sha256(archive).hexdigest()
    monkeypatch.setattr(official, "CIFAR100", replace(official.CIFAR100, sha256=digest))
    packed = load_data(str(tmp_path / "packed"))
    assert "CIFAR-100, fine labels" in capsys.readouterr().out
    assert (packed.train_labels.tolist(), packed.classes) == ([2, 0, 1, 2], ("a", "b", "c"))
    for folder in (tmp_path / "root" / "cifar-100-python", tmp_path / "flat"):
        folder.mkdir(parents=True)
        for name, content in hundred().items():
            (folder / name).write_bytes(pickled(content))
        root = folder.parent if folder.name == "cifar-100-python" else folder
        assert load_data(str(root)).digest == packed.digest
    (tmp_path / "flat" / "test").write_bytes(pickled({b"data": hundred()["test"][b"data"], b"labels": [0, 1, 2, 0]}))
    with pytest.raises(UserError, match="test does not hold rows of 3072 bytes with a label each"):
        load_data(str(tmp_path / "flat"))


def test_wrong_digest(tmp_path: Path) -> None:
    (tmp_path / official.CIFAR10.archive).write_bytes(forge(members()))
    with pytest.raises(UserError, match=r"has sha256 .* instead of 6d958be0.*fetch it again"):
        load_data(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data_batch_3", Attack(), r"data_batch_3 is refused or damaged: it asks for (posix|os)\.system"),
        ("batches.meta", Attack(), r"batches\.meta is refused"),
        ("test_batch", {b"data": Attack(), b"labels": []}, "refused"),
        ("test_batch", {b"data": Doubling(), b"labels": []}, "it encodes by 'hex'"),
        ("test_batch", b"", "damaged"),
        ("test_batch", b"garbage", "damaged"),
        ("test_batch", pickled(batch("test_batch"))[:-500], "damaged"),
        ("test_batch", [1, 2], "is no batch"),
        ("test_batch", {b"labels": [0]}, "does not hold rows of 3072 bytes"),
        ("test_batch", {b"data": np.zeros((2, 3072)), b"labels": [0, 1]}, "does not hold rows"),
        ("test_batch", {b"data": np.zeros((2, 100), np.uint8), b"labels": [0, 1]}, "does not hold rows"),
        ("test_batch", {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}, "with a label each"),
        ("test_batch", {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, "x"]}, "with a label each"),
        ("test_batch", {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, -1]}, "from 0 on"),
        ("test_batch", {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 7]}, "class 7 is in test_labels"),
        ("test_batch", None, "has no cifar-10-batches-py/test_batch"),
        ("batches.meta", {b"label_names": 3}, "does not name the classes"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_forged_archives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: Any, message: str
) -> None:
    path = place(tmp_path / "data", forge({**members(), name: content}), monkeypatch)
    with pytest.raises(UserError, match=message) as error:
        load_data(str(path))
    assert "\n" not in str(error.value)
    assert not Path("/tmp/distill-batch-attack").exists()


def test_missing_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = members()
    del contents["data_batch_5"]
    with pytest.raises(UserError, match=r"has no cifar-10-batches-py/data_batch_5"):
        load_data(str(place(tmp_path / "data", forge(contents), monkeypatch)))
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "data_batch_1").write_bytes(pickled(batch("data_batch_1")))
    with pytest.raises(UserError, match="data_batch_2 is missing"):
        load_data(str(tmp_path / "flat"))


def test_nothing_leaves_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {"../outside": b"x", "/tmp/distill-absolute": b"x", **members(), "extra": b"x"}
    path = place(tmp_path / "data", forge(contents), monkeypatch)
    load_data(str(path))
    assert sorted(p.name for p in tmp_path.rglob("*")) == [official.CIFAR10.archive, "data"]
    assert not Path("/tmp/distill-absolute").exists()


def test_truncated_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="damaged"):
        load_data(str(place(tmp_path / "data", forge(members())[:-2000], monkeypatch)))


# --------------------------------------------------------------------------------------------------------- downloading
class Server(HTTPServer):
    """Answers every request with the next of `answers`: (bytes to send, length to claim); the last one repeats."""

    answers: list[tuple[bytes, int]]
    requests = 0


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        content, claimed = self.server.answers[min(self.server.requests, len(self.server.answers) - 1)]
        self.server.requests += 1
        self.send_response(200 if content else 404)
        self.send_header("Content-Length", str(claimed))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    archive = forge(members())
    url = f"http://127.0.0.1:{server.server_port}/{official.CIFAR10.archive}"
    change(monkeypatch, url=url, sha256=hashlib.sha256(archive).hexdigest())
    monkeypatch.setattr(downloads, "WAITS", (0, 0, 0))
    monkeypatch.setattr(module, "DEFAULT", tmp_path / "home" / "data" / "cifar10")
    server.answers = [(archive, len(archive))]
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_default_directory_is_filled(server: Server) -> None:
    assert len(load_data(None).train_images) == 20
    assert len(load_data(None).train_images) == 20
    assert server.requests == 1
    assert [p.name for p in module.DEFAULT.iterdir()] == [official.CIFAR10.archive]


def test_only_the_default_directory_is_filled(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_data(str(tmp_path / "elsewhere"))
    assert server.requests == 0


def test_a_cut_download_is_tried_again(server: Server) -> None:
    archive, length = server.answers[0]
    server.answers = [(archive[:1000], length), (archive[:-1], length - 1), (archive, length)]
    assert len(load_data(None).train_images) == 20
    assert server.requests == 3


@pytest.mark.parametrize("answer", [(b"another file", 12), (b"<html>sign in</html>", 20), (b"", 0)])
def test_a_download_that_never_fits(server: Server, answer: tuple[bytes, int]) -> None:
    server.answers = [answer]
    with pytest.raises(UserError, match=rf"put {official.CIFAR10.archive} from http.* into .*data/cifar10") as error:
        load_data(None)
    assert "\n" not in str(error.value)
    assert server.requests == 3
    assert not list(module.DEFAULT.iterdir())


@pytest.mark.parametrize("where", ["read only", "a file"])
def test_a_checkout_that_cannot_be_written_to(where: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked for, and --data is what helps."""
    module.DEFAULT.parent.mkdir(parents=True)
    if where == "a file":
        module.DEFAULT.touch()
    else:
        monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(
        UserError, match=r"CIFAR-10 is not in .*data/cifar10 \(.*name that by --data, or try --data sample"
    ):
        load_data(None)
    assert server.requests == 0


def test_no_network(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    works = official.CIFAR10.url
    change(monkeypatch, url="http://127.0.0.1:9/nothing")
    for _ in range(2):
        with pytest.raises(UserError, match=r"could not download CIFAR-10 \(.*refused"):
            load_data(None)
    assert server.requests == 0
    (module.DEFAULT / f"{official.CIFAR10.archive}.0123.partial").write_bytes(b"of a download that was killed")
    change(monkeypatch, url=works)
    assert len(load_data(None).train_images) == 20
