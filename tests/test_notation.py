"""Solver settings as text: what they mean, and the sentence for every mistake."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snlp_jax.errors import InputError
from snlp_jax.notation import CORRECTIONS, INITS, parse_schedule
from snlp_jax.solver import (
    BatchForward,
    Exact,
    Identity,
    Jacobi,
    ParallelSegment,
    PrefixState,
    ScaledIdentity,
    Schedule,
    SequentialSegment,
)

H0, BATCH = PrefixState(), BatchForward()


@pytest.mark.parametrize(
    "text, regions",
    (
        ("seq", []),
        ("  seq ", []),
        ("idn:n=8", [ParallelSegment(4, 12, 1, Identity(), H0)]),
        ("idn:n=8,k=2", [ParallelSegment(4, 12, 2, Identity(), H0)]),
        ("idn:k=2,n=8", [ParallelSegment(4, 12, 2, Identity(), H0)]),
        ("jac:n=12,init=h0", [ParallelSegment(0, 12, 1, Jacobi(), H0)]),
        ("sid:n=8,k=1,init=batch_forward,damp=0.1", [ParallelSegment(4, 12, 1, ScaledIdentity(damping=0.1), BATCH)]),
        ("exact:0-3,damp=1", [ParallelSegment(0, 3, 1, Exact(damping=1.0), H0)]),
        (
            "idn:4-8,k=1+sid:8-12,k=2",
            [ParallelSegment(4, 8, 1, Identity(), H0), ParallelSegment(8, 12, 2, ScaledIdentity(), H0)],
        ),
        (
            " sid : 8-10 , k=3 + idn:2-4 ".replace(" :", ":"),
            [ParallelSegment(8, 10, 3, ScaledIdentity(), H0), ParallelSegment(2, 4, 1, Identity(), H0)],
        ),
    ),
)
def test_meaning(text, regions):
    assert parse_schedule(text, 12) == Schedule.of(12, *regions)


@st.composite
def schedules(draw):
    """Regions that do not overlap, anywhere in a model of up to 40 layers."""
    num_layers = draw(st.integers(1, 40))
    cuts = sorted(draw(st.lists(st.integers(0, num_layers), unique=True, min_size=2, max_size=8)))
    spans = [span for span in zip(cuts, cuts[1:], strict=False) if draw(st.booleans())]
    regions = [
        ParallelSegment(
            start,
            stop,
            draw(st.integers(1, 99)),
            draw(st.sampled_from(sorted(CORRECTIONS.values(), key=str)))(
                damping=draw(st.floats(0, 1, allow_subnormal=False))
            ),
            draw(st.sampled_from((H0, BATCH))),
        )
        for start, stop in spans
    ]
    return Schedule.of(num_layers, *draw(st.permutations(regions)))


def name_in(table, cls):
    return next(name for name, candidate in table.items() if candidate is cls)


def write(segment, num_layers, use_n):
    span = f"n={segment.stop - segment.start}" if use_n else f"{segment.start}-{segment.stop}"
    fields = [span, f"k={segment.num_iters}", f"init={name_in(INITS, type(segment.init))}"]
    fields.append(f"damp={segment.correction.damping!r}")
    return f"{name_in(CORRECTIONS, type(segment.correction))}:{','.join(fields)}"


@given(schedules(), st.booleans())
def test_every_schedule_can_be_written_and_read(schedule, use_n):
    regions = [segment for segment in schedule.segments if not isinstance(segment, SequentialSegment)]
    texts = [write(region, schedule.num_layers, use_n and region.stop == schedule.num_layers) for region in regions]
    assert parse_schedule("+".join(reversed(texts)) or "seq", schedule.num_layers) == schedule


READABLE = "write n=, k=, init=, damp= or a span such as 4-8."


@pytest.mark.parametrize(
    "text, sentence",
    (
        ("", "unknown correction ''; choose one of jac, idn, sid, exact."),
        ("newton:n=4", "unknown correction 'newton'; choose one of jac, idn, sid, exact."),
        ("seq+idn:n=4", "unknown correction 'seq'; choose one of jac, idn, sid, exact."),
        ("IDN:n=4", "unknown correction 'IDN'"),
        ("idn", "give either n= (the last n layers) or a span such as 4-8."),
        ("idn:k=2", "give either n= (the last n layers) or a span such as 4-8."),
        ("idn:n=4,2-6", "give either n= (the last n layers) or a span such as 4-8."),
        ("idn:n=4,depth=2", f"cannot read 'depth=2'; {READABLE}"),
        ("idn:n=4,k", f"cannot read 'k'; {READABLE}"),
        ("idn:n=", f"cannot read 'n='; {READABLE}"),
        ("idn:4-", f"cannot read '4-'; {READABLE}"),
        ("idn:n=four", "n=four is not a whole number."),
        ("idn:n=4,k=two", "k=two is not a whole number."),
        ("idn:n=4,damp=much", "damp=much is not a number."),
        ("idn:n=4,damp=1.5", "damping 1.5 lies outside 0 to 1."),
        ("idn:n=4,damp=nan", "damping nan lies outside 0 to 1."),
        ("idn:n=4,init=warm", "unknown init 'warm'; choose one of h0, batch_forward."),
        ("idn:n=4,k=0", "k=0: a parallel region needs at least one iteration."),
        ("idn:n=13", "n=13 is outside the model, which has 12 layers."),
        ("idn:n=0", "region 12-12 is empty or outside the model"),
        ("idn:8-13", "region 8-13 is empty or outside the model"),
        ("idn:5-5", "region 5-5 is empty"),
        ("idn:4-8+sid:6-9", "region 6-9 overlaps the region before it, which ends at layer 8."),
        ("idn:n=4+sid:n=2", "region 10-12 overlaps the region before it, which ends at layer 12."),
    ),
)
def test_sentence_for_a_mistake(text, sentence):
    """It quotes the whole setting, then says what is wrong with it."""
    with pytest.raises(InputError, match="^" + re.escape(f"solver setting {text!r}: {sentence}")):
        parse_schedule(text, 12)


@pytest.mark.parametrize("text", ("idn:n=8,n=4", "idn:n=8,k=1,k=2", "idn:2-4,6-8"))
def test_a_field_may_not_be_given_twice(text):
    with pytest.raises(InputError):
        parse_schedule(text, 12)
