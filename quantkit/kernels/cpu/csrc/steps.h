// The halves of a decoder layer on few tokens, each in one region of threads: norm, products, RoPE and append, attention over
// the cache, output and residual; norm, router, experts and residual. `quantkit.model.layer` says what they compute.
#pragma once
#include "attention.h"

namespace quantkit {

enum HeadNorm { kNone = 0, kBeforeRope = 1, kAfterRope = 2 };

// What of an attention half does not change from token to token. steps.py has the same fields.
struct AttentionLayer {
    const Matrix *q, *k, *v, *o;  // k and v null: K and V of another layer are read
    const float *norm, *q_norm, *k_norm;  // k_norm null: none, or one without a weight
    int64_t hidden, heads, kv_heads, head_dim;
    float eps, scale;
    int32_t head_norm;
};

// Where the tokens stand, and the cache.
struct Place {
    const float *cos, *sin;  // [time, head_dim], or one for each of the batch
    const int64_t* padding;  // [batch], or null
    Held key, value;
    int64_t batch, time, length;  // length: positions held, the new ones among them
    int32_t stored, own_tables;   // own_tables: cos and sin are [batch, time, head_dim]
};

// to = x / sqrt(mean(x^2) + eps) * weight, of n elements.
inline void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* to) {
    __m512 squares = _mm512_setzero_ps();
    for (int64_t k = 0; k < n; k += 16) {
        const __m512 v = _mm512_maskz_loadu_ps(live_lanes(n - k), x + k);
        squares = _mm512_fmadd_ps(v, v, squares);
    }
    const __m512 by = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / static_cast<float>(n) + eps));
    for (int64_t k = 0; k < n; k += 16) {
        const __mmask16 live = live_lanes(n - k);
        __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(live, x + k), by);
        if (weight) v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(live, weight + k));
        _mm512_mask_storeu_ps(to + k, live, v);
    }
}

// x [tokens, n] normalised, for a region of threads.
inline void rms_norms(const float* x, const float* weight, int64_t tokens, int64_t n, float eps, float* to) {
#pragma omp for schedule(static) nowait
    for (int64_t t = 0; t < tokens; ++t) rms_norm(x + t * n, weight, n, eps, to + t * n);
}

// Rotate-half RoPE: to = x * cos + (-second half, first half) * sin.
inline void rotate(const float* x, const float* cos, const float* sin, int64_t width, float* to) {
    const int64_t half = width / 2;
    for (int64_t k = 0; k < half; ++k) to[k] = x[k] * cos[k] - x[k + half] * sin[k];
    for (int64_t k = half; k < width; ++k) to[k] = x[k] * cos[k] + x[k - half] * sin[k];
}

class AttentionHalf {
public:
    AttentionHalf(const AttentionLayer& layer, const Place& place, int threads)
        : layer_(layer), place_(place), tokens_(place.batch * place.time), offsets_{0, tokens_},
          attention_({place.batch, place.time, layer.heads, layer.kv_heads, layer.head_dim, place.length, place.padding, place.key,
                      place.value, static_cast<Stored>(place.stored)}, threads),
          x_(buffer<float>(tokens_ * layer.hidden)), q_(buffer<float>(tokens_ * q_width())), k_(buffer<float>(tokens_ * kv_width())),
          v_(buffer<float>(tokens_ * kv_width())), mixed_(buffer<float>(tokens_ * q_width())), y_(buffer<float>(tokens_ * layer.hidden)) {
        products_.reserve(4);
        for (const Matrix* m : {layer.q, layer.k, layer.v, layer.o})
            if (m) products_.emplace_back(*m, offsets_, 1, threads);
    }

    // In a region of threads: out = h + attention(norm(h)), both [tokens, hidden].
    void operator()(const float* h, float* out) const {
        const int inputs = layer_.k ? 3 : 1;
        rms_norms(h, layer_.norm, tokens_, layer_.hidden, layer_.eps, x_.get());
        meet();
        for (int i = 0; i < inputs; ++i) products_[i].pack(x_.get(), nullptr);
        meet();
        float* const made[] = {q_.get(), k_.get(), v_.get()};
        for (int i = 0; i < inputs; ++i) products_[i].multiply(made[i]);
        meet();
        put();
        meet();
        attention_();
        meet();
        attention_.merge(mixed_.get());
        meet();
        products_[inputs].pack(mixed_.get(), nullptr);
        meet();
        products_[inputs].multiply(y_.get());
        meet();
        in_columns(tokens_, layer_.hidden, [=](int64_t t, int64_t first, int64_t last) {
            for (int64_t k = t * layer_.hidden + first; k < t * layer_.hidden + last; ++k) out[k] = h[k] + y_[k];
        });
    }

private:
    int64_t q_width() const { return layer_.heads * layer_.head_dim; }
    int64_t kv_width() const { return layer_.k ? layer_.kv_heads * layer_.head_dim : 0; }

    // Queries to where attention reads them; keys and values of the new positions into the cache.
    void put() const {
        const int64_t d = layer_.head_dim, all = layer_.heads + (layer_.k ? 2 * layer_.kv_heads : 0);
#pragma omp for schedule(static) nowait
        for (int64_t item = 0; item < tokens_ * all; ++item) {
            const int64_t token = item / all, head = item % all, kv = (head - layer_.heads) % layer_.kv_heads;
            if (head < layer_.heads) {
                put_query(token, head, q_.get() + token * q_width() + head * d);
            } else if (head < layer_.heads + layer_.kv_heads) {
                put_key(token, kv, k_.get() + token * kv_width() + kv * d);
            } else {
                keep(v_.get() + token * kv_width() + kv * d, d, place_.value, how(), at(token, kv, place_.value));
            }
        }
    }

    Stored how() const { return static_cast<Stored>(place_.stored); }

    int64_t at(int64_t token, int64_t kv, const Held& held) const {
        return (token / place_.time * layer_.kv_heads + kv) * held.room + place_.length - place_.time + token % place_.time;
    }

    // The head's norm and RoPE, in their order; x is overwritten.
    void turn(int64_t token, float* x, const float* weight, float* to) const {
        const int64_t d = layer_.head_dim, row = (place_.own_tables ? token : token % place_.time) * d;
        if (layer_.head_norm == kBeforeRope) rms_norm(x, weight, d, layer_.eps, x);
        rotate(x, place_.cos + row, place_.sin + row, d, to);
        if (layer_.head_norm == kAfterRope) rms_norm(to, weight, d, layer_.eps, to);
    }

    void put_query(int64_t token, int64_t head, float* x) const {
        const int64_t d = layer_.head_dim;
        float* to = attention_.query(token / place_.time, head, token % place_.time);
        turn(token, x, layer_.q_norm, to);
        for (int64_t k = 0; k < d; ++k) to[k] *= layer_.scale;
        std::fill(to + d, to + ceil_div(d, 16) * 16, 0.0f);
    }

    void put_key(int64_t token, int64_t kv, float* x) const {
        const std::unique_ptr<float[]> to(new float[layer_.head_dim]);
        turn(token, x, layer_.k_norm, to.get());
        keep(to.get(), layer_.head_dim, place_.key, how(), at(token, kv, place_.key));
    }

    AttentionLayer layer_;
    Place place_;
    int64_t tokens_, offsets_[2];
    CachedAttention attention_;
    std::vector<Product> products_;
    Buffer<float> x_, q_, k_, v_, mixed_, y_;
};

}  // namespace quantkit
