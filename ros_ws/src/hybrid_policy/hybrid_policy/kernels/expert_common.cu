// The action expert's layer for few tokens: four matrix products and attention, each one launch.
//
// A product's weights do not depend on the kernel before it, so each block copies its slice of W to shared memory
// before griddepcontrol.wait. The blocks of a cluster share a tile of rows and cut K between them: each reads only
// its part of the activations, and the partial sums meet through distributed shared memory, in a fixed order.
// W lies in global memory in the order of mma.m16n8k16's A fragment (see expert_packing.py), so a lane's share of a
// tile is one 16-byte load; activations are the B operand, as they lie.
//
// This file is what the two kernels share; expert_gemm.cu and expert_attention.cu follow it in one source, compiled
// once a configuration (expert.py has the macros).

#define THREADS 256
#define MINUS_INFINITY __int_as_float(0xff800000)

// The cluster's barrier in halves. A full release would drain every global write (MEMBAR.ALL.GPU, a microsecond); what
// is published here is shared memory alone.
__device__ __forceinline__ void publish_shared() {
    asm volatile("fence.release.sync_restrict::shared::cta.cluster;\nbarrier.cluster.arrive.relaxed;" ::: "memory");
}
__device__ __forceinline__ void wait_for_cluster() {
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}
// after the last use of a peer's memory (what was read has been stored: the reads are done)
__device__ __forceinline__ void leave_cluster() {
    asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;" ::: "memory");
}

__device__ __forceinline__ float4 load_remote4(u32 address) {
    float4 v;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address));
    return v;
}

__device__ __forceinline__ float load_remote(u32 address) {
    float v;
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(address));
    return v;
}

__device__ __forceinline__ void ldmatrix4(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}

__device__ __forceinline__ void ldmatrix4_transposed(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}

__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// gelu_tanh(g) * u
__device__ __forceinline__ float geglu(float g, float u) {
    float inner = 0.7978845608028654f * (g + 0.044715f * g * g * g);
    return __fdividef(g, 1.0f + exp2_of(-2.8853900817779268f * inner)) * u;
}

// One k step of mma's A operand from a lane's 16 bytes of packed weights. STORED 0: bf16 (one step), 1: E4M3 (two),
// 2: NVFP4 (four; scales: bf16 of s * 2^119, of row g below and of row g + 8 above).
template <int STORED>
__device__ __forceinline__ void fragment(u32 (&a)[4], const uint4& w, int step, u32 scales) {
    if constexpr (STORED == 0) {
        a[0] = w.x, a[1] = w.y, a[2] = w.z, a[3] = w.w;
    } else if constexpr (STORED == 1) {
        // E4M3's bits as a bf16 are v * 2^-120
        u32 half[2] = {step == 0 ? w.x : w.z, step == 0 ? w.y : w.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u32 t = __byte_perm(half[i / 2], 0, i % 2 ? 0x3424 : 0x1404);
            a[i] = multiply((t & 0x80008000u) | ((t >> 4) & 0x07f007f0u), 0x7b807b80u);
        }
    } else {
        // E2M1's bits as a bf16 are v * 2^-126; the scales come as s * 2^119
        u32 word = step == 0 ? w.x : step == 1 ? w.y : step == 2 ? w.z : w.w;
        u32 s[2] = {__byte_perm(scales, 0, 0x1010), __byte_perm(scales, 0, 0x3232)};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u32 t = word << (12 - 4 * i);
            a[i] = multiply((t & 0x80008000u) | ((t >> 6) & 0x01c001c0u), s[i % 2]);
        }
    }
}
