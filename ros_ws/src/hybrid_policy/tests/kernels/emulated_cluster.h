// Threads, shared memory, barriers and copies of clusters of eight blocks on a CPU: what norm_product.cu calls, in place
// of wgmma_common.cu. Every thread is a coroutine, run in random order, now and then a block not at all; copies and
// st.async happen at some later time, products when they are waited for. A wait that nobody ends, a barrier
// with too many arrivals, an address outside the block's memory and anything sent to a block that has ended are reported
// and end the process.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __cluster_dims__(...)
#define __launch_bounds__(...)

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;
typedef unsigned char u8;
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

constexpr u32 TEAM = 288, FIRST_BYTE = 1024;  // threads of a block; where its memory begins
typedef std::function<void()> Later;

struct Index { u32 x; };
struct Thread {
    ucontext_t context;
    std::vector<char> stack;
    Index thread, block;
    u32 cluster, rank, meetings = 0;
    bool done = false, met = true;
    std::function<bool()> ready;
    std::vector<std::vector<Later>> groups;  // of products under way
    std::vector<Later> open, copies;
};
struct Barrier {
    long count = 0, pending = 0, bytes = 0;
    u32 phase = 0;
};
struct NamedBarrier { u32 arrived = 0, phase = 0; };
struct Cluster {
    std::map<u32, Barrier> barriers;
    u32 arrived = 0, meetings = 0;
};

std::mt19937 chance;
Thread* current;
ucontext_t scheduler;
std::vector<std::vector<u8>> memory_of;  // each block's
std::vector<u32> threads_left;
std::vector<Cluster> clusters;
std::map<u64, NamedBarrier> named_barriers;
std::vector<float> shuffled;
std::vector<Later> under_way;

#define threadIdx (current->thread)
#define blockIdx (current->block)

[[noreturn]] inline void fail(const char* what) {
    printf("block %u, thread %u: %s\n", current->block.x, current->thread.x, what);
    exit(1);
}
inline void until(std::function<bool()> ready) {
    if (ready() && chance() % 3) return;
    current->ready = ready;
    swapcontext(&current->context, &scheduler);
}
// an address of shared memory: the block's rank above 24 bits of offset
inline u8* byte_at(u32 cluster, u32 address, u32 bytes = 1) {
    const u32 block = cluster * 8 + (address >> 24), offset = (address & 0xffffff) - FIRST_BYTE;
    if (offset + bytes > SHARED || address % bytes) fail("bad address");
    if (threads_left[block] == 0) fail("access to a block that has ended");
    return &memory_of[block][offset];
}
inline u32 shared_address(const void*) { return current->rank << 24 | FIRST_BYTE; }
inline u32 of_rank(u32 address, u32 rank) { return rank << 24 | (address & 0xffffff); }

// ------------------------------------------------------------------------------------------------------- barriers
inline void change(u32 cluster, u32 address, long arrivals, long bytes) {
    byte_at(cluster, address, 8);
    Barrier& b = clusters[cluster].barriers[address];
    if (b.pending < arrivals) fail("too many arrivals");
    b.pending -= arrivals;
    b.bytes += bytes;
    if (b.pending == 0 && b.bytes == 0) b.phase ^= 1, b.pending = b.count;
}
inline void barrier_init(u32 address, u32 count) { clusters[current->cluster].barriers[address] = {count, count, 0, 0}; }
inline void barriers_initialised() {}
inline void arrive(u32 address) { change(current->cluster, address, 1, 0); }
inline void expect(u32 address, u32 bytes) { change(current->cluster, address, 1, bytes); }
inline void await(u32 address, u32 parity) {
    const u32 cluster = current->cluster;
    until([=] { return clusters[cluster].barriers[address].phase != parity; });
}
inline void meet(u64 id, u32 threads) {
    NamedBarrier* b = &named_barriers[(u64)current->block.x << 32 | id];
    const u32 phase = b->phase;
    if (++b->arrived == threads) b->arrived = 0, b->phase++;
    until([=] { return b->phase != phase; });
}
inline void named_barrier(u32 id, u32 threads) { meet(id, threads); }
inline void __syncthreads() { meet(0, TEAM); }
inline void __syncwarp() { meet(100 + current->thread.x / 32, 32); }
inline void cluster_arrive() {
    Cluster& c = clusters[current->cluster];
    if (!current->met) fail("a second arrival without waiting for the first");
    current->met = false;
    if (++c.arrived == 8 * TEAM) c.arrived = 0, c.meetings++;
    current->meetings++;
}
inline void cluster_wait() {
    const u32 cluster = current->cluster, meetings = current->meetings;
    current->met = true;
    until([=] { return clusters[cluster].meetings >= meetings; });
}
inline void wait_for_predecessor() {}
inline void let_dependents_start() {}

// --------------------------------------------------------------------------------------------------------- copies
struct Map {  // what a tensor map's 128 bytes hold here
    const u8* matrix;
    int rows, bytes, box;
};
inline u32 swizzled(u32 address) { return address ^ (address >> 7 & 7) << 4; }
inline void prefetch_map(const void*) {}
inline void copy_box(u32 to, const void* map, int column, int row, u32 bar) {
    const Map m = *(const Map*)map;
    const u32 cluster = current->cluster;
    under_way.push_back([=] {
        for (int r = 0; r < m.box; r++)
            for (int at = column; at < column + 128; at++) {
                const bool inside = row + r < m.rows && at < m.bytes;
                const u32 place = swizzled(to + r * 128 + at - column);
                *byte_at(cluster, place) = inside ? m.matrix[(size_t)(row + r) * m.bytes + at] : 0;
            }
        change(cluster, bar, 0, -m.box * 128);
    });
}
inline void send4(u32 to, u32 bar, float a, float b, float c, float d) {
    const u32 cluster = current->cluster;
    under_way.push_back([=] {
        const float4 values{a, b, c, d};
        memcpy(byte_at(cluster, to, 16), &values, 16);
        change(cluster, bar, 0, -16);
    });
}
inline void copy16(u32 to, const void* from) {
    const u32 cluster = current->cluster;
    current->copies.push_back([=] { memcpy(byte_at(cluster, to, 16), from, 16); });
}
inline void copies_done() {
    for (Later& copy : current->copies) copy();
}
inline float2 shared2(u32 at) { return *(float2*)byte_at(current->cluster, at, 8); }
inline float4 shared4(u32 at) { return *(float4*)byte_at(current->cluster, at, 16); }
inline void store_shared(u32 at, u16 value) { memcpy(byte_at(current->cluster, at, 2), &value, 2); }
inline void load2(float& first, float& second, const float* from, bool use) {
    if (use) first = from[0], second = from[1];
}

// -------------------------------------------------------------------------------------------------------- numbers
inline float from_e4m3(u8 v) {
    const int exponent = v >> 3 & 15, mantissa = v & 7;
    const float size = exponent ? std::ldexp(1 + mantissa / 8.0f, exponent - 7) : std::ldexp(mantissa / 8.0f, -6);
    return v & 128 ? -size : size;
}
inline u8 to_e4m3(float f) {
    int best = 0;
    for (int i = 1; i < 127; i++) {
        const float now = std::fabs(from_e4m3(i) - std::fabs(f)), before = std::fabs(from_e4m3(best) - std::fabs(f));
        if (now < before || (now == before && i % 2 == 0)) best = i;
    }
    return best | (std::signbit(f) ? 128 : 0);
}
inline u16 to_e4m3x2(float low, float high) { return to_e4m3(low) | to_e4m3(high) << 8; }
inline float shuffle_xor(float value, u32 mask) {
    const size_t place = (size_t)current->block.x * TEAM + current->thread.x;
    shuffled[place] = value;
    __syncwarp();
    value = shuffled[place ^ mask];
    __syncwarp();
    return value;
}
inline float quad_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

// ------------------------------------------------------------------------------------------- warpgroup products
inline u64 operand(u32 address) { return address >> 4; }
inline float operand_value(u64 operand, int row, int k) {
    return from_e4m3(*byte_at(current->cluster, swizzled((u32)(operand << 4) + row * 128 + k)));
}
inline void products_begin() { __syncwarp(); }
inline void products_commit() {
    current->groups.push_back(current->open);
    current->open.clear();
}
template <int LEFT>
inline void products_wait() {
    while ((int)current->groups.size() > LEFT) {
        for (Later& product : current->groups.front()) product();
        current->groups.erase(current->groups.begin());
    }
    __syncwarp();
}
template <int N>
inline void pin(float (&)[N]) {}
template <int N>
inline void product(float (&d)[N], u64 a, u64 b) {
    float* sum = d;
    const u32 lane = current->thread.x % 32, warp = current->thread.x / 32 % 4;
    current->open.push_back([=] {
        for (int i = 0; i < N; i++)
            for (int k = 0; k < 32; k++)
                sum[i] += operand_value(a, warp * 16 + lane / 4 + (i & 2) * 4, k) *
                          operand_value(b, i / 4 * 8 + lane % 4 * 2 + (i & 1), k);
    });
}

// ------------------------------------------------------------------------------------------------------ scheduling
inline void something_happens() {
    std::swap(under_way[chance() % under_way.size()], under_way.back());
    Later what = under_way.back();
    under_way.pop_back();
    what();
}
// all blocks of ``count`` clusters run ``kernel``
inline void run_clusters(u32 count, void (*entry)()) {
    const u32 blocks = count * 8;
    memory_of.assign(blocks, std::vector<u8>(SHARED, 0xa5));
    threads_left.assign(blocks, TEAM);
    clusters.resize(count);
    shuffled.resize(blocks * TEAM);
    std::vector<Thread> threads(blocks * TEAM);
    std::vector<Thread*> order;
    for (u32 i = 0; i < threads.size(); i++) {
        Thread& t = threads[i];
        t.thread.x = i % TEAM, t.block.x = i / TEAM, t.cluster = i / TEAM / 8, t.rank = i / TEAM % 8;
        t.stack.resize(32768);
        getcontext(&t.context);
        t.context.uc_stack.ss_sp = t.stack.data(), t.context.uc_stack.ss_size = t.stack.size(), t.context.uc_link = nullptr;
        makecontext(&t.context, entry, 0);
        order.push_back(&t);
    }
    u32 still = 0, rounds = 0;  // a block that does nothing for so many rounds
    while (!order.empty()) {
        if (rounds == 0) still = chance() % blocks, rounds = chance() % 200;
        else rounds--;
        std::shuffle(order.begin(), order.end(), chance);
        const bool late = chance() % 2;  // nothing under way ends while a thread can go on
        bool moved = false;
        for (Thread* t : order) {
            current = t;
            if (rounds && t->block.x == still) continue;
            if (!t->ready || t->ready()) {
                t->ready = nullptr, moved = true;
                swapcontext(&scheduler, &t->context);
                if (t->done) threads_left[t->block.x]--;
            }
            if (!late && !under_way.empty() && chance() % 4 == 0) moved = true, something_happens();
        }
        order.erase(std::remove_if(order.begin(), order.end(), [](Thread* t) { return t->done; }), order.end());
        if (!moved && rounds) {
            rounds = 0;
            continue;
        }
        if (!moved && under_way.empty() && !order.empty()) current = order[0], fail("waits for ever");
        while (!moved && !under_way.empty()) {
            something_happens();
            moved = chance() % 8 == 0;
        }
    }
    if (!under_way.empty()) fail("something is under way behind the end");
}
