// The second half of a decoder layer on few tokens: norm, router, experts (or one dense MLP) and residual.
#pragma once
#include "steps.h"

namespace quantkit {

// steps.py has the same fields.
struct MlpLayer {
    const Matrix *gate_up, *down;                // of the routed experts; a shared one may be the last of them
    const Matrix *shared_gate_up, *shared_down;  // of a shared one that is not, or null
    const float* norm;
    const uint16_t* router;  // bfloat16 [routed, hidden], or null: one MLP, for all tokens
    int64_t hidden, routed, top_k;
    float eps, router_scale;
    int32_t shared, renormalise;
};

// Logits of one token, float32 [routed]: sums in float32 of its hidden state and bfloat16 weights.
inline void router_logits(const MlpLayer& layer, const float* x, float* logits) {
    for (int64_t e = 0; e < layer.routed; ++e) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t k = 0; k < layer.hidden; k += 16) {
            const __mmask16 live = live_lanes(layer.hidden - k);
            sum = _mm512_fmadd_ps(load_kept<kBfloat16>(layer.router, e * layer.hidden + k, live), _mm512_maskz_loadu_ps(live, x + k), sum);
        }
        logits[e] = _mm512_reduce_add_ps(sum);
    }
}

// The best top_k of softmax(logits), best first, of equals the first; their weights as the router gives them.
inline void choose(const MlpLayer& layer, const float* logits, int64_t* ids, float* weights) {
    const int64_t n = layer.routed;
    std::vector<float> p(n);
    const float top = *std::max_element(logits, logits + n);
    float total = 0, chosen = 0;
    for (int64_t e = 0; e < n; ++e) total += p[e] = std::exp(logits[e] - top);
    for (int64_t e = 0; e < n; ++e) p[e] /= total;
    for (int64_t s = 0; s < layer.top_k; ++s) {
        ids[s] = std::max_element(p.begin(), p.end()) - p.begin();
        chosen += weights[s] = p[ids[s]];
        p[ids[s]] = -1;
    }
    for (int64_t s = 0; s < layer.top_k; ++s) weights[s] = (layer.renormalise ? weights[s] / chosen : weights[s]) * layer.router_scale;
}

// Each token's slots: those it is routed to, and the shared expert's.
struct Slots {
    int64_t each;
    std::vector<int64_t> ids;
    std::vector<float> weights;
    Slots(const MlpLayer& layer, int64_t tokens)
        : each(layer.router ? layer.top_k + (layer.shared ? 1 : 0) : 1), ids(tokens * each, layer.router ? layer.routed : 0),
          weights(tokens * each, 1.0f) {}
};

inline void mlp_half(const MlpLayer& layer, const float* h, float* out, float* logits, int64_t* ids, float* weights, int64_t tokens,
                     int threads) {
    const Buffer<float> x = buffer<float>(tokens * layer.hidden);
    Slots slots(layer, tokens);
    const auto prepare = [&] {
#pragma omp for schedule(static) nowait
        for (int64_t t = 0; t < tokens; ++t) {
            rms_norm(h + t * layer.hidden, layer.norm, layer.hidden, layer.eps, x.get() + t * layer.hidden);
            if (!layer.router) continue;
            int64_t* const to = ids + t * layer.top_k;
            float* const by = weights + t * layer.top_k;
            router_logits(layer, x.get() + t * layer.hidden, logits + t * layer.routed);
            choose(layer, logits + t * layer.routed, to, by);
            std::copy(to, to + layer.top_k, slots.ids.begin() + t * slots.each);
            std::copy(by, by + layer.top_k, slots.weights.begin() + t * slots.each);
        }
    };
    in_threads(threads, tokens > 1 && tokens * layer.hidden * std::max<int64_t>(layer.routed, 1) > kSerial, prepare);
    const int64_t experts = layer.router ? layer.routed + (layer.shared ? 1 : 0) : 1;
    const Experts all(*layer.gate_up, *layer.down, slots.ids.data(), tokens, slots.each, experts, threads);
    if (!layer.shared_gate_up) return in_threads(threads, true, [&] { all(x.get(), slots.weights.data(), h, out); });
    const std::vector<int64_t> first(tokens, 0);
    const std::vector<float> one(tokens, 1.0f);
    const Experts apart(*layer.shared_gate_up, *layer.shared_down, first.data(), tokens, 1, 1, threads);
    in_threads(threads, true, [&] {
        apart(x.get(), one.data(), h, out);
        meet();
        all(x.get(), slots.weights.data(), out, out);
    });
}

}  // namespace quantkit
