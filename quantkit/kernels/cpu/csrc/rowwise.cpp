// Rounding to nearest in one pass over rows of a weight, and looking at what was rounded in another. Each value is, bit for bit,
// the one that quantkit.quant.rounding and quantkit.stats define: every operation is one of IEEE float32 (no contraction), and
// rows are summed in float64 by numpy's pairwise order. One thread: callers have as many as they want.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

inline float as_float(uint32_t bits) { float value; std::memcpy(&value, &bits, 4); return value; }
inline uint32_t as_bits(float value) { uint32_t bits; std::memcpy(&bits, &value, 4); return bits; }

// float32 -> bfloat16, ties to even. Finite.
inline uint16_t to_bfloat16(float value) {
    const uint32_t bits = as_bits(value);
    return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// |value| <= 448 -> the code of float8 e4m3fn, ties to even; `rounded` is its value.
inline uint8_t to_float8(float value, float& rounded) {
    const uint32_t bits = as_bits(value), sign = bits & 0x80000000u, size = bits & 0x7FFFFFFFu;
    const uint32_t carried = (size + 0x7FFFF + ((size >> 20) & 1)) & 0xFFF00000u;  // of a normal number: 3 bits are kept
    const float steps = std::nearbyint(as_float(size) * 512.0f);                  // of the others: multiples of 2^-9
    const bool small = as_float(size) < 0.015625f;
    const uint32_t code = small ? uint32_t(int32_t(steps)) : (carried >> 20) - 960u;
    const uint32_t result = small ? as_bits(steps * 0.001953125f) : carried;
    rounded = as_float(result | sign);
    return uint8_t(code | (sign >> 24));
}

// numpy's pairwise sum of squares.
double pairwise(const float* values, int64_t count) {
    if (count < 8) {
        double sum = 0.0;
        for (int64_t i = 0; i < count; ++i) sum += double(values[i]) * double(values[i]);
        return sum;
    }
    if (count <= 128) {
        double lanes[8];
        for (int j = 0; j < 8; ++j) lanes[j] = double(values[j]) * double(values[j]);
        int64_t i = 8;
        for (; i < count - (count % 8); i += 8)
            for (int j = 0; j < 8; ++j) lanes[j] += double(values[i + j]) * double(values[i + j]);
        double sum = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
        for (; i < count; ++i) sum += double(values[i]) * double(values[i]);
        return sum;
    }
    int64_t half = count / 2;
    half -= half % 8;
    return pairwise(values, half) + pairwise(values + half, count - half);
}

// Extends [least, most], both in `ordered`, by values.
inline void extend(const float* values, int64_t count, int32_t& least, int32_t& most) {
    int32_t low = least, high = most;
    for (int64_t i = 0; i < count; ++i) {
        int32_t bits;
        std::memcpy(&bits, values + i, 4);
        bits ^= (bits >> 31) & 0x7FFFFFFF;  // integers in the order of the floats
        low = std::min(low, bits);
        high = std::max(high, bits);
    }
    least = low;
    most = high;
}

inline float back(int32_t ordered) { return as_float(uint32_t(ordered ^ ((ordered >> 31) & 0x7FFFFFFF))); }

struct Grid {
    float low, high;      // codes
    int32_t floating;     // float8 e4m3fn, else integers
    int32_t symmetric;
    int64_t rows, columns;  // that share a scale
};

// A scale as `quant.grid` makes it of the range [smallest <= 0, largest >= 0].
inline uint16_t scale_of(const Grid& grid, float smallest, float largest, float& zero) {
    const float reach = grid.floating ? grid.high : (grid.high - grid.low) / 2;
    float scale = grid.symmetric ? std::max(largest, -smallest) / reach : (largest - smallest) / (grid.high - grid.low);
    if (!(scale > 1.17549435e-38f)) scale = 1.0f;
    const uint16_t stored = to_bfloat16(scale);
    zero = 0.0f;
    if (!grid.symmetric) {
        const float at = std::nearbyint(grid.low - smallest / as_float(uint32_t(stored) << 16));
        zero = std::min(std::max(at, grid.low), grid.high);
    }
    return stored;
}

void round_cells(const Grid& grid, const float* weight, int64_t width, float scale, float zero, uint8_t* codes, float* lost) {
    if (grid.floating) {
        for (int64_t i = 0; i < width; ++i) {
            float value;
            codes[i] = to_float8(std::min(std::max(weight[i] / scale, grid.low), grid.high), value);
            lost[i] = value * scale - weight[i];
        }
        return;
    }
    for (int64_t i = 0; i < width; ++i) {
        const float code = std::min(std::max(std::nearbyint(weight[i] / scale) + zero, grid.low), grid.high);
        codes[i] = uint8_t(int8_t(code));
        lost[i] = (code - zero) * scale - weight[i];
    }
}

}  // namespace

extern "C" {

// weight [rows, columns] float32 -> codes [rows, columns], scale (bfloat16) and zero (int8, or null) of each cell of the grid
// that begins at the first row, and of each row the sums of squares of what was lost, and of the weight.
void quantkit_round_rows(const Grid* grid, const float* weight, int64_t rows, int64_t columns, uint8_t* codes, uint16_t* scales,
                         int8_t* zeros, double* lost, double* whole) {
    const int64_t high = grid->rows, wide = grid->columns, across = (columns + wide - 1) / wide;
    std::vector<float> errors(size_t(std::min(high, rows) * columns));
    for (int64_t top = 0; top < rows; top += high) {
        const int64_t end = std::min(top + high, rows);
        for (int64_t cell = 0; cell < across; ++cell) {
            const int64_t left = cell * wide, width = std::min(wide, columns - left);
            int32_t least = 0, most = 0;
            for (int64_t row = top; row < end; ++row) extend(weight + row * columns + left, width, least, most);
            float zero;
            const uint16_t stored = scale_of(*grid, back(least), back(most), zero);
            scales[top / high * across + cell] = stored;
            if (zeros) zeros[top / high * across + cell] = int8_t(zero);
            for (int64_t row = top; row < end; ++row)
                round_cells(*grid, weight + row * columns + left, width, as_float(uint32_t(stored) << 16), zero,
                            codes + row * columns + left, errors.data() + (row - top) * columns + left);
        }
        for (int64_t row = top; row < end; ++row) {
            lost[row] = pairwise(errors.data() + (row - top) * columns, columns);
            whole[row] = pairwise(weight + row * columns, columns);
        }
    }
}

// What of codes and scales (float32) is to be said beside the weight that they were made from. values, below, above: of each of
// 256 codes its value and those of its neighbours. misplaced: how many codes there are of which a neighbour is nearer by more
// than `tie` of a step, and where the first lies; null: not looked for. smallest, largest: float32 of each cell, 0 among them.
// lost, whole: as above.
void quantkit_compare_rows(const Grid* grid, const float* weight, int64_t rows, int64_t columns, const uint8_t* codes,
                           const float* scales, const int8_t* zeros, const float* values, const float* below, const float* above,
                           float tie, int64_t* misplaced, int32_t* smallest, int32_t* largest, double* lost, double* whole) {
    const int64_t high = grid->rows, wide = grid->columns, across = (columns + wide - 1) / wide;
    std::vector<float> errors(size_t(columns), 0.0f);
    if (misplaced) misplaced[0] = misplaced[1] = 0;
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t cell = 0; cell < across; ++cell) {
            const int64_t at = row / high * across + cell, left = cell * wide, width = std::min(wide, columns - left);
            const float scale = scales[at], zero = zeros ? float(zeros[at]) : 0.0f, allowed = tie * std::fabs(scale);
            const float* from = weight + row * columns + left;
            const uint8_t* code = codes + row * columns + left;
            float* error = errors.data() + left;
            int32_t least = row % high ? smallest[at] : 0, most = row % high ? largest[at] : 0;
            extend(from, width, least, most);
            smallest[at] = least;
            largest[at] = most;
            for (int64_t i = 0; i < width; ++i) error[i] = (values[code[i]] - zero) * scale - from[i];
            if (!misplaced) continue;
            const auto wrong = [&](int64_t i) {
                const float down = (below[code[i]] - zero) * scale - from[i], up = (above[code[i]] - zero) * scale - from[i];
                return std::fabs(error[i]) > std::min(std::fabs(down), std::fabs(up)) + allowed;
            };
            int32_t count = 0;
            for (int64_t i = 0; i < width; ++i) count += wrong(i);
            if (count && !misplaced[0])
                for (misplaced[1] = row * columns + left; !wrong(misplaced[1] - row * columns - left);) ++misplaced[1];
            misplaced[0] += count;
        }
        lost[row] = pairwise(errors.data(), columns);
        whole[row] = pairwise(weight + row * columns, columns);
    }
    for (int64_t cell = 0; cell < (rows + high - 1) / high * across; ++cell) {
        float value = back(smallest[cell]);
        std::memcpy(smallest + cell, &value, 4);
        value = back(largest[cell]);
        std::memcpy(largest + cell, &value, 4);
    }
}
}
