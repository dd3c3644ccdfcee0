// gelu_tanh(gate) * up of one row a block, in FP8 with one scale a row.
//
// The row's scale needs all of the row, so its products wait in registers, two to a register (bf16: an eighth of a
// unit of FP8's last place), while the largest is found. What bounds this kernel is how many bytes are in flight: few
// registers a thread, so that several rows share a multiprocessor.
//
// Macros: WIDTH, THREADS (WIDTH % (8 * THREADS) == 0), BLOCKS (a multiprocessor), PDL.

#define CHUNKS (WIDTH / (8 * THREADS))

struct Arguments {
    const uint4* both;   // bf16 [rows, 2 * WIDTH]: gate, up
    const float* row;    // [rows], factor of each row; may be null
    uint2* out;          // e4m3 [rows, WIDTH]
    float* out_scale;    // [rows]: largest / 448
};

// 2 gelu_tanh(g) * u
__device__ __forceinline__ float twice_geglu(float g, float u) {
    float t, inner = g * (0.7978845608028654f + 0.035677408136300125f * g * g);
    asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(inner));  // 2^-11: FP8 keeps 2^-4
    return (g + g * t) * u;
}

__device__ __forceinline__ u32 pair_of(u32 g, u32 u, float factor, float& largest) {
    float a = twice_geglu(low_of(g) * factor, low_of(u)), b = twice_geglu(high_of(g) * factor, high_of(u));
    largest = max_or_nan(largest, max_or_nan(fabsf(a), fabsf(b)));
    return pack_bf16(a, b);
}

__device__ __forceinline__ uint4 load16(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

extern "C" __global__ __launch_bounds__(THREADS, BLOCKS) void geglu_rows(const __grid_constant__ Arguments a) {
    __shared__ float largest_of[THREADS / 32];
#if PDL
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
    const uint4* gate = a.both + (long long)blockIdx.x * (WIDTH / 4) + threadIdx.x;
    float factor = a.row ? a.row[blockIdx.x] : 1.0f;
    u32 held[CHUNKS][4];
    float largest = 0.0f;
    uint4 g = load16(gate), u = load16(gate + WIDTH / 8);
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
        uint4 next_g, next_u;
        if (i + 1 < CHUNKS) {
            next_g = load16(gate + (i + 1) * THREADS);
            next_u = load16(gate + (i + 1) * THREADS + WIDTH / 8);
        }
        held[i][0] = pair_of(g.x, u.x, factor, largest);
        held[i][1] = pair_of(g.y, u.y, factor, largest);
        held[i][2] = pair_of(g.z, u.z, factor, largest);
        held[i][3] = pair_of(g.w, u.w, factor, largest);
        if (i + 1 < CHUNKS) g = next_g, u = next_u;
    }
#pragma unroll
    for (int i = 16; i > 0; i /= 2) largest = max_or_nan(largest, __shfl_xor_sync(0xffffffffu, largest, i));
    if (threadIdx.x % 32 == 0) largest_of[threadIdx.x / 32] = largest;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < THREADS / 32; i++) largest = max_or_nan(largest, largest_of[i]);
    // the least is far below anything that counts, and its inverse is finite; NaN stays NaN
    largest = largest == 0.0f ? 448.0f : max_or_nan(largest, 1e-30f);
    float inverse = __fdividef(448.0f, largest);
    // what every value of the row is still to be multiplied by goes into its scale
    if (threadIdx.x == 0) a.out_scale[blockIdx.x] = largest / 448.0f * (0.5f * factor);
    uint2* out = a.out + (long long)blockIdx.x * (WIDTH / 8) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
        const u32* h = held[i];
        out[i * THREADS] = make_uint2(
            pack_e4m3(low_of(h[0]) * inverse, high_of(h[0]) * inverse, low_of(h[1]) * inverse, high_of(h[1]) * inverse),
            pack_e4m3(low_of(h[2]) * inverse, high_of(h[2]) * inverse, low_of(h[3]) * inverse, high_of(h[3]) * inverse));
    }
}
