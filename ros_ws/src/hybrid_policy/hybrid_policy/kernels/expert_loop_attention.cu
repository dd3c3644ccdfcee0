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

// Where piece ``piece`` (16 bytes, 8 dims) of row r lies, as warpgroup products want it: blocks of 64 dims, of these
// [row, 128 bytes, its pieces XOR row % 8]. Of keys and values, KEYS rows a block. There are 32 queries, and a product has 64
// rows: so eights of rows of two blocks alternate, every warp has eight rows that count, and the eight behind those are another
// block's.
__device__ __forceinline__ u32 swizzled(u32 r, u32 piece) { return r % 8 * 128 + ((piece % 8 ^ r % 8) << 4); }
__device__ __forceinline__ u32 key_place(u32 r, u32 piece) { return piece / 8 * (KEYS * 128) + r / 8 * 1024 + swizzled(r, piece); }
__device__ __forceinline__ u32 query_block(u32 block) { return block / 2 * (QUERIES * 256) + block % 2 * 1024; }
__device__ __forceinline__ u32 query_place(u32 r, u32 piece) { return query_block(piece / 8) + r / 8 * 2048 + swizzled(r, piece); }

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
            const u32 places = which ? values_to : keys_to, there = cache_barrier(which + 1);
            wait_bytes(cache_barrier(which), turn % 2);
#pragma unroll 2
            for (u32 r = warp; r < range.prefix; r += TURNS, from += TURNS * HEAD_DIM) copy16(places + key_place(r, lane), from);
#pragma unroll 1
            for (u32 r = range.count() + warp; r < (range.count() + 15) / 16 * 16; r += TURNS)
                store_shared4(places + key_place(r, lane), make_uint4(0, 0, 0, 0));
            copies_done();
            publish_to_tensor_core();
            arrive(there);
        }
}

constexpr int HALF_KEYS = KEYS / 2;  // a warpgroup's, of the scores
constexpr int HALF_DIMS = HEAD_DIM / 2;  // and of the values

struct AttentionMemory {
    float top[QUERIES][GROUPS], sum[QUERIES][GROUPS];  // by half of the keys
};

// d[64 rows, HALF_KEYS] (+)= a[64, 16] b[HALF_KEYS, 16]'
__device__ __forceinline__ void scores_step(float (&d)[HALF_KEYS / 2], u64 a, u64 b, int add) {
#if KEYS == 96
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %26, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n48k16.f32.bf16.bf16 {" FIRST_24 "}, %24, %25, p, 1, 1, 0, 0;\n}"
                 : D4(0), D4(1), D4(2), D4(3), D4(4), D4(5) : "l"(a), "l"(b), "r"(add));
#else
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" FIRST_32 "}, %32, %33, p, 1, 1, 0, 0;\n}"
                 : D4(0), D4(1), D4(2), D4(3), D4(4), D4(5), D4(6), D4(7) : "l"(a), "l"(b), "r"(add));
#endif
}

// d[64 rows, HALF_DIMS] += a[64, 16 keys] b[16 keys, HALF_DIMS], b as it lies: keys are rows
__device__ __forceinline__ void values_step(float (&d)[HALF_DIMS / 2], u64 a, u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" FIRST_32
        ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
        ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, 1, 1, 1, 0, 1;"
        : D4(0), D4(1), D4(2), D4(3), D4(4), D4(5), D4(6), D4(7), D4(8), D4(9), D4(10), D4(11), D4(12), D4(13), D4(14), D4(15)
        : "l"(a), "l"(b));
}

__device__ __forceinline__ void attend(
    const Place& at, const KeyRange& range, u8* memory, AttentionMemory& m, u8* mail, u8* parcels, u32 phase, float scale,
    float eight_scale, const Arguments& p, int layer) {
    const u32 base = shared_address(memory), k_to = base + A_X, v_to = base + A_SUMS, q_to = base + A_Q;
    const u32 first_row = at.tile * QUERIES, lane = at.lane;
    const u32 warp = at.warp;  // a warpgroup has half of the keys, then half of the dims, of all rows; a warp has eight rows
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
        for (int j = 0; j < TURNS; j++) store_shared4(q_to + query_place(warp + j * WARPS, lane), v[j]);
        if (own) {
            const u32 place = key_place(range.prefix + warp, lane);
            store_shared4(k_to + place, key);
            store_shared4(v_to + place, value);
        }
    }
    publish_to_tensor_core();
    wait_bytes(cache_barrier(KEYS_THERE), phase);
    block_barrier();
    MARK(16);

    const u32 count = range.count(), g = at.g, t = at.t, first_key = at.group * HALF_KEYS;
    const u32 row = warp % 4 * 8 + g;
    float s[HALF_KEYS / 2];  // of keys 8 n + 2 t + {0, 1}: [4 n + {0, 1}], and what does not count
    const u64 q = matrix(q_to), k = matrix(k_to + first_key * 128);
    products_begin();
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 16; i++)
        scores_step(s, q + (query_block(i / 4) + i % 4 * 32 >> 4), k + (i / 4 * (KEYS * 128) + i % 4 * 32 >> 4), i > 0);
    products_commit();
    products_wait<0>();
    pin(s);
    MARK(24);
    float best = MINUS_INFINITY;
#pragma unroll
    for (int n = 0; n < HALF_KEYS / 8; n++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float& score = s[4 * n + j];
            score = first_key + n * 8 + t * 2 + j < count ? score * scale : MINUS_INFINITY;
            best = fmaxf(best, score);
        }
    best = quad_max(best);
    if (t == 0) m.top[row][at.group] = best;
    block_barrier();
    best = fmaxf(m.top[row][0], m.top[row][1]);
    const float from = best == MINUS_INFINITY ? 0.0f : best;  // no keys here at all
    float total = 0.0f;
#pragma unroll
    for (int n = 0; n < HALF_KEYS / 8; n++) {
        const float p0 = exp2_of(s[4 * n] - from), p1 = exp2_of(s[4 * n + 1] - from);
        total += p0 + p1;
        *reinterpret_cast<u32*>(memory + (A_P + query_place(row, first_key / 8 + n) + t * 4)) = pack_bf16(p0, p1);
    }
    total = quad_sum(total);
    if (t == 0) m.sum[row][at.group] = total;
    publish_to_tensor_core();
    wait_bytes(cache_barrier(VALUES_THERE), phase);
    block_barrier();
    MARK(25);
    float d[HALF_DIMS / 2];
#pragma unroll
    for (int i = 0; i < HALF_DIMS / 2; i++) asm volatile("mov.f32 %0, 0f00000000;" : "=f"(d[i]));  // here, not long before
    const u64 weights = matrix(base + A_P), v = matrix(v_to + at.group * (HALF_DIMS / 64 * KEYS * 128), KEYS * 128);
    products_begin();
#pragma unroll 1
    for (u32 i = 0; i < (count + 15) / 16; i++)
        values_step(d, weights + (query_block(i / 4) + i % 4 * 32 >> 4), v + i * (2048 >> 4));
    products_commit();
    // A row's maximum and sum go to all parts, a row a lane: by one warp, but without a branch while products are under way
    post2_if(
        mail + (M_TOPS + ((at.tile * PARTS + at.part) * QUERIES + lane) * 8),
        __float_as_uint(fmaxf(m.top[lane][0], m.top[lane][1])),
        __float_as_uint(m.sum[lane][0] + m.sum[lane][1]), warp == 0);
    products_wait<0>();
    pin(d);
    MARK(17);
    // This part's result goes to the parts that own its dims, 32 each
    constexpr int DIMS = HEAD_DIM / PARTS;
    static_assert(DIMS == 32, "four parts a warpgroup");
    u8* const outgoing =
        parcels + (P_SEEN + ((at.tile * PARTS + at.group * 4) * PARTS + at.part) * 2048 + warp % 4 * 512 + lane * 8);
#pragma unroll
    for (int n = 0; n < HALF_DIMS / 8; n += 2) {
        const float four[4] = {d[4 * n], d[4 * n + 1], d[4 * n + 4], d[4 * n + 5]};
        post_bf16_parcel(outgoing + n / 4 * (PARTS * 2048) + n % 4 / 2 * 256, four, phase);
    }
    // the owner: this warp's rows are those of quarter warp / 2, its dims two tiles of eight
    const u32 r = warp / 2 * 8 + g, own_row = first_row + r;
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
    best = MINUS_INFINITY;
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
    u8* const place = mail + M_SEEN + (own_row * HEAD_DIM + at.part * DIMS + warp % 2 * 16 + t * 2) * SIZE;
    const bool later = t & 1;
    u32 first, second;
    if (EIGHT) {  // with the next lane, which has the next two columns of both tiles, one trades for four of one of them
        first = two_e4m3(o[0] * inverse, o[1] * inverse), second = two_e4m3(o[2] * inverse, o[3] * inverse);
        const u32 got = __shfl_xor_sync(0xffffffffu, later ? first : second, 1);
        first = later ? got | second << 16 : first | got << 16;
    } else {
        first = pack_bf16(o[0] * inverse, o[1] * inverse), second = pack_bf16(o[2] * inverse, o[3] * inverse);
    }
    if (own_row < TOKENS * HEADS) {
        post(place + (EIGHT && later ? 6 : 0), first);
        if (!EIGHT) post(place + 16, second);
    }
}
