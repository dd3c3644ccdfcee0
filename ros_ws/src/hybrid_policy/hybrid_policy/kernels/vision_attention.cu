// Attention of a vision transformer's layer, for Hopper: at most 256 keys a view, short heads.
//
// A block is TILES tiles of 64 query rows, of one head of one view. Queries, keys and values come by tensor copies from
// the stacked projection, whose map has a dimension of its own for heads, so that what a box reads beyond a head is
// zero: 64 columns in rows of 128 bytes, then sixteens in rows of 32, both swizzled. The blocks of a cluster are of one
// head and view; each fetches its share of keys and values for all of them, because what the L2 gives is the bound. A
// block waits for all that is sent to it, so nothing can come to one that has ended.
//
// A tile is a warpgroup's. Its keys come in parts of PART: while the values of one are multiplied, the special-function
// units work out the next one's softmax.
//
// Macros: TOKENS, HEADS, HEAD_DIM, TILES, CLUSTER, PART, QUANTISE, PDL, SPIN_LIMIT. wgmma_common.cu comes first, and before
// it ``scores_step``, ``values_wide`` and ``values_narrow`` (vision_attention.py).

constexpr int WIDTH = HEADS * HEAD_DIM;
constexpr int WIDE = HEAD_DIM / 64;                 // boxes of 64 columns
constexpr int NARROW = (HEAD_DIM % 64 + 15) / 16;   // of 16
constexpr int ROW_BYTES = 128 * WIDE + 32 * NARROW;
constexpr int PARTS = TOKENS / PART;
constexpr int THREADS = 128 * TILES;
constexpr int BLOCKS = TOKENS / 64 / TILES;         // of a head and view
constexpr int PIECES = HEAD_DIM / 8;
constexpr int PIECE = QUANTISE ? 8 : 16;            // bytes of eight results
constexpr int OUT_STRIDE = (PIECES | 1) * PIECE;    // no two rows of a warp's store in one bank
constexpr int Q_ROW = ROW_BYTES > OUT_STRIDE ? ROW_BYTES : OUT_STRIDE;
constexpr int Q_BYTES = (64 * Q_ROW + 1023) / 1024 * 1024;  // of a tile; its results take the queries' place
constexpr int KEYS_AT = TILES * Q_BYTES;
constexpr int VALUES_AT = KEYS_AT + TOKENS * ROW_BYTES;
static_assert(WIDE <= 1 && HEAD_DIM % 8 == 0, "head");
static_assert(TOKENS % PART == 0 && PART % 64 == 0 && TOKENS / 64 % TILES == 0 && BLOCKS % CLUSTER == 0, "tiles");

struct __align__(64) Arguments {
    u8 wide[128];       // tensor maps (head dim, row, 3 * HEADS) of bf16 qkv: boxes of 64 rows and 64 columns
    u8 narrow[128];     // ... and 16 columns
    void* out;          // bf16 [views * TOKENS, WIDTH], or e4m3 where QUANTISE
    float scale_log2;   // HEAD_DIM ** -0.5 * log2(e)
    float inverse;      // of the scale of out, where QUANTISE
};

// The box of ``map`` from a column and row of a head; with a cluster, to the same place in each of its blocks.
template <bool FOR_ALL>
__device__ __forceinline__ void copy_head_box(u32 to, const void* map, int column, int row, int head, u32 bar) {
    if (FOR_ALL)
        asm volatile(
            "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
            "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(head), "r"(bar),
            "h"((u16)((1 << CLUSTER) - 1)) : "memory");
    else
        asm volatile(
            "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
            "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(head), "r"(bar) : "memory");
}

// 64 rows of a head as rows ``at`` and on of a matrix of ROWS rows in shared memory
template <int ROWS, bool FOR_ALL>
__device__ __forceinline__ void copy_rows(const Arguments& a, u32 matrix, int at, int row, int head, u32 bar) {
    if (WIDE) copy_head_box<FOR_ALL>(matrix + at * 128, a.wide, 0, row, head, bar);
#pragma unroll
    for (int j = 0; j < NARROW; j++)
        copy_head_box<FOR_ALL>(matrix + (WIDE * 128 + j * 32) * ROWS + at * 32, a.narrow, 64 * WIDE + 16 * j, row, head, bar);
}

// A shared operand of rows of 32 bytes, their halves swapped in every other four rows, as tensor copies leave them.
__device__ __forceinline__ u64 narrow_operand(u32 address) {
    return (u64)((address & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)16 << 32 | (u64)3 << 62;
}

// s = q k' of 64 queries and the keys from ``first`` on
__device__ __forceinline__ void start_scores(float (&s)[PART / 2], u32 q, u32 keys, int first) {
    const u64 q_wide = operand(q), k_wide = operand(keys + first * 128);
    const u64 q_narrow = narrow_operand(q + WIDE * 8192), k_narrow = narrow_operand(keys + WIDE * 128 * TOKENS + first * 32);
    products_begin();
#pragma unroll
    for (int k = 0; k < 4 * WIDE; k++) scores_step(s, q_wide + 2 * k, k_wide + 2 * k, k > 0);
#pragma unroll
    for (int j = 0; j < NARROW; j++)  // addresses in a descriptor count 16 bytes
        scores_step(s, q_narrow + j * (64 * 32 >> 4), k_narrow + j * (TOKENS * 32 >> 4), WIDE || j > 0);
    products_commit();
}

// 64 rows of results: eights of columns 8 j + 2 (lane % 4) + {0, 1} of rows g and g + 8 a thread
struct Sums {
    float wide[32];
    float narrow[NARROW ? NARROW : 1][8];

    __device__ __forceinline__ void scale(const float (&by)[2]) {
#pragma unroll
        for (int i = 0; i < 32 * WIDE; i++) wide[i] *= by[i / 2 % 2];
#pragma unroll
        for (int j = 0; j < NARROW; j++)
#pragma unroll
            for (int i = 0; i < 8; i++) narrow[j][i] *= by[i / 2 % 2];
    }
    // what the last product left
    __device__ __forceinline__ void there() {
        products_wait<0>();
        if (WIDE) pin(wide);
#pragma unroll
        for (int j = 0; j < NARROW; j++) pin(narrow[j]);
    }
    __device__ __forceinline__ float at(int piece, int i) const {
        return piece < 8 * WIDE ? wide[4 * piece + i] : narrow[(piece - 8 * WIDE) / 2][(piece - 8 * WIDE) % 2 * 4 + i];
    }
};

// o (+)= p v of the keys from ``first`` on
__device__ __forceinline__ void start_values(Sums& o, const u32 (&p)[PART / 4], u32 values, int first, bool add) {
    const u64 wide = operand(values + first * 128), narrow = narrow_operand(values + WIDE * 128 * TOKENS + first * 32);
    products_begin();
#pragma unroll
    for (int k = 0; k < PART / 16; k++) {
        if (WIDE) values_wide(o.wide, p + 4 * k, wide + k * (16 * 128 >> 4), add || k > 0);
#pragma unroll
        for (int j = 0; j < NARROW; j++)
            values_narrow(o.narrow[j], p + 4 * k, narrow + ((j * TOKENS + k * 16) * 32 >> 4), add || k > 0);
    }
    products_commit();
}

// One part's scores to unnormalised probabilities, and what everything before it counts for now.
__device__ __forceinline__ void softmax_part(
    float (&s)[PART / 2], u32 (&p)[PART / 4], float (&top)[2], float (&sum)[2], float (&correction)[2], float scale, bool first) {
    float best[2] = {first ? s[0] : top[0], first ? s[2] : top[1]}, shift[2];
#pragma unroll
    for (int i = 0; i < PART / 2; i++) best[i / 2 % 2] = fmaxf(best[i / 2 % 2], s[i]);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        best[r] = quad_max(best[r]);
        shift[r] = best[r] * scale;
        correction[r] = first ? 0.0f : exp2_of((top[r] - best[r]) * scale);
        sum[r] = first ? 0.0f : sum[r] * correction[r];
        top[r] = best[r];
    }
#pragma unroll
    for (int i = 0; i < PART / 4; i++) {
        float low = exp2_of(s[2 * i] * scale - shift[i % 2]), high = exp2_of(s[2 * i + 1] * scale - shift[i % 2]);
        sum[i % 2] += low + high;
        p[i] = pack_bf16(low, high);
    }
    // a store that never happens: without it the assembler puts the wait that follows before all of the above
    asm volatile("{\n.reg .pred p;\nsetp.lt.f32 p, %0, 0f00000000;\n@p st.shared.f32 [%1], %0;\n}" ::"f"(sum[0] + sum[1]),
                 "r"(0) : "memory");
}

// A warp's sixteen rows, first to ``staged`` and then in whole pieces to ``out``, the first row's place.
__device__ __forceinline__ void write_rows(const Sums& o, const float (&factor)[2], u32 staged, u8* out) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        u32 to = staged + (lane / 4 + 8 * r) * OUT_STRIDE + lane % 4 * (PIECE / 4);
#pragma unroll
        for (int j = 0; j < PIECES; j++) {
            float x = o.at(j, 2 * r) * factor[r], y = o.at(j, 2 * r + 1) * factor[r];
#if QUANTISE
            asm volatile("st.shared.u16 [%0], %1;" ::"r"(to + j * PIECE), "h"(to_e4m3x2(x, y)) : "memory");
#else
            asm volatile("st.shared.u32 [%0], %1;" ::"r"(to + j * PIECE), "r"(pack_bf16(x, y)) : "memory");
#endif
        }
    }
    __syncwarp();
#pragma unroll
    for (int i = lane; i < 16 * PIECES; i += 32) {
        const int row = i / PIECES, piece = i % PIECES;
        u32 from = staged + row * OUT_STRIDE + piece * PIECE;
        u8* to = out + (row * WIDTH + piece * 8) * (PIECE / 8);
#if QUANTISE
        uint2 bytes;
        asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(bytes.x), "=r"(bytes.y) : "r"(from) : "memory");
        *(uint2*)to = bytes;
#else
        uint4 bytes;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(bytes.x), "=r"(bytes.y), "=r"(bytes.z), "=r"(bytes.w) : "r"(from) : "memory");
        *(uint4*)to = bytes;
#endif
    }
}

extern "C" __global__ __launch_bounds__(THREADS) __cluster_dims__(CLUSTER, 1, 1)
void vision_attention(const __grid_constant__ Arguments a) {
    extern __shared__ u8 memory[];
    __shared__ u64 barriers[2 * PARTS];
    const u32 base = (shared_address(memory) + 1023) & ~1023u, keys = base + KEYS_AT, values = base + VALUES_AT;
    const u32 keys_there = shared_address(barriers), values_there = keys_there + 8 * PARTS;
    const int tile0 = blockIdx.x % BLOCKS * TILES, head = blockIdx.x / BLOCKS % HEADS;
    const int first = blockIdx.x / (BLOCKS * HEADS) * TOKENS;  // row of the view
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2 * PARTS; i++) barrier_init(keys_there + 8 * i, 1);
        barriers_initialised();
        for (int i = 0; i < PARTS; i++) {
            expect(keys_there + 8 * i, (PART + (i == 0 ? 64 * TILES : 0)) * ROW_BYTES);
            expect(values_there + 8 * i, PART * ROW_BYTES);
        }
        if (WIDE) prefetch_map(a.wide);
        if (NARROW) prefetch_map(a.narrow);
    }
    __syncthreads();
    if (CLUSTER > 1) cluster_meet();
    wait_for_predecessor();
    let_dependents_start();
    const int mine = CLUSTER > 1 ? cluster_rank() : 0;
    if (threadIdx.x == 0) {
#pragma unroll
        for (int t = 0; t < TILES; t++)
            copy_rows<64, false>(a, base + t * Q_BYTES, 0, first + (tile0 + t) * 64, head, keys_there);
#pragma unroll 1
        for (int i = mine; i < TOKENS / 64; i += CLUSTER)
            copy_rows<TOKENS, (CLUSTER > 1)>(a, keys, i * 64, first + i * 64, HEADS + head, keys_there + i * 64 / PART * 8);
    } else if (threadIdx.x == 32) {
#pragma unroll 1
        for (int i = mine; i < TOKENS / 64; i += CLUSTER)
            copy_rows<TOKENS, (CLUSTER > 1)>(a, values, i * 64, first + i * 64, 2 * HEADS + head, values_there + i * 64 / PART * 8);
    }
    __syncwarp();
    const int tile = threadIdx.x / 128;
    const u32 q = base + tile * Q_BYTES;
    float s[PARTS][PART / 2], top[2], sum[2], correction[2];
    u32 p[PARTS][PART / 4];
    Sums o;
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
        wait(keys_there + 8 * i, 0);
        start_scores(s[i], q, keys, i * PART);
    }
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
        products_wait<PARTS - 1>();  // the oldest part's scores, behind which the others' and a part's values are under way
        pin(s[i]);
        softmax_part(s[i], p[i], top, sum, correction, a.scale_log2, i == 0);
        if (i > 0) {
            o.there();
            o.scale(correction);
        }
        // no branch while values are multiplied: the assembler minds the registers that a product reads up to one alone
        wait(values_there + 8 * i, 0);
        start_values(o, p[i], values, i * PART, i > 0);
    }
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        factor[r] = __fdividef(1.0f, quad_sum(sum[r]));
#if QUANTISE
        factor[r] *= a.inverse;
#endif
    }
    o.there();
    named_barrier(TILES > 1 ? 1 + tile : 0, 128);  // nobody reads the tile's queries any more
    const int warp = threadIdx.x / 32 % 4;
    const long long row = first + (tile0 + tile) * 64 + 16 * warp;
    write_rows(o, factor, q + 16 * warp * OUT_STRIDE, (u8*)a.out + (row * WIDTH + head * HEAD_DIM) * (PIECE / 8));
}
