// What the kernels are given and the table through which one instruction set's build of them is called.
// Plain C++ without torch: ops.cpp checks and fills these, kernels.inl computes.
#pragma once
#include <cstdint>

namespace pgap {

enum class DType : int32_t { f32, bf16, f16 };
enum class Distribution : int32_t { normal, rademacher };

// A block of rows of one weight. Element (row, col) lies at out[row * ld_out + col] and has the logical index
// base + row * row_stride + col in the unsharded tensor.
struct Piece {
    const void* in;  // null: the pass writes the direction itself (gradient assembly, draw)
    void* out;
    int64_t rows, cols, ld_in, ld_out, base, row_stride;
    uint32_t tensor_id;
    int64_t scalar;  // column of the coefficient and decay tables
};

struct DensePass {
    DType dtype;
    Distribution distribution;
    int64_t stages, table_columns;
    const int64_t* draws_per_stage;     // [stages]
    const uint64_t* keys;               // [sum of draws_per_stage]
    const float* coefficients;          // [draws][table_columns]
    const float* decay;                 // [stages][table_columns]
    const uint64_t* rounding_keys;      // [stages], null: round to nearest
};

// W <- W - d W + a P Bt with P (rows x rank) row-major and Bt packed in panels; in == null writes a P Bt.
struct LowRankPass {
    DType dtype;
    Piece piece;
    const float* left;
    const float* right;
    int64_t rank;
    float coefficient, decay;
    const uint64_t* rounding_key;  // null: nearest
};

struct Kernels {
    const char* name;
    int64_t right_panel;  // columns of B that are packed together
    void (*dense)(const DensePass&, const Piece&, int64_t group_begin, int64_t group_end);
    void (*low_rank)(const LowRankPass&, int64_t row_begin, int64_t row_end);
    void (*to_float)(DType from, const void* in, float* out, int64_t count);
    void (*round_to)(DType to, float* values, int64_t count);  // to the nearest value of a 16-bit type, kept as float
    void (*box_muller)(const uint32_t* a, const uint32_t* b, float* even, float* odd, int64_t count);
};

// First and one-past-last group of 4096 logical elements that a piece touches.
inline int64_t first_group(const Piece& p) { return p.base >> 12; }
inline int64_t end_group(const Piece& p) { return ((p.base + (p.rows - 1) * p.row_stride + p.cols - 1) >> 12) + 1; }

extern const Kernels kernels_generic;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;

const Kernels& kernels();                       // the build in use: cpuid, lowered by PGAP_ISA
const char* best_isa();                         // what this CPU could run

}  // namespace pgap
