"""Docstrings of this project as mkdocstrings reads them."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):(?=`)")


class Docstrings(Extension):
    """Names of other objects without Sphinx's marks; examples as a section of their own."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called for each object that was read."""
        if obj.docstring:
            text = ROLE.sub("", obj.docstring.value)
            obj.docstring.value = re.sub(r"^(\s*)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
