"""What the package does not do: reach for a network, run input as code. And that its metadata tell the truth."""

from __future__ import annotations

import ast
import importlib.metadata
import re

import pytest
from programs import ROOT, run

PACKAGE = ROOT / "rmsnorm_np"
SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_no_source_runs_input(file):
    """Built-in functions that do; modules that could are banned by the linter, see banned-api in pyproject.toml."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        assert getattr(node, "id", None) not in ("eval", "exec", "compile", "__import__")
        if getattr(node, "arg", None) == "allow_pickle":
            assert node.value.value is False


OFFLINE = """
import sys

def refuse(event, arguments):
    if event.startswith(("socket.", "ssl.", "urllib.", "http.client.", "ftplib.", "smtplib.")):
        raise SystemExit(f"{event} {arguments}")

sys.addaudithook(refuse)
import numpy as np
import rmsnorm_np as rn
from rmsnorm_np import gradcheck
from rmsnorm_np.cli import main

x = np.ones((600, 128), np.float32)
rn.rms_norm(x)
rn.layer_norm_backward(x, x, x[0], x[0])
assert not main(["info"])
"""


def test_no_connection_is_made():
    run(OFFLINE)


def test_requirements_have_a_lowest_version_and_no_highest():
    """The lowest is what a step of CI installs. A highest one would keep this package from living beside others."""
    wanted = [r for r in importlib.metadata.requires("rmsnorm_np") or [] if "extra ==" not in r]
    assert wanted
    for requirement in wanted:
        assert re.fullmatch(r"[\w-]+>=[\d.]+", requirement)
