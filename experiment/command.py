"""What commands that start servers share: their arguments' types, and how they end."""

import argparse
import signal
import sys
from collections.abc import Callable
from types import FrameType


def count(text: str) -> int:
    """The type of an argument: a number of things."""
    number = int(text)
    if not 1 <= number <= 1000:
        raise argparse.ArgumentTypeError(f"must be from 1 to 1000, got: {text}")
    return number


def run(main: Callable[[], int]) -> None:
    """Run a command, so that `finally` runs whatever ends it, and no server outlives it."""
    # A shell that started us in the background may have had Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _exit)
    sys.exit(main())


def _exit(signal_number: int, _: FrameType | None) -> None:
    sys.exit(128 + signal_number)
