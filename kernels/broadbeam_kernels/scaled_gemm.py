"""Block-scaled products: FP4 or FP8 activations by FP4 weights, scales applied where codes are multiplied.

On Blackwell `tl.dot_scaled` is one instruction (tcgen05.mma kind::mxf4nvf4, kind::mxf4 and kind::mxf8f6f4 on
sm_100; mma.sync kind::mxf4nvf4 on sm_120). Elsewhere codes times block scales become bf16 in registers,
exactly (an e2m1 times an e4m3 has six significant bits), and bf16 products follow. Even and odd values of K,
the two nibbles of a byte, are multiplied apart: a sum has no order, so nothing has to be interleaved.

Weights take the tensor core's 128 rows and tokens its columns, so that one token wastes nothing.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the bodies of kernels are Triton, not Python: mypy cannot type them)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import codes, paths
from .contracts import (
    MOST_BLOCKS,
    block_rows,
    check,
    check_dense,
    check_device,
    check_indices,
    check_multiple,
    check_quantized,
    check_rows,
    check_shape,
    check_tensor,
    check_type,
)
from .formats import Fp8Block, Mxfp4, Nvfp4, Quantized, swizzled_size
from .packed_weights import PackedWeights, one_matrix
from .portable_gemm import Grouping, depth, e4m3_as_half, locate, tile_count
from .reference import scaled_gemm as oracle
from .tuning import Launch, config

OUT_TYPES = (torch.bfloat16, torch.float16, torch.float32)
# Triton's interpreter multiplies the bits of bf16 as integers; fp16 holds the values of its tests.
HALF = tl.constexpr(tl.float16 if triton.knobs.runtime.interpret else tl.bfloat16)
BN = 128  # weight rows of a tile: what the block-scaled instruction takes
BK = 128  # values of K in a step: an FP8 scale's


@triton.jit
def _scales(
    ptr,
    row,
    step,
    blocks,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SWIZZLED: tl.constexpr,
    TILED: tl.constexpr,
):
    """The scale bytes (ROWS, BLOCKS) of `row` at a step; blocks past the last are zeros."""
    if TILED:  # 128 rows that start a 128x4 tile: the tiles of a step are one run of bytes
        tiles = (blocks + 3) // 4
        inner = tl.arange(0, 128 * BLOCKS)
        tile = step * (BLOCKS // 4) + inner // 512
        at = (tl.min(row, axis=0) // 128 * tiles + step * (BLOCKS // 4)) * 512 + inner
        run = tl.load(ptr + at, mask=tile < tiles, other=0)
        return run.reshape(BLOCKS // 4, 32, 4, 4).permute(2, 1, 0, 3).reshape(128, BLOCKS)
    else:
        block = step * BLOCKS + tl.arange(0, BLOCKS)
        if SWIZZLED:
            at = codes.swizzled_offset(row[:, None], block[None, :], (blocks + 3) // 4)
        else:
            at = row[:, None] * blocks + block[None, :]
        return tl.load(ptr + at, mask=(block < blocks)[None, :], other=0)


@triton.jit
def _factors(scales, NVFP4: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, EACH: tl.constexpr):
    """Scale bytes (ROWS, BLOCKS) -> float32 (ROWS, BLOCKS * EACH), each scale EACH times."""
    if NVFP4:
        factor = e4m3_as_half(scales).to(tl.float32) * 256.0
    else:
        exponent = scales.to(tl.int32)
        factor = tl.where(exponent == 0, 1 << 22, exponent << 23).to(tl.float32, bitcast=True)
    return tl.broadcast_to(factor[:, :, None], (ROWS, BLOCKS, EACH)).reshape(ROWS, BLOCKS * EACH)


@triton.jit
def _decode(code, factor):
    """Packed e2m1 codes times their scales -> the even and the odd values, bf16."""
    code = code.to(tl.int32)
    even = (codes.e2m1_value(code) * factor).to(HALF)
    return even, (codes.e2m1_value(code >> 4) * factor).to(HALF)


@triton.jit
def _token_scales(ptr):
    """FP8 activations' scales at `ptr`, float32 or biased exponents -> float32."""
    scale = tl.load(ptr)
    if scale.dtype == tl.uint8:
        scale = (scale.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def _scaled_kernel(
    a_ptr,
    a_scale_ptr,
    a_global_ptr,
    b_ptr,
    b_scale_ptr,
    b_global_ptr,
    out_ptr,
    group_ptr,
    rows,
    n,
    k_sixteenths,  # k / 16: the compiler learns from the product that rows of codes start on 8 bytes
    slots,
    a_row_eighths,
    out_row,
    a_scale_row,
    a_scale_step,
    b_scale_expert,
    A: tl.constexpr,  # "fp4", "fp8" or "bf16"
    NVFP4: tl.constexpr,
    A_SWIZZLED: tl.constexpr,
    B_SWIZZLED: tl.constexpr,
    NATIVE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPING: tl.constexpr,
):
    first, end, column, expert = locate(
        tl.program_id(0), rows, n, group_ptr, slots, BM, BN, BLOCK_ROWS, GROUP, GROUPING
    )
    if expert >= 0:
        BLOCK: tl.constexpr = 16 if NVFP4 else 32
        BLOCKS: tl.constexpr = BK // BLOCK
        A_WIDTH: tl.constexpr = BK // 2 if A == "fp4" else BK
        k = k_sixteenths * 16
        a_row = a_row_eighths * 8
        row = tl.minimum(first + tl.arange(0, BM), end - 1)
        channel = tl.minimum(column + tl.arange(0, BN), n - 1)
        a_at = (row - first)[:, None] * a_row + tl.arange(0, A_WIDTH)[None, :]
        b_at = (channel - column)[:, None] * (k // 2) + tl.arange(0, BK // 2)[None, :]
        a = a_ptr + first.to(tl.int64) * a_row + a_at
        b = b_ptr + (expert.to(tl.int64) * n + column) * (k // 2) + b_at
        b_scale = b_scale_ptr + expert.to(tl.int64) * b_scale_expert
        if A == "fp8":
            a_scale = a_scale_ptr + row * a_scale_row
        acc = tl.zeros((BN, BM), tl.float32)
        for step in tl.range(0, tl.cdiv(k, BK), num_stages=STAGES):
            left = k - step * BK
            a_left = left // 2 if A == "fp4" else left
            if A == "fp8":
                x = tl.load(a)
            else:
                x = tl.load(a, mask=tl.arange(0, A_WIDTH)[None, :] < a_left, other=0)
            w = tl.load(b, mask=tl.arange(0, BK // 2)[None, :] < left // 2, other=0)
            ws = _scales(b_scale, channel, step, k // BLOCK, BN, BLOCKS, B_SWIZZLED, B_SWIZZLED)
            if A == "fp4":
                xs = _scales(
                    a_scale_ptr, row, step, k // BLOCK, BM, BLOCKS, A_SWIZZLED, A_SWIZZLED and BM == 128
                )
                if NATIVE:
                    if NVFP4:
                        ws = ws.to(tl.float8e4nv, bitcast=True)
                        xs = xs.to(tl.float8e4nv, bitcast=True)
                    acc = tl.dot_scaled(w, ws, "e2m1", x.T, xs, "e2m1", acc)
                else:
                    even, odd = _decode(w, _factors(ws, NVFP4, BN, BLOCKS, BLOCK // 2))
                    x_even, x_odd = _decode(x, _factors(xs, NVFP4, BM, BLOCKS, BLOCK // 2))
                    acc = tl.dot(even, x_even.T, acc)
                    acc = tl.dot(odd, x_odd.T, acc)
            elif A == "fp8" and NATIVE:
                exponent = tl.load(a_scale + step * a_scale_step)
                if exponent.dtype != tl.uint8:
                    exponent = (exponent.to(tl.int32, bitcast=True) >> 23).to(tl.uint8)
                xs = tl.broadcast_to(exponent[:, None], (BM, BLOCKS))
                acc = tl.dot_scaled(w, ws, "e2m1", x.T, xs, "e4m3", acc)
            else:
                if A == "fp8":
                    x = (e4m3_as_half(x).to(tl.float32) * 256.0).to(HALF)
                even, odd = _decode(w, _factors(ws, NVFP4, BN, BLOCKS, BLOCK // 2))
                x_even, x_odd = tl.split(x.reshape(BM, BK // 2, 2))
                if A == "fp8":
                    part = tl.dot(odd, x_odd.T, tl.dot(even, x_even.T))
                    acc += part * _token_scales(a_scale + step * a_scale_step)[None, :]
                else:
                    acc = tl.dot(odd, x_odd.T, tl.dot(even, x_even.T, acc))
            a += A_WIDTH
            b += BK // 2
        if NVFP4:
            alpha = tl.div_rn(1.0, tl.load(b_global_ptr + expert))
            if A == "fp4":
                alpha *= tl.div_rn(1.0, tl.load(a_global_ptr))
            acc *= alpha
        token = first + tl.arange(0, BM)
        place = (token - first)[None, :] * out_row + tl.arange(0, BN)[:, None]
        inside = (token < end)[None, :] & (column + tl.arange(0, BN) < n)[:, None]
        at = out_ptr + (first.to(tl.int64) * out_row + column) + place
        tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=inside)


def _tile(a: Tensor, per_group: int) -> Launch:
    tile = config("scaled_gemm", a.device, rows=per_group)
    bytes_per_stage = tile["BM"] * BK * a.element_size() + BN * BK // 2
    stages = depth(tile["STAGES"], bytes_per_stage, a.device)
    return {**tile, "STAGES": stages, "NATIVE": paths.multiplies_block_scaled(a.device)}


def _one_instruction(a: Quantized | Tensor, b: PackedWeights) -> bool:
    """Whether block-scaled tensor cores take these formats: neither bf16 nor float32 scales."""
    if isinstance(a, Quantized) and isinstance(a.format, Fp8Block):
        return a.format.scale != "float32" and isinstance(b.format, Mxfp4)
    return isinstance(a, Quantized)


def launch(
    a: Quantized | Tensor,
    b: PackedWeights,
    out: Tensor,
    *,
    grouping: Grouping = "dense",
    groups: Tensor | None = None,
    block_rows: int = 0,
    slots: int = 0,
    tile: Launch | None = None,
) -> None:
    """out (rows, n) = a (rows, k) @ b[expert] (n, k).T with the arguments already checked.

    a: in b's format, in FP8 1x128, or bf16. `groups`: expert of each `block_rows` rows (contiguous, -1 for
    none), or rows in use of each expert's `slots` rows (masked). `tile`: BM, STAGES, GROUP, NATIVE,
    num_warps; by table where none is given.
    """
    values = a.values if isinstance(a, Quantized) else a
    kind, a_scales, a_swizzled, strides = "bf16", None, False, (0, 0)
    if isinstance(a, Quantized):
        match a.format:
            case Fp8Block():
                kind, a_scales, strides = "fp8", a.scales, (a.scales.stride(0), a.scales.stride(1))
            case Nvfp4() | Mxfp4() as fmt:
                kind, a_scales, a_swizzled = "fp4", a.scales.view(torch.uint8), fmt.scales == "swizzled"
    experts, n, k = b.shape
    rows = out.shape[0]
    per_group = {"dense": rows, "contiguous": block_rows, "masked": slots}[grouping]
    tile = {**(tile or _tile(values, per_group))}
    tile["BM"] = min(tile["BM"], block_rows or tile["BM"])
    tile["NATIVE"] = tile["NATIVE"] and _one_instruction(a, b)
    decoded_fp8 = kind == "fp8" and not tile["NATIVE"]
    _scaled_kernel[(tile_count(rows, n, tile["BM"], BN, experts, slots),)](
        values.view(torch.uint8) if decoded_fp8 else values,
        a_scales,
        a.global_scale if isinstance(a, Quantized) else None,
        b.codes,
        b.scales,
        b.global_scales,
        out,
        groups,
        rows,
        n,
        k // 16,
        slots,
        values.stride(0) // 8,
        out.stride(0),
        *strides,
        b.scales.shape[1],
        A=kind,
        NVFP4=isinstance(b.format, Nvfp4),
        A_SWIZZLED=a_swizzled,
        B_SWIZZLED=b.format.scales == "swizzled",
        BN=BN,
        BK=BK,
        BLOCK_ROWS=max(block_rows, 1),
        GROUPING=grouping,
        **tile,
    )


def _check_activations(a: Quantized, b: PackedWeights) -> None:
    fmt, k = a.format, a.shape[1]
    if isinstance(fmt, Fp8Block):
        check(fmt.rows == 1, f"a has {fmt.rows}x128 scales, expected 1x128")
        check(isinstance(b.format, Mxfp4), f"FP8 activations take MXFP4 weights, b is in {b.format}")
        check_multiple("k", k, 128)
    else:
        check(type(fmt) is type(b.format), f"a is in {fmt}, b in {b.format}: one FP4 format for both")
        check_dense("a_scales", a.scales, 1)
        check(a.scales.numel() <= MOST_BLOCKS, f"a has {a.scales.numel()} scales, at most {MOST_BLOCKS}")
    check_quantized("a", a, Fp8Block, Nvfp4, Mxfp4)
    check_device("a", a.values, b.codes)
    check(k == b.shape[2], f"a has k={k}, b has k={b.shape[2]}")
    check_rows("a", a.values, 8)


def _check_weights(b: PackedWeights) -> None:
    experts, n, k = b.shape
    check_multiple("k", k, b.format.block, least=b.format.block)
    blocks = k // b.format.block
    size = swizzled_size(n, blocks) if b.format.scales == "swizzled" else n * blocks
    check(size <= MOST_BLOCKS, f"b has {size} scales an expert, at most {MOST_BLOCKS}")
    for name, x, shape in (
        ("b's codes", b.codes, (experts, n, k // 2)),
        ("b's scales", b.scales, (experts, size)),
    ):
        check_tensor(name, x, len(shape), (torch.uint8,), like=b.codes)
        check_shape(name, x, shape)
        check_dense(name, x, 1)
    if isinstance(b.format, Nvfp4):
        check(b.global_scales is not None, "b is in NVFP4 and needs its global scales")
        assert b.global_scales is not None
        check_tensor("b's global scales", b.global_scales, 1, (torch.float32,), like=b.codes)
        check_shape("b's global scales", b.global_scales, (experts,))


def _output(a: Quantized, b: PackedWeights, out: Tensor | None, dtype: torch.dtype) -> Tensor:
    _check_weights(b)
    _check_activations(a, b)
    shape = (a.shape[0], b.shape[1])
    if out is None:
        check_type("dtype", dtype, OUT_TYPES)
        return torch.empty(shape, dtype=dtype, device=a.values.device)
    check_tensor("out", out, 2, OUT_TYPES, like=a.values)
    check_shape("out", out, shape)
    check_rows("out", out, out.element_size())
    return out


def scaled_gemm(
    a: Quantized, b: Quantized, out: Tensor | None = None, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """a (rows, k) @ b (n, k).T, both block-scaled -> (rows, n) bf16, fp16 or float32.

    NVFP4 by NVFP4 and MXFP4 by MXFP4 (W4A4), or FP8 1x128 by MXFP4 (W4A8); scales linear or swizzled on
    either side. NVFP4: sum over blocks of (code a . code b) * scale a * scale b, times
    alpha = (1 / g_a) * (1 / g_b), as vLLM and CUTLASS have it; sums in float32.
    """
    weights = one_matrix(b)
    out = _output(a, weights, out, dtype)
    if not paths.runs_kernels(out):
        return oracle.scaled_gemm(a, weights, out)
    if out.numel():
        launch(a, weights, out)
    return out


def grouped_scaled_gemm(
    a: Quantized,
    b: PackedWeights,
    experts: Tensor,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Each block of rows of a (rows, k) times its expert's weights -> (rows, n); formats as `scaled_gemm`.

    experts int32 (rows / block), -1 for a block to skip (its output is not written); blocks of 16, 32, 64,
    128 or 256 rows. One global scale for all rows of a, one per expert for b.
    """
    out = _output(a, b, out, dtype)
    check_indices("experts", experts, a.values, None, -1, b.shape[0] - 1)
    block = block_rows(a.shape[0], experts, (16, 32, 64, 128, 256))
    if not paths.runs_kernels(out):
        return oracle.grouped_scaled_gemm(a, b, experts, block, out)
    if out.numel():
        launch(a, b, out, grouping="contiguous", groups=experts, block_rows=block)
    return out


def masked_scaled_gemm(
    a: Quantized,
    b: PackedWeights,
    count: Tensor,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """a (experts * slots, k), of whose slots count[e] are in use, times each expert's weights.

    -> (experts * slots, n); output rows past an expert's count are not written. count int32 (experts,);
    slots a multiple of 128 where a's scales are swizzled; formats as `scaled_gemm`.
    """
    out = _output(a, b, out, dtype)
    experts, rows = b.shape[0], a.shape[0]
    slots = rows // max(experts, 1)
    check_indices("count", count, a.values, (experts,), 0, slots)
    check(rows == slots * experts, f"{experts} experts do not divide {rows} rows")
    swizzled = not isinstance(a.format, Fp8Block) and a.format.scales == "swizzled"
    check(
        not swizzled or slots % 128 == 0, f"slots={slots} is not a multiple of 128, a's scales are swizzled"
    )
    if not paths.runs_kernels(out):
        return oracle.masked_scaled_gemm(a, b, count, out)
    if out.numel():
        launch(a, b, out, grouping="masked", groups=count, slots=slots)
    return out
