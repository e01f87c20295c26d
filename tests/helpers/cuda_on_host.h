// Enough of CUDA to run w4a16_decode.cu on a CPU, one thread of the operating system a CUDA thread, to test its indexing.
// mma.m16n8k16 is computed from all lanes' fragments as the PTX manual lays them out (section "Matrix Fragments for
// mma.m16n8k16"), so a wrong fragment gives a wrong number here too.
#pragma once
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(name) alignas(128) static unsigned char name[227 * 1024];  // one block runs at a time

using std::min;
typedef int cudaError_t;
typedef void *cudaStream_t;
constexpr int cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9;
constexpr int cudaDevAttrMaxSharedMemoryPerBlockOptin = 97, cudaFuncAttributeMaxDynamicSharedMemorySize = 8;
inline int host_shared = 227 * 1024;  // bytes of shared memory that a block may have
inline int cudaGetDevice(int *device) { return *device = 0; }
inline int cudaDeviceGetAttribute(int *value, int, int) { return *value = host_shared, 0; }
template <class T> int cudaFuncSetAttribute(T *, int, int bytes) { return bytes <= host_shared ? 0 : cudaErrorInvalidValue; }
inline int cudaGetLastError() { return 0; }
struct cudaFuncAttributes {};
template <class T> int cudaFuncGetAttributes(cudaFuncAttributes *, T *) { return 0; }
inline const char *cudaGetErrorString(cudaError_t code) { return code ? "invalid argument" : "no error"; }

struct dim3 {
    unsigned x, y;
    dim3(unsigned a = 1, unsigned b = 1) : x(a), y(b) {}
};
struct uint4 {
    uint32_t x, y, z, w;
};

struct __nv_bfloat16 {
    uint16_t bits;
};
struct __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
inline float __bfloat162float(__nv_bfloat16 v) {
    uint32_t bits = uint32_t(v.bits) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
inline __nv_bfloat16 __float2bfloat16(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    return {uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
}
inline __nv_bfloat162 __float2bfloat162_rn(float f) { return {__float2bfloat16(f), __float2bfloat16(f)}; }
inline __nv_bfloat162 __hsub2(__nv_bfloat162 a, __nv_bfloat162 b) {
    return {__float2bfloat16(__bfloat162float(a.x) - __bfloat162float(b.x)),
            __float2bfloat16(__bfloat162float(a.y) - __bfloat162float(b.y))};
}
inline float __uint_as_float(uint32_t bits) {
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
inline float __expf(float x) { return std::exp(x); }

constexpr int kThreads = 256;
thread_local dim3 threadIdx, blockIdx;
struct Warp {
    uint32_t a[32][4], b[32][2];
    std::barrier<> meet{32};
};
inline std::unique_ptr<Warp> warps[kThreads / 32];
inline std::barrier<> block_meet{kThreads};
inline void __syncthreads() { block_meet.arrive_and_wait(); }
inline void __syncwarp() { warps[threadIdx.x / 32]->meet.arrive_and_wait(); }

// Asynchronous copies as late as they may be: a group's bytes arrive when it is waited for, and are NaN until then.
struct Copy {
    void *to;
    const void *from;
    int size, bytes;
};
inline thread_local std::vector<std::vector<Copy>> groups(1);
inline thread_local bool reads = false;  // whether this block has read of its weight
inline long flying[kThreads];                   // the most bytes that a thread had under way while it multiplied
inline std::vector<const void *> weights_read;  // where each block's first thread began to read, in the order of blocks

inline void host_copy(void *to, const void *from, int size, int bytes) {
    if (threadIdx.x == 0 && !reads) weights_read.push_back(from), reads = true;
    std::memset(to, 0xFF, size);
    groups.back().push_back({to, from, size, bytes});
}
inline void host_commit() { groups.emplace_back(); }
inline void host_wait(int ahead) {
    while (int(groups.size()) - 1 > ahead) {
        for (const Copy &c : groups.front()) {
            std::memset(c.to, 0, c.size);
            std::memcpy(c.to, c.from, c.bytes);
        }
        groups.erase(groups.begin());
    }
}
inline void host_count() {
    long bytes = 0;
    for (const auto &group : groups)
        for (const Copy &c : group) bytes += c.bytes;
    flying[threadIdx.x] = std::max(flying[threadIdx.x], bytes);
}

extern "C" void host_begin(int shared) {
    host_shared = shared;
    std::fill(flying, flying + kThreads, 0);
    weights_read.clear();
}
extern "C" long host_flying() { return std::accumulate(flying, flying + kThreads, 0L); }
extern "C" long host_blocks() { return long(weights_read.size()); }
extern "C" const void *host_read(long block) { return weights_read[block]; }

inline float half_of(uint32_t word, int i) { return __bfloat162float({uint16_t(word >> (16 * i))}); }

inline void host_mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    host_count();
    const int lane = threadIdx.x % 32;
    Warp &w = *warps[threadIdx.x / 32];
    std::copy(a, a + 4, w.a[lane]);
    w.b[lane][0] = b0, w.b[lane][1] = b1;
    w.meet.arrive_and_wait();
    for (int i = 0; i < 4; i++) {  // c[i] is row lane / 4 (+ 8 for i >= 2), column lane % 4 * 2 + i % 2
        const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; k++) {
            const int quarter = k % 8 / 2, upper = k / 8;
            const uint32_t left = w.a[row % 8 * 4 + quarter][row / 8 + 2 * upper], right = w.b[column * 4 + quarter][upper];
            c[i] += half_of(left, k % 2) * half_of(right, k % 2);
        }
    }
    w.meet.arrive_and_wait();
}

template <class F> void launch(dim3 grid, F kernel) {
    for (auto &w : warps) w = std::make_unique<Warp>();
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < kThreads; i++) {
        threads.emplace_back([=] {
            for (unsigned y = 0; y < grid.y; y++)
                for (unsigned x = 0; x < grid.x; x++) {
                    threadIdx = dim3(i), blockIdx = dim3(x, y);
                    reads = false;
                    kernel();
                    block_meet.arrive_and_wait();
                }
        });
    }
    for (auto &t : threads) t.join();
}
