"""Settings of the documentation: Sphinx with MyST, in furo's theme. ``make docs`` builds it."""

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "NARVL"
copyright = "the authors of this project"
version = release = installed_version("narvl")

extensions = [
    "myst_nb",  # MyST Markdown; it runs the pages that are notebooks
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "from_code",  # these two are ours
    "mathml",
]
exclude_patterns = ["_build", "**/*.ipynb"]

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 300

smartquotes = False  # "--beam" stays as it is
default_role = "py:obj"  # `Decoding` in a docstring is a link where such an object is documented, and code elsewhere
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # a list of attributes, not a paragraph for each
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
viewcode_follow_imported_members = False  # its links back name one module for all that a file defines
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
add_module_names = False

html_math_renderer = "mathml"
html_theme = "furo"
html_title = "NARVL"
html_copy_source = False
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["narvl.css"]
html_search_scorer = str(Path(__file__).parent / "_static" / "scorer.js")
