// What the loop kernel's parts cost alone on a Hopper GPU, in clocks: instructions by the size of their code, pushes to the
// pair's other block, a word from block to block beside blocks that poll.
//
//     nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -o hopper_parts hopper_parts.cu && ./hopper_parts
//
// Figures: docs/performance-engine.md.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>
#include <cuda_runtime.h>

typedef unsigned int u32;
typedef unsigned long long u64;

static void check(cudaError_t error) {
    if (error != cudaSuccess) fprintf(stderr, "%s\n", cudaGetErrorString(error)), exit(1);
}

// Straight-line code of N multiply-adds, run ``runs`` times: the first run's clocks behind the mean of the others.
template <int N>
__global__ void __launch_bounds__(512, 1) straight_line(long long* clocks, float* sink, int runs) {
    const float a = threadIdx.x, b = 1.0001f;
    float sums[4] = {1, 2, 3, 4};
    long long first = 0, others = 0;
    for (int run = 0; run < runs; run++) {
        __syncthreads();
        const long long begin = clock64();
#pragma unroll
        for (int i = 0; i < N; i++) asm volatile("fma.rn.f32 %0, %0, %1, %2;" : "+f"(sums[i % 4]) : "f"(a), "f"(b));
        __syncthreads();
        (run ? others : first) += clock64() - begin;
    }
    sink[blockIdx.x * 512 + threadIdx.x] = sums[0] + sums[1] + sums[2] + sums[3];
    if (threadIdx.x == 0) clocks[blockIdx.x] = others / (runs - 1), clocks[512 + blockIdx.x] = first;
}

enum Target { OTHER_BLOCK, OWN_BLOCK, PLAIN_STORE };

// Each warp stores ``turns`` times 512 bytes, until all have arrived.
template <Target TARGET>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(512, 1) push(long long* clocks, int turns, int runs) {
    extern __shared__ __align__(128) unsigned char memory[];
    __shared__ u64 barrier_memory;
    const u32 own = (u32)__cvta_generic_to_shared(memory), own_barrier = (u32)__cvta_generic_to_shared(&barrier_memory);
    const u32 rank = TARGET == OWN_BLOCK ? blockIdx.x % 2 : 1 - blockIdx.x % 2;
    u32 to, barrier;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(own), "r"(rank));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(barrier) : "r"(own_barrier), "r"(rank));
    if (threadIdx.x == 0) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(own_barrier) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    long long total = 0;
    const float value = threadIdx.x;
    for (int run = 0; run < runs; run++) {
        asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
        const long long begin = clock64();
        if (TARGET != PLAIN_STORE && threadIdx.x == 0)
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(own_barrier), "r"(turns * blockDim.x * 16) : "memory");
        for (int turn = 0; turn < turns; turn++) {
            const u32 place = (turn * blockDim.x + threadIdx.x) * 16;
            if (TARGET == PLAIN_STORE)
                asm volatile("st.shared.v4.f32 [%0], {%1, %1, %1, %1};" ::"r"(own + place), "f"(value) : "memory");
            else
                asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %1, %1, %1}, [%2];"
                             ::"r"(to + place), "f"(value), "r"(barrier) : "memory");
        }
        u32 there = TARGET == PLAIN_STORE;
        while (!there)
            asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                         : "=r"(there) : "r"(own_barrier), "r"(run & 1) : "memory");
        __syncthreads();
        total += clock64() - begin;
    }
    if (threadIdx.x == 0) clocks[blockIdx.x] = total / runs;
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

__device__ u32 peek(const u32* from) {
    u32 value;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
    return value;
}

__device__ void post(u32* to, u32 value) { asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory"); }

enum Polls { NOBODY, ALL_THREADS, ONE_LANE };

// Blocks 0 and 1 pass a number to and fro; the others poll 16 bytes a thread meanwhile.
__global__ void __launch_bounds__(512, 1)
ping_pong(u32* first, u32* second, u32* stop, const uint4* polled, int passes, Polls polls, int pause, long long* clocks) {
    if (blockIdx.x < 2) {
        if (threadIdx.x) return;
        u32 *const mine = blockIdx.x ? second : first, *const other = blockIdx.x ? first : second;
        const long long begin = clock64();
        for (int i = 1; i <= passes; i++) {
            if (blockIdx.x == 0) post(mine, i);
            while (peek(other) != i) {}
            if (blockIdx.x == 1) post(mine, i);
        }
        if (blockIdx.x == 0) clocks[0] = (clock64() - begin) / (2 * passes), post(stop, 1);
        return;
    }
    if (polls == NOBODY || (polls == ONE_LANE && threadIdx.x % 32)) return;
    const uint4* const from = polled + blockIdx.x % 2 * 512 + threadIdx.x;
    u32 seen = 0;
    while (!peek(stop)) {
        uint4 v;
        asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
        seen += v.x + v.y + v.z + v.w;
        if (pause) __nanosleep(pause);
    }
    if (seen == 12345) clocks[1] = seen;
}

static long long median(const long long* device, int count) {
    check(cudaDeviceSynchronize());
    std::vector<long long> values(count);
    check(cudaMemcpy(values.data(), device, count * sizeof(long long), cudaMemcpyDeviceToHost));
    std::sort(values.begin(), values.end());
    return values[count / 2];
}

template <int N>
static void time_straight_line(long long* clocks, float* sink) {
    for (int warps : {1, 4, 16}) {
        straight_line<N><<<132, warps * 32>>>(clocks, sink, 20);
        const double others = (double)median(clocks, 132) / N, first = (double)median(clocks + 512, 132) / N;
        printf("straight line of %d KB, %d warps: %.2f clocks an instruction (first run %.2f)\n", N / 64, warps, others, first);
    }
}

template <Target TARGET>
static void time_push(long long* clocks, const char* name) {
    check(cudaFuncSetAttribute(push<TARGET>, cudaFuncAttributeMaxDynamicSharedMemorySize, 65536));
    for (int warps : {8, 16})
        for (int turns : {1, 2, 4, 7}) {
            push<TARGET><<<128, warps * 32, 65536>>>(clocks, turns, 20);
            printf("%s, %d warps, %.1f KB: %lld clocks\n", name, warps, warps * turns * 0.5, median(clocks, 128));
        }
}

int main() {
    u32* words;
    long long* clocks;
    float* sink;
    check(cudaMalloc(&words, 1 << 24));
    check(cudaMalloc(&clocks, 1024 * sizeof(long long)));
    check(cudaMalloc(&sink, 132 * 512 * sizeof(float)));
    time_straight_line<256>(clocks, sink);
    time_straight_line<1024>(clocks, sink);
    time_straight_line<2048>(clocks, sink);
    time_straight_line<3072>(clocks, sink);
    time_straight_line<4096>(clocks, sink);
    time_straight_line<8192>(clocks, sink);
    time_straight_line<12288>(clocks, sink);
    time_push<OTHER_BLOCK>(clocks, "st.async to the other block");
    time_push<OWN_BLOCK>(clocks, "st.async to the own block");
    time_push<PLAIN_STORE>(clocks, "st.shared");
    const char* const names[] = {"nobody", "all threads", "a lane of each warp"};
    for (Polls polls : {NOBODY, ALL_THREADS, ONE_LANE})
        for (int pause : {0, 20, 100}) {
            check(cudaMemset(words, 0, 1 << 24));
            ping_pong<<<130, 512>>>(words, words + 100000, words + 200000, (const uint4*)(words + 300000), 2000, polls, pause, clocks);
            printf("a word from block to block, polling: %s, pause %d ns: %lld clocks\n", names[polls], pause, median(clocks, 1));
        }
}
