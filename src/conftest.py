"""Doctests import their module: those of the app that need Gradio are left out where it is missing."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("gradio") else ["flowback/app/fields.py", "flowback/app/page.py"]
