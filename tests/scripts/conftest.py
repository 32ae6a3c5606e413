from pathlib import Path

import pytest

from tests.conftest import teacher_file


@pytest.fixture
def flags(small_npz: Path, tmp_path: Path) -> list[str]:
    teacher = teacher_file(tmp_path / "teacher.pth", arch="airbench94")  # the fastest there is
    return ["--data", str(small_npz), "--teacher-arch", "airbench94", "--teacher-checkpoint", teacher]
