"""What the benchmarks of speed share: made-up models, the machine's limits, the work of a pass, and report files."""

import dataclasses
import os
import platform
import re
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from snlp_jax.config import ModelConfig
from snlp_jax.io.provenance import git_commit
from snlp_jax.model import LanguageModel
from snlp_jax.solver import Schedule

ROOT = Path(__file__).resolve().parents[1]
Dtype = Literal["float32", "bfloat16"]
Shape = Literal["demo", "d256", "d32s", "d640l4", "d32s_mhc", "d1024", "d2048"]


def _d32(embed_dim: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=32_768,
        num_layers=32,
        embed_dim=embed_dim,
        num_heads=embed_dim // 128,
        num_kv_heads=embed_dim // 128,
        seq_len=2048,
        window_pattern="SSSL",
    )


SHAPES: dict[str, ModelConfig] = {
    "demo": ModelConfig(),
    "d256": dataclasses.replace(_d32(256), num_heads=4, num_kv_heads=4),
    "d32s": _d32(640),
    "d640l4": dataclasses.replace(_d32(640), num_layers=4),
    "d32s_mhc": dataclasses.replace(_d32(640), num_streams=4, use_x0_resid=False),
    "d1024": _d32(1024),
    "d2048": _d32(2048),
}


@dataclass(frozen=True)
class ShapeArgs:
    """Which model: shared by the benchmarks that make one up."""

    shape: Literal["auto"] | Shape = "auto"
    """auto: demo on a CPU, d32s elsewhere. The six flags below replace single fields of it."""
    num_layers: int | None = None
    embed_dim: int | None = None
    num_heads: int | None = None
    vocab_size: int | None = None
    seq_len: int | None = None
    window_pattern: str | None = None


def random_params(model: LanguageModel) -> Any:
    """Fresh parameters in the compute dtype whose output projections are not zero."""

    def init(key: jax.Array) -> Any:
        params = model.init(key)
        for index, (part, name) in enumerate((("attn", "out"), ("mlp", "down"))):
            shape = params["blocks"][part][name].shape
            noise = jax.random.normal(jax.random.fold_in(key, index), shape)
            params["blocks"][part][name] = 0.5 * shape[-2] ** -0.5 * noise
        return model.cast(params)

    return jax.jit(init)(jax.random.key(0))


def work(config: ModelConfig, schedule: Schedule, batch: int, length: int, dtype: Any = "float32") -> tuple[int, int]:
    """Bytes of weights in ``dtype`` that a forward must read, and its FLOPs.

    A layer's weights are read once an evaluation; activations are left out. Attention counts the visible pairs of
    query and key, twice two FLOPs a channel each; norms and other elementwise work are left out.
    """
    D, kv_dim, V = config.embed_dim, config.num_kv_heads * config.head_dim, config.padded_vocab_size
    itemsize, num_tokens = jnp.dtype(dtype).itemsize, batch * length
    layer_weights = 2 * D * D + 2 * D * kv_dim + 2 * config.mlp_ratio * D * D
    gathered = num_tokens * (D + len(config.value_embed_layers) * kv_dim)
    num_bytes = itemsize * (schedule.num_block_evals * layer_weights + D * V + gathered)
    flops = 2 * num_tokens * (schedule.num_block_evals * layer_weights + D * V)
    for segment in schedule.segments:
        evals = segment.num_block_evals // segment.num_layers
        for window in config.windows[segment.start : segment.stop]:
            pairs = int(np.minimum(np.arange(length), window).sum()) + length
            flops += 4 * evals * batch * D * pairs
    return num_bytes, flops


def made_up(args: ShapeArgs) -> ModelConfig:
    """The model that the flags describe."""
    name = ("demo" if jax.default_backend() == "cpu" else "d32s") if args.shape == "auto" else args.shape
    names = ("num_layers", "embed_dim", "num_heads", "vocab_size", "seq_len", "window_pattern")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if "num_heads" in given:
        given["num_kv_heads"] = given["num_heads"]
    return dataclasses.replace(SHAPES[name], **given)


def memory_left() -> int:
    """Bytes that the device, or on a CPU the host, still has; 0 where it does not say."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def header(config: ModelConfig, args: dict[str, Any]) -> dict[str, Any]:
    """What every report opens with, and its empty lists."""
    device = jax.devices()[0]
    machine = {"backend": device.platform, "machine": platform.machine(), "num_cores": os.cpu_count()}
    return {
        "date": date.today().isoformat(),
        "commit": git_commit(),
        "device": {"kind": device.device_kind} | machine,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("jax", "jaxlib", "flax")},
        "model": dataclasses.asdict(config),
        "args": args,
        "load_average": {"start": os.getloadavg()[0]},
        "limits": {},
    } | {name: [] for name in ("cells", "skipped", "failed")}


def out_path(given: str, benchmark: str, report: dict[str, Any]) -> Path:
    """``given``, or benchmarks/results/BENCHMARK_DEVICE_DATE.json; its folder exists then."""
    name = re.sub(r"[^a-z0-9]+", "-", report["device"]["kind"].lower()).strip("-")
    out = Path(given or ROOT / f"benchmarks/results/{benchmark}_{name}_{report['date']}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    return out
