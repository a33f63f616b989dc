// W <- round(W - decay W + a P B^T),  P = A C;  or with Q  W <- round(W - decay W + a P B^T / sqrt(Q (B B)^T + e))
//
//   delta = a (P B^T), every element of which is one chain of fma over k = 0, 1 .. from 0
//   delta = delta / sqrt(Q (B B)^T + e)  if there is Q, with such chains too
//   delta = fma(-decay, W, delta)  if decay != 0
//   W     = round(W + delta)
//
// The chain is the same whatever tile computes an element: bits depend on nothing but the operands. P and B^T arrive
// packed (ops_lowrank.cpp). A tile of kLowrankTileRows x kLowrankPanel sums stays in registers from the first k to the
// store of W.

constexpr int64_t kRightBlock = 128 << 10;  // floats of B^T, 512 KB, that stay in L2 while all rows pass over them
constexpr int64_t kMaxBlockColumns = 8192 / kLowrankPanel * kLowrankPanel;  // bounds the buffer of stochastic rounding
constexpr int kPanelsAhead = 8;                                             // from a prefetch of W to its use

// Items of P and B^T per row: floats, or pairs of bf16.
template <bool PAIRS> static int64_t lowrank_depth(const LowrankPass& pass) {
    return PAIRS ? (pass.rank + 1) / 2 : pass.rank;
}

// P B^T of ROWS rows and one panel. With PAIRS one instruction adds the products of k = 2 i and then 2 i + 1, which is
// the chain of fma again (adds_in_order()). Loops are unrolled by force, or the sums would live in memory.
template <int ROWS, bool PAIRS, class X = V> static inline __attribute__((always_inline))
void lowrank_product(const LowrankPass& pass, const float* left, int64_t row, const float* right,
                     V::F (&sums)[ROWS][kLowrankPanelVectors]) {
    const int64_t depth = lowrank_depth<PAIRS>(pass);
    left += row * depth;
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
        for (int v = 0; v < kLowrankPanelVectors; ++v) sums[i][v] = V::set(0.0f);
    // Unrolled by two: without, 16 items or fewer take up to 40 % longer at some alignments of the loop.
#pragma GCC unroll 2
    for (int64_t k = 0; k < depth; ++k, right += kLowrankPanel, ++left) {
        V::F b[kLowrankPanelVectors];
        for (int v = 0; v < kLowrankPanelVectors; ++v) b[v] = V::load(right + v * V::N);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) {
            const V::F a = V::set(left[i * depth]);
#pragma GCC unroll 16
            for (int v = 0; v < kLowrankPanelVectors; ++v) {
                if constexpr (PAIRS) sums[i][v] = X::fma_pairs(a, b[v], sums[i][v]);
                else sums[i][v] = V::fma(a, b[v], sums[i][v]);
            }
        }
    }
}

// A tile, rounded to nearest. Meanwhile the tile `ahead` elements further on is prefetched: into L2, because rows are
// often a power of two apart and would evict each other from the few sets of L1 that they share.
template <int ROWS, bool PAIRS, class T> static void lowrank_tile(const LowrankPass& pass, int64_t row, int64_t col,
                                                                  const float* right, int64_t ahead) {
    const Piece& p = pass.piece;
    T* const out = (T*)p.out + row * p.ld_out + col;
    const T* const in = p.in ? (const T*)p.in + row * p.ld_in + col : nullptr;
    if (in)
        for (int i = 0; i < ROWS; ++i)
            for (int64_t b = 0; b < int64_t(kLowrankPanel * sizeof(T)); b += 64)
                V::prefetch_l2((const char*)(in + i * p.ld_in + ahead) + b);
    V::F sums[ROWS][kLowrankPanelVectors];
    lowrank_product<ROWS, PAIRS>(pass, pass.left, row, right, sums);
    const V::F a = V::set(pass.coefficient), d = V::set(pass.decay);
    const bool decays = pass.decay != 0.0f;
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
        for (int v = 0; v < kLowrankPanelVectors; ++v) {
            V::F value = V::mul(a, sums[i][v]);
            if (in) {
                const V::F w = V::load(in + i * p.ld_in + v * V::N);
                if (decays) value = V::fnma(d, w, value);
                value = V::add(w, value);
            }
            V::store(out + i * p.ld_out + v * V::N, value);
        }
}

// delta of a tile, to a buffer with rows ld apart.
template <int ROWS, bool PAIRS> static void lowrank_delta(const LowrankPass& pass, int64_t row, const float* right,
                                                          float* delta, int64_t ld) {
    V::F sums[ROWS][kLowrankPanelVectors];
    lowrank_product<ROWS, PAIRS>(pass, pass.left, row, right, sums);
    const V::F a = V::set(pass.coefficient);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
        for (int v = 0; v < kLowrankPanelVectors; ++v) V::store(delta + i * ld + v * V::N, V::mul(a, sums[i][v]));
    if (!pass.below_left) return;
    // The second product takes the registers of the first, which waits in the buffer.
    lowrank_product<ROWS, PAIRS>(pass, pass.below_left, row, pass.below_right + (right - pass.right), sums);
    const V::F e = V::set(pass.e);
    alignas(64) float root[kLowrankPanel];
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 16
        for (int v = 0; v < kLowrankPanelVectors; ++v) V::store(root + v * V::N, V::sqrt(V::add(sums[i][v], e)));
        for (int j = 0; j < kLowrankPanel; ++j) delta[i * ld + j] /= root[j];
    }
}

// ROWS rows and the columns [first, last), of which first begins a panel.
template <int ROWS, bool PAIRS, class T> static void lowrank_nearest(const LowrankPass& pass, int64_t row,
                                                                     int64_t first, int64_t last) {
    const Piece& p = pass.piece;
    const int64_t panel = kLowrankPanel * lowrank_depth<PAIRS>(pass);
    const float* right = pass.right + first / kLowrankPanel * panel;
    const int64_t width = last - first;
    const int64_t reach = kPanelsAhead * kLowrankPanel < width ? kPanelsAhead * kLowrankPanel : width;
    int64_t col = first;
    for (; col + kLowrankPanel <= last && !pass.below_left; col += kLowrankPanel, right += panel) {
        // At the end of these rows, prefetch the beginning of the rows below: that tile comes next.
        const int64_t ahead = col + reach < last ? reach : reach - width + ROWS * p.ld_in;
        lowrank_tile<ROWS, PAIRS, T>(pass, row, col, right, ahead);
    }
    alignas(64) float delta[ROWS * kLowrankPanel];  // for a last panel that is not full, and for quotients
    for (; col < last; col += kLowrankPanel, right += panel) {
        lowrank_delta<ROWS, PAIRS>(pass, row, right, delta, kLowrankPanel);
        const int64_t columns = last - col < kLowrankPanel ? last - col : kLowrankPanel;
        for (int64_t i = row; i < row + ROWS; ++i) {
            const T* in = p.in ? (const T*)p.in + i * p.ld_in + col : nullptr;
            apply_nearest((T*)p.out + i * p.ld_out + col, in, delta + (i - row) * kLowrankPanel, columns, pass.decay);
        }
    }
}

// The same, rounded stochastically. The words of a group are drawn once for all of these rows that it covers.
template <int ROWS, bool PAIRS, class T> static void lowrank_stochastic(const LowrankPass& pass, int64_t row,
                                                                        int64_t first, int64_t last) {
    alignas(64) float delta[ROWS * kMaxBlockColumns];
    alignas(64) uint32_t words[kGroup];
    const int64_t ld = (last - first + kLowrankPanel - 1) / kLowrankPanel * kLowrankPanel;
    const int64_t panel = kLowrankPanel * lowrank_depth<PAIRS>(pass);
    const float* right = pass.right + first / kLowrankPanel * panel;
    for (int64_t col = first; col < last; col += kLowrankPanel, right += panel)
        lowrank_delta<ROWS, PAIRS>(pass, row, right, delta + (col - first), ld);
    Piece p = pass.piece;
    p.rows = ROWS;
    p.cols = last - first;
    p.base += row * p.row_stride + first;
    p.out = (T*)p.out + row * p.ld_out + first;
    if (p.in) p.in = (const T*)p.in + row * p.ld_in + first;
    for (int64_t index = first_group(p); index < end_group(p); ++index) {
        Group g;
        if (!enter_group<T>(p, index, g)) continue;
        element_words(words, g, p.tensor_id, *pass.rounding_key);
        for_each_row(p, g, [&](int64_t i, int64_t column, int64_t lo, int64_t n) {
            const T* in = p.in ? (const T*)p.in + i * p.ld_in + column : nullptr;
            apply_delta((T*)p.out + i * p.ld_out + column, in, delta + i * ld + column, words + lo, n, pass.decay);
        });
    }
}

template <int ROWS, bool PAIRS, class T> static void lowrank_columns(const LowrankPass& pass, int64_t row,
                                                                     int64_t first, int64_t last) {
    if (pass.rounding_key && sizeof(T) == 2) lowrank_stochastic<ROWS, PAIRS, T>(pass, row, first, last);
    else lowrank_nearest<ROWS, PAIRS, T>(pass, row, first, last);
}

template <bool PAIRS, class T> static void lowrank_rows(const LowrankPass& pass, int64_t begin, int64_t end) {
    const int64_t cols = pass.piece.cols, fits = kRightBlock / pass.rank / kLowrankPanel * kLowrankPanel;
    const int64_t block = fits < kLowrankPanel ? kLowrankPanel : fits < kMaxBlockColumns ? fits : kMaxBlockColumns;
    for (int64_t first = 0; first < cols; first += block) {
        const int64_t last = first + block < cols ? first + block : cols;
        int64_t row = begin;
        for (; row + kLowrankTileRows <= end; row += kLowrankTileRows)
            lowrank_columns<kLowrankTileRows, PAIRS, T>(pass, row, first, last);
        for (; row < end; ++row) lowrank_columns<1, PAIRS, T>(pass, row, first, last);
    }
}

// A template, so that an instruction set without fma_pairs() does not compile calls of it.
template <bool HAS_PAIRS> static void lowrank_dispatch(const LowrankPass& pass, int64_t begin, int64_t end) {
    if constexpr (HAS_PAIRS) {
        if (pass.pairs) return lowrank_rows<HAS_PAIRS, BF16>(pass, begin, end);
    }
    dispatch_dtype(pass.dtype, [&](auto t) { lowrank_rows<false, decltype(t)>(pass, begin, end); });
}

static void lowrank(const LowrankPass& pass, int64_t begin, int64_t end) {
    lowrank_dispatch<kLowrankPairs>(pass, begin, end);
}
