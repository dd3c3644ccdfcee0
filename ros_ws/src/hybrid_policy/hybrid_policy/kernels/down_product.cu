// y = x W' * scale for a few hundred rows of x and a long K, bf16 or E4M3 in, bf16 out: two blocks have half of K each.
//
// A stage of K is (128 + NT) * 128 bytes into shared memory and 4 NT clocks of products, which read their operands from
// there, so that tiles have to be large; with half of K each there are as many blocks as multiprocessors all the same.
// W's rows are the M side of the product and tokens its N side, so that NT, any multiple of 8, fits the tokens.
//
// Each block of a pair keeps half of the tile's tokens and sends the sums of the others to its partner, by distributed
// shared memory. Of the last TAIL chunks it multiplies the others' tokens first, so that their sums are on their way
// while its own are multiplied. They go to the first stages of the partner's ring: its last chunks lie in the last
// stages, so the first are free, and the partner has said so, before the tail begins. From E4M3 they cross as bf16: what
// that adds to the error is less than what a sum of twice the length loses in the tensor core.
//
// One warp starts the copies (a ring of STAGES, 128 bytes of K each; the first AHEAD tiles of W before the kernel in
// front has ended), two warpgroups multiply 64 rows of W each.
//
// Macros: SIZE (bytes of an element of x and W), NT, STAGES, AHEAD, PDL, SPIN_LIMIT, SHARED (bytes of a block).
// wgmma_common.cu comes first, and before it ``product`` for all of NT and both its halves (down_product.py). Either half
// of K has STAGES chunks at least.

constexpr int CONSUMERS = 256, WARPS = CONSUMERS / 32;
constexpr int FEATURES = 128;             // of a tile
constexpr int KE = 128 / SIZE;            // values of K a stage, four products
constexpr int W_PART = 8192;              // of a warpgroup: 64 rows
constexpr int W_BYTES = 2 * W_PART, STAGE_BYTES = W_BYTES + NT * 128;
// Eights of tokens. The others' lie before a block's own in a tile of x; of an odd number the middle one lies between
// them and counts with the others', although the pair's first block keeps it.
constexpr int OWN = NT / 16, OTHERS = NT / 8 - OWN;
constexpr bool SHORT = SIZE == 1;         // sums cross as bf16
constexpr int PIECE_BYTES = CONSUMERS * 16;  // of sums: an eight's, or two eights' as bf16
constexpr int PIECES = SHORT ? (OTHERS + 1) / 2 : OTHERS;
constexpr int FREED = (PIECES * PIECE_BYTES + STAGE_BYTES - 1) / STAGE_BYTES;  // stages that sums take
constexpr int TAIL = STAGES - FREED;
constexpr int ROW_BYTES = 128 + 16;       // a token's 64 features, bf16; eight rows lie in different banks
constexpr int STAGING = OTHERS * 8 * ROW_BYTES;
constexpr int AT_STAGING = FREED * STAGE_BYTES;
constexpr int AT_BARRIERS = STAGES * STAGE_BYTES;
static_assert(NT % 8 == 0 && NT >= 24 && NT <= 256, "tile");
static_assert(TAIL > 0 && AT_STAGING + 2 * STAGING <= AT_BARRIERS, "the ring holds what follows the products");
static_assert(AT_BARRIERS + 16 * STAGES + 8 + 8 * WARPS <= SHARED, "shared memory");

struct alignas(64) Arguments {
    u8 w[128];  // tensor maps: boxes of FEATURES rows, of OWN eights and of eight
    u8 x[128], middle[128];
    u16* out;   // bf16 [tokens, features]
    int tokens, features, token_tiles;
    int chunks;  // stages of K
    float scale;
};

struct Block {
    u32 memory, part;    // half of K
    int feature, token;  // the tile's first
    int own, others;     // their first tokens in the tile
    int begin, count;    // chunks of K

    __device__ __forceinline__ Block(const Arguments& a, u32 memory) : memory(memory) {
        const int tile = blockIdx.x / 2, half = (a.chunks + 1) / 2;
        part = blockIdx.x % 2;
        // the tiles of the same features follow each other
        feature = tile / a.token_tiles * FEATURES, token = tile % a.token_tiles * NT;
        own = part ? OTHERS * 8 : 0, others = part ? 0 : OTHERS * 8;
        begin = part * half, count = part ? a.chunks - half : half;
    }
    // where chunk ``i`` goes: the last one to the last stage
    __device__ __forceinline__ u32 stage(int i) const { return (u32)(i + STAGES - count % STAGES) % STAGES; }
    // the first chunk of the tail, which lies in stage FREED: those before have let go of the stages that sums take
    __device__ __forceinline__ int tail() const { return count - TAIL; }
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
    const u32 stage = b.stage(i), bar = b.full(stage);
    const int column = (b.begin + i) * KE;
    copy_box(b.x(stage), a.x, column, b.token + b.others, bar);
    if (OWN != OTHERS) copy_box(b.x(stage) + OWN * 1024, a.middle, column, b.token + OWN * 8, bar);
    copy_box(b.x(stage) + OTHERS * 1024, a.x, column, b.token + b.own, bar);
}

// A whole warp. It meets the partner before it waits for anything: racecheck lets nobody of a block pass
// ``cluster_wait`` until all are there.
__device__ __forceinline__ void produce(const Arguments& a, const Block& b, u32 lane) {
    const int ahead = min(b.count, AHEAD);
    if (lane == 0) {
        prefetch_map(a.w);
        prefetch_map(a.x);
        for (int i = 0; i < ahead; i++) fetch_w(a, b, i);
    }
    __syncwarp();
    cluster_wait();
    if (lane == 0) {
        wait_for_predecessor();
        for (int i = 0; i < ahead; i++) fetch_x(a, b, i);
        for (int i = ahead; i < b.count; i++) {
            if (i >= STAGES) await(b.empty(b.stage(i)), (i / STAGES - 1) & 1);
            fetch_w(a, b, i);
            fetch_x(a, b, i);
        }
        let_dependents_start();  // near the end: they need not stand by all the while
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
    float passed[4 * OTHERS], own[4 * OWN];  // sums

    __device__ __forceinline__ u32 group() const { return warp / 4; }
    __device__ __forceinline__ u64 w(u32 stage) const { return operand(b.w(stage) + group() * W_PART); }

    // all but the tail
    __device__ __forceinline__ void multiply() {
#pragma unroll
        for (int i = 0; i < 4 * OTHERS; i++) passed[i] = 0.0f;
#pragma unroll
        for (int i = 0; i < 4 * OWN; i++) own[i] = 0.0f;
        for (int i = 0; i < b.tail(); i++) {
            const u32 stage = b.stage(i);
            await(b.full(stage), (i / STAGES) & 1);
            const u64 w = this->w(stage), x = operand(b.x(stage));
            products_begin();
#pragma unroll
            for (int k = 0; k < 4; k++) product(passed, own, w + 2 * k, x + 2 * k);
            products_commit();
            products_wait<1>();  // the stage before is read
            if (i > 0 && lane == 0) arrive(b.empty(b.stage(i - 1)));
        }
        products_wait<0>();
        pin(passed);
        pin(own);
        if (lane == 0) arrive_at(b.ready(), 1 - b.part);
    }

    // the tail's products of the eights from ``begin`` on, each chunk a group or all of them one
    template <int N>
    __device__ __forceinline__ void multiply_tail(float (&sum)[N], int begin, bool apart) const {
#pragma unroll
        for (int t = 0; t < TAIL; t++) {
            if (apart) await(b.full(FREED + t), ((b.tail() + t) / STAGES) & 1);
            const u64 w = this->w(FREED + t), x = operand(b.x(FREED + t) + begin * 1024);
            if (apart || t == 0) products_begin();
#pragma unroll
            for (int k = 0; k < 4; k++) product(sum, w + 2 * k, x + 2 * k);
            if (apart || t == TAIL - 1) products_commit();
        }
    }

    // each thread's sums to the same thread of the partner
    __device__ __forceinline__ void send() const {
        await(b.ready(), 0);
        const u32 to = of_rank(b.memory + (warp * 32 + lane) * 16, 1 - b.part), bar = of_rank(b.summed(warp), 1 - b.part);
#pragma unroll
        for (int p = 0; p < PIECES; p++) {
            float v[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int at = 8 * p + 2 * i;
                if constexpr (SHORT) v[i] = at < 4 * OTHERS ? __uint_as_float(pack_bf16(passed[at], passed[at + 1])) : 0.0f;
                else v[i] = passed[4 * p + i];
            }
            send4(to + p * PIECE_BYTES, bar, v[0], v[1], v[2], v[3]);
        }
    }

    // of the eights that may be kept, in the order in which the partner's come
    __device__ __forceinline__ float& kept(int i) { return i < 4 * OWN ? own[i] : passed[i]; }

    // the partner's sums
    __device__ __forceinline__ void add() {
        await(b.summed(warp), 0);
#pragma unroll
        for (int p = 0; p < PIECES; p++) {
            const float4 v = shared4(b.memory + p * PIECE_BYTES + (warp * 32 + lane) * 16);
            const float theirs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int at = 8 * p + 2 * i;
                if constexpr (!SHORT) {
                    kept(4 * p + i) += theirs[i];
                } else if (at < 4 * OTHERS) {
                    kept(at) += low_of(__float_as_uint(theirs[i]));
                    kept(at + 1) += high_of(__float_as_uint(theirs[i]));
                }
            }
        }
    }

    // results through shared memory, [token][64 features] a warpgroup: stores are whole lines
    __device__ __forceinline__ void store() {
        const u32 from = b.memory + AT_STAGING + group() * STAGING;
        const u32 to = from + (lane / 16 * 8 + lane % 8) * ROW_BYTES + (2 * (warp % 4) + lane / 8 % 2) * 16;
#pragma unroll
        for (int j = 0; j < OTHERS; j += 2) {
            u32 r[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int at = 4 * j + 2 * i;
                r[i] = at < 4 * OTHERS ? pack_bf16(kept(at) * a.scale, kept(at + 1) * a.scale) : 0;
            }
            if (j + 1 < OTHERS) transpose4(to + j * (8 * ROW_BYTES), r);
            else transpose2(to + j * (8 * ROW_BYTES), r[0], r[1]);
        }
        named_barrier(1 + group(), 128);
        const int feature = b.feature + group() * 64 + lane % 8 * 8, end = 8 * (b.part ? OWN : OTHERS);
        if (feature >= a.features) return;
        for (int t = warp % 4 * 4 + lane / 8; t < end; t += 16) {
            const int token = b.token + b.own + t;
            if (token >= a.tokens) return;
            *(float4*)(a.out + (long long)token * a.features + feature) = shared4(from + t * ROW_BYTES + lane % 8 * 16);
        }
    }

    __device__ __forceinline__ void finish() {
        // sums that the compiler may place anew: as a part of the whole product's they make it serialise some widths
        float tail[4 * OWN];
#pragma unroll
        for (int i = 0; i < 4 * OWN; i++) asm volatile("mov.f32 %0, %1;" : "=f"(tail[i]) : "f"(own[i]));
        multiply_tail(passed, 0, true);
        multiply_tail(tail, OTHERS, false);
        products_wait<1>();
        pin(passed);
        send();
        cluster_arrive();
        products_wait<0>();
        pin(tail);
#pragma unroll
        for (int i = 0; i < 4 * OWN; i++) own[i] = tail[i];
        named_barrier(3, CONSUMERS);  // all products are done: the last stages' memory takes the results
        add();
        store();
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
            barrier_init(b.empty(s), WARPS);
        }
        barrier_init(b.ready(), WARPS);
        for (u32 w = 0; w < WARPS; w++) {
            barrier_init(b.summed(w), 1);
            expect(b.summed(w), PIECES * (PIECE_BYTES / WARPS));
        }
        barriers_initialised();
    }
    __syncthreads();
    cluster_arrive();
    if (warp == WARPS) {
        produce(a, b, lane);
    } else {
        Consumer c{a, b, warp, lane};
        cluster_wait();  // the partner's barriers are there
        wait_for_predecessor();
        c.multiply();
        c.finish();
    }
    cluster_wait();  // nobody leaves while a partner may still send
}
