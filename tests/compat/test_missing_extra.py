"""RePlay's Lightning side without the extra ``lightning``."""

from __future__ import annotations

import importlib
import sys

import pytest

from generative_recommenders.errors import UserError


def test_missing_lightning_reports_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "generative_recommenders.lightning", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"the extra 'lightning' has it: pip install '\.\[lightning\]'"):
        importlib.import_module("generative_recommenders.lightning")
