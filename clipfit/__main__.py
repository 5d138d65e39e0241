"""`clipfit`, and `python -m clipfit`."""

from __future__ import annotations

import contextlib
import signal
import sys


def main() -> None:
    """The console script: Ctrl-C is answered in a sentence while the command line is still being imported, too, and
    does not disturb the end of Python."""
    try:
        from clipfit.cli import main as command_line

        command_line()
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        sys.exit(130)
    finally:
        with contextlib.suppress(ValueError):  # not in the main thread, which alone hears it
            signal.signal(signal.SIGINT, signal.SIG_IGN)


if __name__ == "__main__":
    main()
