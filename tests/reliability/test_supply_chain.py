"""What the package does not do: reach for a network, run input as code. And that its metadata tell the truth."""

from __future__ import annotations

import ast
import importlib.metadata
import re

import pytest
from programs import ROOT, compiled, run

PACKAGE = ROOT / "rmsnorm_np"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Code from data, and what brings data over a network. The one place that reads a pickle is the cache of kernels, in a
# folder that only those may write to who may write the code.
RUNS_INPUT = {"eval", "exec", "compile", "pickle", "marshal", "shelve", "dill", "cloudpickle", "runpy", "ctypes"}
NETWORK = {"socket", "ssl", "http", "urllib", "ftplib", "smtplib", "xmlrpc", "requests", "httpx", "aiohttp", "asyncio"}
ALLOWED = {("cpu/cache.py", "pickle")}


def uses(file):
    """Names that a file calls or imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id
        elif isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            yield "pickle" if getattr(node.value, "value", None) is not False else "no pickle"


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_no_source_reaches_for_a_network_or_runs_input(file):
    name = file.relative_to(PACKAGE).as_posix()
    found = {(name, use) for use in uses(file) if use in RUNS_INPUT | NETWORK}
    assert found <= ALLOWED


OFFLINE = """
import sys

def refuse(event, arguments):
    if event.startswith(("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "urllib.")):
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


@compiled
def test_no_connection_is_made():
    run(OFFLINE)


def test_requirements_have_a_lowest_version_and_no_highest():
    """The lowest is what a step of CI installs. A highest one would keep this package from living beside others."""
    wanted = [r for r in importlib.metadata.requires("rmsnorm_np") or [] if "extra ==" not in r]
    assert len(wanted) == 5
    for requirement in wanted:
        assert re.fullmatch(r"[\w-]+>=[\d.]+", requirement)
