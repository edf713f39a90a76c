"""Links from pages to files of the repository that lie outside of docs/.

The repository's own page shows them as they are. On the site such a link leads to the page that shows the file
(``repository_pages``), or to the file under ``repository_url``, or, where no address is known, names the file. A file
that does not exist is a warning.
"""

import os
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

LOGGER = logging.getLogger(__name__)


class RepositoryLinks(SphinxTransform):
    """Replaces MyST's nodes for relative links that leave the source folder."""

    default_priority = 500

    def apply(self):
        for kind in (addnodes.pending_xref, addnodes.download_reference):
            for node in list(self.document.findall(kind)):
                if node.get("reftype") == "myst":
                    self.replace(node)

    def replace(self, node):
        target, _, anchor = node["reftarget"].partition("#")
        if node.get("refdomain") == "doc":  # a page, without its suffix; the whole path where it lies outside
            target, anchor = f"{target}.md", node["reftargetid"]
        source = Path(self.env.srcdir)
        path = Path(os.path.normpath((source / self.env.docname).parent / target))
        if path.is_relative_to(source):
            return
        name = path.relative_to(source.parent).as_posix() if path.is_relative_to(source.parent) else target
        if not path.exists():
            LOGGER.warning("no such file in the repository: %s", name, location=node)
        page = self.config.repository_pages.get(name)
        if page is not None:
            link = addnodes.pending_xref(
                "", refdomain="doc", reftype="myst", refdoc=self.env.docname, reftarget=page,
                reftargetid=anchor or None, refexplicit=True,
            )  # fmt: skip
        elif self.config.repository_url:
            fragment = f"#{anchor}" if anchor else ""
            link = nodes.reference("", refuri=f"{self.config.repository_url}/{name}{fragment}")
        else:
            link = nodes.inline()
        link += [child.deepcopy() for child in node.children]
        if isinstance(link, nodes.inline) and name.rstrip("/") not in node.astext():
            link += [nodes.Text(" ("), nodes.literal(name, name), nodes.Text(")")]
        node.replace_self(link)


def setup(app):
    app.add_config_value("repository_pages", {}, "env")
    app.add_config_value("repository_url", "", "env")
    app.add_transform(RepositoryLinks)
    return {"parallel_read_safe": True}
