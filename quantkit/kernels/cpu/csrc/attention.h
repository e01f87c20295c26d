// Attention of few new positions over a long cache, which is read once, as it lies there.
//
// Positions are cut into spans of a fixed size; a work item is a span of one key head, with all query heads that share it. Items
// leave sums, which are merged (flash decoding, arXiv 2205.14135 and Dao et al. 2023), so that neither the number of threads nor
// of heads decides an order of summation.
#pragma once
#include "cache.h"
#include "experts.h"

namespace quantkit {

constexpr int64_t kSpan = 256;  // positions of a work item
constexpr int64_t kAtOnce = 16;  // positions decoded together: the lanes of a register

struct AttentionShape {
    int64_t batch, time, heads, kv_heads, width, length;  // length: positions held, the new ones among them
    const int64_t* padding;                               // [batch], or null
    Held key, value;
    Stored how;
    int64_t lanes() const { return ceil_div(width, 16) * 16; }
    int64_t group() const { return heads / kv_heads; }
    int64_t rows() const { return group() * time; }
    int64_t spans() const { return ceil_div(length, kSpan); }
};

// out [row, 16] = R rows of q times 16 keys, all `lanes` wide.
template <int R>
inline void dots(const float* q, const float* keys, int64_t lanes, float* out) {
    for (int64_t p = 0; p < kAtOnce; p += 4) {
        __m512 sum[R][4];
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < 4; ++j) sum[r][j] = _mm512_setzero_ps();
        for (int64_t k = 0; k < lanes; k += 16) {
            __m512 key[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) key[j] = _mm512_load_ps(keys + (p + j) * lanes + k);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const __m512 of_q = _mm512_load_ps(q + r * lanes + k);
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) sum[r][j] = _mm512_fmadd_ps(of_q, key[j], sum[r][j]);
            }
        }
        for (int r = 0; r < R; ++r) _mm_storeu_ps(out + r * kSpan + p, sum4(sum[r][0], sum[r][1], sum[r][2], sum[r][3]));
    }
}

// out [row, lanes] += R rows of p [16] times 16 values.
template <int R>
inline void mix(const float* p, const float* values, int64_t lanes, float* out) {
    for (int64_t k = 0; k < lanes; k += 16) {
        __m512 sum[R][2];
        for (int r = 0; r < R; ++r) sum[r][0] = _mm512_load_ps(out + r * lanes + k), sum[r][1] = _mm512_setzero_ps();
        for (int64_t j = 0; j < kAtOnce; j += 2)
#pragma GCC unroll 2
            for (int64_t odd = 0; odd < 2; ++odd) {
                const __m512 value = _mm512_load_ps(values + (j + odd) * lanes + k);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r)
                    sum[r][odd] = _mm512_fmadd_ps(_mm512_set1_ps(p[r * kSpan + j + odd]), value, sum[r][odd]);
            }
        for (int r = 0; r < R; ++r) _mm512_store_ps(out + r * lanes + k, _mm512_add_ps(sum[r][0], sum[r][1]));
    }
}

// Calls body(first row, how many) for up to four rows at a time.
template <class Body>
inline void by_rows(int64_t rows, Body body) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) body(r, std::integral_constant<int, 4>{});
    if (rows - r == 3) body(r, std::integral_constant<int, 3>{});
    if (rows - r == 2) body(r, std::integral_constant<int, 2>{});
    if (rows - r == 1) body(r, std::integral_constant<int, 1>{});
}

class CachedAttention {
public:
    CachedAttention(const AttentionShape& shape, int threads)
        : s_(shape), q_(buffer<float>(s_.batch * s_.kv_heads * s_.rows() * s_.lanes())),
          sums_(buffer<float>(items() * s_.rows() * s_.lanes())), tops_(buffer<float>(items() * s_.rows())),
          totals_(buffer<float>(items() * s_.rows())), scores_(buffer<float>(threads * s_.rows() * kSpan)),
          decoded_(buffer<float>(threads * kAtOnce * s_.lanes())) {}

    // Where the query of a head at a new position goes: [lanes], times the scale of the scores, zero beyond the width.
    float* query(int64_t b, int64_t head, int64_t i) const {
        return q_.get() + (((b * s_.kv_heads + head / s_.group()) * s_.group() + head % s_.group()) * s_.time + i) * s_.lanes();
    }

    // In a region of `threads`, with the new positions kept and the queries put.
    void operator()() const {
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t item = 0; item < items(); ++item) {
            if (s_.how == kFloat32) span<kFloat32>(item);
            if (s_.how == kBfloat16) span<kBfloat16>(item);
            if (s_.how == kE4m3) span<kE4m3>(item);
        }
    }

    // After all items: out [batch, time, heads * width].
    void merge(float* out) const {
        const int64_t each = s_.batch * s_.kv_heads * s_.rows();
#pragma omp for schedule(static) nowait
        for (int64_t r = 0; r < each; ++r) {
            const int64_t of_kv = r / s_.rows(), row = r % s_.rows(), b = of_kv / s_.kv_heads;
            const int64_t head = of_kv % s_.kv_heads * s_.group() + row / s_.time, i = row % s_.time;
            merge_row(of_kv, row, out + ((b * s_.time + i) * s_.heads + head) * s_.width);
        }
    }

private:
    int64_t items() const { return s_.batch * s_.kv_heads * s_.spans(); }

    void merge_row(int64_t of_kv, int64_t row, float* out) const {
        float top = -INFINITY, total = 0;
        for (int64_t i = 0; i < s_.spans(); ++i) top = std::max(top, tops_[(of_kv * s_.spans() + i) * s_.rows() + row]);
        std::fill(out, out + s_.width, 0.0f);
        for (int64_t i = 0; i < s_.spans(); ++i) {
            const int64_t at = (of_kv * s_.spans() + i) * s_.rows() + row;
            if (tops_[at] == -INFINITY && totals_[at] == 0) continue;  // nothing there is seen
            const float share = std::exp(tops_[at] - top);
            total += share * totals_[at];
            for (int64_t k = 0; k < s_.width; ++k) out[k] += share * sums_[at * s_.lanes() + k];
        }
        for (int64_t k = 0; k < s_.width; ++k) out[k] /= total;
    }

    template <Stored How>
    void span(int64_t item) const {
        const int64_t of_kv = item / s_.spans(), first = item % s_.spans() * kSpan, last = std::min(first + kSpan, s_.length);
        const int64_t rows = s_.rows(), lanes = s_.lanes();
        const float* q = q_.get() + of_kv * rows * lanes;
        float* scores = scores_.get() + omp_get_thread_num() * rows * kSpan;
        for (int64_t at = first; at < last; at += kAtOnce) {
            const float* keys = decode<How>(s_.key, of_kv, at, last);
            by_rows(rows, [=](int64_t r, auto n) { dots<n>(q + r * lanes, keys, lanes, scores + r * kSpan + at - first); });
        }
        for (int64_t r = 0; r < rows; ++r) soften(of_kv, item * rows + r, r % s_.time, first, last, scores + r * kSpan);
        float* out = sums_.get() + item * rows * lanes;
        std::fill(out, out + rows * lanes, 0.0f);
        for (int64_t at = first; at < last; at += kAtOnce) {
            const float* values = decode<How>(s_.value, of_kv, at, last);
            by_rows(rows, [=](int64_t r, auto n) { mix<n>(scores + r * kSpan + at - first, values, lanes, out + r * lanes); });
        }
    }

    // 16 positions from `at` on, float32 [16, lanes], zero from `last` on.
    template <Stored How>
    const float* decode(const Held& held, int64_t of_kv, int64_t at, int64_t last) const {
        float* to = decoded_.get() + omp_get_thread_num() * kAtOnce * s_.lanes();
        const int64_t live = std::min(kAtOnce, last - at), place = of_kv * held.room + at;
        for (int64_t p = 0; p < live; ++p)
            for (int64_t k = 0; k < s_.width; k += 16)
                _mm512_store_ps(to + p * s_.lanes() + k, load_kept<How>(held.codes, (place + p) * s_.width + k, live_lanes(s_.width - k)));
        std::fill(to + live * s_.lanes(), to + kAtOnce * s_.lanes(), 0.0f);
        return to;
    }

    // 16 scales of a head from position `at` on.
    static __m512 scales(const Held& held, int64_t of_kv, int64_t at, __mmask16 live) {
        return load_kept<kBfloat16>(held.scale, of_kv * held.room + at, live);
    }

    // Products of a row with a span's keys become what its values are weighted with; their top and total are noted.
    void soften(int64_t of_kv, int64_t note, int64_t i, int64_t first, int64_t last, float* row) const {
        const int64_t seen = s_.length - s_.time + i, start = s_.padding ? std::min(s_.padding[of_kv / s_.kv_heads], seen) : 0;
        const __m512 never = _mm512_set1_ps(-INFINITY);
        __m512 top = never, total = _mm512_setzero_ps();
        const auto visible = [&](int64_t at) {  // of the 16 positions from `at` on
            const int64_t end = std::min(last, seen + 1) - at, begin = start - at;
            if (end <= 0 || begin >= kAtOnce) return static_cast<__mmask16>(0);
            return static_cast<__mmask16>(live_lanes(end) & ~(begin > 0 ? live_lanes(begin) : 0));
        };
        for (int64_t at = first; at < last; at += kAtOnce) {
            __m512 x = _mm512_loadu_ps(row + at - first);
            if (s_.key.scale) x = _mm512_mul_ps(x, scales(s_.key, of_kv, at, live_lanes(last - at)));
            x = _mm512_mask_blend_ps(visible(at), never, x);
            _mm512_storeu_ps(row + at - first, x);
            top = _mm512_max_ps(top, x);
        }
        const float highest = _mm512_reduce_max_ps(top);
        const __m512 by = _mm512_set1_ps(highest);
        for (int64_t at = first; at < last; at += kAtOnce) {
            const __m512 x = _mm512_loadu_ps(row + at - first);
            __m512 p = _mm512_maskz_mov_ps(visible(at), exp16(_mm512_sub_ps(x, by)));
            total = _mm512_add_ps(total, p);
            if (s_.value.scale) p = _mm512_maskz_mul_ps(visible(at), p, scales(s_.value, of_kv, at, live_lanes(last - at)));
            _mm512_storeu_ps(row + at - first, p);
        }
        tops_[note] = highest;
        totals_[note] = _mm512_reduce_add_ps(total);
    }

    AttentionShape s_;
    Buffer<float> q_, sums_, tops_, totals_, scores_, decoded_;
};

}  // namespace quantkit
