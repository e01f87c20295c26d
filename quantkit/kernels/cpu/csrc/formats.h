// How weights lie in memory and become operands of a dot product.
//
// Rows go in blocks of 16 (the 32-bit lanes of a register), inputs in steps of 8. A step is cut into vectors, each of which
// meets one 32-bit word of activations, the same for all rows: two bfloat16 inputs for vdpbf16ps, four bytes for vpdpbusd.
//
// A format says: kBytes of a step, kStreamed of them to prefetch, kVectors of a step, the Sum that a dot product adds to,
// decode(step, vector), dot, and kOffset: what its codes are above their values (the sum of the activations times this is
// taken off later).
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace quantkit {

constexpr int kRows = 16;  // rows in a block
constexpr int kStep = 8;   // inputs in a step

inline uint16_t bf16_of(float exact) {
    uint32_t bits;
    std::memcpy(&bits, &exact, 4);
    return static_cast<uint16_t>(bits >> 16);
}

// bfloat16 products summed in float32. Vector s holds inputs 2s and 2s + 1: bf16 lane 2r + j is input 2s + j of row r.
struct Bf16 {
    using Sum = __m512;
    static constexpr int kVectors = 4;
    static constexpr int kOffset = 0;
    static inline Sum none() { return _mm512_setzero_ps(); }
    static inline Sum dot(Sum sum, __m512i weight, uint32_t x) {
        const __m512i pair = _mm512_set1_epi32(static_cast<int>(x));
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(weight), reinterpret_cast<__m512bh>(pair));
    }
    static inline Sum add(Sum a, Sum b) { return _mm512_add_ps(a, b); }
    static inline __m512 value(Sum sum) { return sum; }
};

// Byte products summed in int32: unsigned weights, signed activations. Vector s holds inputs 4s .. 4s + 3 of each row.
struct Bytes {
    using Sum = __m512i;
    static constexpr int kVectors = 2;
    static inline Sum none() { return _mm512_setzero_si512(); }
    static inline Sum dot(Sum sum, __m512i weight, uint32_t x) {
        return _mm512_dpbusd_epi32(sum, weight, _mm512_set1_epi32(static_cast<int>(x)));
    }
    static inline Sum add(Sum a, Sum b) { return _mm512_add_epi32(a, b); }
    static inline __m512 value(Sum sum) { return _mm512_cvtepi32_ps(sum); }
};

// INT4: the 16-bit lanes of a step hold the codes of vectors 0..3 from the low nibble up.
struct Int4 : Bf16 {
    static constexpr int kBytes = 64;
    static constexpr int kStreamed = kBytes;
    static constexpr bool kCheap = true;  // two instructions a vector: decode again for each tile of tokens
    __m512i table;  // 16 values twice: vpermw looks at the low 5 bits, the fifth belongs to the next code
    Int4() {
        alignas(64) uint16_t values[32];
        for (int i = 0; i < 32; ++i) values[i] = bf16_of(static_cast<float>(i % 16 - 8));
        table = _mm512_load_si512(values);
    }
    inline __m512i decode(const uint8_t* at, int v) const {
        return _mm512_permutexvar_epi16(_mm512_srli_epi16(_mm512_load_si512(at), 4 * v), table);
    }
};

// FP8 E4M3: a step is twice 64 bytes; the 16-bit lanes of half h hold the codes of vector 2h low and 2h + 1 high.
struct Fp8 : Bf16 {
    static constexpr int kBytes = 128;
    static constexpr int kStreamed = kBytes;
    static constexpr bool kCheap = false;
    __m512i subnormal;  // m * 2^-9 for m = 0..7: bf16 has these values, but with another exponent each
    Fp8() {
        alignas(64) uint16_t values[32];
        for (int i = 0; i < 32; ++i) values[i] = bf16_of(static_cast<float>(i % 8) / 512.0f);
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

// INT8, laid out as FP8.
struct Int8 : Bf16 {
    static constexpr int kBytes = 128;
    static constexpr int kStreamed = kBytes;
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

struct Plain : Bf16 {  // bf16, decoded before: it lies in a cache
    static constexpr int kBytes = 256;
    static constexpr int kStreamed = 0;
    static constexpr bool kCheap = true;
    inline __m512i decode(const uint8_t* at, int v) const { return _mm512_load_si512(at + 64 * v); }
};

// INT4 against bytes: byte 4r + j of a step holds input j of row r low and input 4 + j high, as code + 8.
struct Int4Bytes : Bytes {
    static constexpr int kBytes = 64;
    static constexpr int kStreamed = kBytes;
    static constexpr bool kCheap = true;
    static constexpr int kOffset = 8;
    inline __m512i decode(const uint8_t* at, int v) const {
        return _mm512_and_si512(_mm512_srli_epi16(_mm512_load_si512(at), 4 * v), _mm512_set1_epi8(15));
    }
};

// INT8 against bytes: byte 4r + j of half h holds input 4h + j of row r, as code + 128.
struct Int8Bytes : Bytes {
    static constexpr int kBytes = 128;
    static constexpr int kStreamed = kBytes;
    static constexpr bool kCheap = true;
    static constexpr int kOffset = 128;
    inline __m512i decode(const uint8_t* at, int v) const { return _mm512_load_si512(at + 64 * v); }
};

}  // namespace quantkit
