"""The site, built by ``make docs``: pages in docs/, and the API reference from the docstrings."""

import os
import sys
from pathlib import Path

import dnl_ext

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "dnl_ext"
version = release = dnl_ext.__version__
copyright = "the contributors of dnl_ext, Apache-2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "repository"]
exclude_patterns = ["_extensions"]
nitpicky = True
smartquotes_action = "D"  # dashes alone: quotes stay as they are typed
default_role = "code"
highlight_language = "text"

# Anchors of headings are GitHub's, so that a link works in both places.
myst_heading_anchors = 4

# A link to a file of the repository leads to this address and the file's path. Without an address it names the file.
repository_url = os.environ.get("DNL_EXT_REPOSITORY_URL", "")
# Files outside of docs/ that are pages of the site.
repository_pages = {
    "CHANGELOG.md": "project/changelog",
    "CONTRIBUTING.md": "project/contributing",
    "benchmarks/README.md": "project/benchmark",
    "csrc/README.md": "project/layout",
    "tests/emulator/README.md": "project/emulator",
}

# The registry plug-ins import their framework, which the site does not need.
autodoc_mock_imports = ["mmaction", "mmcv", "mmdet", "mmengine", "mmseg"]
autodoc_member_order = "groupwise"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
# The inventories of torch and Python are not at hand: the site is built without a network.
nitpick_ignore_regex = [(r"py:.*", r"(torch|nn|collections|dataclasses|pathlib|typing)\..*")]
nitpick_ignore = [("py:class", "dnl_ext.distributed.blocks.Module")]  # a type variable

html_theme = "furo"
html_title = f"dnl_ext {release}"


def skip_field(app, what, name, member, skip, options):
    """Leave out the fields of a named tuple: its docstring describes them."""
    return True if (getattr(member, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app):
    app.connect("autodoc-skip-member", skip_field)
