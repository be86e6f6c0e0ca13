"""What a block takes with stock operators, by estimate: none of these figures was measured by us.

DeiT-Ti, -S and -B distilled at 224 pixels (198 tokens), batch 256, bfloat16.

- Products: the rates below, which NVIDIA's nvMatmulHeuristics computes for the vendor's GEMMs of these shapes; no
  product is faster than its bytes, nor than 90 % of the GPU's peak. The RTX 4090's are the RTX 5090's, scaled by their
  peaks, and by a share that makes the 5090's agree with timm's published images a second.
- LayerNorm, residuals and GELU: launches at 85 % of the memory's bandwidth, as `torch.compile` fuses them (forward 32 D
  bytes a token, backward 66 D) or as eager PyTorch runs them (39 D, 100 D).
- Attention: flash attention at useful rates; the H100's from the FlashAttention-3 paper's tables at 512 tokens, less
  what padding 198 tokens to 256 costs; the others' assumed.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from evidence.clocks.gpus import A100, H200, RTX_4090, RTX_5090, Gpu

BATCH, TOKENS = 256, 198
ROWS = BATCH * TOKENS
_OF_BANDWIDTH = 0.85
_OF_BANDWIDTH_BY_PRODUCTS = 0.88
_OF_PEAK = 0.9
# Weights' gradients run at this share of FC2's rate, whose long sums they share.
_WEIGHT_GRADIENT = 0.9
_LIKE_TIMM = 0.78


@dataclass(frozen=True)
class Rates:
    """TFLOP/s. products: of QKV, projection, FC1 and FC2 by width. attention: forward and backward."""

    products: Mapping[int, tuple[float, float, float, float]]
    attention: tuple[float, float]
    share: float = 1.0


_OF_RTX_5090 = {192: (87, 45, 83, 117), 384: (123, 115, 116, 172), 768: (143, 143, 152, 177)}
_RATES = {
    H200.name: Rates({192: (156, 122, 180, 257), 384: (364, 288, 382, 546), 768: (572, 538, 577, 858)}, (165, 125)),
    A100.name: Rates({192: (101, 79, 86, 154), 384: (164, 145, 170, 230), 768: (222, 216, 222, 281)}, (90, 75)),
    RTX_5090.name: Rates(_OF_RTX_5090, (120, 100), 1 / _LIKE_TIMM),
    RTX_4090.name: Rates(_OF_RTX_5090, (72, 60), RTX_4090.device.bf16 / RTX_5090.device.bf16 / _LIKE_TIMM),
}
_QKV, _PROJECTION, _FC1, _FC2 = range(4)
# Bytes a token in units of D, and µs of the launches around them: (forward, backward).
_POINTWISE = {"compiled": ((32, 66), (3, 8)), "eager": ((39, 100), (6, 8))}


def known(gpu: Gpu, width: int) -> bool:
    return gpu.name in _RATES and width in _RATES[gpu.name].products


def estimate(gpu: Gpu, width: int, kind: str = "compiled") -> dict[str, float]:
    """µs of a block's steps `inference`, `forward` (in training) and `backward`; kind: compiled, eager."""
    d = width
    layers = {_QKV: (3 * d, d), _PROJECTION: (d, d), _FC1: (4 * d, d), _FC2: (d, 4 * d)}
    bytes_a_token, launches = _POINTWISE[kind]
    forward = sum(_product(gpu, d, layer, *shape) for layer, shape in layers.items())
    forward += _attention(gpu, d, backward=False) + _pointwise(gpu, d, bytes_a_token[0]) + launches[0]
    # Of the inputs: QKV's and FC1's are products with a long sum, and the other way round.
    backward = _product(gpu, d, _FC2, d, 3 * d) + _product(gpu, d, _PROJECTION, d, d)
    backward += _product(gpu, d, _FC2, d, 4 * d) + _product(gpu, d, _FC1, 4 * d, d)
    backward += sum(_product(gpu, d, _FC2, *shape, _WEIGHT_GRADIENT) for shape in layers.values())
    backward += _attention(gpu, d, backward=True) + _pointwise(gpu, d, bytes_a_token[1]) + launches[1]
    return {"inference": forward, "forward": forward, "backward": backward}


def by_vendor(gpu: Gpu, product: str, columns: int, depth: int, itemsize: int) -> float | None:
    """µs of a product that our block leaves to the vendor's GEMM, as `settings.vendor` is asked; None where no rate is.

    By the rate of the layer whose sum is as long. Of a weight's gradient, columns and depth are outputs and inputs.
    """
    width = min(columns, depth)
    if itemsize != 2 or not known(gpu, width):
        return None
    if product == "weight_gradient":
        return _product(gpu, width, _FC2, columns, depth, _WEIGHT_GRADIENT)
    like = _FC2 if depth > columns else _PROJECTION if depth == columns else _QKV
    return _product(gpu, width, like, columns, depth)


def _product(gpu: Gpu, width: int, like: int, n: int, k: int, share: float = 1.0) -> float:
    rates = _RATES[gpu.name]
    flops = 2 * ROWS * n * k
    rate = min(rates.products[width][like] * share * rates.share, _OF_PEAK * gpu.device.bf16)
    moved = 2 * (ROWS * (n + k) + n * k)
    return max(flops / rate / 1e6, _memory(gpu, moved, _OF_BANDWIDTH_BY_PRODUCTS)) + 1


def _attention(gpu: Gpu, width: int, backward: bool) -> float:
    flops = (10 if backward else 4) * TOKENS**2 * width * BATCH
    moved = (30 if backward else 8) * width * ROWS
    rate = _RATES[gpu.name].attention[backward]
    return max(flops / rate / 1e6, _memory(gpu, moved, _OF_BANDWIDTH_BY_PRODUCTS)) + (6 if backward else 2)


def _pointwise(gpu: Gpu, width: int, bytes_a_token: int) -> float:
    return _memory(gpu, bytes_a_token * width * ROWS, _OF_BANDWIDTH)


def _memory(gpu: Gpu, moved: float, share: float) -> float:
    return moved / (gpu.device.bandwidth * 1e3 * share)
