// Low rank: W <- W - d W + a P Bt. Included after kernels.inl.
// Every element is the same fma chain over k, whatever the tile: bits depend on nothing but the operands.

constexpr int64_t kRightBlock = 128 << 10;          // floats of Bt that stay in L2 while all rows pass over them
constexpr int64_t kChunk = 8192 / kPanel * kPanel;  // columns of a tile's rows that wait for their rounding
constexpr int kAhead = 8;                           // panels between a prefetch and its use

// P Bt of ROWS rows and a panel. With PAIRS an item of P and Bt is two numbers of 16 bits, of which the one for the
// smaller k is the high half and added first.
template <int ROWS, bool PAIRS, class X = V> static inline __attribute__((always_inline))
void products(const LowRankPass& pass, int64_t row, const float* right, V::F (&acc)[ROWS][kPanelVectors]) {
    const int64_t depth = PAIRS ? (pass.rank + 1) / 2 : pass.rank;
    const float* left = pass.left + row * depth;
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
        for (int v = 0; v < kPanelVectors; ++v) acc[i][v] = V::set(0.0f);
    for (int64_t k = 0; k < depth; ++k, right += kPanel, ++left) {
        V::F b[kPanelVectors];
        for (int v = 0; v < kPanelVectors; ++v) b[v] = V::load(right + v * V::N);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) {
            const V::F a = V::set(left[i * depth]);
#pragma GCC unroll 16
            for (int v = 0; v < kPanelVectors; ++v) {
                if constexpr (PAIRS) acc[i][v] = X::fma_pairs(a, b[v], acc[i][v]);
                else acc[i][v] = V::fma(a, b[v], acc[i][v]);
            }
        }
    }
}

// A tile from registers to W, to nearest. `ahead` elements further is what will be needed soon.
template <int ROWS, bool PAIRS, class T> static void low_rank_tile(const LowRankPass& pass, int64_t row, int64_t col,
                                                                   const float* right, int64_t ahead) {
    const Piece& p = pass.piece;
    T* const out = (T*)p.out + row * p.ld_out + col;
    const T* const in = p.in ? (const T*)p.in + row * p.ld_in + col : nullptr;
    if (in)  // not to L1, of which rows that lie a power of two apart share few sets
        for (int i = 0; i < ROWS; ++i)
            for (int64_t b = 0; b < int64_t(kPanel * sizeof(T)); b += 64)
                V::prefetch_l2((const char*)(in + i * p.ld_in + ahead) + b);
    V::F acc[ROWS][kPanelVectors];
    products<ROWS, PAIRS>(pass, row, right, acc);
    const V::F scale = V::set(pass.coefficient), d = V::set(pass.decay);
    const bool decays = pass.decay != 0.0f;
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
        for (int v = 0; v < kPanelVectors; ++v) {
            V::F value = V::mul(scale, acc[i][v]);
            if (in) {
                const V::F w = V::load(in + i * p.ld_in + v * V::N);
                if (decays) value = V::fnma(d, w, value);
                value = V::add(w, value);
            }
            V::store(out + i * p.ld_out + v * V::N, value);
        }
}

// A tile to a buffer.
template <int ROWS, bool PAIRS> static void low_rank_delta(const LowRankPass& pass, int64_t row, const float* right,
                                                           float* delta, int64_t ld) {
    V::F acc[ROWS][kPanelVectors];
    products<ROWS, PAIRS>(pass, row, right, acc);
    const V::F scale = V::set(pass.coefficient);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
        for (int v = 0; v < kPanelVectors; ++v) V::store(delta + i * ld + v * V::N, V::mul(scale, acc[i][v]));
}

template <int ROWS, bool PAIRS, class T> static void low_rank_nearest(const LowRankPass& pass, int64_t row,
                                                                      int64_t first, int64_t last) {
    const Piece& p = pass.piece;
    const int64_t panel = kPanel * (PAIRS ? (pass.rank + 1) / 2 : pass.rank);
    const float* right = pass.right + first / kPanel * panel;
    const int64_t width = last - first, reach = kAhead * kPanel < width ? kAhead * kPanel : width;
    int64_t col = first;
    for (; col + kPanel <= last; col += kPanel, right += panel) {
        const int64_t ahead = col + reach < last ? reach : reach - width + ROWS * p.ld_in;  // in the tile below
        low_rank_tile<ROWS, PAIRS, T>(pass, row, col, right, ahead);
    }
    if (col == last) return;
    alignas(64) float delta[ROWS * kPanel];
    low_rank_delta<ROWS, PAIRS>(pass, row, right, delta, kPanel);
    for (int64_t i = row; i < row + ROWS; ++i) {
        const T* in = p.in ? (const T*)p.in + i * p.ld_in + col : nullptr;
        apply_nearest((T*)p.out + i * p.ld_out + col, in, delta + (i - row) * kPanel, last - col, pass.decay);
    }
}

// The rounding words of a group serve all of the tile's rows that it reaches.
template <int ROWS, bool PAIRS, class T> static void low_rank_stochastic(const LowRankPass& pass, int64_t row,
                                                                         int64_t first, int64_t last) {
    alignas(64) float delta[ROWS * kChunk];
    alignas(64) uint32_t words[kGroup];
    const int64_t ld = (last - first + kPanel - 1) / kPanel * kPanel;
    const int64_t panel = kPanel * (PAIRS ? (pass.rank + 1) / 2 : pass.rank);
    const float* right = pass.right + first / kPanel * panel;
    for (int64_t col = first; col < last; col += kPanel, right += panel)
        low_rank_delta<ROWS, PAIRS>(pass, row, right, delta + (col - first), ld);
    Piece p = pass.piece;
    p.rows = ROWS, p.cols = last - first, p.base += row * p.row_stride + first;
    p.out = (T*)p.out + row * p.ld_out + first;
    if (p.in) p.in = (const T*)p.in + row * p.ld_in + first;
    for (int64_t number = first_group(p); number < end_group(p); ++number) {
        Group g;
        if (!enter_group<T>(p, number, g)) continue;
        element_words(words, g, p.tensor_id, *pass.rounding_key);
        each_row(p, g, [&](int64_t i, int64_t column, int64_t lo, int64_t n) {
            const T* in = p.in ? (const T*)p.in + i * p.ld_in + column : nullptr;
            apply((T*)p.out + i * p.ld_out + column, in, delta + i * ld + column, words + lo, n, pass.decay);
        });
    }
}

template <int ROWS, bool PAIRS, class T> static void low_rank_block(const LowRankPass& pass, int64_t row, int64_t first,
                                                                    int64_t last) {
    if (pass.rounding_key && sizeof(T) == 2) low_rank_stochastic<ROWS, PAIRS, T>(pass, row, first, last);
    else low_rank_nearest<ROWS, PAIRS, T>(pass, row, first, last);
}

template <bool PAIRS, class T> static void low_rank_rows(const LowRankPass& pass, int64_t begin, int64_t end) {
    const int64_t cols = pass.piece.cols, fits = kRightBlock / pass.rank / kPanel * kPanel;
    const int64_t block = fits < kPanel ? kPanel : fits < kChunk ? fits : kChunk;
    for (int64_t first = 0; first < cols; first += block) {
        const int64_t last = first + block < cols ? first + block : cols;
        int64_t row = begin;
        for (; row + kTileRows <= end; row += kTileRows) low_rank_block<kTileRows, PAIRS, T>(pass, row, first, last);
        for (; row < end; ++row) low_rank_block<1, PAIRS, T>(pass, row, first, last);
    }
}

template <bool BUILT> static bool low_rank_pairs(const LowRankPass& pass, int64_t begin, int64_t end) {
    if constexpr (BUILT) {
        if (pass.pairs) return low_rank_rows<BUILT, BF16>(pass, begin, end), true;
    }
    return false;
}

static void low_rank(const LowRankPass& pass, int64_t begin, int64_t end) {
    if (low_rank_pairs<kPairs>(pass, begin, end)) return;
    with_type(pass.dtype, [&](auto t) { low_rank_rows<false, decltype(t)>(pass, begin, end); });
}
