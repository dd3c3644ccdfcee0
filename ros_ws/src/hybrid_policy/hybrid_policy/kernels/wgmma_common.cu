// Hopper's building blocks (sm_90a), behind cuda_common.cu: barriers, bulk and tensor copies, operands, NVFP4 decode.
//
// Every wait is a poll of an mbarrier's phase. With SPIN_LIMIT > 0 (tests) a poll that never ends traps, or (await) is
// given up.

#ifndef SPIN_LIMIT
#define SPIN_LIMIT 0
#endif

__device__ __forceinline__ u32 cluster_rank() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// Blocks of the cluster meet. Publishes nothing but initialised barriers (barriers_initialised): a full release would
// drain every global write, a microsecond.
__device__ __forceinline__ void cluster_meet() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// the same in two steps, for threads in whatever order
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// --------------------------------------------------------------------------------------------------------- barriers
__device__ __forceinline__ void barriers_initialised() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void arrive_at(u32 bar, u32 rank) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(of_rank(bar, rank)) : "memory");
}

__device__ __forceinline__ void wait(u32 bar, u32 parity) {
#if SPIN_LIMIT
    for (u32 polls = 0; !passed(bar, parity); polls++)
        if (polls > SPIN_LIMIT) __trap();
#else
    while (!passed(bar, parity)) {
    }
#endif
}

// Until the barrier's phase has passed. With SPIN_LIMIT (tests) it gives up, and results are wrong: with a trap here, as
// in ``wait``, the compiler no longer counts on setmaxnreg, and products wait for each other.
__device__ __forceinline__ void await(u32 bar, u32 parity) {
    for (u32 polls = 0; !passed(bar, parity); polls++)
        if (SPIN_LIMIT && polls > SPIN_LIMIT) break;
}

// a place in a ring of LENGTH stages, and the phase that its barriers are in
template <int LENGTH> struct RingPlace {
    u32 stage = 0, phase = 0;
    __device__ __forceinline__ void next() {
        if (++stage == LENGTH) stage = 0, phase ^= 1;
    }
};

// barrier ``id`` of ``threads`` of this block
__device__ __forceinline__ void named_barrier(u32 id, u32 threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ----------------------------------------------------------------------------------------------------------- copies
__device__ __forceinline__ void copy_bulk(u32 to, const void* from, u32 bytes, u32 bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(bar) : "memory");
}

// the box of a two-dimensional tensor map at (column, row)
__device__ __forceinline__ void copy_box(u32 to, const void* map, int column, int row, u32 bar) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
        "l"(map), "r"(column), "r"(row), "r"(bar) : "memory");
}

// the same, to this offset in every block of ``blocks`` (a mask) of the cluster
__device__ __forceinline__ void copy_box_to(u32 to, const void* map, int column, int row, u32 bar, u16 blocks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(bar), "h"(blocks) : "memory");
}

__device__ __forceinline__ void prefetch_map(const void* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// four floats of shared memory
__device__ __forceinline__ float4 shared4(u32 at) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(at) : "memory");
    return v;
}

// four floats into another block's shared memory; its barrier counts the bytes
__device__ __forceinline__ void send4(u32 to, u32 bar, float a, float b, float c, float d) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
                 "f"(a), "f"(b), "f"(c), "f"(d), "r"(bar) : "memory");
}

// ------------------------------------------------------------------------------------------------ warpgroup products
// A matrix read along its rows; adding 2 moves on by 32 bytes of K.
__device__ __forceinline__ u64 operand(u32 address) { return matrix(address); }

// 8 x 8 pieces of results, two values of 16 bits a thread, transposed to shared memory: a row of 16 bytes a lane's address
__device__ __forceinline__ void transpose4(u32 at, const u32 (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3]) : "memory");
}
__device__ __forceinline__ void transpose2(u32 at, u32 r0, u32 r1) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(at), "r"(r0), "r"(r1) : "memory");
}
__device__ __forceinline__ void transpose1(u32 at, u32 r) {
    asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(at), "r"(r) : "memory");
}

// ------------------------------------------------------------------------------------------------------------ numbers

// One thread's register operand of a k step: ``word`` in the order of packing.pack_words, ``scales`` two bytes (rows r
// and r + 8) at ``position``: five bits of exponent and three of mantissa, s * 2**119 once they stand in a bf16.
__device__ __forceinline__ void decode(u32 (&a)[4], u32 word, u32 scales, u32 position) {
    const u32 mask = 0x81c081c0u;
    const u32 pair = __byte_perm(scales, 0, position ? 0x4342 : 0x4140) * 16 + 0x76807680u;
    const u32 s0 = __byte_perm(pair, 0, 0x1010), s1 = __byte_perm(pair, 0, 0x3232);
    a[0] = multiply(word & mask, s0);
    a[1] = multiply(((word << 3) ^ (word << 2)) & mask, s1);
    a[2] = multiply((word << 6) & mask, s0);
    a[3] = multiply(((word << 1) ^ (word >> 4)) & mask, s1);
}

// gelu_tanh(g) * u, by 2**t and 1/t of the special-function unit
__device__ __forceinline__ float geglu(float g, float u) {
    float e = g * fmaf(-0.10294324f, g * g, -2.302208198144325f);
    asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(e));
    e += 1.0f;
    asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(e));
    return g * e * u;
}

__device__ __forceinline__ u16 to_bf16(float value) {
    u16 d;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(d) : "f"(value));
    return d;
}

// two E4M3, saturating, NaN kept; the first in the low byte
__device__ __forceinline__ u16 to_e4m3x2(float low, float high) {
    u16 d;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(d) : "f"(high), "f"(low));
    return d;
}
