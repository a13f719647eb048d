"""Draft lengths against simulated machines whose acceptance and costs are known."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from snlp_jax.errors import InputError
from snlp_jax.infer.pace import Pace

MAX_DRAFT = 8


@dataclasses.dataclass
class Machine:
    """Independent drafts of acceptance a; a round of g drafts costs v + c g, a plain step p, times noise."""

    a: float
    v: float
    c: float
    p: float = 1.0
    noise: float = 0.05
    outliers: float = 0.0
    rows: int = 1
    chunk: int = 16
    seed: int = 0
    slow: Callable[[int, int], float] = lambda i, g: 1.0

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.seconds = self.steps = 0.0
        self.drafts: list[int] = []
        self.ratios: list[float] = []

    def rate(self, g: int) -> float:
        """Expected tokens per second of a row."""
        return sum(self.a**i for i in range(g + 1)) / (self.v + self.c * g) if g else 1 / self.p

    @property
    def best(self) -> float:
        return max(self.rate(g) for g in range(MAX_DRAFT + 1))

    def run(self, pace: Pace, num_chunks: int) -> None:
        """Outliers are 10 x; they count in the measurement, but not in the sums that strategies are compared by."""
        for i in range(num_chunks):
            g = pace.next()
            accepted = np.minimum(self.rng.geometric(1 - self.a, (self.chunk, self.rows)) - 1, g)
            tested = np.minimum(accepted + 1, g)
            tokens = accepted.size + accepted.sum()
            seconds = self.chunk * (self.v + self.c * g if g else self.p)
            self.seconds += seconds
            self.steps += tokens / self.rows
            self.drafts.append(g)
            self.ratios.append(self.seconds / (self.steps * self.p))
            spread = np.exp(self.noise * self.rng.standard_normal())
            outlier = 10.0 if self.rng.random() < self.outliers else 1.0
            measured = seconds * spread * outlier * self.slow(i, g)
            pace.report(g, float(measured), self.chunk, int(tested.sum()), int(accepted.sum()), int(tokens))


def first_drafting(i: int, g: int) -> float:
    return 10.0 if i == 1 else 1.0


def first_plain(i: int, g: int) -> float:
    return 10.0 if i == 0 else 1.0


WINS = {
    "cheap": Machine(0.8, 1.2, 0.1),
    "dear": Machine(0.8, 1.2, 0.4),
    "sure": Machine(0.97, 1.5, 0.2),
    "doubtful": Machine(0.5, 1.0, 0.15),
    "far from plain": Machine(0.85, 2.0, 0.05),
    "batch": Machine(0.7, 1.1, 0.2, rows=8),
    "fast": Machine(0.8, 1.2e-3, 1e-4, p=1e-3),
    "small chunks": Machine(0.8, 1.2, 0.1, chunk=4),
}
DISTURBANCES = {
    "noise": {},
    "outliers": {"outliers": 0.05},
    "slow first drafting": {"slow": first_drafting},
    "slow first plain": {"slow": first_plain},
}
import sys
if __name__ == "__main__":
    for name, m in WINS.items():
        for dn, d in DISTURBANCES.items():
            res = []
            for seed in range(12):
                mm = dataclasses.replace(m, seed=seed, **d); pace = Pace(MAX_DRAFT); mm.run(pace, 300)
                rates = [mm.rate(g)/mm.best for g in mm.drafts]
                res.append((np.mean([r for r in rates[100:]]), np.median(rates[100:]), np.mean(rates[8:40]), mm.steps/mm.seconds/mm.best, np.bincount(mm.drafts[100:]).argmax()))
            r = np.array(res)
            print(f"{name:15s} {dn:20s} best={np.argmax([m.rate(g) for g in range(9)])} speedup={m.best*m.p:.2f} mean {r[:,0].mean():.3f} min {r[:,0].min():.3f} med-min {r[:,1].min():.3f} early {r[:,2].mean():.3f} total {r[:,3].mean():.3f} {r[:,3].min():.3f} modes {sorted(set(r[:,4].astype(int)))}")
    for name, m in {"a=0 c=p": Machine(0.0,1,1), "a=0": Machine(0.0,1.2,.1), "a=.5 c=p": Machine(.5,1,1), "a=.8 c=p": Machine(.8,1,1), "near": Machine(.3,1.2,.1), "tie": Machine(.5,1.3,.2),"big": Machine(0,3,2), "a=0 chunk64":Machine(0.,1,1,chunk=64)}.items():
        for dn, d in DISTURBANCES.items():
            res = []
            for seed in range(12):
                mm = dataclasses.replace(m, seed=seed, **d); pace = Pace(MAX_DRAFT); mm.run(pace, 1000)
                res.append((mm.ratios[-1], mm.ratios[200], mm.ratios[499], max(mm.ratios[200:]), sum(g>0 for g in mm.drafts)))
            r = np.array(res)
            print(f"{name:12s} {dn:20s} best {m.best*m.p:.2f} final {r[:,0].mean():.3f} {r[:,0].max():.3f} @200 {r[:,1].max():.3f} @500 {r[:,2].max():.3f} max>200 {r[:,3].max():.3f} drafts {r[:,4].mean():.1f}")
    for dn, d in DISTURBANCES.items():
      for off in (50,200, 1000):
        res=[]
        for seed in range(12):
            mm = Machine(0.0,1.2,.1,seed=seed,**d); pace = Pace(MAX_DRAFT); mm.run(pace, off); mm.slow=lambda i,g:1.; n0=len(mm.drafts); mm.a=.8; mm.run(pace, 2*off+600)
            k=[i for i in range(n0,len(mm.drafts)-10) if all(g>0 for g in mm.drafts[i:i+10])]
            res.append(k[0]-n0 if k else 10**6)
        print("return", dn, off, np.median(res), max(res))
    for dn in ("a drop",):
        res=[]
        for seed in range(12):
            mm = Machine(0.8,1.2,.1,seed=seed); pace = Pace(MAX_DRAFT); mm.run(pace, 200); mm.a=0.; n0=len(mm.drafts); mm.run(pace, 300)
            res.append(sum(g>0 for g in mm.drafts[n0:]))
        print(dn, res)
    est=[]
    for seed in range(200):
        mm = Machine(0.6,1,.1,seed=seed); pace=Pace(8,fixed=4); mm.run(pace,40); est.append(pace.acceptance)
    print(np.mean(est), np.std(est)/200**.5, np.std(est))
