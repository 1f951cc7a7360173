"""Every sabotage of `mutants.py` can still be applied, and its tests are there: the sabotages themselves take long."""

from mutants import MUTANTS, ROOT


def test_every_mutant_stands_once_where_it_is_said_to_stand() -> None:
    texts = {mutant.file: (ROOT / "src" / "nestling" / mutant.file).read_text() for mutant in MUTANTS}
    for mutant in MUTANTS:
        assert texts[mutant.file].count(mutant.old) == 1, mutant
        assert mutant.new != mutant.old
        assert (ROOT / mutant.tests.split("::")[0]).exists(), mutant
