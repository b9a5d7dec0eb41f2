"""Settings of the documentation: Sphinx with MyST, in furo's theme. ``make docs`` builds it."""

from importlib.metadata import version as installed_version

project = "NARVL"
copyright = "the authors of this project"
version = release = installed_version("narvl")

extensions = [
    "myst_nb",  # MyST Markdown; it runs the pages that are notebooks
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_click",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "**/*.ipynb"]

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 300

html_theme = "furo"
html_title = "NARVL"
html_copy_source = False
