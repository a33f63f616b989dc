// Matrices in memory of exactly the size that a kernel may touch, with the same values on every machine.
#pragma once
#include <sanitizer/asan_interface.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels.h"

namespace pgap {

inline int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

inline uint64_t hashed(uint64_t x) {  // splitmix64
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

inline float uniform(uint64_t seed) { return float(int32_t(hashed(seed) >> 39)) * 0x1p-24f - 0.5f; }  // -1/2 .. 1/2

// The bits by which a value is compared: one pattern for all NaNs.
inline uint32_t bits_of(DType dtype, const void* p) {
    if (dtype == DType::f32) {
        uint32_t b;
        std::memcpy(&b, p, 4);
        return (b & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : b;
    }
    uint16_t b;
    std::memcpy(&b, p, 2);
    const uint32_t infinity = dtype == DType::bf16 ? 0x7f80u : 0x7c00u;
    return (b & 0x7fffu) > infinity ? 0x7fffu : b;
}

struct Digest {
    uint64_t value = 0xcbf29ce484222325u;
    void add(uint64_t x) { value = hashed(value ^ x); }
    void add(DType dtype, const void* values, int64_t count) {
        for (int64_t i = 0; i < count; ++i) add(bits_of(dtype, (const char*)values + i * size_of(dtype)));
    }
    void add(const std::vector<double>& values) {
        for (const double value : values) {
            uint64_t bits;
            std::memcpy(&bits, &value, 8);
            add(bits);
        }
    }
};

enum class Fill { mixed, positive, nan };

// rows x cols elements with `gap` more between rows; the first lies `skew` elements into the allocation, the last at
// its very end. AddressSanitizer poisons what lies between, and the checks below see what was written there, or to an
// operand. A gap of -cols repeats one row, as a vector expanded over rows.
class Matrix {
public:
    Matrix(DType dtype, int64_t rows, int64_t cols, int64_t gap, int64_t skew, uint64_t seed, Fill fill = Fill::mixed)
        : dtype(dtype), rows(rows), cols(cols), ld(cols + gap), lead(skew * size_of(dtype)),
          bytes(lead + ((rows - 1) * ld + cols) * size_of(dtype)), memory(new unsigned char[size_t(bytes)]) {
        for (int64_t i = 0; i < bytes; ++i) memory[i] = (unsigned char)(0xa1 + i);
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t col = 0; col < cols; ++col) set(row, col, fill, hashed(seed) + uint64_t(row * cols + col));
        remember();
    }
    Matrix(Matrix&&) = default;
    ~Matrix() { if (memory) ASAN_UNPOISON_MEMORY_REGION(memory.get(), size_t(bytes)); }

    void* at(int64_t row, int64_t col = 0) const { return memory.get() + lead + (row * ld + col) * size_of(dtype); }
    float* floats() const { return (float*)at(0); }
    Companion companion() const { return {.data = at(0), .ld = ld, .dtype = dtype}; }

    void add_to(Digest& digest) const {
        for (int64_t row = 0; row < rows; ++row) digest.add(dtype, at(row), cols);
    }

    // What is in memory now is what untouched() compares with.
    void remember() {
        ASAN_UNPOISON_MEMORY_REGION(memory.get(), size_t(bytes));
        before.assign(memory.get(), memory.get() + bytes);
        for_each_gap([](unsigned char* gap, int64_t size) { ASAN_POISON_MEMORY_REGION(gap, size_t(size)); });
    }
    bool guards_intact() {
        ASAN_UNPOISON_MEMORY_REGION(memory.get(), size_t(bytes));
        bool intact = true;
        for_each_gap([&](unsigned char* gap, int64_t size) {
            intact &= !std::memcmp(gap, before.data() + (gap - memory.get()), size_t(size));
        });
        return intact;
    }
    bool untouched() { return guards_intact() && !std::memcmp(memory.get(), before.data(), size_t(bytes)); }

    const DType dtype;
    const int64_t rows, cols, ld;

private:
    template <class F> void for_each_gap(F f) {
        if (lead) f(memory.get(), lead);
        for (int64_t row = 0; row + 1 < rows && ld > cols; ++row)
            f((unsigned char*)at(row, cols), (ld - cols) * size_of(dtype));
    }
    void set(int64_t row, int64_t col, Fill fill, uint64_t seed) {
        const uint64_t x = hashed(seed);
        float value = fill == Fill::nan ? __builtin_nanf("") : uniform(seed);
        if (fill == Fill::mixed && x % 61 == 0) {  // zeros, subnormals, and what overflows float16
            const float rare[] = {0.0f, -0.0f, 3e-41f, -2e-39f, 65504.0f, -70000.0f};
            value = rare[x / 61 % 6];
        }
        if (fill == Fill::positive) value = value * value + 0x1p-10f;
        uint32_t b;
        std::memcpy(&b, &value, 4);
        uint16_t half = uint16_t(b >> 16);
        if (dtype == DType::f16) {  // any bit pattern below 2, so that all subnormals occur
            half = uint16_t(x >> 20) & (fill == Fill::positive ? 0x3fffu : 0xbfffu);
            if (fill == Fill::nan) half = 0x7e00u;
            if (fill == Fill::mixed && x % 61 == 0) half = x % 2 ? 0x7bffu : 0xfbffu;
        }
        std::memcpy(at(row, col), dtype == DType::f32 ? (const void*)&b : (const void*)&half,
                    size_t(size_of(dtype)));
    }
    const int64_t lead, bytes;
    std::unique_ptr<unsigned char[]> memory;
    std::vector<unsigned char> before;
};

}  // namespace pgap
