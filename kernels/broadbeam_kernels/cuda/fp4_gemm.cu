// Products with FP4 weights on Hopper's tensor cores: out (rows, n) = x (rows, k) bf16 @ W (n, k).T, plain or
// with an expert for each block of rows; W is NVFP4 or MXFP4 as fp4_weights.py lays it out.
//
// Weights take the tensor core's row side, from registers: codes become bf16 there, exactly. One thread keeps
// packed tiles and activations coming; each warpgroup owns 64 weight rows and decodes 64 columns of k while
// the 64 before them multiply.
//
// Compile-time choices, defined by the host:
//   TOKENS      rows of x in a tile: 8 to 256; a tile of 256 over two experts' blocks is done as two of 128
//   WARPGROUPS  2 or 4: 128 or 256 weight rows share a tile's activations
//   HALVES      64-column halves of k in a stage: 2, or 1 where activations are large
//   STAGES      slots of the ring
//   SPLIT       blocks of a cluster that share one tile, each with its part of k (then one tile a cluster)
//   RESIDENT    blocks on one multiprocessor
//   AHEAD       stages of weights to fetch while the kernel ahead still runs
//   NVFP4       1: e5m3 scales for 16 columns, 0: E8M0 for 32
//   GROUPED     1: an expert for each block of rows

#include "hopper.cuh"
#include "wgmma.cuh"  // multiply(): one m64 k16 product of as many tokens as its sums say, written out by the host

static_assert(!(GROUPED && SPLIT > 1), "a block without an expert would wait for its cluster");
constexpr int TILES = WARPGROUPS / 2;  // packed tiles of 128 weight rows
constexpr int CONSUMERS = WARPGROUPS * 128;
// Large tiles need more registers than all warps can have: four feeding warps, of which one works, give theirs.
constexpr bool LARGE = TOKENS > 128;
constexpr int THREADS = CONSUMERS + (LARGE ? 128 : 32);
constexpr int X_BYTES = TOKENS * 128;  // of one half
constexpr int CODE_BYTES = 4096;       // of one half of one packed tile
constexpr int SCALE_BYTES = NVFP4 ? 512 : 256;
constexpr int X_STAGE = HALVES * X_BYTES;
constexpr int CODE_STAGE = TILES * HALVES * CODE_BYTES;
constexpr int SCALE_STAGE = TILES * HALVES * SCALE_BYTES;
constexpr int GRAIN = HALVES == 2 ? 4 : 2;  // words of 16 columns that are decoded, then multiplied
constexpr int GROUPS = TOKENS / 8;  // of tokens: what one accumulator register quadruple covers
constexpr int BOX = TOKENS < 128 ? TOKENS : 128;  // tokens that are fetched at once
constexpr int SENT = SPLIT > 1 ? 8 : BOX;  // and sent
constexpr int KEPT = SPLIT > 1 ? (GROUPS + SPLIT - 1) / SPLIT : 1;  // outgoing boxes of a warpgroup at a time
constexpr int OUT_BYTES = KEPT * SENT * 128;
constexpr int SUM_BYTES = KEPT * CONSUMERS * 16;  // what one block of a split tile hands another

// Few tokens: hardly two tiles read the same weights.
constexpr bool ONCE = TOKENS <= 64 || SPLIT > 1;

struct Problem {
  const unsigned char* codes;
  const unsigned char* scales;
  const float* alpha;
  const int* groups;
  int rows;
  int tiles_m, tiles_n;  // of the output
  int packed;            // packed tiles of an expert along n
  int steps;             // k / 128
  int block_rows;        // rows that share an expert
  int group;             // rows of tiles walked together, so that their weights stay in L2
  u32 scale_factor;      // 2^4 (NVFP4) or 2^7: a value the compiler must not know, or it shifts in the busier pipe
};

template <int N>
struct Tile {
  int row;  // first row of x
  int n;    // column of tiles
  int expert;
};

// Divisions, once a tile, and no running count: with a count ptxas no longer sees that all threads walk alike, and
// moves the ring's place from vector registers at every step (4 % at 64 tokens).
template <class Visit>
__device__ __forceinline__ void walk(const Problem& p, Visit& visit) {
  for (int tile = blockIdx.x / SPLIT; tile < p.tiles_m * p.tiles_n; tile += gridDim.x / SPLIT) {
    int first = tile / (p.group * p.tiles_n) * p.group;
    int within = tile - first * p.tiles_n;
    int size = min(p.tiles_m - first, p.group);
    int row = (first + within % size) * TOKENS, n = within / size;
    int expert = GROUPED ? __ldg(p.groups + row / p.block_rows) : 0;
    if constexpr (GROUPED && TOKENS > BOX) {
      int other = row + BOX < p.rows ? __ldg(p.groups + (row + BOX) / p.block_rows) : -1;
      if (expert != other) {
        if (expert >= 0) visit(Tile<BOX>{row, n, expert});
        if (other >= 0) visit(Tile<BOX>{row + BOX, n, other});
        continue;
      }
    }
    if (expert >= 0) visit(Tile<TOKENS>{row, n, expert});
    if constexpr (SPLIT > 1) return;
  }
}

struct Shared {
  u32 x, codes, scales, out, sums, full, empty, summed;
};

struct Steps {
  int first, last;  // in stages
};

struct Feeder {
  const Problem& p;
  const Shared& s;
  Steps steps;
  const TensorMap* x_map;
  Ring ring;
  bool waited = GROUPED || !AHEAD;

  template <int N>
  __device__ __forceinline__ void weights(Tile<N> t, int k, u32 slot) {
    u32 full = s.full + slot * 8;
    expect(full, HALVES * N * 128 + CODE_STAGE + SCALE_STAGE);
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      // Past the last packed tile of an odd number: any data, the rows it makes are not written.
      long long tile = (long long)t.expert * p.packed + min(t.n * TILES + i, p.packed - 1);
      long long half = tile * p.steps * 2 + (long long)k * HALVES;
      u32 to = slot * TILES + i;
      constexpr int codes = HALVES * CODE_BYTES, scales = HALVES * SCALE_BYTES;
      fetch_run<ONCE>(s.codes + to * codes, p.codes + half * CODE_BYTES, codes, full);
      fetch_run<ONCE>(s.scales + to * scales, p.scales + half * SCALE_BYTES, scales, full);
    }
  }

  template <int N>
  __device__ __forceinline__ void activations(Tile<N> t, int k, u32 slot) {
#pragma unroll
    for (int h = 0; h < HALVES; ++h)
#pragma unroll
      for (int i = 0; i < N; i += BOX)
        fetch_box(s.x + slot * X_STAGE + h * X_BYTES + i * 128, x_map, (k * HALVES + h) * 64, t.row + i,
                  s.full + slot * 8);
  }

  template <int N>
  __device__ __forceinline__ void operator()(Tile<N> t) {
    int ahead = steps.first;
    if (!waited) {
      // Nobody writes weights meanwhile: some come while the kernel ahead, which makes x, still runs.
      ahead = min(steps.last, steps.first + min(AHEAD, STAGES));
      for (int k = steps.first; k < ahead; ++k) weights(t, k, k - steps.first);
      wait_for_predecessor();
      let_successor_start();
      waited = true;
    }
    for (int k = steps.first; k < steps.last; ++k, ring.next(STAGES)) {
      if (k >= ahead) {
        wait(s.empty + ring.slot * 8, ring.phase ^ 1);
        weights(t, k, ring.slot);
      }
      activations(t, k, ring.slot);
    }
  }
};

// ---- decoding --------------------------------------------------------------------------------------------

// A thread's codes and scales of one 64 x 64 tile: a word for each 16 columns, two rows' scales side by side.
struct Packed {
  u32 words[4];
  u32 scales[NVFP4 ? 2 : 1];
};

__device__ __forceinline__ Packed read_packed(u32 codes, u32 scales) {
  Packed q;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(q.words[0]), "=r"(q.words[1]), "=r"(q.words[2]), "=r"(q.words[3])
               : "r"(codes)
               : "memory");
  if constexpr (NVFP4)
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(q.scales[0]), "=r"(q.scales[1]) : "r"(scales) : "memory");
  else
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(q.scales[0]) : "r"(scales) : "memory");
  return q;
}

// Two scale bytes -> two bf16, 2^117 times their value.
__device__ __forceinline__ u32 scale_pair(u32 bytes, bool upper, u32 factor) {
  return __byte_perm(bytes, 0, upper ? 0x4342 : 0x4140) * factor + (NVFP4 ? 0x75007500u : 0x3A803A80u);
}

__device__ __forceinline__ u32 times_low(u32 x, u32 pair) {
  u32 y;
  asm("{\n.reg .b16 l, h;\n.reg .b32 s;\nmov.b32 {l, h}, %2;\nmov.b32 s, {l, l};\nmul.rn.bf16x2 %0, %1, s;\n}"
      : "=r"(y)
      : "r"(x), "r"(pair));
  return y;
}

__device__ __forceinline__ u32 times_high(u32 x, u32 pair) {
  u32 y;
  asm("{\n.reg .b16 l, h;\n.reg .b32 s;\nmov.b32 {l, h}, %2;\nmov.b32 s, {h, h};\nmul.rn.bf16x2 %0, %1, s;\n}"
      : "=r"(y)
      : "r"(x), "r"(pair));
  return y;
}

// Eight codes -> four registers of the tensor core's operand. Magnitudes lie over exponent and mantissa, so a
// code becomes 2^-126 times its value (code 1 a denormal), and the scale brings it back to 2^-9.
__device__ __forceinline__ void decode(u32 word, u32 pair, u32* a) {
  constexpr u32 MASK = 0x81C081C0;
  a[0] = times_low((word & 0x81808180) | ((word >> 8) & 0x00400040), pair);
  a[1] = times_high((word << 6) & MASK, pair);
  a[2] = times_low(__funnelshift_l(word, word, 12) & MASK, pair);
  a[3] = times_high((word << 2) & MASK, pair);
}

// ---- multiplying -----------------------------------------------------------------------------------------

struct Thread {
  u32 warpgroup, warp, lane;  // the warp within its warpgroup
};

template <int SUMS>
__device__ __forceinline__ void accumulate(
    const Problem& p, const Shared& s, Steps steps, Thread me, Ring& ring, float (&acc)[SUMS]) {
  u32 codes = s.codes + me.warpgroup / 2 * (HALVES * CODE_BYTES) + me.warpgroup % 2 * (CODE_BYTES / 2) +
              (me.warp * 32 + me.lane) * 16;
  u32 scales = s.scales + me.warpgroup / 2 * (HALVES * SCALE_BYTES) + me.warpgroup % 2 * (SCALE_BYTES / 2) +
               (me.warp * 8 + me.lane / 4) * (SCALE_BYTES / 64);
  u32 a[HALVES][16];
  u32 used = 0;
#pragma unroll
  for (int i = 0; i < SUMS; ++i) acc[i] = 0.0f;
  pin(acc);
  for (int k = steps.first; k < steps.last; ++k) {
    wait(s.full + ring.slot * 8, ring.phase);
    Packed q[HALVES];
#pragma unroll
    for (int h = 0; h < HALVES; ++h)
      q[h] = read_packed(codes + ring.slot * CODE_STAGE + h * CODE_BYTES,
                         scales + ring.slot * SCALE_STAGE + h * SCALE_BYTES);
#pragma unroll
    for (int h = 0; h < HALVES; ++h) {
      u64 b = operand(s.x + ring.slot * X_STAGE + h * X_BYTES);
#pragma unroll
      for (int i = 0; i < 4; i += GRAIN) {
        // Words decode while those before them multiply. Once a stage's worth of products is left, the registers
        // of the oldest are free again, and at the stage's last words the stage before it is.
        wait_for_products<HALVES * 4 / GRAIN - 1>();
        if (h == HALVES - 1 && i == 4 - GRAIN && k > steps.first && me.lane == 0) arrive(s.empty + used * 8);
#pragma unroll
        for (int j = i; j < i + GRAIN; ++j)
          decode(q[h].words[j], scale_pair(q[h].scales[NVFP4 ? j / 2 : 0], NVFP4 ? j % 2 : j / 2, p.scale_factor),
                 a[h] + 4 * j);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int j = i; j < i + GRAIN; ++j)
          multiply(acc, a[h][4 * j], a[h][4 * j + 1], a[h][4 * j + 2], a[h][4 * j + 3], b + 2 * j);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      }
    }
    used = ring.slot;
    ring.next(STAGES);
  }
  wait_for_products<0>();
  pin(acc);
  if (me.lane == 0) arrive(s.empty + used * 8);
}

// ---- writing ---------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 pack(float low, float high) {
  u32 both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

__device__ __forceinline__ void barrier_of(u32 warpgroup) {
  asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory");
}

// Eight tokens of a warp's 16 weight rows, transposed into a box of 64 columns, swizzled over its 128 bytes.
__device__ __forceinline__ void put(u32 box, int token, Thread me, const float* x, float alpha) {
  u32 row = token + me.lane % 8, unit = me.warp * 2 + (me.lane / 8) % 2;
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(
                   box + row * 128 + ((unit ^ (row % 8)) << 4)),
               "r"(pack(x[0] * alpha, x[1] * alpha)), "r"(pack(x[2] * alpha, x[3] * alpha))
               : "memory");
}

template <int N>
__device__ __forceinline__ void write(
    const Shared& s, Tile<N> t, Thread me, const TensorMap* out_map, float alpha, float (&acc)[N / 2]) {
  u32 box = s.out + me.warpgroup * OUT_BYTES;
  bool sender = me.warp == 0 && me.lane == 0;
#pragma unroll
  for (int begin = 0; begin < N; begin += SENT) {
    if (sender) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    barrier_of(me.warpgroup);
#pragma unroll
    for (int i = 0; i < SENT; i += 8) put(box, i, me, acc + (begin + i) / 2, alpha);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    barrier_of(me.warpgroup);
    if (sender) {
      store_box(out_map, (t.n * WARPGROUPS + me.warpgroup) * 64, t.row + begin, box);
      asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    }
  }
}

// Blocks that split a tile's k hand each other the groups of tokens they do not finish: group i is the i-th
// block's, modulo SPLIT.
__device__ __forceinline__ void hand_over(const Shared& s, u32 thread, u32 part, float (&acc)[TOKENS / 2]) {
#pragma unroll
  for (u32 to = 0; to < SPLIT; ++to) {
    if (to == part) continue;
    u32 from = part - (part > to);
    u32 there = remote(s.sums + from * SUM_BYTES + thread * 16, to), summed = remote(s.summed, to);
#pragma unroll
    for (int j = 0; j < KEPT && j * SPLIT + to < GROUPS; ++j)
      send(there + j * (CONSUMERS * 16), summed, acc + 4 * (j * SPLIT + to));
  }
}

// The parts are added in the order of the blocks, whoever finishes them: the same bits every time.
__device__ __forceinline__ void finish(
    const Shared& s, u32 thread, Thread me, u32 part, float alpha, float (&acc)[TOKENS / 2]) {
#pragma unroll
  for (u32 mine = 0; mine < SPLIT; ++mine) {
    if (mine != part) continue;
#pragma unroll
    for (int j = 0; j < KEPT && j * SPLIT + mine < GROUPS; ++j) {
      float* own = acc + 4 * (j * SPLIT + mine);
      float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (u32 from = 0; from < SPLIT; ++from) {
        float x[4] = {own[0], own[1], own[2], own[3]};
        if (from != mine)
          asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                       : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
                       : "r"(s.sums + (from - (from > mine)) * SUM_BYTES + j * (CONSUMERS * 16) + thread * 16)
                       : "memory");
#pragma unroll
        for (int c = 0; c < 4; ++c) sum[c] += x[c];
      }
      put(s.out + me.warpgroup * OUT_BYTES + j * 1024, 0, me, sum, alpha);
    }
  }
}

__device__ __forceinline__ void write_sum(
    const Shared& s, Tile<TOKENS> t, Thread me, u32 part, const TensorMap* out_map, float alpha,
    float (&acc)[TOKENS / 2]) {
  u32 thread = me.warpgroup * 128 + me.warp * 32 + me.lane;
  cluster_wait();  // all blocks run: their memory may be written
  hand_over(s, thread, part, acc);
  wait(s.summed, 0);
  finish(s, thread, me, part, alpha, acc);
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  barrier_of(me.warpgroup);
  if (me.warp == 0 && me.lane == 0) {
    for (int i = part; i < GROUPS; i += SPLIT)
      store_box(out_map, (t.n * WARPGROUPS + me.warpgroup) * 64, t.row + i * 8,
                s.out + me.warpgroup * OUT_BYTES + i / SPLIT * 1024);
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
  }
}

struct Multiplier {
  const Problem& p;
  const Shared& s;
  Steps steps;
  Thread me;
  u32 part;  // of k
  const TensorMap* out_map;
  Ring ring;

  template <int N>
  __device__ __forceinline__ void operator()(Tile<N> t) {
    float acc[N / 2];
    float alpha;  // asked for now: at the end it would be waited for
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(alpha) : "l"(p.alpha + t.expert));
    accumulate(p, s, steps, me, ring, acc);
    if constexpr (SPLIT > 1)
      write_sum(s, t, me, part, out_map, alpha, acc);
    else
      write(s, t, me, out_map, alpha, acc);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) __cluster_dims__(SPLIT, 1, 1) fp4_gemm(
    const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap out_map,
    const __grid_constant__ Problem p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  Shared s;
  s.x = address(memory);
  s.codes = s.x + STAGES * X_STAGE;
  s.out = s.codes + STAGES * CODE_STAGE;
  s.sums = s.out + WARPGROUPS * OUT_BYTES;
  s.scales = s.sums + (SPLIT - 1) * SUM_BYTES;
  s.full = s.scales + STAGES * SCALE_STAGE;
  s.empty = s.full + STAGES * 8;
  s.summed = s.empty + STAGES * 8;
  u32 part = SPLIT > 1 ? cluster_rank() : 0;
  if (threadIdx.x == CONSUMERS) {
    for (int i = 0; i < STAGES; ++i) {
      init(s.full + i * 8, 1);
      init(s.empty + i * 8, CONSUMERS / 32);
    }
    if constexpr (SPLIT > 1) {
      init(s.summed, 1);
      expect(s.summed, (SPLIT - 1) * ((GROUPS - part + SPLIT - 1) / SPLIT) * (CONSUMERS * 16));
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncwarp();
  int stages = p.steps * 2 / HALVES;
  Steps steps{(int)part * stages / SPLIT, (int)(part + 1) * stages / SPLIT};
  bool feeding = threadIdx.x >= CONSUMERS;
  if constexpr (GROUPED || !AHEAD) {  // which expert a block has, the kernel ahead may still be writing
    wait_for_predecessor();
    let_successor_start();
  }
  if constexpr (SPLIT > 1) cluster_arrive();
  if (feeding) {
    asm volatile("bar.arrive 0, %0;" ::"n"(THREADS) : "memory");  // who made the barriers may begin
    if constexpr (LARGE) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == CONSUMERS) {
      Feeder feeder{p, s, steps, &x_map};
      walk(p, feeder);
    }
    __syncwarp();
    if constexpr (SPLIT > 1) cluster_wait();
  } else {
    asm volatile("bar.sync 0, %0;" ::"n"(THREADS) : "memory");
    if constexpr (LARGE) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    Multiplier multiplier{p, s, steps, {threadIdx.x / 128, threadIdx.x / 32 % 4, threadIdx.x % 32}, part, &out_map};
    walk(p, multiplier);
    if (threadIdx.x % 128 == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
  }
}
