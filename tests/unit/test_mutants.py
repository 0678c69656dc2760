"""The list of mutations does not rot: every text is there exactly once, still compiles when replaced, and its tests exist."""

from __future__ import annotations

import re

import pytest

from tests.mutants import ROOT, killer, main, times_found
from tests.mutations import MUTATIONS


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_a_mutation_fits_the_code(mutation):
    assert times_found(mutation) == 1, f"{mutation.old!r} is {times_found(mutation)} times in {mutation.file}"
    source = (ROOT / mutation.file).read_text()
    broken = source.replace(mutation.old, mutation.new)
    assert broken != source
    if mutation.file.endswith(".py"):
        compile(broken, mutation.file, "exec")
    assert mutation.story and mutation.tests
    for test in mutation.tests:
        file, _, name = test.partition("::")
        function = re.escape(name.partition("[")[0])
        assert re.search(rf"^def {function}\(", (ROOT / file).read_text(), re.M), f"{file} has no test {name}"


def test_there_are_many_and_each_has_its_own_name():
    names = [m.name for m in MUTATIONS]
    assert len(names) == len(set(names)) >= 25


def test_the_list_is_printed(capsys):
    assert main(["--list", "--only", "merge_sign"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("merge_sign ") and "partial.py" in said


def test_an_unknown_name_is_a_sentence(capsys):
    with pytest.raises(SystemExit):
        main(["--only", "no_such"])
    assert "there is no mutation no_such; --list shows those there are" in capsys.readouterr().err


def test_the_killer_is_read_from_pytests_summary():
    assert killer("...\nFAILED tests/unit/test_x.py::test_y[1] - assert 1 == 2\n") == "test_x.py::test_y[1] - assert 1 == 2"
    assert killer("1 passed") == ""
