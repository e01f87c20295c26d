// A layer of gated MLPs: each token's slots go to its experts, and their outputs are weighted and summed.
#pragma once
#include "product.h"

namespace quantkit {

// e^x for x <= 88, to 2 units in the last place: 2^n * e^r with n = round(x / ln 2), e^r by its Taylor polynomial. NaN stays.
inline __m512 exp16(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x);
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);  // ln 2 in two parts: n times the first is exact
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 sum = _mm512_set1_ps(1.0f / 5040);
    for (float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(factor));
    return _mm512_scalef_ps(sum, n);
}

constexpr int64_t kColumns = 256;  // of a row, that a thread takes at once

// Calls body(row, first, last) for the columns of each row, some at a time; no thread waits at the end.
template <class Body>
void in_columns(int64_t rows, int64_t columns, Body body) {
    const int64_t parts = ceil_div(columns, kColumns);
#pragma omp for schedule(static) nowait
    for (int64_t item = 0; item < rows * parts; ++item)
        body(item / parts, item % parts * kColumns, std::min(columns, (item % parts + 1) * kColumns));
}

// act [slots, inner] = silu(gate) * up, from the two halves of middle [slots, wide].
inline void gate(const float* middle, int64_t slots, int64_t inner, int64_t wide, float* act) {
    const __m512 one = _mm512_set1_ps(1.0f), most = _mm512_set1_ps(88.0f);
    in_columns(slots, inner, [=](int64_t s, int64_t first, int64_t last) {
        for (int64_t k = first; k < last; k += 16) {
            const __mmask16 live = live_lanes(last - k);
            const __m512 g = _mm512_maskz_loadu_ps(live, middle + s * wide + k);
            const __m512 u = _mm512_maskz_loadu_ps(live, middle + s * wide + wide / 2 + k);
            const __m512 below = _mm512_add_ps(one, exp16(_mm512_min_ps(most, _mm512_sub_ps(_mm512_setzero_ps(), g))));
            _mm512_mask_storeu_ps(act + s * inner + k, live, _mm512_mul_ps(_mm512_div_ps(g, below), u));
        }
    });
}

// Slots sorted by expert: where each expert's begin, and the slot (token * top_k + choice) at each place.
struct Order {
    std::vector<int64_t> offsets, tokens, places;
    Order(const int64_t* ids, int64_t tokens_in_all, int64_t top_k, int64_t experts)
        : offsets(experts + 1), tokens(tokens_in_all * top_k), places(tokens_in_all * top_k) {
        for (size_t s = 0; s < places.size(); ++s) ++offsets[ids[s] + 1];
        for (int64_t e = 0; e < experts; ++e) offsets[e + 1] += offsets[e];
        std::vector<int64_t> next(offsets.begin(), offsets.end() - 1);
        for (size_t s = 0; s < places.size(); ++s) {
            places[s] = next[ids[s]]++;
            tokens[places[s]] = static_cast<int64_t>(s) / top_k;
        }
    }
};

// out [tokens, hidden]: h, or nothing, and the sum of each token's slots, weighted, in the order of its choices.
inline void combine(const float* y, const Order& order, const float* router, const float* h, int64_t tokens, int64_t top_k,
                    int64_t hidden, float* out) {
    in_columns(tokens, hidden, [&](int64_t t, int64_t first, int64_t last) {
        float sum[kColumns] = {};
        for (int64_t s = t * top_k; s < (t + 1) * top_k; ++s) {
            const float* from = y + order.places[s] * hidden + first;
            for (int64_t k = 0; k < last - first; ++k) sum[k] += router[s] * from[k];
        }
        for (int64_t k = first; k < last; ++k) out[t * hidden + k] = h ? h[t * hidden + k] + sum[k - first] : sum[k - first];
    });
}

// All of a layer's experts on some tokens. gate_up holds the rows of gate, filled up to whole blocks, then those of up
// likewise; hidden is down's rows. An expert without tokens is not read.
class Experts {
public:
    Experts(const Matrix& gate_up, const Matrix& down, const int64_t* ids, int64_t tokens, int64_t top_k, int64_t experts, int threads)
        : tokens_(tokens), top_k_(top_k), wide_(gate_up.rows), inner_(down.inputs), hidden_(down.rows),
          order_(ids, tokens, top_k, experts), first_(gate_up, order_.offsets.data(), experts, threads),
          second_(down, order_.offsets.data(), experts, threads), middle_(buffer<float>(slots() * wide_)),
          act_(buffer<float>(slots() * inner_)), y_(buffer<float>(slots() * hidden_)) {}

    // In a region of `threads`. out = h (where not null) + the experts' outputs on x, weighted by router [tokens, top_k].
    void operator()(const float* x, const float* router, const float* h, float* out) const {
        first_.pack(x, order_.tokens.data());
        meet();
        first_.multiply(middle_.get());
        meet();
        gate(middle_.get(), slots(), inner_, wide_, act_.get());
        meet();
        second_.pack(act_.get(), nullptr);
        meet();
        second_.multiply(y_.get());
        meet();
        combine(y_.get(), order_, router, h, tokens_, top_k_, hidden_, out);
    }

private:
    int64_t slots() const { return tokens_ * top_k_; }

    int64_t tokens_, top_k_, wide_, inner_, hidden_;
    Order order_;
    Product first_, second_;
    Buffer<float> middle_, act_, y_;
};

inline bool outside(const int64_t* ids, int64_t slots, int64_t experts) {
    return std::any_of(ids, ids + slots, [=](int64_t id) { return id < 0 || id >= experts; });
}

}  // namespace quantkit
