// ------------------------------------------------------------------------------------------ the loop kernel itself

// By the workers
__device__ __forceinline__ void all_steps(const Arguments& p, u8* memory, u32 base, Ring ring, u32 pair_barrier) {
    __shared__ float4 stream[128];  // the residual stream of this block's tokens: four columns of one token a thread
    __shared__ float roots[64], scales[64], own_squares[4][8];
    __shared__ __align__(16) Tables tables;
    __shared__ __align__(16) AttentionMemory attention;
    __shared__ __align__(16) float actions[8][LANES];  // of this block's tokens

    const u32 block = blockIdx.x;
    const bool low = block % 2 == 0;                               // the pair's first block
    const bool projects = block / 2 < QKV_PAIRS;                   // has rows of q, k or v
    const bool attends = block / PARTS * QUERIES < TOKENS * HEADS; // has rows of attention
    const bool owns = block % PARTS < NT;                          // owns tokens of the residual stream
    const u32 x = base + A_X, sums_memory = base + A_SUMS, inbox = base + A_INBOX;
    u32 pair_parity = 0;
    const Place start;

    wait_for_predecessor();
    const u32 prefix = p.valid[0];  // rows of the cache, and the position of the chunk's first token

    u32 turn = 0;  // which copy of the mail a layer takes
    u8* mail = p.mail;
    u8* const parcels = p.parcels;
    if (owns) take_noise(start, p.flow, actions);

#pragma unroll 1
    for (int step = 0; step < p.steps; step++)
#pragma unroll 1
    for (int layer = 0; layer < p.layers; layer++) {
        const bool last = layer + 1 == p.layers;
        const float* const vectors = p.vectors + ((size_t)step * p.layers + layer) * V_LAYER;
        const Place at;
        if (EIGHT && layer == 0 && at.t == 0) scales[at.tid / 4] = vectors[V_STREAM];  // read by this thread before others
        if (layer == 0 && owns && at.group == 0) {
            const float4 h = project_actions(at, p.flow, actions);
            stream[at.tid] = h;
            post_stream(
                at, h, float4_at(vectors + V_FACTOR1 + OwnPlace(at).column), EIGHT ? vectors[V_STREAM] : 1.0f, mail, M_IN1,
                M_SQUARES1, own_squares);
        }
        const float* const row_scale = p.row_scale + (size_t)layer * R_LAYER;
        const u32 phase = turn % 2;
        // One body for the four products: an instruction that is there once is fetched once (a layer written out four
        // times over was 150 KB of code, more than the instruction cache, and took three times as long).
#pragma unroll 1
        for (int stage = QKV; stage <= DOWN; stage++) {
            const Place at;
            if (stage == QKV && !projects) {
                if (attends) arrive(cache_barrier(KEYS_FREE));
                continue;
            }
            const bool in_pair = stage == QKV || stage == GATE_UP;
            const u32 first_row = stage == QKV ? at.pair * 64 : stage == GATE_UP ? at.pair * 128 : at.tile * 64;
            tables.fetch(
                at, row_scale + of_stage(stage, R_QKV, R_O, R_GATE_UP, R_DOWN) + first_row,
                vectors + of_stage(stage, V_QKV, V_GATE1, V_GATE_UP, V_GATE2) + first_row,
                vectors + (stage == OUT ? V_FACTOR2 : last ? 0 : V_LAYER + V_FACTOR1) + (in_pair ? 0 : first_row),
                stage == GATE_UP ? 128 : 64);
            if (stage == OUT) {
                MARK(4);
                if (attends) {
                    arrive(cache_barrier(VALUES_FREE));
                    attend(
                        at, KeyRange(prefix, at.part), memory, attention, mail, parcels, phase, p.scale,
                        EIGHT ? vectors[V_SEEN] : 1.0f, p, layer);
                    block_barrier();  // values are read: partial sums may take their place
                }
            }
            if (last && owns && stage == GATE_UP) prefetch_projections(at, p.flow);
            MARK(stage == QKV ? 0 : 4 * stage + 1);

            const int format = of_stage(stage, FORMAT_QKV, FORMAT_O, FORMAT_GATE_UP, FORMAT_DOWN);
            // activations: 512 columns a block, 256 for the output projection; each warpgroup brings its share, in halves: the
            // second comes while the products with the first are under way
            const u32 input = of_stage(stage, M_IN1, M_SEEN, M_IN2, M_ACT);
            const u32 halves = stage == OUT || EIGHT ? 1 : 2;
            const u32 row_bytes = (stage == OUT ? HEADS * HEAD_DIM : stage == DOWN ? FEATURES : WIDTH) * SIZE;
            const u32 part = in_pair ? at.part % 2 : at.part;
            // of 128 bytes of each token, from one half to the next; a warpgroup's first: in gate/up they share columns; and how
            // many a half has
            const bool single = EIGHT && stage == OUT;
            const u32 apart = single ? 0 : halves == 1 ? 1 : stage == GATE_UP ? 4 : 2;
            const u32 first_block = at.group * (single ? 1 : stage == GATE_UP ? 2 : 2 * halves);
            const u8* const activations = mail + input + (part * (single ? 2 : 4 * halves) + first_block) * 128;
            const u8* const squares_at = mail + (stage == QKV ? M_SQUARES1 : M_SQUARES2);
            const u32 place = at.tid % 128, blocks_at = x + first_block * (MT * 128);
            Squares squares;
            Words words;  // of the first piece: they wait for the activations, not the other way round
            words.read(ring, at.warp, at.lane, format == 2);
            // angles of two rows, of two token tiles; they come with the pair's sums
            const u32 row = first_row + at.warp % 4 * 16 + at.g / 2 * 4, i = row % HEAD_DIM / 2, head = row / HEAD_DIM;
            float2 cosines[2], sines[2];
            const auto fetch_angles = [&]() {
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const u32 token = ((low ? 0 : LOW_TILES) + at.group + j * GROUPS) * 8 + 2 * at.t + at.odd;
                    cosines[j] = make_float2(1.0f, 1.0f), sines[j] = make_float2(0.0f, 0.0f);
                    if (token < TOKENS && head <= HEADS) {
                        const u32 place = (prefix + token) * HALF + i;
                        cosines[j] = *reinterpret_cast<const float2*>(p.cosines + place);
                        sines[j] = *reinterpret_cast<const float2*>(p.sines + place);
                    }
                }
            };
            await_tokens(activations, place, at.group, apart * 128, row_bytes);
            if (in_pair) squares.ask(at, squares_at);
            Taken taken;
            taken.ask(activations, place, row_bytes, single);
            float d[4 * NT];
#pragma unroll
            for (int i = 0; i < 4 * NT; i++) asm volatile("mov.f32 %0, 0f00000000;" : "=f"(d[i]));  // here, not long before
            const u32 all = of_stage(stage, N_QKV, N_O, N_GATE_UP, N_DOWN);
            const u32 pieces = halves == 2 && all % 2 == 0 ? all / 2 : all;  // a single piece needs both halves
            const u32 operand = stage == GATE_UP ? x : blocks_at;
#pragma unroll 1
            for (u32 half = 0;;) {
                taken.keep(blocks_at + half * apart * (MT * 128), activations + half * apart * 128, place, row_bytes, single);
                const bool last_half = ++half == halves;
                if (!last_half) taken.ask(activations + apart * 128, place, row_bytes, single);
                if (!last_half && pieces == all) continue;
                if (stage == GATE_UP) block_barrier(); else group_barrier(at.group);
                if (half == 1) MARK(stage == QKV ? 1 : 4 * stage + 2);
                const u32 from = operand + (pieces == all ? 0 : half - 1) * apart * (MT * 128);
                if (HAS_FORMAT(2) && format == 2)
                    product<2>(d, words, ring, from, pieces, last_half, at.warp, at.lane);
                else if (HAS_FORMAT(3) && format == 3)
                    product<3>(d, words, ring, from, pieces, last_half, at.warp, at.lane);
                else if (HAS_FORMAT(1) && (format == 1 || !HAS_FORMAT(0)))
                    product<1>(d, words, ring, from, pieces, last_half, at.warp, at.lane);
                else
                    product<HAS_FORMAT(0) ? 0 : HAS_FORMAT(1) ? 1 : 2>(d, words, ring, from, pieces, last_half, at.warp, at.lane);
                if (last_half) break;
            }
            MARK(stage == QKV ? 2 : stage == DOWN ? 26 : 4 * stage + 3);

            const u32 row_tiles = stage == GATE_UP ? 8 : 4, row_tile = at.warp % row_tiles;
            const u32 local_row = row_tile * 16 + at.g / 2 * 4;
            const u32 tiles = low ? LOW_TILES : NT - LOW_TILES, first_tile = low ? 0 : LOW_TILES, other_tile = low ? LOW_TILES : 0;
            const u32 token_in_tile = 2 * at.t + at.odd;
            const u32 box = (row_tile * 32 + at.lane) * 16;
            const u32 other = of_rank(inbox, low) + box, other_barrier = of_rank(pair_barrier, low);
            if (in_pair && at.tid == 0) expect(pair_barrier, tiles * row_tiles * 512);
            if (stage == GATE_UP) {  // each warpgroup has rows of its own: the other block's tiles go there at once
#pragma unroll
                for (int n = 0; n < LOW_TILES; n++)
                    if (!low) push4(other + n * 4096, other_barrier, d + 4 * n);
                    else if (n < NT - LOW_TILES) push4(other + n * 4096, other_barrier, d + 4 * (n + LOW_TILES));
            } else {
                store_sums(at, d, sums_memory);
            }
            if (in_pair) squares.keep(at, squares_at, roots, scales, stage == GATE_UP, p.eps);
            if (at.warp < 3) copies_done();  // the tables
            block_barrier();  // partial sums are there, and the activations read
            if (stage == QKV && attends) arrive(cache_barrier(KEYS_FREE));
            if (stage == QKV) MARK(20);
            if (stage == GATE_UP) MARK(22);

            if (in_pair) {
                // one's four rows among the block's, and among the sums
                const float4 scale = float4_at(tables.scale + local_row), second = float4_at(tables.second + local_row);
                // Token tiles' partial sums meet in the block that owns them.
                const u32 sums = sums_memory + at.tid % 128 * 16;
                if (stage == QKV) {
#pragma unroll 2
                    for (u32 n = at.group; n < NT - tiles; n += GROUPS) {
                        const float4 v = sum_of(sums, other_tile + n);
                        push4(other + n * 2048, other_barrier, &v.x);
                    }
                    MARK(21);
                }
                if (stage == QKV) {
                    fetch_angles();
                    wait_bytes(pair_barrier, pair_parity);
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        const u32 n = at.group + j * GROUPS, token = (first_tile + n) * 8 + token_in_tile;
                        if (n >= tiles) break;
                        float4 v = sum_of(sums, first_tile + n);
                        add(v, load_shared_float4(inbox + box + n * 2048));
                        v = four_rows(v, at.odd);
                        if (token >= TOKENS) continue;
                        const float root = roots[token];
                        // rows come in pairs (i, i + HALF)
                        const float2 c = cosines[j], s = sines[j];
                        const float p0 = fmaf(v.x * root, scale.x, second.x), q0 = fmaf(v.y * root, scale.y, second.y);
                        const float p1 = fmaf(v.z * root, scale.z, second.z), q1 = fmaf(v.w * root, scale.w, second.w);
                        const u32 of_head = head < HEADS ? M_Q + (token * HEADS + head) * (HEAD_DIM * 2)
                                                         : (head == HEADS ? M_K : M_V) + token * (HEAD_DIM * 2);
                        const u32 to = of_head + i * 2;
                        post(mail + to, pack_bf16(p0 * c.x - q0 * s.x, p1 * c.y - q1 * s.y));
                        post(mail + to + HALF * 2, pack_bf16(q0 * c.x + p0 * s.x, q1 * c.y + p1 * s.y));
                    }
                } else {
                    wait_bytes(pair_barrier, pair_parity);
                    const u32 to = M_ACT + (first_row + local_row) / 2 * SIZE;  // two rows a feature
                    u32 before = 0;  // E4M3: of the token tile before, two features
#pragma unroll
                    for (int n = 0; n < LOW_TILES; n++) {
                        if (n >= tiles) break;
                        const u32 token = (first_tile + n) * 8 + token_in_tile;
                        const int high = 4 * min(n + LOW_TILES, NT - 1);
                        float4 v = low ? make_float4(d[4 * n], d[4 * n + 1], d[4 * n + 2], d[4 * n + 3])
                                       : make_float4(d[high], d[high + 1], d[high + 2], d[high + 3]);
                        add(v, load_shared_float4(inbox + box + n * 4096));
                        v = four_rows(v, at.odd);
                        if (!EIGHT && token >= TOKENS) continue;
                        const float root = roots[min(token, (u32)TOKENS - 1)];
                        const float gates[2] = {fmaf(v.x * root, scale.x, second.x), fmaf(v.z * root, scale.z, second.z)};
                        const float ups[2] = {fmaf(v.y * root, scale.y, second.y), fmaf(v.w * root, scale.w, second.w)};
                        if (!EIGHT) {
                            post(mail + to + token * (FEATURES * 2), pack_bf16(geglu(gates[0], ups[0]), geglu(gates[1], ups[1])));
                            continue;
                        }
                        // with the lane of g ^ 2, which has the next two features, one trades for four of one of two tiles
                        // (ups are halved, and divided by their scale: ExpertLoop.pack)
                        const u32 pair = pack_e4m3(geglu_of_half(gates[0], ups[0]), geglu_of_half(gates[1], ups[1]), 0.0f, 0.0f);
                        const u32 first = n % 2 ? before : pair, second = n % 2 ? pair : 0;
                        before = pair;
                        if (n % 2 == 0 && n + 1 < tiles) continue;
                        const bool later = at.g & 2;
                        const u32 got = __shfl_xor_sync(0xffffffffu, later ? first : second, 8);
                        const u32 mine = (first_tile + (n & ~1) + later) * 8 + token_in_tile;
                        if (mine < TOKENS && (n & ~1) + later < tiles)
                            post(mail + to - later * 2 + mine * FEATURES, later ? got | second << 16 : first | got << 16);
                    }
                }
                pair_parity ^= 1;
                block_barrier();  // the sums are read: values, or the next stage's, may take their place
            } else {
                u8* const sums_at = parcels + (stage == OUT ? P_OUT : P_DOWN);
                post_to_owners(at, sums_memory, sums_at, phase);
                MARK(stage == OUT ? 8 : 15);
                if (stage == DOWN) {
                    if (at.group == 1) empty_slice(p.mail + (turn + 2) % 4 * MAIL, at.tid % 128);  // it has nothing else to do now
                    turn = (turn + 1) % 4;
                    mail = p.mail + turn * MAIL;
                }
                if (owns && at.group == 0) {
                    // only here: somebody of another warpgroup would read while the next stage's tables come
                    const float4 scale = float4_at(tables.scale + local_row), second = float4_at(tables.second + local_row);
                    const float4 third = float4_at(tables.third + local_row);
                    const float4 v = four_rows(sum_of_parts(at, sums_at, phase), at.odd);
                    MARK(stage == OUT ? 27 : 28);
                    float4 h = stream[at.tid];
                    h.x = fmaf(v.x * scale.x, second.x, h.x), h.y = fmaf(v.y * scale.y, second.y, h.y);
                    h.z = fmaf(v.z * scale.z, second.z, h.z), h.w = fmaf(v.w * scale.w, second.w, h.w);
                    stream[at.tid] = h;
                    if (stage == OUT || !last)
                        post_stream(
                            at, h, third, EIGHT ? scales[OwnPlace(at).token] : 1.0f, mail, stage == OUT ? M_IN2 : M_IN1,
                            stage == OUT ? M_SQUARES2 : M_SQUARES1, own_squares);
                }
                if (stage == DOWN) MARK(29);
                if (stage == DOWN) block_barrier();  // the scratch is read: values may take its place
            }
            if (stage == QKV) MARK(3);
            if (stage == GATE_UP) MARK(12);
        }
        if (last && owns)
            euler_step(
                p.flow, p.eps, parcels, step, step + 1 == p.steps, stream, *reinterpret_cast<Scaled*>(memory + A_SUMS), own_squares,
                actions);
    }
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(WORKERS + 128, 1) expert_loop(const Arguments p) {
    extern __shared__ __align__(1024) u8 memory[];
    __shared__ u64 ring_barriers[2 * SLOTS];
    __shared__ u64 sum_barrier;
    u32 base = shared_address(memory);
    asm volatile("" : "+r"(base));  // held in a register: computing it again reads a slow special one
    const u32 pair_barrier = shared_address(&sum_barrier);
    Ring ring;
    ring.data = base + A_RINGS, ring.barriers = shared_address(ring_barriers);
    asm volatile("" : "+r"(ring.barriers));
    if (threadIdx.x < SLOTS) {
        barrier_init(ring.barriers + threadIdx.x * 8, 1);
        barrier_init(ring.barriers + (SLOTS + threadIdx.x) * 8, WORKERS);
    }
    if (threadIdx.x == 0) barrier_init(pair_barrier, 1);
    if (threadIdx.x < GROUPS) barrier_init(shared_address(meetings + threadIdx.x), 128);
    if (threadIdx.x < 4) barrier_init(cache_barrier(threadIdx.x), threadIdx.x % 2 ? BRINGERS : WORKERS);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
    if (__shfl_sync(0xffffffffu, threadIdx.x / 128, 0) == GROUPS) {
        // 128 * 40 + 256 * 232 is what 384 threads of 168 begin with: one more, and the workers wait for ever
        fewer_registers<40>();
        if (threadIdx.x == WORKERS) stream_weights(p, ring, blockIdx.x / 2 < QKV_PAIRS);
        else if (threadIdx.x >= WORKERS + 32 && blockIdx.x / PARTS * QUERIES < TOKENS * HEADS)
            bring_prefix(p, base + A_X, base + A_SUMS);
    } else {
        more_registers<232>();
        all_steps(p, memory, base, ring, pair_barrier);
    }
    let_dependents_start();
}
