"""Mutants of Hopper's ring, map of the backward pass and wrappers of instructions (ops/pairwise/hopper)."""

from functools import partial

from mutant import BF16, F16, Mutant

RING, MAP = "ops/pairwise/hopper/ring.cuh", "ops/pairwise/hopper/backward_map.cuh"
PTX_SM90 = "core/cuda/ptx_sm90.cuh"
GIVE_KEYS_BACK = "      if (op.keys_stay && !then.has_keys_of(at)) key_ring.release();\n"
LOGITS = (
    "      by_order(op.key.channel_first, op.query.channel_first,\n               "
    "[&](auto left, auto right) { multiply_logits<decltype(left)::value, decltype(right)::value>(s); });\n"
)

of_backward = partial(Mutant, gate="hopper_backward", type=BF16)
of_overflow = partial(Mutant, gate="overflow")

MUTANTS = [
    # The ring and operands.
    of_backward(
        "ring: a stage is filled before it is empty",
        RING,
        "    mbarrier_wait(ring.empty + at.stage, at.parity ^ 1);\n",
        "",
        cases=30,
    ),
    of_backward("ring: waits for the wrong phase of an empty stage", RING, "at.parity ^ 1);", "at.parity);", cases=10),
    of_backward(
        "ring: waits for the wrong phase of a full stage",
        RING,
        "mbarrier_wait(ring.full + at.stage, at.parity);",
        "mbarrier_wait(ring.full + at.stage, at.parity ^ 1);",
        cases=30,
    ),
    of_backward(
        "ring: a stage is read before it has come",
        RING,
        "    mbarrier_wait(ring.full + at.stage, at.parity);\n",
        "",
        cases=30,
    ),
    of_backward("ring: the phase never changes", RING, "stage = 0, parity ^= 1;", "stage = 0;", cases=60),
    of_backward(
        "ring: one warp empties a stage",
        RING,
        "mbarrier_init(empty + s, kConsumerWarps);",
        "mbarrier_init(empty + s, 1);",
        cases=30,
    ),
    of_backward(
        "ring: every lane empties a stage",
        RING,
        "if (threadIdx.x % kWarp == 0) mbarrier_arrive",
        "mbarrier_arrive",
        cases=30,
    ),
    of_backward(
        "ring: a lane gives back what others of its warp still read",
        RING,
        "    __syncwarp();  // lanes of a warp do not wait together\n",
        "",
        mode="tsan",
        cases=12,
    ),
    of_backward(
        "operands: the first batch element of all",
        RING,
        "const int batch = shared_batch ? 0 : static_cast<int>(b)",
        "const int batch = 0",
        cases=60,
    ),
    of_backward(
        "operands: every box of a channel-first tile is the first",
        RING,
        "first + box * kBox, channel",
        "first, channel",
        cases=90,
    ),
    of_backward(
        "operands: boxes of a channel-first tile in one place",
        RING,
        "tile + box * kBoxBytes, map",
        "tile, map",
        cases=60,
    ),
    of_backward(
        "operands: rows taken for channel-first",
        RING,
        "return !(x.channel == 1 &&",
        "return (x.channel == 1 &&",
        cases=10,
    ),
    of_backward(
        "operands: descriptor with the wrong stride",
        RING,
        "kBoxBytes, kPatternBytes);",
        "kBoxBytes, kSwizzleBytes);",
        cases=30,
    ),
    of_backward(
        "operands: descriptor with the wrong leading offset",
        RING,
        "16 : kBoxBytes, kPatternBytes",
        "16 : kPatternBytes, kPatternBytes",
        cases=90,
    ),
    of_backward(
        "operands: k across the rows advanced as along them",
        RING,
        ": kProductDepth * kSwizzleBytes;",
        ": kProductDepth * 2;",
        cases=60,
    ),
    of_backward(
        "operands: k along the rows advanced too far", RING, "kProductDepth * 2 :", "kProductDepth * 4 :", cases=30
    ),
    of_backward(
        "descriptor: no swizzle",
        PTX_SM90,
        "field(stride_bytes) << 32 | kSwizzle128",
        "field(stride_bytes) << 32",
        cases=10,
    ),
    of_backward("descriptor: advanced by bytes", PTX_SM90, "descriptor + (bytes >> 4)", "descriptor + bytes", cases=30),
    # The map of the backward.
    of_backward(
        "hopper map: barriers used before their init",
        MAP,
        "    fence_mbarrier_init();\n  }\n  __syncthreads();",
        "    fence_mbarrier_init();\n  }",
        mode="order",
        cases=20,
    ),
    of_backward(
        "hopper map: fewer bytes announced than loaded",
        MAP,
        "producer.fill(2 * kMapOperand,",
        "producer.fill(kMapOperand,",
        cases=10,
    ),
    of_backward("hopper map: no fence before the products", MAP, "  wgmma_fence();\n", "", cases=10),
    of_backward("hopper map: products not committed", MAP, "  wgmma_commit();\n", "", cases=10),
    of_backward(
        "hopper map: logits read before their products end",
        MAP,
        "    wgmma_wait<0>();\n    ring.release();\n  }\n\n  // dP'",
        "    ring.release();\n  }\n\n  // dP'",
        cases=30,
    ),
    of_backward(
        "hopper map: a stage of logits given back while it is read",
        MAP,
        "      wgmma_wait<1>();\n      if (!of_same_stage) ring.release();  // the one before\n",
        "      if (!of_same_stage) ring.release();\n      wgmma_wait<1>();\n",
        mode="order",
        cases=60,
    ),
    of_backward(
        "hopper map: stages of dP' given back while they are read",
        MAP,
        "      wgmma_wait<1>();\n      for (int left",
        "      for (int left",
        mode="order",
        cases=60,
    ),
    of_backward(
        "hopper map: dP' read before its products end",
        MAP,
        "    wgmma_wait<0>();\n    for (int left",
        "    for (int left",
        cases=30,
    ),
    of_backward("hopper map: stages of the lead kept", MAP, "left = chunk == lead ? lead : 1;", "left = 1;", cases=60),
    of_backward(
        "hopper map: added to what registers held",
        MAP,
        "op.keys_stay ? stage : stage + kMapOperand, false);",
        "op.keys_stay ? stage : stage + kMapOperand, true);",
        cases=60,
    ),
    of_backward(
        "hopper map: both warpgroups multiply the first keys",
        MAP,
        "keys + threadIdx.x / kWarpgroup * kBoxBytes",
        "keys",
        cases=90,
    ),
    of_backward(
        "hopper map: statistics overwritten while they are read",
        MAP,
        "    named_barrier(kConsumerBarrier, kConsumers);  // those of the last tile are done with\n",
        "",
        mode="order",
        cases=90,
    ),
    of_backward(
        "hopper map: statistics read before they are there",
        MAP,
        "delta[threadIdx.x] = own.delta;\n    named_barrier(kConsumerBarrier, kConsumers);\n",
        "delta[threadIdx.x] = own.delta;\n",
        mode="tsan",
        cases=12,
    ),
    of_backward(
        "hopper map: statistics of the next tile",
        MAP,
        "      share(own);\n      next = load_statistics(then);\n",
        "      next = load_statistics(then);\n      share(next);\n",
        cases=60,
    ),
    of_backward(
        "hopper map: bias of the block's first tile",
        MAP,
        "      next = load_statistics(then);\n",
        "      next = load_statistics(then);\n      next.bias[0] = own.bias[0], next.bias[1] = own.bias[1];\n",
        cases=60,
    ),
    of_backward(
        "hopper map: rows beyond the last, four at a time",
        MAP,
        "      if ((turn + kTogether - 1) * kRows >= left) break;\n",
        "",
        mode="asan",
        cases=40,
    ),
    of_backward(
        "hopper map: the rows that are not four are left out",
        MAP,
        "for (; turn < kTurns && turn * kRows < left; ++turn)",
        "for (; turn < 0; ++turn)",
        cases=60,
    ),
    of_backward("hopper map: Delta left out", MAP, "e % 2 ? mean[k].hi : mean[k].lo);", "0.0f);", cases=60),
    of_backward("hopper map: bias left out", MAP, "* step.sign + own.bias[e / 2] - ", "* step.sign - ", cases=60),
    of_backward(
        "hopper map: bias of another row",
        MAP,
        "int64_t(at.first_row) + row + 8 * h;\n      if (step.bias.data",
        "int64_t(at.first_row) + row;\n      if (step.bias.data",
        cases=60,
    ),
    of_backward(
        "hopper map: a row's sum of two lanes", MAP, "other <= 2; other *= 2", "other <= 1; other *= 2", cases=60
    ),
    of_backward(
        "hopper map: sums of every tile of queries in one place",
        MAP,
        "* op.column_tiles + at.first_column / kMapTile] = sum[h];",
        "* op.column_tiles] = sum[h];",
        cases=90,
    ),
    of_backward(
        "hopper map: lanes write what others have not stored",
        MAP,
        "  // rows that a warp writes at once\n    __syncwarp();\n",
        "  // rows that a warp writes at once\n",
        mode="tsan",
        cases=12,
    ),
    of_backward(
        "hopper map: lines beyond the pitch",
        MAP,
        "    if (at.first_column + c >= step.pitch) return;\n",
        "",
        mode="asan",
        cases=40,
    ),
    of_backward(
        "hopper map: float16 scale of P left in dS",
        MAP,
        "p = (e % 2 ? by[k].hi : by[k].lo) * exp2_approx",
        "p = kStored * (e % 2 ? by[k].hi : by[k].lo) * exp2_approx",
        type=F16,
        cases=60,
    ),
    # The keys that stay, and the walk.
    of_backward(
        "hopper map: keys read before they have come",
        MAP,
        "keys = key_ring.next();",
        "keys = memory + kMapKeys;",
        cases=30,
    ),
    of_backward(
        "hopper map: keys given back while they are read",
        MAP,
        LOGITS + GIVE_KEYS_BACK,
        GIVE_KEYS_BACK + LOGITS,
        mode="order",
        cases=60,
    ),
    of_backward(
        "hopper map: keys that are never given back",
        MAP,
        GIVE_KEYS_BACK,
        "",
        cases=60,
    ),
    of_backward("hopper map: keys of another batch element", MAP, "b == other.b && first_row", "first_row", cases=90),
    of_backward("hopper map: the first 64 channels of the keys", MAP, "? left + kMapOperand :", "? left :", cases=60),
    of_backward(
        "hopper map: half of a stage of queries is not loaded",
        MAP,
        "< op.logit_chunks ? 2 : 1);",
        "< 0 ? 2 : 1);",
        cases=60,
    ),
    of_backward(
        "hopper map: the first half of a stage twice",
        MAP,
        "op.keys_stay && !of_same_stage ? stage :",
        "op.keys_stay ? stage :",
        cases=60,
    ),
    of_backward(
        "hopper map: a stage given back after its first half",
        MAP,
        "      if (!of_same_stage) ring.release();  // the one before\n",
        "      ring.release();\n",
        cases=60,
    ),
    of_backward("walk: every block keeps its keys", MAP, "keeps = column < columns;", "keeps = true;", cases=90),
    of_backward("walk: the first band of all", MAP, "row_tile = band * op.band + row;", "row_tile = row;", cases=60),
    of_backward("walk: bands go on in the next batch element", MAP, "band = 0, ++b;", "++b;", cases=60),
    of_backward(
        "walk: queries left out by those that keep their keys",
        MAP,
        "if (turn < 0) turn += op.band, ++column;",
        "if (turn < 0) turn += op.band, column += 2;",
        cases=90,
    ),
    of_backward(
        "walk: queries left out by those that keep nothing",
        MAP,
        "row -= op.band, ++column;",
        "row -= op.band, column += 2;",
        cases=90,
    ),
    of_overflow(
        "hopper map: 32-bit index",
        MAP,
        "(at.b * step.rows + at.first_row + r) * step.pitch + at.first_column + c;",
        "static_cast<int>((at.b * step.rows + at.first_row + r) * step.pitch + at.first_column + c);",
    ),
    of_backward(
        "hopper map: registers that nobody gave up", MAP, "    fewer_registers<kProducerRegisters>();\n", "", cases=10
    ),
]
