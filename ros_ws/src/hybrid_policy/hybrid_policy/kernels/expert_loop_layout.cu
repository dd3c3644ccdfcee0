// ------------------------------------------------------------------------------- all layers of the expert, one launch
// 128 blocks, 16 tiles of 8 parts, stay on the device for a whole pass over the layers. Weights stream into a ring,
// ahead of need; blocks hand each other activations as mail (expert_loop_parts.cu), so that a stage begins as soon
// as its last word is there. The residual stream never leaves the registers of the blocks that own it.
//
// Rows of W and parts of K:    rows               K
//   QKV (norm, RoPE)           64 a pair          halves by block of the pair, then by warpgroup
//   output (+ residual)        64 a tile          eighths by part, then by warpgroup
//   gate/up (norm, GeGLU)      128 a pair         halves by block; even warpgroups have the first 64 rows, odd ones the
//                                                 others; of four, the first two have half of K, the last two the rest
//   down (+ residual)          64 a tile          eighths by part, then by warpgroup
// Attention: 32 rows (token, head) a tile, keys by part. Partial sums meet in the block that owns their tokens: within
// a pair (a cluster of two) through distributed shared memory, else as parcels. Clusters of eight would spare those, but
// an H100 holds 15 of them, not 16: its processors are not spread evenly.
//
// Macros: GROUPS (warpgroups, 2 or 4); TOKENS; MT (56 or 64); KEYS (of a block, at most; a multiple of 16); FORMAT_QKV,
// FORMAT_O, FORMAT_GATE_UP, FORMAT_DOWN; SLOTS of the ring; PDL; TRACE; BACKOFF (nanoseconds between polls); FENCED.

enum Stage { QKV, OUT, GATE_UP, DOWN };
constexpr int TILES = 16, PARTS = 8;
constexpr int WIDTH = 1024, FEATURES = 4096, HEADS = 8, HEAD_DIM = 256, HALF = HEAD_DIM / 2;
constexpr int QKV_ROWS = (HEADS + 2) * HEAD_DIM, QKV_PAIRS = QKV_ROWS / 64;
constexpr int LOW_TILES = (NT + 1) / 2;  // token tiles of a pair's first block
constexpr int QUERIES = 32;              // rows of attention of a tile

// floats of a layer in row_scale, and in vectors
constexpr int R_QKV = 0, R_O = R_QKV + QKV_ROWS, R_GATE_UP = R_O + WIDTH, R_DOWN = R_GATE_UP + 2 * FEATURES;
constexpr int R_LAYER = R_DOWN + WIDTH;
constexpr int V_FACTOR1 = 0, V_QKV = V_FACTOR1 + WIDTH, V_GATE1 = V_QKV + QKV_ROWS, V_FACTOR2 = V_GATE1 + WIDTH;
constexpr int V_GATE_UP = V_FACTOR2 + WIDTH, V_GATE2 = V_GATE_UP + 2 * FEATURES, V_LAYER = V_GATE2 + WIDTH;

// bytes of one copy of the mail
constexpr int M_IN1 = 0, M_Q = M_IN1 + MT * WIDTH * 2, M_K = M_Q + MT * HEADS * HEAD_DIM * 2, M_V = M_K + MT * HEAD_DIM * 2;
constexpr int M_SEEN = M_V + MT * HEAD_DIM * 2, M_IN2 = M_SEEN + MT * HEADS * HEAD_DIM * 2, M_ACT = M_IN2 + MT * WIDTH * 2;
constexpr int M_SQUARES1 = M_ACT + MT * FEATURES * 2, M_SQUARES2 = M_SQUARES1 + TILES * MT * 4;
constexpr int M_TOPS = M_SQUARES2 + TILES * MT * 4, MAIL = M_TOPS + TILES * PARTS * QUERIES * 8;
// bytes of the parcels: partial sums of output and down [tile, owner, part, 4 x 16 rows, lane] float4, of
// attention [tile, owner, part, row of 8, half, lane] 2 x bf16x2
constexpr int P_OUT = 0, P_DOWN = P_OUT + TILES * NT * PARTS * 2048, P_SEEN = P_DOWN + TILES * NT * PARTS * 2048;
// [tile, owner, part] of attention: TILES * PARTS * PARTS * 2048 more

// shared memory: activations (or keys), partial sums (or values), queries, probabilities, rings
constexpr int PITCH = HEAD_DIM * 2 + 16, P_PITCH = KEYS * 2 + 16;
constexpr int SUMS = GROUPS * 16384;  // bytes of partial sums: of a pair, or of the warpgroups of a block
__host__ __device__ constexpr int larger(int a, int b) { return a > b ? a : b; }
__host__ __device__ constexpr int round_up(int a, int to) { return (a + to - 1) / to * to; }
constexpr int A_X = 0, A_SUMS = round_up(larger(MT * 1024, KEYS * PITCH), 1024);
constexpr int A_Q = A_SUMS + larger(SUMS, round_up(KEYS * PITCH, 128)), A_P = A_Q + QUERIES * PITCH;
constexpr int A_RINGS = round_up(A_P + QUERIES * P_PITCH, 128), SHARED = A_RINGS + SLOTS * SLOT;
static_assert(KEYS % 16 == 0 && KEYS <= 128 && SHARED <= 232448 - 6144, "shared memory");

// pieces of a stage; the k steps of a warp are 32, 16, 64 and 32 over GROUPS
constexpr int N_QKV = 32 / GROUPS / Piece<FORMAT_QKV>::STEPS, N_O = 16 / GROUPS / Piece<FORMAT_O>::STEPS;
constexpr int N_GATE_UP = 64 / GROUPS / Piece<FORMAT_GATE_UP>::STEPS, N_DOWN = 32 / GROUPS / Piece<FORMAT_DOWN>::STEPS;
static_assert(N_QKV && N_O && N_GATE_UP && N_DOWN, "whole pieces");

__device__ __forceinline__ int Ring::layer_pieces() const { return (projects ? N_QKV : 0) + N_O + N_GATE_UP + N_DOWN; }
__device__ __forceinline__ int Ring::bytes() const {
    const int place = position - (projects ? N_QKV : 0);
    if (place < 0) return WARPS * Piece<FORMAT_QKV>::BYTES;
    if (place < N_O) return WARPS * Piece<FORMAT_O>::BYTES;
    return WARPS * (place < N_O + N_GATE_UP ? Piece<FORMAT_GATE_UP>::BYTES : Piece<FORMAT_DOWN>::BYTES);
}

struct Arguments {
    const u8* weights;       // [blocks, layers, pieces, warps, bytes]; the blocks that project q, k, v first: theirs are longer
    const float* row_scale;  // [layers, R_LAYER]
    const float* vectors;    // this flow step's [layers, V_LAYER]
    float* h;                // [TOKENS, WIDTH], the residual stream: in and out
    const u16* keys;         // bf16 [layers, capacity, HEAD_DIM]
    const u16* values;
    const float* cosines;    // [capacity, HALF]
    const float* sines;
    const int* valid;        // keys of the prefix
    u8* mail;                // [4, MAIL]
    u8* parcels;
    long long* trace;        // [blocks, layers, 24] clocks, where TRACE
    int layers, capacity, turn;  // turn: which copy of the mail the first layer takes
    float eps, scale;            // scale: log2(e) / sqrt(HEAD_DIM)
};

struct Place {  // who this thread is
    int tid, lane, warp, group, tile, part, pair;
    int g, t;
    bool odd;
    // Read anew at every stage (volatile): else the compiler works out every address of every stage before the loop, and
    // spills them all.
    __device__ __forceinline__ Place() {
        asm volatile("mov.u32 %0, %%tid.x;" : "=r"(tid));
        lane = tid % 32, warp = tid / 32, group = warp / 4;
        tile = blockIdx.x / PARTS, part = blockIdx.x % PARTS, pair = blockIdx.x / 2;
        g = lane / 4, t = lane % 4, odd = g % 2;
    }
};

struct OwnPlace {  // of the residual stream, for a thread of the first warpgroup: a token, and the first of four columns
    int token, column;
    __device__ __forceinline__ explicit OwnPlace(const Place& at)
        : token(at.part * 8 + 2 * at.t + at.odd), column(at.tile * 64 + at.warp % 4 * 16 + at.g / 2 * 4) {}
};

__device__ __forceinline__ float4 float4_at(const float* from) { return *reinterpret_cast<const float4*>(from); }

#if TRACE
#define MARK(i) if (at.tid == 0) p.trace[((size_t)blockIdx.x * p.layers + layer) * 24 + (i)] = clock64()
#else
#define MARK(i)
#endif

// The next norm's input h * factor and this tile's part of the sums of squares, from the block that owns the tokens:
// each thread of a warpgroup has four columns of one token.
__device__ __forceinline__ void post_stream(
    const Place& at, const float4& h, const float4& factor, u8* mail, u8* next, int input, int squares, float (*sums)[8]) {
    const OwnPlace own(at);
    const int token = own.token, place = input + (token * WIDTH + own.column) * 2;
    if (token < TOKENS)
        post2(mail + place, pack_bf16(h.x * factor.x, h.y * factor.y), pack_bf16(h.z * factor.z, h.w * factor.w));
    float sum = h.x * h.x + h.y * h.y + h.z * h.z + h.w * h.w;
    sum += __shfl_xor_sync(0xffffffffu, sum, 8);
    sum += __shfl_xor_sync(0xffffffffu, sum, 16);
    if (at.g < 2) sums[at.warp][token % 8] = sum;
    group_barrier(0);
    if (at.tid < 8 && at.part * 8 + at.tid < TOKENS) {
        const int box = squares + (at.tile * MT + at.part * 8 + at.tid) * 4;
        post(mail + box, __float_as_uint(sums[0][at.tid] + sums[1][at.tid] + sums[2][at.tid] + sums[3][at.tid]));
        post(next + box, EMPTY);
    }
    if (token < TOKENS) post2(next + place, EMPTY, EMPTY);
}

// A quarter of the sums of squares of token tid % 64, asked for while the partial sums travel
struct Squares {
    u32 v[4];
    __device__ __forceinline__ void ask(const Place& at, const u8* from) {
        const int token = at.tid % 64, first = at.tid / 64 * 4;
        if (token >= TOKENS || first >= TILES) return;
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = peek(from + ((first + i) * MT + token) * 4);
    }
    __device__ __forceinline__ void keep(const Place& at, const u8* from, float (*roots)[MT]) {
        const int token = at.tid % 64, first = at.tid / 64 * 4;
        if (token >= TOKENS || first >= TILES) return;
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; i++) sum += await_float(from + ((first + i) * MT + token) * 4, v[i]);
        roots[at.tid / 64][token] = sum;
    }
};

__device__ __forceinline__ float root_of(const float (*sums)[MT], int token, float eps) {
    return rsqrtf((sums[0][token] + sums[1][token] + sums[2][token] + sums[3][token]) / WIDTH + eps);
}

// Token tile n of a pair's product goes to the pair's block that owns it: to its place in that block's partial sums,
// [source, token tile, row tile, lane] 16 bytes
__device__ __forceinline__ void push_to_pair(const Place& at, const float* d, u32 sums, u32 barrier, int source, int row_tile, int row_tiles) {
    const u32 first = sums + ((source * 4 * row_tiles + row_tile) * 32 + at.lane) * 16, apart = row_tiles * 512;
    const u32 even = of_rank(first, 0), uneven = of_rank(first, 1);
    const u32 even_barrier = of_rank(barrier, 0), uneven_barrier = of_rank(barrier, 1);
#pragma unroll
    for (int n = 0; n < NT; n++) {
        if (n < LOW_TILES)
            push4(even + n * apart, even_barrier, d + 4 * n);
        else
            push4(uneven + (n - LOW_TILES) * apart, uneven_barrier, d + 4 * n);
    }
}

// Token tile n's partial sums go to part n of the tile. One warpgroup adds those of all, in their order, and posts:
// TILES_EACH token tiles each. Every thread of the block passes here (__syncthreads).
__device__ __forceinline__ void post_to_owners(const Place& at, const float* d, u32 scratch, u8* parcels) {
    constexpr int TILES_EACH = (NT + GROUPS - 1) / GROUPS;
    const u32 own = scratch + ((at.group * NT * 4 + at.warp % 4) * 32 + at.lane) * 16;
#pragma unroll
    for (int n = 0; n < NT; n++)
        if (n / TILES_EACH != at.group) {
            const float* v = d + 4 * n;
            store_shared4(own + n * 2048, make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3])));
        }
    __syncthreads();
    u8* const box = parcels + (size_t)(at.tile * NT * PARTS + at.part) * 2048 + (at.warp % 4 * 32 + at.lane) * 16;
#pragma unroll
    for (int n = 0; n < NT; n++) {
        if (n / TILES_EACH != at.group) continue;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int from = 0; from < GROUPS; from++) {
            float4 v = make_float4(d[4 * n], d[4 * n + 1], d[4 * n + 2], d[4 * n + 3]);
            if (from != at.group) v = load_shared_float4(scratch + (((from * NT + n) * 4 + at.warp % 4) * 32 + at.lane) * 16);
            sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
        }
        post4(box + (size_t)n * PARTS * 2048, make_uint4(__float_as_uint(sum.x), __float_as_uint(sum.y), __float_as_uint(sum.z), __float_as_uint(sum.w)));
    }
}

// What post_to_owners sent to this block, added in the order of the parts; by a warpgroup
__device__ __forceinline__ float4 sum_of_parts(const Place& at, u8* parcels) {
    u8* const box = parcels + ((size_t)(at.tile * NT + at.part) * PARTS * 4 + at.warp % 4) * 512 + at.lane * 16;
    uint4 v[PARTS] = {};
    u32 pending = (1u << PARTS) - 1;
    for (u32 tries = 0; pending; tries++) {
#pragma unroll
        for (int i = 0; i < PARTS; i++) peek4_if(v[i], box + i * 2048, pending & 1u << i);
#pragma unroll
        for (int i = 0; i < PARTS; i++)
            if ((pending >> i & 1) && complete(v[i])) pending &= ~(1u << i);
        if (tries > PATIENCE) __trap();
    }
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
        sum.x += __uint_as_float(v[i].x), sum.y += __uint_as_float(v[i].y);
        sum.z += __uint_as_float(v[i].z), sum.w += __uint_as_float(v[i].w);
    }
    return sum;
}

__device__ __forceinline__ void empty_parts(const Place& at, u8* parcels) {
    u8* const box = parcels + ((size_t)(at.tile * NT + at.part) * PARTS * 4 + at.warp % 4) * 512 + at.lane * 16;
#pragma unroll
    for (int i = 0; i < PARTS; i++) post4(box + i * 2048, make_uint4(EMPTY, EMPTY, EMPTY, EMPTY));
}
