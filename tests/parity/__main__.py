"""``python -m tests.parity DIR``: compares our numbers with the official code's in DIR.

Prints ``case quantity max_relative_error`` for every quantity, problems to the standard error. Exits with 1 if an error
exceeds 1e-5, a file is missing or unreadable, or nothing was there to check.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.parity.checks import TOLERANCE, check_directory


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the check; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR", help="directory of recorded numbers")
    directory: Path = parser.parse_args(arguments).directory
    compared, problems = 0, 0
    for finding in check_directory(directory):
        compared += 1
        problems += bool(finding.problem)
        print(f"{finding.case} {finding.quantity} {finding.error:.3e}", flush=True)
        if finding.problem:
            print(f"parity: {finding.case}: {finding.quantity} {finding.problem}", file=sys.stderr, flush=True)
    if not compared:
        print(f"parity: nothing to check in {directory}: no described case and no .npz file", file=sys.stderr)
        return 1
    if problems:
        print(f"parity: {problems} of {compared} checks failed", file=sys.stderr)
        return 1
    print(f"parity: {compared} quantities agree within {TOLERANCE:g}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
