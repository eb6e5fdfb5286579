"""The paper's tables, filled in: rows × seeds, trained, evaluated and compared."""

from flowback.tables.fill import reproduce, rows_of
from flowback.tables.result import Difference, Row, Table, images_needed, paired_difference

__all__ = [
    "Difference",
    "Row",
    "Table",
    "images_needed",
    "paired_difference",
    "reproduce",
    "rows_of",
]
