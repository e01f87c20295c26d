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
//
// What a step needs (words, rows of x, scales) is copied to shared memory steps ahead, each warp in a ring of its own, with
// cp.async: a load into registers is moved down to its use by the compiler, and nothing is in flight.

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#ifdef __CUDACC__
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[];
#endif

namespace {

constexpr int kWarps = 8;   // they share a block's rows and take every eighth step of K
constexpr int kRows = 16;   // rows of an MMA
constexpr int kTiles = 4;   // MMA tiles a block: two of gate and two of up, or of 64 features
constexpr int kStages = 3;  // steps of a warp's ring at most: one is multiplied while the others are in flight
constexpr int kRun = 64;
constexpr int kSpan = 4 * kRun;

struct Args {
    const __nv_bfloat16 *x;      // [tokens, inputs]
    const uint8_t *words;        // [experts, rows, padded / 2] bytes
    const uint32_t *scale;       // [experts, spans / alike, rows], two bfloat16: of a span's first 128 columns and its last
    const uint32_t *zero;        // like scale, two bytes; or null
    const int *slots;            // [blocks * block], total where empty; null: 0, 1, 2, ...
    const int *owners;           // [blocks], -1 for none; null: as ids
    const int64_t *ids;          // [blocks], each block is one row, slot and block being the same; null: expert 0
    const float *router;         // [total], or null: not weighted
    void *out;                   // [total, outputs], float32 if wide, else bfloat16
    int total, top_k, outputs, inputs, padded, alike, wide, stages;
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
#ifdef __CUDACC__
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    host_mma(c, a, b0, b1);
#endif
}

// Copies that arrive later, in groups. Bytes beyond `bytes` become zero.
__device__ __forceinline__ void copy16(void *to, const void *from, int bytes) {
#ifdef __CUDACC__
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "l"(from), "r"(bytes) : "memory");
#else
    host_copy(to, from, 16, bytes);
#endif
}

__device__ __forceinline__ void copy4(void *to, const void *from) {
#ifdef __CUDACC__
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;"
                 ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "l"(from) : "memory");
#else
    host_copy(to, from, 4, 4);
#endif
}

__device__ __forceinline__ void commit() {
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    host_commit();
#endif
}

// Waits until this lane's copies have arrived but for those of the last `ahead` groups, 0 or 1.
__device__ __forceinline__ void arrived(int ahead) {
#ifdef __CUDACC__
    if (ahead) asm volatile("cp.async.wait_group 1;" ::: "memory");
    else asm volatile("cp.async.wait_group 0;" ::: "memory");
#else
    host_wait(ahead);
#endif
}

template <int TILES, bool ASYM> struct Stage {  // a warp's step; a lane reads the words and x that it copied itself
    uint4 words[kTiles * 2][32];
    uint4 x[TILES][4][32];
    uint32_t scale[kTiles * kRows];
    uint32_t zero[ASYM ? kTiles * kRows : 4];
};

__device__ __forceinline__ void unpack(uint32_t (&to)[4], const uint4 &v) { to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w; }

// Block (x: a block of slots, y: its rows of the weight). An expert's blocks of slots are neighbours and run side by side, so
// that a second one finds the weight in the cache. GATED: gate and up, joined by SiLU; the weight has 2 * outputs rows.
template <int TILES, bool GATED, bool ASYM>
__global__ void __launch_bounds__(kWarps * 32, 1) decode(Args a) {
    DYNAMIC_SHARED(ring_bytes)
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    constexpr int kFeatures = (GATED ? kTiles / 2 : kTiles) * kRows;
    const int64_t expert = a.owners ? a.owners[blockIdx.x] : a.ids ? a.ids[blockIdx.x] : 0;
    if (expert < 0) return;
    auto *ring = reinterpret_cast<Stage<TILES, ASYM> *>(ring_bytes) + warp * a.stages;
    const int64_t rows = int64_t(GATED ? 2 : 1) * a.outputs, line = a.padded / 2;
    const int first = blockIdx.y * kFeatures, spans = a.padded / kSpan, kinds = (spans + a.alike - 1) / a.alike;
    auto slot_of = [&](int index) {
        if (a.slots) return a.slots[blockIdx.x * TILES * 8 + index];
        if (a.ids) return index ? a.total : int(blockIdx.x);
        return int(blockIdx.x) * TILES * 8 + index;
    };
    // Row i of tile p: gate's tiles first, then up's. Rows beyond the weight are its last one, and are not written.
    auto row_of = [&](int p, int i) {
        const int row = min(first + (GATED ? p % 2 : p) * kRows + i, a.outputs - 1);
        return row + (GATED && p >= 2 ? a.outputs : 0);
    };
    // Warps 2n and 2n + 1 take the halves of the words of spans n, n + 4, ...
    const int half_span = warp % 2;
    const uint8_t *words[kTiles][2];
#pragma unroll
    for (int p = 0; p < kTiles; p++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            words[p][i] = a.words + (expert * rows + row_of(p, g + 8 * i)) * line + warp / 2 * 2 * kRun + half_span * kRun + 16 * t;
    const __nv_bfloat16 *x_row[TILES];
    bool live[TILES];
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        const int slot = slot_of(i * 8 + g);
        live[i] = slot < a.total;
        x_row[i] = a.x + int64_t(live[i] ? slot / a.top_k : 0) * a.inputs + 32 * half_span + 8 * t;
    }
    const int in_here = a.inputs - 32 * half_span - 8 * t;
    const int64_t scales_of = expert * kinds * rows;
    const int row0 = row_of(lane / kRows, lane % kRows), row1 = row_of(2 + lane / kRows, lane % kRows);
    int ahead = warp / 2;
    auto fetch = [&](int place) {
        if (ahead < spans) {
            auto &to = ring[place];
#pragma unroll
            for (int p = 0; p < kTiles; p++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    copy16(&to.words[p * 2 + i][lane], words[p][i], 16);
                    words[p][i] += 4 * 2 * kRun;
                }
#pragma unroll
            for (int i = 0; i < TILES; i++)
#pragma unroll
                for (int f = 0; f < 4; f++) {
                    const int k = ahead * kSpan + f * kRun;
                    const bool there = live[i] && k < in_here;
                    copy16(&to.x[i][f][lane], there ? x_row[i] + k : a.x, there ? 16 : 0);
                }
            const int64_t at = scales_of + (a.alike == 1 ? ahead : ahead / a.alike) * rows;
            copy4(&to.scale[lane], a.scale + at + row0);
            copy4(&to.scale[32 + lane], a.scale + at + row1);
            if (ASYM) {
                copy4(&to.zero[lane], a.zero + at + row0);
                copy4(&to.zero[32 + lane], a.zero + at + row1);
            }
        }
        ahead += 4;
        commit();  // an empty group too: groups are counted
    };
    for (int s = 0; s < a.stages - 1; s++) fetch(s);
    uint32_t magic = 0x43004300u;
    float acc[kTiles][TILES][4] = {};
    int place = 0, free_place = a.stages - 1;
    for (int span = warp / 2; span < spans; span += 4) {
        arrived(a.stages - 2);
        __syncwarp();  // scales come from other lanes, and these have read what is now overwritten
        fetch(free_place);
        const auto &now = ring[place];
        free_place = free_place + 1 == a.stages ? 0 : free_place + 1;
        place = place + 1 == a.stages ? 0 : place + 1;
        uint32_t x[TILES][4][4];
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int f = 0; f < 4; f++) unpack(x[i][f], now.x[i][f][lane]);
#pragma unroll
        for (int p = 0; p < kTiles; p++) {
            uint32_t pair[2][4], scale[2], zero[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                unpack(pair[i], now.words[p * 2 + i][lane]);
                scale[i] = now.scale[p * kRows + g + 8 * i];
                zero[i] = ASYM ? now.zero[p * kRows + g + 8 * i] : 0;
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {  // two fields, 128 columns of one group
                float sum[TILES][4] = {};
                __nv_bfloat162 base[2];
#pragma unroll
                for (int i = 0; i < 2; i++) base[i] = __float2bfloat162_rn(136.0f + int8_t(zero[i] >> (8 * half)));
#pragma unroll
                for (int f = 2 * half; f < 2 * half + 2; f++)
#pragma unroll
                    for (int w = 0; w < 4; w += 2) {
                        uint32_t weight[4];
#pragma unroll
                        for (int i = 0; i < 4; i++) weight[i] = widen(pair[i % 2][w + i / 2] >> (4 * f), magic, base[i % 2]);
#pragma unroll
                        for (int i = 0; i < TILES; i++) mma(sum[i], weight, x[i][f][w], x[i][f][w + 1]);
                    }
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float by = __uint_as_float(half ? scale[j / 2] & 0xFFFF0000u : scale[j / 2] << 16);
#pragma unroll
                    for (int i = 0; i < TILES; i++) acc[p][i][j] += sum[i][j] * by;
                }
            }
        }
    }
    arrived(0);
    __syncthreads();  // the ring is free for the sums of all warps
    typedef float Sums[kTiles][TILES * 8][kRows + 4];
    Sums *sums = reinterpret_cast<Sums *>(ring_bytes);
#pragma unroll
    for (int p = 0; p < kTiles; p++)
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) sums[warp][p][i * 8 + 2 * t + j % 2][g + 8 * (j / 2)] = acc[p][i][j];
    __syncthreads();
    for (int i = threadIdx.x; i < TILES * 8 * kFeatures; i += kWarps * 32) {
        const int column = i / kFeatures, r = i % kFeatures, slot = slot_of(column), feature = first + r;
        if (slot >= a.total || feature >= a.outputs) continue;
        float sum[2] = {};
#pragma unroll
        for (int w = 0; w < kWarps; w++) {
            sum[0] += sums[w][r / kRows][column][r % kRows];
            if (GATED) sum[1] += sums[w][kTiles / 2 + r / kRows][column][r % kRows];
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

// Shared memory of a stage of all warps' rings.
int stage_bytes(int block, bool asym) {
    if (block == 8) return kWarps * int(asym ? sizeof(Stage<1, true>) : sizeof(Stage<1, false>));
    return kWarps * int(asym ? sizeof(Stage<2, true>) : sizeof(Stage<2, false>));
}

// Shared memory that a block may have on this device, 0 where it cannot be asked.
int most_shared() {
    int device = 0, bytes = 0;
    if (cudaGetDevice(&device) || cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) return 0;
    return bytes;
}

}  // namespace

// Shapes are those of Args. blocks * block rows of slots; block is 8 or 16. gated: 1 for gate and up. group: columns that share
// a scale. Returns a cudaError_t.
extern "C" int quantkit_w4a16_decode(const void *x, const void *words, const void *scale, const void *zero, const void *slots,
                                     const void *owners, const void *ids, const void *router, void *out, int blocks, int block,
                                     int total, int top_k, int outputs, int inputs, int padded, int group, int gated, int wide,
                                     void *stream) {
    if ((block != 8 && block != 16) || blocks < 1 || outputs < 1 || top_k < 1 || inputs % 8 || padded % kSpan ||
        group % (2 * kRun))
        return cudaErrorInvalidValue;
    const int alike = group % kSpan == 0 ? group / kSpan : 1;
    const int stage = stage_bytes(block, zero), stages = min(kStages, most_shared() / stage);
    if (stages < 2) return cudaErrorInvalidConfiguration;
    Args a{static_cast<const __nv_bfloat16 *>(x), static_cast<const uint8_t *>(words), static_cast<const uint32_t *>(scale),
           static_cast<const uint32_t *>(zero), static_cast<const int *>(slots), static_cast<const int *>(owners),
           static_cast<const int64_t *>(ids), static_cast<const float *>(router), out, total, top_k, outputs, inputs, padded,
           alike, wide, stages};
    const int features = (gated ? kTiles / 2 : kTiles) * kRows;
    const dim3 grid(blocks, (outputs + features - 1) / features);
    cudaStream_t on = static_cast<cudaStream_t>(stream);
    const auto kernel = a.zero ? pick<true>(block, gated) : pick<false>(block, gated);
    if (int code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, stages * stage)) return code;
    kernel<<<grid, kWarps * 32, stages * stage, on>>>(a);
    return cudaGetLastError();
}

// Whether this driver and GPU can run the kernels: 0, or why not.
extern "C" int quantkit_cuda_probe() {
    cudaFuncAttributes found;
    if (int code = cudaFuncGetAttributes(&found, pick<false>(16, 0))) return code;
    return most_shared() < 2 * stage_bytes(16, true) ? cudaErrorInvalidConfiguration : 0;
}

extern "C" const char *quantkit_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
