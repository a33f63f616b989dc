// y <- round(y + x F_in M F_out^T) for a block of tokens, the rows of x and y: low rank in a layer's forward
//
//   t = x F_in           a chain of fma from 0 for every kForwardDepth inputs, and the chains' sums added in order
//   t = F_in[index]      for an embedding, whose x is a list of indices
//   u = t M              as the first, over the rank; without a core u = c t
//   y = y + u F_out^T    one chain of fma from 0; its sum with y is rounded once, to y's type
//
// A token's bits depend neither on the tokens beside it, nor on tile, thread or instruction set. Written over V and
// its half H: a remainder of 8 columns takes half a vector, so that rank 8 wastes nothing.

constexpr int kForwardTile = 12;                    // tokens of a tile; the last of a block has 4, 8 or 12
constexpr int64_t kForwardDepth = 128;              // inputs at a time: converted together, and short chains round less
constexpr int kWidenedStride = kForwardDepth + 16;  // floats between tokens of converted x; see kForwardStride
constexpr int64_t kOutBlock = 1 << 16;              // floats of F_out^T that stay in L2 for all tokens of a block

// f(i, v, sum over k < depth of x[i][k] f[k][v]) for ROWS tokens and VECTORS vectors; all sums stay in registers.
template <class X, int ROWS, int VECTORS, int LDX, class F>
static inline void forward_product(const float* x, const float* factor, int64_t ld_factor, int64_t depth, F f) {
    typename X::F sums[ROWS][VECTORS];
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i)
        for (int v = 0; v < VECTORS; ++v) sums[i][v] = X::set(0.0f);
    for (int64_t k = 0; k < depth; ++k) {
        typename X::F b[VECTORS];
        for (int v = 0; v < VECTORS; ++v) b[v] = X::load(factor + k * ld_factor + v * X::N);
        for (int i = 0; i < ROWS; ++i) {
            const typename X::F a = X::set(x[i * LDX + k]);
            for (int v = 0; v < VECTORS; ++v) sums[i][v] = X::fma(a, b[v], sums[i][v]);
        }
    }
#pragma GCC unroll 12  // otherwise GCC keeps the sums in memory, where it can index them
    for (int i = 0; i < ROWS; ++i)
        for (int v = 0; v < VECTORS; ++v) f(i, v, sums[i][v]);
}

// to = x factor if this is the first of several depths, else to += x factor; VECTORS vectors of columns.
template <class X, int ROWS, int VECTORS, int LDX>
static inline void project_columns(const float* x, const float* factor, int64_t ld_factor, int64_t depth, float* to,
                                   bool first) {
    forward_product<X, ROWS, VECTORS, LDX>(x, factor, ld_factor, depth, [&](int i, int v, typename X::F sum) {
        float* at = to + i * kForwardStride + v * X::N;
        X::store(at, first ? sum : X::add(X::load(at), sum));
    });
}

// The same for a tile and all columns of the factor, a multiple of 8.
template <int ROWS, int LDX>
static void project_tile(const float* x, const float* factor, int64_t columns, int64_t depth, float* to, bool first) {
    constexpr int kStep = ROWS % kForwardTileRows ? 4 : kForwardTileRows;
    int64_t c = 0;
    for (; c + 2 * V::N <= columns; c += 2 * V::N)
        for (int i = 0; i < ROWS; i += kStep)
            project_columns<V, kStep, 2, LDX>(x + i * LDX, factor + c, columns, depth, to + i * kForwardStride + c,
                                              first);
    for (; c + V::N <= columns; c += V::N)
        project_columns<V, ROWS, 1, LDX>(x, factor + c, columns, depth, to + c, first);
    for (; c < columns; c += H::N)
        project_columns<H, ROWS, 1, LDX>(x, factor + c, columns, depth, to + c, first);
}

// y <- round(y + u F_out^T) for `tokens` of a tile's ROWS and the panels [first, last).
template <int ROWS, class T>
static void expand_tile(const ForwardPass& pass, const float* u, T* y, int64_t tokens, int64_t first, int64_t last) {
    constexpr int kStep = ROWS % kForwardTileRows ? 4 : kForwardTileRows;
    for (int64_t panel = first; panel < last; ++panel) {
        const float* factor = pass.factor_out + panel * pass.rank * kForwardPanel;
        const int64_t column = panel * kForwardPanel, columns = pass.out_features - column;
        for (int r = 0; r < ROWS; r += kStep) {
            T* out = y + r * pass.out_features + column;
            const int64_t rows = tokens - r;
            if (panel + 1 < last)
                for (int64_t i = 0; i < kStep && i < rows; ++i)
                    for (int64_t b = 0; b < int64_t(kForwardPanel * sizeof(T)); b += 64)
                        V::prefetch((const char*)(out + i * pass.out_features + kForwardPanel) + b);
            if (columns >= kForwardPanel) {
                forward_product<V, kStep, 2, kForwardStride>(
                    u + r * kForwardStride, factor, kForwardPanel, pass.rank, [&](int i, int v, V::F sum) {
                        if (i >= rows) return;
                        T* to = out + i * pass.out_features + v * V::N;
                        V::store(to, V::add(V::load(to), sum));
                    });
                continue;
            }
            float sums[kStep][kForwardPanel];
            forward_product<V, kStep, 2, kForwardStride>(
                u + r * kForwardStride, factor, kForwardPanel, pass.rank,
                [&](int i, int v, V::F sum) { V::store(sums[i] + v * V::N, sum); });
            for (int64_t i = 0; i < kStep && i < rows; ++i)
                for (int64_t c = 0; c < columns; ++c) {
                    T& to = out[i * pass.out_features + c];
                    round_nearest(to, to_float(to) + sums[i][c]);
                }
        }
    }
}

// f(first token, tokens, TileRows<4, 8 or 12> that hold them) for the tiles of a block.
template <int N> struct TileRows { static constexpr int value = N; };
template <class F> static void for_each_tile(int64_t tokens, F f) {
    for (int64_t i = 0; i < tokens; i += kForwardTile) {
        const int64_t n = tokens - i;
        if (n <= 4) f(i, n, TileRows<4>());
        else if (n <= 8) f(i, n, TileRows<8>());
        else f(i, n < kForwardTile ? n : kForwardTile, TileRows<kForwardTile>());
    }
}

// t = x F_in
template <class T>
static void project_block(const ForwardPass& pass, int64_t begin, int64_t tokens, float* t, float* widened) {
    for (int64_t k = 0; k < pass.in_features; k += kForwardDepth) {
        const int64_t depth = pass.in_features - k < kForwardDepth ? pass.in_features - k : kForwardDepth;
        for_each_tile(tokens, [&](int64_t i, int64_t n, auto rows) {
            for (int64_t r = 0; r < rows.value; ++r) {
                float* to = widened + r * kWidenedStride;
                if (r < n) convert_to_float((const T*)pass.inputs + (begin + i + r) * pass.ld_inputs + k, to, depth);
                else for (int64_t j = 0; j < depth; ++j) to[j] = 0.0f;
            }
            project_tile<rows.value, kWidenedStride>(widened, (const float*)pass.factor_in + k * pass.padded_rank,
                                                     pass.padded_rank, depth, t + i * kForwardStride, k == 0);
        });
    }
}

// t = F_in[indices]
template <class T> static void gather_block(const ForwardPass& pass, int64_t begin, int64_t tokens, float* t) {
    for (int64_t i = 0; i < tokens; ++i) {
        const T* row = (const T*)pass.factor_in + pass.indices[begin + i] * pass.rank;
        convert_to_float(row, t + i * kForwardStride, pass.rank);
    }
}

// u = t M
static void mix_block(const ForwardPass& pass, int64_t tokens, const float* t, float* u) {
    for_each_tile(tokens, [&](int64_t i, int64_t, auto rows) {
        for (int64_t k = 0; k < pass.rank; k += kForwardDepth) {
            const int64_t depth = pass.rank - k < kForwardDepth ? pass.rank - k : kForwardDepth;
            project_tile<rows.value, kForwardStride>(t + i * kForwardStride + k, pass.core + k * pass.padded_rank,
                                                     pass.padded_rank, depth, u + i * kForwardStride, k == 0);
        }
    });
}

// t = c t
static void scale_block(const ForwardPass& pass, int64_t tokens, float* t) {
    const H::F c = H::set(pass.coefficient);
    for (int64_t i = 0; i < tokens; ++i, t += kForwardStride)
        for (int64_t k = 0; k < pass.rank; k += H::N) H::store(t + k, H::mul(c, H::load(t + k)));
}

template <class T> static void expand_block(const ForwardPass& pass, int64_t begin, int64_t tokens, const float* u) {
    const int64_t panels = (pass.out_features + kForwardPanel - 1) / kForwardPanel;
    const int64_t fit = kOutBlock / (kForwardPanel * pass.rank), step = fit < 1 ? 1 : fit;
    for (int64_t p = 0; p < panels; p += step)
        for_each_tile(tokens, [&](int64_t i, int64_t n, auto rows) {
            T* y = (T*)pass.outputs + (begin + i) * pass.out_features;
            expand_tile<rows.value, T>(pass, u + i * kForwardStride, y, n, p, p + step < panels ? p + step : panels);
        });
}

// Tokens begin .. end - 1 of a slice.
static void forward(const ForwardPass& pass, int64_t begin, int64_t end, float* scratch) {
    float* t = scratch;
    float* u = t + kForwardBlock * kForwardStride;
    float* widened = u + kForwardBlock * kForwardStride;
    for (; begin < end; begin += kForwardBlock) {
        const int64_t tokens = end - begin < kForwardBlock ? end - begin : kForwardBlock;
        if (pass.indices)
            dispatch_dtype(pass.factor_in_type, [&](auto f) { gather_block<decltype(f)>(pass, begin, tokens, t); });
        else
            dispatch_dtype(pass.inputs_type,
                           [&](auto x) { project_block<decltype(x)>(pass, begin, tokens, t, widened); });
        if (pass.core) mix_block(pass, tokens, t, u);
        else scale_block(pass, tokens, t);
        const float* moved = pass.core ? u : t;
        dispatch_dtype(pass.outputs_type, [&](auto y) { expand_block<decltype(y)>(pass, begin, tokens, moved); });
    }
}
