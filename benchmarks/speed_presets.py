"""The cells and settings of benchmarks/speed.py that nobody has to name."""

from typing import Literal

from benchmarks.speed_cells import Cell

Preset = Literal["cpu", "gpu", "first", "quick"]

PRESETS: dict[Preset, tuple[Cell, ...]] = {
    "cpu": (
        Cell("region", "d256", "float32", context=256),
        Cell("forward", "d256", "float32", length=128),
        Cell("cached", "d256", "float32", context=256),
        Cell("parts", "d256", "float32", context=256),
        Cell("forward", "d256", "float32"),
        Cell("cached", "d256", "float32", batch=8, context=256),
        Cell("region", "d256", "float32", length=128),
        Cell("cached", "d32s", "float32", context=512),
        Cell("train", "d256", "float32", batch=4, length=128),
        Cell("cached", "d256", "float32", length=128, context=256),
        Cell("cached", "d256", "float32", batch=32, context=256),
        Cell("parts", "d256", "float32", length=128),
        Cell("forward", "d256", "float32", length=2048),
        Cell("forward", "d256", "float32", batch=8, length=128),
        Cell("cached", "d1024", "float32", context=512),
        Cell("cached", "d2048", "float32", context=512),
    ),
    "gpu": (
        Cell("cached", "d32s", "bfloat16", context=512),
        Cell("region", "d32s", "bfloat16", context=512),
        Cell("cached", "d32s", "bfloat16", context=512, decode_attention="pallas"),
        Cell("region", "d32s", "bfloat16", context=512, decode_attention="pallas"),
        Cell("forward", "d32s", "bfloat16", length=2048),
        Cell("parts", "d32s", "bfloat16", context=512),
        Cell("train", "d32s", "bfloat16", batch=8, length=2048),
        Cell("forward", "d32s", "bfloat16", length=128),
        Cell("parts", "d32s", "bfloat16", length=2048),
        Cell("cached", "d2048", "bfloat16", context=512),
        Cell("cached", "d32s", "bfloat16", batch=8, context=512),
        Cell("cached", "d32s", "bfloat16", batch=8, context=512, decode_attention="pallas"),
        Cell("cached", "d32s", "bfloat16", batch=32, context=512),
        Cell("forward", "d2048", "bfloat16", length=2048),
        Cell("cached", "d1024", "bfloat16", context=512),
        Cell("forward", "d32s", "bfloat16"),
        Cell("forward", "d32s", "bfloat16", batch=8, length=2048),
        Cell("cached", "d32s", "bfloat16", length=128, context=512),
        Cell("cached", "d32s", "float32", context=512),
        Cell("forward", "d32s", "float32", length=2048),
        Cell("cached", "d32s_mhc", "bfloat16", context=512),
        Cell("forward", "d1024", "bfloat16", length=2048),
        Cell("cached", "d32s", "bfloat16", length=2048, context=512),
        Cell("forward", "d32s", "bfloat16", batch=32, length=128),
    ),
    "first": (
        Cell("cached", "d32s", "bfloat16", context=512),
        Cell("product", "d32s", "bfloat16"),
        Cell("region", "d32s", "bfloat16", context=512),
        Cell("region", "d640l4", "bfloat16", context=512),  # 40 MB, which an L2 of 50 MB holds
        Cell("product", "d640l4", "bfloat16"),
        Cell("cached", "d32s", "bfloat16", context=512, decode_attention="pallas"),
        Cell("cached", "d2048", "bfloat16", context=512),
        Cell("train", "d32s", "bfloat16", batch=8, length=2048),
        Cell("forward", "d32s", "bfloat16", length=2048),
        Cell("cached", "d32s", "bfloat16", batch=8, context=512),
        Cell("product", "d2048", "bfloat16"),
        Cell("cached", "d2048", "bfloat16", batch=8, context=512),
        Cell("forward", "d2048", "bfloat16", length=2048),
    ),
    "quick": tuple(
        Cell(kind, "demo", "float32", 1, length, context)
        for kind, length, context in (
            ("region", 1, 64),
            ("cached", 1, 64),
            ("product", 1, 0),
            ("forward", 64, 0),
            ("parts", 1, 64),
            ("train", 64, 0),
        )
    ),
}
"""In the order of importance: what the time budget does not hold is left out from the end."""


def first_settings(num_layers: int) -> tuple[str, ...]:
    """What a first GPU is to say: the paper's largest region at one and two iterations and fused by twos, and all
    layers at once."""
    n = max(3 * num_layers // 4, 2)
    fused = (f"idn:n={n},k=1,stage={n // 2}xF2",) if n % 2 == 0 else ()
    return (f"idn:n={n},k=1", f"idn:n={n},k=2", *fused, f"idn:n={num_layers},k=1")


def default_settings(num_layers: int, has_streams: bool = False) -> tuple[str, ...]:
    """The published rows for 32 layers, the most telling first, their regions scaled to ``num_layers``; layers fused by
    twos and twelves where the regions divide."""
    rows: tuple[tuple[int, int, str, int], ...] = (
        (24, 1, "h0", 1),
        (24, 2, "h0", 1),
        (24, 1, "h0", 2),
        (12, 2, "batch_forward", 1),
        (24, 4, "h0", 1),
        (8, 1, "h0", 1),
        (8, 4, "h0", 1),
        (24, 2, "h0", 2),
        (12, 1, "h0", 12),
    )
    if has_streams:
        rows = ((16, 1, "h0", 1), (16, 4, "h0", 1), (8, 4, "h0", 1))
    settings = []
    for n, k, init, fused in rows:
        size = max(1, round(num_layers * n / 32))
        per_chunk = min(fused, size)
        if size % per_chunk or k > size or (per_chunk > 1 and k > size // per_chunk):
            continue
        setting = f"{'hcn' if has_streams else 'idn'}:n={size},k={k}"
        setting += f",stage={size // per_chunk}xF{per_chunk}" if per_chunk > 1 else ""
        settings.append(setting + (f",init={init}" if init != "h0" else ""))
    return tuple(dict.fromkeys(settings))
