"""tools/house.py on a checkout of three modules."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[1] / "tools" / "house.py"
FIRST = '''"""A module."""
from generative_recommenders.data import second
# says why
def read(x):
    return _helper(x) if x.device.type == "cpu" else x

def _helper(x):
    return second.twice(x) + second.twice(x)
'''
SECOND = """def twice(x):
    from generative_recommenders.data.first import read
    return x
"""
OPERATOR = "class Sum(torch.autograd.Function):\n    pass\n"


def run(*arguments: str) -> str:
    return subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True, check=True).stdout


def test_numbers_of_a_small_checkout(tmp_path: Path) -> None:
    for name, text in {
        "data/first.py": FIRST,
        "data/second.py": SECOND,
        "build.py": OPERATOR,
        "ops/x.py": OPERATOR,
    }.items():
        path = tmp_path / "generative_recommenders" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = json.loads(run(f"--repo={tmp_path}", "--json"))["checkout"]
    assert found["modules a folder"] == {
        f"generative_recommenders{name}": n for name, n in (("/data", 2), ("", 1), ("/ops", 1))
    }
    assert found["import circles"] == [["generative_recommenders.data.first", "generative_recommenders.data.second"]]
    assert found["lines of package and programs"] == 15
    assert (found["functions"], found["function median"], found["function max"]) == (3, 2, 3)
    assert found["private functions used once"] == ["generative_recommenders/data/first.py:_helper"]
    assert found["public functions used once"] == []
    assert found["comment share"] == found["docstring share"] == round(1 / 15, 4)
    assert found["device.type outside ops"] == {"generative_recommenders/data/first.py": 1}
    assert found["autograd functions outside ops"] == {"generative_recommenders/build.py": ["Sum"]}
    assert run(f"--repo={tmp_path}", "--once") == "generative_recommenders/data/first.py: _helper\n"


def test_revisions_stand_side_by_side(tmp_path: Path) -> None:
    module = tmp_path / "generative_recommenders" / "first.py"
    module.parent.mkdir()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    for tag, text in (("before", FIRST), ("after", FIRST + "_helper(1)\n")):
        module.write_text(text)
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-qm", tag], check=True)
        subprocess.run([*git, "tag", tag], check=True)
    lines = run(f"--repo={tmp_path}", "before", "after").splitlines()
    assert lines[0].split() == ["before", "after"]
    (once,) = (line for line in lines if line.startswith("private functions used once"))
    assert once.split()[-2:] == ["1", "0"]
