"""``dtr-lab sync``: publish what a run could not publish while it lasted, say because its server was away."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("run_dir", type=Path, help="directory of one run, or one that holds several, such as runs/")
    parser.add_argument("--tracking-uri", help="MLflow store (default: the one the run was started with)")


def run(args: argparse.Namespace) -> int:
    """Publishes, and says how much there was."""
    from lightning_modules.tracking.sync import sync

    count = sync(args.run_dir, args.tracking_uri)
    print(f"{count} items published" if count else "nothing was left to publish")
    return 0
