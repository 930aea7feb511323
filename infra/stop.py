"""Ctrl-C, SIGTERM and the time limit: a run ends after a whole step, and saves."""

import math
import os
import signal
import time

from infra.parallel import World, all_max

ONE_KEYSTROKE = 0.5  # a second SIGINT within these seconds is the first one, passed on by a launcher


class StopSignal:
    """Set by Ctrl-C, SIGTERM or a time limit, so that the step in progress ends and is saved.

    A second Ctrl-C stops at once. A second SIGTERM does not: schedulers send it to every process, and `launch` passes
    it on as well.
    """

    def __init__(self, max_hours: float = 0.0, began: float = 0.0, *, says: bool = True):
        self.received = 0.0  # when
        self.says = says
        self.deadline = began + 3600 * max_hours if max_hours else math.inf
        self.before, self.longest = time.monotonic(), 0.0  # the end of the last step, the longest step so far
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        if self.received:
            if number == signal.SIGINT and time.monotonic() - self.received > ONE_KEYSTROKE:
                raise KeyboardInterrupt
            return
        self.received = time.monotonic()
        if self.says:
            os.write(2, b"\nstopping after this step, then saving; press Ctrl-C again to stop at once without saving\n")

    def agreed(self, world: World) -> bool:
        """Whether any rank was told to stop or would end its next step too late; all ranks get the same answer.

        Between two calls lie a step and, now and then, an evaluation and a save: the longest so far is reserved.
        """
        now = time.monotonic()
        self.longest, self.before = max(self.longest, now - self.before), now
        stop = self.received > 0 or now + self.longest > self.deadline
        return all_max({"stop": float(stop)}, world)["stop"] > 0
