// The factors of a low-rank direction: stored, or the normals of a key, number row * rank + column of the unsharded one.
#pragma once
#include "pieces.h"

namespace pgap {

// A, B or C as a flat array: stored, or the normals of a key from logical index `base` on.
struct Factor {
    DType dtype;
    const void* data;  // null: drawn
    int64_t base;
    uint32_t tensor_id;
    uint64_t key;
};

inline void draw_normal(int64_t base, int64_t count, uint32_t tensor_id, uint64_t key, float* out) {
    if (count == 0) return;
    const float one = 1.0f, zero = 0.0f;
    const int64_t draws = 1;
    const DensePass pass = {.dtype = DType::f32,
                            .draws = {.distribution = Distribution::normal,
                                      .count = 1,
                                      .columns = 1,
                                      .keys = &key,
                                      .coefficients = &one},
                            .stages = 1,
                            .draws_per_stage = &draws,
                            .decay = &zero};
    const Piece p = {.out = out,
                     .rows = 1,
                     .cols = count,
                     .ld_in = count,
                     .ld_out = count,
                     .base = base,
                     .row_stride = count,
                     .tensor_id = tensor_id};
    kernels().dense(pass, p, first_group(p), end_group(p));
}

// Elements begin .. begin + count - 1 as float32: where they are stored, or converted or drawn into the buffer.
inline const float* read_factor(const Factor& f, int64_t begin, int64_t count, std::vector<float>& buffer) {
    if (f.data && f.dtype == DType::f32) return (const float*)f.data + begin;
    buffer.resize(size_t(count));
    if (f.data) kernels().to_float(f.dtype, (const char*)f.data + begin * itemsize(f.dtype), buffer.data(), count);
    else draw_normal(f.base + begin, count, f.tensor_id, f.key, buffer.data());
    return buffer.data();
}

}  // namespace pgap
