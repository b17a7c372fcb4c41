"""docs/recipes.md shows the parts as they declare themselves."""

from pathlib import Path

from galore_fx.recipes.table import parts_table

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


def test_the_page_has_the_table_of_parts():
    assert parts_table() in PAGE.read_text(), "paste what galore_fx.recipes.table.parts_table() returns"
