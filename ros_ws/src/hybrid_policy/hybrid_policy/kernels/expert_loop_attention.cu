// ------------------------------------------------------------------------------------ the loop kernel's attention
// 32 rows (token * HEADS + head) a tile; each part has some of the prefix's keys and of the chunk's own.

struct KeyRange {
    u32 first, prefix;   // rows of the cache
    u32 token, tokens;   // rows of the chunk
    __device__ __forceinline__ KeyRange(u32 valid, u32 part) {
        const u32 share = (valid + PARTS - 1) / PARTS;
        constexpr u32 OWN = (TOKENS + PARTS - 1) / PARTS;
        first = min(part * share, valid), prefix = min(share, valid - first);
        token = min(part * OWN, (u32)TOKENS), tokens = min(OWN, TOKENS - token);
    }
    __device__ __forceinline__ u32 count() const { return prefix + tokens; }
};

// Keys and values of the prefix were there before the launch. Three warps behind the workers bring them, layer by layer, as soon
// as their places are free; a worker would have to ask for them when it should ask for queries. Every worker says that a place is
// free: racecheck does not follow one arrival for many behind a barrier.
enum CacheBarrier { KEYS_FREE, KEYS_THERE, VALUES_FREE, VALUES_THERE };
constexpr int BRINGERS = 96;
__shared__ u64 cache_barriers[4];
__device__ __forceinline__ u32 cache_barrier(int which) { return shared_address(cache_barriers + which); }

// By these warps. Zeros behind all rows up to a multiple of 16: values have weights of zero there, and may not be NaN.
__device__ __forceinline__ void bring_prefix(const Arguments& p, u32 keys_to, u32 values_to) {
    constexpr int TURNS = BRINGERS / 32;  // a row a warp, a piece a lane
    static_assert(HEAD_DIM * 2 == 32 * 16, "a row a warp");
    const u32 warp = threadIdx.x / 32 - WARPS - 1, lane = threadIdx.x % 32;
    wait_for_predecessor();
    const KeyRange range(p.valid[0], blockIdx.x % PARTS);
#pragma unroll 1
    for (int turn = 0, layer = 0; turn < p.steps * p.layers; turn++, layer = layer + 1 < p.layers ? layer + 1 : 0)
#pragma unroll 1
        for (int which = KEYS_FREE; which <= VALUES_FREE; which += 2) {
            const u16* from = (which ? p.values : p.keys) + ((size_t)layer * p.capacity + range.first + warp) * HEAD_DIM + lane * 8;
            const u32 places = (which ? values_to : keys_to) + lane * 16, there = cache_barrier(which + 1);
            wait_bytes(cache_barrier(which), turn % 2);
#pragma unroll 2
            for (u32 r = warp; r < range.prefix; r += TURNS, from += TURNS * HEAD_DIM) copy16(places + r * PITCH, from);
#pragma unroll 1
            for (u32 r = range.count() + warp; r < (range.count() + 15) / 16 * 16; r += TURNS) store_shared4(places + r * PITCH, make_uint4(0, 0, 0, 0));
            copies_done();
            arrive(there);
        }
}

struct AttentionMemory {
    float top[QUERIES][4], sum[QUERIES][4];  // by quarter of the keys
};

__device__ __forceinline__ void attend(
    const Place& at, const KeyRange& range, u8* memory, AttentionMemory& m, u8* mail, u8* parcels, u32 phase, float scale, float eight_scale, const Arguments& p, int layer) {
    const u32 base = shared_address(memory), k_to = base + A_X, v_to = base + A_SUMS, q_to = base + A_Q;
    const u32 first_row = at.tile * QUERIES, lane = at.lane;
    const u32 warp = at.warp;  // has 16 rows and 32 keys, then all rows and 32 dims
    constexpr int HALVES = 2, KEY_TILES = 4;
    {  // rows of the queries, and of the chunk's own keys and values: a lane has a piece of each
        constexpr int TURNS = QUERIES / WARPS;
        static_assert(WARPS == 8 && HEAD_DIM == 256 && (TOKENS + PARTS - 1) / PARTS <= 8, "a row a turn");
        const u8* const key_from = mail + M_K + (range.token + warp) * (HEAD_DIM * 2) + lane * 16;
        const u8* from[TURNS];
#pragma unroll
        for (int j = 0; j < TURNS; j++)
            from[j] = mail + M_Q + min(first_row + warp + j * WARPS, (u32)TOKENS * HEADS - 1) * (HEAD_DIM * 2) + lane * 16;
        const bool own = warp < range.tokens;
        // each block that projects has 32 dims, and the 32 half a head away: a word of each
        await_word(lane % 8 < 4 && own ? key_from + (int)(lane % 4 * 64 - lane * 16) : from[0] + (int)(lane % 4 * 64 - lane * 16));
        uint4 v[TURNS], key, value;
        u32 missing = ~0u;
        for (u32 tries = 0;; tries++) {
            u32 bad = 0;
#pragma unroll
            for (int j = 0; j < TURNS; j++)
                if (missing >> j & 1) v[j] = peek4(from[j]);
            if (own && missing >> TURNS & 1) key = peek4(key_from), value = peek4(key_from + (M_V - M_K));
#pragma unroll
            for (int j = 0; j < TURNS; j++) bad |= (top_of(v[j]) == EMPTY) << j;
            if (own) bad |= (max(top_of(key), top_of(value)) == EMPTY) << TURNS;
            missing = any_lane(bad);
            if (!missing) break;
            if (tries > PATIENCE) give_up();
        }
#pragma unroll
        for (int j = 0; j < TURNS; j++) store_shared4(q_to + (warp + j * WARPS) * PITCH + lane * 16, v[j]);
        if (own) {
            const u32 place = (range.prefix + warp) * PITCH + lane * 16;
            store_shared4(k_to + place, key);
            store_shared4(v_to + place, value);
        }
    }
    wait_bytes(cache_barrier(KEYS_THERE), phase);
    block_barrier();
    MARK(16);

    const u32 count = range.count(), g = at.g, t = at.t;
    const u32 rows = warp / 4 * 16, quarter = warp % 4, first_key = quarter * 32;
    float s[KEY_TILES][4];
#pragma unroll
    for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) s[n][j] = 0.0f;
    if (first_key < count) {
        const bool all = first_key + 16 < count;  // behind the keys there are values
        const u32 q_base = q_to + (rows + lane % 16) * PITCH + (lane / 16) * 16;
        const u32 k_base = k_to + (first_key + (lane / 16) * 8 + lane % 8) * PITCH + ((lane / 8) % 2) * 16;
#pragma unroll 4
        for (int k = 0; k < HEAD_DIM / 16; k++) {
            u32 a[4], b[4];
            ldmatrix4(a, q_base + k * 32);
            ldmatrix4(b, k_base + k * 32);
            mma(s[0], a, b[0], b[1]);
            mma(s[1], a, b[2], b[3]);
            if (!all) continue;
            ldmatrix4(b, k_base + 16 * PITCH + k * 32);
            mma(s[2], a, b[0], b[1]);
            mma(s[3], a, b[2], b[3]);
        }
    }
    MARK(24);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float best = MINUS_INFINITY;
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float& score = s[n][half * 2 + j];
                score = first_key + n * 8 + t * 2 + j < count ? score * scale : MINUS_INFINITY;
                best = fmaxf(best, score);
            }
        best = quad_max(best);
        if (t == 0) m.top[rows + half * 8 + g][quarter] = best;
    }
    block_barrier();
    u8* const p_memory = memory + A_P + (first_key + t * 2) * 2;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const u32 row = rows + half * 8 + g;
        const float4 tops = float4_at(m.top[row]);
        const float best = fmaxf(fmaxf(tops.x, tops.y), fmaxf(tops.z, tops.w));
        const float from = best == MINUS_INFINITY ? 0.0f : best;  // no keys here at all
        float total = 0.0f;
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++) {
            const float p0 = exp2_of(s[n][half * 2] - from), p1 = exp2_of(s[n][half * 2 + 1] - from);
            total += p0 + p1;
            if (first_key + n * 8 < KEYS) *reinterpret_cast<u32*>(p_memory + row * P_PITCH + n * 16) = pack_bf16(p0, p1);
        }
        total = quad_sum(total);
        if (t == 0) m.sum[row][quarter] = total;
    }
    wait_bytes(cache_barrier(VALUES_THERE), phase);
    block_barrier();
    MARK(25);
    constexpr int DIMS = HEAD_DIM / 8;  // of a warp here, of a block below
    float acc[HALVES][DIMS / 8][4];
#pragma unroll
    for (int i = 0; i < HALVES; i++)
#pragma unroll
        for (int n = 0; n < DIMS / 8; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) acc[i][n][j] = 0.0f;
    const u32 p_base = base + A_P + (lane % 16) * P_PITCH + (lane / 16) * 16;
    const u32 v_base = v_to + (lane % 16) * PITCH + (warp * DIMS + (lane / 16) * 8) * 2;
#pragma unroll 2
    for (u32 k = 0; k < (count + 15) / 16; k++) {
        u32 a[HALVES][4];
#pragma unroll
        for (int i = 0; i < HALVES; i++) ldmatrix4(a[i], p_base + i * 16 * P_PITCH + k * 32);
#pragma unroll
        for (int n = 0; n < DIMS / 8; n += 2) {
            u32 b[4];
            ldmatrix4_transposed(b, v_base + k * 16 * PITCH + n * 16);
#pragma unroll
            for (int i = 0; i < HALVES; i++) {
                mma(acc[i][n], a[i], b[0], b[1]);
                mma(acc[i][n + 1], a[i], b[2], b[3]);
            }
        }
    }
    MARK(17);
    // This part's result goes to the parts that own its dims: warp w's to part w. A row's maximum and sum go to all of them.
    u8* const outgoing = parcels + (P_SEEN + ((at.tile * PARTS + warp) * PARTS + at.part) * 2048 + lane * 8);
#pragma unroll
    for (int i = 0; i < HALVES; i++)
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int n = 0; n < DIMS / 8; n += 2) {
                const float v[4] = {acc[i][n][half * 2], acc[i][n][half * 2 + 1], acc[i][n + 1][half * 2], acc[i][n + 1][half * 2 + 1]};
                post_bf16_parcel(outgoing + ((i * 2 + half) * 2 + n / 2) * 256, v, phase);
            }
    if (warp == 0) {  // a row a lane
        const float4 tops = float4_at(m.top[lane]), sums = float4_at(m.sum[lane]);
        const float best = fmaxf(fmaxf(tops.x, tops.y), fmaxf(tops.z, tops.w)), total = sums.x + sums.y + (sums.z + sums.w);
        const u32 box = M_TOPS + ((at.tile * PARTS + at.part) * QUERIES + lane) * 8;
        post2(mail + box, __float_as_uint(best), __float_as_uint(total));
    }
    // the owner: this warp's rows are those of quarter warp / 2, its dims two tiles of eight
    static_assert(DIMS == 32, "a warp's quarter");
    const u32 r = warp / 4 * 16 + warp / 2 % 2 * 8 + g, row = first_row + r;
    const u8* const incoming = parcels + (P_SEEN + (at.tile * PARTS + at.part) * (PARTS * 2048) + warp * 256 + lane * 8);
    const u8* const tops_at = mail + (M_TOPS + (at.tile * PARTS * QUERIES + r) * 8);
    uint2 stats[PARTS], parts[PARTS];
    await_parcel(incoming - lane * 8 + lane % PARTS * 2048, phase);
    MARK(18);
    u32 missing = (1 << PARTS) - 1;
    for (u32 tries = 0;; tries++) {
#pragma unroll
        for (int c = 0; c < PARTS; c++)
            if (missing >> c & 1) stats[c] = peek2(tops_at + c * (QUERIES * 8)), parts[c] = peek2(incoming + c * 2048);
        u32 bad = 0;
#pragma unroll
        for (int c = 0; c < PARTS; c++) bad |= (top_of(stats[c]) == EMPTY || (parts[c].x ^ phase) & 1) << c;
        missing = any_lane(bad);
        if (!missing) break;
        if (tries > PATIENCE) give_up();
    }
    MARK(19);
    float best = MINUS_INFINITY;
#pragma unroll
    for (int c = 0; c < PARTS; c++) best = fmaxf(best, __uint_as_float(stats[c].x));
    float weight = 0.0f, o[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int c = 0; c < PARTS; c++) {
        const float w = exp2_of(__uint_as_float(stats[c].x) - best);
        weight = fmaf(w, __uint_as_float(stats[c].y), weight);
        o[0] = fmaf(w, low_of(parts[c].x), o[0]), o[1] = fmaf(w, high_of(parts[c].x), o[1]);
        o[2] = fmaf(w, low_of(parts[c].y), o[2]), o[3] = fmaf(w, high_of(parts[c].y), o[3]);
    }
    const float inverse = __fdividef(eight_scale, weight);
    u8* const place = mail + M_SEEN + (row * HEAD_DIM + at.part * DIMS + warp % 2 * 16 + t * 2) * SIZE;
    const bool later = t & 1;
    u32 first, second;
    if (EIGHT) {  // with the next lane, which has the next two columns of both tiles, one trades for four of one of them
        first = two_e4m3(o[0] * inverse, o[1] * inverse), second = two_e4m3(o[2] * inverse, o[3] * inverse);
        const u32 got = __shfl_xor_sync(0xffffffffu, later ? first : second, 1);
        first = later ? got | second << 16 : first | got << 16;
    } else {
        first = pack_bf16(o[0] * inverse, o[1] * inverse), second = pack_bf16(o[2] * inverse, o[3] * inverse);
    }
    if (row < TOKENS * HEADS) {
        post(place + (EIGHT && later ? 6 : 0), first);
        if (!EIGHT) post(place + 16, second);
    }
}
