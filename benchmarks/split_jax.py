"""The blocks of `benchmarks.split` in JAX, with the backward split as its users split it.

A process of its own, which `benchmarks.split` starts after its own measurements: JAX and torch would each
load a cuDNN and keep device memory. It imports no torch; numbers and gradients travel in a folder.

    python -m benchmarks.split_jax FOLDER SYSTEM --heads 16 --repeats 20
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Params = dict[str, jax.Array]

SYSTEMS = ("JAX monolithic", "JAX split")

EPSILON = float(jnp.finfo(jnp.float32).eps)
"""What torch's RMSNorm adds in bfloat16 where no `eps` is given: it computes in float32."""


def rms_norm(x: jax.Array, weight: jax.Array) -> jax.Array:
    """As torch's, the weight included: in float32, rounded once.

    Multiplied by the weight after rounding, as is common too, the pullback holds less (1865 MiB instead of
    1993 at L), and the norms' weight gradients are twice as far from float64 as torch's.
    """
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + EPSILON)
    return (wide * scale * weight).astype(x.dtype)


def linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    """torch's layout: the weight is [out, in]."""
    return jnp.einsum("bti,oi->bto", x, weight)


def block(params: Params, prefix: str, x: jax.Array, heads: int) -> jax.Array:
    """One layer; `x` is [batch, tokens, width]."""
    weight = {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}
    batch, tokens, width = x.shape
    qkv = linear(rms_norm(x, weight["attention_norm.weight"]), weight["qkv.weight"])
    q, k, v = jnp.moveaxis(qkv.reshape(batch, tokens, 3, heads, width // heads), 2, 0)
    fused = "cudnn" if jax.default_backend() == "gpu" else None
    attended = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=fused)
    x = x + linear(attended.reshape(batch, tokens, width), weight["project.weight"])
    gate_up = linear(rms_norm(x, weight["mlp_norm.weight"]), weight["gate_up.weight"])
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return x + linear(jax.nn.silu(gate) * up, weight["down.weight"])


def blocks(params: Params, x: jax.Array, heads: int) -> jax.Array:
    layers = 1 + max(int(name.split(".")[0]) for name in params)
    for layer in range(layers):
        x = block(params, f"{layer}.", x, heads)
    return x


def finished(function: Callable[..., Any], *args: Any) -> tuple[Any, float, float]:
    """Run it: return the result, and milliseconds until it was enqueued and until it was finished."""
    start = time.perf_counter()
    result = function(*args)
    enqueued = time.perf_counter()
    jax.block_until_ready(result)
    return result, (enqueued - start) * 1e3, (time.perf_counter() - start) * 1e3


def closure_bytes(closure: Any, params: Params) -> int:
    """Bytes of a closure's arrays, parameters not counted.

    They are told by their shapes, as `jit` returns copies of them, which do take memory.
    """
    kinds = {(array.shape, array.dtype) for array in params.values()}
    arrays = jax.tree.leaves(closure)
    return sum(array.nbytes for array in arrays if (array.shape, array.dtype) not in kinds)


def measure(
    system: str, heads: int, params: Params, x: jax.Array, cotangent: jax.Array, repeats: int
) -> tuple[dict[str, Any], jax.Array, Params]:
    """Run one system: return its figures, named as in `benchmarks.split.Result`, and its gradients."""
    forward = partial(blocks, heads=heads)

    @jax.jit
    def monolithic(params: Params, x: jax.Array, cotangent: jax.Array) -> Any:
        y, pullback = jax.vjp(forward, params, x)
        return y, pullback(cotangent)

    # The closure is a pytree, so that it may leave one jitted function and enter others. Of I and W each
    # runs the whole pullback less what XLA finds unused; the chain of input gradients is in both.
    run_forward = jax.jit(lambda params, x: jax.vjp(forward, params, x))
    run_input = jax.jit(lambda pullback, cotangent: pullback(cotangent)[1])
    run_weight = jax.jit(lambda pullback, cotangent: pullback(cotangent)[0])

    def split(params: Params, x: jax.Array, cotangent: jax.Array) -> Any:
        y, pullback = run_forward(params, x)
        dx = run_input(pullback, cotangent)
        return y, (run_weight(pullback, cotangent), dx)

    whole = monolithic if system == "JAX monolithic" else split
    (_, (grads, dx)), _, first = finished(whole, params, x, cotangent)
    for _ in range(5):
        finished(whole, params, x, cotangent)
    totals, hosts = [], []
    for _ in range(repeats):
        _, host, total = finished(whole, params, x, cotangent)
        totals.append(total)
        hosts.append(host)
    figures = {
        "first_result_s": first / 1e3,
        "totals_ms": totals,
        "host_ms": statistics.median(hosts),
        "forward_ms": None,
        "input_ms": None,
        "weight_ms": None,
        "held_after_forward_mib": None,
        "held_for_weight_mib": None,
    }
    if whole is split:
        phases = []
        for _ in range(repeats):
            (_, pullback), _, forward_ms = finished(run_forward, params, x)
            _, _, input_ms = finished(run_input, pullback, cotangent)
            _, _, weight_ms = finished(run_weight, pullback, cotangent)
            phases.append((forward_ms, input_ms, weight_ms))
        forward_ms, input_ms, weight_ms = (statistics.median(column) for column in zip(*phases, strict=True))
        held = closure_bytes(pullback, params)
        figures |= {
            "forward_ms": forward_ms,
            "input_ms": input_ms,
            "weight_ms": weight_ms,
            "held_after_forward_mib": held / 2**20,
            "held_for_weight_mib": (held + cotangent.nbytes) / 2**20,
        }
    return figures, dx, grads


def main() -> None:
    """Read `numbers.npz`, run one system, write `gradients.npz` and `figures.json` beside it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("--heads", type=int, required=True)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    with np.load(options.folder / "numbers.npz") as file:  # numpy has no bfloat16: its bits, as integers
        numbers = {name: jnp.asarray(bits.view(jnp.bfloat16)) for name, bits in file.items()}
    x, cotangent = numbers.pop("x"), numbers.pop("cotangent")
    other = jnp.ones((24, 40), jnp.bfloat16)
    jax.block_until_ready(jax.jit(jnp.dot)(other, other.T))  # loads the libraries and starts the compiler
    figures, dx, grads = measure(options.system, options.heads, numbers, x, cotangent, options.repeats)
    wide = {name: np.asarray(grad.astype(jnp.float32)) for name, grad in {"x": dx, **grads}.items()}
    np.savez(options.folder / "gradients.npz", **wide)
    figures["jax"] = f"{jax.__version__} on {jax.devices()[0].device_kind}"
    (options.folder / "figures.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
