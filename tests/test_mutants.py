"""The sabotages of `make test-mutants` still fit the code: each has one place where it can be applied."""

from mutants import MUTANTS, ROOT


def test_each_has_its_place() -> None:
    for mutant in MUTANTS:
        assert (ROOT / "src" / "nestling" / mutant.file).read_text().count(mutant.old) == 1, mutant
        assert (ROOT / mutant.tests.partition("::")[0]).is_file(), mutant
        assert mutant.old != mutant.new
