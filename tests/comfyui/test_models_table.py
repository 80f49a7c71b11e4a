from __future__ import annotations

from models_table import BETWEEN, PAGE, table

from tap_diffusion.integrations.comfyui.specs import SPECS


def test_the_table_in_the_docs_is_that_of_this_version() -> None:
    (found,) = BETWEEN.findall(PAGE.read_text(encoding="utf-8"))
    assert found == table(), "run .venv-comfyui/bin/python tests/comfyui/models_table.py"
    assert [name for name in SPECS if f"- `{name}`: " not in found] == []
