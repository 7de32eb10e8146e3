"""Child processes of the tests."""

import signal


def hears_signals() -> None:
    """As `preexec_fn`: the child hears every signal, also those that this process ignores (under nohup, or in
    the background)."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
