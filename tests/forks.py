"""A forked process, for what must not wait there for its parent's threads."""

from __future__ import annotations

import os
import signal
import traceback
import warnings
from collections.abc import Callable


def forked(work: Callable[[], object], seconds: int = 30) -> int:
    """The status that a forked process ends with: 0 if `work` returned there, within so many seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks among threads, which these are about
        child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(seconds)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]
