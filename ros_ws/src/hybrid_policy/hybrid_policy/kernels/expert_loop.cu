// ------------------------------------------------------------------------------------------ the loop kernel itself

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(WORKERS, 1) expert_loop(const Arguments p) {
    extern __shared__ __align__(1024) u8 memory[];
    __shared__ struct {
        u64 barriers[SLOTS];
        u32 counts[SLOTS];
    } ring_memory;
    __shared__ u64 sum_barrier;
    __shared__ float4 stream[128];  // the residual stream of this block's tokens: four columns of one token a thread
    __shared__ float squares[4][MT], own_squares[4][8];
    __shared__ AttentionMemory attention;

    const int block = blockIdx.x;
    const bool low = block % 2 == 0;                               // the pair's first block
    const bool projects = block / 2 < QKV_PAIRS;                   // has rows of q, k or v
    const bool attends = block / PARTS * QUERIES < TOKENS * HEADS; // has rows of attention
    const bool owns = block % PARTS < NT;                          // owns tokens of the residual stream
    u32 base = shared_address(memory);
    asm volatile("" : "+r"(base));  // held in a register: computing it again reads a slow special one
    const u32 x = base + A_X;
    const u32 sums_memory = base + A_SUMS, pair_barrier = shared_address(&sum_barrier);
    u32 pair_parity = 0;

    Ring ring;
    ring.data = base + A_RINGS, ring.barriers = shared_address(&ring_memory);
    asm volatile("" : "+r"(ring.barriers));
    ring.projects = projects;
    ring.left = p.layers * ring.layer_pieces();
    {
        constexpr int TAIL = WARPS * (N_O * Piece<FORMAT_O>::BYTES + N_GATE_UP * Piece<FORMAT_GATE_UP>::BYTES + N_DOWN * Piece<FORMAT_DOWN>::BYTES);
        constexpr int LONG = TAIL + WARPS * N_QKV * Piece<FORMAT_QKV>::BYTES;
        ring.next = p.weights + ((size_t)min(block, 2 * QKV_PAIRS) * LONG + (size_t)max(block - 2 * QKV_PAIRS, 0) * TAIL) * p.layers;
    }
    u64 policy;  // weights pass once a step: they shall not push keys and vectors out of L2
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    const Place start;
    if (start.tid < SLOTS) barrier_init(shared_address(ring_memory.barriers + start.tid), 1), ring_memory.counts[start.tid] = 0;
    if (start.tid == 0) barrier_init(pair_barrier, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
    ring.fill(policy);

    wait_for_predecessor();
    const int prefix = p.valid[0];  // rows of the cache, and the position of the chunk's first token

    int turn = p.turn;
    u8* mail = p.mail + turn * MAIL;
    u8* next = p.mail + (turn + 2) % 4 * MAIL;
    u8* const parcels = p.parcels;
    if (owns && start.group == 0) {
        const OwnPlace own(start);
        const float4 h = own.token < TOKENS ? float4_at(p.h + own.token * WIDTH + own.column) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        stream[start.tid] = h;
        post_stream(start, h, float4_at(p.vectors + V_FACTOR1 + own.column), mail, next, M_IN1, M_SQUARES1, own_squares);
    }

    for (int layer = 0; layer < p.layers; layer++) {
        const float* const vectors = p.vectors + (size_t)layer * V_LAYER;
        const float* const row_scale = p.row_scale + (size_t)layer * R_LAYER;
        const size_t cache = (size_t)layer * p.capacity * HEAD_DIM;
        // One body for the four products: an instruction that is there once is fetched once (a layer written out four
        // times over was 150 KB of code, more than the instruction cache, and took three times as long).
#pragma unroll 1
        for (int stage = QKV; stage <= DOWN; stage++) {
            const Place at;
            const OwnPlace own(at);
            const int row_tile = at.warp % 4, own_column = own.column, own_in_tile = own.token % 8;
            if (stage == QKV && !projects) {
                if (attends) fetch_prefix(at, KeyRange(prefix, at.part), x, p.keys + cache);
                continue;
            }
            if (stage == OUT) {
                MARK(4);
                if (attends) {
                    fetch_prefix(at, KeyRange(prefix, at.part), sums_memory, p.values + cache);
                    attend(at, KeyRange(prefix, at.part), memory, attention, mail, next, parcels, p.scale, p, layer);
                    __syncthreads();  // values are read: partial sums may take their place
                }
            }
            MARK(stage == QKV ? 0 : 4 * stage + 1);
            const bool in_pair = stage == QKV || stage == GATE_UP, last = layer + 1 == p.layers;
            const int squares_at = stage == QKV ? M_SQUARES1 : M_SQUARES2;

            const int row = stage == QKV ? at.pair * 64 + row_tile * 16 + at.g / 2 * 4 : stage == GATE_UP ? at.pair * 128 + at.warp % 8 * 16 + at.g / 2 * 4 : own_column;
            const float* const scale_at = row_scale + (stage == QKV ? R_QKV : stage == OUT ? R_O : stage == GATE_UP ? R_GATE_UP : R_DOWN) + row;
            const float* const second_at = vectors + (stage == QKV ? V_QKV : stage == OUT ? V_GATE1 : stage == GATE_UP ? V_GATE_UP : V_GATE2) + row;
            asm volatile("prefetch.global.L2 [%0];\nprefetch.global.L2 [%1];" ::"l"(scale_at), "l"(second_at));
            const int tiles = low ? LOW_TILES : NT - LOW_TILES;

            // activations: 512 columns a block, 256 for the output projection; each warpgroup brings its share
            const int input = stage == QKV ? M_IN1 : stage == OUT ? M_SEEN : stage == GATE_UP ? M_IN2 : M_ACT;
            const int shift = (stage == OUT ? 5 : 6) - GROUPS / 2, width = stage == OUT ? HEADS * HEAD_DIM : stage == DOWN ? FEATURES : WIDTH;
            const int part = in_pair ? at.part % 2 : at.part;
            const u32 mine = x + (at.group << shift) / 8 * (MT * 128);
            take_tokens(mine, mail + input + ((part * GROUPS + at.group) << shift) * 16, at.tid % 128, shift, width * 2);
            if (stage == GATE_UP) __syncthreads(); else group_barrier(at.group);
            MARK(stage == QKV ? 1 : 4 * stage + 2);
            float d[4 * NT];
            const int format = stage == QKV ? FORMAT_QKV : stage == OUT ? FORMAT_O : stage == GATE_UP ? FORMAT_GATE_UP : FORMAT_DOWN;
            const int pieces = stage == QKV ? N_QKV : stage == OUT ? N_O : stage == GATE_UP ? N_GATE_UP : N_DOWN;
            const u32 operand = stage == GATE_UP ? x + at.group / 2 * (4 * MT * 128) : mine;  // there warpgroups share columns
            if (HAS_FORMAT(2) && format == 2)
                product<2>(d, ring, operand, pieces, at.warp, at.lane, policy);
            else if (HAS_FORMAT(1) && (format == 1 || !HAS_FORMAT(0)))
                product<1>(d, ring, operand, pieces, at.warp, at.lane, policy);
            else
                product<HAS_FORMAT(0) ? 0 : HAS_FORMAT(1) ? 1 : 2>(d, ring, operand, pieces, at.warp, at.lane, policy);
            MARK(stage == QKV ? 2 : 4 * stage + 3);

            Squares sums;
            if (in_pair) {
                const int row_tiles = stage == QKV ? 4 : 8;
                if (at.tid == 0) expect(pair_barrier, tiles * GROUPS * 4096);
                push_to_pair(at, d, sums_memory, pair_barrier, stage == QKV ? part * GROUPS + at.group : part * (GROUPS / 2) + at.group / 2, stage == QKV ? row_tile : at.warp % 8, row_tiles);
                sums.ask(at, mail + squares_at);
            } else {
                post_to_owners(at, d, sums_memory, parcels + (stage == OUT ? P_OUT : P_DOWN));
                MARK(stage == OUT ? 8 : 15);
            }
            // what the end of the stage wants from far away comes while the partial sums travel
            const float4 scale = float4_at(scale_at);
            // shift of the norm, or gate of the residual; then the next norm's factor
            const float4 second = float4_at(second_at);
            float4 third[4 / GROUPS];
            if (!in_pair)
                third[0] = float4_at(vectors + (stage == OUT ? V_FACTOR2 : last ? 0 : V_LAYER + V_FACTOR1) + own_column);
            if (stage == QKV) {  // cosines and sines of two tokens
                const int i = row % HEAD_DIM / 2;
#pragma unroll
                for (int j = 0; j < 4 / GROUPS; j++) {
                    const int token = ((low ? 0 : LOW_TILES) + at.group + GROUPS * j) * 8 + own_in_tile;
                    third[j] = make_float4(1.0f, 1.0f, 0.0f, 0.0f);
                    if (token < TOKENS && row < (HEADS + 1) * HEAD_DIM) {
                        const size_t place = (size_t)(prefix + token) * HALF + i;
                        const float2 c = *reinterpret_cast<const float2*>(p.cosines + place);
                        const float2 s = *reinterpret_cast<const float2*>(p.sines + place);
                        third[j] = make_float4(c.x, c.y, s.x, s.y);
                    }
                }
            }

            if (in_pair) {
                sums.keep(at, mail + squares_at, squares);
                __syncthreads();  // the activations are read
                if (stage == QKV && attends) fetch_prefix(at, KeyRange(prefix, at.part), x, p.keys + cache);
                wait_bytes(pair_barrier, pair_parity);
                pair_parity ^= 1;
            }
            if (stage == QKV) {
                const int i = row % HEAD_DIM / 2, head = row / HEAD_DIM;
                int boxes[4 / GROUPS];
#pragma unroll
                for (int j = 0; j < 4 / GROUPS; j++) {
                    const int tile = at.group + GROUPS * j;
                    boxes[j] = -1;
                    if (tile >= tiles) continue;
                    const int token = ((low ? 0 : LOW_TILES) + tile) * 8 + own_in_tile;
                    const float4 v = four_rows(sum_of<2 * GROUPS, 4 * 4 * 512>(sums_memory + ((tile * 4 + row_tile) * 32 + at.lane) * 16), at.odd);
                    if (token >= TOKENS) continue;
                    const float root = root_of(squares, token, p.eps);
                    // rows come in pairs (i, i + HALF)
                    const float p0 = fmaf(v.x * root, scale.x, second.x), q0 = fmaf(v.y * root, scale.y, second.y);
                    const float p1 = fmaf(v.z * root, scale.z, second.z), q1 = fmaf(v.w * root, scale.w, second.w);
                    const float4 b = third[j];
                    const int box = (head < HEADS ? M_Q + (token * HEADS + head) * HEAD_DIM * 2 : (head == HEADS ? M_K : M_V) + token * HEAD_DIM * 2) + i * 2;
                    post(mail + box, pack_bf16(p0 * b.x - q0 * b.z, p1 * b.y - q1 * b.w));
                    post(mail + box + HALF * 2, pack_bf16(q0 * b.x + p0 * b.z, q1 * b.y + p1 * b.w));
                    boxes[j] = box;
                }
#pragma unroll
                for (int j = 0; j < 4 / GROUPS; j++) {
                    if (boxes[j] < 0) continue;
                    post(next + boxes[j], EMPTY);
                    post(next + boxes[j] + HALF * 2, EMPTY);
                }
                __syncthreads();  // the sums are read: values may take their place
            } else if (stage == GATE_UP) {
#pragma unroll 2
                for (int n = at.warp / 8; n < tiles; n += WARPS / 8) {
                    const int token = ((low ? 0 : LOW_TILES) + n) * 8 + own_in_tile;
                    const float4 v = four_rows(sum_of<GROUPS, 4 * 8 * 512>(sums_memory + ((n * 8 + at.warp % 8) * 32 + at.lane) * 16), at.odd);
                    if (token >= TOKENS) continue;
                    const float root = root_of(squares, token, p.eps);
                    const float a = geglu(fmaf(v.x * root, scale.x, second.x), fmaf(v.y * root, scale.y, second.y));
                    const float b = geglu(fmaf(v.z * root, scale.z, second.z), fmaf(v.w * root, scale.w, second.w));
                    post(mail + M_ACT + (token * FEATURES + row / 2) * 2, pack_bf16(a, b));
                }
#pragma unroll 1
                for (int n = at.warp / 8; n < tiles; n += WARPS / 8) {
                    const int token = ((low ? 0 : LOW_TILES) + n) * 8 + own_in_tile;
                    if (token < TOKENS) post(next + M_ACT + (token * FEATURES + row / 2) * 2, EMPTY);
                }
                __syncthreads();  // the sums are read: those of the next stage may take their place
            } else {
                u8* const sums_at = parcels + (stage == OUT ? P_OUT : P_DOWN);
                if (stage == DOWN) {
                    turn = (turn + 1) % 4;
                    mail = p.mail + turn * MAIL, next = p.mail + (turn + 2) % 4 * MAIL;
                    // what the block has emptied so far is empty for everybody before its mail of the next layer, and
                    // wanted a layer later; this warpgroup has nothing else to do now
                    if (FENCED && at.group == 1) asm volatile("fence.acq_rel.gpu;" ::: "memory");
                }
                if (owns && at.group == 0) {
                    const float4 v = four_rows(sum_of_parts(at, sums_at), at.odd);
                    float4 h = stream[at.tid];
                    h.x = fmaf(v.x * scale.x, second.x, h.x), h.y = fmaf(v.y * scale.y, second.y, h.y);
                    h.z = fmaf(v.z * scale.z, second.z, h.z), h.w = fmaf(v.w * scale.w, second.w, h.w);
                    stream[at.tid] = h;
                    if (stage == OUT || !last)
                        post_stream(at, h, third[0], mail, next, stage == OUT ? M_IN2 : M_IN1, stage == OUT ? M_SQUARES2 : M_SQUARES1, own_squares);
                    else if (own.token < TOKENS)
                        *reinterpret_cast<float4*>(p.h + own.token * WIDTH + own.column) = h;
                    empty_parts(at, sums_at);
                }
                if (stage == DOWN) __syncthreads();  // the scratch is read: values may take its place
            }
            if (stage == QKV) MARK(3);
            if (stage == GATE_UP) MARK(12);
        }
    }
    let_dependents_start();
}
