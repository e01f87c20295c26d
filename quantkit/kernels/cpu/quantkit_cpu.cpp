// Products of bf16 activations with INT4, INT8 or FP8 E4M3 weights, for processors with AVX-512 and its BF16 dot product.
//
// Layout (linear.py packs it). Rows go in blocks of 16, inputs in steps of 8. A vdpbf16ps takes two inputs of 16 rows:
// 32 bf16, lane 2r + j holding input 2s + j of row r. Such a vector has number s in its step, s = 0..3. A step of INT4
// is 64 bytes whose 16-bit lanes hold the codes of the vectors s = 0..3 from the low nibble up; a step of 8 bits is
// twice 64 bytes, low byte s = 0, high byte s = 1. Steps form chunks: within a chunk all inputs of a row share one scale
// and zero point, so codes are multiplied as they are and the scale is applied once per chunk, in float32.
//
// A call is a list of jobs (an expert, or a part of its tokens); the tokens of a job go in tiles that fit the registers.
// Threads take work items, a few row blocks of a job each. The order of an output's sum depends on the number of tokens of
// its expert (one, two to four, more), not on the threads.
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

namespace {

constexpr int kRows = 16;        // rows in a block: float32 lanes of a register
constexpr int kStep = 8;         // inputs in a step
constexpr int kVectors = 4;      // vectors in a step
constexpr int kBlocks = 4;       // row blocks of one work item
constexpr int kMaxTile = 24;     // sums, of 32 registers
constexpr int kMaxTiles = 8;     // tiles of a job
constexpr int kSizes[] = {1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 18, 20, 22, 24};  // tokens of a tile
constexpr int kPrefetch = 4096;  // bytes ahead of the load
constexpr size_t kSerialPairs = 1 << 16;  // activations to pack in one thread: 256 KB
constexpr std::align_val_t kCacheLine{64};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Int4 {
    static constexpr int kBytes = 64;
    static constexpr bool kCheap = true;  // two instructions a vector: decode again for each tile
    __m512i table;  // 16 values twice: vpermw looks at the low 5 bits, the fifth belongs to the next code
    Int4() {
        alignas(64) uint16_t values[32];
        for (int i = 0; i < 32; ++i) {
            const float value = static_cast<float>(i % 16 - 8);
            uint32_t bits;
            std::memcpy(&bits, &value, 4);
            values[i] = static_cast<uint16_t>(bits >> 16);
        }
        table = _mm512_load_si512(values);
    }
    inline __m512i decode(const uint8_t* at, int v) const {
        return _mm512_permutexvar_epi16(_mm512_srli_epi16(_mm512_load_si512(at), 4 * v), table);
    }
};

struct Fp8 {
    static constexpr int kBytes = 128;
    static constexpr bool kCheap = false;
    __m512i subnormal;  // m * 2^-9 for m = 0..7: bf16 has these values, but with another exponent each
    Fp8() {
        alignas(64) uint16_t values[32];
        for (int i = 0; i < 32; ++i) {
            const float value = static_cast<float>(i % 8) / 512.0f;
            uint32_t bits;
            std::memcpy(&bits, &value, 4);
            values[i] = static_cast<uint16_t>(bits >> 16);
        }
        subnormal = _mm512_load_si512(values);
    }
    // placed: the code shifted so that its exponent ends at bit 7; index: its mantissa lowest; sign: its sign in bit 15.
    inline __m512i widen(__m512i placed, __m512i index, __m512i sign) const {
        const __m512i rebias = _mm512_set1_epi16(120 << 7);  // exponent bias 127 instead of 7
        __m512i value = _mm512_add_epi16(_mm512_and_si512(placed, _mm512_set1_epi16(0x7F0)), rebias);
        const __mmask32 small = _mm512_testn_epi16_mask(placed, _mm512_set1_epi16(0x780));
        value = _mm512_mask_permutexvar_epi16(value, small, index, subnormal);
        return _mm512_ternarylogic_epi32(value, sign, _mm512_set1_epi16(-0x8000), 0xF8);  // value | (sign & bit 15)
    }
    inline __m512i decode(const uint8_t* at, int v) const {
        const __m512i codes = _mm512_load_si512(at + 64 * (v / 2));
        if (v % 2) return widen(_mm512_srli_epi16(codes, 4), _mm512_srli_epi16(codes, 8), codes);
        return widen(_mm512_slli_epi16(codes, 4), codes, _mm512_slli_epi16(codes, 8));
    }
};

struct Int8 {
    static constexpr int kBytes = 128;
    static constexpr bool kCheap = false;
    // Lanes hold a code in their top byte. Its float32 has at most 8 significant bits: the upper half is its exact bf16.
    static inline __m512i widen(__m512i even, __m512i odd) {
        even = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_srai_epi32(even, 24)));
        odd = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_srai_epi32(odd, 24)));
        return _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(even, 16), odd);
    }
    inline __m512i decode(const uint8_t* at, int v) const {
        const __m512i codes = _mm512_load_si512(at + 64 * (v / 2));
        if (v % 2) return widen(_mm512_slli_epi32(codes, 16), codes);
        return widen(_mm512_slli_epi32(codes, 24), _mm512_slli_epi32(codes, 8));
    }
};

struct Plain {  // bf16, decoded before
    static constexpr int kBytes = 256;
    inline __m512i decode(const uint8_t* at, int v) const { return _mm512_load_si512(at + 64 * v); }
};

struct Shape {
    int64_t rows, inputs, chunk, chunks_per_scale;
    int64_t blocks() const { return ceil_div(rows, kRows); }
    int64_t steps() const { return ceil_div(inputs, kStep); }
    int64_t chunks() const { return ceil_div(inputs, chunk); }
    int64_t scales() const { return ceil_div(chunks(), chunks_per_scale); }
    int64_t first_step(int64_t c) const { return c * (chunk / kStep); }
    int64_t steps_of(int64_t c) const { return std::min(chunk / kStep, steps() - first_step(c)); }
};

int tile_size(int64_t tokens) { return *std::lower_bound(std::begin(kSizes), std::end(kSizes), tokens); }

struct Job {
    const uint8_t* weight;
    const uint16_t* scale;  // bf16 [blocks, scales, 16]
    const int8_t* zero;     // like scale, or null
    const uint16_t* x;      // bf16 [tokens, inputs]
    float* y;               // [tokens, rows]
    int64_t tokens;
    int tile, tiles;
    uint32_t* pairs;  // x as pairs of inputs: chunk by chunk, tile by tile, [pair][token of the tile]
    float* sums;      // [chunks][tiles][tile]: what a zero point is multiplied with

    uint32_t* pairs_of(const Shape& shape, int64_t c, int t) const {
        return pairs + (shape.first_step(c) * tiles + shape.steps_of(c) * t) * kVectors * tile;
    }
};

// sum + weight * x, two inputs of a row in each lane; x is one pair of inputs for all rows.
inline __m512 dot(__m512 sum, __m512i weight, uint32_t x) {
    const __m512i pair = _mm512_set1_epi32(static_cast<int>(x));
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(weight), reinterpret_cast<__m512bh>(pair));
}

// total += scale * (acc - zero * sum of x), for the tokens of a tile and the rows of a block.
template <int T>
inline void add_scaled(const Shape& shape, const Job& job, int64_t block, int64_t c, int t, const __m512 (&acc)[T],
                       __m512 (&total)[T]) {
    const int64_t at = (block * shape.scales() + c / shape.chunks_per_scale) * kRows;
    const __m256i half = _mm256_load_si256(reinterpret_cast<const __m256i*>(job.scale + at));
    const __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    if (!job.zero) {
#pragma GCC unroll 24
        for (int i = 0; i < T; ++i) total[i] = _mm512_fmadd_ps(scale, acc[i], total[i]);
        return;
    }
    const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(job.zero + at));
    const __m512 zero = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    const float* sums = job.sums + (c * job.tiles + t) * T;
#pragma GCC unroll 24
    for (int i = 0; i < T; ++i) {
        const __m512 centred = _mm512_fnmadd_ps(zero, _mm512_set1_ps(sums[i]), acc[i]);
        total[i] = _mm512_fmadd_ps(scale, centred, total[i]);
    }
}

template <int T>
inline void store(const Shape& shape, const Job& job, int64_t block, int t, const __m512* total) {
    const int64_t row = block * kRows, first = static_cast<int64_t>(t) * T;
    const int64_t left = std::min<int64_t>(kRows, shape.rows - row);
    const __mmask16 mask = static_cast<__mmask16>((1u << left) - 1);
    for (int i = 0; i < T && first + i < job.tokens; ++i)
        _mm512_mask_storeu_ps(job.y + (first + i) * shape.rows + row, mask, total[i]);
}

// Row blocks first .. last times tile t of the tokens. Few tokens need more sums, to hide the latency of the dot product.
// The loops over T are unrolled by force, so that sums stay in registers.
template <class Format, int T>
void multiply(const Shape& shape, const Job& job, const uint8_t* at, int64_t first, int64_t last, int t) {
    constexpr int kSums = T == 1 ? 4 : T <= 4 ? 2 : 1;
    const Format format;
    for (int64_t block = first; block < last; ++block) {
        __m512 total[T];
        for (int i = 0; i < T; ++i) total[i] = _mm512_setzero_ps();
        for (int64_t c = 0; c < shape.chunks(); ++c) {
            const uint32_t* x = job.pairs_of(shape, c, t);
            __m512 acc[kSums][T];
#pragma GCC unroll 4
            for (int s = 0; s < kSums; ++s)
#pragma GCC unroll 24
                for (int i = 0; i < T; ++i) acc[s][i] = _mm512_setzero_ps();
            for (int64_t step = shape.steps_of(c); step > 0; --step) {
                for (int line = 0; line < Format::kBytes; line += 64) _mm_prefetch(at + kPrefetch + line, _MM_HINT_T0);
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) {
                    const __m512i weight = format.decode(at, v);
#pragma GCC unroll 24
                    for (int i = 0; i < T; ++i) acc[v % kSums][i] = dot(acc[v % kSums][i], weight, x[v * T + i]);
                }
                at += Format::kBytes;
                x += kVectors * T;
            }
#pragma GCC unroll 4
            for (int s = 1; s < kSums; ++s)
#pragma GCC unroll 24
                for (int i = 0; i < T; ++i) acc[0][i] = _mm512_add_ps(acc[0][i], acc[s][i]);
            add_scaled<T>(shape, job, block, c, t, acc[0], total);
        }
        store<T>(shape, job, block, t, total);
    }
}

// A work item. Where decoding is not cheap and there are several tiles, its weights are decoded once, to `plain`.
template <class Format, int T>
void work(const Shape& shape, const Job& job, int64_t first, int64_t last, uint8_t* plain) {
    const uint8_t* weight = job.weight + first * shape.steps() * Format::kBytes;
    if (Format::kCheap || job.tiles == 1) {
        for (int t = 0; t < job.tiles; ++t) multiply<Format, T>(shape, job, weight, first, last, t);
        return;
    }
    if constexpr (!Format::kCheap && T > kMaxTile / 2) {  // smaller tiles come alone
        const Format format;
        const int64_t steps = (last - first) * shape.steps();
        for (int64_t step = 0; step < steps; ++step)
            for (int v = 0; v < kVectors; ++v)
                _mm512_store_si512(plain + step * Plain::kBytes + v * 64, format.decode(weight + step * Format::kBytes, v));
        for (int t = 0; t < job.tiles; ++t) multiply<Plain, T>(shape, job, plain, first, last, t);
    }
}

using Work = void (*)(const Shape&, const Job&, int64_t, int64_t, uint8_t*);

template <class Format>
Work work_of(int tile) {
    switch (tile) {
#define CASE(T) \
    case T: return work<Format, T>;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
        CASE(10) CASE(12) CASE(14) CASE(16) CASE(18) CASE(20) CASE(22) CASE(24)
#undef CASE
    }
    return nullptr;
}

Work work_of(int format, int tile) {
    return format == 0 ? work_of<Int4>(tile) : format == 1 ? work_of<Fp8>(tile) : work_of<Int8>(tile);
}

inline float as_float(uint32_t bf16) {
    const uint32_t bits = bf16 << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Tile t of a job's activations as pairs, zero beyond the tokens and beyond the inputs.
void pack_tile(const Shape& shape, const Job& job, int t) {
    for (int64_t c = 0; c < shape.chunks(); ++c) {
        uint32_t* out = job.pairs_of(shape, c, t);
        const int64_t start = c * shape.chunk, pairs = shape.steps_of(c) * kVectors;
        for (int i = 0; i < job.tile; ++i) {
            const int64_t token = static_cast<int64_t>(t) * job.tile + i;
            const uint16_t* x = job.x + token * shape.inputs;
            float sum = 0;
            for (int64_t p = 0; p < pairs; ++p) {
                const int64_t k = start + 2 * p;
                const uint32_t low = token < job.tokens && k < shape.inputs ? x[k] : 0;
                const uint32_t high = token < job.tokens && k + 1 < shape.inputs ? x[k + 1] : 0;
                out[p * job.tile + i] = low | high << 16;
                sum += as_float(low) + as_float(high);
            }
            job.sums[(c * job.tiles + t) * job.tile + i] = sum;
        }
    }
}

// The jobs of one expert with `tokens` tokens: one, or several of about equal size when they would not fit kMaxTiles.
void split(Job job, int64_t tokens, const Shape& shape, std::vector<Job>& jobs) {
    const int64_t parts = ceil_div(tokens, kMaxTile * kMaxTiles);
    for (int64_t part = 0; part < parts; ++part) {
        const int64_t from = tokens * part / parts;
        Job piece = job;
        piece.tokens = tokens * (part + 1) / parts - from;
        piece.x += from * shape.inputs;
        piece.y += from * shape.rows;
        piece.tiles = static_cast<int>(ceil_div(piece.tokens, kMaxTile));
        piece.tile = tile_size(ceil_div(piece.tokens, piece.tiles));
        jobs.push_back(piece);
    }
}

struct Free {
    void operator()(uint8_t* at) const { operator delete(at, kCacheLine); }
};

void run(const Shape& shape, int format, std::vector<Job>& jobs, int threads) {
    size_t pairs = 0, sums = 0;
    for (const Job& job : jobs) {
        pairs += shape.steps() * kVectors * job.tile * job.tiles;
        sums += shape.chunks() * job.tile * job.tiles;
    }
    const auto pair_store = std::make_unique<uint32_t[]>(pairs);
    const auto sum_store = std::make_unique<float[]>(sums);
    uint32_t* next_pairs = pair_store.get();
    float* next_sums = sum_store.get();
    for (Job& job : jobs) {
        job.pairs = next_pairs;
        job.sums = next_sums;
        next_pairs += shape.steps() * kVectors * job.tile * job.tiles;
        next_sums += shape.chunks() * job.tile * job.tiles;
    }
    const int64_t plain_bytes = kBlocks * shape.steps() * Plain::kBytes;
    const std::unique_ptr<uint8_t, Free> plain(static_cast<uint8_t*>(operator new(plain_bytes * threads, kCacheLine)));
    const int64_t slabs = ceil_div(shape.blocks(), kBlocks), items = slabs * static_cast<int64_t>(jobs.size());
// Few activations are not worth another meeting of the threads, which costs a time slice on a busy machine.
#pragma omp parallel for schedule(dynamic, 1) collapse(2) num_threads(pairs > kSerialPairs ? threads : 1)
    for (size_t j = 0; j < jobs.size(); ++j)
        for (int t = 0; t < kMaxTiles; ++t)
            if (t < jobs[j].tiles) pack_tile(shape, jobs[j], t);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t item = 0; item < items; ++item) {
        const Job& job = jobs[item / slabs];
        const int64_t first = item % slabs * kBlocks;
        uint8_t* mine = plain.get() + omp_get_thread_num() * plain_bytes;
        work_of(format, job.tile)(shape, job, first, std::min(first + kBlocks, shape.blocks()), mine);
    }
}

}  // namespace

// y[t, :] = weight of t's expert times x[t, :]. Expert e has the tokens offsets[e] .. offsets[e + 1]. The pointers of an
// expert without tokens are not read. zero is null for symmetric weights. Returns 0, or 1 when memory ran out.
extern "C" int quantkit_matmul(int format, int64_t experts, const void* const* weight, const void* const* scale,
                               const void* const* zero, const int64_t* offsets, const uint16_t* x, float* y, int64_t rows,
                               int64_t inputs, int64_t chunk, int64_t chunks_per_scale, int threads) {
    const Shape shape{rows, inputs, chunk, chunks_per_scale};
    try {
        std::vector<Job> jobs;
        for (int64_t e = 0; e < experts; ++e) {
            Job job{};
            job.weight = static_cast<const uint8_t*>(weight[e]);
            job.scale = static_cast<const uint16_t*>(scale[e]);
            job.zero = zero ? static_cast<const int8_t*>(zero[e]) : nullptr;
            job.x = x + offsets[e] * inputs;
            job.y = y + offsets[e] * rows;
            split(job, offsets[e + 1] - offsets[e], shape, jobs);
        }
        if (!jobs.empty()) run(shape, format, jobs, threads);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
