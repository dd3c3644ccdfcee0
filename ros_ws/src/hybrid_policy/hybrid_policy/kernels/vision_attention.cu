// Attention of a vision transformer's layer, whole rows at once, for Hopper: TOKENS (at most 256) keys fit a warpgroup's
// registers as scores, so there is one product, one softmax without a running maximum, and one product more.
//
// A block is GROUPS warpgroups of 64 query rows each, of one head of one view. Queries, keys and values come as they lie in the
// stacked projection, in pieces of 16 bytes: piece c of row r goes to c * stride + 16 r, which is wgmma's layout
// without swizzle; the stride's odd 16 bytes keep the pieces of a row in different banks. A head dimension that is no
// multiple of 16 gets a last piece of zeros.
//
// Macros: TOKENS, HEADS, HEAD_DIM, GROUPS, QUANTISE, PDL. wgmma_common.cu comes first, and before it ``scores_step`` and
// ``values_step`` (vision_attention.py).

#define WIDTH (HEADS * HEAD_DIM)
#define PIECES (HEAD_DIM / 8)
#define PADDED ((PIECES + 1) / 2 * 2)
#define BLOCK (64 * GROUPS)
#define THREADS (128 * GROUPS)
#define Q_STRIDE (BLOCK * 16 + 16)
#define K_STRIDE (TOKENS * 16 + 16)
#define K_AT (PADDED * Q_STRIDE)
#define V_AT (K_AT + PADDED * K_STRIDE)

struct Arguments {
    const u16* qkv;     // bf16 [views * TOKENS, 3 * WIDTH]
    void* out;          // bf16 [views * TOKENS, WIDTH], or e4m3 where QUANTISE
    float scale_log2;   // HEAD_DIM ** -0.5 * log2(e)
    float inverse;      // of the scale of out, where QUANTISE
};

// no swizzle: leading and stride are wgmma's two strides in bytes (between pieces of K and between eights of rows where
// K lies along a row; the other way round where it lies across rows)
__device__ __forceinline__ u64 plain_operand(u32 address, u32 leading, u32 stride) {
    return (u64)((address & 0x3ffff) >> 4) | (u64)(leading >> 4) << 16 | (u64)(stride >> 4) << 32;
}

template <int ROWS>
__device__ __forceinline__ void copy_head(u32 to, const u16* from) {
    constexpr int STRIDE = ROWS * 16 + 16;
#pragma unroll
    for (int i = 0; i < (ROWS * PIECES + THREADS - 1) / THREADS; i++) {
        int id = threadIdx.x + i * THREADS, row = id / PIECES, piece = id % PIECES;
        if (ROWS * PIECES % THREADS == 0 || row < ROWS) copy16(to + piece * STRIDE + row * 16, from + (long long)row * 3 * WIDTH + piece * 8);
    }
    if (PADDED > PIECES)
        for (int row = threadIdx.x; row < ROWS; row += THREADS)
            asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(to + PIECES * STRIDE + row * 16), "r"(0) : "memory");
}

template <int LEFT>
__device__ __forceinline__ void copies_landed() {
    copies_wait<LEFT>();
    __syncthreads();
}

extern "C" __global__ __launch_bounds__(THREADS) void vision_attention(const __grid_constant__ Arguments a) {
    extern __shared__ u8 memory[];
    u32 base = (shared_address(memory) + 127) & ~127u;
    int block = blockIdx.x % (TOKENS / BLOCK), head = blockIdx.x / (TOKENS / BLOCK) % HEADS;
    long long first = (long long)(blockIdx.x / (TOKENS / BLOCK * HEADS)) * TOKENS;  // of the view
    const u16* from = a.qkv + first * 3 * WIDTH + head * HEAD_DIM;
    wait_for_predecessor();
    let_dependents_start();
    copy_head<BLOCK>(base, from + (long long)block * BLOCK * 3 * WIDTH);
    copy_head<TOKENS>(base + K_AT, from + WIDTH);
    copies_commit();
    copy_head<TOKENS>(base + V_AT, from + 2 * WIDTH);
    copies_commit();
    copies_landed<1>();
    float s[TOKENS / 2];
    u64 q = plain_operand(base + threadIdx.x / 128 * 1024, Q_STRIDE, 128), k = plain_operand(base + K_AT, K_STRIDE, 128);
    products_begin();
#pragma unroll
    for (int i = 0; i < PADDED / 2; i++)
        scores_step(s, q + i * (2 * Q_STRIDE >> 4), k + i * (2 * K_STRIDE >> 4), i > 0);
    products_commit();
    products_wait<0>();
    pin(s);
    // rows g and g + 8 of a thread; columns 8 j + 2 (lane % 4) + {0, 1}
    float top[2] = {s[0], s[2]}, sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], s[i]);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        top[r] = quad_max(top[r]) * a.scale_log2;
    }
    u32 p[TOKENS / 4];
#pragma unroll
    for (int i = 0; i < TOKENS / 4; i++) {
        float low = exp2_of(s[2 * i] * a.scale_log2 - top[i % 2]);
        float high = exp2_of(s[2 * i + 1] * a.scale_log2 - top[i % 2]);
        sum[i % 2] += low + high;
        p[i] = pack_bf16(low, high);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        sum[r] = quad_sum(sum[r]);
    }
    copies_landed<0>();
    float o[HEAD_DIM / 2];
    u64 v = plain_operand(base + V_AT, 128, K_STRIDE);
    products_begin();
#pragma unroll
    for (int i = 0; i < TOKENS / 16; i++) values_step(o, p + 4 * i, v + i * (256 >> 4), i > 0);
    products_commit();
    products_wait<0>();
    pin(o);
    int lane = threadIdx.x % 32, row = block * BLOCK + threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float factor = __fdividef(1.0f, sum[r]);
        long long place = (first + row + 8 * r) * WIDTH + head * HEAD_DIM + 2 * (lane % 4);
#pragma unroll
        for (int j = 0; j < PIECES; j++) {
            float x = o[4 * j + 2 * r] * factor, y = o[4 * j + 2 * r + 1] * factor;
#if QUANTISE
            u16 pair;
            asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(y * a.inverse), "f"(x * a.inverse));
            *(u16*)((u8*)a.out + place + 8 * j) = pair;
#else
            *(u32*)((u16*)a.out + place + 8 * j) = pack_bf16(x, y);
#endif
        }
    }
}
