// Activations as the kernels read them: rounded as the scheme says, then in words.
#pragma once
#include "tiles.h"

namespace quantkit {

enum Rounding { kKeep = 0, kFp8 = 1, kInt8 = 2 };

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// The nearest E4M3 values, ties to even, of |y| <= 448. Normal numbers carry into the 3 bits that are kept; the others (below
// 2^-6) are multiples of 2^-9, the spacing of float32 at 1.5 * 2^14.
inline __m512 nearest_e4m3(__m512 y) {
    const __m512i bits = _mm512_castps_si512(y), lowest = _mm512_and_si512(_mm512_srli_epi32(bits, 20), _mm512_set1_epi32(1));
    const __m512i carried = _mm512_add_epi32(bits, _mm512_add_epi32(lowest, _mm512_set1_epi32(0x7FFFF)));
    const __m512 normal = _mm512_castsi512_ps(_mm512_and_si512(carried, _mm512_set1_epi32(~0xFFFFF)));
    const __m512 big = _mm512_set1_ps(24576.0f), small = _mm512_sub_ps(_mm512_add_ps(y, big), big);
    const __mmask16 is_small = _mm512_cmp_ps_mask(_mm512_abs_ps(y), _mm512_set1_ps(0.015625f), _CMP_LT_OQ);
    return _mm512_mask_blend_ps(is_small, normal, small);
}

inline __m512 nearest_integer(__m512 y) {
    return _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline __mmask16 live_lanes(int64_t left) { return static_cast<__mmask16>(left >= 16 ? 0xFFFF : (1u << left) - 1); }

// x[0..n) to codes and their scale: amax / reach, or the one given (> 0). What is not finite makes the scale NaN, so that
// it reaches the result.
inline float round_span(const float* x, int64_t n, Rounding rounding, float given, float* codes) {
    const float reach = rounding == kFp8 ? 448.0f : 127.0f;
    __m512 top = _mm512_setzero_ps(), taint = _mm512_setzero_ps();
    for (int64_t k = 0; k < n; k += 16) {
        const __m512 v = _mm512_maskz_loadu_ps(live_lanes(n - k), x + k);
        top = _mm512_max_ps(top, _mm512_abs_ps(v));
        taint = _mm512_fmadd_ps(v, _mm512_setzero_ps(), taint);
    }
    const float amax = _mm512_reduce_max_ps(top), scale = given > 0 ? given : amax > 0 ? amax / reach : 1.0f;
    const __m512 most = _mm512_set1_ps(reach), least = _mm512_set1_ps(-reach), by = _mm512_set1_ps(scale);
    for (int64_t k = 0; k < n; k += 16) {
        const __mmask16 live = live_lanes(n - k);
        const __m512 y = _mm512_min_ps(_mm512_max_ps(_mm512_div_ps(_mm512_maskz_loadu_ps(live, x + k), by), least), most);
        _mm512_mask_storeu_ps(codes + k, live, rounding == kFp8 ? nearest_e4m3(y) : nearest_integer(y));
    }
    return scale + _mm512_reduce_add_ps(taint);
}

// How a product's activations are rounded. span: inputs that share a scale. given: a scale for each expert, or null.
struct Activation {
    Rounding rounding;
    int64_t span;
    const float* given;

    float round(const float* x, int64_t n, int expert, float* codes) const {
        return round_span(x, n, rounding, given ? given[expert] : 0.0f, codes);
    }
};

inline void put_pairs(const float* codes, int64_t steps, int tile, uint32_t* out, float* sum) {
    float total = 0;
    for (int64_t k = 0; k < steps * kStep; k += kStep) {
        alignas(16) uint16_t half[kStep];
        const __m128bh narrow = _mm256_cvtneps_pbh(_mm256_loadu_ps(codes + k));
        std::memcpy(half, &narrow, sizeof half);
        for (int p = 0; p < kStep / 2; ++p) {
            const uint32_t low = half[2 * p], high = half[2 * p + 1];
            out[(k / 2 + p) * tile] = low | high << 16;
            total += float_of(low << 16) + float_of(high << 16);
        }
    }
    *sum = total;
}

inline void put_bytes(const float* codes, int64_t steps, int tile, uint32_t* out, float* sum) {
    int32_t total = 0;
    for (int64_t k = 0; k < steps * kStep; k += 4) {
        uint32_t word = 0;
        for (int j = 0; j < 4; ++j) {
            const int32_t code = static_cast<int32_t>(codes[k + j]);
            total += code;
            word |= static_cast<uint32_t>(code & 255) << 8 * j;
        }
        out[k / 4 * tile] = word;
    }
    *sum = static_cast<float>(total);
}

// Token i of tile t of a job, from x [inputs]; null stands for zeros, where a tile has more room than tokens. codes: room for
// the inputs, filled up to whole steps.
inline void pack_token(const Shape& shape, const Job& job, const Activation& how, const float* x, int t, int i, float* codes) {
    const int64_t room = shape.steps() * kStep;
    std::fill(codes + (x ? shape.inputs : 0), codes + room, 0.0f);
    if (x && how.rounding == kKeep) std::copy(x, x + shape.inputs, codes);
    float scale = 1.0f;
    for (int64_t c = 0; c < shape.chunks(); ++c) {
        const int64_t start = c * shape.chunk, at = (c * job.tiles + t) * job.tile + i;
        if (x && how.rounding != kKeep && start % how.span == 0)
            scale = how.round(x + start, std::min(how.span, shape.inputs - start), job.expert, codes + start);
        if (job.x_scale) job.x_scale[at] = scale;
        uint32_t* out = job.words_of(shape, c, t) + i;
        (shape.words == Bf16::kVectors ? put_pairs : put_bytes)(codes + start, shape.steps_of(c), job.tile, out, job.sums + at);
    }
}

}  // namespace quantkit
