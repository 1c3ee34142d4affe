"""Rates at which this machine multiplies matrices and decodes images."""

import time
from collections.abc import Iterator

import torch

from mimref.benchmarks.measure import MatrixProducts, median_seconds
from mimref.benchmarks.photograph import HEIGHT, WIDTH, photograph
from mimref.data.decode import decode_content
from mimref.devices import multiplies_bf16, own_cores, resolve_device
from mimref.doctor.checks import Check

CPU_FLOPS = 5e9
"""Least FLOP per second and thread in float32: a twelfth of what a core with AVX2 at 2 GHz can do."""
CUDA_FLOPS = 1e12
"""Least FLOP per second in float32; any GPU with units for bfloat16 reaches several times this."""
ERRORS = {torch.float32: 1e-2, torch.bfloat16: 5e-2}
"""Largest relative error of a product of random matrices; a larger one is the device's fault. TF32: about 1e-3."""
DECODED_PER_SECOND = 50.0
"""Least rate of one process for JPEGs of 500 x 375 pixels: a tenth of what one slow core decodes and crops
(docs/results.md, Speed of the views)."""
_IMAGES = 16


def rate_checks() -> Iterator[Check]:
    """Check matrix products in float32 and bfloat16, and a loader process's decoding."""
    device = best_device()
    single, half = product_rate(device, torch.float32), product_rate(device, torch.bfloat16)
    yield _matmul(device, single, product_error(device, torch.float32))
    yield _bf16(device, single, half, product_error(device, torch.bfloat16))
    yield _decoding(decode_rate())


def best_device() -> torch.device:
    """Return the device that runs use without `--device`."""
    return resolve_device("auto")


def product_rate(device: torch.device, precision: torch.dtype) -> float:
    """Measure the FLOP per second of a large matrix product."""
    products = MatrixProducts(device, precision)
    return products.flops / median_seconds([products], device, turns=1, warm_up=0)[0]


def product_error(device: torch.device, precision: torch.dtype) -> float:
    """Return the relative error of a product on the device, compared with float64 on the CPU."""
    left, right = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0)).to(precision).unbind()
    exact = left.double() @ right.double()
    found = (left.to(device) @ right.to(device)).cpu().double()
    return float((found - exact).norm() / exact.norm())


def bf16_supported(device: torch.device) -> bool:
    """Return whether the device computes in bfloat16 natively."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def decode_rate() -> float:
    """Measure the images per second that one process decodes at full size, as a loader process does."""
    content = photograph()
    decode_content(content, "photograph")
    started = time.perf_counter()
    for _ in range(_IMAGES):
        decode_content(content, "photograph")
    return _IMAGES / (time.perf_counter() - started)


def _matmul(device: torch.device, rate: float, error: float) -> Check:
    value = f"{rate / 1e9:,.0f} GFLOP/s in float32"
    if not error < ERRORS[torch.float32]:
        return Check("matrix product", f"{value}, wrong by {error:.0e}", "problem",
                     f"{device.type} computes wrong results; try another machine or driver")  # fmt: skip
    on_cpu = device.type == "cpu"
    least = CPU_FLOPS * torch.get_num_threads() if on_cpu else CUDA_FLOPS if device.type == "cuda" else 0.0
    if rate < least:
        todo = "slower than it should be: other processes use it, or its power is limited"
        if on_cpu:
            todo += f"; torch uses {torch.backends.cpu.get_cpu_capability()} instructions"
        return Check("matrix product", value, "advice", todo)
    return Check("matrix product", value)


def _bf16(device: torch.device, single: float, half: float, error: float) -> Check:
    value = f"{half / 1e9:,.0f} GFLOP/s, {half / single:.1f} x float32"
    if not error < ERRORS[torch.bfloat16]:
        return Check("bfloat16", f"{value}, wrong by {error:.0e}", "problem", "use --precision fp32")
    if not bf16_supported(device):
        return Check("bfloat16", f"not supported, {value}", "advice", "runs use fp32, in about twice the memory")
    if half > single:
        if device.type == "cuda":
            return Check("bfloat16", value)
        recipes = "recipes of refine and finetune use it, and " if multiplies_bf16(device) else ""
        return Check("bfloat16", value, todo=f"{recipes}--precision bf16; the default is fp32 here")
    if device.type == "cuda":
        return Check("bfloat16", value, "advice", "slower than float32: use --precision fp32")
    return Check("bfloat16", value, todo="slower than float32: keep fp32, the default here")


def _decoding(rate: float) -> Check:
    value = f"{rate:,.0f} images/s of {WIDTH} x {HEIGHT} per process, {rate * own_cores():,.0f} with all cores"
    if rate < DECODED_PER_SECOND:
        return Check("JPEG decoding", value, "advice", "slow: the cores are busy or throttled, and images will be late")
    return Check("JPEG decoding", value)
