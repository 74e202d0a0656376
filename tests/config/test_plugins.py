"""Plug-ins: files and modules that register parts."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from generative_recommenders.config.plugins import load_plugins, plugin_of
from generative_recommenders.config.published import describe
from generative_recommenders.config.registry import LOSSES
from generative_recommenders.config.schema import RunSettings
from generative_recommenders.errors import UserError

SOURCE = """
from generative_recommenders import register_loss

@register_loss("{name}")
class {name}:
    def __init__(self, margin: float = 1.0) -> None:
        self.margin = margin
"""


def test_a_file_registers_its_parts_once(tmp_path: Path) -> None:
    path = tmp_path / "my-loss.py"
    path.write_text(SOURCE.format(name="LossOfAFile"))
    (plugin,) = load_plugins([str(path)])
    assert load_plugins([str(path)]) == [plugin]
    assert plugin.module == "gr_plugins.my_loss"
    part = LOSSES["LossOfAFile"]
    assert part.plugin == plugin
    assert plugin_of("gr_plugins.my_loss_too") is None
    assert part.option_values({}) == {"margin": 1.0}
    assert f"LossOfAFile (LossOfAFile) [{path}]: margin: float = 1.0" in describe(LOSSES)
    path.write_text(SOURCE.format(name="LossOfAFile") + "#")
    with pytest.raises(UserError, match="it changed"):
        load_plugins([str(path)])


def test_a_module_registers_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module_with_a_loss.py").write_text(SOURCE.format(name="LossOfAModule"))
    monkeypatch.syspath_prepend(tmp_path)
    (plugin,) = load_plugins(["module_with_a_loss"])
    assert LOSSES["LossOfAModule"].plugin == plugin
    assert len(plugin.sha256) == 64


@pytest.mark.parametrize(
    "text, message",
    [("x = 1\nraise RuntimeError('not\\nnow')", "line 2: RuntimeError: not now"), ("x = (", "SyntaxError")],
)
def test_a_file_that_fails_reports_one_line_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "failing.py"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_plugins([str(path)])
    assert "gr_plugins.failing" not in sys.modules


def test_a_run_says_which_plugin_it_needs() -> None:
    record = {"kind": "loss", "name": "Own", "plugin": "own.py", "sha256": ""}
    said = "loss 'Own' comes from a plug-in: give --plugin=own.py, in Python plugins=['own.py']"
    with pytest.raises(UserError, match=re.escape(said)):
        RunSettings.from_json({"plugins": [record]})


def test_a_run_names_all_plugins_that_it_needs() -> None:
    sources = {"Own": "own.py", "Other": "own.py", "Third": "third.py"}
    records = [{"kind": "loss", "name": name, "plugin": source} for name, source in sources.items()]
    said = (
        "loss 'Own', loss 'Other', loss 'Third' come from plug-ins: give --plugin=own.py --plugin=third.py, "
        "in Python plugins=['own.py', 'third.py']"
    )
    with pytest.raises(UserError, match=re.escape(said)):
        RunSettings.from_json({"plugins": records})


def test_a_missing_plugin_reports_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file at"):
        load_plugins([str(tmp_path / "none.py")])
    (tmp_path / "parts.txt").touch()
    with pytest.raises(UserError, match="parts.txt is no Python file: its name must end with .py"):
        load_plugins([str(tmp_path / "parts.txt")])
    with pytest.raises(UserError, match="there is no module"):
        load_plugins(["no_such_module_anywhere"])
