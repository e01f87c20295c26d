// Products of activations with INT4, INT8 or FP8 E4M3 weights, and whole layers of experts, for processors with AVX-512, its
// BF16 dot product and VNNI. Weights come packed (linear.py); formats.h, tiles.h and activations.h say how all this works.
//
// A product is a list of jobs (an expert, or a part of its tokens). Threads take work items, a few row blocks of a job each.
//
// The kernels of each format are a library of their own (int4.cpp, ...), since most of the compiler's time goes into them and
// a model needs one or two. They come as a function from a tile's size to its kernel.
#include <omp.h>

#include <memory>
#include <new>
#include <vector>

#include "activations.h"

using namespace quantkit;

// One linear, or one linear of each expert. linear.py has the same fields.
struct Matrix {
    const void* const* weight;  // [experts], each packed
    const void* const* scale;   // [experts], each bf16 or float32 [blocks, scales, 16]
    const void* const* zero;    // [experts], or null
    const float* input_scale;   // [experts], or null
    Work (*kernels)(int tile);  // of the format
    int64_t rows, inputs, chunk, chunks_per_scale, span;
    int32_t format, rounding, wide;  // wide: scales are float32
};

namespace {

constexpr int kBlocks = 4;    // row blocks of one work item
constexpr int kMaxTiles = 16;  // tiles of a job
constexpr int64_t kSerial = 1 << 16;  // elements to prepare in one thread: 256 KB
constexpr std::align_val_t kCacheLine{64};

// Calls body, whose loops are `omp for`, in all threads, or here alone: little work is not worth another meeting of the
// threads, which costs a time slice on a busy machine.
template <class Body>
void in_threads(int threads, bool worth, Body body) {
    if (worth && threads > 1) {
#pragma omp parallel num_threads(threads)
        body();
    } else {
        body();
    }
}

struct Free {
    void operator()(void* at) const { operator delete(at, kCacheLine); }
};

template <class T>
using Buffer = std::unique_ptr<T, Free>;

template <class T>
Buffer<T> buffer(int64_t count) {
    return Buffer<T>(static_cast<T*>(operator new(std::max<int64_t>(count, 1) * sizeof(T), kCacheLine)));
}

// y[s, :] = weight of s's expert times x[index[s], :], for slots s sorted by expert. Everything is allocated beforehand.
class Product {
public:
    Product(const Matrix& m, const int64_t* offsets, int64_t experts, int threads)
        : threads_(threads), shape_{m.rows, m.inputs, m.chunk, m.chunks_per_scale, m.format < 3 ? Bf16::kVectors : Bytes::kVectors},
          how_{static_cast<Rounding>(m.rounding), m.span, m.input_scale}, format_(m.format), kernels_(m.kernels) {
        for (int64_t e = 0; e < experts; ++e) split(m, static_cast<int>(e), offsets[e], offsets[e + 1]);
        bool several = false;
        for (const Job& job : jobs_) {
            room_ += job.tile * job.tiles;
            widest_ = std::max<int64_t>(widest_, job.tile * job.tiles);
            several |= job.tiles > 1;
        }
        words_ = buffer<uint32_t>(room_ * shape_.steps() * shape_.words);
        sums_ = buffer<float>(room_ * shape_.chunks());
        x_scale_ = buffer<float>(how_.rounding == kKeep ? 0 : room_ * shape_.chunks());
        codes_ = buffer<float>(threads * shape_.steps() * kStep);
        plain_ = buffer<uint8_t>(several && format_ < 3 ? threads * plain_bytes() : 0);
        int64_t before = 0;
        for (Job& job : jobs_) {
            job.words = words_.get() + before * shape_.steps() * shape_.words;
            job.sums = sums_.get() + before * shape_.chunks();
            job.x_scale = how_.rounding == kKeep ? nullptr : x_scale_.get() + before * shape_.chunks();
            before += job.tile * job.tiles;
        }
    }

    void operator()(const float* x, const int64_t* index, float* y) const {
        in_threads(threads_, room_ * shape_.inputs > kSerial, [=] { pack(x, index); });
        in_threads(threads_, true, [=] { multiply(y); });
    }

private:
    void pack(const float* x, const int64_t* index) const {
        const int64_t items = static_cast<int64_t>(jobs_.size()) * widest_;
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < items; ++item) {
            const Job& job = jobs_[item / widest_];
            const int64_t token = item % widest_;
            if (token >= job.tile * job.tiles) continue;
            const int64_t slot = job.first + token;
            const float* from = token < job.tokens ? x + (index ? index[slot] : slot) * shape_.inputs : nullptr;
            float* codes = codes_.get() + omp_get_thread_num() * shape_.steps() * kStep;
            pack_token(shape_, job, how_, from, static_cast<int>(token / job.tile), static_cast<int>(token % job.tile), codes);
        }
    }

    void multiply(float* y) const {
        const int64_t slabs = ceil_div(shape_.blocks(), kBlocks), items = slabs * static_cast<int64_t>(jobs_.size());
#pragma omp for schedule(guided, 1)
        for (int64_t item = 0; item < items; ++item) {
            const Job& job = jobs_[item / slabs];
            const int64_t first = item % slabs * kBlocks;
            uint8_t* plain = plain_.get() + (format_ < 3 ? omp_get_thread_num() * plain_bytes() : 0);
            kernels_(job.tile)(shape_, job, first, std::min(first + kBlocks, shape_.blocks()), plain, y);
        }
    }

    int64_t plain_bytes() const { return kBlocks * shape_.steps() * Plain::kBytes; }

    // The jobs of one expert: one, or several of about equal size when its tokens would not fit kMaxTiles.
    void split(const Matrix& m, int expert, int64_t begin, int64_t end) {
        const int64_t tokens = end - begin, parts = ceil_div(tokens, kMaxTile * kMaxTiles);
        for (int64_t part = 0; part < parts; ++part) {
            Job job{};
            job.weight = static_cast<const uint8_t*>(m.weight[expert]);
            job.scale = m.scale[expert];
            job.wide = m.wide;
            job.zero = m.zero ? static_cast<const int8_t*>(m.zero[expert]) : nullptr;
            job.expert = expert;
            job.first = begin + tokens * part / parts;
            job.tokens = begin + tokens * (part + 1) / parts - job.first;
            job.tiles = static_cast<int>(ceil_div(job.tokens, kMaxTile));
            job.tile = tile_size(ceil_div(job.tokens, job.tiles));
            jobs_.push_back(job);
        }
    }

    int threads_;
    Shape shape_;
    Activation how_;
    int format_;
    Work (*kernels_)(int);
    int64_t room_ = 0, widest_ = 0;  // tokens of all jobs and of the largest, filled up to whole tiles
    std::vector<Job> jobs_;
    Buffer<uint32_t> words_;
    Buffer<float> sums_, x_scale_, codes_;
    Buffer<uint8_t> plain_;
};

// e^x for x <= 88, to 2 units in the last place: 2^n * e^r with n = round(x / ln 2), e^r by its Taylor polynomial.
inline __m512 exp16(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);  // ln 2 in two parts: n times the first is exact
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 sum = _mm512_set1_ps(1.0f / 5040);
    for (float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(factor));
    return _mm512_scalef_ps(sum, n);
}

// act [slots, inner] = silu(gate) * up, from the two halves of middle [slots, wide].
void gate(const float* middle, int64_t slots, int64_t inner, int64_t wide, float* act) {
    const __m512 one = _mm512_set1_ps(1.0f), most = _mm512_set1_ps(88.0f);
#pragma omp for
    for (int64_t s = 0; s < slots; ++s)
        for (int64_t k = 0; k < inner; k += 16) {
            const __mmask16 live = live_lanes(inner - k);
            const __m512 g = _mm512_maskz_loadu_ps(live, middle + s * wide + k);
            const __m512 u = _mm512_maskz_loadu_ps(live, middle + s * wide + wide / 2 + k);
            const __m512 below = _mm512_add_ps(one, exp16(_mm512_min_ps(_mm512_sub_ps(_mm512_setzero_ps(), g), most)));
            _mm512_mask_storeu_ps(act + s * inner + k, live, _mm512_mul_ps(_mm512_div_ps(g, below), u));
        }
}

// Slots sorted by expert: where each expert's begin, and the slot (token * top_k + choice) at each place.
struct Order {
    std::vector<int64_t> offsets, slots, tokens, places;
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

// out [tokens, hidden]: the sum of each token's slots, weighted, in the order of its choices.
void combine(const float* y, const Order& order, const float* router, int64_t tokens, int64_t top_k, int64_t hidden, float* out) {
#pragma omp for
    for (int64_t t = 0; t < tokens; ++t) {
        float* to = out + t * hidden;
        std::fill(to, to + hidden, 0.0f);
        for (int64_t s = t * top_k; s < (t + 1) * top_k; ++s) {
            const float* from = y + order.places[s] * hidden;
            for (int64_t k = 0; k < hidden; ++k) to[k] += router[s] * from[k];
        }
    }
}

}  // namespace

// What an entry returns.
enum Status : int { kDone = 0, kNoMemory = 1, kNoSuchExpert = 2 };

// y [tokens, rows] = x [tokens, inputs] times a weight.
extern "C" int quantkit_matmul(const Matrix* m, const float* x, float* y, int64_t tokens, int threads) {
    try {
        const int64_t offsets[] = {0, tokens};
        Product(*m, offsets, 1, threads)(x, nullptr, y);
    } catch (const std::bad_alloc&) {
        return kNoMemory;
    }
    return kDone;
}

// out [tokens, hidden] = sum over a token's top_k ids of router * down(silu(gate x) * up x). gate_up holds the rows of gate,
// filled up to whole blocks, then those of up likewise; hidden is down's rows. An expert without tokens is not read.
extern "C" int quantkit_experts(const Matrix* gate_up, const Matrix* down, const int64_t* ids, const float* router, const float* x,
                                float* out, int64_t tokens, int64_t top_k, int64_t experts, int threads) {
    const int64_t slots = tokens * top_k;
    if (std::any_of(ids, ids + slots, [=](int64_t id) { return id < 0 || id >= experts; })) return kNoSuchExpert;
    try {
        const Order order(ids, tokens, top_k, experts);
        const int64_t wide = gate_up->rows, inner = down->inputs, hidden = down->rows;
        const Buffer<float> middle = buffer<float>(slots * wide), act = buffer<float>(slots * inner), y = buffer<float>(slots * hidden);
        const Product first(*gate_up, order.offsets.data(), experts, threads), second(*down, order.offsets.data(), experts, threads);
        first(x, order.tokens.data(), middle.get());
        in_threads(threads, slots * inner > kSerial, [&] { gate(middle.get(), slots, inner, wide, act.get()); });
        second(act.get(), nullptr, y.get());
        in_threads(threads, slots * hidden > kSerial, [&] { combine(y.get(), order, router, tokens, top_k, hidden, out); });
    } catch (const std::bad_alloc&) {
        return kNoMemory;
    }
    return kDone;
}
