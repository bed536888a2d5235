"""Parity with the official DTR code: ``python -m tests.parity DIR`` holds our numbers against its recorded ones.

`cases` recomputes what a case records, `checks` compares, and ``data/`` holds the reference numbers (DESIGN.md,
"Parity data").
"""
