"""Solver settings as text: what they mean, and the sentence for every mistake."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snlp_jax.errors import InputError
from snlp_jax.notation import CORRECTIONS, INITS, parse_schedule
from snlp_jax.solver import (
    BatchForward,
    Calibrated,
    CalibratedInit,
    Chunkwise,
    Diagonal,
    Exact,
    FusedSplit,
    HyperConnection,
    Identity,
    Jacobi,
    ParallelSegment,
    PrefixState,
    Preheat,
    ScaledIdentity,
    Schedule,
    SequentialSegment,
    SkippedSegment,
    TrustRegion,
    Warm,
)

H0, BATCH = PrefixState(), BatchForward()


MEANINGS = (
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
    ("hcn:n=8", [ParallelSegment(4, 12, 1, HyperConnection(), H0)]),
    (
        "diag:n=4,mode=fd,probes=2,reuse=1,trust=0.5",
        [
            ParallelSegment(
                8, 12, 1, TrustRegion(0.0, Diagonal(num_probes=2, mode="finite_difference", reuse=True), 0.5), H0
            )
        ],
    ),
    # Damping comes after the trust region.
    ("sid:n=8,damp=0.1,trust=2", [ParallelSegment(4, 12, 1, TrustRegion(0.1, ScaledIdentity(), 2.0), H0)]),
    ("idn:n=8,tol=0.1", [ParallelSegment(4, 12, 8, Identity(), H0, tolerance=0.1)]),
    ("idn:n=8,tol=0.1,stage=4xF2", [ParallelSegment(4, 12, 4, Identity(), H0, Chunkwise(4), tolerance=0.1)]),
    ("idn:n=8,k=3,tol=0.1", [ParallelSegment(4, 12, 3, Identity(), H0, tolerance=0.1)]),
    ("cal:n=8,init=cal,fit=a", [ParallelSegment(4, 12, 1, Calibrated(), CalibratedInit(), fit="a")]),
    ("sid:n=8,init=preheat,fit=a", [ParallelSegment(4, 12, 1, ScaledIdentity(), Preheat(), fit="a")]),
    ("idn:n=8,init=warm", [ParallelSegment(4, 12, 1, Identity(), Warm())]),
    (
        "idn:n=6,stage=3xF2,scales=own,branches=mean,mid=input",
        [ParallelSegment(6, 12, 1, Identity(), H0, Chunkwise(3, "own", "mean", "input"))],
    ),
    ("idn:n=6,stage=split", [ParallelSegment(6, 12, 1, Identity(), H0, FusedSplit())]),
    ("3xF4 n12 K1", [ParallelSegment(0, 12, 1, Identity(), H0, Chunkwise(3))]),
    ("IDN n8 K4", [ParallelSegment(4, 12, 4, Identity(), H0)]),
    ("HCN 2xF4 n8 K2", [ParallelSegment(4, 12, 2, HyperConnection(), H0, Chunkwise(2))]),
    ("n6 K2 batch_forward", [ParallelSegment(6, 12, 2, Identity(), BATCH)]),
    ("skip:4-11", [SkippedSegment(4, 11)]),
    ("skip:n=3", [SkippedSegment(8, 11)]),  # the last layer stays
    ("exit:6", [SkippedSegment(6, 12)]),
    ("pairs:n=4", [ParallelSegment(i, i + 2, 1, Identity(), H0) for i in (8, 10)]),
    ("pairs:0-3+idn:n=2", [ParallelSegment(i, i + 2, 1, Identity(), H0) for i in (0, 10)]),
    (
        " sid : 8-10 , k=3 + idn:2-4 ".replace(" :", ":"),
        [ParallelSegment(8, 10, 3, ScaledIdentity(), H0), ParallelSegment(2, 4, 1, Identity(), H0)],
    ),
)


def test_meaning():
    for text, regions in MEANINGS:
        assert parse_schedule(text, 12) == Schedule.of(12, *regions), text


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
            draw(st.sampled_from(sorted(set(CORRECTIONS.values()) - {Calibrated}, key=str)))(
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


MISTAKES = {
    "unknown correction ''; choose one of jac, idn,": ("",),
    "unknown correction 'newton'": ("newton:n=4",),
    "unknown correction 'seq'": ("seq+idn:n=4",),
    "unknown correction 'IDN'": ("IDN:n=4",),
    "give either n= (the last n layers) or a span": ("idn", "idn:k=2", "idn:n=4,2-6"),
    "cannot read 'depth=2'; write n=, k=,": ("idn:n=4,depth=2",),
    "cannot read 'k'": ("idn:n=4,k",),
    "cannot read 'n='": ("idn:n=",),
    "cannot read '4-'": ("idn:4-",),
    "n=four is not a whole number": ("idn:n=four",),
    "k=two is not a whole number": ("idn:n=4,k=two",),
    "damp=much is not a number": ("idn:n=4,damp=much",),
    "damping 1.5": ("idn:n=4,damp=1.5", "idn:n=4,damp=1.5,trust=1"),
    "damping nan": ("idn:n=4,damp=nan",),
    "unknown init 'cold'; choose one of h0,": ("idn:n=4,init=cold",),
    "trust= means nothing to hcn": ("hcn:n=4,trust=1",),
    "probes= means nothing to idn": ("idn:n=4,probes=2", "idn:n=4,probes=2,trust=1"),
    "trust -1.0": ("idn:n=4,trust=-1",),
    "unknown mode 'hvp'; choose one of jvp,": ("diag:n=4,mode=hvp",),
    "probes=0": ("diag:n=4,probes=0",),
    "tol=2.0": ("idn:n=4,tol=2",),
    "cal with init=h0 needs fit=": ("cal:n=4",),
    "idn with init=h0 has no use for fit=": ("idn:n=4,fit=a",),
    "idn with init=cal needs fit=": ("idn:n=4,init=cal",),
    "stage=3xF2 has 6 layers, but the region 4": ("idn:n=4,stage=3xF2", "3xF2 n4 K1"),
    "stage=fused": ("idn:n=4,stage=fused",),
    "mid= belong to fused chunks": ("idn:n=4,mid=input",),
    "scales=both": ("idn:n=4,stage=2xF2,scales=both",),
    "k=2: one fused chunk": ("1xF4 n4 K2",),
    "a split stage": ("idn:n=4,k=2,stage=split",),
    "init=warm": ("idn:n=4,stage=2xF2,init=warm",),
    "exit:x is not a whole number": ("exit:x",),
    "region 12-12 is empty": ("exit:12", "idn:n=0"),
    "cannot read 'k=2'; write n= or a span": ("skip:k=2",),
    "k=0": ("idn:n=4,k=0",),
    "n=13 is outside the model": ("idn:n=13",),
    "region 8-13 is empty or outside": ("idn:8-13",),
    "region 5-5 is empty": ("idn:5-5",),
    "region 6-9 overlaps": ("idn:4-8+sid:6-9",),
    "region 10-12 overlaps": ("idn:n=4+sid:n=2",),
    "'8' and '4' are both given for n": ("idn:n=8,n=4",),
    "'1' and '2' are both given for k": ("idn:n=8,k=1,k=2",),
    "'2-4' and '6-8' are both given for span": ("idn:2-4,6-8",),
}


def test_sentence_for_a_mistake():
    """It quotes the whole setting, then says what is wrong with it."""
    for sentence, texts in MISTAKES.items():
        for text in texts:
            with pytest.raises(InputError, match="^" + re.escape(f"solver setting {text!r}: {sentence}")):
                parse_schedule(text, 12)
