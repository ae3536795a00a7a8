// FP8 block GEMM on Hopper's tensor cores: D (rows, columns) = A (rows, k) @ B (columns, k).T, e4m3 with
// 1x128 scales for A and 128x128 scales for B.
//
// One block of threads a multiprocessor. One thread feeds a ring of stages through the copy engine; one warp
// brings the scales, with asynchronous copies that count on the same barriers; each warpgroup multiplies 64
// rows by TILE_N columns. 128 values of k are summed by the tensor core and added in float32 after scaling:
// while one warpgroup adds, the other one's product keeps the tensor core busy.
//
// Compile-time choices, defined by the host (see tiles.py):
//   TILE_N      columns of a tile, a multiple of 16 (of 8 where k is split) up to 192
//   STAGES      slots of the ring
//   WARPGROUPS  2 (128 rows) or 1 (64 rows)
//   A_ROWS      rows of A fetched for a tile: fewer than the tile's when the problem has fewer
//   SHARE_A     1: two tiles beside each other run in a cluster, and each fetches half of their A for both
//   SHARE_B     1: two tiles one below the other do, with B; both 1: a cluster of two by two
//   SPLIT       blocks of a cluster that share one tile, each with its part of k (then one tile a cluster)
//   GROUPING    0 dense, 1 contiguous (an expert for each block of rows), 2 masked (slots and a count each)
//   PACKED      1: the scales of four neighbouring rows of A lie in 16 aligned bytes
//   OUT_HALF    1: fp16 output, 0: bf16
//   PIPELINE    sets of registers for products not yet added: 0 one, 1 two
//   TURNS       of a step's four products, how many end before the other warpgroup may begin; 0: no order

#include "hopper.cuh"
#include "wgmma.cuh"  // multiply(): one m64 n(TILE_N) k32 product, written out by the host

constexpr int TILE_M = 64 * WARPGROUPS;
constexpr int CONSUMERS = WARPGROUPS * 128;
constexpr int K_BYTES = 128;  // one step of k, and the width of the swizzle
constexpr int PEERS = 1 + SHARE_A + SHARE_B;  // blocks that fill a block's memory, itself among them
constexpr int CLUSTER = (1 + SHARE_A) * (1 + SHARE_B) * SPLIT;
constexpr int A_BYTES = TILE_M * K_BYTES;
constexpr int B_BYTES = TILE_N * K_BYTES;
constexpr int FETCHED = A_ROWS * K_BYTES + B_BYTES;
constexpr int COLUMN_GROUPS = TILE_N / 8;  // 4 registers of each thread: 8 columns of 2 rows
constexpr int SLICE = (COLUMN_GROUPS + SPLIT - 1) / SPLIT;  // the most of them that one block of a split tile finishes
// Finished rows leave through shared memory in boxes this wide, swizzled over their own width.
constexpr int BOX = TILE_N % 64 == 0 ? 64 : TILE_N % 32 == 0 ? 32 : 16;
constexpr int OUT_BYTES = SPLIT == 1 ? TILE_M * TILE_N * 2 : (SPLIT - 1) * SLICE * CONSUMERS * 16;
constexpr int SCALES = TILE_M + 4;  // of A, then up to three of B, padded to 16 bytes
constexpr int THREADS = CONSUMERS + 128;

struct Problem {
  const float* a_scales;
  const float* b_scales;
  const int* groups;  // contiguous: expert of each block of rows, -1 for none; masked: rows in use of each
  void* out;
  long long a_expert_stride;  // of a_scales, in elements, as the next two
  int a_row_stride, a_step_stride;
  int rows, columns, steps;
  int experts, slots, block_log;
  int tiles_m, tiles_n;  // in clusters: two tiles wide when they share A, two high when they share B
  int band_log;          // rows of tiles walked together, so that their B stays in L2
  u32 tiles_n_inverse;   // 2^31 / tiles_n, rounded up
  int out_stride;
};

// ---- barriers and copies that only this kernel needs -----------------------------------------------------

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ void arrive_at(u32 barrier, u32 rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(remote(barrier, rank)) : "memory");
}

// `fetch_box` for several blocks of the cluster, at the same place in each one's memory.
__device__ __forceinline__ void fetch_box_for(
    u32 to, const TensorMap* map, int x, int y, u32 barrier, unsigned short blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(barrier), "h"(blocks)
      : "memory");
}

__device__ __forceinline__ void prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void copy_word(u32 to, const float* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void copy_words(u32 to, const float* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ float read(u32 from) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(from) : "memory");
  return x;
}

__device__ __forceinline__ u32 pack(float low, float high) {
  u32 both;
  if constexpr (OUT_HALF)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// ---- the walk over tiles ---------------------------------------------------------------------------------

struct Tile {
  int row;        // first row, of A and of the output
  int expert_row; // the same, counted within a masked expert
  int n;          // column of tiles
  int expert;
};

// Where a block stands in its cluster: tiles beside each other are neighbours in rank.
struct Place {
  u32 rank;
  __device__ __forceinline__ u32 right() const { return SHARE_A ? rank & 1 : 0; }
  __device__ __forceinline__ u32 below() const { return !SHARE_B ? 0 : SHARE_A ? rank >> 1 : rank; }
  __device__ __forceinline__ unsigned short sharers_of_a() const { return 3 << 2 * below(); }
  __device__ __forceinline__ unsigned short sharers_of_b() const { return SHARE_A ? 5 << right() : 3; }
};

// Rows of tiles are taken a band at a time, down before across: the tiles in flight then share their A and
// their B in L2. Masked tiles are found by walking the experts' counts, which every role does for itself.
template <class Visit>
__device__ __forceinline__ void walk(const Problem& p, Place place, Visit visit) {
  int cursor = 0, begin = 0;
  for (int tile = blockIdx.x / CLUSTER;; tile += gridDim.x / CLUSTER) {
    int tiles_m = p.tiles_m, local = tile, expert = 0;
    if constexpr (GROUPING == 2) {
      for (; cursor < p.experts; ++cursor) {
        tiles_m = (__ldg(p.groups + cursor) + TILE_M - 1) / TILE_M;  // clusters never share B here
        if (tile < begin + tiles_m * p.tiles_n) break;
        begin += tiles_m * p.tiles_n;
      }
      if (cursor == p.experts) return;
      local = tile - begin;
      expert = cursor;
    } else if (tile >= tiles_m * p.tiles_n) {
      return;
    }
    int band = (int)((u64)(u32)(local >> p.band_log) * p.tiles_n_inverse >> 31);
    int within = local - (band * p.tiles_n << p.band_log);
    int rows = tiles_m - (band << p.band_log), full = 1 << p.band_log;
    int row, n;
    if (rows >= full)
      row = within & (full - 1), n = within >> p.band_log;
    else
      row = within % rows, n = within / rows;  // the last band
    row = ((band << p.band_log) + row) * TILE_M;
    if constexpr (SHARE_B) row = row * 2 + place.below() * TILE_M;
    if constexpr (SHARE_A) n = n * 2 + place.right();
    if constexpr (GROUPING == 1) expert = __ldg(p.groups + (row >> p.block_log));
    if (expert >= 0) visit(Tile{(GROUPING == 2 ? expert * p.slots : 0) + row, row, n, expert});
    if constexpr (SPLIT > 1) return;
  }
}

// ---- roles -----------------------------------------------------------------------------------------------

struct Shared {
  u32 a, b, out, scales, full, empty;
};

struct Steps {
  int first, last;
};

__device__ __forceinline__ void feed(
    const Problem& p, const Shared& s, Steps steps, Place place, const TensorMap* a_map, const TensorMap* b_map) {
  unsigned short for_a = place.sharers_of_a(), for_b = place.sharers_of_b();
  Ring ring;
  walk(p, place, [&](Tile t) {
    int b_row = t.expert * p.columns + t.n * TILE_N;
    for (int k = steps.first; k < steps.last; ++k, ring.next(STAGES)) {
      u32 full = s.full + ring.slot * 8;
      wait(s.empty + ring.slot * 8, ring.phase ^ 1);
      expect(full, FETCHED);
      u32 a = s.a + ring.slot * A_BYTES;
      u32 b = s.b + ring.slot * B_BYTES;
      u32 across = place.right(), down = place.below();
      if constexpr (SHARE_A)
        fetch_box_for(a + across * (A_BYTES / 2), a_map, k * K_BYTES, t.row + across * (TILE_M / 2), full, for_a);
      else
        fetch_box(a, a_map, k * K_BYTES, t.row, full);
      if constexpr (SHARE_B)
        fetch_box_for(b + down * (B_BYTES / 2), b_map, k * K_BYTES, b_row + down * (TILE_N / 2), full, for_b);
      else
        fetch_box(b, b_map, k * K_BYTES, b_row, full);
    }
  });
}

// A lane brings the scales of four rows: neighbours in one copy, or a warp's width apart in four.
__device__ __forceinline__ void bring_scales(const Problem& p, const Shared& s, Steps steps, Place place, u32 lane) {
  constexpr int COPIES = PACKED ? 1 : (A_ROWS + 31) / 32;
  Ring ring;
  int b_rows = (p.columns + 127) / 128;
  bool fetches = !PACKED || lane * 4 < A_ROWS;
  walk(p, place, [&](Tile t) {
    const float* a[COPIES];
    const float* b = p.b_scales + (long long)t.expert * b_rows * p.steps + steps.first;
    b += min(t.n * TILE_N / 128 + (int)(lane & 3), b_rows - 1) * p.steps;
#pragma unroll
    for (int i = 0; i < COPIES; ++i) {
      int row = (GROUPING == 2 ? t.expert_row : t.row) + (PACKED ? lane * 4 : i * 32 + lane);
      if constexpr (GROUPING == 0) row = min(row, (p.rows - 1) & (PACKED ? ~3 : ~0));
      a[i] = p.a_scales + (GROUPING == 2 ? t.expert * p.a_expert_stride : 0);
      a[i] += (long long)row * p.a_row_stride + (long long)steps.first * p.a_step_stride;
    }
    for (int k = steps.first; k < steps.last; ++k, ring.next(STAGES)) {
      u32 to = s.scales + ring.slot * (SCALES * 4);
      wait(s.empty + ring.slot * 8, ring.phase ^ 1);
#pragma unroll
      for (int i = 0; i < COPIES; ++i, a[i - 1] += p.a_step_stride) {
        if constexpr (!PACKED)
          copy_word(to + i * 128 + lane * 4, a[i]);
        else if (fetches)
          copy_words(to + lane * 16, a[i]);
      }
      if (lane < 3) copy_word(to + (TILE_M + lane) * 4, b);
      ++b;
      asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(s.full + ring.slot * 8) : "memory");
    }
  });
}

template <int N>
__device__ __forceinline__ void wait_for_products(float (&x)[TILE_N / 2]) {
  wait_for_products<N>();
  pin(x);
}

struct Warp {
  u32 rank, group, lane;
  u32 scale_row;  // where its first row's scale lies within a stage's
};

// One step's product of 64 rows and TILE_N columns, from column `n`, sent to the tensor core.
__device__ __forceinline__ void send(const Shared& s, const Ring& ring, const Warp& w, int n, float (&part)[TILE_N / 2]) {
  u64 a = operand(s.a + ring.slot * A_BYTES + w.group * (64 * K_BYTES));
  u64 b = operand(s.b + ring.slot * B_BYTES + n * K_BYTES);
  pin(part);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    multiply(part, a + i * 2, b + i * 2, i != 0);
    if (TURNS > 0 && i + 1 == TURNS && i < 3) asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  }
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void release(const Shared& s, const Ring& ring, const Warp& w) {
  if constexpr (PEERS > 1) {
    if (w.lane < PEERS) arrive_at(s.empty + ring.slot * 8, w.rank ^ w.lane);
  } else {
    if (w.lane == 0) arrive(s.empty + ring.slot * 8);
  }
}

// Products of A's two scales of this thread with the up to three of B: `FORMER` groups of 8 columns lie under the
// first of B, the next 16 under the second.
template <int FORMER>
struct Scales {
  static constexpr int BLOCKS = FORMER == COLUMN_GROUPS ? 1 : FORMER + 16 >= COLUMN_GROUPS ? 2 : 3;
  float low[BLOCKS], high[BLOCKS];

  __device__ __forceinline__ Scales(const Shared& s, const Ring& ring, const Warp& w) {
    u32 at = s.scales + ring.slot * (SCALES * 4);
    float of_low = read(at + w.scale_row), of_high = read(at + w.scale_row + 32);
#pragma unroll
    for (int i = 0; i < BLOCKS; ++i) {
      float of_b = read(at + (TILE_M + i) * 4);
      low[i] = of_low * of_b, high[i] = of_high * of_b;
    }
  }

  template <int FROM>
  __device__ __forceinline__ void add(float (&acc)[TILE_N / 2], const float (&part)[TILE_N / 2]) const {
#pragma unroll
    for (int i = 0; i < TILE_N / 8; ++i) {
      int group = FROM + i, block = group < FORMER ? 0 : group < FORMER + 16 ? 1 : 2;
      acc[4 * group] += part[4 * i] * low[block];
      acc[4 * group + 1] += part[4 * i + 1] * low[block];
      acc[4 * group + 2] += part[4 * i + 2] * high[block];
      acc[4 * group + 3] += part[4 * i + 3] * high[block];
    }
  }
};

// One tile. With one set of registers for products, the warpgroups take turns on the tensor core.
template <int FORMER>
__device__ __forceinline__ void accumulate(
    const Shared& s, Steps steps, Ring& ring, const Warp& w, float (&acc)[TILE_N / 2]) {
#pragma unroll
  for (int i = 0; i < TILE_N / 2; ++i) acc[i] = 0.0f;
  if constexpr (PIPELINE == 0) {
    float part[TILE_N / 2] = {};
    for (int k = steps.first; k < steps.last; ++k, ring.next(STAGES)) {
      wait(s.full + ring.slot * 8, ring.phase);
      if constexpr (TURNS > 0) asm volatile("bar.sync %0, 256;" ::"r"(3 + w.group) : "memory");
      send(s, ring, w, 0, part);
      Scales<FORMER> scales(s, ring, w);
      if constexpr (TURNS > 0 && TURNS < 4) asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
      if constexpr (TURNS > 0 && TURNS < 4) asm volatile("bar.arrive %0, 256;" ::"r"(4 - w.group) : "memory");
      wait_for_products<0>(part);
      if constexpr (TURNS == 4) asm volatile("bar.arrive %0, 256;" ::"r"(4 - w.group) : "memory");
      release(s, ring, w);
      scales.template add<0>(acc, part);
    }
  }
  // Two sets of registers for a step each: the next product is under way while the last is added.
  if constexpr (PIPELINE == 1) {
    float even[TILE_N / 2] = {}, odd[TILE_N / 2] = {};
    auto step = [&](float (&now)[TILE_N / 2], float (&ahead)[TILE_N / 2]) {
      Ring next = ring;
      next.next(STAGES);
      Scales<FORMER> scales(s, ring, w);
      wait(s.full + next.slot * 8, next.phase);
      send(s, next, w, 0, ahead);
      wait_for_products<1>(now);
      release(s, ring, w);
      scales.template add<0>(acc, now);
      ring = next;
    };
    auto finish = [&](float (&now)[TILE_N / 2]) {
      Scales<FORMER> scales(s, ring, w);
      wait_for_products<0>(now);
      release(s, ring, w);
      scales.template add<0>(acc, now);
      ring.next(STAGES);
    };
    int k = steps.first;
    wait(s.full + ring.slot * 8, ring.phase);
    send(s, ring, w, 0, even);
    for (; k + 2 < steps.last; k += 2) {
      step(even, odd);
      step(odd, even);
    }
    if (k + 2 == steps.last) {
      step(even, odd);
      finish(odd);
    } else {
      finish(even);
    }
  }
}

__device__ constexpr int gcd(int a, int b) { return b ? gcd(b, a % b) : a; }
constexpr int OFFSETS = gcd(TILE_N, 128);  // a tile starts at a multiple of this within a scale block

__device__ constexpr int former_groups(int offset) { return (128 - offset < TILE_N ? 128 - offset : TILE_N) / 8; }

// Picks the copy of the loop for this offset; offsets that split the tile alike share one.
template <int OFFSET, class... Rest>
__device__ __forceinline__ void accumulate_at(int offset, Rest&... rest) {
  constexpr int next = OFFSET + OFFSETS;
  if constexpr (next < 128 && former_groups(next) == former_groups(OFFSET)) {
    accumulate_at<next>(offset, rest...);
  } else {
    if (next >= 128 || offset <= OFFSET)
      accumulate<former_groups(OFFSET)>(rest...);
    else if constexpr (next < 128)
      accumulate_at<next>(offset, rest...);
  }
}

__device__ __forceinline__ void barrier_of(u32 warpgroup) {
  asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory");
}

// A warpgroup's 64 finished rows: rounded, transposed into boxes, and sent off by the copy engine.
__device__ __forceinline__ void write(
    const Shared& s, const TensorMap* out_map, Tile t, u32 warpgroup, u32 warp, u32 lane, float (&acc)[TILE_N / 2]) {
  u32 buffer = s.out + warpgroup * (64 * TILE_N * 2);
  bool sender = warp == 0 && lane == 0;
  if (sender) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
  barrier_of(warpgroup);
  u32 row = warp * 16 + (lane & 15);
  u32 swizzle = BOX == 64 ? row & 7 : BOX == 32 ? (row >> 1) & 3 : (row >> 2) & 1;
#pragma unroll
  for (int i = 0; i < TILE_N / 16; ++i) {
    u32 unit = (i % (BOX / 16)) * 2 + (lane >> 4);  // of 16 bytes, within the box's row
    u32 to = buffer + (i / (BOX / 16)) * (64 * BOX * 2) + row * (BOX * 2) + ((unit ^ swizzle) << 4);
    float* x = acc + 8 * i;
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(pack(x[0], x[1])),
                 "r"(pack(x[2], x[3])), "r"(pack(x[4], x[5])), "r"(pack(x[6], x[7]))
                 : "memory");
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  barrier_of(warpgroup);
  if (sender) {
#pragma unroll
    for (int i = 0; i < TILE_N / BOX; ++i)
      store_box(out_map, t.n * TILE_N + i * BOX, t.row + warpgroup * 64, buffer + i * (64 * BOX * 2));
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
  }
}

// Blocks that share a tile hand each other the groups of columns they do not finish: block r finishes groups
// [share(r), share(r + 1)).
__device__ constexpr int share(int rank) { return rank * COLUMN_GROUPS / SPLIT; }

__device__ __forceinline__ u32 slot(const Shared& s, u32 from, int group, u32 thread) {
  return s.out + ((from * SLICE + group) * CONSUMERS + thread) * 16;
}

__device__ __forceinline__ void hand_over(const Shared& s, u32 rank, u32 thread, float (&acc)[TILE_N / 2]) {
#pragma unroll
  for (int to = 0; to < SPLIT; ++to) {
    if (to == (int)rank) continue;
    u32 there = remote(slot(s, rank - (rank > to), 0, thread), to);
#pragma unroll
    for (int i = share(to); i < share(to + 1); ++i) {
      float* x = acc + 4 * i;
      asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(there + (i - share(to)) * CONSUMERS * 16),
                   "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
                   : "memory");
    }
  }
}

// The parts are added in the order of the blocks, whoever finishes them: the same bits every time.
__device__ __forceinline__ void finish(
    const Problem& p, const Shared& s, Tile t, u32 rank, u32 thread, float (&acc)[TILE_N / 2]) {
  u32 lane = thread % 32;
  int row = t.row + thread / 32 * 16 + lane / 4;
#pragma unroll
  for (int mine = 0; mine < SPLIT; ++mine) {
    if (mine != (int)rank) continue;
#pragma unroll
    for (int i = share(mine); i < share(mine + 1); ++i) {
      float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int from = 0; from < SPLIT; ++from) {
        float x[4] = {acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]};
        if (from != mine)
          asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                       : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
                       : "r"(slot(s, from - (from > mine), i - share(mine), thread))
                       : "memory");
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[j] += x[j];
      }
      int column = t.n * TILE_N + i * 8 + (int)(lane % 4) * 2;
      if (column < p.columns) {  // columns are a multiple of 8: a pair is inside or outside
        u32* out = (u32*)p.out + ((long long)row * p.out_stride + column) / 2;
        if (row < p.rows) out[0] = pack(sum[0], sum[1]);
        if (row + 8 < p.rows) out[4 * (long long)p.out_stride] = pack(sum[2], sum[3]);
      }
    }
  }
}

__device__ __forceinline__ void consume(
    const Problem& p, const Shared& s, Steps steps, Place place, u32 thread, const TensorMap* out_map) {
  Ring ring;
  u32 warpgroup = __shfl_sync(~0u, thread / 128, 0);  // the same in every lane, and now the compiler knows
  u32 warp = __shfl_sync(~0u, thread / 32 % 4, 0), lane = thread % 32;
  Warp w{place.rank, warpgroup, lane};  // opaque, or the compiler computes the row anew from the thread's number at every step
  asm volatile("mov.u32 %0, %1;" : "=r"(w.scale_row) : "r"((warpgroup * 64 + warp * 16 + lane / 4) * 4));
  if (TURNS > 0 && warpgroup == 1) asm volatile("bar.arrive 3, 256;" ::: "memory");  // the first turn is the other's
  walk(p, place, [&](Tile t) {
    float acc[TILE_N / 2];
    accumulate_at<0>(t.n * TILE_N % 128, s, steps, ring, w, acc);
    if constexpr (SPLIT == 1) {
      write(s, out_map, t, warpgroup, warp, lane, acc);
    } else {
      hand_over(s, place.rank, thread, acc);
      cluster_sync();
      finish(p, s, t, place.rank, thread, acc);
    }
  });
}

// Clusters of one are not asked for: they are dealt to the multiprocessors in another order, in which neighbours
// find less of each other's operands on the way to L2 (908 against 790 us at 4096 x 7168 x 16384, H100).
#if SHARE_A || SHARE_B || SPLIT > 1
#define IN_CLUSTER __cluster_dims__(CLUSTER, 1, 1)
#else
#define IN_CLUSTER
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1) IN_CLUSTER fp8_gemm(
    const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
    const __grid_constant__ TensorMap out_map, const __grid_constant__ Problem p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  Shared s;
  s.a = address(memory);
  s.b = s.a + STAGES * A_BYTES;
  s.out = s.b + STAGES * B_BYTES;
  s.scales = s.out + OUT_BYTES;
  s.full = s.scales + STAGES * SCALES * 4;
  s.empty = s.full + STAGES * 8;
  u32 thread = threadIdx.x, rank = CLUSTER > 1 ? cluster_rank() : 0;
  if (thread == CONSUMERS) {
    prefetch(&a_map);
    prefetch(&b_map);
  }
  if (thread == 0) {
    if constexpr (SPLIT == 1) prefetch(&out_map);
    for (int i = 0; i < STAGES; ++i) {
      init(s.full + i * 8, 1 + 32);  // the feeding thread, the warp with the scales
      init(s.empty + i * 8, CONSUMERS / 32 * PEERS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if constexpr (CLUSTER > 1)
    cluster_sync();
  else
    __syncthreads();
  Place place{rank};
  int part = SPLIT > 1 ? rank : 0;
  Steps steps{part * p.steps / SPLIT, (part + 1) * p.steps / SPLIT};
  if (thread >= CONSUMERS) {
    if constexpr (WARPGROUPS == 2) asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    u32 warp = thread / 32 - CONSUMERS / 32, lane = thread % 32;
    if (warp == 0 && lane == 0) feed(p, s, steps, place, &a_map, &b_map);
    if (warp == 1) bring_scales(p, s, steps, place, lane);
    __syncwarp();
    if constexpr (SPLIT > 1) cluster_sync();
  } else {
    if constexpr (WARPGROUPS == 2) asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
    consume(p, s, steps, place, thread, &out_map);
    if constexpr (SPLIT == 1) {
      if (thread % 128 == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    }
  }
  // A block's memory must outlive the other's copies into it.
  if constexpr (PEERS > 1) {
    __syncwarp();
    cluster_sync();
  }
}
