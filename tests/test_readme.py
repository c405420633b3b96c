"""The README's examples run, in order, as a reader would run them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_python_blocks_run(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert len(blocks) == 2
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    assert "2 of 2 attention calls replaced" in capsys.readouterr().out
