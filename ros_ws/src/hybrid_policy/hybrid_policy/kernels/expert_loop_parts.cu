// ------------------------------------------------------------------------------------ the loop kernel's parts
// What expert_loop.cu's stages are made of: a ring of weights, mail between blocks, warpgroup products, and the
// exchange of partial sums in a cluster. Compiled for sm_90a (wgmma).

#define HAS_FORMAT(f) (FORMAT_QKV == f || FORMAT_O == f || FORMAT_GATE_UP == f || FORMAT_DOWN == f)

constexpr int NT = MT / 8;             // token tiles of a product
constexpr int GROUPS = 2, WARPS = 4 * GROUPS, WORKERS = 32 * WARPS;  // warpgroups of a block
constexpr u32 EMPTY = 0xffffffffu;     // a word of mail that nobody has written: no product, no NaN of the hardware's has it
#ifndef PATIENCE
#define PATIENCE (1u << 23)            // polls before a wait is called a hang (seconds); a sanitizer wants more
#endif

constexpr bool EIGHT = FORMAT_DOWN == 3;  // weights and activations in E4M3
static_assert(!EIGHT || (FORMAT_QKV == 3 && FORMAT_O == 3 && FORMAT_GATE_UP == 3), "all stages, or none");
constexpr int SIZE = EIGHT ? 1 : 2;  // bytes of an activation

// A store to nowhere ends the launch with an error. (A trap is a way out of the kernel, and with one among the workers the
// compiler gives them no more registers than they began with, whatever setmaxnreg says.)
__device__ __forceinline__ void give_up() { asm volatile("st.global.u32 [%0], %1;" ::"l"(0ull), "r"(0) : "memory"); }

// A warpgroup meets at an mbarrier, not at a named one: racecheck loses sight of the workers' named barrier while a part of
// them is at another, and reported 20 races that were none. It costs half a percent.
__shared__ u64 meetings[GROUPS];

__device__ __forceinline__ void group_barrier(int group) {
    asm volatile(
        "{\n.reg .b64 state;\n.reg .pred done;\nmbarrier.arrive.shared::cta.b64 state, [%0];\nAGAIN:\n"
        "mbarrier.try_wait.shared::cta.b64 done, [%0], state;\n@!done bra AGAIN;\n}"
        ::"r"(shared_address(meetings + group)) : "memory");
}

// ---- barriers that count bytes

__device__ __forceinline__ void wait_bytes(u32 barrier, u32 parity) {
    for (u32 tries = 0; !passed(barrier, parity); tries++)
        if (tries > PATIENCE) give_up();
}

// ---- weights: one bulk copy brings the next piece of all warps, in the order of their use, as soon as the last of
// them has read what was there. (A copy a warp costs as many times the issue, some 50 cycles each, one after the other.)
// A warp of its own, behind the workers, asks for them (`stream_weights` in expert_loop_layout.cu): asking takes some 300
// clocks, which a worker's products would wait for.

constexpr int LOADS = 4;  // of a lane, 16 bytes each, in a piece

template <int FORMAT> struct Piece {  // a warp's share of one bulk copy
    static constexpr int PER16 = FORMAT == 0 ? 1 : FORMAT == 2 ? 4 : 2;  // k steps of 16 in 16 bytes of each lane
    static constexpr int PRODUCTS = FORMAT == 3 ? 1 : PER16;             // instructions for them
    static constexpr int STEPS = LOADS * PER16;
    static constexpr int BYTES = LOADS * (FORMAT == 2 ? 640 : 512);  // NVFP4: 512 of codes, then 128 of scales, each
};
constexpr int SLOT = WARPS * LOADS * (HAS_FORMAT(2) ? 640 : 512);

struct Ring {
    u32 data, barriers;  // slots; of each a barrier that it is full, and behind those one that it is empty
    u32 slot = 0, parity = 0;

    __device__ __forceinline__ u32 full() const { return barriers + slot * 8; }
    __device__ __forceinline__ u32 empty() const { return barriers + (SLOTS + slot) * 8; }
    __device__ __forceinline__ void advance() {
        if (++slot == SLOTS) slot = 0, parity ^= 1;
    }
    // by every worker: it has read its share of this piece
    __device__ __forceinline__ void give_back() {
        arrive(empty());
        advance();
    }
    // for all of a warp, without waiting
    __device__ __forceinline__ bool there() const {
        u32 done;
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
            : "=r"(done) : "r"(full()), "r"(parity) : "memory");
        return __all_sync(0xffffffffu, done);
    }
    // by one thread: ask for the next piece, once its slot is empty
    __device__ __forceinline__ void ask(const u8* from, u32 size, u64 policy) {
        wait_bytes(empty(), parity ^ 1);
        expect(full(), size);
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                     ::"r"(data + slot * SLOT), "l"(from), "r"(size), "r"(full()), "l"(policy) : "memory");
        advance();
    }
};

__device__ __forceinline__ uint4 load_shared4(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
    return v;
}

__device__ __forceinline__ float4 load_shared_float4(u32 address) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address));
    return v;
}

__device__ __forceinline__ void store_shared4(u32 address, const uint4& v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// ---- mail: a word that is not EMPTY has arrived, so it needs no flag and no fence. Four copies take turns from layer to
// layer; each block empties a slice of the copy after the next, which everybody has read two layers ago (`empty_slice`).
// Mail must be small: what falls out of L2 comes back from memory, at every poll.

__device__ __forceinline__ uint4 peek4(const void* from) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
    return v;
}

__device__ __forceinline__ u32 peek(const void* from) {
    u32 v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
    return v;
}

__device__ __forceinline__ u32 top_of(const uint4& v) { return max(max(v.x, v.y), max(v.z, v.w)); }  // EMPTY where one is
__device__ __forceinline__ u32 top_of(const uint2& v) { return max(v.x, v.y); }

// a lane's word, of a source of what its warp wants: until all of them are there nobody reads much (polls compete with
// the posts they wait for)
__device__ __forceinline__ void await_word(const void* from) {
    for (u32 tries = 0; peek(from) == EMPTY; tries++)
        if (tries > PATIENCE) give_up();
    __syncwarp();
}

__device__ __forceinline__ u32 any_lane(u32 bits) {
    u32 v;
    asm volatile("redux.sync.or.b32 %0, %1, 0xffffffff;" : "=r"(v) : "r"(bits));
    return v;
}

__device__ __forceinline__ void post(void* to, u32 value) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

__device__ __forceinline__ void post2(void* to, u32 a, u32 b) {
    asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(a), "r"(b) : "memory");
}
__device__ __forceinline__ void post2_if(void* to, u32 a, u32 b, bool use) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %3, 0;\n@p st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};\n}"
                 ::"l"(to), "r"(a), "r"(b), "r"((u32)use) : "memory");
}

__device__ __forceinline__ void post4(void* to, const uint4& v) {
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// ---- parcels: what one block reads, there once. Each float's lowest bit (of four bf16, stored in one piece, the first one's)
// is the parity of the layer, so that nobody empties them: a layer's worth of stores, at 20 bytes a clock, would be half a
// microsecond.

__device__ __forceinline__ void post_parcel(void* to, const float4& v, u32 phase) {
    const auto tagged = [&](float x) { return (__float_as_uint(x) & ~1u) | phase; };
    post4(to, make_uint4(tagged(v.x), tagged(v.y), tagged(v.z), tagged(v.w)));
}

__device__ __forceinline__ void post_bf16_parcel(void* to, const float (&v)[4], u32 phase) {
    const u32 low = (pack_bf16(v[0], v[1]) & ~1u) | phase, high = pack_bf16(v[2], v[3]);
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"((u64)high << 32 | low) : "memory");
}

// a lane's word, of eight sources; until one of them is there (few wait for parcels: what is missing then is asked for again)
__device__ __forceinline__ void await_parcel(const void* from, u32 phase) {
    for (u32 tries = 0; !__any_sync(0xffffffffu, !((peek(from) ^ phase) & 1)); tries++)
        if (tries > PATIENCE) give_up();
}

__device__ __forceinline__ uint2 peek2(const void* from) {
    u64 v;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(from) : "memory");
    return make_uint2((u32)v, (u32)(v >> 32));
}

// ---- activations: two blocks of 64 columns of each token at a time, from mail to shared memory as wgmma's B operand (K-major,
// 128-byte swizzle): [block][token, 128 bytes, its eight 16-byte pieces XOR token % 8]. By a warpgroup, t is one's place in it;
// stride: bytes from token to token. Rows behind TOKENS are the last one's: what becomes of them stays in their own columns,
// and nobody looks.

// a word of every fourth token, here and ``apart`` bytes on: eight of them a warp
__device__ __forceinline__ void await_tokens(const u8* from, u32 t, u32 group, u32 apart, u32 stride) {
    const u32 index = t / 32 * 8 + t % 8, token = min(index / 2 * 4, (u32)TOKENS - 1);
    await_word(from + token * stride + index % 2 * apart);
    group_barrier(group);
}

struct Taken {  // a lane's share of two blocks, on its way: products run while it comes
    static constexpr int TURNS = (MT + 15) / 16;  // of sixteen tokens
    static constexpr u32 FIRST = 0x55;            // of ``missing``, the first block's
    uint4 v[2][TURNS];

    // those of ``missing``, a bit each: 2 * turn + block
    __device__ __forceinline__ void ask(const u8* from, u32 t, u32 stride, u32 missing) {
        asm volatile("" : "+r"(t));  // addresses are worked out anew each time: kept, they would take the products' registers
        const u32 first = t / 8;
        from += first * stride + t % 8 * 16;
#pragma unroll
        for (int j = 0; j < TURNS; j++) {
            const u32 offset = (j * 16 + 16 <= TOKENS ? j * 16 : min(first + j * 16, (u32)TOKENS - 1) - first) * stride;
#pragma unroll
            for (int b = 0; b < 2; b++)
                if (missing >> (2 * j + b) & 1) v[b][j] = peek4(from + (b * 128 + offset));
        }
    }
    // single: the first block of the two alone
    __device__ __forceinline__ void ask(const u8* from, u32 t, u32 stride, bool single) {
        ask(from, t, stride, single ? FIRST : ~0u);
    }

    __device__ __forceinline__ void keep(u32 to, const u8* from, u32 t, u32 stride, bool single) {
        for (u32 tries = 0;; tries++) {
            u32 bad = 0;
#pragma unroll
            for (int b = 0; b < 2; b++)
#pragma unroll
                for (int j = 0; j < TURNS; j++) bad |= (top_of(v[b][j]) == EMPTY) << (2 * j + b);
            const u32 missing = any_lane(single ? bad & FIRST : bad);
            if (!missing) break;
            if (tries > PATIENCE) give_up();
            ask(from, t, stride, missing);
        }
        const u32 piece = t % 8, first = t / 8;
        to += first * 128 + ((piece ^ first % 8) * 16);
#pragma unroll
        for (int b = 0; b < 2; b++)
#pragma unroll
            for (int j = 0; j < TURNS; j++)
                if ((j * 16 + 16 <= MT || first + j * 16 < MT) && !(EIGHT && single && b))
                    store_shared4(to + (b * MT + j * 16) * 128, v[b][j]);
        publish_to_tensor_core();
    }
};

// ---- products of a warpgroup: 64 rows of W, from registers, by MT tokens, from shared memory

#define D4(i) "+f"(d[4 * i]), "+f"(d[4 * i + 1]), "+f"(d[4 * i + 2]), "+f"(d[4 * i + 3])

#define FIRST_24 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23"
#define FIRST_28 FIRST_24 ", %24, %25, %26, %27"
#define FIRST_32 FIRST_28 ", %28, %29, %30, %31"
#if MT == 56
#define MMA_SHAPE "wgmma.mma_async.sync.aligned.m64n56k"
#define MMA_OPERANDS " {" FIRST_28 "}, {%28, %29, %30, %31}, %32, "
#define MMA_SUMS D4(0), D4(1), D4(2), D4(3), D4(4), D4(5), D4(6)
#else
static_assert(MT == 64, "token tiles");
#define MMA_SHAPE "wgmma.mma_async.sync.aligned.m64n64k"
#define MMA_OPERANDS " {" FIRST_32 "}, {%32, %33, %34, %35}, %36, "
#define MMA_SUMS D4(0), D4(1), D4(2), D4(3), D4(4), D4(5), D4(6), D4(7)
#endif

// d += a b: 16 values of K in bf16, or 32 in E4M3 on both sides (FORMAT 3)
template <int FORMAT> __device__ __forceinline__ void warpgroup_mma(float (&d)[4 * NT], const u32 (&a)[4], u64 b) {
    if constexpr (FORMAT == 3)
        asm volatile(MMA_SHAPE "32.f32.e4m3.e4m3" MMA_OPERANDS "1, 1, 1;"
                     : MMA_SUMS : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    else
        asm volatile(MMA_SHAPE "16.f32.bf16.bf16" MMA_OPERANDS "1, 1, 1, 0;"
                     : MMA_SUMS : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// GeGLU, u halved before. tanh.approx errs by 2^-11, E4M3 by 2^-4.
__device__ __forceinline__ float geglu_of_half(float g, float u) {
    float t, inner = g * fmaf(0.035677408136300125f, g * g, 0.7978845608028654f);
    asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(inner));
    return fmaf(g, t, g) * u;
}

// E4M3, and NaN instead of what it cannot hold: saturation would be a wrong number that nobody sees
__device__ __forceinline__ u32 two_e4m3(float a, float b) {
    const u32 v = pack_e4m3(a, b, 0.0f, 0.0f);
    return fmaxf(fabsf(a), fabsf(b)) <= 448.0f ? v : 0x7f7fu;
}
__device__ __forceinline__ u32 four_e4m3(float a, float b, float c, float d) {
    const u32 v = pack_e4m3(a, b, c, d);
    return fmaxf(fmaxf(fabsf(a), fabsf(b)), fmaxf(fabsf(c), fabsf(d))) <= 448.0f ? v : 0x7f7f7f7fu;
}

// One k step of the A operand from a lane's words. E4M3: a word holds (k8; r8, e), by halves e: row 2g's sign and magnitude
// at bits 15 and 10..4, as a bf16 wants them; row 2g + 1's sign at 11, its magnitude's upper three bits at 14..12 and lower
// four at 3..0. NVFP4: packing.pack_words; scales: bf16 of s * 2^119 of both rows. (13 and 15 instructions; expert_common's
// plain bytes and nibbles take 24.)
template <int FORMAT>
__device__ __forceinline__ void operand_of(u32 (&a)[4], const uint4& w, int step, u32 scales) {
    if constexpr (FORMAT == 0 || FORMAT == 3) {
        a[0] = w.x, a[1] = w.y, a[2] = w.z, a[3] = w.w;
    } else if constexpr (FORMAT == 1) {
        const u32 words[2] = {step == 0 ? w.x : w.z, step == 0 ? w.y : w.w};
#pragma unroll
        for (int k8 = 0; k8 < 2; k8++) {  // E4M3's bits as a bf16 are v * 2^-120
            a[2 * k8] = multiply(words[k8] & 0x87f087f0u, 0x7b807b80u);
            a[2 * k8 + 1] = multiply(((words[k8] << 4) & 0x80f080f0u) | ((words[k8] >> 4) & 0x07000700u), 0x7b807b80u);
        }
    } else {  // E2M1's bits as a bf16 are v * 2^-126
        const u32 word = step == 0 ? w.x : step == 1 ? w.y : step == 2 ? w.z : w.w, mask = 0x81c081c0u;
        const u32 low = __byte_perm(scales, 0, 0x1010), high = __byte_perm(scales, 0, 0x3232);
        a[0] = multiply(word & mask, low);
        a[1] = multiply(((word << 3) ^ (word << 2)) & mask, high);
        a[2] = multiply((word << 6) & mask, low);
        a[3] = multiply(((word << 1) ^ (word >> 4)) & mask, high);
    }
}

// v, where ``use``; without a branch
__device__ __forceinline__ void load_shared4_if(uint4& v, u32 address, bool use) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n@p ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
                 : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w) : "r"(address), "r"((u32)use));
}

// A lane's words of a piece: codes, and scales where there are some
struct Words {
    uint4 codes[LOADS], scales[LOADS];

    // those of the next piece, which is there; without a branch
    __device__ __forceinline__ void load(const Ring& ring, u32 warp, u32 lane, bool scaled, bool use) {
        const u32 from = ring.data + ring.slot * SLOT + warp * (LOADS * (scaled ? 640 : 512));
#pragma unroll
        for (int i = 0; i < LOADS; i++) load_shared4_if(codes[i], from + i * 512 + lane * 16, use);
        if (HAS_FORMAT(2) && scaled)
#pragma unroll
            for (int i = 0; i < LOADS; i++) load_shared4_if(scales[i], from + LOADS * 512 + i * 128 + lane / 4 * 16, use);
    }
    __device__ __forceinline__ void read(Ring& ring, u32 warp, u32 lane, bool scaled) {
        wait_bytes(ring.full(), ring.parity);
        load(ring, warp, lane, scaled, true);
        ring.give_back();
    }
};

// d += W x over ``pieces`` of the ring, of which ``words`` has the first, and has the next one then, unless they are the stage's
// last; x: shared address of the first block of 128 bytes a token. No branch comes between products and their end: they read
// their registers while they run, and behind a branch the assembler gives those to others. Nothing is under way from piece to
// piece: else the compiler moves the sums elsewhere behind the loop before they are there.
template <int FORMAT>
__device__ __forceinline__ void product(
    float (&d)[4 * NT], Words& words, Ring& ring, u32 x, u32 pieces, bool last, u32 warp, u32 lane) {
    // an instruction takes 32 bytes of a token's row, a block of 128 bytes four
    constexpr int BATCH = Piece<FORMAT>::PRODUCTS, APART = LOADS * BATCH / 4 * (MT * 8);
    constexpr bool DECODES = FORMAT == 1 || FORMAT == 2;  // else words are operands as they are
    // K-major, 128-byte swizzle, 1024 bytes from eight tokens to the next eight
    constexpr u32 HIGH = 64 | 1u << 30;
    u32 here = x >> 4 | 1 << 16;
#pragma unroll 1
    for (u32 piece = 0;;) {
        const bool follows = ++piece < pieces, more = follows || !last, there = more && ring.there();
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            u32 a[BATCH][4];
#pragma unroll
            for (int k = 0; k < BATCH; k++) {
                u32 scales = 0;
                if constexpr (FORMAT == 2) {
                    const uint4& four = words.scales[i];
                    scales = k == 0 ? four.x : k == 1 ? four.y : k == 2 ? four.z : four.w;
                }
                operand_of<FORMAT>(a[k], words.codes[i], k, scales);
            }
            if (DECODES || i == 0) products_begin();
#pragma unroll
            for (int k = 0; k < BATCH; k++) {
                const int step = i * BATCH + k;
                warpgroup_mma<FORMAT>(d, a[k], (u64)HIGH << 32 | (here + (step / 4 * (MT * 128) + step % 4 * 32 >> 4)));
            }
            if (DECODES || i + 1 == LOADS) products_commit();
            if (DECODES && i >= 1 && i + 1 < LOADS) products_wait<1>();  // the registers of the batch before are free
        }
        here += APART;
        // while the products are under way
        Words next;
        if constexpr (!DECODES) next.load(ring, warp, lane, false, there);
        else words.load(ring, warp, lane, FORMAT == 2, there);
        products_wait<0>();
        pin(d);
        if constexpr (!DECODES) words = next;
        if (there) ring.give_back();
        else if (more) words.read(ring, warp, lane, FORMAT == 2);
        if (!follows) break;
    }
}

// ---- partial sums: 16 bytes of one lane's accumulator to a block of the cluster, counted by its barrier

__device__ __forceinline__ void push4(u32 to, u32 barrier, const float* v) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
                 ::"r"(to), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(barrier) : "memory");
}

__device__ __forceinline__ void add(float4& sum, const float4& v) {
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
}

// A lane holds rows (2g, 2g + 1) of tokens 2t and 2t + 1 as (2g, 2t), (2g, 2t + 1), (2g + 1, 2t), (2g + 1, 2t + 1).
// With the lane of g ^ 1 it trades for four rows in a row of one token: 4 (g / 2) .. of token 2t + g % 2.
__device__ __forceinline__ float4 four_rows(const float4& v, bool odd) {
    const float a = __shfl_xor_sync(0xffffffffu, odd ? v.x : v.y, 4);
    const float b = __shfl_xor_sync(0xffffffffu, odd ? v.z : v.w, 4);
    return odd ? make_float4(a, b, v.y, v.w) : make_float4(v.x, v.z, a, b);
}
