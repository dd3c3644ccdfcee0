// Gate and up in NVFP4 W4A16 with GeGLU behind them, for Hopper: out = gelu_tanh(x Wg^T) * (x Wu^T).
//
// W is the register operand of the warpgroup product: a consumer reads its 4-bit words from shared memory and decodes
// them while the tensor core works on the words before; x^T is the shared operand, as the tensor copy engine leaves it.
// Two consumer warpgroups of MT * 64 rows each share x; one producer thread keeps a ring of STAGES full (64 columns of
// x and of W a stage). Rows of gate and up lie by eights (packing.interleave_rows), so a thread holds both of a feature.
//
// Macros: MT, NT tokens a block (a multiple of 8), STAGES, GROUP k steps a commit (1, 2 or 4), BUFFERS commits at a time
// whose fragments are kept (2; 4 with GROUP 1), K_CHUNKS of 64 columns,
// SPLIT 2: the two blocks of a cluster cut K and each finishes one warpgroup's rows; MULTICAST: the two blocks of a
// cluster have different rows and fetch half of x each, for both. SET_REGISTERS: the producer gives registers away.
// FP8_OUT, SQUARES (a norm's row factors), SHIFTS, PDL, TRIGGER (when dependents may start), BLOCKS a multiprocessor.
// Each thread gives a stage back (one for its warp, behind a warp's barrier, is something racecheck does not follow).

constexpr int CLUSTER = SPLIT == 2 || MULTICAST ? 2 : 1;
constexpr int CONSUMERS = 256;
constexpr int THREADS = CONSUMERS + (SET_REGISTERS ? 128 : 32);
constexpr int CHUNKS = K_CHUNKS / SPLIT;
constexpr int SLAB = 4608;  // 128 rows x 64 columns: two halves of 64 rows, words then scales
constexpr int X_STAGE = NT * 128;
constexpr int W_STAGE = MT * SLAB;
constexpr int ELEMENT = FP8_OUT ? 1 : 2;
constexpr int FEATURES = 32 * MT;  // of a warpgroup
constexpr int PITCH = FEATURES * ELEMENT + 16;
constexpr int TOKENS_AT_ONCE = NT < 64 ? NT : 64;
constexpr int STAGING = TOKENS_AT_ONCE * PITCH;
constexpr int RECEIVED = SPLIT == 2 ? NT / 8 * 2048 : 0;
constexpr int AT_W = STAGES * X_STAGE;
constexpr int AT_STAGING = AT_W + STAGES * W_STAGE;
constexpr int AT_RECEIVED = AT_STAGING;  // one warpgroup finishes, and stages its output where it received
constexpr int AT_FACTORS = AT_STAGING + (SPLIT == 2 ? RECEIVED : 2 * STAGING);
constexpr int AT_BARRIERS = AT_FACTORS + (SQUARES ? 2 * NT * 4 : 0);
static_assert(AT_BARRIERS + (3 * STAGES + 1) * 8 <= SHARED, "shared memory");
static_assert(BUFFERS == 2 || (BUFFERS == 4 && GROUP == 1), "buffers");
static_assert(SPLIT == 1 || STAGING <= RECEIVED, "staging");
static_assert(NT % 8 == 0 && (!MULTICAST || NT % 16 == 0) && K_CHUNKS % SPLIT == 0 && (SPLIT == 1 || MT == 1), "tile");

struct alignas(64) Arguments {
    u8 x[128];  // tensor map of bf16 [tokens, K], boxes of 64 columns
    const u8* w;
    const float* row_scale;   // [rows, padded]
    const float* squares;     // [square_tiles, tokens]
    const float* gate_shift;  // [features]
    const float* up_shift;
    const float* out_scale;
    u8* out;  // [tokens, features]
    int tokens, features, row_tiles, token_tiles, square_tiles;
    float columns, eps;
};

struct Block {
    u32 memory, rank;
    __device__ __forceinline__ u32 x(u32 stage) const { return memory + stage * X_STAGE; }
    __device__ __forceinline__ u32 w(u32 stage) const { return memory + AT_W + stage * W_STAGE; }
    __device__ __forceinline__ u32 full_x(u32 stage) const { return memory + AT_BARRIERS + stage * 24; }
    __device__ __forceinline__ u32 full_w(u32 stage) const { return full_x(stage) + 8; }
    __device__ __forceinline__ u32 empty(u32 stage) const { return full_x(stage) + 16; }
    __device__ __forceinline__ u32 received() const { return memory + AT_BARRIERS + STAGES * 24; }
};

// first row tile and first token of a cluster's ``tile``
__device__ __forceinline__ int row_tile_of(const Arguments& p, int tile, u32 rank) {
    return MULTICAST ? tile / p.token_tiles * 2 + rank : tile / p.token_tiles;
}

__device__ __forceinline__ void issue_w(const Arguments& p, const Block& b, u32 stage, int tile, int chunk) {
    const int slab = row_tile_of(p, tile, b.rank) * MT;
    const int k = (SPLIT == 2 ? b.rank * CHUNKS : 0) + chunk;
    expect(b.full_w(stage), W_STAGE);
#pragma unroll
    for (int i = 0; i < MT; i++)
        copy_bulk(b.w(stage) + i * SLAB, p.w + ((size_t)(slab + i) * K_CHUNKS + k) * SLAB, SLAB, b.full_w(stage));
}

__device__ __forceinline__ void issue_x(const Arguments& p, const Block& b, u32 stage, int tile, int chunk) {
    const int token = tile % p.token_tiles * NT;
    const int k = (SPLIT == 2 ? b.rank * CHUNKS : 0) + chunk;
    expect(b.full_x(stage), X_STAGE);
    if constexpr (MULTICAST)
        copy_box_to(b.x(stage) + b.rank * (X_STAGE / 2), p.x, k * 64, token + b.rank * (NT / 2), b.full_x(stage), 3);
    else
        copy_box(b.x(stage), p.x, k * 64, token, b.full_x(stage));
}

__device__ void produce(const Arguments& p, const Block& b, int first, int step, int tiles, int filled) {
    wait_for_predecessor();
    if constexpr (TRIGGER == 1) let_dependents_start();
    RingPlace<STAGES> ring;
    for (int tile = first; tile < tiles; tile += step)
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            if (tile != first || chunk >= filled) {
                wait(b.empty(ring.stage), ring.phase ^ 1);
                issue_w(p, b, ring.stage, tile, chunk);
            }
            issue_x(p, b, ring.stage, tile, chunk);
            ring.next();
        }
}

struct Consumer {
    const Arguments& p;
    const Block& b;
    int wg, warp, lane;  // warpgroup, warp in it
    RingPlace<STAGES> ring;
    u32 last = 0;  // stage whose products are the youngest in flight
    float acc[MT][NT / 2];
    u32 a[BUFFERS][GROUP][MT][4];

    __device__ __forceinline__ void release(u32 stage) {
        if constexpr (MULTICAST)
            arrive_at(b.empty(stage), 0), arrive_at(b.empty(stage), 1);
        else
            arrive(b.empty(stage));
    }

    // 64 columns; BUFFER is the fragments' half where all four k steps are one group
    template <int BUFFER>
    __device__ __forceinline__ void chunk(bool first) {
        const u32 stage = ring.stage;
        wait(b.full_w(stage), ring.phase);
        uint4 words[MT];
        uint2 scales[MT];
#pragma unroll
        for (int i = 0; i < MT; i++) {
            const int slab = MT == 1 ? 0 : wg, half = MT == 1 ? wg : i;
            const u32 at = b.w(stage) + slab * SLAB + half * 2048 + (warp * 32 + lane) * 16;
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(words[i].x), "=r"(words[i].y), "=r"(words[i].z), "=r"(words[i].w) : "r"(at));
            const u32 s_at = b.w(stage) + slab * SLAB + 4096 + half * 256 + (warp * 8 + lane / 4) * 8;
            asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(scales[i].x), "=r"(scales[i].y) : "r"(s_at));
        }
        const u64 x = operand(b.x(stage));
#pragma unroll
        for (int group = 0; group < 4 / GROUP; group++) {
            constexpr bool whole = GROUP == 4;
            const int buffer = whole ? BUFFER : group % BUFFERS;
#pragma unroll
            for (int j = 0; j < GROUP; j++) {
                const int k = group * GROUP + j;
#pragma unroll
                for (int i = 0; i < MT; i++) {
                    const u32 word = k == 0 ? words[i].x : k == 1 ? words[i].y : k == 2 ? words[i].z : words[i].w;
                    decode(a[buffer][j][i], word, k < 2 ? scales[i].x : scales[i].y, k % 2);
                }
            }
            if (group == 0) wait(b.full_x(stage), ring.phase);
            products_begin();
#pragma unroll
            for (int j = 0; j < GROUP; j++)
#pragma unroll
                for (int i = 0; i < MT; i++) product(acc[i], a[buffer][j][i], x + (group * GROUP + j) * 2);
            products_commit();
            products_wait<BUFFERS - 1>();
            if (group == BUFFERS - 2 && !first) release(last);
        }
        last = stage;
        ring.next();
    }

    __device__ __forceinline__ void tile_products() {
#pragma unroll
        for (int i = 0; i < MT; i++) {
#pragma unroll
            for (int j = 0; j < NT / 2; j++) acc[i][j] = 0.0f;
            pin(acc[i]);
        }
#pragma unroll 1
        for (int c = 0; c < CHUNKS; c += 2) {
            chunk<0>(c == 0);
            if (CHUNKS % 2 == 0 || c + 1 < CHUNKS) chunk<1>(false);
        }
        products_wait<0>();
#pragma unroll
        for (int i = 0; i < MT; i++) pin(acc[i]);
        release(last);
    }

    // the other block's part of K; false: this warpgroup has given its own part away
    __device__ __forceinline__ bool exchange() {
        const u32 at = b.memory + AT_RECEIVED + (warp * 32 + lane) * 16;
        if (wg != b.rank) {
            const u32 to = of_rank(at, b.rank ^ 1), bar = of_rank(b.received(), b.rank ^ 1);
#pragma unroll
            for (int j = 0; j < NT / 8; j++)
                send4(to + j * 2048, bar, acc[0][j * 4], acc[0][j * 4 + 1], acc[0][j * 4 + 2], acc[0][j * 4 + 3]);
            return false;
        }
        wait(b.received(), 0);
#pragma unroll
        for (int j = 0; j < NT / 8; j++) {
            float v[4];
            asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                         : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3]) : "r"(at + j * 2048));
#pragma unroll
            for (int i = 0; i < 4; i++) acc[0][j * 4 + i] += v[i];
        }
        named_barrier(1 + wg, 128);
        return true;
    }

    // GeGLU and the stores, TOKENS_AT_ONCE at a time through shared memory
    __device__ __forceinline__ void finish(int row_tile, int first_token) {
        const int row = (row_tile * 2 + wg) * MT * 64 + warp * 16 + lane / 4;
        const int feature = (row_tile * 2 + wg) * FEATURES;
        float scale[MT][2], shift[MT][2] = {};
#pragma unroll
        for (int i = 0; i < MT; i++) {
            scale[i][0] = p.row_scale[row + i * 64], scale[i][1] = p.row_scale[row + i * 64 + 8];
            if constexpr (SHIFTS) {
                const int f = feature + i * 32 + warp * 8 + lane / 4;
                if (f < p.features) shift[i][0] = p.gate_shift[f], shift[i][1] = p.up_shift[f];
            }
        }
        const float out_scale = FP8_OUT ? *p.out_scale : 1.0f;
        const u32 barrier = 1 + wg, thread = warp * 32 + lane;
        const u32 staging = b.memory + AT_STAGING + (SPLIT == 2 ? 0 : wg * STAGING);
        const u32 factors = b.memory + AT_FACTORS + wg * NT * 4;
        if constexpr (SQUARES) {
            wait_for_predecessor();
            for (int t = thread; t < NT; t += 128) {
                float sum = 0.0f;
                if (first_token + t < p.tokens)
                    for (int s = 0; s < p.square_tiles; s++) sum += p.squares[(size_t)s * p.tokens + first_token + t];
                const float factor = rsqrtf(sum / p.columns + p.eps);
                asm volatile("st.shared.f32 [%0], %1;" ::"r"(factors + t * 4), "f"(factor) : "memory");
            }
            named_barrier(barrier, 128);
        }
#pragma unroll
        for (int begin = 0; begin < NT; begin += TOKENS_AT_ONCE) {
            if (begin) named_barrier(barrier, 128);  // the stores before have read
#pragma unroll
            for (int j = 0; j < TOKENS_AT_ONCE / 8; j++) {
                if (begin + j * 8 >= NT) continue;
#pragma unroll
                for (int t = 0; t < 2; t++) {
                    const int token = j * 8 + lane % 4 * 2 + t;
                    float factor = 1.0f;
                    if constexpr (SQUARES)
                        asm volatile("ld.shared.f32 %0, [%1];" : "=f"(factor) : "r"(factors + (begin + token) * 4));
#pragma unroll
                    for (int i = 0; i < MT; i++) {
                        float g = acc[i][(begin / 8 + j) * 4 + t] * scale[i][0];
                        float u = acc[i][(begin / 8 + j) * 4 + t + 2] * scale[i][1];
                        if constexpr (SQUARES) g *= factor, u *= factor;
                        if constexpr (SHIFTS) g += shift[i][0], u += shift[i][1];
                        const float y = geglu(g, u);
                        const u32 at = staging + token * PITCH + (i * 32 + warp * 8 + lane / 4) * ELEMENT;
                        if constexpr (FP8_OUT)
                            asm volatile("st.shared.u8 [%0], %1;" ::"r"(at), "h"(to_e4m3x2(y / out_scale, 0.0f)) : "memory");
                        else
                            asm volatile("st.shared.u16 [%0], %1;" ::"r"(at), "h"(to_bf16(y)) : "memory");
                    }
                }
            }
            named_barrier(barrier, 128);
            constexpr int EIGHTS = FEATURES / 8;
#pragma unroll
            for (int item = thread; item < TOKENS_AT_ONCE * EIGHTS; item += 128) {
                const int token = begin + item / EIGHTS, f = feature + item % EIGHTS * 8;
                if (token >= NT || first_token + token >= p.tokens || f >= p.features) continue;
                const u32 at = staging + item / EIGHTS * PITCH + item % EIGHTS * 8 * ELEMENT;
                u8* to = p.out + ((size_t)(first_token + token) * p.features + f) * ELEMENT;
                if constexpr (FP8_OUT) {
                    uint2 v;
                    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at));
                    *reinterpret_cast<uint2*>(to) = v;
                } else {
                    uint4 v;
                    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
                    *reinterpret_cast<uint4*>(to) = v;
                }
            }
        }
        named_barrier(barrier, 128);
    }
};

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, BLOCKS)
    wgmma_gate_up(const __grid_constant__ Arguments p) {
    extern __shared__ __align__(1024) u8 memory[];
    const Block b{shared_address(memory), CLUSTER == 2 ? cluster_rank() : 0};
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int tiles = p.row_tiles / (MULTICAST ? 2 : 1) * p.token_tiles;
    const int first = blockIdx.x / CLUSTER, step = gridDim.x / CLUSTER;
    constexpr int FILLED = CHUNKS < STAGES ? CHUNKS : STAGES;

    if constexpr (TRIGGER == 0) let_dependents_start();
    if (threadIdx.x == CONSUMERS) {
        prefetch_map(p.x);
        for (u32 s = 0; s < STAGES; s++) {
            barrier_init(b.full_x(s), 1);
            barrier_init(b.full_w(s), 1);
            barrier_init(b.empty(s), CONSUMERS * (MULTICAST ? 2 : 1));
        }
        barrier_init(b.received(), 1);
        barriers_initialised();
        if constexpr (SPLIT == 2) expect(b.received(), RECEIVED);
        for (int c = 0; c < FILLED; c++) issue_w(p, b, c, first, c);
    }
    __syncwarp();
    if constexpr (CLUSTER == 2) cluster_meet();
    else __syncthreads();

    if (warp >= CONSUMERS / 32) {
        if constexpr (SET_REGISTERS) fewer_registers<24>();
        if (threadIdx.x == CONSUMERS) produce(p, b, first, step, tiles, FILLED);
    } else {
        if constexpr (SET_REGISTERS) more_registers<240>();
        Consumer c{p, b, warp / 4, warp % 4, lane};
        for (int tile = first; tile < tiles; tile += step) {
            c.tile_products();
            if constexpr (SPLIT == 2)
                if (!c.exchange()) continue;
            c.finish(row_tile_of(p, tile, b.rank), tile % p.token_tiles * NT);
        }
    }
    if constexpr (MULTICAST) {
        __syncwarp();
        cluster_meet();  // the peer still arrives at this block's barriers
    }
}
