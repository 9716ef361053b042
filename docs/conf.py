"""Settings of the documentation site; `make docs` builds it into docs/_build/html."""

import sys
from importlib.metadata import distribution
from pathlib import Path

import hf_adapt

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_extensions"))

project = "hf_adapt"
author = "the hf_adapt contributors"
copyright = author
release = version = hf_adapt.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "reference",
]
exclude_patterns = ["_build", "README.md"]

# Markdown. Anchors of headings are GitHub's, so that one link serves both.
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
myst_links_external_new_tab = False

# Docstrings. A single backtick is code, as in Markdown.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autodoc_type_aliases = {"Schedule": "Schedule", "Pooling": "Pooling"}
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True
smartquotes = False
napoleon_custom_sections = ["Shape", "Logs", "Reference"]
toc_object_entries_show_parents = "hide"

html_theme = "furo"
pygments_style = "default"
html_title = "hf_adapt"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# One file, in the site, which works without a network: `reference` copies it.
mathjax_path = "tex-svg.js"
mathjax_file = distribution("sphinx-mathjax-offline").locate_file(
    "sphinx-mathjax-offline/static/mathjax/tex-svg.js"
)
