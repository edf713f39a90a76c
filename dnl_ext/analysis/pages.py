"""A report as a page: sentences, tables and pictures, as Markdown and as one HTML file."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .tables import Section, as_markdown

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 0.5em 0 1.5em; }
th, td { padding: 0.25em 0.9em; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap; }
td:not(:first-child) { font-variant-numeric: tabular-nums; }
td:last-child { color: #777; }
h2 { font-size: 1.1em; margin-bottom: 0; }
img { width: 100%; margin: 0.5em 0; }
"""


class Page(NamedTuple):
    """A report.

    Attributes:
        title: of the page.
        intro: sentences that say what was measured.
        tables: the figures.
        heading: above the pictures.
        pictures: dict of what each picture shows, by the name of its file in the page's folder.
    """

    title: str
    intro: Sequence[str]
    tables: Sequence[Section]
    heading: str
    pictures: Mapping[str, str]

    def markdown(self) -> str:
        """The page as Markdown text."""
        parts = [f"# {self.title}", "", *(f"- {line}" for line in self.intro), ""]
        parts += [as_markdown(table) for table in self.tables]
        parts += [f"### {self.heading}", ""] + [f"![{text}]({name})\n" for name, text in self.pictures.items()]
        return "\n".join(parts)

    def html(self, folder: Path) -> str:
        """The page as HTML that needs no other file, with the pictures of a folder in it."""

        def row(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        body = [f"<p>{html.escape(line)}</p>" for line in self.intro]
        for table in self.tables:
            rows = "\n".join(row(line, "td") for line in table.rows)
            body.append(f"<h2>{html.escape(table.title)}</h2>\n<table>{row(table.head, 'th')}\n{rows}</table>")
        body.append(f"<h2>{html.escape(self.heading)}</h2>")
        for name, text in self.pictures.items():
            encoded = base64.b64encode((folder / name).read_bytes()).decode()
            body.append(f'<img alt="{html.escape(text)}" src="data:image/png;base64,{encoded}">')
        title = html.escape(self.title)
        head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        return (
            f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><h1>{title}</h1>\n'
            + "\n".join(body)
            + "\n</body></html>\n"
        )

    def write(self, folder: Path) -> None:
        """Write ``report.md`` and ``report.html`` beside the pictures."""
        (folder / "report.md").write_text(self.markdown(), encoding="utf-8")
        (folder / "report.html").write_text(self.html(folder), encoding="utf-8")
