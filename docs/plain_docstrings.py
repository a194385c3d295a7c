"""Shows docstrings as they are written: plain text in Google's sections.

The library's docstrings hold formulas in plain ASCII, `code` in single quotes
and no reStructuredText. This turns them into the latter before napoleon reads
the sections.
"""

import re

_SECTION = re.compile(
    r"(Args|Attributes|Example|Examples|Raises|References|Returns|Yields):\s*$"
)
_BULLET = re.compile(r"\s*[*-] ")


def escape(text: str) -> str:
  """Text with * | \\ and trailing _ shown, and `code` as a literal."""
  parts = re.split(r"(``.+?``|`[^`]+`)", text, flags=re.DOTALL)
  for i, part in enumerate(parts):
    if i % 2:
      parts[i] = part if part.startswith("``") else f"`{part}`"
      if parts[i + 1][:1].isalnum():  # a plural: `Array`s
        parts[i] += "\\ "
      continue
    part = re.sub(r"([\\*|])", r"\\\1", part)
    part = re.sub(r"(?<=\w)_(?!\w)", r"\\_", part)
    # A bullet, and the name of a variadic argument, are meant.
    part = re.sub(r"^(\s*)\\\* ", r"\1* ", part, flags=re.MULTILINE)
    parts[i] = re.sub(
        r"^(\s*)((?:\\\*){1,2})(\w+):",
        lambda m: m[1] + m[2].replace("\\", "") + m[3] + ":",
        part,
        flags=re.MULTILINE,
    )
  return "".join(parts)


def convert(lines: list[str]) -> list[str]:
  """The lines of a docstring -> lines of reStructuredText."""
  out: list[tuple[bool, str]] = []  # (is text to be escaped, line)
  head, doctest, formula, bullets = True, False, False, False

  def blank():
    if out and out[-1][1]:
      out.append((False, ""))

  for line in lines:
    if _SECTION.match(line):
      blank()
      head = doctest = formula = False
      out.append((False, line))
      continue
    doctest = bool(line.strip()) and (
        doctest or line.lstrip().startswith(">>>")
    )
    if doctest:
      out.append((False, line))
      continue
    if not head:
      # An enumeration inside an argument's text is shown as running text.
      deep = len(line) - len(line.lstrip()) > 4
      out.append((True, f"    {line.lstrip()}" if deep else line))
      continue
    before = out[-1][1] if out else ""
    bullet = bool(_BULLET.match(line)) and (
        bullets or not before or before.endswith(":")
    )
    if bullet and not bullets:
      blank()
    bullets = bullet or (bullets and (not line or line.startswith(" ")))
    indented = line.startswith(" ") and not bullets
    if indented and not formula:
      blank()
      out += [(False, "::"), (False, "")]
    elif formula and line and not indented:
      blank()
    formula = indented or (formula and not line)
    out.append((not formula, line))

  result: list[str] = []
  chunk: list[str] = []
  for is_text, line in [*out, (False, "")]:
    if is_text:
      chunk.append(line)
      continue
    if chunk:  # together: `code` may go on in the next line
      result += escape("\n".join(chunk)).split("\n")
      chunk = []
    result.append(line)
  return result


def setup(app) -> None:
  """Registers the conversion, ahead of napoleon's."""

  def process(app, what, name, thing, options, lines):
    del app, what, name, thing, options
    lines[:] = convert(lines)

  app.setup_extension("sphinx.ext.autodoc")
  app.connect("autodoc-process-docstring", process, priority=100)
