// -------------------------------------------------------------------------------------------------- attention
// ROWS = 32 query rows (token * GROUP + head) a cluster; its CLUSTER blocks cut the keys. CHUNK keys at a time.

constexpr int ROWS = 32;
constexpr int CHUNK = 128;
constexpr int PITCH = HEAD_DIM * 2 + 16;
constexpr int P_PITCH_BYTES = CHUNK * 2 + 16;
constexpr int O_PITCH = HEAD_DIM + 4;
constexpr int KV_BYTES = CHUNK * PITCH;
constexpr int WARP_DIMS = HEAD_DIM / 8;
static_assert(HEAD_DIM % 128 == 0 && ROWS * O_PITCH * 4 <= KV_BYTES && HEAD_DIM % (4 * CLUSTER) == 0, "shape");

struct Arguments {
    const u16* q;  // bf16 [tokens, KV_HEADS * GROUP, HEAD_DIM]
    const u16* k;  // bf16 [capacity, KV_HEADS, HEAD_DIM]
    const u16* v;
    u16* out;          // as q
    const int* valid;  // keys of the prefix; those of the tokens follow
    int tokens;
    float scale;  // log2(e) / sqrt(HEAD_DIM)
};

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS) expert_attention(const Arguments p) {
    extern __shared__ __align__(128) u8 memory[];
    __shared__ float warp_top[8][ROWS], warp_sum[8][ROWS], top_of[ROWS], sum_of[ROWS];
    u8* const k_memory = memory;
    u8* const v_memory = memory + KV_BYTES;
    u8* const q_memory = memory + 2 * KV_BYTES;
    u8* const p_memory = q_memory + ROWS * PITCH;
    float* const o_memory = reinterpret_cast<float*>(memory);

    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    const int block = blockIdx.x / CLUSTER, rank = blockIdx.x % CLUSTER, kv_head = blockIdx.y;
    const int rows = p.tokens * GROUP, first_row = block * ROWS;
    constexpr int CHUNKS16 = HEAD_DIM / 8;  // 16-byte pieces of a row

    const int valid = p.valid[0];  // written long before: the inputs' copy is no programmatic predecessor
    const int total = valid + p.tokens;
    const int share = ((total + CLUSTER - 1) / CLUSTER + 15) / 16 * 16;
    const int begin = rank * share, end = min(total, begin + share);

    let_dependents_start();
    const u32 k_to = shared_address(k_memory), v_to = shared_address(v_memory);
    auto load_keys = [&](int first, bool prefix) {
        for (int i = tid; i < CHUNK * CHUNKS16; i += THREADS) {
            const int row = i / CHUNKS16, piece = i % CHUNKS16, key = first + row;
            const bool before = key < valid && key < end;
            if (before != prefix) continue;
            const bool there = key < end;  // rows behind the end are zeros: a product with garbage could be NaN
            const size_t at = ((size_t)(there ? key : 0) * KV_HEADS + kv_head) * HEAD_DIM + piece * 8;
            copy16_or_zero(k_to + row * PITCH + piece * 16, p.k + at, there);
            copy16_or_zero(v_to + row * PITCH + piece * 16, p.v + at, there);
        }
    };
    load_keys(begin, true);  // the prefix's keys were written before the predecessor started
    wait_for_predecessor();
    {
        const u32 to = shared_address(q_memory);
        for (int i = tid; i < ROWS * CHUNKS16; i += THREADS) {
            const int r = i / CHUNKS16, piece = i % CHUNKS16, row = first_row + r;
            const bool there = row < rows;
            const int token = there ? row / GROUP : 0, head = kv_head * GROUP + row % GROUP;
            copy16_or_zero(
                to + r * PITCH + piece * 16, p.q + ((size_t)token * KV_HEADS * GROUP + head) * HEAD_DIM + piece * 8, there);
        }
    }
    load_keys(begin, false);

    float top[2][2], sum[2][2], acc[2][WARP_DIMS / 8][4];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        top[i][0] = top[i][1] = MINUS_INFINITY, sum[i][0] = sum[i][1] = 0.0f;
#pragma unroll
        for (int n = 0; n < WARP_DIMS / 8; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) acc[i][n][j] = 0.0f;
    }
    const int g = lane / 4, t = lane % 4;
    for (int first = begin; first < end; first += CHUNK) {
        if (first != begin) {
            __syncthreads();
            load_keys(first, true);
            load_keys(first, false);
        }
        copies_done();
        __syncthreads();
        // scores: this warp's 16 keys against all rows
        float s[2][2][4];
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int j = 0; j < 4; j++) s[i][n][j] = 0.0f;
        const u32 q_base = shared_address(q_memory) + (lane % 16) * PITCH + (lane / 16) * 16;
        const u32 k_base = k_to + (warp * 16 + (lane / 16) * 8 + lane % 8) * PITCH + ((lane / 8) % 2) * 16;
#pragma unroll 4
        for (int k = 0; k < HEAD_DIM / 16; k++) {
            u32 a0[4], a1[4], b[4];
            ldmatrix4(a0, q_base + k * 32);
            ldmatrix4(a1, q_base + 16 * PITCH + k * 32);
            ldmatrix4(b, k_base + k * 32);
            mma(s[0][0], a0, b[0], b[1]);
            mma(s[0][1], a0, b[2], b[3]);
            mma(s[1][0], a1, b[0], b[1]);
            mma(s[1][1], a1, b[2], b[3]);
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float best = MINUS_INFINITY;
#pragma unroll
                for (int n = 0; n < 2; n++)
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        const int key = first + warp * 16 + n * 8 + t * 2 + j;
                        float& score = s[i][n][half * 2 + j];
                        score = key < end ? score * p.scale : MINUS_INFINITY;
                        best = fmaxf(best, score);
                    }
                best = quad_max(best);
                if (t == 0) warp_top[warp][i * 16 + half * 8 + g] = best;
            }
        __syncthreads();
        float correction[2][2];
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = i * 16 + half * 8 + g;
                float best = top[i][half];
#pragma unroll
                for (int w = 0; w < 8; w++) best = fmaxf(best, warp_top[w][row]);
                correction[i][half] = exp2_of(top[i][half] - best);
                top[i][half] = best;
                float total_p = 0.0f;
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    const float p0 = exp2_of(s[i][n][half * 2] - best), p1 = exp2_of(s[i][n][half * 2 + 1] - best);
                    total_p += p0 + p1;
                    *reinterpret_cast<u32*>(p_memory + row * P_PITCH_BYTES + (warp * 16 + n * 8 + t * 2) * 2) = pack_bf16(p0, p1);
                }
                total_p = quad_sum(total_p);
                if (t == 0) warp_sum[warp][row] = total_p;
            }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float total_p = 0.0f;
#pragma unroll
                for (int w = 0; w < 8; w++) total_p += warp_sum[w][i * 16 + half * 8 + g];
                sum[i][half] = sum[i][half] * correction[i][half] + total_p;
#pragma unroll
                for (int n = 0; n < WARP_DIMS / 8; n++) {
                    acc[i][n][half * 2] *= correction[i][half];
                    acc[i][n][half * 2 + 1] *= correction[i][half];
                }
            }
        // values: this warp's dims
        const u32 p_base = shared_address(p_memory) + (lane % 16) * P_PITCH_BYTES + (lane / 16) * 16;
        const u32 v_base = v_to + (lane % 16) * PITCH + (warp * WARP_DIMS + (lane / 16) * 8) * 2;
        const int steps = (min(end - first, CHUNK) + 15) / 16;
#pragma unroll 2
        for (int k = 0; k < steps; k++) {
            u32 a0[4], a1[4];
            ldmatrix4(a0, p_base + k * 32);
            ldmatrix4(a1, p_base + 16 * P_PITCH_BYTES + k * 32);
#pragma unroll
            for (int n = 0; n < WARP_DIMS / 8; n += 2) {
                u32 b[4];
                ldmatrix4_transposed(b, v_base + k * 16 * PITCH + n * 16);
                mma(acc[0][n], a0, b[0], b[1]);
                mma(acc[0][n + 1], a0, b[2], b[3]);
                mma(acc[1][n], a1, b[0], b[1]);
                mma(acc[1][n + 1], a1, b[2], b[3]);
            }
        }
    }
    copies_done();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = i * 16 + half * 8 + g;
            if (warp == 0 && t == 0) top_of[row] = top[i][half], sum_of[row] = sum[i][half];
#pragma unroll
            for (int n = 0; n < WARP_DIMS / 8; n++) {
                const int dim = warp * WARP_DIMS + n * 8 + t * 2;
                *reinterpret_cast<float2*>(o_memory + row * O_PITCH + dim) =
                    make_float2(acc[i][n][half * 2], acc[i][n][half * 2 + 1]);
            }
        }
    publish_shared();
    wait_for_cluster();
    constexpr int DIMS = HEAD_DIM / CLUSTER;
    const u32 o_address = shared_address(o_memory), top_address = shared_address(top_of), sum_address = shared_address(sum_of);
    for (int item = tid; item < ROWS * (DIMS / 4); item += THREADS) {
        const int r = item / (DIMS / 4), dim = rank * DIMS + item % (DIMS / 4) * 4, row = first_row + r;
        if (row >= rows) continue;
        float tops[CLUSTER], best = MINUS_INFINITY;
#pragma unroll
        for (int c = 0; c < CLUSTER; c++) tops[c] = load_remote(of_rank(top_address + r * 4, c)), best = fmaxf(best, tops[c]);
        float weight = 0.0f, o[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int c = 0; c < CLUSTER; c++) {
            const float w = exp2_of(tops[c] - best);
            weight = fmaf(w, load_remote(of_rank(sum_address + r * 4, c)), weight);
            const float4 part = load_remote4(of_rank(o_address + (r * O_PITCH + dim) * 4, c));
            o[0] = fmaf(w, part.x, o[0]), o[1] = fmaf(w, part.y, o[1]), o[2] = fmaf(w, part.z, o[2]), o[3] = fmaf(w, part.w, o[3]);
        }
        const float inverse = 1.0f / weight;
        const int token = row / GROUP, head = kv_head * GROUP + row % GROUP;
        uint2 result;
        result.x = pack_bf16(o[0] * inverse, o[1] * inverse);
        result.y = pack_bf16(o[2] * inverse, o[3] * inverse);
        *reinterpret_cast<uint2*>(p.out + ((size_t)token * KV_HEADS * GROUP + head) * HEAD_DIM + dim) = result;
    }
    leave_cluster();
}
