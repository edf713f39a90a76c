"""Run the Python of a page, whose ```python blocks are one program: python docs/run_page.py docs/tutorial.md [--write]

A ```text block right behind a ```python block is what that one printed; --write puts it there. Pictures that it saves
as ``images/NAME.png`` land in docs/images.
"""

import argparse
import contextlib
import io
import os
import re
from pathlib import Path

BLOCK = re.compile(r"```python\n(?P<code>.*?)```(?:\n\n```text\n(?P<output>.*?)```)?", re.DOTALL)


def run(text, name):
    """Execute the blocks of a page's text in one namespace.

    Returns:
        The namespace, and the text with the printed output in place.
    """
    namespace = {"__name__": "__page__"}

    def execute(match):
        printed = io.StringIO()
        lines = text.count("\n", 0, match.start("code"))  # in front, so that a traceback has the page's line
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * lines + match["code"], name, "exec"), namespace)
        block = f"```python\n{match['code']}```"
        return block if match["output"] is None else f"{block}\n\n```text\n{printed.getvalue()}```"

    return namespace, BLOCK.sub(execute, text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--write", action="store_true", help="put the output into the page")
    arguments = parser.parse_args()
    page = arguments.page.resolve()
    os.chdir(Path(__file__).parent)
    _, text = run(page.read_text(encoding="utf-8"), str(page))
    if arguments.write:
        page.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
