// ------------------------------------------------------------------------------- all layers of the expert, one launch
// 128 blocks, 16 tiles of 8 parts, stay on the device for all steps of the flow. Weights stream into a ring, ahead of
// need; blocks hand each other activations as mail (expert_loop_parts.cu), so that a stage begins as soon as its last
// word is there. The residual stream never leaves the blocks that own it.
//
// Rows of W and parts of K:    rows               K
//   QKV (norm, RoPE)           64 a pair          halves by block of the pair, then by warpgroup
//   output (+ residual)        64 a tile          eighths by part, then by warpgroup
//   gate/up (norm, GeGLU)      128 a pair         halves by block; a warpgroup has 64 rows
//   down (+ residual)          64 a tile          eighths by part, then by warpgroup
// Attention: 32 rows (token, head) a tile, keys by part. Partial sums meet in the block that owns their tokens: within
// a pair (a cluster of two) through distributed shared memory, else as parcels. Clusters of eight would spare those, but
// an H100 holds 15 of them, not 16: its processors are not spread evenly.
//
// Macros: TOKENS; ACTIONS (of a token, at most 32); MT (56 or 64); KEYS (of a block, at most: 96 or 128); FORMAT_QKV,
// FORMAT_O, FORMAT_GATE_UP, FORMAT_DOWN; SLOTS of the ring; AHEAD, in KB; PDL; TRACE.

enum Stage { QKV, OUT, GATE_UP, DOWN };
__device__ __forceinline__ constexpr int of_stage(int stage, int qkv, int out, int gate_up, int down) {
    return stage == QKV ? qkv : stage == OUT ? out : stage == GATE_UP ? gate_up : down;
}
constexpr int TILES = 16, PARTS = 8;
constexpr int WIDTH = 1024, FEATURES = 4096, HEADS = 8, HEAD_DIM = 256, HALF = HEAD_DIM / 2;
constexpr int QKV_ROWS = (HEADS + 2) * HEAD_DIM, QKV_PAIRS = QKV_ROWS / 64;
constexpr int LOW_TILES = (NT + 1) / 2;  // token tiles of a pair's first block
constexpr int QUERIES = 32;              // rows of attention of a tile

// floats of a layer in row_scale, and in vectors
constexpr int R_QKV = 0, R_O = R_QKV + QKV_ROWS, R_GATE_UP = R_O + WIDTH, R_DOWN = R_GATE_UP + 2 * FEATURES;
constexpr int R_LAYER = R_DOWN + WIDTH;
constexpr int V_FACTOR1 = 0, V_QKV = V_FACTOR1 + WIDTH, V_GATE1 = V_QKV + QKV_ROWS, V_FACTOR2 = V_GATE1 + WIDTH;
constexpr int V_GATE_UP = V_FACTOR2 + WIDTH, V_GATE2 = V_GATE_UP + 2 * FEATURES, V_SCALES = V_GATE2 + WIDTH;
// where activations are E4M3, what they are multiplied by: the residual stream, before the first layer; attention's results
constexpr int V_STREAM = V_SCALES, V_SEEN = V_SCALES + 1, V_LAYER = V_SCALES + 4;

// bytes of one copy of the mail
constexpr int M_IN1 = 0, M_Q = M_IN1 + MT * WIDTH * SIZE, M_K = M_Q + MT * HEADS * HEAD_DIM * 2, M_V = M_K + MT * HEAD_DIM * 2;
constexpr int M_SEEN = M_V + MT * HEAD_DIM * 2, M_IN2 = M_SEEN + MT * HEADS * HEAD_DIM * SIZE, M_ACT = M_IN2 + MT * WIDTH * SIZE;
constexpr int M_SQUARES1 = M_ACT + MT * FEATURES * SIZE, M_SQUARES2 = M_SQUARES1 + TILES * MT * 4;
constexpr int M_TOPS = M_SQUARES2 + TILES * MT * 4, MAIL = M_TOPS + TILES * PARTS * QUERIES * 8;
// bytes of the parcels: partial sums of output and down [tile, owner, part, row tile of four, lane] four floats, of
// attention [tile, owner, part, row of 8, half, lane] four bf16
constexpr int P_OUT = 0, P_DOWN = P_OUT + TILES * NT * PARTS * 2048, P_SEEN = P_DOWN + TILES * NT * PARTS * 2048;
// [tile, owner, part] of attention; then, of the flow's step, partial velocities [part, tile, token of 8, LANES] and sums of
// squares [part, tile, token of 8]
constexpr int P_FLOW = P_SEEN + TILES * PARTS * PARTS * 2048, LANES = 32;  // actions of a token, zeros behind the last
constexpr int P_FLOW_SQUARES = P_FLOW + PARTS * TILES * 8 * LANES * 4, PARCELS = P_FLOW_SQUARES + PARTS * TILES * 8 * 4;
static_assert(ACTIONS <= LANES, "a lane an action");

// shared memory: probabilities, queries (or partial sums of the pair's other block), activations (or keys), partial sums (or
// values), rings. A product's operand has 64 rows, and there are 32 queries: what it reads behind them is what comes next here,
// which nobody writes then, and nobody looks at what becomes of it.
constexpr int SUMS = GROUPS * NT * 2048;  // bytes of the warpgroups' partial sums
__host__ __device__ constexpr int larger(int a, int b) { return a > b ? a : b; }
__host__ __device__ constexpr int round_up(int a, int to) { return (a + to - 1) / to * to; }
constexpr int A_P = 0, A_Q = A_P + 2 * QUERIES * 128, A_INBOX = A_Q, A_X = A_Q + QUERIES * HEAD_DIM * 2;
constexpr int A_SUMS = A_X + larger(MT * 512 * SIZE, KEYS * HEAD_DIM * 2);
constexpr int A_RINGS = A_SUMS + larger(SUMS, KEYS * HEAD_DIM * 2), SHARED = A_RINGS + SLOTS * SLOT;
static_assert((KEYS == 96 || KEYS == 128) && SHARED <= 232448 - 6144, "shared memory");
static_assert(A_X % 1024 == 0 && A_SUMS % 1024 == 0, "the swizzle's pattern goes by the address");
static_assert(LOW_TILES * 8 * 512 <= QUERIES * HEAD_DIM * 2, "partial sums of the pair's other block");

// pieces of a stage; the k steps of a warp are 16, 8, 32 and 16
constexpr int N_QKV = 16 / Piece<FORMAT_QKV>::STEPS, N_O = 8 / Piece<FORMAT_O>::STEPS;
constexpr int N_GATE_UP = 32 / Piece<FORMAT_GATE_UP>::STEPS, N_DOWN = 16 / Piece<FORMAT_DOWN>::STEPS;
static_assert(N_QKV && N_O && N_GATE_UP && N_DOWN, "whole pieces");

struct FlowArguments {
    const float* noise;      // [TOKENS, ACTIONS]
    float* actions;          // the same: out
    const float* out_weight; // [WIDTH, LANES], zeros behind the last action
    const float* in_weight;  // [WIDTH, LANES], likewise
    const float* in_bias;    // [WIDTH]
    const float* factor;     // [steps, WIDTH], of the last norm
    const float* shift;      // [steps, LANES]: the last norm's shift times out_weight, and its bias
    const float4* times;     // [steps]: time, length of the step, strength of the guide
    const float* target;     // [TOKENS, ACTIONS], the guide's
    const float* weights;    // [TOKENS]
    const int* clean;        // tokens whose actions are given
};

struct Arguments {
    const u8* weights;       // [blocks, layers, pieces, warps, bytes]; the blocks that project q, k, v first: theirs are longer
    const float* row_scale;  // [layers, R_LAYER]
    const float* vectors;    // [steps, layers, V_LAYER]
    const u16* keys;         // bf16 [layers, capacity, HEAD_DIM]
    const u16* values;
    const float* cosines;    // [capacity, HALF]
    const float* sines;
    const int* valid;        // keys of the prefix
    FlowArguments flow;
    u8* mail;                // [4, MAIL]
    u8* parcels;             // [PARCELS]
    long long* trace;        // [blocks, layers, 32] clocks of the last step, where TRACE
    int layers, steps, capacity;
    float eps, scale;        // scale: log2(e) / sqrt(HEAD_DIM)
};

// By a warp behind the workers: all weights of this block, in the order of their use; and AHEAD KB before them, into L2: the
// memory would else have nothing to do while attention, which has no weights, leaves the ring full
__device__ __forceinline__ void stream_weights(const Arguments& p, Ring ring, bool projects) {
    // bytes of a stage's pieces
    constexpr u32 P_QKV = WARPS * Piece<FORMAT_QKV>::BYTES, P_O = WARPS * Piece<FORMAT_O>::BYTES;
    constexpr u32 P_GATE_UP = WARPS * Piece<FORMAT_GATE_UP>::BYTES, P_DOWN = WARPS * Piece<FORMAT_DOWN>::BYTES;
    constexpr u32 TAIL = N_O * P_O + N_GATE_UP * P_GATE_UP + N_DOWN * P_DOWN, LONG = TAIL + N_QKV * P_QKV;
    const u32 longs = min(blockIdx.x, 2 * QKV_PAIRS), tails = blockIdx.x - longs, all = (projects ? LONG : TAIL) * p.layers;
    const u8* const weights = p.weights + ((size_t)longs * LONG + (size_t)tails * TAIL) * p.layers;
    u64 policy;  // weights pass once a step: they shall not push keys and vectors out of L2
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
#pragma unroll 1
    for (int step = 0; step < p.steps; step++)
#pragma unroll 1
        for (u32 next = 0, stage = projects ? QKV : OUT; next < all; stage = stage < DOWN ? stage + 1 : projects ? QKV : OUT) {
            const u32 size = of_stage(stage, P_QKV, P_O, P_GATE_UP, P_DOWN);
            const u32 end = next + size * of_stage(stage, N_QKV, N_O, N_GATE_UP, N_DOWN);
#pragma unroll 1
            for (; next < end; next += size) {
                ring.ask(weights + next, size, policy);
                const u32 later = next + AHEAD * 1024;
                if (AHEAD && later + size <= all)
                    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(weights + later), "r"(size) : "memory");
            }
        }
}

struct Place {  // who this thread is
    u32 tid, lane, warp, group, tile, part, pair;
    u32 g, t;
    bool odd;
    // Read anew at every stage (volatile): else the compiler works out every address of every stage before the loop, and
    // spills them all. The warp is the same in all its lanes, and the compiler is told so.
    __device__ __forceinline__ Place() {
        asm volatile("mov.u32 %0, %%tid.x;" : "=r"(tid));
        lane = tid % 32, warp = __shfl_sync(0xffffffffu, tid / 32, 0), group = warp / 4;
        tile = blockIdx.x / PARTS, part = blockIdx.x % PARTS, pair = blockIdx.x / 2;
        g = lane / 4, t = lane % 4, odd = g % 2;
    }
};

struct OwnPlace {  // of the residual stream, for a thread of the first warpgroup: a token, and the first of four columns
    u32 token, column;
    __device__ __forceinline__ explicit OwnPlace(const Place& at)
        : token(at.part * 8 + 2 * at.t + at.odd), column(at.tile * 64 + at.warp % 4 * 16 + at.g / 2 * 4) {}
};

__device__ __forceinline__ float4 float4_at(const float* from) { return *reinterpret_cast<const float4*>(from); }
// all but the warp that asks for weights
__device__ __forceinline__ void block_barrier() { asm volatile("bar.sync 1, %0;" ::"n"(WORKERS) : "memory"); }

#if TRACE
#define MARK(i) if (at.tid == 0) p.trace[((size_t)blockIdx.x * p.layers + layer) * 32 + (i)] = clock64()
#else
#define MARK(i)
#endif

// Sums of the squares of a warp's 16 columns, of each of the block's tokens; by a warpgroup
__device__ __forceinline__ void sum_squares(const Place& at, const float4& h, float (*sums)[8]) {
    float sum = h.x * h.x + h.y * h.y + h.z * h.z + h.w * h.w;
    sum += __shfl_xor_sync(0xffffffffu, sum, 8);
    sum += __shfl_xor_sync(0xffffffffu, sum, 16);
    if (at.g < 2) sums[at.warp][2 * at.t + at.odd] = sum;
}

// The next norm's input h * factor and this tile's part of the sums of squares, from the block that owns the tokens:
// each thread of a warpgroup has four columns of one token. E4M3: times ``scale``, of the token.
__device__ __forceinline__ void post_stream(
    const Place& at, const float4& h, const float4& factor, float scale, u8* mail, u32 input, u32 squares, float (*sums)[8]) {
    const OwnPlace own(at);
    const u32 token = own.token;
    u8* const place = mail + input + (token * WIDTH + own.column) * SIZE;
    if (token < TOKENS) {
        const float v[4] = {h.x * factor.x, h.y * factor.y, h.z * factor.z, h.w * factor.w};
        if (EIGHT) post(place, four_e4m3(v[0] * scale, v[1] * scale, v[2] * scale, v[3] * scale));
        else post2(place, pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]));
    }
    sum_squares(at, h, sums);
    group_barrier(0);
    if (at.tid < 8 && at.part * 8 + at.tid < TOKENS) {
        const u32 box = squares + ((at.part * 8 + at.tid) * TILES + at.tile) * 4;
        post(mail + box, __float_as_uint(sums[0][at.tid] + sums[1][at.tid] + sums[2][at.tid] + sums[3][at.tid]));
    }
}

// This block's share of a copy of the mail, by a warpgroup: empty for everybody before the block's mail of the next layer,
// and wanted a layer later
__device__ __forceinline__ void empty_slice(u8* copy, u32 t) {
    constexpr u32 SLICE = round_up(MAIL / (TILES * PARTS), 16);
    const u32 end = min((blockIdx.x + 1) * SLICE, (u32)MAIL);
#pragma unroll 1
    for (u32 at = blockIdx.x * SLICE + t * 16; at < end; at += 128 * 16) post4(copy + at, make_uint4(EMPTY, EMPTY, EMPTY, EMPTY));
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
}

// The residual stream in E4M3. A row's own rms is known to nobody who posts a part of it, so it is divided by the rms at the
// last gate/up, one or two additions before; with HEADROOM its largest value may be 7168 times that one, 224 times what a
// stream of that length could hold, and its typical value is 16 times E4M3's least normal one even if it shrinks by four.
// What would not fit becomes NaN.
constexpr float HEADROOM = 1.0f / 16;

// 1 / rms of each token's row, from the sums of squares of all tiles; a quarter of them a thread. Asked for while the
// activations come.
struct Squares {
    uint4 v;
    __device__ __forceinline__ static const u8* place(const Place& at, const u8* from) {
        return from + (min(at.tid / 4, (u32)TOKENS - 1) * TILES + at.t * 4) * 4;
    }
    __device__ __forceinline__ void ask(const Place& at, const u8* from) { v = peek4(place(at, from)); }
    // scales: what the activations were multiplied by; ``renew``: and what later ones are
    __device__ __forceinline__ void keep(const Place& at, const u8* from, float* roots, float* scales, bool renew, float eps) {
        if (at.warp >= (4 * TOKENS + 31) / 32) return;
        for (u32 tries = 0; top_of(v) == EMPTY; tries++) {
            ask(at, from);
            if (tries > PATIENCE) give_up();
        }
        const float sum = quad_sum(__uint_as_float(v.x) + __uint_as_float(v.y) + __uint_as_float(v.z) + __uint_as_float(v.w));
        const u32 token = at.tid / 4;
        if (at.t != 0 || token >= TOKENS) return;
        const float root = rsqrtf(sum / WIDTH + eps);
        roots[token] = EIGHT ? __fdividef(root, scales[token]) : root;
        if (EIGHT && renew) scales[token] = HEADROOM * root;
    }
};

// What a stage's end wants of a layer's vectors, brought while its activations and products are under way: scales of rows;
// the norm's shift, or the gate; the next norm's factor.
struct Tables {
    float scale[128], second[128], third[128];
    __device__ __forceinline__ void fetch(
        const Place& at, const float* scales, const float* seconds, const float* thirds, u32 count) {
        if (at.warp >= 3 || at.lane * 4 >= count) return;
        const float* const from = at.warp == 0 ? scales : at.warp == 1 ? seconds : thirds;
        copy16(shared_address(scale) + (at.warp * 128 + at.lane * 4) * 4, from + at.lane * 4);
    }
};

// Partial sums of a warpgroup: [warpgroup, token tile, row tile of four, lane] 16 bytes
__device__ __forceinline__ void store_sums(const Place& at, const float* d, u32 to) {
    to += (at.group * NT * 128 + at.tid % 128) * 16;
#pragma unroll
    for (int n = 0; n < NT; n++)
        store_shared4(
            to + n * 2048,
            make_uint4(
                __float_as_uint(d[4 * n]), __float_as_uint(d[4 * n + 1]), __float_as_uint(d[4 * n + 2]),
                __float_as_uint(d[4 * n + 3])));
}

// of a token tile, of both warpgroups
__device__ __forceinline__ float4 sum_of(u32 from, u32 tile) {
    float4 sum = load_shared_float4(from + tile * 2048);
    add(sum, load_shared_float4(from + (NT + tile) * 2048));
    return sum;
}

// Token tile n of a product cut into parts goes to part n, whose block owns it
__device__ __forceinline__ void post_to_owners(const Place& at, u32 sums, u8* parcels, u32 phase) {
    const u32 own = sums + at.tid % 128 * 16;
    u8* const box = parcels + (at.tile * (NT * PARTS * 2048) + at.part * 2048 + at.tid % 128 * 16);
#pragma unroll 2
    for (u32 n = at.group; n < NT; n += GROUPS) post_parcel(box + n * (PARTS * 2048), sum_of(own, n), phase);
}

// What post_to_owners sent to this block, added in the order of the parts; by a warpgroup
__device__ __forceinline__ float4 sum_of_parts(const Place& at, const u8* parcels, u32 phase) {
    const u8* const box = parcels + ((at.tile * NT + at.part) * (PARTS * 2048) + at.tid % 128 * 16);
    await_parcel(box - at.lane * 16 + at.lane % PARTS * 2048, phase);
    uint4 v[PARTS];
    u32 missing = (1 << PARTS) - 1;
    for (u32 tries = 0;; tries++) {
#pragma unroll
        for (int i = 0; i < PARTS; i++)
            if (missing >> i & 1) v[i] = peek4(box + i * 2048);
        u32 bad = 0;
#pragma unroll
        for (int i = 0; i < PARTS; i++)
            bad |= (((v[i].x ^ phase) | (v[i].y ^ phase) | (v[i].z ^ phase) | (v[i].w ^ phase)) & 1) << i;
        missing = any_lane(bad);
        if (!missing) break;
        if (tries > PATIENCE) give_up();
    }
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int i = 0; i < PARTS; i++)
        add(sum, make_float4(__uint_as_float(v[i].x), __uint_as_float(v[i].y), __uint_as_float(v[i].z), __uint_as_float(v[i].w)));
    return sum;
}
