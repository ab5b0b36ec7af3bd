// The sequential part of a sweep, forward or backward, as one kernel: see cluster_backend.py for the
// equations, for what is computed before and after it, and for how its constants are chosen.
//
// A cluster of CLUSTER thread blocks owns some images for the whole sweep. Each block keeps its share
// of weight_ih in shared memory, UNITS units of 8 channels with three gates, and multiplies all rows
// (images x positions) of its cluster by them. Two warpgroups share the work: with GROUPS = 2 they
// take half of the columns of one tile of 64 rows each, with GROUPS = 1 a tile each.
//
// Constants, set when it is compiled: C (channels, a multiple of 8), CLUSTER, UNITS, GROUPS,
// FLOAT16 (products have operands in float16, otherwise bfloat16), FEATURES (0 float32, 1 bfloat16,
// 2 float16), KEEPS (forward stores the coefficients of the backward sweep), BACKWARD, WGMMA
// (products by Hopper's wgmma instruction, otherwise by mma.sync).
//
// Products. The operand A is the rows: in shared memory a row of zeros comes before each image and
// after the last, so that the neighbours j-1, j, j+1 of a position are a window of three adjacent
// rows. Rows are an odd number of 16 bytes apart: ldmatrix reads 8 of them without conflicts. The
// operand B, the weights, is an array of core matrices, 8 columns x 8 terms of the sum in 128 bytes
// without gaps, which both wgmma and ldmatrix read without conflicts: [term / 8][column / 8]. A
// lane's accumulators hold the columns 2q and 2q + 1 (q = lane % 4) of each core matrix. Channels are
// dealt out to columns such that W (4, 2 or 1) matrices together give a lane 2W adjacent channels,
// which it loads and stores at once: see `channel_of_column`.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr int THREADS = 256;
constexpr int ALL_UNITS = C / 8;

struct ForwardArguments {
    const void* lines;      // features before the sweep
    void* corrected;        // the result, laid out in the same way
    const void* own;        // [line of the block, position, image, 3C]: lines @ weight_hh^T; r, z, m
    void* coefficients;     // [line of the block, position, image, 5C]: a_n, a_r, a_z, a_m, z
    const void* weight;     // weight_ih [3C, 3C], rows of the gates n, r, z
    const float* bias;      // [4C]: n, r, z, m
    i64 line_stride, position_stride, image_stride;  // of lines and corrected, in numbers
    int num_lines, num_positions, batch;             // num_lines are visited: a block of the sweep
    int images;             // of a cluster at a time
    int first;              // the line visited first
    int step;               // 1 or -1, to the line visited next
    int block_start;        // the block's first line in memory
    int continues;          // whether lines were visited before
    int keep_first;         // whether the line visited first stays as it is
};

struct BackwardArguments {
    const void* grad_corrected;  // the incoming gradient
    void* grad_lines;            // the part that comes through z, laid out in the same way
    const void* coefficients;    // as above
    void* gates;                 // [line of the block, position, image, 4C]: gradients of n, r, z, m
    const void* next_gates;      // [position, image, 4C], of the line visited just after; or null
    const void* weight;          // the transpose of weight_ih [3C, 3C], columns of n, r, z
    i64 line_stride, position_stride, image_stride;
    int num_lines, num_positions, batch, images, first, step, block_start;
    int sums_offset;             // bytes from the rows to the partial sums; 0: one lies on the other
};

// ---- what the device can do; tests replace it by an emulation ------------------------------------
#ifndef EMULATED

#define DEVICE __device__ __forceinline__

extern __shared__ __align__(128) unsigned char shared_memory[];

DEVICE u32 shared_base() { return static_cast<u32>(__cvta_generic_to_shared(shared_memory)); }

DEVICE void load_shared(u32 address, u32 (&v)[4]) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(address) : "memory");
}

DEVICE float load_shared_float(u32 address) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
    return v;
}

DEVICE void store_shared_float(u32 address, float v) {
    asm volatile("st.shared.f32 [%0], %1;" :: "r"(address), "f"(v) : "memory");
}

DEVICE void store_shared(u32 address, const u32 (&v)[4]) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
                 :: "r"(address), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
}

// Stores W words in the shared memory of a block of the cluster, where the address is in this one's.
template <int W>
DEVICE void store_cluster(u32 address, int block, const u32* v) {
    u32 remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(block));
    if constexpr (W == 4) {
        asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};"
                     :: "r"(remote), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
    } else if constexpr (W == 2) {
        asm volatile("st.shared::cluster.v2.u32 [%0], {%1, %2};"
                     :: "r"(remote), "r"(v[0]), "r"(v[1]) : "memory");
    } else {
        asm volatile("st.shared::cluster.u32 [%0], %1;" :: "r"(remote), "r"(v[0]) : "memory");
    }
}

// Copies 16 bytes to shared memory; zeros if not `valid`.
DEVICE void copy_async(u32 address, const void* source, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(address), "l"(__cvta_generic_to_global(source)), "r"(valid ? 16 : 0)
                 : "memory");
}

// Waits for the copies of this thread, and shows them to wgmma.
DEVICE void wait_copies() {
    asm volatile("cp.async.wait_all;" ::: "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
}

// What a thread has stored before it arrives is seen by all that wait for it. The second form promises
// nothing about stores, and waits for none: it says that values have been read, and used.
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
DEVICE void cluster_arrive_read() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
DEVICE void block_barrier() { __syncthreads(); }
DEVICE void warp_barrier() { __syncwarp(); }

// Four 8 x 8 matrices of 16-bit numbers; lane i gives the address of row i % 8 of matrix i / 8.
DEVICE void load_matrices(u32 address, u32 (&v)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(address) : "memory");
}

DEVICE void load_matrices(u32 address, u32 (&v)[2]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(v[0]), "=r"(v[1]) : "r"(address) : "memory");
}

// 16 rows of a warp times 8 columns, 16 terms.
DEVICE void multiply_accumulate(float* d, const u32 (&a)[4], const u32 (&b)[2]) {
#if FLOAT16
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#endif
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

DEVICE void warpgroup_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
DEVICE void warpgroup_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory");
}

DEVICE float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two numbers in 16 bits each, the first in the lower half.
DEVICE u32 pack_bfloat16(float low, float high) {
    u32 v;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}

DEVICE u32 pack_float16(float low, float high) {
    u32 v;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}

DEVICE void unpack_float16(u32 v, float& low, float& high) {
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
        : "=f"(low), "=f"(high) : "r"(v));
}

DEVICE float as_float(u32 v) { return __uint_as_float(v); }

#endif
// --------------------------------------------------------------------------------------------------

template <int W>
DEVICE void load_global(const void* from, u32* v) {  // W words
    if constexpr (W >= 4) {
#pragma unroll
        for (int i = 0; i < W / 4; i++) {
            const uint4 four = static_cast<const uint4*>(from)[i];
            v[4 * i] = four.x, v[4 * i + 1] = four.y, v[4 * i + 2] = four.z, v[4 * i + 3] = four.w;
        }
    } else if constexpr (W == 2) {
        const uint2 two = *static_cast<const uint2*>(from);
        v[0] = two.x, v[1] = two.y;
    } else {
        v[0] = *static_cast<const u32*>(from);
    }
}

template <int W>
DEVICE void store_global(void* to, const u32* v) {
    if constexpr (W >= 4) {
#pragma unroll
        for (int i = 0; i < W / 4; i++)
            static_cast<uint4*>(to)[i] =
                make_uint4(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
    } else if constexpr (W == 2) {
        *static_cast<uint2*>(to) = make_uint2(v[0], v[1]);
    } else {
        *static_cast<u32*>(to) = v[0];
    }
}

// TYPE: 0 float32, 1 bfloat16, 2 float16. WORDS: of two numbers.
template <int TYPE>
struct Numbers {
    static constexpr int WORDS = TYPE == 0 ? 2 : 1;
    static constexpr int BYTES = TYPE == 0 ? 4 : 2;

    static DEVICE void unpack(const u32* v, float& low, float& high) {
        if constexpr (TYPE == 0) low = as_float(v[0]), high = as_float(v[1]);
        if constexpr (TYPE == 1) low = as_float(v[0] << 16), high = as_float(v[0] & 0xffff0000u);
        if constexpr (TYPE == 2) unpack_float16(v[0], low, high);
    }

    static DEVICE void pack(float low, float high, u32* v) {
        if constexpr (TYPE == 0) v[0] = as_bits(low), v[1] = as_bits(high);
        if constexpr (TYPE == 1) v[0] = pack_bfloat16(low, high);
        if constexpr (TYPE == 2) v[0] = pack_float16(low, high);
    }

    static DEVICE u32 as_bits(float x) {
        union { float f; u32 u; } both;
        both.f = x;
        return both.u;
    }
};

using Product = Numbers<FLOAT16 ? 2 : 1>;
using Feature = Numbers<FEATURES>;

DEVICE const char* at(const void* base, i64 number, int bytes) {
    return static_cast<const char*>(base) + number * bytes;
}
DEVICE char* at(void* base, i64 number, int bytes) {
    return static_cast<char*>(base) + number * bytes;
}

// COUNT units of 8 channels are taken in groups of W = 4, 2 and 1, as many of the wider as there are.
constexpr int group_width(int left) { return left >= 4 ? 4 : left >= 2 ? 2 : 1; }

template <int V>
struct Constant {
    static constexpr int value = V;
};

// Calls f(first unit, W) for each group of COUNT units; both are constants.
template <int COUNT, int FIRST = 0, class Function>
DEVICE void for_groups(Function&& f) {
    if constexpr (FIRST < COUNT) {
        constexpr int W = group_width(COUNT - FIRST);
        f(Constant<FIRST>{}, Constant<W>{});
        for_groups<COUNT, FIRST + W>(f);
    }
}

// The channel in column `column` of the core matrix of a unit, among `count` units. In a group of W
// units that begins with unit g, column 2q + e of unit g + i has channel 8g + 2Wq + 2i + e.
DEVICE int channel_of_column(int unit, int count, int column) {
    int g = 0, w = group_width(count);
    while (unit >= g + w) {
        g += w;
        w = group_width(count - g);
    }
    return 8 * g + 2 * w * (column / 2) + 2 * (unit - g) + column % 2;
}

// acc += window @ weights, for 16 rows of each warp and MATRICES core matrices of columns.
//   a: where this lane's row of the window begins (row lane % 16; 16 bytes on for lanes from 16)
//   b: this warpgroup's first core matrix
//   K_BLOCKS: terms / 8, an odd number, at least 3; STRIDE: bytes between core matrices along them
// Steps are of 16 terms. The last step begins 8 terms early, and multiplies these by zero.
template <int MATRICES, int K_BLOCKS, int STRIDE>
DEVICE void multiply(float (&acc)[MATRICES * 4], u32 a, u32 b, int lane) {
    static_assert(K_BLOCKS % 2 == 1 && K_BLOCKS >= 3, "");
    constexpr int STEPS = (K_BLOCKS + 1) / 2;
    warp_barrier();
#if WGMMA
    constexpr int CHUNK = 4, CHUNKS = (STEPS + CHUNK - 1) / CHUNK;
    // Without swizzling: from one core matrix to the next 128 bytes along the columns, STRIDE bytes
    // along the terms.
    const u64 descriptor =
        static_cast<u64>((b & 0x3ffff) >> 4) | static_cast<u64>(STRIDE >> 4) << 16 |
        static_cast<u64>(128 >> 4) << 32;
    u32 rows[2][CHUNK][4];
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        // The products that read these registers last are those of two chunks before.
        if (chunk >= 2) warpgroup_wait<1>();
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
            const int step = chunk * CHUNK + i;
            if (step >= STEPS) continue;
            const int block = step == STEPS - 1 ? K_BLOCKS - 2 : 2 * step;
            load_matrices(a + block * 16, rows[chunk % 2][i]);
            if (step == STEPS - 1) rows[chunk % 2][i][0] = rows[chunk % 2][i][1] = 0;
        }
        warpgroup_fence();
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
            const int step = chunk * CHUNK + i;
            if (step >= STEPS) continue;
            const int block = step == STEPS - 1 ? K_BLOCKS - 2 : 2 * step;
            Wgmma<MATRICES>::run(acc, rows[chunk % 2][i], descriptor + block * (STRIDE >> 4));
        }
        warpgroup_commit();
    }
    warpgroup_wait<0>();
#else
    const u32 b_row = b + lane % 8 * 16 + lane / 8 % 2 * STRIDE;
    for (int step = 0; step < STEPS; step++) {
        const int block = step == STEPS - 1 ? K_BLOCKS - 2 : 2 * step;
        u32 rows[4], columns[2];
        load_matrices(a + block * 16, rows);
        if (step == STEPS - 1) rows[0] = rows[1] = 0;
#pragma unroll
        for (int matrix = 0; matrix < MATRICES; matrix++) {
            load_matrices(b_row + block * STRIDE + matrix * 128, columns);
            multiply_accumulate(acc + 4 * matrix, rows, columns);
        }
    }
#endif
}

// Where rows are: row (image, position) among those of a cluster.
struct Place {
    int image, position;  // the image is counted from the cluster's first
    bool valid;

    DEVICE Place(int row, int first_image, int images, int num_positions, int batch) {
        image = row / num_positions;
        position = row % num_positions;
        valid = image < images && first_image + image < batch;
        if (!valid) image = position = 0;
    }

    // In shared memory the row before it, with which its window begins.
    DEVICE int window(int num_positions) const { return image * (num_positions + 1) + position; }
};

DEVICE void fill_zeros(u32 address, int bytes, int thread) {
    const u32 zeros[4] = {0, 0, 0, 0};
    for (int i = thread * 16; i < bytes; i += THREADS * 16) store_shared(address + i, zeros);
}

#if !BACKWARD

constexpr int FIRST_HALF = (UNITS + 1) / 2;  // units of the first warpgroup
// Numbers from a row of the previous line to the next.
constexpr int ROW = ALL_UNITS % 2 ? C : C + 8;
constexpr int K_BLOCKS = 3 * ROW / 8;
constexpr int MATRICES = 3 * UNITS;  // of columns: [unit, gate n, r, z]
constexpr int STRIDE = MATRICES * 128;

DEVICE float sigmoid(float x) { return reciprocal(1 + exp2_approximate(-1.4426950408889634f * x)); }

// What a thread needs of a line beside its neighbours: for two rows the products of its own features
// with weight_hh, and its features.
template <int COUNT>
struct Own {
    u32 gates[2][3][COUNT];
    u32 features[2][COUNT * Feature::WORDS];
};

template <int COUNT, bool SECOND>
DEVICE void sweep_forward(const ForwardArguments& args, u32 weights, u32 bias, u32 rows) {
    constexpr int FIRST_UNIT = SECOND ? FIRST_HALF : 0;
    constexpr int ROOM = COUNT ? COUNT : 1;  // the second warpgroup can have no units
    const int thread = threadIdx.x, lane = thread % 32, q = lane % 4;
    const int rank = blockIdx.x % CLUSTER, num_clusters = gridDim.x / CLUSTER;
    const int P = args.num_positions, batch = args.batch, images = args.images;
    const int tile_row = (GROUPS == 2 ? 0 : thread / 128 * 64) + thread / 32 % 4 * 16;

    for (int first_image = blockIdx.x / CLUSTER * images; first_image < batch;
         first_image += num_clusters * images) {
        const Place window(tile_row + lane % 16, first_image, images, P, batch);
        const u32 a = rows + (window.window(P) * ROW + lane / 16 * 8) * 2;
        const Place places[2] = {Place(tile_row + lane / 4, first_image, images, P, batch),
                                 Place(tile_row + lane / 4 + 8, first_image, images, P, batch)};

        if (args.continues) {  // the line visited last, by an earlier launch
            const int num_chunks = images * P * ALL_UNITS;
            for (int i = thread; i < num_chunks; i += THREADS) {
                const Place place(i / ALL_UNITS, first_image, images, P, batch);
                if (!place.valid) continue;
                const int channel = i % ALL_UNITS * 8;
                const i64 from = (args.first - args.step) * args.line_stride +
                                 place.position * args.position_stride +
                                 (first_image + place.image) * args.image_stride + channel;
                u32 features[4 * Feature::WORDS], packed[4];
                load_global<4 * Feature::WORDS>(at(args.corrected, from, Feature::BYTES), features);
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    float low, high;
                    Feature::unpack(features + j * Feature::WORDS, low, high);
                    Product::pack(low, high, packed + j);
                }
                store_shared(rows + ((place.window(P) + 1) * ROW + channel) * 2, packed);
            }
            block_barrier();
        }

        // Calls f(row, first unit of a group, W, the lane's first channel) where there is something.
        auto for_places = [&](auto&& f) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                for_groups<COUNT>([&](auto first, auto width) {
                    constexpr int G = decltype(first)::value, W = decltype(width)::value;
                    const int channel = (rank * UNITS + FIRST_UNIT + G) * 8 + 2 * W * q;
                    if (places[half].valid && channel < C) f(half, first, width, channel);
                });
            }
        };
        auto in_lines = [&](int half, int line, int channel) {
            return line * args.line_stride + places[half].position * args.position_stride +
                   (first_image + places[half].image) * args.image_stride + channel;
        };
        auto in_rows = [&](int half, int line) {  // rows of the block's lines
            return (static_cast<i64>(line - args.block_start) * P + places[half].position) * batch +
                   first_image + places[half].image;
        };
        auto fetch = [&](int line, Own<ROOM>& own) {
            for_places([&](int half, auto first, auto width, int channel) {
                constexpr int G = decltype(first)::value, W = decltype(width)::value;
                const char* gates = at(args.own, in_rows(half, line) * (3 * C) + channel, 2);
#pragma unroll
                for (int gate = 0; gate < 3; gate++)
                    load_global<W>(gates + gate * C * 2, own.gates[half][gate] + G);
                load_global<W * Feature::WORDS>(
                    at(args.lines, in_lines(half, line, channel), Feature::BYTES),
                    own.features[half] + G * Feature::WORDS);
            });
        };

        Own<ROOM> own = {};
        fetch(args.first, own);
        for (int k = 0; k < args.num_lines; k++) {
            const int line = args.first + k * args.step;
            const bool is_kept = k == 0 && !args.continues && args.keep_first;
            float sums[ROOM * 12];
#pragma unroll
            for (int i = 0; i < COUNT * 12; i++) sums[i] = 0;
            if constexpr (COUNT > 0)
                if (k > 0 || args.continues)
                    multiply<COUNT * 3, K_BLOCKS, STRIDE>(sums, a, weights + FIRST_UNIT * 384, lane);
            cluster_arrive_read();  // the line visited before

            u32 packed[2][ROOM];
            float value[2][2 * ROOM];
#if KEEPS
            u32 kept[2][5][ROOM];  // the coefficients, packed at once: registers are few
#endif
            for_places([&](int half, auto first, auto width, int channel) {
                constexpr int G = decltype(first)::value, W = decltype(width)::value;
#pragma unroll
                for (int i = 0; i < W; i++) {
                    float own_r[2], own_z[2], own_m[2], h[2];
                    Product::unpack(own.gates[half][0] + G + i, own_r[0], own_r[1]);
                    Product::unpack(own.gates[half][1] + G + i, own_z[0], own_z[1]);
                    Product::unpack(own.gates[half][2] + G + i, own_m[0], own_m[1]);
                    Feature::unpack(own.features[half] + (G + i) * Feature::WORDS, h[0], h[1]);
#if KEEPS
                    float a[5][2];
#endif
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const float* sum = sums + (G + i) * 12 + half * 2 + e;
                        const u32 b = bias + (channel - rank * UNITS * 8 + 2 * i + e) * 4;
                        const float r = sigmoid(sum[4] + own_r[e] +
                                                load_shared_float(b + UNITS * 8 * 4));
                        float z = sigmoid(sum[8] + own_z[e] +
                                          load_shared_float(b + 2 * UNITS * 8 * 4));
                        const float m = own_m[e] + load_shared_float(b + 3 * UNITS * 8 * 4);
                        const float n =  // the hyperbolic tangent
                            2 * sigmoid(2 * (sum[0] + load_shared_float(b) + r * m)) - 1;
                        if (is_kept) z = 1;
                        value[half][2 * (G + i) + e] = is_kept ? h[e] : n + z * (h[e] - n);
#if KEEPS
                        a[0][e] = (1 - z) * (1 - n * n);
                        a[3][e] = a[0][e] * r;
                        a[1][e] = a[3][e] * m * (1 - r);
                        a[2][e] = (h[e] - n) * z * (1 - z);
                        a[4][e] = z;
#endif
                    }
#if KEEPS
#pragma unroll
                    for (int j = 0; j < 5; j++)
                        Product::pack(a[j][0], a[j][1], kept[half][j] + G + i);
#endif
                    Product::pack(value[half][2 * (G + i)], value[half][2 * (G + i) + 1],
                                  packed[half] + G + i);
                }
            });

            cluster_wait();  // all threads have
            for_places([&](int half, auto first, auto width, int channel) {
                constexpr int G = decltype(first)::value, W = decltype(width)::value;
                const u32 to = rows + ((places[half].window(P) + 1) * ROW + channel) * 2;
#pragma unroll
                for (int block = 0; block < CLUSTER; block++)
                    store_cluster<W>(to, block, packed[half] + G);
            });
            cluster_arrive();  // this thread's part of the line is there

            for_places([&](int half, auto first, auto width, int channel) {
                constexpr int G = decltype(first)::value, W = decltype(width)::value;
                u32 words[W * Feature::WORDS];
#pragma unroll
                for (int i = 0; i < W; i++)
                    Feature::pack(value[half][2 * (G + i)], value[half][2 * (G + i) + 1],
                                  words + i * Feature::WORDS);
                store_global<W * Feature::WORDS>(
                    at(args.corrected, in_lines(half, line, channel), Feature::BYTES), words);
#if KEEPS
                char* coefficients = at(args.coefficients, in_rows(half, line) * (5 * C) + channel, 2);
#pragma unroll
                for (int j = 0; j < 5; j++)
                    store_global<W>(coefficients + j * C * 2, kept[half][j] + G);
#endif
            });
            if (k + 1 < args.num_lines) fetch(line + args.step, own);
            cluster_wait();  // the line is complete, in all blocks
        }
    }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
    sweep_kernel(const ForwardArguments args) {
    const int thread = threadIdx.x, lane = thread % 32, rank = blockIdx.x % CLUSTER;
    const u32 weights = shared_base();
    const u32 bias = weights + K_BLOCKS * STRIDE;
    const u32 rows = bias + 4 * UNITS * 8 * 4;
    const int num_rows = args.images * (args.num_positions + 1) + 1;

    for (int matrix = thread / 32; matrix < MATRICES; matrix += THREADS / 32) {
        const int unit = matrix / 3, gate = matrix % 3;
        const int first = GROUPS == 2 && unit >= FIRST_HALF ? FIRST_HALF : 0;
        const int count = GROUPS == 1 ? UNITS : first ? UNITS - FIRST_HALF : FIRST_HALF;
        const int channel =
            (rank * UNITS + first) * 8 + channel_of_column(unit - first, count, lane % 8);
        const i64 row = static_cast<i64>(gate * C + channel) * (3 * C);
        for (int block = lane / 8; block < K_BLOCKS; block += 4) {
            const int neighbour = block / (ROW / 8), from = block % (ROW / 8) * 8;
            const bool valid = channel < C && from < C;
            copy_async(weights + block * STRIDE + matrix * 128 + lane % 8 * 16,
                       at(args.weight, valid ? row + neighbour * C + from : 0, 2), valid);
        }
    }
    for (int i = thread; i < 4 * UNITS * 8; i += THREADS) {
        const int channel = rank * UNITS * 8 + i % (UNITS * 8);
        store_shared_float(bias + i * 4,
                           channel < C ? args.bias[i / (UNITS * 8) * C + channel] : 0.0f);
    }
    fill_zeros(rows, num_rows * ROW * 2, thread);
    wait_copies();
    block_barrier();
    cluster_arrive();
    cluster_wait();

    if constexpr (GROUPS == 1) {
        sweep_forward<UNITS, false>(args, weights, bias, rows);
    } else {
        if (thread < 128) sweep_forward<FIRST_HALF, false>(args, weights, bias, rows);
        else sweep_forward<UNITS - FIRST_HALF, true>(args, weights, bias, rows);
    }
}

#else

// Each block has the gradients of its own channels' gates, in rows of n, r, z, and multiplies them by
// its rows of weight_ih, which gives partial sums for all channels. It sends them to the blocks of
// these channels, which add them in the order of the blocks.
constexpr int ROW = UNITS * 24 + (UNITS % 2 ? 0 : 8);
constexpr int K_BLOCKS = 3 * ROW / 8;
constexpr int STRIDE = ALL_UNITS * 128;
constexpr int ITEMS = (128 / GROUPS * UNITS + THREADS - 1) / THREADS;  // (row, unit), of a thread
constexpr int FIRST_BLOCKS = GROUPS == 2 ? (CLUSTER + 1) / 2 : CLUSTER;  // of the first warpgroup

constexpr int smaller(int a, int b) { return a < b ? a : b; }
constexpr int larger(int a, int b) { return a > b ? a : b; }
// The units that a block has, of which the last blocks can have fewer, or none.
constexpr int units_of(int block) { return larger(0, smaller(UNITS, ALL_UNITS - block * UNITS)); }

// Calls f(block, its first unit among these blocks) for each; both are constants.
template <int BLOCK, int END, int FIRST = 0, class Function>
DEVICE void for_blocks(Function&& f) {
    if constexpr (BLOCK < END) {
        f(Constant<BLOCK>{}, Constant<FIRST>{});
        for_blocks<BLOCK + 1, END, FIRST + units_of(BLOCK)>(f);
    }
}

// What a thread needs of a line for one of its items.
struct Item {
    u32 coefficients[5][4];
    u32 gradient[4 * Feature::WORDS];
};

template <int BLOCK, int END>
DEVICE void sweep_backward(const BackwardArguments& args, u32 weights, u32 rows) {
    constexpr int FIRST_UNIT = smaller(BLOCK * UNITS, ALL_UNITS);
    constexpr int COUNT = smaller(END * UNITS, ALL_UNITS) - FIRST_UNIT;
    const int thread = threadIdx.x, lane = thread % 32, q = lane % 4;
    const int rank = blockIdx.x % CLUSTER, num_clusters = gridDim.x / CLUSTER;
    const int P = args.num_positions, batch = args.batch, images = args.images;
    const int num_rows = images * P;
    const int tile_row = (GROUPS == 2 ? 0 : thread / 128 * 64) + thread / 32 % 4 * 16;
    const u32 sums = rows + args.sums_offset;  // [block, row, unit, 8]
    const bool overlap = args.sums_offset == 0;
    const u32 zeros[4] = {0, 0, 0, 0};

    for (int first_image = blockIdx.x / CLUSTER * images; first_image < batch;
         first_image += num_clusters * images) {
        const Place window(tile_row + lane % 16, first_image, images, P, batch);
        const u32 a = rows + (window.window(P) * ROW + lane / 16 * 8) * 2;
        const bool valid[2] = {
            Place(tile_row + lane / 4, first_image, images, P, batch).valid,
            Place(tile_row + lane / 4 + 8, first_image, images, P, batch).valid};

        // Calls f(index, row, unit, first channel, place) for the items of this thread.
        auto for_items = [&](auto&& f) {
#pragma unroll
            for (int index = 0; index < ITEMS; index++) {
                const int item = thread + index * THREADS;
                const int row = item / UNITS, unit = item % UNITS;
                const Place place(row, first_image, images, P, batch);
                const int channel = (rank * UNITS + unit) * 8;
                if (place.valid && channel < C) f(index, row, unit, channel, place);
            }
        };
        auto in_lines = [&](const Place& place, int line, int channel) {
            return line * args.line_stride + place.position * args.position_stride +
                   (first_image + place.image) * args.image_stride + channel;
        };
        auto in_rows = [&](const Place& place, int line) {
            return (static_cast<i64>(line - args.block_start) * P + place.position) * batch +
                   first_image + place.image;
        };
        auto in_memory = [&](const Place& place, int gate, int unit) {
            return rows + ((place.window(P) + 1) * ROW + (gate * UNITS + unit) * 8) * 2;
        };
        auto clear_padding = [&]() {  // where partial sums lay
            for (int i = thread; i < (images + 1) * (ROW / 8); i += THREADS)
                store_shared(rows + (i / (ROW / 8) * (P + 1) * ROW + i % (ROW / 8) * 8) * 2, zeros);
        };
        auto fetch = [&](int line, Item (&items)[ITEMS]) {
            for_items([&](int index, int, int, int channel, const Place& place) {
                const char* from = at(args.coefficients, in_rows(place, line) * (5 * C) + channel, 2);
#pragma unroll
                for (int j = 0; j < 5; j++)
                    load_global<4>(from + j * C * 2, items[index].coefficients[j]);
                load_global<4 * Feature::WORDS>(
                    at(args.grad_corrected, in_lines(place, line, channel), Feature::BYTES),
                    items[index].gradient);
            });
        };

        if (args.next_gates) {  // of the line visited just after, by an earlier launch
            for_items([&](int, int, int unit, int channel, const Place& place) {
                const i64 row = static_cast<i64>(place.position) * batch + first_image + place.image;
#pragma unroll
                for (int gate = 0; gate < 3; gate++) {
                    u32 words[4];
                    load_global<4>(at(args.next_gates, row * (4 * C) + gate * C + channel, 2),
                                   words);
                    store_shared(in_memory(place, gate, unit), words);
                }
            });
            clear_padding();
            block_barrier();
        }
        if (!overlap) cluster_arrive_read();  // partial sums can be received

        Item items[ITEMS] = {};
        fetch(args.first, items);
        for (int k = 0; k < args.num_lines; k++) {
            const int line = args.first + k * args.step;
            float total[ITEMS][8];
            for_items([&](int index, int, int, int, const Place&) {
#pragma unroll
                for (int j = 0; j < 4; j++)
                    Feature::unpack(items[index].gradient + j * Feature::WORDS, total[index][2 * j],
                                    total[index][2 * j + 1]);
            });

            if (k > 0 || args.next_gates) {
                if constexpr (COUNT > 0) {
                    float products[COUNT * 4];
#pragma unroll
                    for (int i = 0; i < COUNT * 4; i++) products[i] = 0;
                    multiply<COUNT, K_BLOCKS, STRIDE>(products, a, weights + FIRST_UNIT * 128, lane);
                    if (overlap) cluster_arrive_read();  // the rows
                    cluster_wait();                      // all blocks can receive
                    for_blocks<BLOCK, END>([&](auto block, auto first_unit) {
                        constexpr int TO = decltype(block)::value;
                        constexpr int UNIT = decltype(first_unit)::value;
                        for_groups<units_of(TO)>([&](auto first, auto width) {
                            constexpr int G = decltype(first)::value, W = decltype(width)::value;
#pragma unroll
                            for (int half = 0; half < 2; half++) {
                                if (!valid[half]) continue;
                                u32 packed[W];
#pragma unroll
                                for (int i = 0; i < W; i++) {
                                    const float* two = products + (UNIT + G + i) * 4 + half * 2;
                                    Product::pack(two[0], two[1], packed + i);
                                }
                                const int row = tile_row + lane / 4 + half * 8;
                                store_cluster<W>(
                                    sums + (((rank * num_rows + row) * UNITS + G) * 8 + 2 * W * q) * 2,
                                    TO, packed);
                            }
                        });
                    });
                } else {
                    if (overlap) cluster_arrive_read();
                    cluster_wait();
                }
                cluster_arrive();  // this thread's partial sums are there
                cluster_wait();    // all are
                for_items([&](int index, int row, int unit, int, const Place&) {
#pragma unroll
                    for (int block = 0; block < CLUSTER; block++) {
                        u32 part[4];
                        load_shared(sums + ((block * num_rows + row) * UNITS + unit) * 16, part);
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            float low, high;
                            Product::unpack(part + j, low, high);
                            total[index][2 * j] += low;
                            total[index][2 * j + 1] += high;
                        }
                    }
                });
                if (overlap) {
                    block_barrier();  // nobody reads partial sums any more
                    clear_padding();
                }
            }

            for_items([&](int index, int, int unit, int channel, const Place& place) {
                u32 gates[4][4], through_z[4 * Feature::WORDS];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float first = total[index][2 * j], second = total[index][2 * j + 1];
                    float low, high;
#pragma unroll
                    for (int gate = 0; gate < 4; gate++) {
                        Product::unpack(items[index].coefficients[gate] + j, low, high);
                        Product::pack(first * low, second * high, gates[gate] + j);
                    }
                    Product::unpack(items[index].coefficients[4] + j, low, high);
                    Feature::pack(first * low, second * high, through_z + j * Feature::WORDS);
                }
#pragma unroll
                for (int gate = 0; gate < 3; gate++)
                    store_shared(in_memory(place, gate, unit), gates[gate]);
                char* to = at(args.gates, in_rows(place, line) * (4 * C) + channel, 2);
#pragma unroll
                for (int gate = 0; gate < 4; gate++) store_global<4>(to + gate * C * 2, gates[gate]);
                store_global<4 * Feature::WORDS>(
                    at(args.grad_lines, in_lines(place, line, channel), Feature::BYTES), through_z);
            });
            if (k + 1 < args.num_lines) fetch(line + args.step, items);
            block_barrier();  // the rows are complete
            if (!overlap && (k > 0 || args.next_gates)) cluster_arrive_read();  // partial sums
        }
        if (!overlap) cluster_wait();
    }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
    sweep_kernel(const BackwardArguments args) {
    const int thread = threadIdx.x, lane = thread % 32, rank = blockIdx.x % CLUSTER;
    const u32 weights = shared_base();
    const u32 rows = weights + K_BLOCKS * STRIDE;
    const int num_rows = args.images * (args.num_positions + 1) + 1;

    // Column (channel) of the sum over window, gate and own channel. What this line's position j
    // gives to the line visited next is found there at j-1, j, j+1, as the neighbour j+1, j, j-1.
    for (int matrix = thread / 32; matrix < ALL_UNITS; matrix += THREADS / 32) {
        const int to = matrix / UNITS;
        const int count = smaller(UNITS, ALL_UNITS - to * UNITS);
        const int channel =
            to * UNITS * 8 + channel_of_column(matrix % UNITS, count, lane % 8);
        for (int block = lane / 8; block < K_BLOCKS; block += 4) {
            const int neighbour = 2 - block / (ROW / 8), rest = block % (ROW / 8);
            const int gate = rest / UNITS, own = (rank * UNITS + rest % UNITS) * 8;
            const bool valid = gate < 3 && own < C;
            const i64 from =
                static_cast<i64>(neighbour * C + channel) * (3 * C) + gate * C + own;
            copy_async(weights + block * STRIDE + matrix * 128 + lane % 8 * 16,
                       at(args.weight, valid ? from : 0, 2), valid);
        }
    }
    fill_zeros(rows, num_rows * ROW * 2, thread);
    wait_copies();
    block_barrier();
    cluster_arrive();
    cluster_wait();

    if constexpr (GROUPS == 1) {
        sweep_backward<0, CLUSTER>(args, weights, rows);
    } else {
        if (thread < 128) sweep_backward<0, FIRST_BLOCKS>(args, weights, rows);
        else sweep_backward<FIRST_BLOCKS, CLUSTER>(args, weights, rows);
    }
}

#endif
