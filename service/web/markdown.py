"""Markdown from a bundle's card or the API's description, as HTML for a page."""

from __future__ import annotations

from markdown_it import MarkdownIt
from markupsafe import Markup

TABLE = '<div class="scroll" tabindex="0" role="group" aria-label="Table"><table>'
_parser = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")


def render_markdown(text: str, *, lower_by: int = 1) -> Markup:
    """The headings are ``lower_by`` levels lower; HTML is shown as text. Wide tables can be scrolled by keyboard."""
    tokens = _parser.parse(text)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1]) + lower_by)}"
    html = str(_parser.renderer.render(tokens, _parser.options, {}))
    return Markup(html.replace("<table>", TABLE).replace("</table>", "</table></div>"))
