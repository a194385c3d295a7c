"""The page that a report is poured into: structure and style, no content.

Everything is inline and the content policy forbids the page any request, so it
opens without a network and years later. Placeholders are `$name`, filled by
`string.Template`.
"""

import string

PAGE = string.Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header>
<h1>$title</h1>
<p class="lead">$lead</p>
$tiles
<nav aria-label="Sections">$links</nav>
</header>
<main>
$sections
</main>
<footer>$footer</footer>
</body>
</html>
""")

STYLE = """
:root {
  --page: #f5f6f8; --card: #ffffff; --text: #1d2129; --muted: #667085;
  --line: #e4e7ec; --accent: #2f5bd7; --soft: #eaf0fe; --bad: #b42318;
  --warn: #fff6e5; --warn-line: #f2c879;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #121418; --card: #1a1d23; --text: #e7e9ee; --muted: #9aa4b2;
    --line: #343a45; --accent: #82a8ff; --soft: #243153; --bad: #ff8a7a;
    --warn: #33291a; --warn-line: #6b5426;
  }
}
* { box-sizing: border-box; }
html { color-scheme: light dark; }
body {
  margin: 0 auto; max-width: 1144px; padding: 40px 24px 56px;
  background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans",
    "DejaVu Sans", sans-serif;
}
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 10px; }
h2 { font-size: 20px; margin: 44px 0 12px; }
h3 { font-size: 16px; margin: 20px 0 6px; }
p { margin: 0 0 12px; }
a { color: var(--accent); text-decoration: none; }
a:hover, a:focus-visible { text-decoration: underline; }
.lead { font-size: 17px; max-width: 78ch; }
.muted, figcaption, .note { color: var(--muted); }
.note { font-size: 14px; max-width: 92ch; }
nav { display: flex; flex-wrap: wrap; gap: 6px 18px; font-size: 14.5px; }
.tiles {
  display: grid; gap: 12px; margin: 20px 0 18px;
  grid-template-columns: repeat(auto-fit, minmax(148px, 1fr));
}
.tile, .card {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px;
}
.tile { padding: 12px 16px; }
.tile b { display: block; font-size: 25px; line-height: 1.25; }
.tile span { font-size: 13.5px; color: var(--muted); display: block; }
.tile.main { border-color: var(--accent); }
.tile.main b { color: var(--accent); }
.card { padding: 18px 20px; margin: 0 0 16px; }
figure { margin: 0; }
figure h3 { margin: 0 0 8px; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { font-size: 14px; margin-top: 10px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 15px; }
th, td { padding: 7px 12px; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 4px; }
td.left, th.left { text-align: left; }
th { font-weight: 600; border-bottom: 1.5px solid var(--line); }
td { border-bottom: 1px solid var(--line); }
tbody:last-child tr:last-child td { border-bottom: 0; }
td { font-variant-numeric: tabular-nums; }
tbody.floors td { color: var(--muted); }
tbody.floors tr:first-child td { border-top: 2px solid var(--line); }
tr.total td { font-weight: 600; border-top: 1.5px solid var(--line); }
td.best { background: var(--soft); color: var(--accent); font-weight: 700; }
td.broken { color: var(--bad); font-weight: 600; }
dl.metrics { display: grid; grid-template-columns: max-content 1fr;
  gap: 2px 14px; font-size: 14px; color: var(--muted); margin: 14px 0 0; }
dl.metrics dt { color: var(--text); font-weight: 600; }
dl.metrics dd { margin: 0; }
pre {
  background: var(--page); border: 1px solid var(--line); border-radius: 8px;
  padding: 12px 14px; overflow-x: auto; margin: 0 0 14px;
  font: 13.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas,
    "DejaVu Sans Mono", monospace; white-space: pre-wrap;
}
code { font: 13px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono",
  monospace; overflow-wrap: anywhere; }
.hint { background: var(--warn); border: 1px solid var(--warn-line);
  border-radius: 8px; padding: 9px 14px; margin: 0 0 10px; }
.failed { color: var(--bad); }
details { margin-top: 10px; }
summary { cursor: pointer; color: var(--accent); }
td.wrap { white-space: normal; overflow-wrap: anywhere; text-align: left; }
footer { margin-top: 36px; font-size: 13.5px; color: var(--muted); }
@media (max-width: 640px) {
  body { padding: 22px 12px 40px; }
  .card { padding: 14px 12px; }
  dl.metrics { grid-template-columns: 1fr; }
}
@media print {
  body { max-width: none; padding: 0; }
  .card { break-inside: avoid; }
  nav { display: none; }
}
"""
