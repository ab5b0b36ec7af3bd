// Runs lib/sweeps/cluster.cu on a CPU. The threads of a cluster of thread blocks are fibers of one
// thread, which run in an order drawn from a seed and change at every operation that concerns several
// of them: a missing barrier makes results depend on the seed. Shared memory is full of NaN at first,
// and accesses outside of it or not aligned abort. Products of wgmma are computed as late as the
// program allows, when their group is waited for.
//
// Included before the kernel; defines what the kernel uses of CUDA, and `launch`.
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define EMULATED
#define DEVICE inline
#define __global__
#define __cluster_dims__(...)
#define __launch_bounds__(...)

typedef unsigned int u32;
typedef unsigned long long u64;
struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

namespace emulator {

constexpr int BLOCK_THREADS = 256, STACK = 256 * 1024;

[[noreturn]] inline void fail(const char* message) {
    std::fprintf(stderr, "emulated kernel: %s\n", message);
    std::abort();
}

struct Index { int x; };

// A barrier of `size` threads; the last one to come runs something before all go on.
struct Barrier {
    int count = 0;
    long generation = 0;
};

struct Product {  // of a warpgroup
    const u32* a[128];
    float* sums[128];
    u64 descriptor;
    int matrices, block;
};

struct Warpgroup : Barrier {
    Product now;
    std::vector<Product> open;
    std::vector<std::vector<Product>> groups;
};

struct Warp : Barrier {
    const char* what;
    u32 address[32];
    u32* result[32];
    const u32 *a[32], *b[32];
    float* sums[32];
};

struct Block {
    std::vector<unsigned char> memory;
    Barrier barrier;
    Warp warps[BLOCK_THREADS / 32];
    Warpgroup warpgroups[BLOCK_THREADS / 128];
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    int thread, block;
    long cluster_generation = -1;
    const Barrier* barrier = nullptr;  // what it waits for
    long generation;
    bool done = false;

    bool waits() const { return barrier && barrier->generation == generation; }
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline std::vector<Block> blocks;
inline Barrier cluster;
inline Fiber* current;
inline long progress;
inline int first_block, num_blocks;
inline std::function<void()> body;

inline void yield() { swapcontext(&current->context, &scheduler); }

inline void wait_for(const Barrier& barrier, long generation) {
    current->barrier = &barrier, current->generation = generation;
    yield();
    current->barrier = nullptr;
}

template <class Last>
void meet(Barrier& barrier, int size, Last last) {
    const long generation = barrier.generation;
    if (++barrier.count == size) {
        last();
        barrier.count = 0;
        barrier.generation++;
        progress++;
    }
    wait_for(barrier, generation);
}

inline void enter() {
    body();
    current->done = true;
    progress++;
    yield();
}

inline void run_cluster(int size, int shared_bytes, unsigned seed) {
    blocks.assign(size, Block());
    for (Block& block : blocks) block.memory.assign(shared_bytes, 0xff);
    cluster = Barrier();
    fibers = std::vector<Fiber>(size * BLOCK_THREADS);
    for (size_t i = 0; i < fibers.size(); i++) {
        Fiber& fiber = fibers[i];
        fiber.thread = i % BLOCK_THREADS, fiber.block = i / BLOCK_THREADS;
        fiber.stack.reset(new char[STACK]);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
    }
    std::vector<int> order(fibers.size());
    for (size_t i = 0; i < order.size(); i++) order[i] = i;
    std::mt19937 random(seed);
    int rounds = 0;  // without progress
    for (size_t left = fibers.size(); left > 0;) {
        const long before = progress;
        // Whole warps far ahead of others, as well as threads of one warp.
        if (seed) std::swap(order[random() % order.size()], order[random() % order.size()]);
        left = 0;
        for (size_t i = 0; i < order.size(); i++) {
            Fiber& fiber = fibers[order[seed % 2 ? order.size() - 1 - i : i]];
            if (fiber.done) continue;
            left++;
            if (fiber.waits()) continue;
            if (seed > 1 && random() % 4 == 0) continue;  // it is late
            current = &fiber;
            swapcontext(&scheduler, &fiber.context);
        }
        rounds = progress == before ? rounds + 1 : 0;
        if (rounds > 100 && left) fail("threads wait for each other for ever");
    }
}

inline unsigned char* memory_at(int block, u32 address, int bytes) {
    if (address % (bytes < 16 ? bytes : 16)) fail("an address is not aligned");
    if (block < 0 || block >= (int)blocks.size()) fail("there is no such block");
    if (address + bytes > blocks[block].memory.size()) fail("an address is outside");
    return blocks[block].memory.data() + address;
}

inline float number(uint16_t bits) {
#if FLOAT16
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return half;
#else
    u32 word = (u32)bits << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
#endif
}

inline Warp& warp() { return blocks[current->block].warps[current->thread / 32]; }
inline Warpgroup& warpgroup() {
    return blocks[current->block].warpgroups[current->thread / 128];
}
inline int lane() { return current->thread % 32; }

template <class Last>
void meet_warp(const char* what, Last last) {
    Warp& here = warp();
    if (here.count > 0 && here.what != what) fail("a warp's threads do different things");
    here.what = what;
    meet(here, 32, last);
}

// Element [row][k] of the left operand, 16 x 16, from the registers of a warp.
inline float left(const u32* const* a, int row, int k) {
    const u32 word = a[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)];
    return number(word >> (k % 2 * 16));
}

inline void compute(const Product& product) {
    const u32 start = (product.descriptor & 0x3fff) << 4;
    const u32 along_terms = (product.descriptor >> 16 & 0x3fff) << 4;
    const u32 along_columns = (product.descriptor >> 32 & 0x3fff) << 4;
    if (product.descriptor >> 62) fail("the layout is not without swizzling");
    for (int warp = 0; warp < 4; warp++) {
        float a[16][16];
        for (int row = 0; row < 16; row++)
            for (int k = 0; k < 16; k++) a[row][k] = left(product.a + warp * 32, row, k);
        for (int column = 0; column < product.matrices * 8; column++) {
            float b[16];
            for (int k = 0; k < 16; k++) {
                const u32 address = start + column / 8 * along_columns + k / 8 * along_terms +
                                    column % 8 * 16 + k % 8 * 2;
                uint16_t bits;
                std::memcpy(&bits, memory_at(product.block, address, 2), 2);
                b[k] = number(bits);
            }
            for (int row = 0; row < 16; row++) {
                float sum = 0;
                for (int k = 0; k < 16; k++) sum += a[row][k] * b[k];
                const int thread = warp * 32 + row % 8 * 4 + column % 8 / 2;
                product.sums[thread][column / 8 * 4 + row / 8 * 2 + column % 2] += sum;
            }
        }
    }
}

}  // namespace emulator

#define threadIdx (emulator::Index{emulator::current->thread})
#define blockIdx (emulator::Index{emulator::first_block + emulator::current->block})
#define gridDim (emulator::Index{emulator::num_blocks})

inline u32 shared_base() { return 0; }

inline void load_shared(u32 address, u32 (&v)[4]) {
    std::memcpy(v, emulator::memory_at(emulator::current->block, address, 16), 16);
}
inline float load_shared_float(u32 address) {
    float v;
    std::memcpy(&v, emulator::memory_at(emulator::current->block, address, 4), 4);
    return v;
}
inline void store_shared_float(u32 address, float v) {
    std::memcpy(emulator::memory_at(emulator::current->block, address, 4), &v, 4);
}
inline void store_shared(u32 address, const u32 (&v)[4]) {
    std::memcpy(emulator::memory_at(emulator::current->block, address, 16), v, 16);
}
template <int W>
void store_cluster(u32 address, int block, const u32* v) {
    std::memcpy(emulator::memory_at(block, address, 4 * W), v, 4 * W);
}
inline void copy_async(u32 address, const void* source, bool valid) {
    if (reinterpret_cast<uintptr_t>(source) % 16) emulator::fail("a source is not aligned");
    unsigned char* to = emulator::memory_at(emulator::current->block, address, 16);
    if (valid) std::memcpy(to, source, 16);
    else std::memset(to, 0, 16);
}
inline void wait_copies() {}

inline void cluster_arrive() {
    using namespace emulator;
    if (current->cluster_generation >= 0) fail("a thread arrives twice");
    current->cluster_generation = cluster.generation;
    if (++cluster.count == (int)fibers.size()) {
        cluster.count = 0;
        cluster.generation++;
        progress++;
    }
    yield();
}
inline void cluster_arrive_read() { cluster_arrive(); }
inline void cluster_wait() {
    using namespace emulator;
    if (current->cluster_generation < 0) fail("a thread waits before it arrives");
    wait_for(cluster, current->cluster_generation);
    current->cluster_generation = -1;
}
inline void block_barrier() {
    using namespace emulator;
    meet(blocks[current->block].barrier, BLOCK_THREADS, [] {});
}
inline void warp_barrier() { emulator::meet_warp("barrier", [] {}); }

template <int N>
void load_matrices(u32 address, u32 (&v)[N]) {
    using namespace emulator;
    Warp& here = warp();
    here.address[lane()] = address, here.result[lane()] = v;
    meet_warp("load", [&] {
        for (int i = 0; i < N; i++)
            for (int row = 0; row < 8; row++) {
                const unsigned char* from =
                    memory_at(current->block, here.address[8 * i + row], 16);
                for (int q = 0; q < 4; q++)
                    std::memcpy(here.result[row * 4 + q] + i, from + 4 * q, 4);
            }
    });
}

inline void multiply_accumulate(float* d, const u32 (&a)[4], const u32 (&b)[2]) {
    using namespace emulator;
    Warp& here = warp();
    here.sums[lane()] = d, here.a[lane()] = a, here.b[lane()] = b;
    meet_warp("product", [&] {
        for (int row = 0; row < 16; row++)
            for (int column = 0; column < 8; column++) {
                float sum = 0;
                for (int k = 0; k < 16; k++) {
                    const u32 word = here.b[column * 4 + k % 8 / 2][k / 8];
                    sum += left(here.a, row, k) * number(word >> (k % 2 * 16));
                }
                here.sums[row % 8 * 4 + column / 2][row / 8 * 2 + column % 2] += sum;
            }
    });
}

template <int MATRICES>
struct Wgmma {
    static void run(float (&sums)[MATRICES * 4], const u32* a, u64 descriptor) {
        using namespace emulator;
        Warpgroup& here = warpgroup();
        const int thread = current->thread % 128;
        if (here.count > 0 && (here.now.descriptor != descriptor || here.now.matrices != MATRICES))
            fail("a warpgroup's threads multiply different things");
        here.now.descriptor = descriptor, here.now.matrices = MATRICES;
        here.now.block = current->block;
        here.now.a[thread] = a, here.now.sums[thread] = sums;
        meet(here, 128, [&] { here.open.push_back(here.now); });
    }
};
inline void warpgroup_fence() { emulator::meet(emulator::warpgroup(), 128, [] {}); }
inline void warpgroup_commit() {
    using namespace emulator;
    Warpgroup& here = warpgroup();
    meet(here, 128, [&] {
        here.groups.push_back(here.open);
        here.open.clear();
    });
}
template <int N>
void warpgroup_wait() {
    using namespace emulator;
    Warpgroup& here = warpgroup();
    meet(here, 128, [&] {
        while (here.groups.size() > N) {
            for (const Product& product : here.groups.front()) compute(product);
            here.groups.erase(here.groups.begin());
        }
    });
}

inline float exp2_approximate(float x) { return __builtin_exp2f(x); }
inline float reciprocal(float x) { return 1 / x; }
inline float as_float(u32 v) {
    float value;
    std::memcpy(&value, &v, 4);
    return value;
}
inline u32 round_bfloat16(float value) {
    u32 bits;
    std::memcpy(&bits, &value, 4);
    if (value != value) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline u32 pack_bfloat16(float low, float high) {
    return round_bfloat16(low) | round_bfloat16(high) << 16;
}
inline u32 pack_float16(float low, float high) {
    const _Float16 both[2] = {(_Float16)low, (_Float16)high};
    u32 word;
    std::memcpy(&word, both, 4);
    return word;
}
inline void unpack_float16(u32 v, float& low, float& high) {
    _Float16 both[2];
    std::memcpy(both, &v, 4);
    low = both[0], high = both[1];
}

#include SOURCE

#if BACKWARD
typedef BackwardArguments Arguments;
#else
typedef ForwardArguments Arguments;
#endif

extern "C" int arguments_size() { return sizeof(Arguments); }

extern "C" void launch(const Arguments* arguments, int grid, int shared_bytes, unsigned seed) {
    emulator::num_blocks = grid;
    for (int first = 0; first < grid; first += CLUSTER) {
        emulator::first_block = first;
        emulator::body = [=] { sweep_kernel(*arguments); };
        emulator::run_cluster(CLUSTER, shared_bytes, seed);
    }
}
