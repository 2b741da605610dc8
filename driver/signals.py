"""Signals that come before a run has begun; driver/stopping.py has those that come later."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from video_opd.errors import StoppedError

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stopped_by_signals(when: str) -> Iterator[None]:
    """SIGTERM and SIGINT raise StoppedError in the block: before the run has begun."""

    def stop(number: int, _: object) -> None:
        raise StoppedError(f"stopped by {signal.Signals(number).name} {when}", number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {which: signal.getsignal(which) for which in SIGNALS}
    for which in SIGNALS:
        if before[which] != signal.SIG_IGN:
            signal.signal(which, stop)
    try:
        yield
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
