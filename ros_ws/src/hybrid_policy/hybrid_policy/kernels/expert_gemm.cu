// ---------------------------------------------------------------------------------------------- matrix products
// K_TOTAL, N_TOTAL; BN rows of W a cluster; CLUSTER blocks cut K; WM x WK = 8 warps cut rows and K of a block;
// MT tokens (a multiple of 8); FORMAT 0 bf16, 1 E4M3, 2 NVFP4; EPILOGUE 0 gated residual, 1 GeGLU, 2 RoPE + cache;
// NORM: x is the residual stream, and its RMS norm is folded in.

constexpr int KC = K_TOTAL / CLUSTER;
constexpr int KSTEPS = KC / 16;
constexpr int MTILES = BN / 16;
constexpr int MTW = MTILES / WM;
constexpr int KW = KSTEPS / WK;
constexpr int NT = MT / 8;
constexpr int PER16 = FORMAT == 0 ? 1 : FORMAT == 1 ? 2 : 4;  // k steps in a lane's 16 bytes
constexpr int UNROLL = MTW > 2 ? 1 : PER16 == 4 ? 2 : 4;  // loads ahead of the tensor core, registers allowing
constexpr int W_BYTES = MTILES * KSTEPS * 512 / PER16;
constexpr int S_BYTES = FORMAT == 2 ? MTILES * KSTEPS * 32 : 0;
constexpr int X_PITCH = KC * 2 + 16;  // 16 bytes more than a multiple of 128: ldmatrix without bank conflicts
constexpr int X_BYTES = MT * X_PITCH;
constexpr int P_PITCH = BN + 4;
constexpr int P_FLOATS = MT * P_PITCH;
constexpr int BODY = W_BYTES + S_BYTES + X_BYTES > WK * P_FLOATS * 4 ? W_BYTES + S_BYTES + X_BYTES : WK * P_FLOATS * 4;
static_assert(K_TOTAL % (CLUSTER * 16 * WK * PER16) == 0, "K does not divide");
static_assert(N_TOTAL % BN == 0 && BN % (16 * WM) == 0 && BN % (4 * CLUSTER) == 0, "N does not divide");
static_assert(WM * WK == THREADS / 32 && MT % 8 == 0 && MT <= 64, "tile");

struct Arguments {
    const u16* x;            // bf16 [tokens, K_TOTAL]
    const u8* w;             // packed
    const u8* w_scales;      // packed, NVFP4
    const float* row_scale;  // [N_TOTAL]
    const u16* factor;       // bf16 [K_TOTAL], 1 + scale of the norm
    const float* shift;      // [N_TOTAL] W shift (GeGLU: gate's [N/2], then up's)
    const float* gate;       // [N_TOTAL], of the residual
    u16* out;                // bf16: residual stream [tokens, N]; GeGLU [tokens, N/2]; q [tokens, HEADS * HEAD_DIM]
    u16* keys;               // bf16 [capacity, KV_HEADS * HEAD_DIM]
    u16* values;
    const float* cosines;    // [capacity, HEAD_DIM / 2]
    const float* sines;
    const int* start;        // row of the first token in the cache
    int tokens;
    float eps;
};

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS) expert_gemm(const Arguments p) {
    extern __shared__ __align__(128) u8 memory[];
    __shared__ float square_sums[MT];
    u8* const w_memory = memory;
    u8* const s_memory = memory + W_BYTES;
    u8* const x_memory = memory + W_BYTES + S_BYTES;
    u8* const f_memory = memory + BODY;
    float* const partial = reinterpret_cast<float*>(memory);

    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    const int wm = warp % WM, wk = warp / WM;
    const int tile = blockIdx.x / CLUSTER, rank = blockIdx.x % CLUSTER;
    const int first_token = blockIdx.y * MT;

    let_dependents_start();
    {
        const u8* w = p.w + (size_t)blockIdx.x * W_BYTES;
        const u32 to = shared_address(w_memory);
#pragma unroll 4
        for (int i = tid; i < W_BYTES / 16; i += THREADS) copy16(to + i * 16, w + i * 16);
        if constexpr (FORMAT == 2) {
            const u8* s = p.w_scales + (size_t)blockIdx.x * S_BYTES;
            const u32 s_to = shared_address(s_memory);
            for (int i = tid; i < S_BYTES / 16; i += THREADS) copy16(s_to + i * 16, s + i * 16);
        }
        if constexpr (NORM) {
            const u32 f_to = shared_address(f_memory);
            for (int i = tid; i < KC / 8; i += THREADS) copy16(f_to + i * 16, p.factor + rank * KC + i * 8);
        }
    }
    wait_for_predecessor();
    {
        const u32 to = shared_address(x_memory);
        for (int i = tid; i < MT * (KC / 8); i += THREADS) {
            const int token = i / (KC / 8), chunk = i % (KC / 8);
            const bool there = first_token + token < p.tokens;
            const u16* from = p.x + (size_t)(there ? first_token + token : 0) * K_TOTAL + rank * KC + chunk * 8;
            copy16_or_zero(to + token * X_PITCH + chunk * 16, from, there);
        }
    }
    copies_done();
    __syncthreads();

    float acc[MTW][NT][4];
#pragma unroll
    for (int i = 0; i < MTW; i++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) acc[i][n][j] = 0.0f;

    const u32 x_base = shared_address(x_memory) + ((lane / 16) * 8 + lane % 8) * X_PITCH + ((lane / 8) % 2) * 16;
#pragma unroll (UNROLL)
    for (int group = 0; group < KW / PER16; group++) {
        uint4 w[MTW];
        const int at = wk * (KW / PER16) + group;
#pragma unroll
        for (int i = 0; i < MTW; i++)
            w[i] = reinterpret_cast<const uint4*>(w_memory)[((wm * MTW + i) * (KSTEPS / PER16) + at) * 32 + lane];
#pragma unroll
        for (int step = 0; step < PER16; step++) {
            const int k = at * PER16 + step;
            u32 b[NT + 1][2];
#pragma unroll
            for (int n = 0; n < NT; n += 2) {  // an odd last tile reads 8 rows more: pad rows below, unused
                u32 r[4];
                const int last = n + 1 < NT ? 0 : 1;
                ldmatrix4(r, x_base + (n * 8 - (last ? (lane / 16) * 8 : 0)) * X_PITCH + k * 32);
                b[n][0] = r[0], b[n][1] = r[1], b[n + 1][0] = r[2], b[n + 1][1] = r[3];
            }
            if constexpr (NORM) {
                const u32* f = reinterpret_cast<const u32*>(f_memory) + k * 8 + lane % 4;
                const u32 f0 = f[0], f1 = f[4];
#pragma unroll
                for (int n = 0; n < NT; n++) b[n][0] = multiply(b[n][0], f0), b[n][1] = multiply(b[n][1], f1);
            }
#pragma unroll
            for (int i = 0; i < MTW; i++) {
                u32 a[4], scales = 0;
                if constexpr (FORMAT == 2)
                    scales = reinterpret_cast<const u32*>(s_memory)[((wm * MTW + i) * KSTEPS + k) * 8 + lane / 4];
                fragment<FORMAT>(a, w[i], step, scales);
#pragma unroll
                for (int n = 0; n < NT; n++) mma(acc[i][n], a, b[n][0], b[n][1]);
            }
        }
    }
    if constexpr (NORM) {  // four threads a token
        if (tid < MT * 4) {
            float sum = 0.0f;
            const u8* row = x_memory + (tid / 4) * X_PITCH;
#pragma unroll 4
            for (int c = tid % 4; c < KC / 8; c += 4) {
                const uint4 v = *reinterpret_cast<const uint4*>(row + c * 16);
                const u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    sum = fmaf(low_of(pairs[j]), low_of(pairs[j]), sum);
                    sum = fmaf(high_of(pairs[j]), high_of(pairs[j]), sum);
                }
            }
            sum = quad_sum(sum);
            if (tid % 4 == 0) square_sums[tid / 4] = sum;
        }
    }
    __syncthreads();  // W and x are read; partial sums take their place
    {
        float* mine = partial + wk * P_FLOATS;
#pragma unroll
        for (int i = 0; i < MTW; i++) {
            const int row = (wm * MTW + i) * 16 + lane / 4;
#pragma unroll
            for (int n = 0; n < NT; n++) {
                const int token = n * 8 + (lane % 4) * 2;
                mine[token * P_PITCH + row] = acc[i][n][0];
                mine[(token + 1) * P_PITCH + row] = acc[i][n][1];
                mine[token * P_PITCH + row + 8] = acc[i][n][2];
                mine[(token + 1) * P_PITCH + row + 8] = acc[i][n][3];
            }
        }
    }
    if constexpr (WK > 1) {
        __syncthreads();
        for (int i = tid; i < P_FLOATS / 4; i += THREADS) {
            float4 sum = reinterpret_cast<float4*>(partial)[i];
#pragma unroll
            for (int j = 1; j < WK; j++) {
                const float4 v = reinterpret_cast<float4*>(partial + j * P_FLOATS)[i];
                sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
            }
            reinterpret_cast<float4*>(partial)[i] = sum;
        }
    }
    publish_shared();

    // What the last step reads from global memory comes while the cluster meets.
    constexpr int SHARE = BN / CLUSTER;  // rows of the tile that this block finishes
    constexpr int ITEMS = (MT * (SHARE / 4) + THREADS - 1) / THREADS;
    constexpr int HALF = HEAD_DIM / 2;
    float4 scale[ITEMS], first[ITEMS], second[ITEMS];
    uint2 residual[ITEMS];
    bool mine[ITEMS];
    const int start = EPILOGUE == 2 ? p.start[0] : 0;
#pragma unroll
    for (int j = 0; j < ITEMS; j++) {
        const int item = tid + j * THREADS, token = item / (SHARE / 4);
        const int n = tile * BN + rank * SHARE + item % (SHARE / 4) * 4, m = first_token + token;
        mine[j] = token < MT && m < p.tokens;
        if (!mine[j]) continue;
        scale[j] = *reinterpret_cast<const float4*>(p.row_scale + n);
        if constexpr (EPILOGUE == 0) {
            first[j] = *reinterpret_cast<const float4*>(p.gate + n);
            residual[j] = *reinterpret_cast<const uint2*>(p.out + (size_t)m * N_TOTAL + n);
        } else if constexpr (EPILOGUE == 1) {
            const float2 gate = *reinterpret_cast<const float2*>(p.shift + n / 2);
            const float2 up = *reinterpret_cast<const float2*>(p.shift + N_TOTAL / 2 + n / 2);
            first[j] = make_float4(gate.x, up.x, gate.y, up.y);
        } else {
            first[j] = *reinterpret_cast<const float4*>(p.shift + n);
            second[j] = make_float4(1.0f, 1.0f, 0.0f, 0.0f);
            if (n / HEAD_DIM < HEADS + KV_HEADS) {
                const size_t at = (size_t)(start + m) * HALF + n % HEAD_DIM / 2;
                const float2 c = *reinterpret_cast<const float2*>(p.cosines + at);
                const float2 s = *reinterpret_cast<const float2*>(p.sines + at);
                second[j] = make_float4(c.x, c.y, s.x, s.y);
            }
        }
    }
    wait_for_cluster();

    const u32 partial_address = shared_address(partial), squares_address = shared_address(square_sums);
    float v[ITEMS][4], squares[ITEMS];
#pragma unroll
    for (int j = 0; j < ITEMS; j++) {
        const int item = tid + j * THREADS, token = item / (SHARE / 4);
        const int row = rank * SHARE + item % (SHARE / 4) * 4;
        v[j][0] = v[j][1] = v[j][2] = v[j][3] = squares[j] = 0.0f;
        if (!mine[j]) continue;
#pragma unroll
        for (int r = 0; r < CLUSTER; r++) {
            const float4 part = load_remote4(of_rank(partial_address + (token * P_PITCH + row) * 4, r));
            v[j][0] += part.x, v[j][1] += part.y, v[j][2] += part.z, v[j][3] += part.w;
            if constexpr (NORM) squares[j] += load_remote(of_rank(squares_address + token * 4, r));
        }
    }
#pragma unroll
    for (int j = 0; j < ITEMS; j++) {
        if (!mine[j]) continue;
        const int item = tid + j * THREADS, m = first_token + item / (SHARE / 4);
        const int n = tile * BN + rank * SHARE + item % (SHARE / 4) * 4;
        const float root = NORM ? rsqrtf(squares[j] / K_TOTAL + p.eps) : 1.0f;
        const float y0 = v[j][0] * root * scale[j].x, y1 = v[j][1] * root * scale[j].y;
        const float y2 = v[j][2] * root * scale[j].z, y3 = v[j][3] * root * scale[j].w;
        const float4 a = first[j], b = second[j];
        if constexpr (EPILOGUE == 0) {
            uint2 result;
            result.x = pack_bf16(fmaf(y0, a.x, low_of(residual[j].x)), fmaf(y1, a.y, high_of(residual[j].x)));
            result.y = pack_bf16(fmaf(y2, a.z, low_of(residual[j].y)), fmaf(y3, a.w, high_of(residual[j].y)));
            *reinterpret_cast<uint2*>(p.out + (size_t)m * N_TOTAL + n) = result;
        } else if constexpr (EPILOGUE == 1) {
            *reinterpret_cast<u32*>(p.out + (size_t)m * (N_TOTAL / 2) + n / 2) =
                pack_bf16(geglu(y0 + a.x, y1 + a.y), geglu(y2 + a.z, y3 + a.w));
        } else {
            // rows come in pairs (i, i + HALF); b is (cos, cos, sin, sin), and no rotation for values
            const float p0 = y0 + a.x, q0 = y1 + a.y, p1 = y2 + a.z, q1 = y3 + a.w;
            const int head = n / HEAD_DIM, i = n % HEAD_DIM / 2, place = start + m;
            u16* to;
            if (head < HEADS)
                to = p.out + ((size_t)m * HEADS + head) * HEAD_DIM;
            else if (head < HEADS + KV_HEADS)
                to = p.keys + ((size_t)place * KV_HEADS + head - HEADS) * HEAD_DIM;
            else
                to = p.values + ((size_t)place * KV_HEADS + head - HEADS - KV_HEADS) * HEAD_DIM;
            *reinterpret_cast<u32*>(to + i) = pack_bf16(p0 * b.x - q0 * b.z, p1 * b.y - q1 * b.w);
            *reinterpret_cast<u32*>(to + i + HALF) = pack_bf16(q0 * b.x + p0 * b.z, q1 * b.y + p1 * b.w);
        }
    }
    leave_cluster();
}
