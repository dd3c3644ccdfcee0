// ------------------------------------------------------------------------------------------ the loop kernel itself

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(THREADS, 1) expert_loop(const Arguments p) {
    extern __shared__ __align__(1024) u8 memory[];
    __shared__ u64 ring_barriers[8 * SLOTS], sum_barrier;
    __shared__ float squares[4][MT], own_squares[4][8];
    __shared__ AttentionMemory attention;

    Place at;
    at.tid = threadIdx.x, at.lane = at.tid % 32, at.warp = at.tid / 32, at.group = at.warp / 4;
    at.tile = blockIdx.x / PARTS, at.part = blockIdx.x % PARTS, at.pair = blockIdx.x / 2;
    at.g = at.lane / 4, at.t = at.lane % 4, at.odd = at.g % 2;
    const int low = at.part % 2 == 0;                            // the pair's first block
    const bool projects = at.pair < QKV_PAIRS;                   // has rows of q, k or v
    const bool attends = at.tile * QUERIES < TOKENS * HEADS;  // has rows of attention
    const bool owns = at.part < NT;                              // owns tokens of the residual stream
    const int row_tile = at.warp % 4;

    const u32 base = shared_address(memory), x = base + A_X;
    const u32 pair_sums = base + A_SUMS, scratch = pair_sums + SUMS, pair_barrier = shared_address(&sum_barrier);
    u32 pair_parity = 0;

    Ring ring;
    ring.data = base + A_RINGS + at.warp * (SLOTS * 1280);
    ring.barriers = shared_address(ring_barriers) + at.warp * SLOTS * 8;
    ring.qkv_pieces = projects ? N_QKV : 0;
    ring.slot = ring.position = 0, ring.parity = 0;
    ring.left = p.layers * ring.layer_pieces();
    {
        constexpr int TAIL = N_O * Piece<FORMAT_O>::BYTES + N_GATE_UP * Piece<FORMAT_GATE_UP>::BYTES + N_DOWN * Piece<FORMAT_DOWN>::BYTES;
        constexpr int LONG = TAIL + N_QKV * Piece<FORMAT_QKV>::BYTES;
        const size_t before = (size_t)min((int)blockIdx.x, 2 * QKV_PAIRS) * LONG + (size_t)max((int)blockIdx.x - 2 * QKV_PAIRS, 0) * TAIL;
        ring.next = p.weights + (before * 8 + (size_t)at.warp * (projects ? LONG : TAIL)) * p.layers;
    }
    u64 policy;  // weights pass once a step: they shall not push keys and vectors out of L2
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    if (at.tid < 8 * SLOTS) barrier_init(shared_address(ring_barriers + at.tid));
    if (at.tid == 0) barrier_init(pair_barrier);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
    for (int slot = 0; slot < SLOTS; slot++) ring.ask(slot, at.lane, policy);

    wait_for_predecessor();
    const KeyRange range(p.valid[0], at.part);
    const int chunk_start = p.valid[0];

    // the residual stream: four columns of one token, for the life of the launch
    const int own_token = at.part * 8 + 2 * at.t + at.odd, own_column = at.tile * 64 + row_tile * 16 + at.g / 2 * 4;
    float* const h_at = p.h + (size_t)own_token * WIDTH + own_column;
    const bool holds = owns && at.group == 0;
    float4 h = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    int turn = p.turn;
    u8* mail = p.mail + turn * MAIL;
    u8* next = p.mail + (turn + 1) % 3 * MAIL;
    u8* parcels = p.parcels + turn * PARCELS;
    if (holds) {
        if (own_token < TOKENS) h = float4_at(h_at);
        post_stream(at, h, float4_at(p.vectors + V_FACTOR1 + own_column), mail, next, M_IN1, M_SQUARES1, own_squares);
    }

    for (int layer = 0; layer < p.layers; layer++) {
        const float* const vectors = p.vectors + (size_t)layer * V_LAYER;
        const float* const row_scale = p.row_scale + (size_t)layer * R_LAYER;
        const u16* const keys = p.keys + (size_t)layer * p.capacity * HEAD_DIM;
        const u16* const values = p.values + (size_t)layer * p.capacity * HEAD_DIM;
        float d[4 * NT];
        Squares sums;

        MARK(0);
        // ---- q, k, v
        if (projects) {
            const int row = at.pair * 64 + row_tile * 16 + at.g / 2 * 4, i = row % HEAD_DIM / 2, head = row / HEAD_DIM;
            const float4 scale = float4_at(row_scale + R_QKV + row), shift = float4_at(vectors + V_QKV + row);
            const int tile = at.warp / 4, tiles = low ? LOW_TILES : NT - LOW_TILES;
            float4 turns[2];  // cosines and sines of two tokens
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int token = ((low ? 0 : LOW_TILES) + tile + 2 * j) * 8 + 2 * at.t + at.odd;
                turns[j] = make_float4(1.0f, 1.0f, 0.0f, 0.0f);
                if (token < TOKENS && head < HEADS + 1) {
                    const size_t place = (size_t)(chunk_start + token) * HALF + i;
                    const float2 c = *reinterpret_cast<const float2*>(p.cosines + place);
                    const float2 s = *reinterpret_cast<const float2*>(p.sines + place);
                    turns[j] = make_float4(c.x, c.y, s.x, s.y);
                }
            }
            const u32 part = x + at.group * (4 * MT * 128);
            take_tokens<256, 128, WIDTH>(part, mail + M_IN1 + (at.part % 2 * 512 + at.group * 256) * 2, at.tid % 128);
            group_barrier(at.group);
            MARK(1);
            sums.ask(at, mail + M_SQUARES1);
            product<FORMAT_QKV, N_QKV>(d, ring, part, at.lane, policy);
            MARK(2);
            if (at.tid == 0) expect_bytes(pair_barrier, tiles * (4 * 4 * 512));
            push_to_pair<4>(at, d, pair_sums, pair_barrier, at.part % 2 * 2 + at.group, row_tile);
            sums.keep(at, mail + M_SQUARES1, squares);
            __syncthreads();  // the activations are read
            if (attends) fetch_prefix(at, range, x, keys);
            wait_bytes(pair_barrier, pair_parity);
            pair_parity ^= 1;
            MARK(3);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                if (tile + 2 * j >= tiles) continue;
                const int token = ((low ? 0 : LOW_TILES) + tile + 2 * j) * 8 + 2 * at.t + at.odd;
                const float4 v = four_rows(sum_of<4, 4 * 4 * 512>(pair_sums + (((tile + 2 * j) * 4 + row_tile) * 32 + at.lane) * 16), at.odd);
                if (token >= TOKENS) continue;
                const float root = root_of(squares, token, p.eps);
                // rows come in pairs (i, i + HALF)
                const float p0 = fmaf(v.x * root, scale.x, shift.x), q0 = fmaf(v.y * root, scale.y, shift.y);
                const float p1 = fmaf(v.z * root, scale.z, shift.z), q1 = fmaf(v.w * root, scale.w, shift.w);
                const float4 b = turns[j];
                const int box = head < HEADS ? M_Q + (token * HEADS + head) * HEAD_DIM * 2 : (head == HEADS ? M_K : M_V) + token * HEAD_DIM * 2;
                post(mail + box + i * 2, pack_bf16(p0 * b.x - q0 * b.z, p1 * b.y - q1 * b.w));
                post(mail + box + (i + HALF) * 2, pack_bf16(q0 * b.x + p0 * b.z, q1 * b.y + p1 * b.w));
                post(next + box + i * 2, EMPTY);
                post(next + box + (i + HALF) * 2, EMPTY);
            }
            __syncthreads();  // the sums are read: values may take their place
        } else if (attends) {
            fetch_prefix(at, range, x, keys);
        }
        MARK(4);
        // ---- attention
        if (attends) {
            fetch_prefix(at, range, pair_sums, values);
            attend(at, range, memory, attention, mail, next, parcels, p.scale);
        }
        MARK(5);
        // ---- output projection
        {
            const float4 scale = float4_at(row_scale + R_O + own_column), gate = float4_at(vectors + V_GATE1 + own_column);
            const float4 factor = float4_at(vectors + V_FACTOR2 + own_column);
            const u32 part = x + at.group * (2 * MT * 128);
            take_tokens<128, 128, HEADS * HEAD_DIM>(part, mail + M_SEEN + (at.part * 256 + at.group * 128) * 2, at.tid % 128);
            group_barrier(at.group);
            MARK(6);
            product<FORMAT_O, N_O>(d, ring, part, at.lane, policy);
            post_to_owners(at, d, scratch, parcels + P_OUT);
            MARK(7);
            if (holds) {
                const float4 v = four_rows(sum_of_parts(at, parcels + P_OUT), at.odd);
                h.x = fmaf(v.x * scale.x, gate.x, h.x), h.y = fmaf(v.y * scale.y, gate.y, h.y);
                h.z = fmaf(v.z * scale.z, gate.z, h.z), h.w = fmaf(v.w * scale.w, gate.w, h.w);
                post_stream(at, h, factor, mail, next, M_IN2, M_SQUARES2, own_squares);
            }
        }
        MARK(8);
        // ---- gate, up
        {
            const int tile = at.warp, row = at.pair * 128 + tile * 16 + at.g / 2 * 4;
            const float4 scale = float4_at(row_scale + R_GATE_UP + row), shift = float4_at(vectors + V_GATE_UP + row);
            take_tokens<512, 256, WIDTH>(x, mail + M_IN2 + at.part % 2 * 512 * 2, at.tid);
            __syncthreads();
            MARK(9);
            sums.ask(at, mail + M_SQUARES2);
            product<FORMAT_GATE_UP, N_GATE_UP>(d, ring, x, at.lane, policy);
            MARK(10);
            const int tiles = low ? LOW_TILES : NT - LOW_TILES;
            if (at.tid == 0) expect_bytes(pair_barrier, tiles * (2 * 8 * 512));
            push_to_pair<8>(at, d, pair_sums, pair_barrier, at.part % 2, tile);
            sums.keep(at, mail + M_SQUARES2, squares);
            __syncthreads();
            wait_bytes(pair_barrier, pair_parity);
            pair_parity ^= 1;
            MARK(11);
#pragma unroll
            for (int n = 0; n < LOW_TILES; n++) {
                if (n >= tiles) continue;
                const int token = ((low ? 0 : LOW_TILES) + n) * 8 + 2 * at.t + at.odd;
                const float4 v = four_rows(sum_of<2, 4 * 8 * 512>(pair_sums + ((n * 8 + tile) * 32 + at.lane) * 16), at.odd);
                if (token >= TOKENS) continue;
                const float root = root_of(squares, token, p.eps);
                const float a = geglu(fmaf(v.x * root, scale.x, shift.x), fmaf(v.y * root, scale.y, shift.y));
                const float b = geglu(fmaf(v.z * root, scale.z, shift.z), fmaf(v.w * root, scale.w, shift.w));
                const int place = M_ACT + (token * FEATURES + row / 2) * 2;
                post(mail + place, pack_bf16(a, b));
                post(next + place, EMPTY);
            }
        }
        MARK(12);
        // ---- down
        {
            const bool last = layer + 1 == p.layers;
            const float4 scale = float4_at(row_scale + R_DOWN + own_column), gate = float4_at(vectors + V_GATE2 + own_column);
            const float4 factor = float4_at(vectors + (last ? 0 : V_LAYER) + V_FACTOR1 + own_column);
            const u32 part = x + at.group * (4 * MT * 128);
            take_tokens<256, 128, FEATURES>(part, mail + M_ACT + (at.part * 512 + at.group * 256) * 2, at.tid % 128);
            group_barrier(at.group);
            MARK(13);
            product<FORMAT_DOWN, N_DOWN>(d, ring, part, at.lane, policy);
            MARK(14);
            post_to_owners(at, d, scratch, parcels + P_DOWN);
            asm volatile("fence.acq_rel.gpu;" ::: "memory");  // what this layer emptied is empty for everybody before
            __syncthreads();                                  // the next layer's mail
            u8* const sums_at = parcels + P_DOWN;
            turn = turn == 2 ? 0 : turn + 1;
            mail = next, parcels = p.parcels + turn * PARCELS;
            next = p.mail + (turn == 2 ? 0 : turn + 1) * MAIL;
            if (holds) {
                const float4 v = four_rows(sum_of_parts(at, sums_at), at.odd);
                h.x = fmaf(v.x * scale.x, gate.x, h.x), h.y = fmaf(v.y * scale.y, gate.y, h.y);
                h.z = fmaf(v.z * scale.z, gate.z, h.z), h.w = fmaf(v.w * scale.w, gate.w, h.w);
                if (!last)
                    post_stream(at, h, factor, mail, next, M_IN1, M_SQUARES1, own_squares);
                else if (own_token < TOKENS)
                    *reinterpret_cast<float4*>(h_at) = h;
            }
        }
        MARK(15);
    }
    let_dependents_start();
}
