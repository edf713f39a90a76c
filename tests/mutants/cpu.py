"""The mutants of the CPU kernels: one fault each (mutant.py), found by the host tests of tests/cpp.

Those with a gate `arm_*` are of NEON and BFMMLA; they are cross-compiled and run under QEMU, where that is installed.
"""

from mutant import Mutant

VEC, PACK, PRODUCT = "core/cpu/vec.h", "core/cpu/pack.h", "core/cpu/product.h"
TILES, NEON, REDUCE = "core/cpu/amx.h", "core/cpu/neon.h", "core/cpu/reduce.h"
FORWARD, BACKWARD = "ops/pairwise/cpu/forward.h", "ops/pairwise/cpu/backward.h"
OPERANDS, FEW = "ops/pairwise/cpu/operands.h", "ops/pairwise/cpu/few_queries.h"
ROWS, DIRECT = "core/cpu/few_rows.h", "ops/pairwise/cpu/direct.h"
UNARY = "ops/unary/unary_cpu.h"


def cpu(name, file, old, new, gate, mode="plain", cases=60):
    return Mutant(name, file, old, new, gate, mode, None, cases)


# fmt: off
MUTANTS = [
    # Conversions.
    cpu("float16: subnormal numbers widened as normal ones", VEC, "(exponent ? normal : subnormal)", "(normal)",
        "cpu_conversions"),
    cpu("float16: infinity widened to a number", VEC, "+ (exponent == 0x0f800000u ? rebias : 0)", "",
        "cpu_conversions"),
    cpu("float16: ties rounded up", VEC, "+ 0xfff + (magnitude >> 13 & 1)", "+ 0x1000", "cpu_conversions"),
    cpu("float16: no sign", VEC, "static_cast<uint16_t>(result | (bits >> 16 & 0x8000u))",
        "static_cast<uint16_t>(result)", "cpu_conversions"),
    cpu("float16: infinity one power of two early", VEC, "magnitude < 0x47800000u", "magnitude < 0x47000000u",
        "cpu_conversions"),
    cpu("exponential: a coefficient of the polynomial", VEC, "5.5503272266703021e-2f", "5.5513272266703021e-2f",
        "cpu_conversions"),
    cpu("exponential: a positive x counts as what it is", VEC,
        "const V y = less(most, greater(least, x)), t = y + magic, f = y - (t - magic);\n#endif\n"
        "  V p = broadcast(1.5461444698569129e-4f);",
        "const V y = greater(least, x), t = y + magic, f = y - (t - magic);\n#endif\n"
        "  V p = broadcast(1.5461444698569129e-4f);", "cpu_conversions"),
    cpu("exponential, AVX2: NaN is lost in a maximum", VEC, "return (Vec<float>)_mm256_max_ps((__m256)a, (__m256)b);",
        "return (Vec<float>)_mm256_max_ps((__m256)b, (__m256)a);", "cpu_exp2_avx2"),
    cpu("exponential, AVX-512: subnormal below the normal range", VEC,
        "_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask((__m512)x, (__m512)least, _CMP_NLT_UQ), (__m512)p, (__m512)n)",
        "_mm512_scalef_ps((__m512)p, (__m512)n)", "cpu_exp2_avx512"),
    cpu("exponential, AVX-512: NaN counts as below the normal range", VEC,
        "_mm512_cmp_ps_mask((__m512)x, (__m512)least, _CMP_NLT_UQ)",
        "_mm512_cmp_ps_mask((__m512)x, (__m512)least, _CMP_GE_OQ)", "cpu_exp2_avx512"),
    # Packing.
    cpu("transposition: the last row of a block that is not whole", VEC,
        "for (int64_t i = 0; i < height; ++i)\n          std::memcpy",
        "for (int64_t i = 0; i + 1 < height; ++i)\n          std::memcpy", "cpu_products"),
    cpu("packing: the mean of another index", PACK, "- mean[inner]", "- mean[outer]", "cpu_products"),
    cpu("packing: lanes beyond the last are not zero", PACK, "k < depth ? std::min(L, lanes - first) : 0",
        "k < depth ? L : 0", "cpu_products"),
    cpu("packing: a panel beside its place", PACK, "E* to = out + first / L * panel;", "E* to = out + first * panel;",
        "cpu_products", "asan"),
    cpu("packing: the first column of a tile for all", PACK, "tile[b * kTile + a] = at(o + a, i + b);",
        "tile[b * kTile + a] = at(o + a, i);", "cpu_products"),
    cpu("writing: tiles all in one place", PACK, "Dst* to = out + first * row_stride;", "Dst* to = out;",
        "cpu_kernels"),
    # Products.
    cpu("product: rows of the largest remainder are left out", PRODUCT, "last_block<E, B::kRows - 1, into>",
        "last_block<E, B::kRows - 2, into>", "cpu_products"),
    cpu("product: the factors of the first vector for all", PRODUCT, "load(alpha + v * W)", "load(alpha)",
        "cpu_products"),
    cpu("product: a slice replaces those before", PRODUCT,
        "product_slice<E, Into::add>(rows, panels, std::min(depth - k, slice)",
        "product_slice<E, Into::store>(rows, panels, std::min(depth - k, slice)", "cpu_products"),
    cpu("product: a slice of the same depths of B", PRODUCT, "b.data += k * Block<E>::kLanes;", "b.data += k;",
        "cpu_products"),
    cpu("product: every run is the first", PRODUCT, "begin += run, a += jump)", "begin += run)", "cpu_products"),
    # Tiles of AMX, by their portable twin.
    cpu("tiles: the sums of the left lanes are loaded twice", TILES, "tiles.template load<kSum + 1>(c + kTileLanes, k",
        "tiles.template load<kSum + 1>(c, k", "cpu_tiles"),
    cpu("tiles: the right lanes of B are the left ones", TILES, "load<kRight + 1>(b + 2 * kTileLanes,",
        "load<kRight + 1>(b,", "cpu_tiles"),
    cpu("tiles: 16 rows take 17", TILES, "if (rest > kTileRows) {", "if (rest >= kTileRows) {", "cpu_tiles", "asan"),
    cpu("tiles: sums begin with what is there", TILES, "  if (fresh) {\n    tiles.template zero",
        "  if (!fresh) {\n    tiles.template zero", "cpu_tiles"),
    cpu("tiles: the lower tile of A is the upper", TILES, "load<kLeft + 1>(a + k + kTileRows * row,",
        "load<kLeft + 1>(a + k,", "cpu_tiles"),
    # The passes.
    cpu("forward: earlier blocks' sums are not rescaled", FORWARD, "sum[v] = load(slot.sum + lane) * alpha;",
        "sum[v] = load(slot.sum + lane);", "cpu_kernels", cases=200),
    cpu("forward: statistics with the sum in place of its inverse", FORWARD, "A(1) / slot.sum[i]", "slot.sum[i]",
        "cpu_kernels"),
    cpu("forward: the mean of the values is left out", FORWARD, "(centre ? centre[ch] : A(0))", "A(0)", "cpu_kernels"),
    cpu("backward: the mean of dq over one query more", BACKWARD, "sum[ch] / args.queries",
        "sum[ch] / (args.queries + 1)", "cpu_kernels"),
    cpu("backward: Delta of the first query for all", BACKWARD, "- row_delta[r + i]", "- row_delta[0]", "cpu_kernels"),
    cpu("backward: queries begin at the first block", BACKWARD,
        "return std::min(block / range_blocks * range_rows + within,", "return std::min(within,", "cpu_kernels"),
    cpu("means: positions in place of channels", REDUCE, "return i * x.position + c;", "return i + c;",
        "cpu_kernels"),
    # Few queries: on narrower vectors all of them are read as they lie.
    cpu("few queries: lanes without a key count", FEW, "last[j - (whole - W)] = -infinity;",
        "last[j - (whole - W)] = 0;", "cpu_kernels_avx2", cases=200),
    cpu("few queries: earlier blocks' sums are not rescaled", FEW, "slot.divisor[r] * double(alpha) + divisor",
        "slot.divisor[r] + divisor", "cpu_kernels_avx2", cases=200),
    cpu("few queries: earlier blocks' output is not rescaled", FEW, "out[l] *= alpha;", "out[l] *= 1;",
        "cpu_kernels_avx2", cases=200),
    cpu("few queries: the means of the first batch element for all", FEW, "      x.batch += batch;\n", "",
        "cpu_kernels_avx2", cases=200),
    cpu("few queries: the mean of the values is left out", FEW, "(centre ? centre[lane] : A(0))", "A(0)",
        "cpu_kernels_avx2", cases=200),
    cpu("direct: all lanes of a line's last vector count", ROWS, "l < W - lines.length % W ? 0 : -1", "-1",
        "cpu_kernels", cases=200),
    cpu("direct: the last query has no part in dk and dv", ROWS, "for (int r = 1; r < R; ++r) sum",
        "for (int r = 1; r + 1 < R; ++r) sum", "cpu_kernels", cases=200),
    cpu("direct: earlier blocks' output is not rescaled", DIRECT, "slot.result[r * channel_pitch + ch] *= alpha;",
        "slot.result[r * channel_pitch + ch] *= 1;", "cpu_kernels", cases=200),
    cpu("direct: the scale of dk has its sign twice", DIRECT, "std::abs(scale)", "scale", "cpu_kernels", cases=200),
    cpu("direct: the mean of dq is not subtracted", DIRECT, "slot.result[r * width_pitch + ch] - mean)",
        "slot.result[r * width_pitch + ch])", "cpu_kernels", cases=200),
    cpu("direct: the first block of u for all", DIRECT, "unary + batch * args.keys + first,",
        "unary + batch * args.keys,", "cpu_kernels", cases=200),
    cpu("vectors of bfloat16: ties rounded up", VEC, "0x7fff + (high & 1)", "0x8000", "cpu_conversions"),
    # Sums.
    cpu("lanes: what fills no round is left out", REDUCE,
        "for (int64_t l = 0; i < count; ++i, ++l) add_to<T>(lane[l], rest[l], f(i));", "", "cpu_kernels"),
    cpu("rows in lanes: the lanes of a row in place of the rows of a lane", REDUCE, "double(columns[l][r])",
        "double(columns[r][l])", "cpu_kernels", cases=200),
    cpu("weighted sums: a run is counted again in the next", REDUCE, "sum[l] += double(run[l]), run[l] = 0;",
        "sum[l] += double(run[l]);", "cpu_kernels", cases=200),
    cpu("weighted sums: the last position", REDUCE, "for (int64_t l = 0; i < positions; ++i, ++l)",
        "for (int64_t l = 0; i + 1 < positions; ++i, ++l)", "cpu_kernels", cases=200),
    # Softmax and pooling.
    cpu("softmax: what fills up a vector counts", UNARY, "out[i] = fill;", "out[i] = 0;", "cpu_kernels"),
    cpu("softmax: one row of a block", UNARY, "row < std::min(args.rows, (block + 1) * kRows)",
        "row < std::min(args.rows, block * kRows + 1)", "cpu_kernels"),
    cpu("pooling: the first weight of a block for all", UNARY, "map[j - begin] * g[c]", "map[0] * g[c]",
        "cpu_kernels"),
    # NEON.
    cpu("NEON: every product by lane 0, float32", NEON, "%2.s[%3]", "%2.s[0]", "arm_products"),
    cpu("NEON: every product by lane 0, float64", NEON, "%2.d[%3]", "%2.d[0]", "arm_products"),
    cpu("NEON: the first half of a row of B twice", NEON, "pair<4 * (First + I) + 2, I, 2>",
        "pair<4 * (First + I), I, 2>", "arm_products"),
    cpu("NEON: the last depth", NEON, "for (; k < count; ++k, b", "for (; k + 1 < count; ++k, b", "arm_products"),
    cpu("NEON: the second part of a step from the first's rows of B", NEON, "rows<Part * W>(ak", "rows<0>(ak",
        "arm_products"),
    # BFMMLA.
    cpu("BFMMLA: an odd group is left out", NEON, "if (count > 0) group<0>", "if (count > B::kGroup) group<0>",
        "arm_bf16_products"),
    cpu("BFMMLA: rows of a pair of registers swapped", NEON, "i % 2 ? ak[i / 2].right : ak[i / 2].left",
        "i % 2 ? ak[i / 2].left : ak[i / 2].right", "arm_bf16_products"),
    cpu("BFMMLA: rows of a sum swapped", NEON, "r % 2 ? vzip2q_f64", "r % 2 == 0 ? vzip2q_f64", "arm_bf16_products"),
    cpu("BFMMLA: rows 5 and 6 from what a register held", NEON, "if (kPairs > 2)", "if (kPairs > 3)",
        "arm_bf16_products"),
    cpu("BFMMLA: the second group of a step from the first's B", NEON, "pair<6 * Group, 2>", "pair<0, 2>",
        "arm_bf16_products"),
    cpu("BFMMLA: depths of a group out of order", NEON, "round_to_bf16(x[0]), round_to_bf16(x[1])",
        "round_to_bf16(x[1]), round_to_bf16(x[0])", "arm_bf16_products"),
    cpu("BFMMLA: rows of dS on top of each other", NEON, "(out + i * kWidth<float>)", "(out + i * 2)",
        "arm_bf16_products"),
    cpu("BFMMLA: column sums before rounding", NEON, "    sum += widen(rounded);", "    sum += x[i];",
        "arm_bf16_products"),
    cpu("bfloat16: ties rounded up", VEC, "(bits + 0x7fff + ((bits >> 16) & 1))", "(bits + 0x8000)",
        "arm_bf16_products"),
    cpu("packing: depths of a group in reverse", PACK, "<< 16 * g;", "<< 16 * (G - 1 - g);", "arm_bf16_products"),
    cpu("packing: the last depth of a group that is not whole", PACK, "for (int64_t k = depth / G * G; k < depth; ++k)",
        "for (int64_t k = depth / G * G; k + 1 < depth; ++k)", "arm_bf16_products"),
    cpu("packing: depths that fill up a group are not zero", PACK, "const int64_t filled = round_up(depth, G);",
        "const int64_t filled = depth;", "arm_bf16_products"),
    cpu("bias: of the wrong sign", OPERANDS, "static_cast<Acc<Src>>(-factor * sums[j - j0])",
        "static_cast<Acc<Src>>(factor * sums[j - j0])", "arm_bf16_kernels"),
    cpu("forward: keys of a batch element begin within a group of rows", FORWARD,
        "place * row_space<E>(args.keys) + first", "place * args.keys + first", "arm_bf16_kernels"),
    cpu("backward: rows of dS at the place of plain rows", BACKWARD, "row_place<E>(r, v * W, L)", "r * L + v * W",
        "arm_bf16_kernels"),
]
# fmt: on

#: A few for every run of the suite: a conversion, a tail, a tile.
SHORT = (
    "float16: ties rounded up",
    "product: rows of the largest remainder are left out",
    "tiles: the lower tile of A is the upper",
)
