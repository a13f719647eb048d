"""Whether drafting is faster than plain decoding, as measured."""

FIRST_PAUSE = 8
"""Chunks of steps until the slower way is tried again."""
LONGEST_PAUSE = 128
"""The pause doubles with every trial that changes nothing, up to this."""
WEIGHT = 0.25
"""Share of a new timing in what is known of the way that is in use."""


class DraftSwitch:
    """Chooses drafting or plain decoding for the next chunk of steps: whichever takes less time a token.

    Costs of both depend on the number of rows, so a switch serves one number of rows. Drafting is measured first, then
    plain decoding. The faster one is used from then on, and the slower one is tried for one chunk after a pause. Where
    drafting takes twice the time of plain decoding, trials cost one part in 128 in the long run.
    """

    def __init__(self) -> None:
        self.seconds: dict[bool, float] = {}
        """Of a token of one row, with drafts (True) and without."""
        self._pause = self._chunks_left = FIRST_PAUSE

    @property
    def drafting_wins(self) -> bool:
        """True until both are measured."""
        return len(self.seconds) < 2 or self.seconds[True] < self.seconds[False]

    def next(self) -> bool:
        """Whether the next chunk is to draft."""
        if len(self.seconds) < 2:
            return True not in self.seconds
        return self.drafting_wins == (self._chunks_left > 0)

    def report(self, is_drafting: bool, seconds: float) -> None:
        """What a chunk took.

        Args:
            is_drafting: whether it drafted.
            seconds: of a token of one row, without compilation.
        """
        is_known, before = len(self.seconds) == 2, self.drafting_wins
        if is_known and is_drafting == before:
            self.seconds[is_drafting] += WEIGHT * (seconds - self.seconds[is_drafting])
            self._chunks_left -= 1
        else:  # a trial: what was measured long ago counts nothing
            self.seconds[is_drafting] = seconds
            self._chunks_left = self._pause = min(2 * self._pause, LONGEST_PAUSE)
        if not is_known or self.drafting_wins != before:
            self._chunks_left = self._pause = FIRST_PAUSE
