"""The mutants: one fault each, planted into a kernel of csrc or into the code that launches it.

A mutant replaces `old`, which must occur exactly once in `file` (under csrc), by `new`. `gate` is the program of
tests/gates that must reject it; `mode` how that program is built and run:

- ``plain``: values and the emulator's own errors, thread orders in rotation;
- ``order``: the same in each of the three orders, for faults that some orders hide;
- ``asan``: AddressSanitizer and UndefinedBehaviorSanitizer;
- ``tsan``: ThreadSanitizer.

`type` is the element type that is compiled; `cases` how many random cases may be spent on finding it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    new: str
    gate: str
    mode: str = "plain"
    type: str = "float"
    cases: int = 200


REDUCE, AFFINE, DEVICE = "core/cuda/reduce.cuh", "core/cuda/affine.cuh", "core/cuda/device.cuh"
UNARY, SHARED = "ops/unary/unary_cuda.cuh", "ops/pairwise/chain/operands.cuh"
STANDARDISE = "ops/whiten/standardise_cuda.cuh"
FORWARD, ROWS = "ops/pairwise/chain/forward.cuh", "ops/pairwise/chain/backward_rows.cuh"
ROW = "ops/pairwise/chain/row_logits.cuh"
MAP, GRADIENTS = "ops/pairwise/chain/backward_map.cuh", "ops/pairwise/chain/gradients.cuh"
BACKWARD = "ops/pairwise/chain/backward.cuh"
TILE, FUSED = "ops/pairwise/fused/tile.cuh", "ops/pairwise/fused/forward.cuh"
OUTPUT = "ops/pairwise/fused/output.cuh"
FUSED_MAP = "ops/pairwise/fused/backward_map.cuh"
ONLINE = "core/online_softmax.h"
PLAN, PTX = "ops/pairwise/pairwise_plan.h", "core/cuda/ptx.cuh"
BF16, F16, TF32 = "__nv_bfloat16", "__half", "Tf32"

# fmt: off
MUTANTS = [
    # Column sums and means.
    Mutant("column sums: no barrier before the warps' sums are added", REDUCE,
           "      sums[warp][lane] = sum;\n      __syncthreads();\n      if (warp == 0 && c0 + lane < channels) {",
           "      sums[warp][lane] = sum;\n      if (warp == 0 && c0 + lane < channels) {", "whiten", "order"),
    Mutant("column sums: the next task overwrites sums that are read", REDUCE,
           "      __syncthreads();  // before the next task overwrites `sums`\n    }\n  }\n}\n\n// out[b][c]",
           "    }\n  }\n}\n\n// out[b][c]", "whiten", "tsan", cases=60),
    Mutant("column sums: channels beyond the last are read", REDUCE,
           "if (c0 + lane < channels) {\n        const T* column", "if (true) {\n        const T* column", "whiten",
           "asan"),
    Mutant("column sums: a split is one position short", REDUCE,
           "begin + kSplit < positions ? begin + kSplit : positions",
           "begin + kSplit < positions ? begin + kSplit - 1 : positions", "whiten"),
    Mutant("column sums: one position too many (channel-first)", REDUCE, "i = begin + lane; i < end;",
           "i = begin + lane; i <= end;", "whiten"),
    Mutant("column sums: splits of another batch element", REDUCE, "index / channels * splits * channels",
           "index / channels * channels", "whiten"),
    Mutant("column sums: a mean not divided by its count", REDUCE, "(sum * factor)", "(sum)", "whiten"),
    # Row sums.
    Mutant("row sums: no barrier before the warps' sums are added", REDUCE,
           "__syncthreads();\n      if (warp == 0 && i0 + lane < op.positions) {",
           "if (warp == 0 && i0 + lane < op.positions) {", "unary", "order"),
    Mutant("row sums: the next task overwrites sums that are read", REDUCE,
           "      __syncthreads();  // before the next task overwrites `sums`\n    } else {", "    } else {", "unary",
           "tsan"),
    Mutant("row sums: positions beyond the last", REDUCE, "if (i >= op.positions) break;", "", "unary", "asan"),
    Mutant("row sums: the offset is not taken off", REDUCE, "(offset ? double(offset[c]) : 0.0)", "0.0", "chain",
           type=BF16),
    # Elementwise.
    Mutant("affine: one element beyond a row", AFFINE, "if (f >= fast_count) continue;",
           "if (f > fast_count) continue;", "whiten", "asan"),
    Mutant("affine: blocks write the same rows", AFFINE, "s < slow + kTileSlow && s < slow_count", "s < slow_count",
           "whiten", "tsan", cases=100),
    Mutant("affine: gamma of the first batch element", AFFINE, "op.gamma + b * op.channels", "op.gamma", "whiten"),
    Mutant("affine: no scale", AFFINE, "        value *= scale;\n", "", "chain"),
    Mutant("affine: the residual is the whole value", AFFINE, "rounded<Out>(value - wide(result))",
           "rounded<Out>(value)", "chain", type=BF16),
    Mutant("affine: row factors by the wrong index", AFFINE, "alpha[i] : A(1)", "alpha[s] : A(1)", "chain"),
    Mutant("add: one quad too many", AFFINE, "if (quad >= quads) continue;", "if (quad > quads) continue;", "chain",
           "asan", cases=100),
    Mutant("add: overwrites instead", AFFINE, "total.value[i] += term.value[i]", "total.value[i] = term.value[i]",
           "chain"),
    # Warp and block reductions.
    Mutant("warp sum: the last step is missing", DEVICE, "step > 0; step /= 2) x +=", "step > 1; step /= 2) x +=",
           "unary"),
    Mutant("block sum: no barrier", DEVICE, "scratch[threadIdx.x / kWarp] = x;\n  __syncthreads();\n  A total = 0;",
           "scratch[threadIdx.x / kWarp] = x;\n  A total = 0;", "unary", "order"),
    Mutant("block max: the first warp is left out", DEVICE, "w = 0; w < kWarps; ++w) x = scratch[w]",
           "w = 1; w < kWarps; ++w) x = scratch[w]", "chain"),
    Mutant("block merge: no barrier", DEVICE, "sum[threadIdx.x / kWarp] = state.sum;\n  }\n  __syncthreads();",
           "sum[threadIdx.x / kWarp] = state.sum;\n  }", "unary", "order"),
    # Whitening by any mean and deviation.
    Mutant("standardise: statistics of another group", STANDARDISE, "const int64_t g = group + c * step;",
           "const int64_t g = group;", "standardise"),
    Mutant("standardise: groups of the first batch element", STANDARDISE,
           "const int64_t group = b * op.channels / op.group,", "const int64_t group = 0,", "standardise"),
    Mutant("standardise: positions beyond the last are summed", STANDARDISE, "if (i >= length) return 0;", "",
           "standardise", "asan"),
    Mutant("standardise: means of the first batch element in the moments", STANDARDISE, "mean + b * positions / group,",
           "mean,", "standardise"),
    Mutant("standardise: the term of the result is missing", STANDARDISE, "if (y) value -= static_cast<A>(op.slope[g])",
           "if (false) value -= static_cast<A>(op.slope[g])", "standardise"),
    Mutant("standardise: variance divided by n", STANDARDISE, "1.0 / (args.count() - 1);", "1.0 / args.count();",
           "standardise"),
    Mutant("standardise: one element beyond a row", STANDARDISE, "if (f >= fast_count) continue;",
           "if (f > fast_count) continue;", "standardise", "asan"),
    Mutant("standardise: deviations of groups beyond the last", STANDARDISE, "if (index < count) rstd", "rstd",
           "standardise", "asan"),
    Mutant("standardise: blocks write the same rows", STANDARDISE, "s < slow + kTileSlow && s < slow_count",
           "s < slow_count", "standardise", "tsan", cases=100),
    Mutant("standardise: 32-bit index", STANDARDISE, "out[i * op.out.position + c * op.out.channel]",
           "out[static_cast<int>(i * op.out.position + c * op.out.channel)]", "overflow"),
    # Softmax and pooling.
    Mutant("softmax: the next row overwrites statistics that are read", UNARY,
           "__syncthreads();  // before the next row overwrites `most` and `sum`", "", "unary", "tsan"),
    Mutant("softmax: one column beyond the last", UNARY, "column < columns ? wide", "column <= columns ? wide",
           "unary"),
    Mutant("softmax backward: the next row overwrites scratch", UNARY,
           "__syncthreads();  // before the next row overwrites `scratch`", "", "unary", "tsan"),
    Mutant("softmax backward: gradient strides for probabilities", UNARY,
           "dot += wide(p[j * probability.position]) * wide(dp[j * grad.position]);",
           "dot += wide(p[j * probability.position]) * wide(dp[j * grad.channel]);", "unary"),
    Mutant("mask gradient: two sums share their scratch", UNARY, "block_sum(total, sums)",
           "block_sum(total, weighted_sums)", "unary", "tsan"),
    Mutant("mask gradient: inner products of the first batch element", UNARY, "x = dots + b * keys", "x = dots",
           "unary"),
    Mutant("mask gradient: weights left out", UNARY, "double(u[j]) * (x[j] - mean)", "(x[j] - mean)", "unary"),
    Mutant("pooling backward: weights left out", UNARY, "    op.beta_row = u.read();\n", "", "unary"),
    # Operands of the chain.
    Mutant("operands: a mean added instead of subtracted", SHARED, "op.beta = -1;\n  op.gamma = mean;",
           "op.gamma = mean;", "chain"),
    Mutant("operands: the query mean enters with the wrong sign", SHARED, "-int(args.whiten)", "int(args.whiten)",
           "chain", type=BF16),
    Mutant("operands: pooled not added to the mean of the values", SHARED, "    op.gamma = y;\n", "", "chain"),
    Mutant("operands: the last chunk is as long as the others", SHARED, "std::min(rows, all_rows - i)", "rows", "chain",
           "asan", cases=60),
    Mutant("operands: a row that is not aligned is taken as it lies", SHARED,
           "x.position >= channels && x.position % kAlign == 0", "x.position >= channels", "chain", type=BF16),
    # Softmax of a row of the map.
    Mutant("row logits: columns beyond the last", ROW,
           "quad * kQuad + u < columns ? in.value[u] * sign + more.value[u] : kLowest;",
           "in.value[u] * sign + more.value[u];", "chain"),
    Mutant("row logits: the sign of the scale lost", ROW, "in.value[u] * sign + more", "in.value[u] + more", "chain"),
    Mutant("row logits: scaled before their maximum is off", ROW, "x[u] = (x[u] - off) * magnitude;",
           "x[u] = std::fma(x[u], magnitude, -(off * magnitude));", "chain"),
    Mutant("map softmax: 32-bit index", FORWARD, "step.logits + task * step.pitch",
           "step.logits + static_cast<int>(task * step.pitch)", "overflow"),
    Mutant("map softmax: two sums share their scratch", FORWARD, "block_sum(stored, scratch[2])",
           "block_sum(stored, scratch[1])", "chain", "tsan", BF16, cases=40),
    Mutant("map softmax: the row's factor without its sum", FORWARD, "most, sum, step.stats", "most, A(1), step.stats",
           "chain"),
    Mutant("forward: output not divided by its sum", FORWARD, "    write.alpha_row = {inverse, rows};\n", "", "chain"),
    # dS of the chain for halves.
    Mutant("dS: columns beyond the last reach the sum", MAP,
           "inside ? grad_scale * softmax_jacobian(p.value[u], dp.value[u], d.value[u]) : A(0)",
           "grad_scale * softmax_jacobian(p.value[u], dp.value[u], d.value[u])", "chain", type=BF16),
    Mutant("dS: the next row overwrites scratch", MAP, "__syncthreads();  // before the next row overwrites `scratch`",
           "", "chain", "tsan", BF16, cases=40),
    Mutant("dS: float16 scale of P in dS too", MAP, "softmax_jacobian(p.value[u], dp",
           "softmax_jacobian(factor * p.value[u], dp", "chain", type=F16),
    Mutant("dS: 32-bit index", MAP, "row = task * step.pitch;", "row = static_cast<int>(task * step.pitch);",
           "overflow"),
    Mutant("dS: the rows' factor left out", MAP, "? by.value[u] * exp2_of", "? exp2_of", "chain",
           type=BF16),
    Mutant("dS: Delta left out", MAP, "dp.value[u], d.value[u])", "dp.value[u], A(0))", "chain", type=BF16),
    Mutant("dS: Delta without the offset", BACKWARD, "if (offset) y -= offset[c];", "", "chain", type=BF16),
    Mutant("gradient scale: the next element overwrites what is read", BACKWARD,
           "__syncthreads();  // before the next element overwrites `most`", "", "chain", "tsan", F16, cases=60),
    # Row backward of float and double.
    Mutant("row backward: 32-bit index", ROWS,
           "step.map + task * step.pitch;\n    A* grad = step.grad ? step.grad + task * step.pitch : nullptr;\n\n",
           "step.map + static_cast<int>(task * step.pitch);\n"
           "    A* grad = step.grad ? step.grad + task * step.pitch : nullptr;\n\n", "overflow"),
    Mutant("row backward: columns beyond the last reach Delta", ROWS, "if (quad * kQuad + u < step.columns) dot +=",
           "dot +=", "chain"),
    Mutant("row backward: two sums share their scratch", ROWS, "block_sum(dot, scratch[2])",
           "block_sum(dot, scratch[1])", "chain", "tsan", cases=40),
    Mutant("row backward: Delta left out", ROWS, "block_sum(dot, scratch[2]) / sum", "0 * block_sum(dot, scratch[2])",
           "chain"),
    Mutant("row backward: sums of later chunks are dropped", ROWS, "if (first) add(device, sum,",
           "if (false) add(device, sum,", "chain"),
    Mutant("row backward: later chunks replace earlier ones", ROWS, "target.data = first ? total : more;",
           "target.data = total;", "chain"),
    Mutant("part: Delta of the first query", ROWS, "step.delta.element(b)[i]", "step.delta.element(b)[0]", "chain"),
    Mutant("part: the rows' factor left out", ROWS, "exp_of(not_positive(x[u])) * factor;",
           "exp_of(not_positive(x[u]));", "chain"),
    Mutant("part: statistics of the first batch element", ROWS, "step.stats.element(b) + 2 * i",
           "step.stats.data + 2 * i", "chain"),
    Mutant("part: 32-bit index", ROWS,
           "step.map + task * step.pitch;\n"
           "    A* grad = step.grad ? step.grad + task * step.pitch : nullptr;\n    const",
           "step.map + static_cast<int>(task * step.pitch);\n"
           "    A* grad = step.grad ? step.grad + task * step.pitch : nullptr;\n    const", "overflow"),
    # Gradients.
    Mutant("dq: its mean is left in", GRADIENTS, "      write.beta = -1;\n", "      write.beta = 0;\n", "chain"),
    Mutant("dk: the term of the query mean is missing", GRADIENTS, "write.beta = in.mean_term;", "write.beta = 0;",
           "chain", type=BF16),
    Mutant("dk: query mean of the wrong batch element", GRADIENTS, "in.query_mean + b * args.width", "in.query_mean",
           "chain", type=BF16),
    Mutant("dv: pooled gradient of the wrong batch element", GRADIENTS, "unary.grad_pooled + b * args.channels",
           "unary.grad_pooled", "chain"),
    # Statistics that host and device share.
    Mutant("online softmax: states merged without rescaling", ONLINE, "other.sum * exp_of(other.most - off)",
           "other.sum", "unary"),
    Mutant("online softmax: earlier sums not rescaled", ONLINE, "sum = sum * exp_of(before - off) + more;",
           "sum = sum + more;", "unary"),
    # Tiles and fragments of the fused kernels.
    Mutant("tiles: a line is copied beyond the last column", TILE,
           "if (x.aligned && (!inside || inner + step <= left_inner)) {", "if (x.aligned) {", "fused", type=BF16),
    Mutant("tiles: one row beyond the last", TILE, "row < left_outer && inner < left_inner",
           "row <= left_outer && inner < left_inner", "fused", "asan", BF16, 60),
    Mutant("tiles: a line past the end of a row", TILE, "if (line >= lines) {", "if (line > lines) {", "fused",
           type=BF16),
    Mutant("tiles: elements beyond the last", TILE, "inside && inner + u < left_inner ?", "inside ?", "fused",
           type=BF16),
    Mutant("tiles: stride of the wrong dimension", TILE, "from[u * stride_inner]", "from[u * stride_outer]", "fused",
           type=BF16),
    Mutant("fragments: lanes of the second half read the first", TILE, "int row = id % 16,", "int row = id % 8,",
           "fused", type=BF16),
    Mutant("fragments: halves of B exchanged", TILE, "b[half], b[half + 2]", "b[2 * half], b[2 * half + 1]", "fused",
           type=BF16),
    # TF32: operands that are centred and rounded on their way, elements of 32 bits in tiles and fragments.
    Mutant("TF32: operands cut off instead of rounded", PTX, "const uint32_t bits = to_tf32(x);",
           "uint32_t bits;\n  memcpy(&bits, &x, sizeof(bits));\n  bits &= ~0x1fffu;", "fused_forward", type=TF32),
    Mutant("TF32: operands rounded before they are centred", SHARED, "kCentred ? mean : nullptr);", "nullptr);",
           "fused_forward", type=TF32),
    Mutant("TF32: the query mean is lost without whitening", SHARED, "kCentred ? !args.whiten\n", "kCentred ? 0\n",
           "fused_forward", type=TF32),
    Mutant("TF32: channels beyond the last whole product are dropped", PLAN,
           "(shape.width + depth - 1) / depth * depth", "std::max<int64_t>(depth, shape.width / depth * depth)",
           "fused_forward", type=TF32),
    Mutant("TF32: a product takes 16 of depth", TILE, "constexpr int kDepth = 2 * kLineElements<T>;",
           "constexpr int kDepth = 16;", "fused_forward", type=TF32),
    Mutant("TF32: rows of the second half of a fragment", TILE, "bits_of(from[8])", "bits_of(from[4])",
           "fused_forward", type=TF32),
    Mutant("TF32: depth of the second half of a fragment", TILE, "r += 2, from += 4 * depth_step",
           "r += 2, from += 2 * depth_step", "fused_forward", type=TF32),
    Mutant("TF32: lanes across the rows of a tile as ldmatrix has them", TILE,
           "id / 8 % 2 * 8 : id / 4;\n      depth = kHalf<T> ? id / 16 * 8 + id % 8 : id % 4;",
           "id / 8 % 2 * 8 : id % 8;\n      depth = kHalf<T> ? id / 16 * 8 + id % 8 : id / 8;", "fused_forward",
           type=TF32),
    Mutant("TF32: no room for the padding of a tile that is read across", PLAN,
           "slice_channels, shape.value_channel_first, !shape.value_channel_first);",
           "slice_channels, shape.value_channel_first, false);", "fused_forward", type=TF32),
    # Fused forward.
    Mutant("fused forward: waits for one copy too few", FUSED, "cp_async_wait<1>();", "cp_async_wait<2>();",
           "fused_forward", type=BF16),
    Mutant("fused forward: no barrier before P V", FUSED, "__syncthreads();  // P and V are there", "", "fused_forward",
           "order", BF16, 60),
    Mutant("fused forward: V overwritten while it is read", FUSED,
           "__syncthreads();  // the keys are there; V, P and the maxima of the last tile are done with", "",
           "fused_forward", "tsan", BF16, 20),
    Mutant("fused forward: maxima read before they are there", FUSED,
           "__syncthreads();  // the maxima are there; the keys are done with", "", "fused_forward", "tsan", BF16, 20),
    Mutant("fused forward: keys beyond the last", FUSED, "bias && j < op.keys ? bias[j]", "bias ? bias[j]",
           "fused_forward", "asan", BF16, 60),
    Mutant("fused forward: padding counts as keys", FUSED, "j >= op.keys ? kLowest : s", "j >= op.keys ? 0.0f : s",
           "fused_forward", type=BF16),
    Mutant("fused forward: the sign of the scale lost", FUSED, "s * op.sign + more", "s + more", "fused_forward",
           type=BF16),
    Mutant("fused forward: logits scaled before their maximum is off", FUSED,
           "exp2_approx((s[0] - off) * op.magnitude)",
           "exp2_approx(fmaf(s[0], op.magnitude, -(off * op.magnitude)))", "fused_forward", type=BF16),
    Mutant("fused forward: sum not rescaled", FUSED, "          sum[m][h] *= factor;\n", "", "fused_forward",
           type=BF16),
    Mutant("fused forward: sum as rounded not rescaled", FUSED, "          stored[m][h] *= factor;\n", "",
           "fused_forward", type=BF16),
    Mutant("fused forward: output rescaled by another row's factor", FUSED, "*= correction[m][e % 4 / 2];",
           "*= correction[m][0];", "fused_forward", type=BF16),
    Mutant("fused forward: splits leave out a tile", OUTPUT, "end = key_tiles * (split + 1) / op.splits;",
           "end = key_tiles * (split + 1) / op.splits - (split > 0);", "fused_forward", type=BF16),
    Mutant("fused forward: maxima of the first batch element", OUTPUT,
           "if (op.maxima) op.maxima[at.b * op.queries + i] = most[m][h];", "if (op.maxima) op.maxima[i] = most[m][h];",
           "fused_forward", type=BF16),
    Mutant("fused forward: queries beyond the last are written", OUTPUT,
           "if (i >= op.queries || first + c >= op.group_channels", "if (first + c >= op.group_channels",
           "fused_forward", "asan", BF16, 60),
    Mutant("fused forward: channels of the next group of warps", OUTPUT,
           "first + c >= op.group_channels || channel >= op.channels) continue;", "channel >= op.channels) continue;",
           "fused_forward", "tsan", BF16, 60),
    Mutant("fused forward: results overwrite statistics that are read", OUTPUT,
           "if (first >= op.group_channels) break;\n    __syncthreads();", "if (first >= op.group_channels) break;",
           "fused_forward", "tsan", BF16, 40),
    Mutant("split merge: parts not weighted", OUTPUT, "weight[s][threadIdx.x] = factor;", "weight[s][threadIdx.x] = 1;",
           "fused_forward", type=BF16),
    Mutant("split merge: no barrier after the weights", OUTPUT, "  __syncthreads();\n\n  const int64_t end_query",
           "  const int64_t end_query", "fused_forward", "order", BF16),
    Mutant("split merge: parts by the wrong stride", OUTPUT, "partial[part * op.channels * s]", "partial[part * s]",
           "fused_forward", type=BF16),
    # Fused map of the backward.
    Mutant("fused map: chunk read before it has come", FUSED_MAP,
           "cp_async_wait<0>();\n    __syncthreads();  // this chunk is there",
           "cp_async_wait<1>();\n    __syncthreads();  // this chunk is there", "fused_backward", type=BF16),
    Mutant("fused map: a buffer overwritten while it is read", FUSED_MAP,
           "    __syncthreads();  // this chunk is there; the other buffer is done with\n", "", "fused_backward",
           "tsan", BF16, 20),
    Mutant("fused map: results overwrite operands that are read", FUSED_MAP,
           "  __syncthreads();  // the operands are done with: results go out through their memory\n", "",
           "fused_backward", "tsan", BF16, 20),
    Mutant("fused map: padding counts as queries", FUSED_MAP,
           "std::numeric_limits<float>::infinity();\n"
           "        row_factor[n][half][u] = inside ? step.row_factor.element(b)[i] : 0.0f;",
           "0.0f;\n        row_factor[n][half][u] = inside ? step.row_factor.element(b)[i] : 1.0f;",
           "fused_backward", type=BF16),
    Mutant("fused map: the rows' factor left out", FUSED_MAP, "inside ? step.row_factor.element(b)[i]", "inside ? 1.0f",
           "fused_backward", type=BF16),
    Mutant("fused map: no barrier before the results leave", FUSED_MAP,
           "= sum;\n    }\n  __syncthreads();\n\n  const int64_t left", "= sum;\n    }\n\n  const int64_t left",
           "fused_backward", "order", BF16, 60),
    Mutant("fused map: sums of every tile of queries in one place", FUSED_MAP,
           "* column_blocks + first_column / kMapTile] = sum;", "* column_blocks] = sum;", "fused_backward", type=BF16),
    Mutant("fused map: Delta left out", FUSED_MAP, "dp[n][m][half][2 * h + u], delta[n][half][u])",
           "dp[n][m][half][2 * h + u], 0.0f)", "fused_backward", type=BF16),
    Mutant("fused map: bias left out", FUSED_MAP, "* step.sign + bias - shift", "* step.sign - shift", "fused_backward",
           type=BF16),
    Mutant("fused map: lines beyond the pitch", FUSED_MAP, "    if (first_column + c >= step.pitch) continue;\n", "",
           "fused_backward", "asan", BF16, 40),
    Mutant("fused map: 32-bit index", FUSED_MAP,
           "const int64_t to = (b * step.rows + first_row + r) * step.pitch + first_column + c;",
           "const int64_t to = static_cast<int>((b * step.rows + first_row + r) * step.pitch + first_column + c);",
           "overflow"),
    Mutant("fused map: float16 scale of P left in dS", FUSED_MAP,
           "softmax_jacobian(p[u], dp", "softmax_jacobian(factor * p[u], dp",
           "fused_backward", type=F16),
    # Index overflow elsewhere.
    Mutant("affine: 32-bit index", AFFINE, "out[i * op.out.position + c * op.out.channel] = result;",
           "out[static_cast<int>(i * op.out.position + c * op.out.channel)] = result;", "overflow"),
    Mutant("column sums: 32-bit index", REDUCE,
           "double(wide(column[i * x.position])) * (w ? double(w[i]) : 1.0);\n      }\n      sums",
           "double(wide(column[static_cast<int>(i * x.position)])) * (w ? double(w[i]) : 1.0);\n      }\n      sums",
           "overflow"),
]
# fmt: on

# Found within seconds; one of each kind. The short form of the suite.
SHORT = [
    "column sums: no barrier before the warps' sums are added",
    "column sums: channels beyond the last are read",
    "softmax: the next row overwrites statistics that are read",
    "affine: gamma of the first batch element",
    "row backward: Delta left out",
    "row backward: columns beyond the last reach Delta",
    "row backward: 32-bit index",
]
