// Products with a weight in bfloat16 as it is stored, row after row: nothing is packed, and few tokens read it once.
#pragma once
#include "tiles.h"

namespace quantkit {

// The sums of 16 lanes of four vectors.
inline __m128 sum4(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Four rows from `at` on (those beyond `last` are its last one) times T tokens from `x` on, of `words` pairs each.
template <int T>
inline void four_rows(const uint16_t* weight, int64_t inputs, int64_t at, int64_t last, const uint32_t* x, int64_t words,
                      float (&out)[T][4]) {
    const uint16_t* row[4];
    for (int r = 0; r < 4; ++r) row[r] = weight + std::min(at + r, last - 1) * inputs;
    __m512 sum[T][4];
    for (int i = 0; i < T; ++i)
        for (int r = 0; r < 4; ++r) sum[i][r] = _mm512_setzero_ps();
    for (int64_t k = 0; k < inputs; k += 32) {
        const int64_t left = std::min<int64_t>(32, inputs - k);
        const __mmask32 live = left == 32 ? 0xFFFFFFFF : (1u << left) - 1;
        __m512i pair[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
            _mm_prefetch(reinterpret_cast<const char*>(row[r] + k) + kPrefetch, _MM_HINT_T1);
            pair[r] = _mm512_maskz_loadu_epi16(live, row[r] + k);
        }
#pragma GCC unroll 4
        for (int i = 0; i < T; ++i) {
            const __m512bh of_x = reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(live, x + i * words + k / 2));
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) sum[i][r] = _mm512_dpbf16_ps(sum[i][r], reinterpret_cast<__m512bh>(pair[r]), of_x);
        }
    }
    for (int i = 0; i < T; ++i) _mm_storeu_ps(out[i], sum4(sum[i][0], sum[i][1], sum[i][2], sum[i][3]));
}

// Rows first .. last times T tokens of a job, from `token` on.
template <int T>
inline void rows_of_tokens(const Shape& shape, const Job& job, int64_t first, int64_t last, int64_t token, float* y) {
    const int64_t words = shape.steps() * shape.words;
    const auto* weight = reinterpret_cast<const uint16_t*>(job.weight);
    for (int64_t at = first; at < last; at += 4) {
        alignas(16) float out[T][4];
        four_rows<T>(weight, shape.inputs, at, last, job.words + token * words, words, out);
        for (int i = 0; i < T; ++i)
            for (int64_t r = 0; r < std::min<int64_t>(4, last - at); ++r)
                y[(job.first + token + i) * shape.rows + at + r] = out[i][r];
    }
}

// Rows first .. last times all tokens of a job, each of which is a tile of its own.
inline void multiply_rows(const Shape& shape, const Job& job, int64_t first, int64_t last, float* y) {
    int64_t token = 0;
    for (; token + 4 <= job.tokens; token += 4) rows_of_tokens<4>(shape, job, first, last, token, y);
    for (; token < job.tokens; ++token) rows_of_tokens<1>(shape, job, first, last, token, y);
}

}  // namespace quantkit
