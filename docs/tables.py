"""Writes the hyper-parameter tables of the method pages from `DEFAULTS`.

python docs/tables.py

The third column is the comment beside the entry in the method's file.
"""

import ast
import inspect
import pathlib
import re
import tokenize

from distilljax import methods

PAGES = pathlib.Path(__file__).parent / "methods"


def comments(path):
  """Line number -> text of a file's comments."""
  with tokenize.open(path) as f:
    return {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(f.readline)
        if token.type == tokenize.COMMENT
    }


def table(slug):
  """The table of a method's defaults, in Markdown."""
  module = methods.get(slug)
  path = pathlib.Path(inspect.getfile(module))
  text = comments(path)
  node = next(
      n for n in ast.parse(path.read_text()).body
      if ast.unparse(n).startswith("DEFAULTS = ")
  )
  lines = ["| name | default | meaning and source |", "|---|---|---|"]
  for key, value in zip(node.value.keys, node.value.values):
    default = module.DEFAULTS[key.value]
    shown = default if isinstance(default, str) else repr(default)
    said = " ".join(
        text[i] for i in range(key.lineno, value.end_lineno + 1) if i in text
    )
    lines.append(f"| `{key.value}` | `{shown}` | {said} |")
  return "\n".join(lines)


def main():
  """Rewrites the section of every page."""
  for slug in methods.names():
    page = PAGES / f"{slug}.md"
    head, rest = page.read_text().split("## Hyper-parameters\n", 1)
    tail = re.search(r"^## ", rest, re.MULTILINE)
    page.write_text(
        f"{head}## Hyper-parameters\n\n{table(slug)}\n\n{rest[tail.start():]}"
    )
    print(page.relative_to(PAGES.parents[1]))


if __name__ == "__main__":
  main()
