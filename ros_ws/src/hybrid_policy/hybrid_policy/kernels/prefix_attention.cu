// Attention of many rows over one key/value head, for Hopper: wgmma on both products, softmax beside them.
//
// Query heads that share the key/value head are rows of one matrix, as they lie: [tokens * GROUP, 256]. A block takes
// 128 of these rows, 64 a warpgroup; the blocks of a cluster take the same rows and share the keys out, in tiles of
// 64 (tile i goes to rank i % CLUSTER). While a warpgroup's tensor cores add up P V of one tile, it works out the
// softmax of the next. Keys and values come by cp.async, two tiles deep, and the ones behind the valid ones as zeros:
// what lies there is never read.
//
// At the end the partial sums lie in shared memory; each token is put together by one warp of the cluster, in the
// order of the ranks, and leaves as bf16 or as FP8 with one scale a token: the largest value is known there.
//
// Macros: GROUP (query heads of the key/value head), CLUSTER, QUANTISE, PDL. cuda_common.cu and expert_common.cu come first.

#define HEAD_DIM 256
#define TILE_ROWS 128
#define TILE_KEYS 64
#define SUBTILE 8192                 // 64 rows of 128 bytes: 64 columns
#define TILE_BYTES (4 * SUBTILE)     // 64 rows of 256 columns
#define KEYS_AT (2 * TILE_BYTES)     // behind the queries of two warpgroups
#define VALUES_AT (4 * TILE_BYTES)   // behind two tiles of keys
#define STATS_AT (6 * TILE_BYTES)    // (maximum, sum) of each row
#define PART_STRIDE 264              // floats of a row of partial sums: no two rows of a quad in one bank
#define TOKENS (TILE_ROWS / GROUP)   // of a block

struct Arguments {
    const u16* q;        // bf16 [tokens * GROUP, 256]
    const u16* keys;     // bf16 [capacity, 256]
    const u16* values;   // bf16 [capacity, 256]
    const int* valid;    // [1]: how many keys count
    void* out;           // bf16 or e4m3 [tokens * GROUP, 256]
    float* out_scale;    // [tokens], where QUANTISE
    int tokens;
    float scale_log2;    // head_dim ** -0.5 * log2(e)
};

// s[64 rows, 64 keys] (+)= q[64, 16] k[64, 16]', both in shared memory, K-major
__device__ __forceinline__ void scores_step(float (&s)[32], u64 q, u64 k, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, p, 1, 1, 0, 0;\n}\n"
        : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3]), "+f"(s[4]), "+f"(s[5]), "+f"(s[6]), "+f"(s[7]),
          "+f"(s[8]), "+f"(s[9]), "+f"(s[10]), "+f"(s[11]), "+f"(s[12]), "+f"(s[13]), "+f"(s[14]), "+f"(s[15]),
          "+f"(s[16]), "+f"(s[17]), "+f"(s[18]), "+f"(s[19]), "+f"(s[20]), "+f"(s[21]), "+f"(s[22]), "+f"(s[23]),
          "+f"(s[24]), "+f"(s[25]), "+f"(s[26]), "+f"(s[27]), "+f"(s[28]), "+f"(s[29]), "+f"(s[30]), "+f"(s[31])
        : "l"(q), "l"(k), "r"(add));
}

// o[64 rows, 256] += p[64, 16 keys] v[16 keys, 256]: p in registers, v as it lies in the cache (keys are rows)
__device__ __forceinline__ void values_step(float (&o)[128], const u32* p, u64 v) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
        "{%128, %129, %130, %131}, %132, 1, 1, 1, 1;\n"
        : "+f"(o[0]), "+f"(o[1]), "+f"(o[2]), "+f"(o[3]), "+f"(o[4]), "+f"(o[5]), "+f"(o[6]), "+f"(o[7]),
          "+f"(o[8]), "+f"(o[9]), "+f"(o[10]), "+f"(o[11]), "+f"(o[12]), "+f"(o[13]), "+f"(o[14]), "+f"(o[15]),
          "+f"(o[16]), "+f"(o[17]), "+f"(o[18]), "+f"(o[19]), "+f"(o[20]), "+f"(o[21]), "+f"(o[22]), "+f"(o[23]),
          "+f"(o[24]), "+f"(o[25]), "+f"(o[26]), "+f"(o[27]), "+f"(o[28]), "+f"(o[29]), "+f"(o[30]), "+f"(o[31]),
          "+f"(o[32]), "+f"(o[33]), "+f"(o[34]), "+f"(o[35]), "+f"(o[36]), "+f"(o[37]), "+f"(o[38]), "+f"(o[39]),
          "+f"(o[40]), "+f"(o[41]), "+f"(o[42]), "+f"(o[43]), "+f"(o[44]), "+f"(o[45]), "+f"(o[46]), "+f"(o[47]),
          "+f"(o[48]), "+f"(o[49]), "+f"(o[50]), "+f"(o[51]), "+f"(o[52]), "+f"(o[53]), "+f"(o[54]), "+f"(o[55]),
          "+f"(o[56]), "+f"(o[57]), "+f"(o[58]), "+f"(o[59]), "+f"(o[60]), "+f"(o[61]), "+f"(o[62]), "+f"(o[63]),
          "+f"(o[64]), "+f"(o[65]), "+f"(o[66]), "+f"(o[67]), "+f"(o[68]), "+f"(o[69]), "+f"(o[70]), "+f"(o[71]),
          "+f"(o[72]), "+f"(o[73]), "+f"(o[74]), "+f"(o[75]), "+f"(o[76]), "+f"(o[77]), "+f"(o[78]), "+f"(o[79]),
          "+f"(o[80]), "+f"(o[81]), "+f"(o[82]), "+f"(o[83]), "+f"(o[84]), "+f"(o[85]), "+f"(o[86]), "+f"(o[87]),
          "+f"(o[88]), "+f"(o[89]), "+f"(o[90]), "+f"(o[91]), "+f"(o[92]), "+f"(o[93]), "+f"(o[94]), "+f"(o[95]),
          "+f"(o[96]), "+f"(o[97]), "+f"(o[98]), "+f"(o[99]), "+f"(o[100]), "+f"(o[101]), "+f"(o[102]), "+f"(o[103]),
          "+f"(o[104]), "+f"(o[105]), "+f"(o[106]), "+f"(o[107]), "+f"(o[108]), "+f"(o[109]), "+f"(o[110]), "+f"(o[111]),
          "+f"(o[112]), "+f"(o[113]), "+f"(o[114]), "+f"(o[115]), "+f"(o[116]), "+f"(o[117]), "+f"(o[118]), "+f"(o[119]),
          "+f"(o[120]), "+f"(o[121]), "+f"(o[122]), "+f"(o[123]), "+f"(o[124]), "+f"(o[125]), "+f"(o[126]), "+f"(o[127])
        : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v));
}

// Rows from row `first` of a matrix of `rows` rows of 256 columns, zeros behind its end; all threads, a warp a row. The
// 16-byte pieces of a row of 128 bytes are swizzled by the row (row % 8, which is the warp).
template <int ROWS>
__device__ __forceinline__ void copy_rows(u32 to, const u16* from, int first, int rows) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u32 place = to + (lane / 8) * SUBTILE + warp * 128 + (((lane % 8) ^ warp) << 4);
    const u16* source = from + (long long)(first + warp) * HEAD_DIM + lane * 8;
#pragma unroll
    for (int i = 0; i < ROWS / 8; i++)  // nothing is read where the count of bytes is zero
        copy16_or_zero(place + (i / 8) * TILE_BYTES + (i % 8) * 1024, source + i * 8 * HEAD_DIM, first + warp + 8 * i < rows);
}

// One tile's scores to unnormalised probabilities, and the factors of what was summed before. Rows g and g + 8 of a thread;
// columns 8 j + 2 (lane % 4) + {0, 1}.
__device__ __forceinline__ void softmax_tile(
    float (&s)[32], float (&top)[2], float (&sum)[2], float (&correction)[2], int first, int total, float scale) {
    if (first + TILE_KEYS > total) {
        int key = first + 2 * (threadIdx.x % 4);
#pragma unroll
        for (int i = 0; i < 32; i++)
            if (key + 8 * (i / 4) + i % 2 >= total) s[i] = MINUS_INFINITY;
    }
    float best[2] = {top[0], top[1]};
#pragma unroll
    for (int i = 0; i < 32; i++) best[i / 2 % 2] = fmaxf(best[i / 2 % 2], s[i]);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        best[r] = quad_max(best[r]);
        correction[r] = exp2_of((top[r] - best[r]) * scale);
        top[r] = best[r];
        sum[r] *= correction[r];
    }
#pragma unroll
    for (int i = 0; i < 32; i++) {
        s[i] = exp2_of(s[i] * scale - top[i / 2 % 2] * scale);
        sum[i / 2 % 2] += s[i];
    }
    // a store that never happens: without it the assembler puts the wait for the values' product before all of the above
    asm volatile("{\n.reg .pred p;\nsetp.lt.f32 p, %0, 0f00000000;\n@p st.shared.f32 [%1], %0;\n}" ::"f"(sum[0] + sum[1]),
                 "r"(0) : "memory");
}

__device__ __forceinline__ void pack_tile(const float (&s)[32], u32 (&p)[16]) {
#pragma unroll
    for (int i = 0; i < 16; i++) p[i] = pack_bf16(s[2 * i], s[2 * i + 1]);
}

__device__ __forceinline__ void start_scores(float (&s)[32], u64 q, u64 keys) {
#pragma unroll
    for (int k = 0; k < 16; k++) {
        u32 at = ((k / 4) * SUBTILE + (k % 4) * 32) >> 4;  // addresses in a descriptor count 16 bytes
        scores_step(s, q + at, keys + at, k > 0);
    }
    products_commit();
}

__device__ __forceinline__ void start_values(float (&o)[128], u32 (&p)[16], u64 values) {
#pragma unroll
    for (int k = 0; k < 4; k++) values_step(o, p + 4 * k, values + (k * 2048 >> 4));
    products_commit();
}

__device__ __forceinline__ float2 load_remote2(u32 address) {
    float2 v;
    asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address));
    return v;
}

// A token's rows from the cluster's parts: one warp, eight columns a lane and row. A rank's loads are all under way
// before the first is used.
__device__ __forceinline__ void finish_token(const Arguments& a, u32 shared, int token, int tile) {
    int lane = threadIdx.x % 32;
    long long row = (long long)tile * TILE_ROWS + token * GROUP;
    // lane 8 c + h: what rank c's part of row h counts for
    float2 stat = make_float2(MINUS_INFINITY, 0.0f);
    if (lane / 8 < CLUSTER && lane % 8 < GROUP)
        stat = load_remote2(of_rank(shared + STATS_AT + (token * GROUP + lane % 8) * 8, lane / 8));
    float best = fmaxf(stat.x, __shfl_xor_sync(0xffffffffu, stat.x, 8));
    best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 16));
    float factor = exp2_of((stat.x - best) * a.scale_log2), weight = factor * stat.y;
    weight += __shfl_xor_sync(0xffffffffu, weight, 8);
    weight += __shfl_xor_sync(0xffffffffu, weight, 16);
    factor = __fdividef(factor, weight);
    float result[GROUP][8];
#pragma unroll
    for (int c = 0; c < CLUSTER; c++) {
        float4 part[GROUP][2];
        u32 from = of_rank(shared + (token * GROUP * PART_STRIDE + lane * 4) * 4, c);
#pragma unroll
        for (int h = 0; h < GROUP; h++) {
            part[h][0] = load_remote4(from + h * PART_STRIDE * 4);
            part[h][1] = load_remote4(from + h * PART_STRIDE * 4 + 512);
        }
#pragma unroll
        for (int h = 0; h < GROUP; h++) {
            float f = __shfl_sync(0xffffffffu, factor, 8 * c + h);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float* r = result[h] + 4 * i;
                float4 v = part[h][i];
                if (c == 0) r[0] = f * v.x, r[1] = f * v.y, r[2] = f * v.z, r[3] = f * v.w;
                else r[0] += f * v.x, r[1] += f * v.y, r[2] += f * v.z, r[3] += f * v.w;
            }
        }
    }
#if QUANTISE
    float largest = 0.0f;
#pragma unroll
    for (int h = 0; h < GROUP; h++)
#pragma unroll
        for (int i = 0; i < 8; i++) largest = max_or_nan(largest, fabsf(result[h][i]));
#pragma unroll
    for (int i = 16; i > 0; i /= 2) largest = max_or_nan(largest, __shfl_xor_sync(0xffffffffu, largest, i));
    // far below anything that counts, and its inverse is finite
    largest = largest == 0.0f ? 448.0f : max_or_nan(largest, 1e-30f);
    float inverse = __fdividef(448.0f, largest);
    if (lane == 0) a.out_scale[tile * TOKENS + token] = largest / 448.0f;
#pragma unroll
    for (int h = 0; h < GROUP; h++) {
        float* v = result[h];
        u32* to = (u32*)a.out + (row + h) * (HEAD_DIM / 4) + lane;
        to[0] = pack_e4m3(v[0] * inverse, v[1] * inverse, v[2] * inverse, v[3] * inverse);
        to[32] = pack_e4m3(v[4] * inverse, v[5] * inverse, v[6] * inverse, v[7] * inverse);
    }
#else
#pragma unroll
    for (int h = 0; h < GROUP; h++) {
        float* v = result[h];
        uint2* to = (uint2*)a.out + (row + h) * (HEAD_DIM / 4) + lane;
        to[0] = make_uint2(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]));
        to[32] = make_uint2(pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
    }
#endif
}

extern "C" __global__ __launch_bounds__(THREADS, 1) __cluster_dims__(CLUSTER, 1, 1)
void prefix_attention(const __grid_constant__ Arguments a) {
    extern __shared__ u8 memory[];
    u32 shared = (shared_address(memory) + 1023) & ~1023u;
    float* parts = (float*)(memory + (shared - shared_address(memory)));
    int tile = blockIdx.x / CLUSTER, rank = blockIdx.x % CLUSTER;
    int group = threadIdx.x / 128, rows = a.tokens * GROUP;
    wait_for_predecessor();
    let_dependents_start();
    int total = *a.valid;
    int tiles = (total + TILE_KEYS - 1) / TILE_KEYS;
    int count = (tiles - rank + CLUSTER - 1) / CLUSTER;  // of this block; may be 0
    u64 q = matrix(shared + group * TILE_BYTES, 16);
    float o[128];
#pragma unroll
    for (int i = 0; i < 128; i++) o[i] = 0.0f;
    float top[2] = {MINUS_INFINITY, MINUS_INFINITY}, sum[2] = {0.0f, 0.0f}, correction[2];

    auto keys_of = [&](int i) { return shared + KEYS_AT + (i % 2) * TILE_BYTES; };
    auto values_of = [&](int i) { return shared + VALUES_AT + (i % 2) * TILE_BYTES; };
    auto first_of = [&](int i) { return (i * CLUSTER + rank) * TILE_KEYS; };

    if (count > 0) {
        copy_rows<TILE_ROWS>(shared, a.q, tile * TILE_ROWS, rows);
        copy_rows<TILE_KEYS>(keys_of(0), a.keys, first_of(0), total);
        copies_commit();
        copy_rows<TILE_KEYS>(values_of(0), a.values, first_of(0), total);
        copy_rows<TILE_KEYS>(keys_of(1), a.keys, first_of(1), total);
        copies_commit();
        copies_wait<1>();
        __syncthreads();
        float s[32];
        u32 p[16];
        products_begin();
        start_scores(s, q, matrix(keys_of(0), 16));
        products_wait<0>();
        pin(s);
        softmax_tile(s, top, sum, correction, first_of(0), total, a.scale_log2);
        pack_tile(s, p);
        for (int i = 0; i < count - 1; i++) {
            copies_wait<0>();
            __syncthreads();  // values i and keys i + 1 are there, and nobody reads values i - 1 or keys i any more
            copy_rows<TILE_KEYS>(values_of(i + 1), a.values, first_of(i + 1), total);
            copy_rows<TILE_KEYS>(keys_of(i + 2), a.keys, first_of(i + 2), total);
            copies_commit();
            products_begin();
            start_scores(s, q, matrix(keys_of(i + 1), 16));
            start_values(o, p, matrix(values_of(i), SUBTILE));
            products_wait<1>();
            pin(s);
            softmax_tile(s, top, sum, correction, first_of(i + 1), total, a.scale_log2);
            products_wait<0>();
            pin(o);
            pack_tile(s, p);  // not before: the product that just ended read p
#pragma unroll
            for (int j = 0; j < 128; j++) o[j] *= correction[j / 2 % 2];
        }
        copies_wait<0>();
        __syncthreads();
        products_begin();
        start_values(o, p, matrix(values_of(count - 1), SUBTILE));
        products_wait<0>();
        pin(o);
    }
    sum[0] = quad_sum(sum[0]);
    sum[1] = quad_sum(sum[1]);
    __syncthreads();  // queries, keys and values are read: their place takes the partial sums
    int lane = threadIdx.x % 32, at = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float* row = parts + (at + 8 * r) * PART_STRIDE + 2 * (lane % 4);
#pragma unroll
        for (int j = 0; j < 32; j++) *(float2*)(row + 8 * j) = make_float2(o[4 * j + 2 * r], o[4 * j + 2 * r + 1]);
        if (lane % 4 == 0) ((float2*)(parts + STATS_AT / 4))[at + 8 * r] = make_float2(top[r], sum[r]);
    }
    publish_shared();
    wait_for_cluster();
    for (int token = rank * (THREADS / 32) + threadIdx.x / 32; token < TOKENS; token += CLUSTER * (THREADS / 32))
        if (tile * TOKENS + token < a.tokens) finish_token(a, shared, token, tile);
    leave_cluster();
}
