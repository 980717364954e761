"""How the site is built, by `python -m sphinx -W docs docs/_build/html`. It needs no network, nor do its readers."""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE / "_ext"), str(ROOT)]
# the pages' kernels import this tree, not an older installed copy, as the tests do
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))

import rmsnorm_np  # noqa: E402

project = "rmsnorm_np"
author = "the rmsnorm_np developers"
project_copyright = author
version = release = rmsnorm_np.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "numpydoc",
    "history",
    "mathml",
    "notebooks",
]
exclude_patterns = ["examples", "experiments", "measurements", "_*"]
nitpicky = True
nitpick_ignore_regex = [("py:.*", ".*")]  # numpydoc's types are prose
suppress_warnings = ["mystnb.unknown_mime_type"]

# Pages are run where they have nothing but what a downloaded notebook carries: see _ext/notebooks.py.
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 900  # of seconds, for a cell; a machine may be busy
nb_merge_streams = True
nb_render_markdown_format = "gfm"  # tables that a cell makes
nb_output_stderr = "warn"  # a page that warns does not pass
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3

numpydoc_show_class_members = False
autodoc_typehints = "none"
doctest_global_setup = "import numpy as np"

html_math_renderer = "mathml"  # _ext/mathml.py
html_theme = "pydata_sphinx_theme"
html_title = "rmsnorm_np"
html_static_path = ["_static"]
html_css_files = ["site.css"]
templates_path = ["_templates"]
html_copy_source = False
html_theme_options = {
    "logo": {"text": "rmsnorm_np"},
    "navbar_align": "left",
    "header_links_before_dropdown": 8,
    "navbar_end": ["search-button", "theme-switcher"],
    "navbar_persistent": [],
    "article_header_end": ["notebook-link"],
    "secondary_sidebar_items": ["page-toc"],
    "show_prev_next": True,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_sidebars = {"**": []}
