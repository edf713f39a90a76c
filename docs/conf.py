"""The site, built by ``make docs``: pages in docs/, and the API reference from the docstrings."""

import os
import re
import sys
from pathlib import Path

from docutils import nodes

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
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
# The inventories of torch, numpy and Python are not at hand: the site is built without a network.
nitpick_ignore_regex = [(r"py:.*", r"(torch|nn|collections|contextlib|dataclasses|numpy|pathlib|typing)\..*")]
# A TypeVar: what goes in comes out.
nitpick_ignore = [("py:class", "dnl_ext.distributed.blocks.Module"), ("py:class", "dnl_ext._tuned.Call")]

html_theme = "furo"
html_title = f"dnl_ext {release}"


def skip_field(app, what, name, member, skip, options):
    """Leave out the fields of a named tuple: its docstring describes them."""
    return True if (getattr(member, "__doc__", None) or "").startswith("Alias for field number") else None


def shorten_types(app, domain, objtype, content):
    """Show the last part of ``~collections.abc.Callable``: behind a Literal Sphinx leaves a type as it is written."""
    for text in list(content.findall(nodes.Text)):
        if "Literal" in text and "~" in text and isinstance(text.parent.parent, nodes.field_body):
            text.parent.replace(text, nodes.Text(re.sub(r"~(?:\w+\.)+(\w+)", r"\1", text)))


def setup(app):
    app.connect("autodoc-skip-member", skip_field)
    app.connect("object-description-transform", shorten_types, priority=900)  # after autodoc has put the types there
