// Queries, keys and values of a few hundred rows in one launch: x W' with the rows' scales, RoPE, and each value to its
// place in q or in the caches; the product itself is never written.
//
// W's rows are the M side of the product and tokens its N side, so that NT, any multiple of 8, fits the tokens. A block
// takes 32 of the 128 dims of a head's first half and their partners of the second, of two heads, one a warpgroup: W
// comes by a map that puts dims 8i.. of the first half and of the second next to each other, so that a sixteen of rows,
// a warp's, is eight pairs. Both heads turn by the same angles, which a thread fetches before the products: it has the
// same four dims of each 32nd token from then to its last store.
//
// As in hopper_product.cu: one tile a block, a ring of STAGES (128 bytes of K each), the first tiles of W on their way
// before the kernel in front has ended, one warp that copies and two warpgroups that multiply. Blocks do not share their
// tiles: clusters that read each once were slower for most shapes.
//
// Macros: SIZE (bytes of an element of x and W), NT, STAGES, CACHE8 (the caches are E4M3, not bf16), PDL, SPIN_LIMIT.
// wgmma_common.cu comes first, and before it ``product`` for SIZE and NT (hopper_product.py).

constexpr int CONSUMERS = 256;
constexpr int HEAD_DIM = 256, HALF = 128;
constexpr int DIMS = 32;              // of a head's first half, in a block
constexpr int KE = 128 / SIZE;        // values of K a stage, four products
constexpr int W_PART = 8192;          // of a warpgroup: 64 rows
constexpr int W_BYTES = 2 * W_PART, X_BYTES = NT * 128, STAGE_BYTES = W_BYTES + X_BYTES;
constexpr int STRIDE = 4 * DIMS + 4;  // floats of a token: head, half, dim; no two lanes of a store in one bank
constexpr int STEP = CONSUMERS / 8;   // tokens that 256 threads take at once, four dims each
constexpr int TURNS = (NT + STEP - 1) / STEP;
static_assert(NT % 8 == 0 && NT <= 256, "tile");
static_assert(TURNS * STEP * STRIDE * 4 <= STAGES * STAGE_BYTES, "the sums take the ring's place");

struct __align__(64) Arguments {
    u8 x[128];               // tensor map: boxes of NT rows
    u8 w[128];               // tensor map (K, 8, 2, 16, heads): boxes of 64 rows of one head
    const float* row_scale;  // [rows] or none: of x
    const float* cosines;    // [capacity, 128]
    const float* sines;
    const int* start;        // [1] or none: position of the first row
    u16* q;                  // bf16 [rows, heads, 256]
    void* k;                 // [capacity, kv_heads, 256]
    void* v;
    int rows, heads, kv_heads;
    int chunks;              // stages of K
    float scale;             // of the product
};

// The box of eights ``eight`` to ``eight`` + 3 of both halves of a head.
__device__ __forceinline__ void copy_w(u32 to, const void* map, int column, int eight, int head, u32 bar) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, 0, 0, %3, %4}], [%5];"
        ::"r"(to), "l"(map), "r"(column), "r"(eight), "r"(head), "r"(bar) : "memory");
}

// What a block computes.
struct Block {
    u32 memory, full, empty;
    int row0;   // first token
    int head0;  // of two
    int dim0;   // of 32, in a half

    __device__ __forceinline__ u32 w(int stage) const { return memory + stage * STAGE_BYTES; }
    __device__ __forceinline__ u32 x(int stage) const { return w(stage) + W_BYTES; }

    __device__ __forceinline__ void fetch_w(const Arguments& a, int stage, int chunk) const {
        const u32 bar = full + 8 * stage;
#pragma unroll
        for (int g = 0; g < 2; g++) copy_w(w(stage) + g * W_PART, a.w, chunk * KE, dim0 / 8, head0 + g, bar);
    }
    __device__ __forceinline__ void fetch_x(const Arguments& a, int stage, int chunk) const {
        copy_box(x(stage), a.x, chunk * KE, row0, full + 8 * stage);
    }
};

__device__ void produce(const Arguments& a, const Block& b) {
    prefetch_map(a.w);
    prefetch_map(a.x);
    const int early = a.chunks < STAGES ? a.chunks : STAGES;
    for (int i = 0; i < early; i++) {
        expect(b.full + 8 * i, STAGE_BYTES);
        b.fetch_w(a, i, i);
    }
    wait_for_predecessor();
    let_dependents_start();
    for (int i = 0; i < early; i++) b.fetch_x(a, i, i);
    for (int i = early; i < a.chunks; i++) {
        const int s = i % STAGES;
        await(b.empty + 8 * s, (i / STAGES - 1) & 1);
        expect(b.full + 8 * s, STAGE_BYTES);
        b.fetch_x(a, s, i);
        b.fetch_w(a, s, i);
    }
}

// four floats that no kernel writes while this one may run
__device__ __forceinline__ float4 table4(const float* from) {
    float4 t;
    asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(t.x), "=f"(t.y), "=f"(t.z), "=f"(t.w) : "l"(from));
    return t;
}
__device__ __forceinline__ float4 sums4(u32 from, float factor) {
    float4 t;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(t.x), "=f"(t.y), "=f"(t.z), "=f"(t.w) : "r"(from));
    return make_float4(t.x * factor, t.y * factor, t.z * factor, t.w * factor);
}
// x c + y s
__device__ __forceinline__ float4 turn(float4 x, float4 c, float4 y, float4 s) {
    return make_float4(x.x * c.x + y.x * s.x, x.y * c.y + y.y * s.y, x.z * c.z + y.z * s.z, x.w * c.w + y.w * s.w);
}
__device__ __forceinline__ float4 minus(float4 x) { return make_float4(-x.x, -x.y, -x.z, -x.w); }
__device__ __forceinline__ float4 either(bool first, float4 x, float4 y) {
    return make_float4(first ? x.x : y.x, first ? x.y : y.y, first ? x.z : y.z, first ? x.w : y.w);
}
__device__ __forceinline__ void put4(void* to, int place, bool eight, float4 y) {
    if (eight) *(u32*)((u8*)to + place) = pack_e4m3(y.x, y.y, y.z, y.w);
    else *(uint2*)((u16*)to + place) = make_uint2(pack_bf16(y.x, y.y), pack_bf16(y.z, y.w));
}

// Where a head goes: the tensor, a token's first place in it, and the places from token to token.
struct Target {
    void* to;
    int first, step;
    bool eight, turned;
    __device__ __forceinline__ Target(const Arguments& a, int head, int row, int start) {
        const bool query = head < a.heads;
        turned = head < a.heads + a.kv_heads;
        eight = CACHE8 && !query;
        to = query ? (void*)a.q : turned ? a.k : a.v;
        const int of_kind = query ? head : head - a.heads - (turned ? 0 : a.kv_heads);
        step = (query ? a.heads : a.kv_heads) * HEAD_DIM;
        first = (query ? row : start + row) * step + of_kind * HEAD_DIM;
    }
};

struct Consumer {
    const Arguments& a;
    const Block& b;
    u32 group, warp, lane;  // warp: of its group
    float4 cosine[TURNS], sine[TURNS];
    float row_scale[TURNS];
    int start;

    // of turn ``n``, this thread's token; its first dim of four
    __device__ __forceinline__ int token(int n) const { return threadIdx.x / 8 + n * STEP; }
    __device__ __forceinline__ int dim() const { return threadIdx.x % 8 * 4; }

    __device__ __forceinline__ void load_angles() {
        start = a.start ? *a.start : 0;
#pragma unroll
        for (int n = 0; n < TURNS; n++) {
            const int row = min(b.row0 + token(n), a.rows - 1);  // behind the last: not used
            const int at = (start + row) * HALF + b.dim0 + dim();
            cosine[n] = table4(a.cosines + at);
            sine[n] = table4(a.sines + at);
            row_scale[n] = 1.0f;
            if (a.row_scale) asm volatile("ld.global.f32 %0, [%1];" : "=f"(row_scale[n]) : "l"(a.row_scale + row));
        }
    }

    __device__ __forceinline__ void multiply_tile(float (&sum)[NT / 2]) const {
#pragma unroll
        for (int i = 0; i < NT / 2; i++) sum[i] = 0.0f;
        for (int i = 0; i < a.chunks; i++) {
            const int s = i % STAGES;
            await(b.full + 8 * s, (i / STAGES) & 1);
            const u64 w = operand(b.w(s) + group * W_PART), x = operand(b.x(s));
            products_begin();
#pragma unroll
            for (int k = 0; k < 4; k++) product(sum, w + 2 * k, x + 2 * k);
            products_commit();
            products_wait<1>();  // the stage before is read
            if (i > 0 && lane == 0) arrive(b.empty + 8 * ((i - 1) % STAGES));
        }
        products_wait<0>();
        pin(sum);
    }

    // sums to [token][head][half][dim]
    __device__ __forceinline__ void stage_tile(const float (&sum)[NT / 2]) const {
        const u32 to = b.memory + (2 * (lane % 4) * STRIDE + group * (2 * DIMS) + warp * 8 + lane / 4) * 4;
#pragma unroll
        for (int j = 0; j < NT / 8; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++)  // token 2(lane % 4) + i % 2 of the eight; half i / 2
                asm volatile("st.shared.f32 [%0], %1;" ::"r"(to + ((8 * j + i % 2) * STRIDE + i / 2 * DIMS) * 4),
                             "f"(sum[4 * j + i]) : "memory");
        }
    }

    __device__ __forceinline__ void finish_tile() const {
#pragma unroll
        for (int g = 0; g < 2; g++) {
            const Target t(a, b.head0 + g, b.row0, start);
#pragma unroll
            for (int n = 0; n < TURNS; n++) {
                const u32 from = b.memory + (token(n) * STRIDE + g * (2 * DIMS) + dim()) * 4;
                const float factor = row_scale[n] * a.scale;
                const float4 x = sums4(from, factor), y = sums4(from + DIMS * 4, factor);
                const float4 u = either(t.turned, turn(x, cosine[n], minus(y), sine[n]), x);
                const float4 v = either(t.turned, turn(y, cosine[n], x, sine[n]), y);
                if (token(n) < NT && b.row0 + token(n) < a.rows) {
                    const int place = t.first + token(n) * t.step + b.dim0 + dim();
                    put4(t.to, place, t.eight, u);
                    put4(t.to, place + HALF, t.eight, v);
                }
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(CONSUMERS + 32, 1) qkv_product(const __grid_constant__ Arguments a) {
    extern __shared__ u8 memory[];
    __shared__ u64 barriers[2 * STAGES];
    Block b;
    b.memory = (shared_address(memory) + 1023) & ~1023u;
    b.full = shared_address(barriers), b.empty = b.full + 8 * STAGES;
    const int token_tiles = (a.rows + NT - 1) / NT;  // blocks of the same features follow each other
    b.row0 = (int)blockIdx.x % token_tiles * NT;
    const int feature_tile = (int)blockIdx.x / token_tiles;
    b.head0 = feature_tile / (HALF / DIMS) * 2, b.dim0 = feature_tile % (HALF / DIMS) * DIMS;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(b.full + 8 * s, 1);
            barrier_init(b.empty + 8 * s, CONSUMERS / 32);
        }
        barriers_initialised();
    }
    __syncthreads();
    if (warp == CONSUMERS / 32) {
        if (lane == 0) produce(a, b);
        __syncwarp();
    } else {
        Consumer c{a, b, warp / 4, warp % 4, lane};
        float sum[NT / 2];
        wait_for_predecessor();
        c.load_angles();
        c.multiply_tile(sum);
        // both warpgroups have read all that came: the sums take its place
        named_barrier(1, CONSUMERS);
        c.stage_tile(sum);
        named_barrier(1, CONSUMERS);
        c.finish_tile();
    }
}
