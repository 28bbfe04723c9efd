"""`make figures`: which pictures it draws, by which commands, from which models."""

import re
from pathlib import Path

import pytest
from loading import load_tool

figures = load_tool("dev/figures.py")


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """What would be run, and what would be trained; nothing is written into the repository."""
    commands, trained, drawn = [], [], []

    def train(name, arguments, folder, root):
        folder.mkdir(parents=True)
        (folder / "last_checkpoint").write_text(f"{name}.pth")
        trained.append((name, arguments[1]))

    monkeypatch.setattr(figures, "WORK", tmp_path)
    monkeypatch.setattr(figures, "train_and_test", train)
    monkeypatch.setattr(figures.subprocess, "run", lambda command, **_: commands.append(command))
    monkeypatch.setattr(figures.shutil, "copy", lambda source, _: drawn.append(Path(source).name))
    monkeypatch.setattr(figures, "save_figure", lambda _, path, **options: drawn.append(path.name))
    return commands, trained, drawn


def test_commands_models_and_pictures(calls, root):
    commands, trained, drawn = calls
    figures.main()
    assert [name for name, _ in trained] == ["content", "released"]
    assert all((root / config).is_file() for _, config in trained)
    for _, script, *arguments in commands:
        assert (root / script).is_file()
        if "analysis_tools" in script:
            known = (root / script).read_text() + (root / "mmsoft/builder.py").read_text()
            assert all(f'"{a}"' in known for a in arguments if a.startswith("--"))
    outs = re.findall(r"figures/([\w.]+)", " ".join(map(" ".join, commands)))
    pages = (root / "docs/look_inside.md").read_text() + (root / "docs/method.md").read_text()
    for name in {*outs, *drawn}:
        assert f"figures/{name}" in pages
        assert (root / "docs/figures" / name).is_file()
    assert len({*outs, *drawn}) == 5


def test_models_are_trained_once(calls):
    figures.main()
    figures.main()
    assert len(calls[1]) == 2
