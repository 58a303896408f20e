"""Imports only go down, and what must be instant stays free of torch."""

import ast
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import llmkit

ROOT = Path(llmkit.__file__).parent
FLOORS = [  # what stands on one floor imports only from the floors below, and nothing of its neighbours
    {"errors", "types"},
    {"files", "screen", "intervals", "scores", "user_code"},
    {"config"},
    {"models", "tokenizer", "readers"},
    {"data", "parallel", "peft", "generation"},
    {"corpus", "records", "objectives"},
    {"storage"},
    {"inference", "formats"},
    {"evals", "tasks"},
    {"training"},
    {"commands"},
    {"__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imported_rooms(path: Path) -> set[str]:
    """Return the rooms of llmkit that a file imports, at any place in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llmkit"):
            inside = node.module.split(".")[1:]
            found |= {inside[0]} if inside else {alias.name for alias in node.names if not alias.name.startswith("__")}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("llmkit.")}
    return found


def test_arrows_go_down():
    upward = []
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if room != "__init__":
            upward += [f"{room} -> {other}" for other in imported_rooms(path) - {room} if FLOOR[other] >= FLOOR[room]]
    assert not upward


def test_every_room_has_a_floor():
    rooms = {
        path.name.removesuffix(".py")
        for path in ROOT.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert rooms - {"__init__"} == set(FLOOR)


def test_a_wheel_has_every_room():
    listed = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    rooms = {f"llmkit.{path.parent.name}" for path in ROOT.glob("*/__init__.py")}
    assert set(listed) == {"llmkit", "llmkit.configs"} | rooms


def test_schema_and_help_do_not_import_torch():
    code = "import sys, llmkit.commands.app, llmkit.config.load, llmkit.storage.run; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_imports_neither_torch_nor_pydantic_and_is_quick():
    code = "import sys, llmkit.commands.app as app\ntry: app.main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'pydantic', 'numpy'} & set(sys.modules)"
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.3
