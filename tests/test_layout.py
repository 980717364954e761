"""The rules of the code's layout that an import linter cannot see."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from rmsnorm_np import ops

PACKAGE = Path(__file__).parents[1] / "rmsnorm_np"
NAMES = (operation.name.replace("_", "_?") for operation in ops.FORWARD)
NORM = re.compile("|".join(f"{name}(?!_np)" for name in NAMES), re.IGNORECASE)


def norms_named(source):
    """(line, what) where code names a norm: identifiers and strings, but docstrings and comments."""
    tree = ast.parse(source)
    left_out = {node.body[0].value for node in ast.walk(tree) if _has_docstring(node)}
    for node in ast.walk(tree):
        if node in left_out:
            continue
        for _, value in ast.iter_fields(node):
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and NORM.search(text):
                    yield node.lineno, text


def _has_docstring(node):
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    return isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None


@pytest.mark.parametrize(
    "code",
    [
        "RMS_NORM",
        "ops.rms.RMS_NORM",
        "def rms_norm(x): ...",
        "def f(layer_norm=None): ...",
        "f(rms_norm=1)",
        "from rmsnorm_np.reference import layer_norm",
        "class LayerNorm: ...",
        "name == 'rms_norm'",
        "def f():\n    global rmsnorm",
    ],
)
def test_a_norm_in_code_is_found(code):
    assert len(list(norms_named(code))) == 1


def test_what_explains_is_not_code():
    code = '"""RMSNorm."""\nfrom rmsnorm_np.ops import rms\nclass A:\n    """LayerNorm."""\n    x = 1  # rms_norm'
    assert list(norms_named(code)) == []


@pytest.mark.parametrize("engine", ["cpu", "cuda", "dask"])
def test_no_engine_names_a_norm(engine):
    """An operation is described in `ops` alone: an engine that knows one by name would need an edit for the next."""
    files = sorted((PACKAGE / engine).glob("**/*.py"))
    assert files
    found = [f"{file.name}:{line} {text}" for file in files for line, text in norms_named(file.read_text("utf-8"))]
    assert found == []
