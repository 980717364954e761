"""The README's example runs, and it has the two commands that the continuous integration takes from it."""

from __future__ import annotations

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_the_example_runs(capsys):
    (example,) = blocks("python")
    exec(compile(example, "README.md", "exec"), {})
    assert "gradient right" in capsys.readouterr().out


def test_there_are_two_commands():
    assert [command.strip() for command in blocks("sh")] == [
        "pip install . && python -m rmsnorm_np",
        'pip install ".[test]" && python -m pytest',
    ]
