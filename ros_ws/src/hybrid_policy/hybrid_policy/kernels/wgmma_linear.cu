// FP8 W8A8 for few tokens on Hopper: out = residual + gate * (x W^T + bias), activations quantised inside.
//
// A cluster of CLUSTER blocks has 64 rows of W and cuts K; each block's part of W and of x lies whole in its shared
// memory, W copied there before the wait for the kernel before. Each of WARPGROUPS takes its share of the part: it
// quantises its x, one power-of-two scale a token and 128 columns, multiplies, and adds the scaled products in float32
// (the hardware's own FP8 accumulation keeps some 14 bits, hence a fresh accumulator for each 128 columns). Partial
// sums go to the block that finishes their tokens (eights of tokens, in turn), which adds them in a fixed order.
//
// Macros: NT tokens a block (a multiple of 8, at most 64), CLUSTER, GROUPS of 128 columns a block, GIVEN: x comes
// in FP8 with float32 scales; BIAS; GATE, RESIDUAL, OUT: 0 none, 1 bf16, 2 float32; PDL, TRIGGER
// (when dependents may start), BLOCKS a multiprocessor.

constexpr int THREADS = 128 * WARPGROUPS;
constexpr int OWN = GROUPS / WARPGROUPS;  // groups of a warpgroup
constexpr int EIGHTS = NT / 8;
constexpr int SLOTS = (EIGHTS + CLUSTER - 1) / CLUSTER;
constexpr int SOURCES = WARPGROUPS * CLUSTER;
constexpr int W_GROUP = 64 * 128, X_GROUP = NT * 128;
constexpr int AT_X = GROUPS * W_GROUP;
constexpr int AT_RECEIVED = AT_X + GROUPS * X_GROUP;
constexpr int AT_SCALES = AT_RECEIVED + SLOTS * SOURCES * 2048;
constexpr int AT_BARRIERS = AT_SCALES + GROUPS * NT * 4;
static_assert(AT_BARRIERS + (GROUPS + 2) * 8 <= SHARED, "shared memory");
static_assert(NT % 8 == 0 && NT <= 64 && WARPGROUPS >= 2 && GROUPS % WARPGROUPS == 0 && OWN <= 4, "tile");

struct alignas(64) Arguments {
    u8 w[128];  // tensor map of e4m3 [rows, K], boxes of 64 x 128
    u8 x8[128];  // GIVEN: tensor map of e4m3 [tokens, K], boxes of NT x 128
    const u16* x;  // bf16 [tokens, K]
    const float* x_scale;
    const float* row_scale;
    const float* bias;
    const void* gate;
    const void* residual;
    void* out;
    int tokens, rows, columns, x_scale_step;
};

template <int KIND>
__device__ __forceinline__ float load(const void* from, size_t at) {
    if constexpr (KIND == 1) return __uint_as_float((u32) reinterpret_cast<const u16*>(from)[at] << 16);
    else return reinterpret_cast<const float*>(from)[at];
}

// the larger magnitudes of two bf16x2, with some sign
__device__ __forceinline__ u32 larger(u32 a, u32 b) {
    u32 d;
    asm("max.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

// four bf16 times a power of two, to E4M3
__device__ __forceinline__ u32 quantise4(u32 first, u32 second, u32 factor) {
    const u32 a = multiply(first, factor), b = multiply(second, factor);
    return pack_e4m3(low_of(a), high_of(a), low_of(b), high_of(b));
}

// This warpgroup's groups of x to E4M3, four lanes a token and group. Rows beyond the tokens repeat the last one.
__device__ __forceinline__ void quantise(const Arguments& p, u32 base, int first_group, int rank, int thread) {
    constexpr int ROUNDS = (NT * OWN + 31) / 32;
    const int quarter = thread % 4;
    uint4 v[ROUNDS][4];
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
        const int unit = min(r * 32 + thread / 4, NT * OWN - 1), token = min(unit % NT, p.tokens - 1);
        const u16* from = p.x + (size_t)token * p.columns + (rank * GROUPS + first_group + unit / NT) * 128 + quarter * 8;
#pragma unroll
        for (int j = 0; j < 4; j++)  // in this order, all before the first use
            asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(v[r][j].x), "=r"(v[r][j].y), "=r"(v[r][j].z), "=r"(v[r][j].w) : "l"(from + j * 32));
    }
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
        const int unit = r * 32 + thread / 4, token = unit % NT, group = first_group + unit / NT;
        const bool there = unit < NT * OWN;
        u32 pairs = 0;  // the largest magnitudes so far (of numbers: a NaN stays one by itself)
#pragma unroll
        for (int j = 0; j < 4; j++)
            pairs = larger(pairs, larger(larger(v[r][j].x, v[r][j].y), larger(v[r][j].z, v[r][j].w)));
        u32 bits = max(pairs & 0x7fff, pairs >> 16 & 0x7fff);
        bits = max(bits, __shfl_xor_sync(0xffffffffu, bits, 1));
        bits = max(bits, __shfl_xor_sync(0xffffffffu, bits, 2));
        // the least power of two s with largest / s <= 448 = 1.75 * 2^8; Inf (and a factor of 1) for Inf
        const bool finite = bits < 0x7f80;
        const int exponent = max((int)(bits >> 7) - 8 + ((bits & 0x7f) > 0x60), 1);
        const u32 scale = finite ? exponent << 23 : 0x7f800000;
        const u32 factor = finite ? (254 - exponent) * 0x00800080u : 0x3f803f80u;
        const u32 row = base + AT_X + group * X_GROUP + token * 128 + quarter % 2 * 8;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const u32 low = quantise4(v[r][j].x, v[r][j].y, factor), high = quantise4(v[r][j].z, v[r][j].w, factor);
            const u32 to = row + ((quarter / 2 + j * 2 ^ token % 8) << 4);
            if (there) asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(to), "r"(low), "r"(high) : "memory");
        }
        if (there && quarter == 0)
            asm volatile("st.shared.u32 [%0], %1;" ::"r"(base + AT_SCALES + (group * NT + token) * 4), "r"(scale) : "memory");
    }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, BLOCKS)
    wgmma_linear(const __grid_constant__ Arguments p) {
    extern __shared__ __align__(1024) u8 memory[];
    const u32 base = shared_address(memory), barriers = base + AT_BARRIERS;
    const u32 received = barriers + GROUPS * 8, full_x = received + 8;
    const int rank = CLUSTER == 1 ? 0 : cluster_rank(), row_tile = blockIdx.x / CLUSTER;
    const int wg = threadIdx.x / 128, thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    const int slots = rank < EIGHTS ? (EIGHTS - rank + CLUSTER - 1) / CLUSTER : 0;

    if constexpr (TRIGGER == 0) let_dependents_start();
    if (threadIdx.x == 0) {
        prefetch_map(p.w);
        for (int g = 0; g < GROUPS; g++) barrier_init(barriers + g * 8, 1);
        barrier_init(received, 1);
        barrier_init(full_x, 1);
        barriers_initialised();
        expect(received, slots * SOURCES * 2048);
        for (int g = 0; g < GROUPS; g++) {
            expect(barriers + g * 8, W_GROUP);
            copy_box(base + g * W_GROUP, p.w, (rank * GROUPS + g) * 128, row_tile * 64, barriers + g * 8);
        }
    }
    __syncwarp();
    if constexpr (CLUSTER > 1) cluster_meet();
    else __syncthreads();
    wait_for_predecessor();
    if constexpr (TRIGGER == 1) let_dependents_start();

    const int first_group = wg * OWN;
    if constexpr (GIVEN) {
        if (threadIdx.x == 0) {
            expect(full_x, GROUPS * X_GROUP);
            for (int g = 0; g < GROUPS; g++)
                copy_box(base + AT_X + g * X_GROUP, p.x8, (rank * GROUPS + g) * 128, 0, full_x);
        }
        __syncwarp();
        wait(full_x, 0);
    } else {
        quantise(p, base, first_group, rank, thread);
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        named_barrier(1 + wg, 128);
    }

    float part[OWN][NT / 2], acc[NT / 2];
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        wait(barriers + (first_group + i) * 8, 0);
        pin(part[i]);
    }
    products_begin();
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const u64 a = operand(base + (first_group + i) * W_GROUP), b = operand(base + AT_X + (first_group + i) * X_GROUP);
#pragma unroll
        for (int k = 0; k < 4; k++) product_fp8(part[i], a + k * 2, b + k * 2, k);
        products_commit();
    }
    products_wait<0>();
#pragma unroll
    for (int j = 0; j < NT / 2; j++) acc[j] = 0.0f;
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        pin(part[i]);
#pragma unroll
        for (int j = 0; j < EIGHTS; j++) {
            float s[2] = {1.0f, 1.0f};
            if constexpr (!GIVEN)
                asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(s[0]), "=f"(s[1])
                             : "r"(base + AT_SCALES + ((first_group + i) * NT + j * 8 + lane % 4 * 2) * 4));
#pragma unroll
            for (int e = 0; e < 4; e++) acc[j * 4 + e] = fmaf(part[i][j * 4 + e], s[e % 2], acc[j * 4 + e]);
        }
    }
#pragma unroll
    for (int j = 0; j < EIGHTS; j++) {
        const u32 at = base + AT_RECEIVED + ((j / CLUSTER * SOURCES + rank * WARPGROUPS + wg) * 128 + thread) * 16;
        float* v = acc + j * 4;
        if constexpr (CLUSTER > 1)
            send4(of_rank(at, j % CLUSTER), of_rank(received, j % CLUSTER), v[0], v[1], v[2], v[3]);
        else
            asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
                         : "memory");
    }
    if constexpr (CLUSTER == 1) __syncthreads();

    if (slots == 0 || wg >= 2) return;
    // Warpgroup 0 finishes rows g, warpgroup 1 rows g + 8 of each warp's sixteen; two tokens a thread and slot.
    const int row = row_tile * 64 + warp * 16 + wg * 8 + lane / 4;
    const bool row_there = row < p.rows;
    const float scale = row_there ? p.row_scale[row] : 0.0f;
    const float gate = GATE && row_there ? load<GATE>(p.gate, row) : 1.0f;
    const float bias = BIAS && row_there ? p.bias[row] : 0.0f;
    float residual[SLOTS][2], x_scale[SLOTS][2];
#pragma unroll
    for (int s = 0; s < SLOTS; s++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int token = (s * CLUSTER + rank) * 8 + lane % 4 * 2 + e;
            const bool there = row_there && token < p.tokens;
            residual[s][e] = RESIDUAL && there ? load<RESIDUAL>(p.residual, (size_t)token * p.rows + row) : 0.0f;
            x_scale[s][e] = GIVEN && there ? p.x_scale[token * p.x_scale_step] : 1.0f;
        }
    if constexpr (CLUSTER > 1) wait(received, 0);
#pragma unroll
    for (int s = 0; s < SLOTS; s++) {
        if (s >= slots) break;
        float sum[2] = {0.0f, 0.0f};
#pragma unroll
        for (int source = 0; source < SOURCES; source++) {
            float v[2];
            asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v[0]), "=f"(v[1])
                         : "r"(base + AT_RECEIVED + ((s * SOURCES + source) * 128 + thread) * 16 + wg * 8));
            sum[0] += v[0], sum[1] += v[1];
        }
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int token = (s * CLUSTER + rank) * 8 + lane % 4 * 2 + e;
            if (!row_there || token >= p.tokens) continue;
            const float y = fmaf(sum[e] * scale * x_scale[s][e] + bias, gate, residual[s][e]);
            const size_t at = (size_t)token * p.rows + row;
            if constexpr (OUT == 1) reinterpret_cast<u16*>(p.out)[at] = to_bf16(y);
            else reinterpret_cast<float*>(p.out)[at] = y;
        }
    }
}
