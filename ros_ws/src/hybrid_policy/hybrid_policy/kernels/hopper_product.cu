// y = epilogue(x W' * scale) for a few hundred rows, bf16 or E4M3 on both sides: a tile of 128 rows and NT columns a
// block.
//
// One wave of blocks (the plan picks NT for it); the first STAGES tiles of W are on their way before the kernel in front
// has ended. One warp starts the copies, two warpgroups multiply. With a long K the L2's rate is the bound: then CM x CN
// blocks of a cluster read each tile once; the CN blocks of a row tile each fetch a part of it for all of them, and so
// do the CM blocks of a column tile.
//
// Macros: SIZE (bytes of an element of x and W), NT, STAGES, CM, CN, BIAS, GELU, EIGHT (the result is E4M3, not bf16),
// PDL. wgmma_common.cu comes first, and before it ``product`` for SIZE and NT (hopper_product.py).

#define ROWS 128
#define KT 128                        // bytes of K a stage, four products
#define KE (KT / SIZE)                // values of K a stage
#define A_BYTES (ROWS * KT)
#define STAGE_BYTES (A_BYTES + ((NT * KT + 1023) / 1024) * 1024)
#define CONSUMERS 256
#define STRIDE (NT + 4)               // floats of a row of sums
#define BLOCKS (CM * CN)

struct __align__(64) Arguments {
    u8 x[128];         // tensor maps: boxes of ROWS / CN and of NT / CM rows
    u8 w[128];
    const u16* bias;   // bf16 [columns], where BIAS
    void* out;         // bf16 [rows, columns], or e4m3 where EIGHT
    int rows, columns;
    int chunks;        // stages of K
    float scale;       // of the product
    float out_inverse; // of the result's scale, where EIGHT
};

// This block's part of the tiles of stage ``s``, to every block that needs it. A part of W may begin within the eight
// rows of the swizzle's pattern: the pattern goes by the address in shared memory.
__device__ __forceinline__ void fetch_x(const Arguments& a, u32 base, u32 full, int s, int chunk, int row0, int cm, int cn) {
    u32 to = base + s * STAGE_BYTES + cn * (A_BYTES / CN);
    if (CN == 1) copy_box(to, a.x, chunk * KE, row0, full + 8 * s);
    else copy_box_to(to, a.x, chunk * KE, row0 + cn * (ROWS / CN), full + 8 * s, (u16)((1 | 1 << CM) << cm));
}
__device__ __forceinline__ void fetch_w(const Arguments& a, u32 base, u32 full, int s, int chunk, int column0, int cm, int cn) {
    u32 to = base + s * STAGE_BYTES + A_BYTES + cm * (NT * KT / CM);
    if (CM == 1) copy_box(to, a.w, chunk * KE, column0, full + 8 * s);
    else copy_box_to(to, a.w, chunk * KE, column0 + cm * (NT / CM), full + 8 * s, (u16)(3 << CM * cn));
}

__device__ __forceinline__ float gelu_tanh_of(float x) {
#if EIGHT
    float t, inner = x * (0.7978845608028654f + 0.035677408136300125f * x * x), half = 0.5f * x;
    asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(inner));  // 2^-11: FP8 keeps 2^-4
    return half + half * t;
#else
    return geglu(x, 1.0f);
#endif
}

extern "C" __global__ __launch_bounds__(CONSUMERS + 32, 1) __cluster_dims__(BLOCKS, 1, 1)
void hopper_product(const __grid_constant__ Arguments a) {
    extern __shared__ u8 memory[];
    __shared__ u64 barriers[2 * STAGES];
#if BIAS
    __shared__ __align__(16) float bias[NT];  // a load behind the products would cost its latency, several times
#endif
    u32 base = (shared_address(memory) + 1023) & ~1023u;
    u32 full = shared_address(barriers), empty = full + 8 * STAGES;
    int rank = blockIdx.x % BLOCKS, cm = rank % CM, cn = rank / CM;
    int cluster = blockIdx.x / BLOCKS, row_tiles = (a.rows + ROWS * CM - 1) / (ROWS * CM);
    int row0 = (cluster % row_tiles * CM + cm) * ROWS, column0 = (cluster / row_tiles * CN + cn) * NT;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(full + 8 * s, 1);
            // freed by every block that this block's copies go to
            barrier_init(empty + 8 * s, CONSUMERS / 32 * (CM + CN - 1));
        }
        barriers_initialised();
    }
    __syncthreads();
    if (BLOCKS > 1) cluster_meet();
    float sum[NT / 2];
    if (warp == CONSUMERS / 32) {
        if (lane == 0) {
            prefetch_map(a.x);
            prefetch_map(a.w);
            int early = a.chunks < STAGES ? a.chunks : STAGES;
            for (int i = 0; i < early; i++) {
                expect(full + 8 * i, A_BYTES + NT * KT);
                fetch_w(a, base, full, i, i, column0, cm, cn);
            }
            wait_for_predecessor();
            let_dependents_start();
            for (int i = 0; i < early; i++) fetch_x(a, base, full, i, i, row0, cm, cn);
            for (int i = early; i < a.chunks; i++) {
                int s = i % STAGES;
                wait(empty + 8 * s, (i / STAGES - 1) & 1);
                expect(full + 8 * s, A_BYTES + NT * KT);
                fetch_x(a, base, full, s, i, row0, cm, cn);
                fetch_w(a, base, full, s, i, column0, cm, cn);
            }
        }
        __syncwarp();
    } else {
#pragma unroll
        for (int i = 0; i < NT / 2; i++) sum[i] = 0.0f;
#if BIAS
        for (int i = threadIdx.x; i < NT; i += CONSUMERS)  // while the first tiles are on their way
            bias[i] = column0 + i < a.columns ? __uint_as_float((u32)a.bias[column0 + i] << 16) : 0.0f;
#endif
        u32 group = warp / 4;
        // lanes 0 to CM + CN - 2 free a stage: here, at the other row tile, at the other column tile
        u32 at = lane == 0 ? rank : CM > 1 && lane == 1 ? cn * CM + 1 - cm : (1 - cn) * CM + cm;
        for (int i = 0; i < a.chunks; i++) {
            int s = i % STAGES;
            wait(full + 8 * s, (i / STAGES) & 1);
            u64 x = operand(base + s * STAGE_BYTES + group * (A_BYTES / 2)), w = operand(base + s * STAGE_BYTES + A_BYTES);
            products_begin();
#pragma unroll
            for (int k = 0; k < 4; k++) product(sum, x + 2 * k, w + 2 * k);
            products_commit();
            products_wait<1>();  // the stage before is read
            if (i > 0 && lane < CM + CN - 1) {
                if (BLOCKS > 1) arrive_at(empty + 8 * ((i - 1) % STAGES), at);
                else arrive(empty + 8 * ((i - 1) % STAGES));
            }
        }
        products_wait<0>();
        pin(sum);
    }
    // every copy into this block has landed and every product is done: the stages' memory takes the sums
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
        // a warp reads its own rows alone: four columns a lane
        __syncwarp();
        constexpr int FOURS = NT / 4;
#pragma unroll 4
        for (int i = lane; i < 16 * FOURS; i += 32) {
            int r = warp * 16 + i / FOURS, c = i % FOURS * 4;
            if (row0 + r >= a.rows || column0 + c >= a.columns) continue;
            float4 y;
            asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                         : "=f"(y.x), "=f"(y.y), "=f"(y.z), "=f"(y.w) : "r"(base + (r * STRIDE + c) * 4) : "memory");
            y.x *= a.scale, y.y *= a.scale, y.z *= a.scale, y.w *= a.scale;
#if BIAS
            float4 add = *(const float4*)(bias + c);
            y.x += add.x, y.y += add.y, y.z += add.z, y.w += add.w;
#endif
#if GELU
            y.x = gelu_tanh_of(y.x), y.y = gelu_tanh_of(y.y), y.z = gelu_tanh_of(y.z), y.w = gelu_tanh_of(y.w);
#endif
            long long place = (long long)(row0 + r) * a.columns + column0 + c;
#if EIGHT
            float f = a.out_inverse;
            *(u32*)((u8*)a.out + place) = pack_e4m3(y.x * f, y.y * f, y.z * f, y.w * f);
#else
            *(uint2*)((u16*)a.out + place) = make_uint2(pack_bf16(y.x, y.y), pack_bf16(y.z, y.w));
#endif
        }
    }
    // nobody leaves while a peer may still free a stage here
    if (BLOCKS > 1) asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;" ::: "memory");
}
