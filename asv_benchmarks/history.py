"""The history of the figures: ``python asv_benchmarks/history.py`` measures what is missing and makes the pages.

What is measured are the commits of `commits.txt`, each as it was, by the benchmarks of today. Figures that this machine
has in `results/` already are kept. The pages are asv's own, made to work without the net.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

HERE = Path(__file__).parent
RESULTS, LIBRARIES = HERE / "results", HERE / "site"
NET = re.compile(r"""(src|href)="(https?://[^"]+\.(?:js|css))"[^>]*?(?=>)""")


def commits(text: str) -> list[str]:
    """The hashes in the text of `commits.txt`."""
    lines = (line.partition("#")[0].split() for line in text.splitlines())
    return [words[0] for words in lines if words]


def measure(machine: str, benchmarks: str) -> int:
    """Have asv measure what the machine has not yet, and keep it; the result is asv's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        config = _config(Path(folder), results_dir=str(RESULTS))
        hashes = Path(folder, "hashes")
        hashes.write_text("".join(f"{name}\n" for name in commits((HERE / "commits.txt").read_text(encoding="utf-8"))))
        command = ["run", f"HASHFILE:{hashes}", "--skip-existing", "--machine", machine, "--bench", benchmarks]
        return _asv(config, *command, "--show-stderr")


def pages(target: Path) -> None:
    """Write asv's pages of all results in git to a folder, with all that they load."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results")
        shutil.copytree(RESULTS, results)
        config = _config(Path(folder), results_dir=str(results), html_dir=str(target))
        if _asv(config, "publish", "--no-pull", quiet=True):
            raise RuntimeError("asv publish failed: see above")
    without_net(target / "index.html")


def without_net(page: Path) -> None:
    """Have a page load its libraries from beside it."""

    def local(link: re.Match[str]) -> str:
        name = Path(urlsplit(link[2]).path).name
        found = next((n for n in (name, name.replace(".min.", ".")) if (LIBRARIES / n).exists()), None)
        if found is None:
            raise FileNotFoundError(f"{LIBRARIES} has no {name}, which this version of asv loads from {link[2]}")
        shutil.copy(LIBRARIES / found, page.parent)
        return f'{link[1]}="{found}"' + (' onerror="js_load_failure()"' if link[1] == "src" else "")

    page.write_text(NET.sub(local, page.read_text(encoding="utf-8")), encoding="utf-8")


def _config(folder: Path, **changed: str) -> Path:
    """asv's configuration with other folders, in a file in this one."""
    from asv.util import load_json

    conf = load_json(str(HERE / "asv.conf.json"), js_comments=True)
    for key in "repo", "benchmark_dir", "env_dir":
        conf[key] = str((HERE / conf[key]).resolve())
    path = folder / "asv.conf.json"
    path.write_text(json.dumps(conf | changed))
    return path


def _asv(config: Path, command: str, *options: str, quiet: bool = False) -> int:
    asv = subprocess.run(
        [sys.executable, "-m", "asv", command, "--config", str(config), *options],
        stdout=subprocess.PIPE if quiet else None, stderr=subprocess.STDOUT if quiet else None, text=True, check=False,
    )  # fmt: skip
    if quiet and asv.returncode:
        sys.stderr.write(asv.stdout)
    return asv.returncode


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, then make the pages; the result is the exit code."""
    parser = argparse.ArgumentParser(description="Measure the commits of commits.txt, and make pages of all figures.")
    parser.add_argument("--machine", help="name of this machine's folder in results/ (default: as asv knows it)")
    parser.add_argument("--bench", default="", help="regular expression of benchmarks (default: all)")
    parser.add_argument("--pages-only", action="store_true", help="measure nothing")
    parser.add_argument("--to", type=Path, default=HERE / ".asv" / "html", help="where the pages go")
    options = parser.parse_args(arguments)
    code = 0
    if not options.pages_only:
        from asv.machine import Machine

        code = measure(options.machine or Machine.get_unique_machine_name(), options.bench)
    pages(options.to)
    print(f"the pages need a server: python -m http.server -d {options.to}")
    return code


if __name__ == "__main__":
    sys.exit(main())
