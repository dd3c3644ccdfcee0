// y = epilogue(x W' * scale) for a few hundred rows, FP8 E4M3 on both sides: a tile of 128 rows and NT columns a block.
//
// At these sizes a product is a few microseconds of moving tiles out of the L2, so: one wave of blocks (the plan picks
// NT for it), a long K cut between the SPLIT blocks of a cluster, whose partial sums meet in shared memory in the
// order of the ranks, and the first STAGES tiles of W on their way before the kernel in front has ended. One warp
// starts the copies, two warpgroups multiply.
//
// Macros: NT, STAGES, SPLIT, BIAS, GELU (then the result is E4M3), PDL. wgmma_common.cu comes first, and before it
// ``product`` for NT (fp8_product.py).

#define ROWS 128
#define KT 128                        // bytes of K a stage
#define A_BYTES (ROWS * KT)
#define STAGE_BYTES (A_BYTES + ((NT * KT + 1023) / 1024) * 1024)
#define CONSUMERS 256
#define STRIDE (NT + 4)               // floats of a row of partial sums

struct __align__(64) Arguments {
    u8 x[128];         // tensor maps: boxes of ROWS and of NT rows
    u8 w[128];
    const u16* bias;   // bf16 [columns], where BIAS
    void* out;         // bf16 [rows, columns], or e4m3 where GELU
    int rows, columns;
    int chunks;        // stages of K, over all ranks
    float scale;       // of the product
    float out_inverse; // of the result, where GELU
};

__device__ __forceinline__ float4 load_part(u32 address) {
    float4 v;
#if SPLIT > 1
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address));
#else
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address));
#endif
    return v;
}

__device__ __forceinline__ u32 bf16_pair(float low, float high) {
    u32 d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

__device__ __forceinline__ u32 e4m3_four(float a, float b, float c, float d) {
    u32 bytes;
    asm("{\n.reg .b16 l, h;\ncvt.rn.satfinite.e4m3x2.f32 l, %2, %1;\ncvt.rn.satfinite.e4m3x2.f32 h, %4, %3;\n"
        "mov.b32 %0, {l, h};\n}" : "=r"(bytes) : "f"(a), "f"(b), "f"(c), "f"(d));
    return bytes;
}

__device__ __forceinline__ float gelu_tanh_of(float x) {
    float t, inner = x * (0.7978845608028654f + 0.035677408136300125f * x * x), half = 0.5f * x;
    asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(inner));  // 2^-11: FP8 keeps 2^-4
    return half + half * t;
}

extern "C" __global__ __launch_bounds__(CONSUMERS + 32, 1)
#if SPLIT > 1
__cluster_dims__(SPLIT, 1, 1)
#endif
void fp8_product(const __grid_constant__ Arguments a) {
    extern __shared__ u8 memory[];
    __shared__ u64 barriers[2 * STAGES];
    u32 base = (shared_address(memory) + 1023) & ~1023u;
    u32 full = shared_address(barriers), empty = full + 8 * STAGES;
    int rank = blockIdx.x % SPLIT, tile = blockIdx.x / SPLIT;
    int row_tiles = (a.rows + ROWS - 1) / ROWS;
    int row0 = tile % row_tiles * ROWS, column0 = tile / row_tiles * NT;
    int count = (a.chunks - rank + SPLIT - 1) / SPLIT;  // rank, rank + SPLIT, ...
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, CONSUMERS / 32);
        }
        barriers_initialised();
    }
    __syncthreads();
    float sum[NT / 2];
    if (warp == CONSUMERS / 32) {
        if (lane == 0) {
            prefetch_map(a.x);
            prefetch_map(a.w);
            int early = count < STAGES ? count : STAGES;
            for (int i = 0; i < early; i++) {
                expect(full + 8 * i, A_BYTES + NT * KT);
                copy_box(base + i * STAGE_BYTES + A_BYTES, a.w, (i * SPLIT + rank) * KT, column0, full + 8 * i);
            }
            wait_for_predecessor();
            let_dependents_start();
            for (int i = 0; i < early; i++)
                copy_box(base + i * STAGE_BYTES, a.x, (i * SPLIT + rank) * KT, row0, full + 8 * i);
            for (int i = early; i < count; i++) {
                int s = i % STAGES;
                wait(empty + 8 * s, (i / STAGES - 1) & 1);
                expect(full + 8 * s, A_BYTES + NT * KT);
                copy_box(base + s * STAGE_BYTES, a.x, (i * SPLIT + rank) * KT, row0, full + 8 * s);
                copy_box(base + s * STAGE_BYTES + A_BYTES, a.w, (i * SPLIT + rank) * KT, column0, full + 8 * s);
            }
        }
        __syncwarp();
    } else {
#pragma unroll
        for (int i = 0; i < NT / 2; i++) sum[i] = 0.0f;
        u32 group = warp / 4;
        for (int i = 0; i < count; i++) {
            int s = i % STAGES;
            wait(full + 8 * s, (i / STAGES) & 1);
            u64 x = operand(base + s * STAGE_BYTES + group * (A_BYTES / 2)), w = operand(base + s * STAGE_BYTES + A_BYTES);
            products_begin();
#pragma unroll
            for (int k = 0; k < 4; k++) product(sum, x + 2 * k, w + 2 * k);
            products_commit();
            products_wait<1>();  // the stage before is read
            if (i > 0 && lane == 0) arrive(empty + 8 * ((i - 1) % STAGES));
        }
        products_wait<0>();
        pin(sum);
    }
    // every copy has landed and every product is done: the stages' memory takes the partial sums
    __syncthreads();
    if (warp < CONSUMERS / 32) {
        wait_for_predecessor();  // long past; orders this thread's writes of y behind its readers
        u32 to = base + ((warp * 16 + lane / 4) * STRIDE + 2 * (lane % 4)) * 4;
#pragma unroll
        for (int j = 0; j < NT / 8; j++) {
            asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to + 32 * j), "f"(sum[4 * j]), "f"(sum[4 * j + 1]) : "memory");
            asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to + 32 * j + 8 * STRIDE * 4), "f"(sum[4 * j + 2]),
                         "f"(sum[4 * j + 3]) : "memory");
        }
    }
#if SPLIT > 1
    asm volatile("fence.release.sync_restrict::shared::cta.cluster;\nbarrier.cluster.arrive.relaxed;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
    __syncthreads();
#endif
    // this rank's share of the rows, four columns a thread
    if (warp < CONSUMERS / 32) {
        constexpr int SHARE = (ROWS + SPLIT - 1) / SPLIT, FOURS = NT / 4;
#pragma unroll 4
        for (int i = threadIdx.x; i < SHARE * FOURS; i += CONSUMERS) {
            int r = rank * SHARE + i / FOURS, c = i % FOURS * 4;
            if (r >= ROWS || row0 + r >= a.rows || column0 + c >= a.columns) continue;
            float4 part[SPLIT];
            u32 at = base + (r * STRIDE + c) * 4;
#pragma unroll
            for (int p = 0; p < SPLIT; p++) part[p] = load_part(SPLIT > 1 ? of_rank(at, p) : at);
            float4 y = part[0];
#pragma unroll
            for (int p = 1; p < SPLIT; p++) y.x += part[p].x, y.y += part[p].y, y.z += part[p].z, y.w += part[p].w;
            y.x *= a.scale, y.y *= a.scale, y.z *= a.scale, y.w *= a.scale;
#if BIAS
            uint2 bias = *(const uint2*)(a.bias + column0 + c);
            y.x += __uint_as_float(bias.x << 16), y.y += __uint_as_float(bias.x & 0xffff0000u);
            y.z += __uint_as_float(bias.y << 16), y.w += __uint_as_float(bias.y & 0xffff0000u);
#endif
            long long place = (long long)(row0 + r) * a.columns + column0 + c;
#if GELU
            float f = a.out_inverse;
            *(u32*)((u8*)a.out + place) =
                e4m3_four(gelu_tanh_of(y.x) * f, gelu_tanh_of(y.y) * f, gelu_tanh_of(y.z) * f, gelu_tanh_of(y.w) * f);
#else
            *(uint2*)((u16*)a.out + place) = make_uint2(bf16_pair(y.x, y.y), bf16_pair(y.z, y.w));
#endif
        }
    }
#if SPLIT > 1
    asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;" ::: "memory");  // peers read this memory
#endif
}
