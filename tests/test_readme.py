"""The README's example runs, and what its commands name exists."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from pathlib import Path

from rmsnorm_np import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_the_example_runs():
    """Its last line asserts that a gradient is right."""
    (example,) = blocks("python")
    exec(compile(example, "README.md", "exec"), {})


def test_ci_runs_each_command():
    """It takes them from the README by their number."""
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert set(re.findall(r"readme_command (\d+)\)\"$", run, re.MULTILINE)) == set(
        map(str, range(1, len(blocks("sh")) + 1))
    )


def test_what_the_commands_name_exists():
    """Extras of the package, modules that Python can run, and subcommands with their options."""
    extras = re.findall(r'pip install "\.\[(\w+)\]"', README)
    assert set(extras) <= set(importlib.metadata.metadata("rmsnorm_np").get_all("Provides-Extra"))
    modules = re.findall(r"python -m (\w+)", README)
    assert all(importlib.util.find_spec(module) for module in set(modules) - {"venv", "sphinx"})
    commands = re.findall(r"`rmsnorm-np(| [^`]+)`", README)
    assert min(map(len, (extras, modules, commands))) > 0
    for command in commands:
        cli.parser().parse_args(command.split())
