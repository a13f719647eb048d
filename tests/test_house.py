"""The figures of the house, on a small package made for it."""

from pathlib import Path

from benchmarks.house import figures, page

FILES = {
    "__init__.py": '"""A docstring is no code."""\n\nfrom house.low import low\n',
    "low.py": "def low(a, b, c, d, e, f, g, h, i):\n    # a comment\n    return a\n",
    "up/__init__.py": "",
    "up/one.py": "from house.down.two import two\n\n\ndef one(self, its_own, **rest):\n"
    "    settings: dict[str, Any] = {}\n    return isinstance(rest, list) and low(**settings)\n",
    "up/long.py": "def long():\n" + "    pass\n" * 60,
    "down/__init__.py": "",
    "down/two.py": "if TYPE_CHECKING:\n    import house.low\ndef two():\n    from house.up import one\n",
}


def test_what_breaks_a_rule_is_counted(tmp_path: Path) -> None:
    package = tmp_path / "house"
    for name, text in FILES.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    found = figures(package)
    assert found["code_lines_by_folder"] == {".": 3, "down": 4, "up": 4 + 61}
    assert found["long_functions"] == {"up/long.py:1 long": 61} and found["long_files"] == {}
    assert found["many_arguments"] == {"low.py:1 low": 9}
    assert found["settings_dicts"] == {"up/one.py:4 one": ["settings"]}
    assert found["tests_of_form"] == {"up/one.py": 1}
    assert found["pronouns"] == {"up/one.py:4 one": ["its_own"]}
    assert found["folder_cycles"] == [["down", "up"]]
    assert "down <-> up" in page(found)
