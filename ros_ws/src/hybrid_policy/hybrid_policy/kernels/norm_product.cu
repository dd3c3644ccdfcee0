// x += y + bias and h = LayerNorm(x), for y = a W' * scale of a few hundred rows: the product, the residual and the norm
// behind it in one launch. E4M3 in, x in float32, h in E4M3.
//
// The eight blocks of a cluster have a tile of 64 rows, an eighth of the columns (NT) each. One warp starts the copies
// (a ring of STAGES, 128 bytes of K each); each of two warpgroups multiplies the rows and half of the block's columns:
// shared memory gives the rows twice, but behind the products a thread has half as much to do. What threads keep stays
// in registers from the first product to h: x's values are fetched while the products run, and every warp (16 rows, a
// sixteenth of their columns) sends the sum and the centred squares of its part to all eight blocks, whose barriers
// count the bytes. Centred squares join exactly: those of a row are the parts' own and what the parts' means are apart
// (Chan, Golub and LeVeque, 1979).
//
// Nobody frees a stage that will not be filled again, and all that is sent is waited for, so nothing can come to a block
// that has ended; the clusters' last meeting says so once more.
//
// Macros: NT, STAGES, PDL, SPIN_LIMIT, SHARED (bytes of a block). wgmma_common.cu comes first, and before it ``product``
// of E4M3 for NT / 2 columns (hopper_product.py).

constexpr int BLOCKS = 8;                        // of a cluster
constexpr int ROWS = 64;                         // of a tile
constexpr int CONSUMERS = 256;
constexpr int WIDTH = NT / 2;                    // columns of a warpgroup
constexpr int PARTS = 2 * BLOCKS;                // of a row
constexpr int STRIPS = ROWS / 16;                // of rows, a warp of each half
constexpr int A_BYTES = ROWS * 128;
constexpr int STAGE_BYTES = A_BYTES + NT * 128;
constexpr int PIECES = NT / 16;                  // of 16 bytes of h in a row of a block
constexpr int OUT_STRIDE = (PIECES | 1) * 16;    // an odd number of pieces: eight rows lie in different banks
constexpr int PART_STRIDE = ROWS / 2 * 16 + 32;  // two rows in 16 bytes; four parts of one lie in different banks
constexpr int AT_OUT = STAGES * STAGE_BYTES;
constexpr int AT_NUMBERS = AT_OUT + ROWS * OUT_STRIDE;
constexpr int AT_VECTORS = AT_NUMBERS + PARTS * PART_STRIDE;
constexpr int AT_BARRIERS = AT_VECTORS + 3 * NT * 4;
static_assert(AT_BARRIERS + 8 * (2 * STAGES + STRIPS) <= SHARED, "shared memory");
static_assert(NT % 16 == 0 && NT <= 256 && STAGES > 1, "tile");

struct alignas(64) Arguments {
    u8 a[128];             // tensor maps: boxes of ROWS and of NT rows
    u8 w[128];
    float* x;              // [rows, 8 * NT]
    const float* bias;     // [8 * NT] each: of the product; the norm's weight and shift
    const float* weight;
    const float* shift;
    u8* out;               // h, e4m3 [rows, 8 * NT]
    int rows;
    int chunks;            // stages of K
    float scale, eps;
};

struct Block {
    u32 memory, rank;
    __device__ __forceinline__ u32 a(u32 stage) const { return memory + stage * STAGE_BYTES; }
    __device__ __forceinline__ u32 w(u32 stage) const { return a(stage) + A_BYTES; }
    __device__ __forceinline__ u32 full(u32 stage) const { return memory + AT_BARRIERS + stage * 16; }
    __device__ __forceinline__ u32 empty(u32 stage) const { return full(stage) + 8; }
    // passes once every part's sums of a strip's rows have come
    __device__ __forceinline__ u32 summed(u32 strip) const { return memory + AT_BARRIERS + STAGES * 16 + strip * 8; }
    // {sum, centred squares} of rows ``pair`` and ``pair`` + 8 of the strip
    __device__ __forceinline__ u32 numbers(u32 part, u32 strip, u32 pair) const {
        return memory + AT_NUMBERS + part * PART_STRIDE + (strip * 8 + pair) * 16;
    }
    __device__ __forceinline__ u32 vector(u32 which, u32 column) const {
        return memory + AT_VECTORS + (which * NT + column) * 4;
    }
};

// ---------------------------------------------------------------------------------------------------------- copies
__device__ __forceinline__ void fetch_w(const Arguments& a, const Block& b, u32 stage, int chunk) {
    expect(b.full(stage), STAGE_BYTES);
    copy_box(b.w(stage), a.w, chunk * 128, b.rank * NT, b.full(stage));
}

__device__ __forceinline__ void fetch_a(const Arguments& a, const Block& b, u32 stage, int chunk, int row0) {
    copy_box(b.a(stage), a.a, chunk * 128, row0, b.full(stage));
}

// a whole warp
__device__ __forceinline__ void produce(const Arguments& a, const Block& b, int row0, u32 lane) {
    const int early = a.chunks < STAGES ? a.chunks : STAGES;
    if (lane == 0) {
        prefetch_map(a.w);
        prefetch_map(a.a);
        for (int i = 0; i < early; i++) fetch_w(a, b, i, i);
    }
    __syncwarp();
    cluster_wait();  // the others' barriers are there
    if (lane == 0) {
        wait_for_predecessor();
        let_dependents_start();
        for (int i = 0; i < early; i++) fetch_a(a, b, i, i, row0);
        for (int i = early; i < a.chunks; i++) {
            const u32 stage = i % STAGES;
            await(b.empty(stage), (i / STAGES - 1) & 1);
            fetch_w(a, b, stage, i);
            fetch_a(a, b, stage, i, row0);
        }
    }
    __syncwarp();
    cluster_arrive();
}

// --------------------------------------------------------------------------------------------------------- results
// past L1: another multiprocessor may have written it
__device__ __forceinline__ void load2(float& first, float& second, const float* from, bool use) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %3, 0;\n@p ld.global.cg.v2.f32 {%0, %1}, [%2];\n}"
                 : "+f"(first), "+f"(second) : "l"(from), "r"((u32)use));
}
__device__ __forceinline__ float2 shared2(u32 at) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(at) : "memory");
    return v;
}

// A warp's 16 rows and WIDTH columns: a thread has rows ``pair`` and ``pair`` + 8 and columns 8 j + 2 quad + {0, 1}, as
// [4 j + 2 (second row) + (second column)].
struct Consumer {
    const Arguments& a;
    const Block& b;
    const int row0;
    const u32 warp, lane;
    float sum[WIDTH / 2], held[WIDTH / 2];

    __device__ __forceinline__ u32 strip() const { return warp % STRIPS; }
    __device__ __forceinline__ u32 half() const { return warp / STRIPS; }
    __device__ __forceinline__ u32 pair() const { return lane / 4; }
    __device__ __forceinline__ u32 quad() const { return lane % 4; }
    // in the block: of the thread's first values, and in the matrix
    __device__ __forceinline__ u32 column() const { return half() * WIDTH + 2 * quad(); }
    __device__ __forceinline__ int row(int second) const { return row0 + strip() * 16 + pair() + 8 * second; }
    __device__ __forceinline__ float* place(int second) const {
        return a.x + (long long)row(second) * (BLOCKS * NT) + b.rank * NT + column();
    }

    // bias, weight and shift of the block's columns
    __device__ __forceinline__ void fetch_vectors() {
        for (u32 i = warp * 32 + lane; i < 3 * NT / 4; i += CONSUMERS) {
            const u32 which = i / (NT / 4), column = i % (NT / 4) * 4;
            const float* from = which == 0 ? a.bias : which == 1 ? a.weight : a.shift;
            copy16(b.vector(which, column), from + b.rank * NT + column);
        }
    }

    __device__ __forceinline__ void load_x() {
#pragma unroll
        for (int second = 0; second < 2; second++)
#pragma unroll
            for (int j = 0; j < WIDTH / 8; j++) {
                float* to = held + 4 * j + 2 * second;
                to[0] = to[1] = 0.0f;
                load2(to[0], to[1], place(second) + 8 * j, row(second) < a.rows);
            }
    }

    __device__ __forceinline__ void multiply_all() {
#pragma unroll
        for (int i = 0; i < WIDTH / 2; i++) sum[i] = 0.0f;
        const u32 across = half() * (WIDTH * 128);
        for (int i = 0; i < a.chunks; i++) {
            const u32 stage = i % STAGES;
            await(b.full(stage), (i / STAGES) & 1);
            const u64 rows = operand(b.a(stage)), columns = operand(b.w(stage) + across);
            products_begin();
#pragma unroll
            for (int k = 0; k < 4; k++) product(sum, rows + 2 * k, columns + 2 * k);
            products_commit();
            products_wait<1>();  // the stage before is read
            if (i > 0 && i - 1 + STAGES < a.chunks && lane == 0) arrive(b.empty((i - 1) % STAGES));
        }
        products_wait<0>();
        pin(sum);
    }

    // sum <- x of now; its rows' sums and centred squares, over this part's columns, to every block
    __device__ __forceinline__ void add_and_send() {
        float total[2] = {0.0f, 0.0f}, squares[2] = {0.0f, 0.0f};
#pragma unroll
        for (int j = 0; j < WIDTH / 8; j++) {
            const float2 bias = shared2(b.vector(0, column() + 8 * j));
#pragma unroll
            for (int k = 0; k < 4; k++) {
                float& v = sum[4 * j + k];
                v = fmaf(v, a.scale, k % 2 ? bias.y : bias.x) + held[4 * j + k];
                total[k / 2] += v;
            }
        }
#pragma unroll
        for (int second = 0; second < 2; second++) {
            total[second] = quad_sum(total[second]);
            const float mean = total[second] * (1.0f / WIDTH);
#pragma unroll
            for (int i = 0; i < WIDTH / 4; i++) {
                const float apart = sum[4 * (i / 2) + 2 * second + i % 2] - mean;
                squares[second] = fmaf(apart, apart, squares[second]);
            }
            squares[second] = quad_sum(squares[second]);
        }
        const u32 to = b.numbers(2 * b.rank + half(), strip(), pair()), bar = b.summed(strip());
#pragma unroll
        for (u32 k = 0; k < BLOCKS / 4; k++) {
            const u32 peer = quad() + 4 * k;
            send4(of_rank(to, peer), of_rank(bar, peer), total[0], squares[0], total[1], squares[1]);
        }
    }

    __device__ __forceinline__ void store_x() const {
#pragma unroll
        for (int second = 0; second < 2; second++) {
            if (row(second) >= a.rows) continue;
            float* to = place(second);
#pragma unroll
            for (int j = 0; j < WIDTH / 8; j++)
                *(float2*)(to + 8 * j) = make_float2(sum[4 * j + 2 * second], sum[4 * j + 2 * second + 1]);
        }
    }

    // the row's mean and 1 / deviation, from all its parts: a quarter of them a lane
    __device__ __forceinline__ void join(float (&mean)[2], float (&inverse)[2]) const {
        float4 part[PARTS / 4];
        float total[2] = {0.0f, 0.0f}, squares[2] = {0.0f, 0.0f};
#pragma unroll
        for (u32 k = 0; k < PARTS / 4; k++) {
            part[k] = shared4(b.numbers(quad() + 4 * k, strip(), pair()));
            total[0] += part[k].x, total[1] += part[k].z;
        }
        mean[0] = quad_sum(total[0]) * (1.0f / (BLOCKS * NT));
        mean[1] = quad_sum(total[1]) * (1.0f / (BLOCKS * NT));
#pragma unroll
        for (u32 k = 0; k < PARTS / 4; k++) {
            const float first = part[k].x * (1.0f / WIDTH) - mean[0], second = part[k].z * (1.0f / WIDTH) - mean[1];
            squares[0] += fmaf(WIDTH * first, first, part[k].y);
            squares[1] += fmaf(WIDTH * second, second, part[k].w);
        }
        inverse[0] = rsqrtf(quad_sum(squares[0]) * (1.0f / (BLOCKS * NT)) + a.eps);
        inverse[1] = rsqrtf(quad_sum(squares[1]) * (1.0f / (BLOCKS * NT)) + a.eps);
    }

    // the normalised rows through shared memory: its stores are 16 bytes, and whole lines of L2 where halves meet
    __device__ __forceinline__ void store_normed(const float (&mean)[2], const float (&inverse)[2]) const {
        const u32 from = b.memory + AT_OUT + strip() * (16 * OUT_STRIDE), to = from + pair() * OUT_STRIDE + column();
#pragma unroll
        for (int j = 0; j < WIDTH / 8; j++) {
            const float2 weight = shared2(b.vector(1, column() + 8 * j)), shift = shared2(b.vector(2, column() + 8 * j));
#pragma unroll
            for (int second = 0; second < 2; second++) {
                const float* v = sum + 4 * j + 2 * second;
                const float low = fmaf((v[0] - mean[second]) * inverse[second], weight.x, shift.x);
                const float high = fmaf((v[1] - mean[second]) * inverse[second], weight.y, shift.y);
                const u32 at = to + second * (8 * OUT_STRIDE) + 8 * j;
                asm volatile("st.shared.u16 [%0], %1;" ::"r"(at), "h"(to_e4m3x2(low, high)) : "memory");
            }
        }
        named_barrier(1 + strip(), 64);  // both halves of the strip
        for (u32 i = half() * 32 + lane; i < 16 * PIECES; i += 64) {
            const u32 r = i / PIECES, piece = i % PIECES;
            const int at = row0 + strip() * 16 + r;
            if (at >= a.rows) break;  // and so are the rows behind
            const float4 v = shared4(from + r * OUT_STRIDE + piece * 16);
            *(float4*)(a.out + (long long)at * (BLOCKS * NT) + b.rank * NT + piece * 16) = v;
        }
    }
};

extern "C" __global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(CONSUMERS + 32, 1)
    norm_product(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(1024) u8 memory[];
    const Block b{shared_address(memory), blockIdx.x % BLOCKS};
    const int row0 = blockIdx.x / BLOCKS * ROWS;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (u32 s = 0; s < STAGES; s++) {
            barrier_init(b.full(s), 1);
            barrier_init(b.empty(s), CONSUMERS / 32);
        }
        for (u32 strip = 0; strip < STRIPS; strip++) {
            barrier_init(b.summed(strip), 1);
            expect(b.summed(strip), PARTS * 8 * 16);
        }
        barriers_initialised();
    }
    __syncthreads();
    cluster_arrive();
    if (warp == CONSUMERS / 32) {
        produce(a, b, row0, lane);
    } else {
        Consumer c{a, b, row0, warp, lane};
        c.fetch_vectors();
        cluster_wait();  // the others' barriers are there
        wait_for_predecessor();
        c.load_x();
        c.multiply_all();
        copies_done();
        named_barrier(5, CONSUMERS);  // the vectors are there
        c.add_and_send();
        cluster_arrive();
        c.store_x();  // while the others' sums are on their way
        await(b.summed(c.strip()), 0);
        float mean[2], inverse[2];
        c.join(mean, inverse);
        c.store_normed(mean, inverse);
    }
    cluster_wait();  // nobody leaves while a peer may still send
}
