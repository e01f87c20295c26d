// The loops of quantization: which step of a scale loses least, and a block of GPTQ's columns. What each computes, and in
// which order it sums, is in quantkit/quant/loops.py; built without contraction, so that the codes are the same.
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

constexpr int kLanes = 16;
constexpr int kVectors = 4;  // of rows that a thread repairs at once: as many additions are under way
constexpr int64_t kTile = kVectors * kLanes;
constexpr int64_t kMostColumns = 128;

inline __mmask16 live(int64_t left) {
    return static_cast<__mmask16>(left >= kLanes ? 0xFFFF : left <= 0 ? 0 : (1u << left) - 1);
}

inline __m512 nearest_integer(__m512 y) {
    return _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline __m512 clamp(__m512 y, float low, float high) {
    return _mm512_min_ps(_mm512_max_ps(y, _mm512_set1_ps(low)), _mm512_set1_ps(high));
}

// values[0..16), by halves.
inline float sum_of_16(__m512 v) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// The sum of values[0..count), which are overwritten: the later half is added to the earlier, until one is left.
float by_halves(float* values, int64_t count) {
    while (count > kLanes) {
        const int64_t half = (count + 1) / 2, moved = count - half;
        for (int64_t i = 0; i < moved; i += kLanes) {
            const __mmask16 mask = live(moved - i);
            const __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, values + i), _mm512_maskz_loadu_ps(mask, values + half + i));
            _mm512_mask_storeu_ps(values + i, mask, sum);
        }
        count = half;
    }
    if (count == kLanes) return sum_of_16(_mm512_loadu_ps(values));
    while (count > 1) {
        const int64_t half = (count + 1) / 2;
        for (int64_t i = 0; i < count - half; ++i) values[i] += values[half + i];
        count = half;
    }
    return values[0];
}

// importance * (w - code * step)^2 of lanes whose code (without its zero point) this is.
inline __m512 loss_of(__m512 w, __m512 code, __m512 step, __m512 importance) {
    const __m512 error = _mm512_sub_ps(w, _mm512_mul_ps(code, step));
    return _mm512_mul_ps(_mm512_mul_ps(error, error), importance);
}

}  // namespace

extern "C" {

// cells [rows, cells, span], importance [cells, span], steps and offsets (or null) [candidates, rows, cells], best [rows, cells].
void quantkit_least(const float* cells, const float* importance, const float* steps, const float* offsets, int64_t* best,
                    int64_t rows, int64_t count, int64_t span, int64_t candidates, float low, float high, int both, int threads) {
    const int ways = both ? 2 : 1;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> buffers[2] = {std::vector<float>(span), std::vector<float>(span)};
        float *plain = buffers[0].data(), *turned = buffers[1].data();
#pragma omp for
        for (int64_t at = 0; at < rows * count; ++at) {
            const float *w = cells + at * span, *cost = importance + at % count * span;
            float lowest = __builtin_inff();
            int64_t found = -1;
            for (int64_t c = 0; c < candidates; ++c) {
                const float given = steps[c * rows * count + at], zero = offsets ? offsets[c * rows * count + at] : 0.0f;
                const __m512 step = _mm512_set1_ps(given), inverse = _mm512_set1_ps(1.0f / given), offset = _mm512_set1_ps(zero);
                for (int64_t i = 0; i < span; i += kLanes) {
                    const __mmask16 mask = live(span - i);
                    const __m512 value = _mm512_maskz_loadu_ps(mask, w + i), weight = _mm512_maskz_loadu_ps(mask, cost + i);
                    const __m512 code = nearest_integer(_mm512_mul_ps(value, inverse));
                    const __m512 kept = offsets ? _mm512_sub_ps(clamp(_mm512_add_ps(code, offset), low, high), offset)
                                                : clamp(code, low, high);
                    _mm512_mask_storeu_ps(plain + i, mask, loss_of(value, kept, step, weight));
                    if (both) _mm512_mask_storeu_ps(turned + i, mask, loss_of(value, clamp(code, -high, -low), step, weight));
                }
                for (int j = 0; j < ways; ++j) {
                    const float loss = by_halves(j ? turned : plain, span);
                    if (loss < lowest) lowest = loss, found = ways * c + j;
                }
            }
            best[at] = found;
        }
    }
}

// left, weight, step, offset (or null), codes, errors [columns, rows]; ratios [columns, columns]; squares [columns]; lost [rows].
// columns <= 128.
void quantkit_repair(float* left, const float* weight, const float* ratios, const float* squares, const float* step,
                     const float* offset, int8_t* codes, float* errors, float* lost, int64_t columns, int64_t rows, float low,
                     float high, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t first = 0; first < rows; first += kTile) {
        alignas(64) float known[kMostColumns * kTile];  // errors of this tile
        __m512 sums[kVectors] = {};
        for (int64_t i = columns - 1; i >= 0; --i) {
            __m512 x[kVectors];
            for (int v = 0; v < kVectors; ++v)
                x[v] = _mm512_maskz_loadu_ps(live(rows - first - v * kLanes), left + i * rows + first + v * kLanes);
            for (int64_t k = columns - 1; k > i; --k) {
                const __m512 ratio = _mm512_set1_ps(ratios[i * columns + k]);
                for (int v = 0; v < kVectors; ++v)
                    x[v] = _mm512_add_ps(x[v], _mm512_mul_ps(ratio, _mm512_load_ps(known + k * kTile + v * kLanes)));
            }
            for (int v = 0; v < kVectors; ++v) {
                const int64_t at = i * rows + first + v * kLanes;
                const __mmask16 mask = live(rows - first - v * kLanes);
                const __m512 s = _mm512_mask_loadu_ps(_mm512_set1_ps(1.0f), mask, step + at);
                const __m512 z = offset ? _mm512_maskz_loadu_ps(mask, offset + at) : _mm512_setzero_ps();
                const __m512 code = clamp(_mm512_add_ps(nearest_integer(_mm512_div_ps(x[v], s)), z), low, high);
                const __m512 value = _mm512_mul_ps(_mm512_sub_ps(code, z), s);
                const __m512 error = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, weight + at), value);
                const __m512 rest = _mm512_sub_ps(x[v], value);
                sums[v] = _mm512_add_ps(sums[v], _mm512_mul_ps(_mm512_mul_ps(rest, rest), _mm512_set1_ps(squares[i])));
                _mm512_store_ps(known + i * kTile + v * kLanes, error);
                _mm512_mask_storeu_ps(left + at, mask, x[v]);
                _mm512_mask_storeu_ps(errors + at, mask, error);
                _mm512_mask_cvtepi32_storeu_epi8(codes + at, mask, _mm512_cvtps_epi32(code));
            }
        }
        for (int v = 0; v < kVectors; ++v)
            _mm512_mask_storeu_ps(lost + first + v * kLanes, live(rows - first - v * kLanes), sums[v]);
    }
}
}
