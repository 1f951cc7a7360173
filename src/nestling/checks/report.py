"""What the checks found, and how it reads."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple


class Finding(NamedTuple):
    """What one check measured on one model. passed: None where the check does not apply; `detail` then says why.
    measured: the number that was judged (nan where skipped); allowed: what it may be."""

    name: str
    passed: bool | None
    measured: float
    allowed: str
    detail: str = ""

    @property
    def skipped(self) -> bool:
        return self.passed is None

    @property
    def verdict(self) -> str:
        return "skipped" if self.passed is None else "passed" if self.passed else "FAILED"


def skip(name: str, reason: str) -> Finding:
    """The finding of a check that does not apply."""
    return Finding(name, None, float("nan"), "", reason)


@dataclass(frozen=True)
class Report:
    """The findings of a run of the kit, in order. Prints as text, and as a table where rich prints it."""

    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Every check that applies passed, and at least one applies."""
        judged = [finding.passed for finding in self.findings if finding.passed is not None]
        return bool(judged) and all(judged)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    def __getitem__(self, name: str) -> Finding:
        """The finding of the check called `name`; KeyError if it was not run."""
        for finding in self.findings:
            if finding.name == name:
                return finding
        raise KeyError(name)

    def __str__(self) -> str:
        rows = [_row(finding) for finding in self.findings]
        widths = [max(len(row[column]) for row in rows) for column in range(4)] if rows else []
        lines = []
        for row in rows:
            fixed = "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=False))
            lines.append(f"{fixed}  {row[4]}".rstrip())
        return "\n".join([*lines, self.summary])

    @property
    def summary(self) -> str:
        """How many checks passed, failed and were skipped, as a sentence."""
        counts = {word: sum(f.verdict == word for f in self.findings) for word in ("passed", "FAILED", "skipped")}
        return f"{counts['passed']} passed, {counts['FAILED']} failed, {counts['skipped']} skipped"

    def __rich__(self) -> Any:
        from rich.table import Table  # not needed to import nestling

        table = Table(caption=self.summary)
        for column in ("check", "verdict", "measured", "allowed", "detail"):
            table.add_column(column)
        styles = {"passed": "green", "FAILED": "bold red", "skipped": "dim"}
        for finding in self.findings:
            table.add_row(*_row(finding), style=styles[finding.verdict])
        return table


def _row(finding: Finding) -> tuple[str, str, str, str, str]:
    measured = "" if finding.skipped else f"{finding.measured:.3g}"
    return finding.name, finding.verdict, measured, finding.allowed, finding.detail
