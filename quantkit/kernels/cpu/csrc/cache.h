// Keys and values as a cache keeps them: float32, bfloat16, or E4M3 codes with a bfloat16 scale for each head of a position.
#pragma once
#include <cmath>

#include "activations.h"

namespace quantkit {

enum Stored { kFloat32 = 0, kBfloat16 = 1, kE4m3 = 2 };

// [batch, heads, room, width], of which some positions are held; scale [batch, heads, room], or null. steps.py has the same.
struct Held {
    void* codes;
    uint16_t* scale;
    int64_t room;
};

inline float of_bf16(uint16_t half) { return float_of(static_cast<uint32_t>(half) << 16); }

// The nearest bfloat16, ties to even; NaN stays one.
inline uint16_t nearest_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return 0x7FC0;
    return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// The code of a value on E4M3's grid.
inline uint8_t e4m3_code(float y) {
    uint32_t bits;
    std::memcpy(&bits, &y, 4);
    const uint32_t sign = bits >> 31 << 7, size = bits & 0x7FFFFFFF;
    if (std::fabs(y) < 0.015625f) return static_cast<uint8_t>(sign | static_cast<uint32_t>(std::fabs(y) * 512));
    return static_cast<uint8_t>(sign | ((size >> 20) - (120 << 3)));
}

// 16 of them from element `at` on, without the scale; zero where not live. E4M3 has the bits of the upper byte of a float16 but
// for one bit of exponent, whose biases differ by 8. NaN is not known here: its scale is NaN too.
template <Stored How>
inline __m512 load_kept(const void* codes, int64_t at, __mmask16 live) {
    if constexpr (How == kFloat32) return _mm512_maskz_loadu_ps(live, static_cast<const float*>(codes) + at);
    if constexpr (How == kBfloat16) {
        const __m256i half = _mm256_maskz_loadu_epi16(live, static_cast<const uint16_t*>(codes) + at);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
    const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_maskz_loadu_epi8(live, static_cast<const uint8_t*>(codes) + at)), 7);
    const __m256i half = _mm256_and_si256(wide, _mm256_set1_epi16(static_cast<int16_t>(0xBFFF)));
    return _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f));
}

// Puts x [width], a head of one position, at `place` of [batch * heads * room].
inline void keep(const float* x, int64_t width, const Held& held, Stored how, int64_t place) {
    if (how == kFloat32) {
        std::copy(x, x + width, static_cast<float*>(held.codes) + place * width);
    } else if (how == kBfloat16) {
        uint16_t* to = static_cast<uint16_t*>(held.codes) + place * width;
        for (int64_t k = 0; k < width; ++k) to[k] = nearest_bf16(x[k]);
    } else {
        float top = 0, taint = 0;
        for (int64_t k = 0; k < width; ++k) top = std::max(top, std::fabs(x[k])), taint += x[k] * 0.0f;
        const uint16_t scale = nearest_bf16(std::max(top / 448.0f, 0x1p-126f) + taint);
        const __m512 by = _mm512_set1_ps(of_bf16(scale)), most = _mm512_set1_ps(448.0f), least = _mm512_set1_ps(-448.0f);
        uint8_t* to = static_cast<uint8_t*>(held.codes) + place * width;
        for (int64_t k = 0; k < width; k += 16) {
            alignas(64) float near[16];
            const __m512 y = _mm512_div_ps(_mm512_maskz_loadu_ps(live_lanes(width - k), x + k), by);
            _mm512_store_ps(near, nearest_e4m3(_mm512_min_ps(_mm512_max_ps(y, least), most)));
            for (int64_t i = 0; i < std::min<int64_t>(16, width - k); ++i) to[k + i] = e4m3_code(near[i]);
        }
        held.scale[place] = scale;
    }
}

}  // namespace quantkit
