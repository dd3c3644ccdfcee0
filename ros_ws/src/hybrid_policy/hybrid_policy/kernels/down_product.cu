// y = x W' * scale for a few hundred rows of x and a long K, bf16 or E4M3 in, bf16 out: two blocks have half of K each.
//
// A block reads (128 + NT) * 128 bytes into its shared memory for 4 NT clocks of products, which read their operands from
// there, so that tiles have to be large; with half of K each there are as many blocks as multiprocessors all the same.
// W's rows are the M side of the product and tokens its N side, so that NT, any multiple of 8, fits the tokens. Behind
// the products each block of a pair keeps half of the tile's tokens and sends the sums of the others to its partner, by
// distributed shared memory, into the first stages of the partner's ring: its last chunks lie in the last stages, so
// the first are free, and the partner has said so, before the products end.
//
// One warp starts the copies (a ring of STAGES, 128 bytes of K each; the first tiles of W before the kernel in front has
// ended), two warpgroups multiply 64 rows of W each. With SHARE 2 the two blocks of a cluster have the same tokens and
// half of K instead, and fetch half of x each, for both: a quarter less for the L2 to give. Sums then go through memory.
//
// Macros: SIZE (bytes of an element of x and W), NT, STAGES, SHARE (1, 2), PDL, SPIN_LIMIT, SHARED (bytes of a block).
// wgmma_common.cu comes first, and before it ``product`` for SIZE and NT (hopper_product.py). K has more than 128 bytes.

constexpr int CONSUMERS = 256, WARPS = CONSUMERS / 32;
constexpr int FEATURES = 128;                 // of a tile
constexpr int KE = 128 / SIZE;                // values of K a stage, four products
constexpr int W_PART = 8192;                  // of a warpgroup: 64 rows
constexpr int W_BYTES = 2 * W_PART, X_BYTES = NT * 128, STAGE_BYTES = W_BYTES + X_BYTES;
constexpr int EIGHTS = NT / 8;                // of tokens
constexpr int FIRST = (EIGHTS + 1) / 2;       // those that a pair's first block keeps
constexpr int SUMS_BYTES = FEATURES * 8 * 4;  // of an eight
constexpr int FREED = (FIRST * SUMS_BYTES + STAGE_BYTES - 1) / STAGE_BYTES;  // stages that the partner's sums take
constexpr int ROW_BYTES = 128 + 16;           // a token's 64 features, bf16; eight rows lie in different banks
constexpr int STAGING = FIRST * 8 * ROW_BYTES;
constexpr int AT_STAGING = FREED * STAGE_BYTES;
constexpr int AT_BARRIERS = STAGES * STAGE_BYTES;
static_assert(NT % 8 == 0 && NT >= 16 && NT <= 256, "tile");
static_assert(FREED < STAGES && AT_STAGING + 2 * STAGING <= AT_BARRIERS, "the ring holds what follows the products");
static_assert(AT_BARRIERS + 16 * STAGES + 8 + 8 * WARPS <= SHARED, "shared memory");

struct alignas(64) Arguments {
    u8 w[128];  // tensor maps: boxes of FEATURES and of NT / SHARE rows
    u8 x[128];
    u16* out;   // bf16 [tokens, features]
    float* sums;  // [blocks][FIRST eights][256 threads][4], where SHARE is 2
    u32* flags;   // [blocks][WARPS], zeros
    int tokens, features, token_tiles;
    int chunks;  // stages of K
    float scale;
};

struct Block {
    u32 memory;
    u32 part, side;      // half of K; tile of the cluster
    int feature, token;  // the tile's first
    int begin, count;    // chunks of K

    __device__ __forceinline__ Block(const Arguments& a, u32 memory) : memory(memory) {
        const int rank = blockIdx.x % 2, pair = blockIdx.x / 2, half = (a.chunks + 1) / 2;
        part = SHARE == 1 ? rank : pair % 2, side = SHARE == 1 ? 0 : rank;
        const int tile = pair / SHARE;  // the tiles of the same features follow each other
        feature = (tile / a.token_tiles * SHARE + side) * FEATURES, token = tile % a.token_tiles * NT;
        begin = part * half, count = part ? a.chunks - half : half;
    }
    // the other half of K: its rank where SHARE is 1, its block
    __device__ __forceinline__ u32 partner() const { return 1 - part; }
    __device__ __forceinline__ u32 partner_block() const { return blockIdx.x ^ 2; }
    // where chunk ``i`` goes: the last one to the last stage
    __device__ __forceinline__ u32 stage(int i) const { return (u32)(i + STAGES - count % STAGES) % STAGES; }
    // the chunk whose products are the last to read what the partner's sums will take; negative: there is none
    __device__ __forceinline__ int last_below() const { return count - 1 - STAGES + FREED; }
    __device__ __forceinline__ u32 w(u32 stage) const { return memory + stage * STAGE_BYTES; }
    __device__ __forceinline__ u32 x(u32 stage) const { return w(stage) + W_BYTES; }
    __device__ __forceinline__ u32 full(u32 stage) const { return memory + AT_BARRIERS + stage * 16; }
    __device__ __forceinline__ u32 empty(u32 stage) const { return full(stage) + 8; }
    // passes once the partner takes sums
    __device__ __forceinline__ u32 ready() const { return memory + AT_BARRIERS + STAGES * 16; }
    // passes once the sums of this warp's features have come
    __device__ __forceinline__ u32 summed(u32 warp) const { return ready() + 8 + warp * 8; }
};

// ---------------------------------------------------------------------------------------------------------- copies
__device__ __forceinline__ void fetch_w(const Arguments& a, const Block& b, int i) {
    const u32 stage = b.stage(i);
    expect(b.full(stage), STAGE_BYTES);
    copy_box(b.w(stage), a.w, (b.begin + i) * KE, b.feature, b.full(stage));
}

__device__ __forceinline__ void fetch_x(const Arguments& a, const Block& b, int i) {
    const u32 stage = b.stage(i), row = b.side * (NT / SHARE);
    const int column = (b.begin + i) * KE;
    if (SHARE == 1) copy_box(b.x(stage), a.x, column, b.token, b.full(stage));
    else copy_box_to(b.x(stage) + row * 128, a.x, column, b.token + row, b.full(stage), 3);
}

// a whole warp
__device__ __forceinline__ void produce(const Arguments& a, const Block& b, u32 lane) {
    const int early = min(b.count, STAGES);
    if (lane == 0) {
        prefetch_map(a.w);
        prefetch_map(a.x);
        for (int i = 0; i < early; i++) fetch_w(a, b, i);
    }
    __syncwarp();
    cluster_wait();  // the others' barriers are there
    if (lane == 0) {
        wait_for_predecessor();
        let_dependents_start();
        for (int i = 0; i < early; i++) fetch_x(a, b, i);
        for (int i = early; i < b.count; i++) {
            await(b.empty(b.stage(i)), (i / STAGES - 1) & 1);
            fetch_w(a, b, i);
            fetch_x(a, b, i);
        }
    }
    __syncwarp();
    cluster_arrive();
}

// --------------------------------------------------------------------------------------------------------- results
// A warp's 16 features of all tokens: a thread has features ``lane / 4`` and 8 behind it of tokens 8 j + 2 (lane % 4) +
// {0, 1}, as [4 j + 2 (second feature) + (second token)].
struct Consumer {
    const Arguments& a;
    const Block& b;
    const u32 warp, lane;
    float sum[NT / 2];

    __device__ __forceinline__ u32 group() const { return warp / 4; }

    // this warp has read the stage: to every block that copies into it
    __device__ __forceinline__ void release(u32 stage) const {
        if (SHARE == 1) {
            if (lane == 0) arrive(b.empty(stage));
        } else if (lane < SHARE) {
            arrive_at(b.empty(stage), lane);
        }
    }
    __device__ __forceinline__ void take_sums() const {
        if (SHARE == 1 && lane == 0) arrive_at(b.ready(), b.partner());
    }

    __device__ __forceinline__ void multiply_all() {
#pragma unroll
        for (int i = 0; i < NT / 2; i++) sum[i] = 0.0f;
        if (b.last_below() < 0) take_sums();
        for (int i = 0; i < b.count; i++) {
            const u32 stage = b.stage(i);
            await(b.full(stage), (i / STAGES) & 1);
            const u64 w = operand(b.w(stage) + group() * W_PART), x = operand(b.x(stage));
            products_begin();
#pragma unroll
            for (int k = 0; k < 4; k++) product(sum, w + 2 * k, x + 2 * k);
            products_commit();
            products_wait<1>();  // the stage before is read
            if (i > 0) release(b.stage(i - 1));
            if (i > 0 && i - 1 == b.last_below()) take_sums();
        }
        products_wait<0>();
        pin(sum);
    }

    __device__ __forceinline__ float* passed_on(u32 block) const {
        return a.sums + (long long)block * (FIRST * SUMS_BYTES / 4) + (warp * 32 + lane) * 4;
    }

    // sums of eights BEGIN to END of tokens, each thread's own to the same thread of the partner
    template <int BEGIN, int END>
    __device__ __forceinline__ void send() const {
        if constexpr (SHARE == 1) {
            await(b.ready(), 0);
            const u32 to = of_rank(b.memory + (warp * 32 + lane) * 16, b.partner());
            const u32 bar = of_rank(b.summed(warp), b.partner());
#pragma unroll
            for (int j = BEGIN; j < END; j++)
                send4(to + (j - BEGIN) * SUMS_BYTES, bar, sum[4 * j], sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3]);
        } else {
            float* to = passed_on(b.partner_block());
#pragma unroll
            for (int j = BEGIN; j < END; j++)
                asm volatile("st.global.cg.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to + (j - BEGIN) * (SUMS_BYTES / 4)),
                             "f"(sum[4 * j]), "f"(sum[4 * j + 1]), "f"(sum[4 * j + 2]), "f"(sum[4 * j + 3]) : "memory");
            __syncwarp();
            if (lane == 0)
                asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(a.flags + b.partner_block() * WARPS + warp), "r"(1)
                             : "memory");
        }
    }

    // until the partner's have come
    __device__ __forceinline__ void await_sums() const {
        if constexpr (SHARE == 1) {
            await(b.summed(warp), 0);
        } else {
            u32* flag = a.flags + blockIdx.x * WARPS + warp;
            if (lane == 0) {
                for (u32 there = 0, polls = 0; !there && !(SPIN_LIMIT && polls > SPIN_LIMIT); polls++)
                    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(there) : "l"(flag) : "memory");
                asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(0) : "memory");
            }
            __syncwarp();
        }
    }
    __device__ __forceinline__ float4 partners(int j) const {
        if constexpr (SHARE == 1) return shared4(b.memory + j * SUMS_BYTES + (warp * 32 + lane) * 16);
        float4 v;
        asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                     : "l"(passed_on(blockIdx.x) + j * (SUMS_BYTES / 4)) : "memory");
        return v;
    }

    // feature lane / 4 and 8 behind it, each with two tokens, of the block's eight ``j``, its first one at ``begin``
    __device__ __forceinline__ void whole(const float4& theirs, int begin, int j, u32& first, u32& second) const {
        const float* own = sum + 4 * (begin + j);
        first = pack_bf16((own[0] + theirs.x) * a.scale, (own[1] + theirs.y) * a.scale);
        second = pack_bf16((own[2] + theirs.z) * a.scale, (own[3] + theirs.w) * a.scale);
    }

    // eights BEGIN to END through shared memory, [token][64 features] a warpgroup: stores are whole lines
    template <int BEGIN, int END>
    __device__ __forceinline__ void store() const {
        const u32 from = b.memory + AT_STAGING + group() * STAGING;
        const u32 to = from + (lane / 16 * 8 + lane % 8) * ROW_BYTES + (2 * (warp % 4) + lane / 8 % 2) * 16;
        await_sums();
        float4 theirs[END - BEGIN];
#pragma unroll
        for (int j = 0; j < END - BEGIN; j++) theirs[j] = partners(j);
#pragma unroll
        for (int j = 0; j < END - BEGIN; j += 2) {
            u32 r[4];
            whole(theirs[j], BEGIN, j, r[0], r[1]);
            if (j + 1 < END - BEGIN) {
                whole(theirs[j + 1], BEGIN, j + 1, r[2], r[3]);
                transpose4(to + j * (8 * ROW_BYTES), r);
            } else {
                transpose2(to + j * (8 * ROW_BYTES), r[0], r[1]);
            }
        }
        named_barrier(1 + group(), 128);
        const int feature = b.feature + group() * 64 + lane % 8 * 8;
        if (feature >= a.features) return;
        for (int t = warp % 4 * 4 + lane / 8; t < (END - BEGIN) * 8; t += 16) {
            const int token = b.token + BEGIN * 8 + t;
            if (token >= a.tokens) return;
            *(float4*)(a.out + (long long)token * a.features + feature) = shared4(from + t * ROW_BYTES + lane % 8 * 16);
        }
    }

    // eights OWN to OWN_END stay here
    template <int OWN, int OWN_END, int OTHERS, int OTHERS_END>
    __device__ __forceinline__ void finish() const {
        send<OTHERS, OTHERS_END>();
        cluster_arrive();
        named_barrier(3, CONSUMERS);  // all products are done: the last stages' memory takes the results
        store<OWN, OWN_END>();
    }
};

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(CONSUMERS + 32, 1)
    down_product(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(1024) u8 memory[];
    const Block b(a, shared_address(memory));
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (u32 s = 0; s < STAGES; s++) {
            barrier_init(b.full(s), 1);
            barrier_init(b.empty(s), WARPS * SHARE);  // freed by every block that this block's copies go to
        }
        barrier_init(b.ready(), WARPS);
        for (u32 w = 0; w < WARPS; w++) {
            barrier_init(b.summed(w), 1);
            expect(b.summed(w), (b.part ? EIGHTS - FIRST : FIRST) * (SUMS_BYTES / WARPS));
        }
        barriers_initialised();
    }
    __syncthreads();
    cluster_arrive();
    if (warp == WARPS) {
        produce(a, b, lane);
    } else {
        Consumer c{a, b, warp, lane};
        cluster_wait();  // the others' barriers are there
        wait_for_predecessor();
        c.multiply_all();
        if (b.part == 0) c.finish<0, FIRST, FIRST, EIGHTS>();
        else c.finish<FIRST, EIGHTS, 0, FIRST>();
    }
    cluster_wait();  // nobody leaves while a peer may still send, or free a stage here
}
