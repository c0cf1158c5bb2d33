"""Drafts by prompt lookup: what followed the last few tokens where they stood before (Saxena 2023).

A draft costs nothing to make. The model reads it in one step with the newest token, and the answer takes as much of it
as it would have said anyway: each place is drawn as ever, and the draft goes on while the drawn token is its own. So
the answer, drawn or greedy, is token for token the one without drafts.
"""

LENGTHS = (3, 2)  # of what is looked up, the longer first


class Drafts:
    """Knows where each run of two and of three tokens of a text stood last."""

    def __init__(self) -> None:
        self._text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # the place behind it
        self._before: dict[tuple[int, ...], int] = {}  # the same, of its last appearance but one

    @property
    def known(self) -> int:
        """Tokens of the text that were taken in."""
        return len(self._text)

    def propose(self, new: list[int], count: int) -> list[int]:
        """At most `count` tokens that may follow the text; `new`: how it goes on behind those that are known."""
        for token in new:
            self._text.append(token)
            for length in LENGTHS:
                if len(self._text) >= length:
                    key = tuple(self._text[-length:])
                    if key in self._after:
                        self._before[key] = self._after[key]
                    self._after[key] = len(self._text)
        for length in LENGTHS:
            place = self._before.get(tuple(self._text[-length:]))
            if len(self._text) >= length and place is not None:
                return self._text[place : place + count]
        return []
