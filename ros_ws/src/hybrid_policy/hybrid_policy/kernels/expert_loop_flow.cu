// --------------------------------------------------------------------------------- the loop kernel's step of the flow
// Between two passes over the layers, flow_step.py's Euler step. All tiles of a part compute their part's actions, each from
// everybody's partial velocities, and go on with their own columns: one exchange a step.

struct Scaled {
    float rows[8][68];  // of 64 columns: one token's four columns and the next token's are in different banks
};

// The layers' weights may have pushed the projections out of L2 since the last step
__device__ __forceinline__ void prefetch_projections(const Place& at, const FlowArguments& p) {
    if (at.tid >= 128) return;  // a row of LANES floats each
    const float* const row = (at.tid < 64 ? p.out_weight : p.in_weight) + (at.tile * 64 + at.tid % 64) * LANES;
    asm volatile("prefetch.global.L2 [%0];" ::"l"(row) : "memory");
}

// by all workers of a block that owns tokens: a token a warp, an action a lane
__device__ __forceinline__ void take_noise(const Place& at, const FlowArguments& p, float (*actions)[LANES]) {
    const u32 token = at.part * 8 + at.warp, place = token * ACTIONS + at.lane;
    float action = 0.0f;
    if (token < TOKENS && at.lane < ACTIONS) action = token < (u32)p.clean[0] ? p.target[place] : p.noise[place];
    actions[at.warp][at.lane] = action;
    block_barrier();
}

// Four columns of one token of the expert's input, by a thread of the first warpgroup
__device__ __forceinline__ float4 project_actions(const Place& at, const FlowArguments& p, float (*actions)[LANES]) {
    const OwnPlace own(at);
    float4 h = float4_at(p.in_bias + own.column);
    const float* const weights = p.in_weight + own.column * LANES;
#pragma unroll 4
    for (u32 i = 0; i < LANES; i += 4) {
        const float4 x = float4_at(actions[own.token % 8] + i);
        const auto product = [&](u32 column) {
            const float4 w = float4_at(weights + column * LANES + i);
            return w.x * x.x + w.y * x.y + w.z * x.z + w.w * x.w;
        };
        h.x += product(0), h.y += product(1), h.z += product(2), h.w += product(3);
    }
    return h;
}

// by all workers of a block that owns tokens
__device__ __forceinline__ void euler_step(
    const FlowArguments& p, float eps, u8* parcels, u32 step, bool last, const float4* stream, Scaled& scaled,
    float (*squares)[8], float (*actions)[LANES]) {
    const Place at;
    const u32 phase = step % 2;
    if (at.group == 0) {
        const OwnPlace own(at);
        const float4 h = stream[at.tid], factor = float4_at(p.factor + step * WIDTH + own.column);
        *reinterpret_cast<float4*>(&scaled.rows[own.token % 8][own.column % 64]) =
            make_float4(h.x * factor.x, h.y * factor.y, h.z * factor.z, h.w * factor.w);
        sum_squares(at, h, squares);
    }
    block_barrier();
    const u32 row = at.warp, token = at.part * 8 + row, place = token * ACTIONS + at.lane;
    if (token < TOKENS) {
        const float* const weights = p.out_weight + at.tile * 64 * LANES + at.lane;
        float velocity = 0.0f;
#pragma unroll 16
        for (u32 column = 0; column < 64; column++) velocity = fmaf(scaled.rows[row][column], weights[column * LANES], velocity);
        u8* const boxes = parcels + (P_FLOW + (at.part * TILES * 8 + row) * (LANES * 4) + at.lane * 4);  // the first tile's
        u8* const square_boxes = parcels + (P_FLOW_SQUARES + (at.part * TILES * 8 + row) * 4);
        post(boxes + at.tile * (8 * LANES * 4), (__float_as_uint(velocity) & ~1u) | phase);
        const float square = squares[0][row] + squares[1][row] + squares[2][row] + squares[3][row];
        if (at.lane == 0) post(square_boxes + at.tile * 32, (__float_as_uint(square) & ~1u) | phase);

        u32 v[TILES], w;
        for (u32 tries = 0;; tries++) {
            w = peek(square_boxes + at.lane % TILES * 32);
#pragma unroll
            for (int i = 0; i < TILES; i++) v[i] = peek(boxes + i * (8 * LANES * 4));
            u32 missing = w ^ phase;
#pragma unroll
            for (int i = 0; i < TILES; i++) missing |= v[i] ^ phase;
            if (!(missing & 1)) break;
            if (tries > PATIENCE) give_up();
        }
        float sum = __uint_as_float(w);  // of all tiles, twice over in a warp
#pragma unroll
        for (int i = TILES / 2; i > 0; i /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, i);
        velocity = 0.0f;
#pragma unroll
        for (int i = 0; i < TILES; i++) velocity += __uint_as_float(v[i]);
        velocity = fmaf(velocity, rsqrtf(sum / WIDTH + eps), p.shift[step * LANES + at.lane]);
        if (at.lane < ACTIONS) {
            const float4 times = p.times[step];
            const float target = p.target[place], x = actions[row][at.lane];
            const float pull = times.z * p.weights[token] * (target - (x - times.x * velocity));
            const float next = token < (u32)p.clean[0] ? target : x - times.y * (velocity - pull);
            actions[row][at.lane] = next;
            if (last && at.tile == 0) p.actions[place] = next;
        }
    }
    block_barrier();
}
