"""Sphinx settings: `sphinx-build -W docs docs/_build` (extra `docs`)."""

import pathlib
import sys

import distilljax

sys.path.insert(0, str(pathlib.Path(__file__).parent))

project = "distilljax"
author = "the distilljax authors"
copyright = author  # noqa: A001
version = release = distilljax.__version__

extensions = [
    "myst_nb",
    "plain_docstrings",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
html_theme = "sphinx_book_theme"
html_title = "distilljax"
smartquotes = False
html_static_path = ["_static"]

myst_enable_extensions = ["amsmath", "dollarmath"]
# Pages are text; what must run is run by the tests.
nb_execution_mode = "off"

autodoc_default_options = {"member-order": "bysource"}
# Shapes and types stand in the text; resolved classes would bury them.
autodoc_typehints = "none"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
