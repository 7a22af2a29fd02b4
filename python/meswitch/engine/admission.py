"""In which order requests enter the batch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from meswitch.engine.request import Request


class AdmissionQueue:
    """Accepted requests that are not in the batch yet, in order of arrival.

    Behind one whose expert has no room yet, only the base's go on. Everything costs the same however many wait.
    """

    def __init__(self) -> None:
        self._arrived: OrderedDict[str, Request] = OrderedDict()
        self._blocked: OrderedDict[str, Request] = OrderedDict()  # all of experts; they arrived before `_arrived`
        self._stuck = False

    def __len__(self) -> int:
        return len(self._arrived) + len(self._blocked)

    def add(self, requests: Iterable[Request]) -> None:
        self._arrived.update((request.id, request) for request in requests)

    def discard(self, request: Request) -> None:
        for waiting in (self._arrived, self._blocked):
            waiting.pop(request.id, None)

    def retry(self) -> None:
        """Lets `take` give the blocked ones again."""
        self._stuck = False

    def take(self) -> Request | None:
        """The next request to admit, if there is one; the caller gives it back to `block` if it has no room."""
        if self._blocked and not self._stuck:
            return self._blocked.popitem(last=False)[1]
        while self._arrived:
            _, request = self._arrived.popitem(last=False)
            if request.expert is None or not self._blocked:
                return request
            self._blocked[request.id] = request
        return None

    def block(self, request: Request) -> None:
        """Puts back a request whose expert has no room, in front of the others of experts."""
        self._blocked[request.id] = request
        self._blocked.move_to_end(request.id, last=False)
        self._stuck = True
