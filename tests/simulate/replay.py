"""Replay seeds of the point-in-time simulation: ``python -m tests.simulate.replay SEED [SEED...]``."""

from __future__ import annotations

import sys

from tests.simulate.point_in_time import simulate


def main(arguments: list[str]) -> int:
    """Run each seed and say how it went; the first that fails ends it with its traceback."""
    for text in arguments:
        print(f"seed {text}:", flush=True)  # noqa: T201 - that is what it is for
        print(f"  {simulate(int(text))}")  # noqa: T201
    return 0 if arguments else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
