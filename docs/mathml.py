"""A hook of mkdocs: formulas become MathML when the site is built, which browsers draw without a script or a font."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(html: str, **_: Any) -> str:
    def formula(match: re.Match[str]) -> str:
        block = match[1] == "div"
        mathml = convert(unescape(match[2]).strip(), display="block" if block else "inline")
        return f'<div class="formula">{mathml}</div>' if block else mathml

    return _FORMULA.sub(formula, html)
