"""Texts and tasks to learn from."""

__all__: list[str] = []
