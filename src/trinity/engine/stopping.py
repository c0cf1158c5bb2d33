"""Stop strings in text that arrives bit by bit: what may already be shown, and where the answer ends.

The answer ends at the first moment its text contains a stop string; of those that end there, the one that began first
is cut off. So the result does not depend on how the text was split on its way.
"""


class StopFinder:
    """Feed it text; it returns what can no longer be part of a stop string, and holds back the rest."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops = stops
        self.found = False
        self._held = ""

    def push(self, text: str) -> str:
        """The text that may be shown now. After a stop string (`found`) everything later is dropped."""
        if self.found:
            return ""
        if not self.stops:
            return text
        self._held += text
        places = [(place + len(stop), place) for stop in self.stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            shown, self._held = self._held[: min(places)[1]], ""
            return shown
        keep = max(_overlap(self._held, stop) for stop in self.stops)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def rest(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, the whole of it excluded."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
