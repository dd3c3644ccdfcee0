// ------------------------------------------------------------------------------------ the loop kernel's attention
// 32 rows (token * HEADS + head) a tile; each part has some of the prefix's keys and of the chunk's own.

struct KeyRange {
    int first, prefix;   // rows of the cache
    int token, tokens;   // rows of the chunk
    __device__ __forceinline__ KeyRange(int valid, int part) {
        const int share = (valid + PARTS - 1) / PARTS;
        constexpr int OWN = (TOKENS + PARTS - 1) / PARTS;
        first = part * share, prefix = max(0, min(share, valid - first));
        token = part * OWN, tokens = max(0, min(OWN, TOKENS - token));
    }
    __device__ __forceinline__ int count() const { return prefix + tokens; }
};

// the prefix's rows were there before the launch: they come while the queries are still computed. Zeros behind all rows
// up to a multiple of 16.
__device__ __forceinline__ void fetch_prefix(const Place& at, const KeyRange& range, u32 to, const u16* cache) {
    constexpr int PIECES = HEAD_DIM / 8;
    const int row = at.tid / PIECES, piece = at.tid % PIECES;
    const u16* from = cache + (size_t)(range.first + row) * HEAD_DIM + piece * 8;
    to += row * PITCH + piece * 16;
#pragma unroll 2
    for (int r = row; r < range.prefix; r += THREADS / PIECES, from += THREADS / PIECES * HEAD_DIM)
        copy16(to + (r - row) * PITCH, from);
    const int end = (range.count() + 15) / 16 * 16;
#pragma unroll 1
    for (int r = range.count() + row; r < end; r += THREADS / PIECES) store_shared4(to + (r - row) * PITCH, make_uint4(0, 0, 0, 0));
}

struct AttentionMemory {
    float top[8][QUERIES], sum[8][QUERIES];  // by warp
};

__device__ __forceinline__ void attend(
    const Place& at, const KeyRange& range, u8* memory, AttentionMemory& m, u8* mail, u8* next, u8* parcels, float scale, const Arguments& p, int layer) {
    const u32 base = shared_address(memory), k_to = base + A_X, v_to = base + A_SUMS, q_to = base + A_Q;
    const int first_row = at.tile * QUERIES, lane = at.lane, warp = at.warp;
    {  // four pieces of the queries, and one of the chunk's own keys and values
        constexpr int PIECES = HEAD_DIM / 8, ROWS = THREADS / PIECES, TURNS = QUERIES / ROWS;
        const int row = at.tid / PIECES, piece = at.tid % PIECES;
        const u8* const q_from = mail + M_Q + ((size_t)(first_row + row) * HEAD_DIM + piece * 8) * 2;
        const u8* const own_from = mail + M_K + ((range.token + row) * HEAD_DIM + piece * 8) * 2;
        static_assert(TURNS == 4 && (TOKENS + PARTS - 1) / PARTS <= ROWS && M_V - M_K == MT * HEAD_DIM * 2, "one row a turn");
        uint4 v[TURNS + 2];
        u32 pending = row < range.tokens ? 3u << TURNS : 0;
#pragma unroll
        for (int j = 0; j < TURNS; j++) {
            v[j] = make_uint4(0, 0, 0, 0);
            if (first_row + row + j * ROWS < TOKENS * HEADS) pending |= 1u << j;
        }
        for (u32 tries = 0; pending; tries++) {
#pragma unroll
            for (int j = 0; j < TURNS + 2; j++)
                if (pending >> j & 1) v[j] = peek4(j < TURNS ? q_from + j * (ROWS * HEAD_DIM * 2) : own_from + (j - TURNS) * (M_V - M_K));
#pragma unroll
            for (int j = 0; j < TURNS + 2; j++)
                if ((pending >> j & 1) && complete(v[j])) pending &= ~(1u << j);
            if (tries > PATIENCE) __trap();
        }
        const u32 place = row * PITCH + piece * 16;
#pragma unroll
        for (int j = 0; j < TURNS; j++) store_shared4(q_to + place + j * (ROWS * PITCH), v[j]);
        if (row < range.tokens) {
            store_shared4(k_to + range.prefix * PITCH + place, v[TURNS]);
            store_shared4(v_to + range.prefix * PITCH + place, v[TURNS + 1]);
        }
    }
    copies_done();
    __syncthreads();
    MARK(16);

    const int count = range.count(), g = at.g, t = at.t;
    float s[2][2][4], top[2][2];
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) s[i][n][j] = 0.0f;
    if (warp * 16 < count) {  // scores: this warp's 16 keys against all rows
        const u32 q_base = q_to + (lane % 16) * PITCH + (lane / 16) * 16;
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
                    float& score = s[i][n][half * 2 + j];
                    score = warp * 16 + n * 8 + t * 2 + j < count ? score * scale : MINUS_INFINITY;
                    best = fmaxf(best, score);
                }
            best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 1));
            best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 2));
            if (t == 0) m.top[warp][i * 16 + half * 8 + g] = best;
        }
    __syncthreads();
    u8* const p_memory = memory + A_P;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = i * 16 + half * 8 + g;
            float best = m.top[0][row];
#pragma unroll
            for (int w = 1; w < 8; w++) best = fmaxf(best, m.top[w][row]);
            top[i][half] = best;
            const float from = best == MINUS_INFINITY ? 0.0f : best;  // no keys here at all
            float total = 0.0f;
#pragma unroll
            for (int n = 0; n < 2; n++) {
                const float p0 = exp2_of(s[i][n][half * 2] - from), p1 = exp2_of(s[i][n][half * 2 + 1] - from);
                total += p0 + p1;
                if (warp * 16 < KEYS)
                    *reinterpret_cast<u32*>(p_memory + row * P_PITCH + (warp * 16 + n * 8 + t * 2) * 2) = pack_bf16(p0, p1);
            }
            total += __shfl_xor_sync(0xffffffffu, total, 1);
            total += __shfl_xor_sync(0xffffffffu, total, 2);
            if (t == 0) m.sum[warp][row] = total;
        }
    __syncthreads();
    constexpr int DIMS = HEAD_DIM / 8;  // of a warp here, of a block below
    float acc[2][DIMS / 8][4];
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int n = 0; n < DIMS / 8; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) acc[i][n][j] = 0.0f;
    const u32 p_base = base + A_P + (lane % 16) * P_PITCH + (lane / 16) * 16;
    const u32 v_base = v_to + (lane % 16) * PITCH + (warp * DIMS + (lane / 16) * 8) * 2;
#pragma unroll 2
    for (int k = 0; k < (count + 15) / 16; k++) {
        u32 a0[4], a1[4];
        ldmatrix4(a0, p_base + k * 32);
        ldmatrix4(a1, p_base + 16 * P_PITCH + k * 32);
#pragma unroll
        for (int n = 0; n < DIMS / 8; n += 2) {
            u32 b[4];
            ldmatrix4_transposed(b, v_base + k * 16 * PITCH + n * 16);
            mma(acc[0][n], a0, b[0], b[1]);
            mma(acc[0][n + 1], a0, b[2], b[3]);
            mma(acc[1][n], a1, b[0], b[1]);
            mma(acc[1][n + 1], a1, b[2], b[3]);
        }
    }
    MARK(17);
    // This part's result, normalised, goes to the parts that own its dims: warp w's to part w. A row's maximum and sum
    // go to all of them.
    u8* const outgoing = parcels + P_SEEN + (size_t)((at.tile * PARTS + warp) * PARTS + at.part) * 2048 + lane * 8;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = i * 16 + half * 8 + g;
            float total = 0.0f;
#pragma unroll
            for (int w = 0; w < 8; w++) total += m.sum[w][row];
            const float inverse = total > 0.0f ? 1.0f / total : total;  // 0 where there were no keys, NaN where one was
#pragma unroll
            for (int n = 0; n < DIMS / 8; n += 2)
                post2(outgoing + ((i * 2 + half) * 2 + n / 2) * 256,
                      pack_bf16(acc[i][n][half * 2] * inverse, acc[i][n][half * 2 + 1] * inverse),
                      pack_bf16(acc[i][n + 1][half * 2] * inverse, acc[i][n + 1][half * 2 + 1] * inverse));
            if (warp == 0 && t == 0) {
                const int box = M_TOPS + ((at.tile * PARTS + at.part) * QUERIES + row) * 8;
                post2(mail + box, __float_as_uint(top[i][half]), __float_as_uint(total));
                post2(next + box, EMPTY, EMPTY);
            }
        }
    // the owner: this warp's rows are those of quarter warp / 2, its dims two tiles of eight
    static_assert(DIMS == 32, "a warp's quarter");
    const int quarter = warp / 2, r = quarter / 2 * 16 + quarter % 2 * 8 + g, row = first_row + r;
    u8* const incoming = parcels + P_SEEN + (size_t)((at.tile * PARTS + at.part) * PARTS) * 2048 + warp * 256 + lane * 8;
    const u8* const tops_at = mail + M_TOPS + (at.tile * PARTS * QUERIES + r) * 8;
    uint2 stats[PARTS], parts[PARTS];
#pragma unroll
    for (int c = 0; c < PARTS; c++) stats[c] = peek2(tops_at + c * (QUERIES * 8)), parts[c] = peek2(incoming + c * 2048);
    MARK(18);
    float best = MINUS_INFINITY;
#pragma unroll
    for (int c = 0; c < PARTS; c++) {
        stats[c] = await2(tops_at + c * (QUERIES * 8), stats[c]);
        best = fmaxf(best, __uint_as_float(stats[c].x));
    }
    float weight = 0.0f, o[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int c = 0; c < PARTS; c++) {
        const float w = exp2_of(__uint_as_float(stats[c].x) - best) * __uint_as_float(stats[c].y);
        const uint2 v = await2(incoming + c * 2048, parts[c]);
        weight += w;
        o[0] = fmaf(w, low_of(v.x), o[0]), o[1] = fmaf(w, high_of(v.x), o[1]);
        o[2] = fmaf(w, low_of(v.y), o[2]), o[3] = fmaf(w, high_of(v.y), o[3]);
    }
    MARK(19);
    if (row < TOKENS * HEADS) {
        const float inverse = 1.0f / weight;
        const int place = M_SEEN + (row * HEAD_DIM + at.part * DIMS + warp % 2 * 16 + t * 2) * 2;
        post(mail + place, pack_bf16(o[0] * inverse, o[1] * inverse));
        post(mail + place + 16, pack_bf16(o[2] * inverse, o[3] * inverse));
        post(next + place, EMPTY);
        post(next + place + 16, EMPTY);
    }
#pragma unroll
    for (int c = 0; c < PARTS; c++) post2(incoming + c * 2048, EMPTY, EMPTY);
}
