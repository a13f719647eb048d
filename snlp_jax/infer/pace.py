"""How many tokens to draft: chosen by what drafting has cost and what came of it."""

import math

from snlp_jax.errors import InputError

MEMORY = 512
"""Tokens of text after which what is known of acceptance counts half."""
TIMING_WEIGHT = 0.1
"""Share of a new timing in what is known of seconds, once there are ten."""
SLOWEST = 1.25
"""A timing counts at most this many times what was expected: machines are slow by accident, never fast."""
FASTEST = 0.5
"""A timing below this share of what was expected shows that the earlier ones were the accident."""
MAX_LOSS = 0.03
"""Share of the time of plain decoding that measuring in vain may cost."""
MAX_GAP = 128
"""While drafting pays, other lengths are measured for one part in this many of the time, more often at first."""
SURPRISE = 4.0
"""Standard deviations by which a chunk's acceptance differs when the text has changed: what was known is forgotten."""


class Pace:
    """Draft length g = argmax of E(g) / s(g) over 1..max_draft, or 0, plain decoding, where that is not above 1 / p.

    E(g) = 1 + k (a + a^2 + ... + a^g) = 1 + k ((1 - a^(g+1)) / (1 - a) - 1) tokens come of a round in each row,
    s(g) = v + c g seconds are its cost, and p those of a plain step. All are estimated with exponential forgetting:
    a = accepted / tested drafts; k = accepted drafts over those that independent ones of rate a would have given (1
    if they are); v and c by least squares over the lengths measured, through (0, p) while there is only one; p is the
    mean of plain steps. The rows of a batch decode in step, so the rate of one row decides for all. The choice depends
    on nothing but the reports.

    The first chunks measure: plain, the middle length, plain, an outer length. While drafting pays, plain and a second
    length are measured again at growing distances. While it does not, the best length is tried again (in turn with a
    second one, if that could pay were the line less steep), after pauses that double up to 16 times the first, and
    only when the whole loss, the first chunks included, stays under ``MAX_LOSS`` of plain decoding's time.

    Speculative decoding's E(g) and its optimum: Leviathan et al., "Fast Inference from Transformers via Speculative
    Decoding", 2023, section 3.

    Args:
      max_draft: the longest draft.
      fixed: always this length; measurements are kept but decide nothing.

    Raises:
      InputError: a length is out of range.
    """

    def __init__(self, max_draft: int, fixed: int | None = None) -> None:
        if max_draft < 0:
            raise InputError(f"max_draft={max_draft} must not be negative; use 0 for plain decoding.")
        if fixed is not None and not 0 <= fixed <= max_draft:
            raise InputError(
                f"a fixed draft length of {fixed} does not fit max_draft={max_draft}; use 0 to {max_draft}."
            )
        self._max_draft = max_draft
        self._fixed = fixed
        self._accepted = _Mean()  # per tested draft
        self._gain = _Mean()  # accepted drafts per expected one: k
        self._line = _Line()
        self._plain: float | None = None
        self._num_plain = 0  # chunks so far
        self._num_drafted = 0
        # What drafting in vain has cost, in plain steps of a row, of all that there would have been.
        self._lost = 0.0
        self._steps = 0.0
        self._last_rounds = 1
        self._last_draft = 0
        self._pause = 0.0  # plain steps before the next trial, and those since the last
        self._paused = 0.0
        # While drafting pays: since another length was measured, for how long it was, and how often that is to wait.
        self._unmeasured_seconds = 0.0
        self._measured_seconds = 0.0
        self._gap = 8
        self._was_plain_measured = True

    @property
    def acceptance(self) -> float | None:
        """a: the share of tested drafts that were accepted; None before the first."""
        return self._accepted.value

    @property
    def plain_seconds(self) -> float | None:
        """p: seconds of a plain step; None before the first."""
        return self._plain

    def round_seconds(self, draft_len: int) -> float | None:
        """s(g): predicted seconds of a round; None before the first."""
        return self._line.at(draft_len, self._plain)

    def round_tokens(self, draft_len: int) -> float:
        """E(g): predicted tokens of a round in each row; 1 while nothing is known."""
        k = 1.0 if self._gain.value is None else self._gain.value
        return 1.0 + k * self._independent(draft_len)

    def speed(self, draft_len: int) -> float | None:
        """Predicted tokens per second of a row; 0 is plain decoding. None before the first measurement."""
        seconds = self.round_seconds(draft_len) if draft_len else self._plain
        return None if seconds is None else self.round_tokens(draft_len) / seconds

    def next(self) -> int:
        """Draft length of the next chunk; 0 is plain decoding."""
        if self._fixed is not None:
            return self._fixed
        longest = self._max_draft
        if longest == 0 or self._num_plain == 0:
            return 0
        middle = (longest + 1) // 2
        if self._num_drafted == 0:
            return middle
        if self._num_plain == 1:
            return 0
        best = self._best_draft()
        if self._num_drafted == 1:
            return longest if best >= middle else 1
        other = 2 * best + 1 if 2 * best + 1 <= longest else max(best // 2, 1)
        if not self._pays(best):
            trial = other if self._last_draft == best and self._could_pay(best, other) else best
            return trial if self._may_try(trial) else 0
        if self._unmeasured_seconds < self._gap * self._measured_seconds:
            return best
        return other if self._was_plain_measured and other != best else 0

    def report(self, draft_len: int, seconds: float, rounds: int, tested: int, accepted: int, tokens: int) -> None:
        """Tells what a chunk took.

        Args:
          draft_len: drafts a round; 0 for plain decoding.
          seconds: of the whole chunk, without compilation.
          rounds: rounds, or plain steps.
          tested: drafts compared with the full model, over all rows: those accepted and the first rejected one.
          accepted: of these; the drafts after a rejected one count nowhere.
          tokens: tokens of text made, over all rows.
        """
        if rounds <= 0 or seconds <= 0 or tokens <= 0:
            return
        before = self._choice()
        row_rounds = max(tokens - accepted, 1)  # each gives one token besides the accepted ones
        steps = rounds * tokens / row_rounds  # plain steps for the same text
        keep = 0.5 ** (tokens / MEMORY)
        self._accepted.forget(keep)
        self._gain.forget(keep)
        if draft_len == 0:
            self._report_plain(seconds / rounds)
        else:
            self._report_drafts(draft_len, seconds / rounds, row_rounds, tested, accepted)
        self._steps += steps
        self._last_rounds = rounds
        self._account(draft_len, rounds, steps)
        self._schedule(draft_len, before, seconds, rounds)

    def _report_plain(self, seconds: float) -> None:
        self._num_plain += 1
        if self._plain is None or seconds < FASTEST * self._plain:
            self._plain = seconds
        else:
            weight = max(TIMING_WEIGHT, 1 / self._num_plain)
            self._plain += weight * (min(seconds, SLOWEST * self._plain) - self._plain)

    def _report_drafts(self, draft_len: int, seconds: float, row_rounds: int, tested: int, accepted: int) -> None:
        self._num_drafted += 1
        self._last_draft = draft_len
        expected = self.round_seconds(draft_len)
        if expected is not None and seconds < FASTEST * expected:
            self._line = _Line()
            self._lost = self._pause = 0.0  # the machine's fault
        elif expected is not None:  # the second one is expected from one length only
            seconds = min(seconds, (2.0 if self._num_drafted == 2 else SLOWEST) * expected)
        self._line.add(draft_len, seconds)
        a = self._accepted.value
        if a is not None and abs(accepted - a * tested) > SURPRISE * math.sqrt(tested * a * (1 - a) + 1):
            self._accepted, self._gain = _Mean(), _Mean()
        self._accepted.add(accepted, tested)
        self._gain.add(accepted, row_rounds * self._independent(draft_len))

    def _account(self, draft_len: int, rounds: int, steps: float) -> None:
        """Losses against plain decoding and, where drafting does not pay, the pause before the next trial."""
        pays = self._pays(self._best_draft())
        if draft_len == 0:
            self._paused = 0.0 if pays else self._paused + steps
            return
        self._paused = 0.0
        seconds = self.round_seconds(draft_len)
        if self._plain is None or seconds is None:
            return
        lost = rounds * seconds / self._plain - steps
        self._lost = max(self._lost + lost, 0.0)  # what was gained once does not pay for later trials
        least, most = max(lost, 0.0) / MAX_LOSS, max(lost / MAX_LOSS, steps) * 16
        longer = 2 * self._pause if self._num_drafted > 2 else 0.0
        self._pause = 0.0 if pays else min(max(longer, least, steps), most)

    def _schedule(self, draft_len: int, before: int, seconds: float, rounds: int) -> None:
        """Remembers when a length other than the best was last measured."""
        if before in (0, draft_len):
            self._unmeasured_seconds += seconds
            return
        expected = self.round_seconds(draft_len) if draft_len else self._plain
        self._measured_seconds = rounds * (expected or 0.0)
        self._was_plain_measured = draft_len == 0
        self._unmeasured_seconds = 0.0
        self._gap = min(2 * self._gap, MAX_GAP)

    def _independent(self, draft_len: int) -> float:
        """Accepted drafts of a round, were they independent: a + a^2 + ... + a^g."""
        a = self._accepted.value or 0.0
        return float(draft_len) if a == 1 else a * (1 - a**draft_len) / (1 - a)

    def _best_draft(self) -> int:
        """The shortest of the fastest draft lengths, plain decoding aside."""
        return max(range(1, self._max_draft + 1), key=lambda g: self.speed(g) or 0.0, default=0)

    def _pays(self, draft_len: int) -> bool:
        drafting, plain = self.speed(draft_len), self.speed(0)
        return draft_len > 0 and drafting is not None and plain is not None and drafting > plain

    def _choice(self) -> int:
        """The best draft length where drafting pays, else 0."""
        best = self._best_draft()
        return best if self._pays(best) else 0

    def _could_pay(self, best: int, other: int) -> bool:
        """Whether ``other`` would pay at the cost of the shorter of the two: the line may be too steep."""
        seconds = self.round_seconds(min(best, other))
        if self._plain is None or seconds is None:
            return False
        return self.round_tokens(other) * self._plain > seconds

    def _may_try(self, draft_len: int) -> bool:
        seconds = self.round_seconds(draft_len)
        if self._plain is None or seconds is None:
            return False
        loss = self._last_rounds * max(seconds / self._plain - self.round_tokens(draft_len), 0.0)
        return self._paused >= self._pause and self._lost + loss <= MAX_LOSS * self._steps


class _Mean:
    """Sum of values over sum of weights, forgetting exponentially; it keeps its value however long nothing comes."""

    def __init__(self) -> None:
        self.value: float | None = None
        self._weight = 0.0

    def forget(self, keep: float) -> None:
        self._weight *= keep

    def add(self, total: float, weight: float) -> None:
        if weight > 0:
            self._weight += weight
            old = self.value or 0.0
            self.value = old + (total - weight * old) / self._weight


class _Line:
    """s(g) = v + c g with v, c >= 0, by least squares with exponential forgetting."""

    def __init__(self) -> None:
        self._weight = self._mean_g = self._mean_s = self._var_g = self._cov = 0.0
        self._lengths: set[int] = set()

    def add(self, g: int, seconds: float) -> None:
        keep = self._weight * (1 - TIMING_WEIGHT)
        self._weight = keep + 1
        dg, ds = g - self._mean_g, seconds - self._mean_s
        self._mean_g += dg / self._weight
        self._mean_s += ds / self._weight
        # Moments about the moving means (Welford); only their ratio is used.
        self._var_g = self._var_g * (1 - TIMING_WEIGHT) + dg * dg * keep / self._weight
        self._cov = self._cov * (1 - TIMING_WEIGHT) + dg * ds * keep / self._weight
        self._lengths.add(g)

    def at(self, g: int, plain: float | None) -> float | None:
        """Seconds of a round; ``plain`` stands for s(0) as long as there is only one length."""
        if not self._lengths:
            return None
        if len(self._lengths) > 1:
            slope = self._cov / self._var_g if self._var_g > 0 else 0.0
        else:
            slope = (self._mean_s - (plain or 0.0)) / max(self._mean_g, 1.0)
        slope = min(max(slope, 0.0), self._mean_s / max(self._mean_g, 1.0))
        return self._mean_s + slope * (g - self._mean_g)
