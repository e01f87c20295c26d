// A product of activations with a weight, or with those of several experts.
//
// A product is a list of jobs (an expert, or a part of its tokens). Threads take work items, a few row blocks of a job each.
#pragma once
#include <omp.h>

#include <memory>
#include <new>
#include <vector>

#include "activations.h"
#include "rows.h"

namespace quantkit {

// One linear, or one linear of each expert. linear.py has the same fields.
struct Matrix {
    const void* const* weight;  // [experts], each packed
    const void* const* scale;   // [experts], each bf16 or float32 [blocks, scales, 16]
    const void* const* zero;    // [experts], or null
    const float* input_scale;   // [experts], or null
    Work (*kernels)(int tile);  // of the format; null: weights are bfloat16 as they are stored, [rows, inputs]
    int64_t rows, inputs, chunk, chunks_per_scale, span;
    int32_t format, rounding, wide;  // wide: scales are float32
};

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

// Where all threads of a region wait for each other; nothing outside of one.
inline void meet() {
#pragma omp barrier
}

struct Free {
    void operator()(void* at) const { operator delete(at, kCacheLine); }
};

template <class T>
using Buffer = std::unique_ptr<T[], Free>;

template <class T>
Buffer<T> buffer(int64_t count) {
    return Buffer<T>(static_cast<T*>(operator new(std::max<int64_t>(count, 1) * sizeof(T), kCacheLine)));
}

// y[s, :] = weight of s's expert times x[index[s], :], for slots s sorted by expert. Everything is allocated beforehand.
class Product {
public:
    Product(const Matrix& m, const int64_t* offsets, int64_t experts, int threads)
        : threads_(threads), shape_{m.rows, m.inputs, m.chunk, m.chunks_per_scale, in_bf16(m) ? Bf16::kVectors : Bytes::kVectors},
          how_{static_cast<Rounding>(m.rounding), m.span, m.input_scale}, kernels_(m.kernels) {
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
        slab_ = several && kernels_ && in_bf16(m) ? kBlocks * shape_.steps() * Plain::kBytes : 0;
        plain_ = buffer<uint8_t>(threads * slab_);
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

    // The two halves of it, for a region of `threads`: no thread waits for the others at the end of either.
    void pack(const float* x, const int64_t* index) const {
        const int64_t items = static_cast<int64_t>(jobs_.size()) * widest_;
#pragma omp for schedule(dynamic, 1) nowait
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
#pragma omp for schedule(guided, 1) nowait
        for (int64_t item = 0; item < items; ++item) {
            const Job& job = jobs_[item / slabs];
            const int64_t first = item % slabs * kBlocks, last = std::min(first + kBlocks, shape_.blocks());
            if (kernels_) {
                kernels_(job.tile)(shape_, job, first, last, plain_.get() + omp_get_thread_num() * slab_, y);
            } else {
                multiply_rows(shape_, job, first * kRows, std::min(last * kRows, shape_.rows), y);
            }
        }
    }

private:
    static bool in_bf16(const Matrix& m) { return !m.kernels || m.format < 3; }

    // The jobs of one expert: one, or several of about equal size when its tokens would not fit kMaxTiles.
    void split(const Matrix& m, int expert, int64_t begin, int64_t end) {
        const int64_t tokens = end - begin, parts = ceil_div(tokens, kMaxTile * kMaxTiles);
        for (int64_t part = 0; part < parts; ++part) {
            Job job{};
            job.weight = static_cast<const uint8_t*>(m.weight[expert]);
            job.scale = m.scale ? m.scale[expert] : nullptr;
            job.wide = m.wide;
            job.zero = m.zero ? static_cast<const int8_t*>(m.zero[expert]) : nullptr;
            job.expert = expert;
            job.first = begin + tokens * part / parts;
            job.tokens = begin + tokens * (part + 1) / parts - job.first;
            job.tiles = static_cast<int>(m.kernels ? ceil_div(job.tokens, kMaxTile) : job.tokens);
            job.tile = tile_size(ceil_div(job.tokens, job.tiles));
            jobs_.push_back(job);
        }
    }

    int threads_;
    Shape shape_;
    Activation how_;
    Work (*kernels_)(int);
    int64_t room_ = 0, widest_ = 0;  // tokens of all jobs and of the largest, filled up to whole tiles
    int64_t slab_ = 0;               // bytes for a work item's decoded weights, of each thread
    std::vector<Job> jobs_;
    Buffer<uint32_t> words_;
    Buffer<float> sums_, x_scale_, codes_;
    Buffer<uint8_t> plain_;
};

}  // namespace quantkit
