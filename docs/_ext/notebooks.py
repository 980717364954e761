"""Each page with code is a notebook as well, and it is the notebook that is run when the site is built.

A page names the files of the repository that its code imports or reads, in its front matter: ``companions: [...]``.
Their text becomes a first cell that writes them beside the notebook. Sphinx runs each page in an empty folder, so what
a reader downloads has been run as it is, with its outputs in it; only the Markdown is put into Jupyter's dialect.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import nbformat
from sphinx.directives.code import LiteralIncludeReader
from sphinx.errors import ExtensionError

PREAMBLE = """
# what this page needs beside `pip install rmsnorm_np matplotlib`: some files of its repository
from pathlib import Path

for name, text in {files}.items():
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")
"""
DIRECTIVE = re.compile(
    r"^(?P<fence>`{3,}|:{3,})\{(?P<name>[\w-]+)\} *(?P<argument>.*)\n(?P<body>(?s:.*?))^(?P=fence) *$", re.M
)
ROLE = re.compile(r"\{[\w:.-]+\}(`[^`]+`)")
PAGE_LINK = re.compile(r"\]\((?P<page>[\w./-]+)\.md(?P<anchor>#[\w-]*)?\)")
ANCHOR = re.compile(r"^\([\w-]+\)=\n", re.M)


def _front_matter(source: str) -> tuple[str, str]:
    match = re.match(r"---\n.*?\n---\n", source, re.DOTALL)
    return (match[0], source[match.end() :]) if match else ("", source)


def _add_preamble(app: Any, docname: str, source: list[str]) -> None:
    """Sphinx's source-read: put the companions' cell before all others."""
    header, body = _front_matter(source[0])
    names = re.search(r"^companions: \[(.*)\]$", header, re.M)
    if names is None:
        return
    folder = Path(app.srcdir)
    files = {}
    for name in names[1].split(", "):
        path = (folder / name).resolve()
        target = path.relative_to(folder) if path.is_relative_to(folder) else Path(path.name)
        files[target.as_posix()] = path.read_text(encoding="utf-8")
        app.env.note_dependency(str(path))
    cell = PREAMBLE.format(files=json.dumps(files, ensure_ascii=False))
    source[0] = f"{header}```{{code-cell}} python\n:tags: [remove-cell]\n{cell}```\n\n{body}"


def _has_code(app: Any, docname: str) -> bool:
    return "file_format: mystnb" in _front_matter(Path(app.env.doc2path(docname)).read_text(encoding="utf-8"))[0]


def _offer_download(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Sphinx's html-page-context: what the template notebook-link.html asks for."""
    found = doctree is not None and pagename in app.env.found_docs and _has_code(app, pagename)
    context["notebook"] = f"notebooks/{pagename}.ipynb" if found else None


def _plain_directive(app: Any, match: re.Match[str]) -> str:
    options = dict(re.findall(r"^:([\w-]+): *(.*)$", match["body"], re.M))
    body = re.sub(r"\A(?::[\w-]+:.*\n)*", "", match["body"])
    name, argument = match["name"], match["argument"].strip()
    if name == "literalinclude":
        path = Path(app.srcdir, argument).resolve()
        options = {key: value.strip("\"'") for key, value in options.items()}
        if "dedent" in options:
            options["dedent"] = int(options["dedent"]) if options["dedent"] else None  # type: ignore[assignment]
        text, _ = LiteralIncludeReader(str(path), options, app.config).read()
        return f"```{options.get('language', 'python')}\n{text}```"
    if name == "include":
        text = Path(app.srcdir, argument).resolve().read_text(encoding="utf-8")
        for key, side in (("start-after", -1), ("end-before", 0)):
            if key in options:
                text = text.split(options[key].strip("\"'"), 1)[side]
        return text
    if name == "math":
        return f"$$\n{body}$$"
    if name in ("note", "tip", "admonition", "important"):
        title = argument if name == "admonition" else name.capitalize()
        return "\n".join(f"> {line}".rstrip() for line in (f"**{title}**", "", *body.strip().split("\n")))
    if name in ("toctree", "image", "figure"):
        return ""
    raise ExtensionError(f"_ext/notebooks.py does not know how to put the directive {name} into a notebook")


def _plain_markdown(app: Any, docname: str, text: str) -> str:
    """MyST's Markdown in that of Jupyter."""
    text = ANCHOR.sub("", DIRECTIVE.sub(lambda match: _plain_directive(app, match), text))

    def link(match: re.Match[str]) -> str:
        page = (Path(docname).parent / match["page"]).as_posix()
        return f"]({match['page']}.ipynb)" if page in app.env.found_docs and _has_code(app, page) else "]()"

    text = PAGE_LINK.sub(link, text)
    text = re.sub(r"\[([^\]]+)\]\(\)", r"\1", text)  # a page that is no notebook: its name alone
    return ROLE.sub(r"\1", text)


def _once(outputs: list[Any]) -> list[Any]:
    """Without what MyST-NB has added to an earlier output of the same stream."""
    streams = [output.get("name") for output in outputs]
    return [output for i, output in enumerate(outputs) if output.get("name") is None or streams.index(streams[i]) == i]


def _write(app: Any, exception: Exception | None) -> None:
    """Sphinx's build-finished: the notebooks as they were run, beside the pages."""
    if exception is not None or app.builder.name != "html":
        return
    executed = Path(app.outdir).parent / "jupyter_execute"
    for docname in sorted(app.env.found_docs):
        if not _has_code(app, docname):
            continue
        notebook = nbformat.read(executed / f"{docname}.ipynb", as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = _plain_markdown(app, docname, cell.source)
            else:
                if "remove-cell" in cell.metadata.get("tags", []):
                    cell.metadata.jupyter = {"source_hidden": True}
                cell.outputs = _once(cell.outputs)
        notebook.metadata.pop("companions", None)
        nbformat.validate(notebook)
        target = Path(app.outdir, "notebooks", f"{docname}.ipynb")
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, target)


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("source-read", _add_preamble)
    app.connect("html-page-context", _offer_download)
    app.connect("build-finished", _write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
