// Products of activations with INT4, INT8, FP8 E4M3 or bfloat16 weights, whole layers of experts, and the halves of a decoder
// layer, for processors with AVX-512, its BF16 dot product and VNNI. Weights come packed (linear.py); formats.h, tiles.h,
// activations.h, product.h, attention.h and steps.h say how all this works.
//
// The kernels of each format are a library of their own (int4.cpp, ...), since most of the compiler's time goes into them and
// a model needs one or two. They come as a function from a tile's size to its kernel.
#include "mlp.h"

using namespace quantkit;

// What an entry returns.
enum Status : int { kDone = 0, kNoMemory = 1, kNoSuchExpert = 2 };

namespace {

template <class Body>
int with_memory(Body body) {
    try {
        return body();
    } catch (const std::bad_alloc&) {
        return kNoMemory;
    }
}

}  // namespace

// y [tokens, rows] = x [tokens, inputs] times a weight.
extern "C" int quantkit_matmul(const Matrix* m, const float* x, float* y, int64_t tokens, int threads) {
    return with_memory([=] {
        const int64_t offsets[] = {0, tokens};
        Product(*m, offsets, 1, threads)(x, nullptr, y);
        return kDone;
    });
}

// out [tokens, hidden] = sum over a token's top_k ids of router * down(silu(gate x) * up x).
extern "C" int quantkit_experts(const Matrix* gate_up, const Matrix* down, const int64_t* ids, const float* router, const float* x,
                                float* out, int64_t tokens, int64_t top_k, int64_t experts, int threads) {
    if (outside(ids, tokens * top_k, experts)) return kNoSuchExpert;
    return with_memory([=] {
        const Experts all(*gate_up, *down, ids, tokens, top_k, experts, threads);
        in_threads(threads, true, [&] { all(x, router, nullptr, out); });
        return kDone;
    });
}

// out [batch * time, hidden] = h + attention(norm(h)); the new positions are kept.
extern "C" int quantkit_attention_half(const AttentionLayer* layer, const Place* place, const float* h, float* out, int threads) {
    return with_memory([=] {
        const AttentionHalf half(*layer, *place, threads);
        in_threads(threads, true, [&] { half(h, out); });
        return kDone;
    });
}

// out [tokens, hidden] = h + mlp(norm(h)); logits, ids and weights: the routing, where there is a router.
extern "C" int quantkit_mlp_half(const MlpLayer* layer, const float* h, float* out, float* logits, int64_t* ids, float* weights,
                                 int64_t tokens, int threads) {
    return with_memory([=] {
        mlp_half(*layer, h, out, logits, ids, weights, tokens, threads);
        return kDone;
    });
}
