// W4A16 products for 1 to 16 rows a weight: a linear, or the two halves of a mixture of experts.
//
// Decoding is bound by reading weights, so each is read once, 16 bytes a thread, and widened in registers. The weight is
// the left operand of mma.m16n8k16 (16 output features), the tokens are the right one (8 columns). The MMA sums over K in
// any order as long as both operands agree, so a thread takes what its own 16 bytes hold and no lane shuffles are needed.
//
// Layout (quantkit/kernels/triton/layout.py, 4 bits, run 64): 64 words of 16 bits hold a span of 256 columns of a row, word i
// the columns i, 64 + i, 128 + i and 192 + i from its low end, each q + 8. A warp's step is half of a span's words, 32: lane
// 4g + t owns rows g and g + 8 of each tile of 16 rows, and words 8t .. 8t + 7 of them. Field f of its eight words are eight
// consecutive columns, as they lie in x.

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace {

constexpr int kWarps = 8;   // they share a block's rows and take every eighth step of K
constexpr int kRows = 16;   // rows of an MMA; a block has two such tiles: of gate and of up, or of 32 features
constexpr int kRun = 64;
constexpr int kSpan = 4 * kRun;

struct Args {
    const __nv_bfloat16 *x;      // [tokens, inputs]
    const uint8_t *words;        // [experts, rows, padded / 2] bytes
    const __nv_bfloat16 *scale;  // [experts, groups, rows]
    const int8_t *zero;          // like scale, or null
    const int *slots;            // [blocks * block], total where empty; null: 0, 1, 2, ...
    const int *owners;           // [blocks], -1 for none; null: expert 0
    const float *router;         // [total], or null: not weighted
    void *out;                   // [total, outputs], float32 if wide, else bfloat16
    int total, top_k, outputs, inputs, padded, group, wide;
};

// One field of two words, shifted down to bits 0 and 16, as two bfloat16: 0x4300 | q is 128 + q, base 136 + zero. Exact.
__device__ __forceinline__ uint32_t widen(uint32_t pair, uint32_t magic, __nv_bfloat162 base) {
    uint32_t bits;
#ifdef __CUDACC__  // with the constant in a register it is one instruction, which the compiler does not find
    asm("lop3.b32 %0, %1, 0x000F000F, %2, 0xEA;" : "=r"(bits) : "r"(pair), "r"(magic));
#else
    bits = (pair & 0x000F000Fu) | magic;
#endif
    __nv_bfloat162 value = __hsub2(*reinterpret_cast<__nv_bfloat162 *>(&bits), base);
    return *reinterpret_cast<uint32_t *>(&value);
}

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Eight columns of x from k for this lane, zero beyond the row; `inputs` is a multiple of 8.
__device__ __forceinline__ void load_x(uint32_t (&to)[4], const __nv_bfloat16 *row, int k, int inputs, bool live) {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (live && k < inputs) v = __ldg(reinterpret_cast<const uint4 *>(row + k));
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

__device__ __forceinline__ void load_words(uint32_t (&to)[4], const uint8_t *from) {
    uint4 v = __ldcs(reinterpret_cast<const uint4 *>(from));
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

// Block (x: its rows of the weight, y: a block of slots). GATED: gate and up, joined by SiLU; the weight has 2 * outputs rows.
template <int TILES, bool GATED, bool ASYM>
__global__ void __launch_bounds__(kWarps * 32) decode(Args a) {
    __shared__ float reduced[kWarps][2][TILES * 8][kRows];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int expert = a.owners ? a.owners[blockIdx.y] : 0;
    if (expert < 0) return;
    const int64_t rows = int64_t(GATED ? 2 : 1) * a.outputs, line = a.padded / 2, groups = (a.padded + a.group - 1) / a.group;
    int row[2][2];
#pragma unroll
    for (int p = 0; p < 2; p++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int feature = blockIdx.x * kRows * (GATED ? 1 : 2) + (GATED ? 0 : p * kRows) + g + 8 * i;
            row[p][i] = min(feature, a.outputs - 1) + (GATED ? p * a.outputs : 0);
        }
    const __nv_bfloat16 *x_row[TILES];
    bool live[TILES];
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        int index = blockIdx.y * TILES * 8 + i * 8 + g, slot = a.slots ? a.slots[index] : index;
        live[i] = slot < a.total;
        x_row[i] = a.x + int64_t(live[i] ? slot / a.top_k : 0) * a.inputs + 8 * t;
    }
    const uint8_t *words = a.words + expert * rows * line + 16 * t;
    a.scale += expert * groups * rows;
    if (ASYM) a.zero += expert * groups * rows;
    uint32_t magic = 0x43004300u;
    float acc[2][TILES][4] = {};
    uint32_t next[2][2][4];
    const int steps = 2 * (a.padded / kSpan);  // of 64 bytes a row
    auto fetch = [&](int step) {
#pragma unroll
        for (int p = 0; p < 2; p++)
#pragma unroll
            for (int i = 0; i < 2; i++) load_words(next[p][i], words + row[p][i] * line + int64_t(step) * kRun);
    };
    if (warp < steps) fetch(warp);
#pragma unroll 2
    for (int step = warp; step < steps; step += kWarps) {
        uint32_t now[2][2][4];
#pragma unroll
        for (int p = 0; p < 2; p++)
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int w = 0; w < 4; w++) now[p][i][w] = next[p][i][w];
        if (step + kWarps < steps) fetch(step + kWarps);  // in flight while this one is multiplied
#pragma unroll
        for (int half = 0; half < 2; half++) {  // two fields, 128 columns of one group
            const int k = step / 2 * kSpan + half * 2 * kRun, at = k / a.group * int(rows);
            float sum[2][TILES][4] = {};
            __nv_bfloat162 base[2][2];
#pragma unroll
            for (int p = 0; p < 2; p++)
#pragma unroll
                for (int i = 0; i < 2; i++)
                    base[p][i] = __float2bfloat162_rn(ASYM ? 136.0f + a.zero[at + row[p][i]] : 136.0f);
#pragma unroll
            for (int f = 0; f < 2; f++) {
                uint32_t x[TILES][4];
#pragma unroll
                for (int i = 0; i < TILES; i++) load_x(x[i], x_row[i], k + f * kRun + step % 2 * 32, a.inputs - 8 * t, live[i]);
                const int shift = 8 * half + 4 * f;
#pragma unroll
                for (int p = 0; p < 2; p++)
#pragma unroll
                    for (int w = 0; w < 4; w += 2) {
                        uint32_t weight[4];
#pragma unroll
                        for (int i = 0; i < 4; i++)
                            weight[i] = widen(now[p][i % 2][w + i / 2] >> shift, magic, base[p][i % 2]);
#pragma unroll
                        for (int i = 0; i < TILES; i++) mma(sum[p][i], weight, x[i][w], x[i][w + 1]);
                    }
            }
#pragma unroll
            for (int p = 0; p < 2; p++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float scale = __bfloat162float(a.scale[at + row[p][j / 2]]);
#pragma unroll
                    for (int i = 0; i < TILES; i++) acc[p][i][j] += sum[p][i][j] * scale;
                }
        }
    }
#pragma unroll
    for (int p = 0; p < 2; p++)
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) reduced[warp][p][i * 8 + 2 * t + j % 2][g + 8 * (j / 2)] = acc[p][i][j];
    __syncthreads();
    constexpr int kFeatures = GATED ? kRows : 2 * kRows;
    for (int i = threadIdx.x; i < TILES * 8 * kFeatures; i += kWarps * 32) {
        const int column = i / kFeatures, r = i % kFeatures, index = blockIdx.y * TILES * 8 + column;
        const int slot = a.slots ? a.slots[index] : index, feature = blockIdx.x * kFeatures + r;
        if (slot >= a.total || feature >= a.outputs) continue;
        float sum[2] = {};
#pragma unroll
        for (int w = 0; w < kWarps; w++) {
            sum[0] += reduced[w][r / kRows][column][r % kRows];
            if (GATED) sum[1] += reduced[w][1][column][r];
        }
        float value = GATED ? sum[0] / (1.0f + __expf(-sum[0])) * sum[1] : sum[0];
        if (a.router) value *= a.router[slot];
        const int64_t at = int64_t(slot) * a.outputs + feature;
        if (a.wide) static_cast<float *>(a.out)[at] = value;
        else static_cast<__nv_bfloat16 *>(a.out)[at] = __float2bfloat16(value);
    }
}

template <bool ASYM> void (*pick(int block, bool gated))(Args) {
    if (block == 8) return gated ? decode<1, true, ASYM> : decode<1, false, ASYM>;
    return gated ? decode<2, true, ASYM> : decode<2, false, ASYM>;
}

}  // namespace

// Shapes are those of Args. blocks * block rows of slots; block is 8 or 16. gated: 1 for gate and up. Returns a cudaError_t.
extern "C" int quantkit_w4a16_decode(const void *x, const void *words, const void *scale, const void *zero, const void *slots,
                                     const void *owners, const void *router, void *out, int blocks, int block, int total,
                                     int top_k, int outputs, int inputs, int padded, int group, int gated, int wide,
                                     void *stream) {
    if ((block != 8 && block != 16) || blocks < 1 || outputs < 1 || top_k < 1 || inputs % 8 || padded % kSpan ||
        group % (2 * kRun))
        return cudaErrorInvalidValue;
    Args a{static_cast<const __nv_bfloat16 *>(x), static_cast<const uint8_t *>(words), static_cast<const __nv_bfloat16 *>(scale),
           static_cast<const int8_t *>(zero), static_cast<const int *>(slots), static_cast<const int *>(owners),
           static_cast<const float *>(router), out, total, top_k, outputs, inputs, padded, group, wide};
    const int features = gated ? kRows : 2 * kRows;
    const dim3 grid((outputs + features - 1) / features, blocks);
    cudaStream_t on = static_cast<cudaStream_t>(stream);
    const auto kernel = a.zero ? pick<true>(block, gated) : pick<false>(block, gated);
    kernel<<<grid, kWarps * 32, 0, on>>>(a);
    return cudaGetLastError();
}

// Whether this driver and GPU can run the kernels: 0, or why not.
extern "C" int quantkit_cuda_probe() {
    cudaFuncAttributes found;
    return cudaFuncGetAttributes(&found, pick<false>(16, 0));
}

extern "C" const char *quantkit_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
