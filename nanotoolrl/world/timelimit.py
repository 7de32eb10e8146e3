"""A time limit on code that is not ours."""

import ctypes
import signal
import threading
import time
from types import FrameType


class TooLong(BaseException):
    """The time is up. It is no Exception, so that `except Exception` in a tool does not swallow it."""


class TimeLimit:
    """Raise TooLong in the body when it takes longer than so many seconds. 0: no limit.

    In the main thread of a POSIX system a timer signal does it. It also ends waits, such as a sleep. The
    handler and the timer that were there before are put back, the timer with the time it has left.
    Elsewhere a second thread does it, which a wait does not notice until it is over.

    Not covered: a single call into C that neither returns nor looks for signals, such as
    `sum(range(10**12))`; and a body that catches BaseException again and again. One that catches it once is
    still TooLong.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.armed, self.up = seconds, False, False
        self.watchdog: threading.Timer | None = None

    def __enter__(self) -> None:
        if not self.seconds:
            return
        self.started = time.monotonic()
        if _can_signal():
            self.outer = signal.setitimer(signal.ITIMER_REAL, 0)
            self.handler = signal.signal(signal.SIGALRM, self._ring)
            self.armed = True
            signal.setitimer(signal.ITIMER_REAL, self.seconds, max(self.seconds, 1))  # again, if swallowed
        else:
            self.lock, self.armed = threading.Lock(), True
            self.watchdog = threading.Timer(self.seconds, self._bark, [threading.get_ident()])
            self.watchdog.daemon = True
            self.watchdog.start()

    def __exit__(self, kind: type | None, *_: object) -> None:
        if not self.seconds:
            return
        if self.watchdog:
            with self.lock:
                self.armed = False
            self.watchdog.cancel()
            if self.up:  # take back what this thread has not noticed yet
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(threading.get_ident()), None)
        else:
            self.armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self.handler)
            if self.outer[0]:
                left = self.outer[0] - (time.monotonic() - self.started)
                signal.setitimer(signal.ITIMER_REAL, max(left, 1e-6), self.outer[1])
        if self.up and kind not in (TooLong, KeyboardInterrupt):
            raise TooLong

    def _ring(self, _: int, frame: FrameType | None) -> None:
        """The signal's handler. It leaves our own methods alone: they must put back what was there before."""
        ours = (TimeLimit.__enter__.__code__, TimeLimit.__exit__.__code__)
        if self.armed:
            self.up = True
            if frame is None or frame.f_code not in ours:
                raise TooLong

    def _bark(self, thread: int) -> None:
        """What the second thread does. The lock: a body that is over must not be hit."""
        with self.lock:
            if self.armed:
                self.up = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(TooLong))


def _can_signal() -> bool:
    """Handlers run in the main thread only. One that Python did not install could not be put back."""
    here = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
    return here and signal.getsignal(signal.SIGALRM) is not None
