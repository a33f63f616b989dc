// The interface between the ops (ops*.cpp), which know tensors, and the kernels (*.inl), which know pointers. Plain
// C++ without torch.
#pragma once
#include <cstdint>

namespace pgap {

enum class DType : int32_t { f32, bf16, f16 };
enum class Distribution : int32_t { normal, rademacher };
enum class Mask : int32_t { threshold, share, bits };
enum class Rule : int32_t { perturb, around, momentum, adam, hizoo, helene, helene_refresh, adamu };
constexpr int64_t kMaxRuleScalars = 8;

// Another tensor of a piece's shape that a pass reads or updates: optimizer state, an anchor.
struct Companion {
    void* data;  // null: absent. Written only if it is the state of a rule that updates it.
    int64_t ld;
    DType dtype;
};

// A block of rows of one weight. Element (row, col) lies at out[row * ld_out + col] and has the logical index
// base + row * row_stride + col in the unsharded tensor. Where nothing is written, ld may be 0: one row, repeated.
struct Piece {
    const void* in;  // null: out receives the direction itself (draw, assemble_gradient_)
    void* out;
    int64_t rows, cols, ld_in, ld_out, base, row_stride;
    uint32_t tensor_id;
    int64_t column;             // the tensor's column in tables of scalars
    Companion state0, state1;   // preconditioned
    Companion anchor, delta;    // anchor; reduction takes an anchor, too
    const uint32_t* mask_bits;  // masked: bit i & 31 of word i >> 5 is that of element i of the local tensor
    int64_t mask_offset;        // i of the piece's first element
    bool stream;                // bypass the caches: out is larger than they are and is only written
};

// Index of the first group of 4096 logical elements that a piece reaches into, and one past the last.
inline int64_t first_group(const Piece& p) { return p.base >> 12; }
inline int64_t end_group(const Piece& p) { return ((p.base + (p.rows - 1) * p.row_stride + p.cols - 1) >> 12) + 1; }

// sum_j a_j z(key_j). Tables of scalars are row-major, with a row per draw, stage or scalar and a column per tensor.
struct Draws {
    Distribution distribution;
    int64_t count, columns;
    const uint64_t* keys;       // [count]
    const float* coefficients;  // [count][columns]
};

struct DensePass {
    DType dtype;
    Draws draws;
    int64_t stages;
    const int64_t* draws_per_stage;  // [stages]
    const float* decay;              // [stages][columns]
    const uint64_t* rounding_keys;   // [stages]; null, here and below: round to nearest
};

struct MaskedPass {
    DType dtype;
    Draws draws;
    const float* decay;  // [columns]
    const uint64_t* rounding_key;
    Mask mask;
    const float* threshold;  // [columns]
    uint64_t mask_key;
    int64_t word_limit;  // random words below it keep their element; up to 2^32
};

struct PreconditionedPass {
    DType dtype;
    Draws draws;           // coefficients of g
    const float* restore;  // [draws][columns], coefficients of b
    Rule rule;
    int64_t scalar_count;
    const float* scalars;  // [scalar_count][columns], the rule's
    const float* decay;    // [columns]
    const uint64_t* rounding_key;
};

struct AnchorPass {
    DType dtype;
    const float* coefficient;  // [columns]
    const uint64_t* rounding_key;
};

struct ReductionPass {
    DType dtype;
    Distribution distribution;
    const uint64_t* key;  // null: sum of squares
};

struct LowrankPass {
    DType dtype;
    Piece piece;
    const float* left;   // P, [rows][rank]
    const float* right;  // B^T in panels of lowrank_panel columns: [panel][rank][lowrank_panel], zero-padded
    int64_t rank;
    float coefficient, decay;
    const uint64_t* rounding_key;
    bool pairs;  // items of P and B^T are not floats but two bf16: k = 2 i in the high half, 2 i + 1 in the low one
    const float* below_left;   // Q, laid out as P; null: no quotient
    const float* below_right;  // (B B)^T, laid out as B^T
    float e;                   // of the quotient, > 0
};

// The tokens of a layer's input and output, and the direction that a slice of them sees: the factors F_in and F_out, and
// M between them.
struct ForwardPass {
    DType inputs_type, factor_in_type, outputs_type;
    const void* inputs;      // x, [tokens][in_features] with rows ld_inputs apart; unused with indices
    const int64_t* indices;  // an embedding's: token t has x F_in = F_in[indices[t]]; null: none
    int64_t ld_inputs, in_features, out_features, rank;
    int64_t padded_rank;      // a multiple of 8
    // F_in: zero-padded float32 rows of padded_rank; with indices, rows of rank in factor_in_type (the op's argument).
    const void* factor_in;
    const float* factor_out;  // F_out^T in panels: [panel][rank][forward_panel], zero-padded
    const float* core;        // M, [rank][padded_rank], zero-padded; null: coefficient times the identity
    float coefficient;
    void* outputs;  // y, [tokens][out_features]
};
constexpr int64_t kForwardMaxRank = 512;
constexpr int64_t kForwardBlock = 48;  // tokens whose x F_in and x F_in M stay in L2
// Floats from one token's row of scratch to the next: an odd number of cache lines, which spreads rows over all sets
// of a cache.
constexpr int64_t kForwardStride = kForwardMaxRank + 16;
constexpr int64_t kForwardScratch = (2 * kForwardBlock + 12) * kForwardStride;

// The kernels as compiled for one instruction set. A call processes only the groups from group_begin to group_end - 1,
// or the rows or tokens from begin to end - 1, so that threads can share the work.
struct Kernels {
    const char* name;
    int64_t lowrank_panel;  // columns of B^T
    int64_t forward_panel;  // columns of F_out^T
    bool pairs;             // lowrank takes pairs of bf16
    void (*dense)(const DensePass&, const Piece&, int64_t group_begin, int64_t group_end);
    void (*masked)(const MaskedPass&, const Piece&, int64_t group_begin, int64_t group_end);
    void (*preconditioned)(const PreconditionedPass&, const Piece&, int64_t group_begin, int64_t group_end);
    void (*anchor)(const AnchorPass&, const Piece&, int64_t group_begin, int64_t group_end);
    // Writes one partial sum per group.
    void (*reduction)(const ReductionPass&, const Piece&, int64_t group_begin, int64_t group_end, double* partials);
    void (*lowrank)(const LowrankPass&, int64_t begin, int64_t end);
    // scratch: kForwardScratch floats.
    void (*forward)(const ForwardPass&, int64_t begin, int64_t end, float* scratch);
    void (*to_float)(DType from, const void* in, float* out, int64_t count);
    void (*round_to)(DType to, float* values, int64_t count);  // to the nearest value of that type, in place
    void (*box_muller)(const uint32_t* a, const uint32_t* b, float* even, float* odd, int64_t count);
};

extern const Kernels kernels_generic;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;
extern const Kernels kernels_neon;
namespace isa_avx512_bf16 { bool adds_in_order(); }

const Kernels& kernels();                         // in use: the best for this CPU, or those that PGAP_ISA names
void select_isa(const char* name);                // use these from now on; not during an op, which packs for one ISA
const Kernels* supported_kernels(int64_t index);  // that this CPU runs, best first; null past the last

}  // namespace pgap
