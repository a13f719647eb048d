"""Data-sheet figures of accelerators, and slices of them."""

import math
import re
from dataclasses import dataclass

from snlp_jax.errors import InputError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One accelerator. Bandwidths are bytes per second."""

    name: str
    kinds: tuple[str, ...]
    """How ``jax.Device.device_kind`` begins."""
    bf16_flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    """One way, of one link of a torus, or of all links to a switch."""
    torus_axes: int
    """0: a switch."""
    ring_length: int
    """An axis whose length is a multiple has its ends joined; of a switch, the most chips behind it."""
    source: str

    @property
    def backend(self) -> str:
        return "tpu" if self.torus_axes else "gpu"


_CHIPS = (
    Chip("v4", ("TPU v4",), 275e12, 32 * GIB, 1200e9, 50e9, 3, 4, "Cloud TPU documentation; Jouppi et al., 2023"),
    # 400 GB/s both ways over 4 ports.
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * GIB, 819e9, 50e9, 2, 16, "Cloud TPU documentation"),
    # 1200 GB/s both ways over 6 ports.
    Chip("v5p", ("TPU v5p", "TPU v5"), 459e12, 95 * GIB, 2765e9, 100e9, 3, 4, "Cloud TPU documentation"),
    # 800 GB/s both ways over 4 ports.
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32 * GIB, 1638e9, 100e9, 2, 16, "Cloud TPU documentation"),
    Chip("a100", ("NVIDIA A100",), 312e12, 80e9, 2039e9, 300e9, 0, 8, "NVIDIA A100 80GB data sheet"),
    Chip("h100", ("NVIDIA H100",), 989e12, 80e9, 3350e9, 450e9, 0, 8, "NVIDIA H100 SXM data sheet"),
    Chip("h200", ("NVIDIA H200",), 989e12, 141e9, 4800e9, 450e9, 0, 8, "NVIDIA H200 data sheet"),
)
CHIPS = {chip.name: chip for chip in _CHIPS}


def chip_of(device_kind: str) -> Chip | None:
    """The chip whose devices call themselves so, None where it is not known."""
    found = [(len(kind), chip) for chip in CHIPS.values() for kind in chip.kinds if device_kind.startswith(kind)]
    return max(found, key=lambda pair: pair[0])[1] if found else None


@dataclass(frozen=True)
class Slice:
    """Chips that are wired together: ``v5e:4x4``, ``v5p:2x2x4``, ``h100:8``."""

    chip: Chip
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> "Slice":
        """Raises InputError where there is no such slice."""
        name, _, sizes = text.strip().partition(":")
        if name not in CHIPS:
            raise InputError(f"topology {text!r}: unknown chip {name!r}; choose one of {', '.join(CHIPS)}.")
        chip = CHIPS[name]
        num_axes = max(chip.torus_axes, 1)
        example = f"{name}:{['8', '2x4', '2x4x4'][num_axes - 1]}"
        if not re.fullmatch("x".join([r"[1-9]\d*"] * num_axes), sizes):
            raise InputError(f"topology {text!r}: {sizes!r} is no shape, {name} has {num_axes} axes; write {example}.")
        shape = tuple(map(int, sizes.split("x")))
        if not chip.torus_axes and shape[0] > chip.ring_length:
            raise InputError(f"topology {text!r}: a switch joins {chip.ring_length} {name}; give at most as many.")
        return cls(chip, shape)

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
