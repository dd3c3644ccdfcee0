// out = gelu_tanh(x Wg') * (x Wu') for a few hundred rows of x, in one launch: gate and up are never written.
//
// W's rows are the M side of the product and tokens its N side, so that NT, any multiple of 8, fits the tokens. A block
// takes 128 features: each of two warpgroups 64 rows of gate and the matching 64 of up, so that a thread holds both of
// a feature and token. One thread copies (a ring of STAGES, 128 bytes of K each), running ahead into the next tile
// while the warpgroups finish theirs. The two blocks of a cluster have the same tokens and fetch half of x each, for
// both: a quarter less for the L2 to give.
//
// The result goes through shared memory: [token][64 features] a warpgroup, beside the ring where there is room, else
// (HELD) in place of the warpgroup's own part of the last stages that it multiplied, which it then gives back late.
//
// EIGHT: E4M3 in and out, both with a scale for each token; out's comes from the token's sum of squares, which bounds
// its gate and up, so that nothing waits for a row's largest value. Then W comes by maps that put features 2i and
// 2i + 1 into rows i and i + 8 of a sixteen: a thread holds them as the two bytes of a 16-bit word, and words is what
// stmatrix transposes. Otherwise bf16 in and out.
//
// Macros: EIGHT, NT, STAGES, CLUSTER (1, 2), HELD, PDL, SPIN_LIMIT, SHARED (bytes of a block). wgmma_common.cu comes
// first, and before it ``product`` for NT (gate_up_product.py). K has more than 128 bytes.

constexpr int CONSUMERS = 256;
constexpr int FEATURES = 128;             // of a block
constexpr int W_PART = 16384;             // of a warpgroup in a stage: 64 rows of gate, 64 of up
constexpr int W_BYTES = 2 * W_PART;
constexpr int X_BYTES = NT * 128;
constexpr int STAGE_BYTES = W_BYTES + X_BYTES;
// halves of x in whole eights of rows: with an odd number of them both blocks fetch the middle one
constexpr int X_ROWS = CLUSTER == 2 ? (NT + 15) / 16 * 8 : NT;
constexpr int EXPECTED = W_BYTES + CLUSTER * X_ROWS * 128;
constexpr int TOKEN_BYTES = EIGHT ? 64 : 128;  // of a warpgroup's features
constexpr int PIECES = NT * TOKEN_BYTES > W_PART ? 2 : 1;
constexpr int FIRST = PIECES == 1 ? NT : (NT + 15) / 16 * 8;  // tokens of the first piece
constexpr int STAGING = HELD ? 0 : PIECES * FIRST * TOKEN_BYTES;
constexpr int AT_STAGING = STAGES * STAGE_BYTES;
constexpr int AT_SCALES = AT_STAGING + 2 * STAGING;
constexpr int AT_BARRIERS = AT_SCALES + (EIGHT ? 2 * NT * 6 : 0);
static_assert(AT_BARRIERS + 16 * STAGES <= SHARED, "shared memory");
static_assert(NT % 8 == 0 && NT <= 256 && FIRST * TOKEN_BYTES <= W_PART, "tile");
static_assert(HELD ? STAGES > PIECES : STAGES > 1, "stages");

struct alignas(64) Arguments {
    u8 gate[128], up[128];  // tensor maps: boxes of 64 rows
    u8 x[128];              // boxes of X_ROWS rows
    u8 out[2][128];         // boxes of FIRST and of NT - FIRST tokens, 64 features
    const float* row_scale; // [tokens], where EIGHT: of x
    const float* squares;   // [tokens], of x's rows as they were before they were rounded
    float* out_scale;       // [tokens]: squares * out_factor, about
    int tokens, features, token_tiles, pairs;
    int chunks;             // stages of K
    float weight_scale, out_factor;
};

struct Block {
    u32 memory, rank;
    __device__ __forceinline__ u32 w(u32 stage) const { return memory + stage * STAGE_BYTES; }
    __device__ __forceinline__ u32 x(u32 stage) const { return w(stage) + W_BYTES; }
    __device__ __forceinline__ u32 full(u32 stage) const { return memory + AT_BARRIERS + stage * 16; }
    __device__ __forceinline__ u32 empty(u32 stage) const { return full(stage) + 8; }
};

// first feature and token of a cluster's tile: the tiles of the same features follow each other
struct Tile {
    int feature, token;
    __device__ __forceinline__ Tile(const Arguments& a, int pair, u32 rank)
        : feature((pair / a.token_tiles * CLUSTER + rank) * FEATURES), token(pair % a.token_tiles * NT) {}
};

// ---------------------------------------------------------------------------------------------------------- copies
#if EIGHT
__device__ __forceinline__ void copy_w(u32 to, const void* map, int chunk, int feature, u32 bar) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, 0, 0, %3}], [%4];"
        ::"r"(to), "l"(map), "r"(chunk * 128), "r"(feature / 16), "r"(bar) : "memory");
}
#else
__device__ __forceinline__ void copy_w(u32 to, const void* map, int chunk, int feature, u32 bar) {
    copy_box(to, map, chunk * 64, feature, bar);
}
#endif

__device__ __forceinline__ void fetch_w(const Arguments& a, const Block& b, u32 stage, const Tile& tile, int chunk) {
    const u32 bar = b.full(stage);
    expect(bar, EXPECTED);
#pragma unroll
    for (int wg = 0; wg < 2; wg++) {
        const u32 to = b.w(stage) + wg * W_PART;
        copy_w(to, a.gate, chunk, tile.feature + wg * 64, bar);
        copy_w(to + W_PART / 2, a.up, chunk, tile.feature + wg * 64, bar);
    }
}

__device__ __forceinline__ void fetch_x(const Arguments& a, const Block& b, u32 stage, const Tile& tile, int chunk) {
    const int column = chunk * (EIGHT ? 128 : 64), row = b.rank * (NT - X_ROWS);
    if (CLUSTER == 2) copy_box_to(b.x(stage) + row * 128, a.x, column, tile.token + row, b.full(stage), 3);
    else copy_box(b.x(stage), a.x, column, tile.token, b.full(stage));
}

__device__ void produce(const Arguments& a, const Block& b, int first, int step) {
    prefetch_map(a.gate);
    prefetch_map(a.up);
    prefetch_map(a.x);
    const int early = a.chunks < STAGES ? a.chunks : STAGES;
    const Tile begin(a, first, b.rank);
    for (int i = 0; i < early; i++) fetch_w(a, b, i, begin, i);
    wait_for_predecessor();
    let_dependents_start();
    for (int i = 0; i < early; i++) fetch_x(a, b, i, begin, i);
    RingPlace<STAGES> ring;
    for (int pair = first; pair < a.pairs; pair += step) {
        const Tile tile(a, pair, b.rank);
        for (int i = 0; i < a.chunks; i++) {
            if (pair != first || i >= early) {
                await(b.empty(ring.stage), ring.phase ^ 1);
                fetch_w(a, b, ring.stage, tile, i);
                fetch_x(a, b, ring.stage, tile, i);
            }
            ring.next();
        }
    }
}

// --------------------------------------------------------------------------------------------------------- results
__device__ __forceinline__ void store_box(const void* map, int column, int row, u32 from) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(column),
                 "r"(row), "r"(from) : "memory");
}
__device__ __forceinline__ void stores_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// until every store of this thread has read its shared memory
__device__ __forceinline__ void stores_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// gelu_tanh(g) * 2 u
__device__ __forceinline__ float twice_geglu(float g, float u) {
    float t, inner = g * fmaf(0.035677408136300125f, g * g, 0.7978845608028654f);
    asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(inner));  // 2^-11: FP8 keeps 2^-4
    return fmaf(g, t, g) * u;
}

struct Consumer {
    const Arguments& a;
    const Block& b;
    u32 wg, warp, lane;  // warpgroup, warp in it
    RingPlace<STAGES> ring;
    float gate[NT / 2], up[NT / 2];

    // this warp has read the stage: to every block that copies into it
    __device__ __forceinline__ void release(u32 stage) {
        if (CLUSTER == 1) {
            if (lane == 0) arrive(b.empty(stage));
        } else if (lane < CLUSTER) {
            arrive_at(b.empty(stage), lane);
        }
    }
    __device__ __forceinline__ void release_of_warpgroup(u32 stage) {
#pragma unroll
        for (u32 rank = 0; rank < CLUSTER; rank++)
            asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0], 4;" ::"r"(
                CLUSTER == 1 ? of_rank(b.empty(stage), b.rank) : of_rank(b.empty(stage), rank)) : "memory");
    }
    // the ring's stage ``back`` stages before the next
    __device__ __forceinline__ u32 stage_before(u32 back) const {
        return ring.stage >= back ? ring.stage - back : ring.stage + STAGES - back;
    }
    __device__ __forceinline__ u32 staging(u32 piece) const {
        if (HELD) return b.w(stage_before(1 + piece)) + wg * W_PART;
        return b.memory + AT_STAGING + wg * STAGING + piece * (FIRST * TOKEN_BYTES);
    }
    // [NT] of gate and up, float32; behind them [NT] half of out's inverse, bf16
    __device__ __forceinline__ u32 scales() const { return b.memory + AT_SCALES + wg * (NT * 6); }

    __device__ __forceinline__ void tile_products(bool first) {
#pragma unroll 1
        for (int i = 0; i < a.chunks; i++) {
            const u32 stage = ring.stage;
            await(b.full(stage), ring.phase);
            const u64 w = operand(b.w(stage) + wg * W_PART), x = operand(b.x(stage));
            products_begin();
#pragma unroll
            for (int k = 0; k < 4; k++) {
                product(gate, w + 2 * k, x + 2 * k, i > 0 || k > 0);
                product(up, w + W_PART / 2 / 16 + 2 * k, x + 2 * k, i > 0 || k > 0);
            }
            products_commit();
            products_wait<1>();  // the stage before is read
            if (i > 0) {
                if (!(HELD && PIECES == 2 && i == a.chunks - 1)) release(stage_before(1));
            } else if (HELD && !first && warp == 0 && lane == 0) {
                stores_read();  // of the tile before
#pragma unroll
                for (u32 piece = PIECES; piece > 0; piece--) release_of_warpgroup(stage_before(piece));
            }
            ring.next();
        }
        products_wait<0>();
        pin(gate);
        pin(up);
        if (!HELD) release(stage_before(1));
    }

    __device__ __forceinline__ void load_scales(const Tile& tile) {
        for (int t = warp * 32 + lane; t < NT; t += 128) {
            const int token = tile.token + t;
            const bool inside = token < a.tokens;
            const float scale = inside ? a.row_scale[token] * a.weight_scale : 0.0f;
            // of a row of zeros, too, the inverse is finite; NaN stays NaN
            const u16 half = to_bf16(__fdividef(0.5f, max_or_nan(inside ? a.squares[token] * a.out_factor : 1.0f, 1e-30f)));
            if (inside && tile.feature == 0 && wg == 0) a.out_scale[token] = __fdividef(0.5f, low_of(half));
            asm volatile("st.shared.f32 [%0], %1;" ::"r"(scales() + t * 4), "f"(scale) : "memory");
            asm volatile("st.shared.u16 [%0], %1;" ::"r"(scales() + NT * 4 + t * 2), "h"(half) : "memory");
        }
    }

    // features 2q, 2q + 1 (a byte each) of tokens 8j + 2(lane % 4) and the next (a half each)
    __device__ __forceinline__ u32 bytes_of(int j) const {
        const u32 at = scales(), token = 8 * j + 2 * (lane % 4);
        float2 s;
        u32 halves;
        asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(s.x), "=f"(s.y) : "r"(at + token * 4));
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(halves) : "r"(at + NT * 4 + token * 2));
        const float hx = s.x * low_of(halves), hy = s.y * high_of(halves);
        return pack_e4m3(twice_geglu(gate[4 * j] * s.x, up[4 * j] * hx), twice_geglu(gate[4 * j + 2] * s.x, up[4 * j + 2] * hx),
                         twice_geglu(gate[4 * j + 1] * s.y, up[4 * j + 1] * hy),
                         twice_geglu(gate[4 * j + 3] * s.y, up[4 * j + 3] * hy));
    }
    // feature q + 8 half of those tokens
    __device__ __forceinline__ u32 pair_of(int j, int half) const {
        const int i = 4 * j + 2 * half;
        return pack_bf16(geglu(gate[i], up[i]), geglu(gate[i + 1], up[i + 1]));
    }

    // [token][64 features], 16-byte columns permuted as the tensor store expects them
    __device__ __forceinline__ void stage_piece(u32 to, int begin, int end) {
        const u32 row = lane % 8, matrix = lane / 8;
        if constexpr (EIGHT) {
            const u32 at = to + lane * 64 + ((warp ^ row / 2) % 4) * 16;
#pragma unroll
            for (int j = begin; j < end; j += 4) {
                if (j + 4 <= end) {
                    const u32 r[4] = {bytes_of(j), bytes_of(j + 1), bytes_of(j + 2), bytes_of(j + 3)};
                    transpose4(at + (j - begin) * 512, r);
                } else {
#pragma unroll
                    for (int i = j; i < end; i++) transpose1(at - matrix * 512 + (i - begin) * 512, bytes_of(i));
                }
            }
        } else {
            const u32 at = to + (matrix / 2 * 8 + row) * 128 + ((2 * warp + matrix % 2) ^ row) * 16;
#pragma unroll
            for (int j = begin; j < end; j += 2) {
                if (j + 2 <= end) {
                    const u32 r[4] = {pair_of(j, 0), pair_of(j, 1), pair_of(j + 1, 0), pair_of(j + 1, 1)};
                    transpose4(at + (j - begin) * 1024, r);
                } else {
                    transpose2(at + (j - begin) * 1024, pair_of(j, 0), pair_of(j, 1));
                }
            }
        }
    }

    __device__ __forceinline__ void finish(const Tile& tile) {
        if (!HELD && warp == 0 && lane == 0) stores_read();
        named_barrier(1 + wg, 128);  // all of the warpgroup has read its operands; the staging memory is free
        stage_piece(staging(0), 0, FIRST / 8);
        if constexpr (PIECES == 2) stage_piece(staging(1), FIRST / 8, NT / 8);
        publish_to_tensor_core();
        named_barrier(1 + wg, 128);
        if (warp == 0 && lane == 0) {
            const int feature = tile.feature + wg * 64;
            if (feature < a.features) {
                store_box(a.out[0], feature, tile.token, staging(0));
                if (PIECES == 2) store_box(a.out[1], feature, tile.token + FIRST, staging(1));
            }
            stores_commit();
        }
    }
};

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(CONSUMERS + 128, 1)
    gate_up_product(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(1024) u8 memory[];
    const Block b{shared_address(memory), blockIdx.x % CLUSTER};
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first = blockIdx.x / CLUSTER, step = gridDim.x / CLUSTER;
    if (threadIdx.x == 0) {
        for (u32 s = 0; s < STAGES; s++) {
            barrier_init(b.full(s), 1);
            barrier_init(b.empty(s), CONSUMERS / 32 * CLUSTER);  // freed by every block that this block's copies go to
        }
        barriers_initialised();
    }
    __syncthreads();
    if (CLUSTER > 1) cluster_meet();
    if (warp >= CONSUMERS / 32) {
        fewer_registers<24>();
        if (warp == CONSUMERS / 32 && lane == 0) produce(a, b, first, step);
        __syncwarp();
    } else {
        more_registers<240>();
        Consumer c{a, b, warp / 4, warp % 4, lane};
#pragma unroll
        for (int i = 0; i < NT / 2; i++) c.gate[i] = c.up[i] = 0.0f;
        wait_for_predecessor();
        for (int pair = first; pair < a.pairs; pair += step) {
            const Tile tile(a, pair, b.rank);
            if (EIGHT) c.load_scales(tile);
            c.tile_products(pair == first);
            c.finish(tile);
        }
        if (c.warp == 0 && lane == 0) stores_read();
        __syncwarp();
    }
    // nobody leaves while a peer may still free a stage here
    if (CLUSTER > 1) asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;" ::: "memory");
}
