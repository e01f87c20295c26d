// Tiles: a block of 16 rows times a few tokens, summed in registers.
//
// Inputs go in chunks that share one scale of the weight (and one of the activation): codes are multiplied as they are and
// scales are applied once per chunk, in float32. The tokens of a job go in tiles of one size. The order of an output's sum
// depends on the number of tokens of its job, not on the threads.
#pragma once
#include <algorithm>
#include <iterator>

#include "formats.h"

namespace quantkit {

constexpr int kMaxTile = 16;     // sums and totals, of 32 registers
constexpr int kSizes[] = {1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16};  // tokens of a tile
// Bytes ahead of the load, into the second-level cache: a token reads a weight once. Past that cache (the NTA hint) is as fast on
// Zen 4, but on Sapphire and Emerald Rapids a weight that lies in a cache is read at half the speed, and one in memory at two thirds.
constexpr int kPrefetch = 6144;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int tile_size(int64_t tokens) { return *std::lower_bound(std::begin(kSizes), std::end(kSizes), tokens); }

struct Shape {
    int64_t rows, inputs, chunk, chunks_per_scale;
    int words;  // of activations in a step: the format's vectors
    int64_t blocks() const { return ceil_div(rows, kRows); }
    int64_t steps() const { return ceil_div(inputs, kStep); }
    int64_t chunks() const { return ceil_div(inputs, chunk); }
    int64_t scales() const { return ceil_div(chunks(), chunks_per_scale); }
    int64_t first_step(int64_t c) const { return c * (chunk / kStep); }
    int64_t steps_of(int64_t c) const { return std::min(chunk / kStep, steps() - first_step(c)); }
};

// One expert's weight and some of its tokens.
struct Job {
    const uint8_t* weight;
    const void* scale;      // bf16, or float32 if wide, [blocks, scales, 16]
    const int8_t* zero;     // like scale, or null
    bool wide;
    int64_t first, tokens;  // rows of the output
    int expert, tile, tiles;
    uint32_t* words;  // activations, chunk by chunk, tile by tile: [word][token of the tile]
    float* sums;      // [chunks][tiles][tile]: of a chunk's codes, what an offset or zero point is multiplied with
    float* x_scale;   // like sums; null when activations are not rounded to codes

    uint32_t* words_of(const Shape& shape, int64_t c, int t) const {
        return words + (shape.first_step(c) * tiles + shape.steps_of(c) * t) * shape.words * tile;
    }
};

// total += scale * x_scale * (acc - (offset + zero) * sum of x), for the tokens of a tile and the rows of a block.
template <class Format, int T>
inline void add_scaled(const Shape& shape, const Job& job, int64_t block, int64_t c, int t,
                       const typename Format::Sum (&acc)[T], __m512 (&total)[T]) {
    const int64_t at = (block * shape.scales() + c / shape.chunks_per_scale) * kRows, of_x = (c * job.tiles + t) * T;
    __m512 scale;
    if (job.wide) {
        scale = _mm512_load_ps(static_cast<const float*>(job.scale) + at);
    } else {
        const __m256i half = _mm256_load_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(job.scale) + at));
        scale = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
    __m512 value[T];
#pragma GCC unroll 16
    for (int i = 0; i < T; ++i) value[i] = Format::value(acc[i]);
    if (Format::kOffset || job.zero) {
        __m512i zero = _mm512_set1_epi32(Format::kOffset);
        if (job.zero) {
            const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(job.zero + at));
            zero = _mm512_add_epi32(zero, _mm512_cvtepi8_epi32(bytes));
        }
        const __m512 offset = _mm512_cvtepi32_ps(zero);
#pragma GCC unroll 16
        for (int i = 0; i < T; ++i) value[i] = _mm512_fnmadd_ps(offset, _mm512_set1_ps(job.sums[of_x + i]), value[i]);
    }
    if (job.x_scale) {
#pragma GCC unroll 16
        for (int i = 0; i < T; ++i) value[i] = _mm512_mul_ps(value[i], _mm512_set1_ps(job.x_scale[of_x + i]));
    }
#pragma GCC unroll 16
    for (int i = 0; i < T; ++i) total[i] = _mm512_fmadd_ps(scale, value[i], total[i]);
}

template <int T>
inline void store(const Shape& shape, const Job& job, int64_t block, int t, const __m512* total, float* y) {
    const int64_t row = block * kRows, first = static_cast<int64_t>(t) * T;
    const int64_t left = std::min<int64_t>(kRows, shape.rows - row);
    const __mmask16 mask = static_cast<__mmask16>((1u << left) - 1);
    for (int i = 0; i < T && first + i < job.tokens; ++i)
        _mm512_mask_storeu_ps(y + (job.first + first + i) * shape.rows + row, mask, total[i]);
}

// Row blocks first .. last times tile t of the tokens. A dot product waits some 6 cycles for the sum it adds to, so few tokens
// need several sums each: of the vectors of a step, and of every other step. The loops over T are unrolled by force, so that
// sums stay in registers.
template <class Format, int T>
void multiply(const Shape& shape, const Job& job, const uint8_t* at, int64_t first, int64_t last, int t, float* y) {
    constexpr int kSums = std::min(Format::kVectors, T <= 2 ? 4 : T <= 5 ? 2 : 1), kUnroll = T * Format::kVectors <= 4 ? 2 : 1;
    using Sum = typename Format::Sum;
    const Format format;
    for (int64_t block = first; block < last; ++block) {
        __m512 total[T];
        for (int i = 0; i < T; ++i) total[i] = _mm512_setzero_ps();
        for (int64_t c = 0; c < shape.chunks(); ++c) {
            const uint32_t* x = job.words_of(shape, c, t);
            Sum acc[kUnroll * kSums][T];
#pragma GCC unroll 8
            for (int s = 0; s < kUnroll * kSums; ++s)
#pragma GCC unroll 16
                for (int i = 0; i < T; ++i) acc[s][i] = Format::none();
            const auto step = [&](Sum(*sums)[T]) __attribute__((always_inline)) {
                for (int line = 0; line < Format::kStreamed; line += 64) _mm_prefetch(at + kPrefetch + line, _MM_HINT_T1);
#pragma GCC unroll 4
                for (int v = 0; v < Format::kVectors; ++v) {
                    const __m512i weight = format.decode(at, v);
#pragma GCC unroll 16
                    for (int i = 0; i < T; ++i) sums[v % kSums][i] = Format::dot(sums[v % kSums][i], weight, x[v * T + i]);
                }
                at += Format::kBytes;
                x += Format::kVectors * T;
            };
            int64_t left = shape.steps_of(c);
            for (; left >= kUnroll; left -= kUnroll)
#pragma GCC unroll 2
                for (int u = 0; u < kUnroll; ++u) step(acc + u * kSums);
            for (; left > 0; --left) step(acc);
#pragma GCC unroll 8
            for (int s = 1; s < kUnroll * kSums; ++s)
#pragma GCC unroll 16
                for (int i = 0; i < T; ++i) acc[0][i] = Format::add(acc[0][i], acc[s][i]);
            add_scaled<Format, T>(shape, job, block, c, t, acc[0], total);
        }
        store<T>(shape, job, block, t, total, y);
    }
}

// Row blocks first .. last times all tokens of a job. Where decoding is not cheap and there are several tiles, weights are
// decoded once, to `plain`.
template <class Format, int T>
void work(const Shape& shape, const Job& job, int64_t first, int64_t last, uint8_t* plain, float* y) {
    const int64_t steps = shape.steps();
    if constexpr (!Format::kCheap && T > kMaxTile / 2) {  // smaller tiles come alone
        if (job.tiles > 1) {
            const Format format;
            const uint8_t* at = job.weight + first * steps * Format::kBytes;
            for (int64_t i = 0; i < (last - first) * steps; ++i)
                for (int v = 0; v < Format::kVectors; ++v)
                    _mm512_store_si512(plain + i * Plain::kBytes + v * 64, format.decode(at + i * Format::kBytes, v));
            for (int t = 0; t < job.tiles; ++t) multiply<Plain, T>(shape, job, plain, first, last, t, y);
            return;
        }
    }
    const uint8_t* weight = job.weight + first * steps * Format::kBytes;
    for (int t = 0; t < job.tiles; ++t) multiply<Format, T>(shape, job, weight, first, last, t, y);
}

using Work = void (*)(const Shape&, const Job&, int64_t, int64_t, uint8_t*, float*);

template <class Format>
Work work_for(int tile) {
    switch (tile) {
#define CASE(T) \
    case T: return work<Format, T>;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
        CASE(10) CASE(12) CASE(14) CASE(16)
#undef CASE
    }
    return nullptr;
}

}  // namespace quantkit
