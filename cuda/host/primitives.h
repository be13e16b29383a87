// host/primitives.h: the primitives of kernels/primitives.cuh on the CPU. A block's threads are fibers of one thread that
// take turns where a kernel waits for others (barriers, shuffles, mma); blocks run one after another. What a GPU leaves
// undefined is made to show: shared memory starts as NaNs, an asynchronous copy happens no sooner than it is waited for,
// and the fibers' order can be shuffled (tl_host_shuffle), which must not change a bit. A kernel whose threads wait for
// each other in vain aborts. Not thread-safe: launch holds a lock.
//
// Compiled with -fsanitize=thread, ThreadSanitizer takes every fiber for a thread, and of what orders them it is told what
// holds on a GPU: barriers do, shuffles and mma do not; blocks are ordered by nothing but a fence with an atomic_add after
// it, kernels by wait_for_previous. So it reports the races that hardware would have, whichever order the fibers ran in.
#ifndef TINYLLM_CUDA_HOST_PRIMITIVES_H
#define TINYLLM_CUDA_HOST_PRIMITIVES_H

#include <deque>
#include <memory>
#include <mutex>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>
#include <utility>
#include <vector>

#define DEVICE static inline
#define BOTH   static inline
#define GRID_CONSTANT
#define UNROLL
#define UNROLL_BY(n)
#define KERNEL(threads, blocks) static void

#define HOST_STACK_BYTES   (256 << 10)
#define HOST_ORDERED_BYTES 1024 // behind a block's shared memory: addresses that stand for its barriers

// ---- what ThreadSanitizer is told ---------------------------------------------------------------------------------------

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char *file, int line);
void AnnotateIgnoreReadsEnd(const char *file, int line);
void AnnotateIgnoreWritesBegin(const char *file, int line);
void AnnotateIgnoreWritesEnd(const char *file, int line);
void __tsan_write_range(void *at, unsigned long n_bytes);
void __tsan_read_range(void *at, unsigned long n_bytes);
}
struct host_aside { // what this file does for itself is no access of the kernel's
    host_aside() {
        AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
        AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    }
    ~host_aside() {
        AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
        AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    }
};
#define HOST_ASIDE              host_aside aside
#define HOST_RELEASE(at)        __tsan_release((void *)(at))
#define HOST_ACQUIRE(at)        __tsan_acquire((void *)(at))
#define HOST_WRITES(at, n_byte) __tsan_write_range(at, n_byte)
#define HOST_READS(at, n_byte)  __tsan_read_range((void *)(at), n_byte)
#else
#define HOST_ASIDE              (void)0
#define HOST_RELEASE(at)        (void)(at)
#define HOST_ACQUIRE(at)        (void)(at)
#define HOST_WRITES(at, n_byte) (void)0
#define HOST_READS(at, n_byte)  (void)0
#endif

// ---- fibers -------------------------------------------------------------------------------------------------------------

struct host_copy {
    uint8_t *to;
    const uint8_t *from;
};

struct host_context {
    jmp_buf at;
    ucontext_t context;
    bool started;
    void *tsan; // ThreadSanitizer's thread
};

struct host_fiber : host_context {
    std::vector<uint8_t> stack;
    bool done, fenced;
    int parity;                                 // of the warp's next exchange
    std::vector<std::vector<host_copy>> copies; // groups under way, then the one that is being filled
};

struct host_warp {
    uint32_t slot[2][32][12]; // what lanes show each other, by parity
    int32_t sums[2][16][8];   // what the last of them made of it (mma)
    int arrived, generation;
};

struct host_block {
    std::deque<host_fiber> fibers; // they stay where they are, and live on from block to block
    std::vector<host_warp> warps;
    std::vector<int> order, place;            // the fiber at a place, and back; a warp's places follow each other
    std::vector<std::vector<uint8_t>> shared; // of each block of a launch
    void (*body)(void *);
    void *argument;
    int n, current, left, arrived, generation, x, y, z, nx;
    long idle;          // switches since something last happened
    unsigned long seed; // of the next random number; 0: the fibers go in order
    host_context home;
    uint8_t *ordered;        // addresses of barriers: the block's and each warp's, by turns
    char ended[3], launched; // addresses of the ends of launches, by turns, and of all that was before one
    int n_launches;
    bool overlaps; // the launch may begin before the one in front has ended
};

static host_block host;
static std::mutex host_lock;
static unsigned long host_seed;
static bool host_kernel_last; // the last thing that happened on the device was a kernel

// For the tests: shuffles the threads' order from now on, from block to block; 0: they go in order.
extern "C" __attribute__((visibility("default"))) void tl_host_shuffle(unsigned long seed) { host_seed = seed; }

static inline unsigned host_random(unsigned below) { // xorshift64
    host.seed ^= host.seed << 13;
    host.seed ^= host.seed >> 7;
    host.seed ^= host.seed << 17;
    return (unsigned)(host.seed >> 33) % below;
}

// Leaves one context for another; returns when somebody comes back.
static __attribute__((noinline)) void host_go(host_context &from, host_context &to) {
#ifdef __SANITIZE_THREAD__
    __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
    swapcontext(&from.context, &to.context);
#else
    if (_setjmp(from.at)) return;
    if (to.started) _longjmp(to.at, 1);
    to.started = true;
    setcontext(&to.context);
#endif
}

static inline void host_switch(int next) {
    host_fiber &me = host.fibers[(size_t)host.current];
    if (next == host.current) return;
    if (++host.idle > 1000000) {
        fprintf(stderr, "a kernel's threads wait for each other in vain\n");
        abort();
    }
    host.current = next;
    host_go(me, host.fibers[(size_t)next]);
}

// The next fiber that has not ended, among `of` places from `first` on.
static inline int host_next(int first, int of) {
    int i = host.place[(size_t)host.current] - first, fiber;
    do {
        i = (i + 1) % of;
        fiber = host.order[(size_t)(first + i)];
    } while (host.fibers[(size_t)fiber].done && fiber != host.current);
    return fiber;
}

// A fiber's life: the block's work, then waiting for the next block's.
static inline void host_enter() {
    for (;;) {
        HOST_ACQUIRE(host.overlaps ? &host.ended[(host.n_launches + 1) % 3] : &host.launched); // the last but one
        host.body(host.argument);
        HOST_RELEASE(&host.ended[host.n_launches % 3]);
        HOST_ASIDE;
        host_fiber &me = host.fibers[(size_t)host.current];
        me.done = true;
        host.idle = 0;
        if (--host.left > 0)
            host_switch(host_next(0, host.n));
        else
            host_go(me, host.home);
    }
}

// What this file writes it writes aside, so these need not read aside.
static inline int thread_id() { return host.current; }
static inline int n_threads() { return host.n; }
static inline int block_x() { return host.x; }
static inline int block_y() { return host.y; }
static inline int block_z() { return host.z; }
static inline int n_blocks_x() { return host.nx; }
static inline int lane_id() { return thread_id() % 32; }
static inline int warp_id() { return thread_id() / 32; }
static inline uint8_t *shared_memory() { return host.shared.back().data(); }

static inline void block_barrier() {
    const int generation = host.generation;
    HOST_RELEASE(host.ordered + generation % 2 * 8);
    {
        HOST_ASIDE;
        if (++host.arrived == host.n) {
            host.arrived = 0;
            host.generation++;
            host.idle = 0;
        }
        while (host.generation == generation) host_switch(host_next(0, host.n));
    }
    HOST_ACQUIRE(host.ordered + generation % 2 * 8);
}

// The lanes of a warp come together, which orders nothing.
static inline void host_meet() {
    HOST_ASIDE;
    host_warp &warp = host.warps[(size_t)(host.current / 32)];
    const int first = host.place[(size_t)host.current] / 32 * 32, of = host.n - first < 32 ? host.n - first : 32;
    const int generation = warp.generation;
    if (++warp.arrived == of) {
        warp.arrived = 0;
        warp.generation++;
        host.idle = 0;
        return;
    }
    while (warp.generation == generation) {
        int next = host_next(first, of);
        // A lane that waits for the whole block cannot come: let the other warps go on. They may at any time.
        host_switch(host.idle > 64 || (host.seed && host_random(64) == 0) ? host_next(0, host.n) : next);
    }
}

static inline void warp_barrier() {
    const host_warp &warp = host.warps[(size_t)warp_id()];
    const uint8_t *ordered = host.ordered + 16 + (warp_id() * 2 + warp.generation % 2) * 8;
    HOST_RELEASE(ordered);
    host_meet();
    HOST_ACQUIRE(ordered);
}

// Shows n words to the warp; the last lane to do so calls last(slot, sums), where there is something to do for all at once.
// Returns what all 32 lanes showed; sums: what `last` made.
template <class Last>
static inline uint32_t (*host_exchange(const uint32_t *words, int n, Last last, int32_t (**sums)[8]))[12] {
    HOST_ASIDE;
    host_warp &warp = host.warps[(size_t)(host.current / 32)];
    host_fiber &me = host.fibers[(size_t)host.current];
    const int parity = me.parity;
    me.parity ^= 1;
    memcpy(warp.slot[parity][host.current % 32], words, (size_t)n * 4);
    if (warp.arrived == 31) last(warp.slot[parity], warp.sums[parity]);
    *sums = warp.sums[parity];
    host_meet();
    return warp.slot[parity];
}

template <class T> static inline T shuffle(T x, int from) {
    static_assert(sizeof(T) == 4, "a word");
    HOST_ASIDE;
    uint32_t word;
    memcpy(&word, &x, 4);
    int32_t (*sums)[8];
    uint32_t (*all)[12] = host_exchange(&word, 1, [](uint32_t (*)[12], int32_t (*)[8]) {}, &sums);
    memcpy(&x, all[from & 31], 4);
    return x;
}
template <class T> static inline T shuffle_xor(T x, int mask) { return shuffle(x, lane_id() ^ mask); }

static inline float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
static inline uint32_t as_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
static inline float half_to_float(uint32_t h) {
    const uint32_t sign = (h & 0x8000u) << 16, rest = h & 0x7fffu;
    if (rest >= 0x7c00) return as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    const float x = rest < 0x400 ? (float)rest * 0x1p-24f : as_float((rest << 13) + (112u << 23));
    return as_float(sign | as_bits(x));
}
static inline uint32_t float_to_half(float x) {
    const uint32_t sign = as_bits(x) >> 16 & 0x8000, rest = as_bits(x) & 0x7fffffff;
    if (rest > 0x7f800000) return sign | 0x7fff;
    if (rest >= as_bits(65520.0f)) return sign | 0x7c00;
    if (rest < as_bits(0x1p-14f)) return sign | (as_bits(as_float(rest) + 0.5f) - as_bits(0.5f)); // ulp(0.5) = 2^-24
    return sign | (((rest + 0xfff + (rest >> 13 & 1)) >> 13) - (112 << 10));
}
static inline int round_to_int(float x) { return x == x ? (int)rintf(x) : 0; }
static inline uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector) {
    const uint64_t all = (uint64_t)high << 32 | low;
    uint32_t out = 0;
    for (int i = 0; i < 4; i++) out |= (uint32_t)(all >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return out;
}

// The words that the lanes showed: a in 0..3, b in 4 and 5, c in 6..9. One lane multiplies for all.
template <int K> static inline void host_mma_s8(int32_t c[4], const uint32_t words[6]) {
    HOST_ASIDE;
    int32_t (*sums)[8];
    host_exchange(
        words, 6,
        [](uint32_t (*all)[12], int32_t (*out)[8]) {
            int a[16][K], b[K][8];
            for (int lane = 0; lane < 32; lane++)
                for (int i = 0; i < K / 16 * 2; i++)
                    for (int j = 0; j < 4; j++)
                        a[lane / 4 + i % 2 * 8][i / 2 * 16 + lane % 4 * 4 + j] = (int8_t)(all[lane][i] >> 8 * j);
            for (int lane = 0; lane < 32; lane++)
                for (int i = 0; i < K / 16; i++)
                    for (int j = 0; j < 4; j++)
                        b[i * 16 + lane % 4 * 4 + j][lane / 4] = (int8_t)(all[lane][4 + i] >> 8 * j);
            for (int row = 0; row < 16; row++) {
                int sum[8] = {0};
                for (int k = 0; k < K; k++)
                    for (int column = 0; column < 8; column++) sum[column] += a[row][k] * b[k][column];
                memcpy(out[row], sum, sizeof sum);
            }
        },
        &sums);
    for (int i = 0; i < 4; i++) c[i] += sums[lane_id() / 4 + i / 2 * 8][lane_id() % 4 * 2 + i % 2];
}
static inline void mma_s8(int32_t c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
    const uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
    host_mma_s8<32>(c, words);
}
static inline void mma_s8_k16(int32_t c[4], uint32_t a0, uint32_t a1, uint32_t b0) {
    const uint32_t words[6] = {a0, a1, 0, 0, b0, 0};
    host_mma_s8<16>(c, words);
}
static inline void mma_f16(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
    HOST_ASIDE;
    const uint32_t words[10] = {a[0], a[1],          a[2],          a[3],          b0,
                                b1,   as_bits(c[0]), as_bits(c[1]), as_bits(c[2]), as_bits(c[3])};
    int32_t (*sums)[8];
    host_exchange(
        words, 10,
        [](uint32_t (*all)[12], int32_t (*out)[8]) {
            float x[16][16], y[16][8], sum[16][8];
            for (int lane = 0; lane < 32; lane++)
                for (int i = 0; i < 6; i++)
                    for (int j = 0; j < 2; j++) {
                        const float number = half_to_float(all[lane][i] >> 16 * j & 0xffff);
                        if (i < 4)
                            x[lane / 4 + i % 2 * 8][i / 2 * 8 + lane % 4 * 2 + j] = number;
                        else
                            y[(i - 4) * 8 + lane % 4 * 2 + j][lane / 4] = number;
                    }
            for (int lane = 0; lane < 32; lane++)
                for (int i = 0; i < 4; i++)
                    sum[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = as_float(all[lane][6 + i]);
            for (int row = 0; row < 16; row++)
                for (int k = 0; k < 16; k++) // a product of two f16 is a float, exactly
                    for (int column = 0; column < 8; column++) sum[row][column] += x[row][k] * y[k][column];
            memcpy(out, sum, sizeof sum);
        },
        &sums);
    for (int i = 0; i < 4; i++) c[i] = as_float((uint32_t)sums[lane_id() / 4 + i / 2 * 8][lane_id() % 4 * 2 + i % 2]);
}

// It happens at some time between its start and the wait: ThreadSanitizer is told of both ends.
static inline void copy_async(uint8_t *shared, const uint8_t *global) {
    HOST_WRITES(shared, 16);
    HOST_READS(global, 16);
    HOST_ASIDE;
    host.fibers[(size_t)host.current].copies.back().push_back({shared, global});
}
static inline void copy_async_commit() {
    HOST_ASIDE;
    host.fibers[(size_t)host.current].copies.emplace_back();
}
template <int N> static inline void copy_async_wait() {
    for (;;) {
        std::vector<host_copy> group;
        {
            HOST_ASIDE;
            auto &copies = host.fibers[(size_t)host.current].copies;
            if (copies.size() <= N + 1) return;
            group = std::move(copies.front());
            copies.erase(copies.begin());
        }
        for (const host_copy &c : group) *(words4 *)(void *)c.to = *(const words4 *)(const void *)c.from;
    }
}

static inline int atomic_add(int *p, int x) {
    const bool fenced = host.fibers[(size_t)host.current].fenced; // else nobody need see what was before
    HOST_ACQUIRE(p);
    if (fenced) HOST_RELEASE(p);
    HOST_ASIDE;
    const int old = *p;
    *p += x;
    return old;
}
static inline void memory_fence() {
    HOST_ASIDE;
    host.fibers[(size_t)host.current].fenced = true;
}
template <class T> static inline T load_fresh(const T *p) { return *p; }
static inline void wait_for_previous() { HOST_ACQUIRE(&host.launched); }
static inline void let_next_start() {}

// Runs body(argument) as a block's `threads` threads, for every block of the grid.
static inline void host_run(int nx, int ny, int nz, int threads, size_t shared_bytes, bool after, void (*body)(void *),
                            void *argument) {
    std::lock_guard<std::mutex> locked(host_lock);
    HOST_RELEASE(&host.launched);
    {
        HOST_ASIDE;
        for (int i = (int)host.fibers.size(); i < threads; i++) {
            host.fibers.emplace_back();
            host_fiber &fiber = host.fibers.back();
            fiber.stack.resize(HOST_STACK_BYTES);
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.data();
            fiber.context.uc_stack.ss_size = HOST_STACK_BYTES;
            fiber.context.uc_link = nullptr;
            makecontext(&fiber.context, host_enter, 0);
#ifdef __SANITIZE_THREAD__
            fiber.tsan = __tsan_create_fiber(0);
#endif
        }
#ifdef __SANITIZE_THREAD__
        host.home.tsan = __tsan_get_current_fiber();
#endif
        host.home.started = true;
        host.warps.resize((size_t)(threads + 31) / 32);
        host.order.resize((size_t)threads);
        host.place.resize((size_t)threads);
        for (int i = 0; i < threads; i++) host.order[(size_t)i] = i;
        host.shared.clear();
        host.n = threads;
        host.nx = nx;
        host.body = body;
        host.argument = argument;
        host.seed = host_seed;
        host.n_launches++;
        host.overlaps = after && host_kernel_last;
        for (host.z = 0; host.z < nz; host.z++)
            for (host.y = 0; host.y < ny; host.y++)
                for (host.x = 0; host.x < nx; host.x++) {
#ifndef __SANITIZE_THREAD__
                    host.shared.clear(); // there every block has its own until the launch has ended
#endif
                    host.shared.emplace_back(shared_bytes + HOST_ORDERED_BYTES, 0xff);
                    host.ordered = host.shared.back().data() + shared_bytes;
                    host.left = threads;
                    host.arrived = host.generation = 0;
                    host.idle = 0;
                    for (host_warp &warp : host.warps) warp.arrived = warp.generation = 0;
                    for (int i = threads; host.seed && i > 1; i--) { // lanes, and then whole warps
                        const int j = i - 1 - (int)host_random((unsigned)((i - 1) % 32 + 1));
                        std::swap(host.order[(size_t)(i - 1)], host.order[(size_t)j]);
                    }
                    for (int i = threads / 32; host.seed && i > 1; i--) {
                        const int j = (int)host_random((unsigned)i);
                        for (int lane = 0; lane < 32; lane++)
                            std::swap(host.order[(size_t)((i - 1) * 32 + lane)], host.order[(size_t)(j * 32 + lane)]);
                    }
                    for (int i = 0; i < threads; i++) {
                        host.place[(size_t)host.order[(size_t)i]] = i;
                        host_fiber &fiber = host.fibers[(size_t)i];
                        fiber.done = fiber.fenced = false;
                        fiber.parity = 0;
                        fiber.copies.assign(1, {});
                    }
                    host.current = host.order[0];
                    host_go(host.home, host.fibers[(size_t)host.current]);
                }
        host_kernel_last = true;
    }
    HOST_ACQUIRE(&host.ended[host.n_launches % 3]);
}

#endif
