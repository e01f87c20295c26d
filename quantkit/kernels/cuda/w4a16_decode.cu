// W4A16 products for 1 to 16 rows a weight: a linear, or the two halves of a mixture of experts.
//
// Decoding is bound by reading weights, so each is read once, 16 bytes a thread, and widened in registers. The weight is
// the left operand of mma.m16n8k16 (16 output features), the tokens are the right one (8 columns). The MMA sums over K in
// any order as long as both operands agree, so a thread takes 16 consecutive bytes of a row and no lane shuffles are needed.
//
// Layout (quantkit/kernels/triton/layout.py, run 64): 64 bytes of a row hold 128 columns, byte i column i in the low nibble
// and 64 + i in the high one; value q + 8. Lane 4g + t of a warp owns rows g and g + 8 and bytes 16t .. 16t + 15.

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace {

constexpr int kWarps = 8;   // they share 16 rows and take every eighth span of K
constexpr int kRows = 16;
constexpr int kRun = 64;

struct Args {
    const __nv_bfloat16 *x;      // [tokens, inputs]
    const uint8_t *words;        // [experts, rows, padded / 2]
    const __nv_bfloat16 *scale;  // [experts, groups, rows]
    const int8_t *zero;          // like scale, or null
    const int *slots;            // [blocks * block], total where empty; null: 0, 1, 2, ...
    const int *owners;           // [blocks], -1 for none; null: expert 0
    const float *router;         // [total]; null: out is bfloat16 and not weighted
    void *out;                   // [total, outputs], float32 with a router, else bfloat16
    int total, top_k, outputs, inputs, padded, group;
};

// Bytes 0 and 2 of `word`, shifted right, as two bfloat16: 0x4300 | q is 128 + q, and base is 136 + zero. Exact.
__device__ __forceinline__ uint32_t widen(uint32_t word, __nv_bfloat162 base) {
    uint32_t bits = (word & 0x000F000Fu) | 0x43004300u;
    __nv_bfloat162 value = __hsub2(*reinterpret_cast<__nv_bfloat162 *>(&bits), base);
    return *reinterpret_cast<uint32_t *>(&value);
}

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// One nibble plane (64 columns from k) of 16 rows times 8 * TILES tokens; the scale multiplies the float32 sum.
template <int TILES>
__device__ __forceinline__ void plane(float (&acc)[TILES][4], const uint32_t (&top)[4], const uint32_t (&bottom)[4], int shift,
                                      const uint32_t (&x)[TILES][8], const Args &a, int64_t offset, const int (&row)[2]) {
    float scale[2];
    __nv_bfloat162 base[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        scale[i] = __bfloat162float(a.scale[offset + row[i]]);
        base[i] = __float2bfloat162_rn(136.0f + (a.zero ? a.zero[offset + row[i]] : 0));
    }
    float sum[TILES][4] = {};
#pragma unroll
    for (int w = 0; w < 4; w++) {
        uint32_t p = top[w] >> shift, q = bottom[w] >> shift;
        uint32_t f[4] = {widen(p, base[0]), widen(q, base[1]), widen(p >> 8, base[0]), widen(q >> 8, base[1])};
#pragma unroll
        for (int i = 0; i < TILES; i++) {  // columns (0, 2) and (1, 3), as widen pairs them
            mma(sum[i], f, __byte_perm(x[i][2 * w], x[i][2 * w + 1], 0x5410), __byte_perm(x[i][2 * w], x[i][2 * w + 1], 0x7632));
        }
    }
#pragma unroll
    for (int i = 0; i < TILES; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) acc[i][j] += sum[i][j] * scale[j / 2];
    }
}

// 16 columns of x for this lane, zero beyond the row; `inputs` is a multiple of 8.
__device__ __forceinline__ void load_x(uint32_t (&to)[8], const __nv_bfloat16 *row, int k, int inputs, bool live) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint4 v = make_uint4(0, 0, 0, 0);
        if (live && k + 8 * i < inputs) v = __ldg(reinterpret_cast<const uint4 *>(row + k + 8 * i));
        to[4 * i] = v.x, to[4 * i + 1] = v.y, to[4 * i + 2] = v.z, to[4 * i + 3] = v.w;
    }
}

__device__ __forceinline__ void load_words(uint32_t (&to)[4], const uint8_t *from) {
    uint4 v = __ldcs(reinterpret_cast<const uint4 *>(from));
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

// Block (x: 16 output features, y: a block of slots). PARTS 2: gate and up, joined by SiLU; the weight has 2 * outputs rows.
template <int TILES, int PARTS>
__global__ void __launch_bounds__(kWarps * 32) decode(Args a) {
    __shared__ float reduced[kWarps][PARTS][TILES * 8][kRows];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int expert = a.owners ? a.owners[blockIdx.y] : 0;
    if (expert < 0) return;
    const int64_t rows = int64_t(PARTS) * a.outputs, line = a.padded / 2, groups = (a.padded + a.group - 1) / a.group;
    int row[PARTS][2];
#pragma unroll
    for (int p = 0; p < PARTS; p++)
#pragma unroll
        for (int i = 0; i < 2; i++) row[p][i] = p * a.outputs + min(int(blockIdx.x) * kRows + g + 8 * i, a.outputs - 1);

    const __nv_bfloat16 *x_row[TILES];
    bool live[TILES];
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        int index = blockIdx.y * TILES * 8 + i * 8 + g, slot = a.slots ? a.slots[index] : index;
        live[i] = slot < a.total;
        x_row[i] = a.x + int64_t(live[i] ? slot / a.top_k : 0) * a.inputs;
    }
    const uint8_t *words = a.words + expert * rows * line + 16 * t;
    float acc[PARTS][TILES][4] = {};
    uint32_t next[PARTS][2][4];
    const int spans = a.padded / (2 * kRun);
    auto fetch = [&](int span) {
#pragma unroll
        for (int p = 0; p < PARTS; p++)
#pragma unroll
            for (int i = 0; i < 2; i++) load_words(next[p][i], words + row[p][i] * line + int64_t(span) * kRun);
    };
    if (warp < spans) fetch(warp);
    for (int span = warp; span < spans; span += kWarps) {
        uint32_t now[PARTS][2][4];
#pragma unroll
        for (int p = 0; p < PARTS; p++)
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int w = 0; w < 4; w++) now[p][i][w] = next[p][i][w];
        if (span + kWarps < spans) fetch(span + kWarps);  // in flight while this span is multiplied
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int k = span * 2 * kRun + half * kRun;
            uint32_t x[TILES][8];
#pragma unroll
            for (int i = 0; i < TILES; i++) load_x(x[i], x_row[i], k + 16 * t, a.inputs, live[i]);
            const int64_t offset = (expert * groups + k / a.group) * rows;
#pragma unroll
            for (int p = 0; p < PARTS; p++) plane<TILES>(acc[p], now[p][0], now[p][1], 4 * half, x, a, offset, row[p]);
        }
    }
#pragma unroll
    for (int p = 0; p < PARTS; p++)
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) reduced[warp][p][i * 8 + 2 * t + j % 2][g + 8 * (j / 2)] = acc[p][i][j];
    __syncthreads();
    for (int i = threadIdx.x; i < TILES * 8 * kRows; i += kWarps * 32) {
        const int column = i / kRows, r = i % kRows, feature = blockIdx.x * kRows + r, index = blockIdx.y * TILES * 8 + column;
        const int slot = a.slots ? a.slots[index] : index;
        if (slot >= a.total || feature >= a.outputs) continue;
        float sum[PARTS] = {};
#pragma unroll
        for (int w = 0; w < kWarps; w++)
#pragma unroll
            for (int p = 0; p < PARTS; p++) sum[p] += reduced[w][p][column][r];
        float value = PARTS == 1 ? sum[0] : sum[0] / (1.0f + __expf(-sum[0])) * sum[PARTS - 1];
        const int64_t at = int64_t(slot) * a.outputs + feature;
        if (a.router) static_cast<float *>(a.out)[at] = value * a.router[slot];
        else static_cast<__nv_bfloat16 *>(a.out)[at] = __float2bfloat16(value);
    }
}

}  // namespace

// Shapes are those of Args. blocks * block rows of slots; block is 8 or 16. gated: 1 for gate and up. Returns a cudaError_t.
extern "C" int quantkit_w4a16_decode(const void *x, const void *words, const void *scale, const void *zero, const void *slots,
                                     const void *owners, const void *router, void *out, int blocks, int block, int total,
                                     int top_k, int outputs, int inputs, int padded, int group, int gated, void *stream) {
    if ((block != 8 && block != 16) || blocks < 1 || outputs < 1 || top_k < 1 || inputs % 8 || padded % (2 * kRun) || group % kRun)
        return cudaErrorInvalidValue;
    Args a{static_cast<const __nv_bfloat16 *>(x), static_cast<const uint8_t *>(words), static_cast<const __nv_bfloat16 *>(scale),
           static_cast<const int8_t *>(zero), static_cast<const int *>(slots), static_cast<const int *>(owners),
           static_cast<const float *>(router), out, total, top_k, outputs, inputs, padded, group};
    const dim3 grid((outputs + kRows - 1) / kRows, blocks);
    cudaStream_t on = static_cast<cudaStream_t>(stream);
    if (block == 8 && !gated) decode<1, 1><<<grid, kWarps * 32, 0, on>>>(a);
    if (block == 8 && gated) decode<1, 2><<<grid, kWarps * 32, 0, on>>>(a);
    if (block == 16 && !gated) decode<2, 1><<<grid, kWarps * 32, 0, on>>>(a);
    if (block == 16 && gated) decode<2, 2><<<grid, kWarps * 32, 0, on>>>(a);
    return cudaGetLastError();
}

extern "C" const char *quantkit_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
