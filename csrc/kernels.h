// What the kernels are given and the table through which one instruction set's build of them is called.
// Plain C++ without torch: ops*.cpp check and fill these, *.inl compute.
#pragma once
#include <cstdint>

namespace pgap {

enum class DType : int32_t { f32, bf16, f16 };
enum class Distribution : int32_t { normal, rademacher };
enum class Mask : int32_t { threshold, share, bits };
enum class Rule : int32_t { perturb, momentum, adam, hizoo, helene, helene_refresh };
constexpr int64_t kMaxScalars = 8;  // of a rule

// Another tensor of a piece's shape that a pass reads or writes beside it: a state, an anchor.
struct Companion {
    void* data;  // null: none; written only where it is a state that a rule updates
    int64_t ld;
    DType dtype;
};

// A block of rows of one weight. Element (row, col) lies at out[row * ld_out + col] and has the logical index
// base + row * row_stride + col in the unsharded tensor.
struct Piece {
    const void* in;  // null: the pass writes the direction itself (gradient assembly, draw)
    void* out;
    int64_t rows, cols, ld_in, ld_out, base, row_stride;
    uint32_t tensor_id;
    int64_t scalar;  // column of the tables of scalars
    Companion first, second;
    const uint32_t* bits;  // a mask: bit e & 31 of number e >> 5 is that of element e, counted in the tensor given
    int64_t element;       // number there of the piece's first element
    bool stream;           // out is too large for the caches and is not read: write past them
};

// sum_j a_j z(key_j). Tables of scalars, here and below, are [rows][columns]; a piece names its column.
struct Draws {
    Distribution distribution;
    int64_t count, columns;
    const uint64_t* keys;
    const float* coefficients;
};

struct DensePass {
    DType dtype;
    Draws draws;
    int64_t stages;
    const int64_t* draws_per_stage;  // [stages]
    const float* decay;              // [stages][columns]
    const uint64_t* rounding_keys;   // [stages], null: round to nearest
};

struct MaskedPass {
    DType dtype;
    Draws draws;
    const float* decay;            // [1][columns]
    const uint64_t* rounding_key;  // null: nearest, here and below
    Mask mask;
    const float* threshold;        // [1][columns]
    uint64_t mask_key;
    int64_t word_limit;            // words below it are kept
};

struct PreconditionedPass {
    DType dtype;
    Draws draws;           // of g
    const float* restore;  // [draws][columns], the coefficients of b
    Rule rule;
    int64_t scalar_rows;
    const float* scalars;  // [scalar_rows][columns], of which kMaxScalars is the most
    const float* decay;
    const uint64_t* rounding_key;
};

struct AffinePass {
    DType dtype;
    const float* coefficient;  // [1][columns]
    const uint64_t* rounding_key;
};

struct ReducePass {
    DType dtype;
    Distribution distribution;
    const uint64_t* key;  // null: squares
};

// W <- W - d W + a P Bt with P (rows x rank) row-major and Bt packed in panels; in == null writes a P Bt.
// With `pairs`, an item of P and of Bt's panels is not a float but two bf16, k = 2 i high and 2 i + 1 low.
struct LowRankPass {
    DType dtype;
    Piece piece;
    const float* left;
    const float* right;
    int64_t rank;
    float coefficient, decay;
    const uint64_t* rounding_key;  // null: nearest
    bool pairs;
};

// y <- y + x F_in M F_out^T. Tokens are rows of x and y; M, of rank x width floats, is given with every call.
struct ForwardPass {
    DType in_type, into_type, out_type;
    const void* in;          // x, rows of `inputs` that lie ld_in apart; or
    const int64_t* numbers;  // for every token the row of F_in that x F_in is
    int64_t ld_in, inputs;
    const void* into;  // F_in: float32 in rows of `width`, a multiple of 8 with zeros behind rank; for numbers as given
    const float* out_of;  // F_out^T in panels, zero-padded
    void* out;            // y, rows of `outputs`
    int64_t outputs, rank, width;
};
constexpr int64_t kForwardRank = 512;                  // at most
constexpr int64_t kForwardStride = kForwardRank + 16;  // floats between tokens: odd in cache lines, against collisions
constexpr int64_t kForwardTokens = 48;                 // of a block, whose x F_in stays in L2
constexpr int64_t kForwardScratch = (2 * kForwardTokens + 12) * kForwardStride;

struct Kernels {
    const char* name;
    int64_t right_panel;    // columns of B that are packed together
    int64_t forward_panel;  // rows of F_out
    bool pairs;             // low_rank takes them
    // Of a piece, the groups group_begin .. group_end; reduce writes one partial sum for each.
    void (*dense)(const DensePass&, const Piece&, int64_t group_begin, int64_t group_end);
    void (*masked)(const MaskedPass&, const Piece&, int64_t group_begin, int64_t group_end);
    void (*preconditioned)(const PreconditionedPass&, const Piece&, int64_t group_begin, int64_t group_end);
    void (*affine)(const AffinePass&, const Piece&, int64_t group_begin, int64_t group_end);
    void (*reduce)(const ReducePass&, const Piece&, int64_t group_begin, int64_t group_end, double* partials);
    void (*low_rank)(const LowRankPass&, int64_t row_begin, int64_t row_end);
    void (*forward)(const ForwardPass&, const float* core, int64_t begin, int64_t end, float* scratch);
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
extern const Kernels kernels_avx512_bf16;
namespace isa_avx512_bf16 { bool adds_in_order(); }  // on this CPU, as the kernels need it
extern const Kernels kernels_neon;

const Kernels& kernels();                       // the build in use: cpuid, lowered by PGAP_ISA
void use(const char* isa);                      // another one from now on; for benchmarks, between calls
const Kernels* build(int64_t number);           // those that this CPU runs, best first; null behind the last
const char* best_isa();

}  // namespace pgap
