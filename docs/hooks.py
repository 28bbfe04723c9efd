"""What the site's build adds to MkDocs (`hooks` in mkdocs.yml) and to Griffe (`extensions` there).

Equations become MathML, which browsers render by themselves: no script is loaded, and the pages
read the same without a network. In docstrings, roles (:func:`name`) become links and `.. math::`
becomes an equation.
"""

import html
import re
from typing import Any

import griffe
from latex2mathml.converter import convert

EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
MATH = re.compile(r"^\.\. math::\n((?: .*\n)+)", re.MULTILINE)
ROLE = re.compile(r":(?:func|class|meth|mod):`~?([\w.]+)`")


def on_page_content(content: str, **_: Any) -> str:
    """Replace what `pymdownx.arithmatex` marked by MathML."""

    def mathml(match: re.Match) -> str:
        text = html.unescape(match[2]).strip()
        if match[1] == "span":
            return convert(text)
        return f"<p>{convert(text, display='block')}</p>"

    return EQUATION.sub(mathml, content)


class Docstrings(griffe.Extension):
    """Rewrite in docstrings what Sphinx would understand."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every object when all of its package has been read."""

        def link(match: re.Match) -> str:
            try:
                target = obj.resolve(match[1])
            except griffe.NameResolutionError:
                target = match[1]
            return f'<autoref identifier="{target}" optional><code>{match[1]}</code></autoref>'

        if obj.docstring:
            text = ROLE.sub(link, obj.docstring.value)
            obj.docstring.value = MATH.sub(r"$$\n\1$$\n", text)
