// Vectors round to nearest as scalars do: ties, carries, subnormal numbers alone and among others, and what is not
// finite.
#include "shapes.h"

namespace pgap {

void test_round(Run& run) {
    std::vector<float> x;
    for (const uint32_t high : {0x0000u, 0x0001u, 0x007fu, 0x0080u, 0x3300u, 0x387fu, 0x3880u, 0x3f80u, 0x3f81u,
                                0x477fu, 0x7f7fu, 0x7f80u, 0x7fc0u})
        for (const uint32_t low : {0u, 1u, 0x0fffu, 0x1000u, 0x1001u, 0x7fffu, 0x8000u, 0x8001u, 0xefffu, 0xffffu})
            for (const uint32_t sign : {0u, 0x80000000u}) {
                const uint32_t bits = sign | high << 16 | low;
                x.push_back(0.0f);
                std::memcpy(&x.back(), &bits, 4);
            }
    x.insert(x.end(), 99, 1.0f);
    x[x.size() - 50] = 0x1p-130f;  // the only one of its vector
    const int64_t n = int64_t(x.size());
    const float one[kColumns] = {9, 1, 7};
    for (const DType dtype : {DType::bf16, DType::f16}) {
        std::vector<uint16_t> out(x.size());
        std::vector<float> origin(x.size(), -0.0f), expected = x, found(x.size());
        Piece p = make_piece({.rows = 1, .cols = n, .row_stride = n}, nullptr, nullptr);
        p.out = out.data();
        p.ld_out = n;
        p.anchor = {.data = origin.data(), .ld = n, .dtype = DType::f32};
        p.delta = {.data = x.data(), .ld = n, .dtype = DType::f32};
        run.k.anchor({.dtype = dtype, .coefficient = one}, p, first_group(p), end_group(p));  // fma(1, x, -0) = x
        run.k.to_float(dtype, out.data(), found.data(), n);
        run.k.round_to(dtype, expected.data(), n);
        for (size_t i = 0; i < x.size(); ++i)
            run.expect(bits_of(DType::f32, &found[i]) == bits_of(DType::f32, &expected[i]),
                       "rounding to " + std::to_string(int(dtype)) + " of value " + std::to_string(i));
    }
}

}  // namespace pgap
