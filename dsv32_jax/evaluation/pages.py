"""A report as report.md and a self-contained report.html."""

import base64
import dataclasses
import html
import pathlib
from collections.abc import Sequence

from dsv32_jax.evaluation.plots import Figures

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Names of the columns, and rows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
  """A part of a report.

  Attributes:
    title: of the part.
    sentence: what the numbers are.
    table: they.
  """

  title: str
  sentence: str
  table: Table


def write(
  path: pathlib.Path,
  *,
  title: str,
  head: Sequence[str],
  sections: Sequence[Section],
  figures: Figures,
) -> None:
  """Writes `path` (.md) and the same as .html beside it.

  Args:
    path: of the Markdown file; figures lie in a directory below its own.
    title: of the report.
    head: lines that come first.
    sections: in order.
    figures: come last.
  """
  text = _markdown(title, head, sections, figures)
  path.write_text(text, encoding='utf-8')
  page = _html(title, head, sections, figures)
  path.with_suffix('.html').write_text(page, encoding='utf-8')


def _markdown(
  title: str,
  head: Sequence[str],
  sections: Sequence[Section],
  figures: Figures,
) -> str:
  lines = [f'# {title}', '', *(f'{line}  ' for line in head), '']
  for section in sections:
    names, rows = section.table
    lines += [f'## {section.title}', '', section.sentence, '']
    lines.append(f'| {" | ".join(names)} |')
    lines.append(f'|{"---|" * len(names)}')
    lines += [f'| {" | ".join(map(_cell, row))} |' for row in rows]
    lines.append('')
  lines += ['## Figures', '']
  for name, caption in figures.names:
    place = f'{figures.directory.name}/{name}'
    lines += [f'![{name}]({place}.png)', '']
    lines += [f'{caption} Data: `{place}.json`.', '']
  return '\n'.join(lines)


def _cell(text: str) -> str:
  """Text that ends no cell and no row."""
  return text.replace('|', '\\|').replace('\n', ' ')


_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; font-size: 13px; margin: 0.5rem 0 1.5rem; }
th, td { padding: 0.2rem 0.6rem; text-align: right;
  border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; } figcaption, .from { color: #666; font-size: 13px; }
"""


def _html(
  title: str,
  head: Sequence[str],
  sections: Sequence[Section],
  figures: Figures,
) -> str:
  """One file: pictures are embedded, nothing is fetched."""
  parts = [
    f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title>',
    f'<style>{_CSS}</style><h1>{html.escape(title)}</h1>',
    *(f'<p class="from">{html.escape(line)}</p>' for line in head),
  ]
  for section in sections:
    names, rows = section.table
    parts.append(f'<h2>{html.escape(section.title)}</h2>')
    parts.append(f'<p>{html.escape(section.sentence)}</p>')
    header = ''.join(f'<th>{html.escape(name)}</th>' for name in names)
    body = ''.join(
      '<tr>'
      + ''.join(f'<td>{html.escape(cell)}</td>' for cell in row)
      + '</tr>'
      for row in rows
    )
    parts.append(f'<table><tr>{header}</tr>{body}</table>')
  parts.append('<h2>Figures</h2>')
  for name, caption in figures.names:
    image = (figures.directory / f'{name}.png').read_bytes()
    encoded = base64.b64encode(image).decode()
    parts.append(
      f'<figure><img alt="{name}" src="data:image/png;base64,{encoded}">'
      f'<figcaption>{html.escape(caption)}</figcaption></figure>'
    )
  return '\n'.join(parts)
