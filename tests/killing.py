"""How tests kill a process at a moment of their choice."""

import functools
import os
import signal


def die_at(owner, name, k, after=False):
    """Kill this process at the k-th call of `owner.name`, before or after what it does."""
    original, calls = getattr(owner, name), []

    @functools.wraps(original)
    def call(*args, **kwargs):
        calls.append(name)
        if len(calls) == k and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if len(calls) == k:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, call)
