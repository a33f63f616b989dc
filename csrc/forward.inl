// Low rank in the forward (K10): y <- y + x F_in M F_out^T for a block of tokens, written once over V and its half H.
//
//   t = x F_in, u = t M: an fma chain from 0 over every kDepth inputs, these sums added in order
//   y + u F_out^T: one fma chain from 0; its sum with y is rounded once to y's type
//
// so bits depend on neither tile, block, thread nor instruction set.

constexpr int kTokens = 12;                    // of a tile; of the last one 4, 8 or 12
constexpr int64_t kDepth = 128;                // inputs of x that are widened together: short chains are exacter
constexpr int kWide = kDepth + 16;             // floats between tokens: odd in cache lines, so that sets do not collide
constexpr int kNarrow = kForwardStride;        // the same of t and u
constexpr int64_t kGroupFloats = 1 << 16;      // packed panels that stay in L2 while a block's tokens pass

// done(i, v, sum over k < depth of x[i][k] f[k][v]) for ROWS tokens and VECS vectors; all sums stay in registers.
template <class X, int ROWS, int VECS, int LDX, class Done>
static inline void multiply(const float* x, const float* f, int64_t ldf, int64_t depth, Done done) {
    typename X::F acc[ROWS][VECS];
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i)
        for (int v = 0; v < VECS; ++v) acc[i][v] = X::set(0.0f);
    for (int64_t k = 0; k < depth; ++k) {
        typename X::F b[VECS];
        for (int v = 0; v < VECS; ++v) b[v] = X::load(f + k * ldf + v * X::N);
        for (int i = 0; i < ROWS; ++i) {
            const typename X::F a = X::set(x[i * LDX + k]);
            for (int v = 0; v < VECS; ++v) acc[i][v] = X::fma(a, b[v], acc[i][v]);
        }
    }
#pragma GCC unroll 12  // or the sums go through memory
    for (int i = 0; i < ROWS; ++i)
        for (int v = 0; v < VECS; ++v) done(i, v, acc[i][v]);
}

// t (+)= x f for one tile; f has `columns` columns, a multiple of 8.
template <class X, int ROWS, int VECS, int LDX>
static inline void into_columns(const float* x, const float* f, int64_t ldf, int64_t depth, float* t, bool first) {
    multiply<X, ROWS, VECS, LDX>(x, f, ldf, depth, [&](int i, int v, typename X::F sum) {
        float* to = t + i * kNarrow + v * X::N;
        X::store(to, first ? sum : X::add(X::load(to), sum));
    });
}

template <int ROWS, int LDX>
static void into_tile(const float* x, const float* f, int64_t columns, int64_t depth, float* t, bool first) {
    constexpr int kStep = ROWS % kTallRows ? 4 : kTallRows;
    int64_t c = 0;
    for (; c + 2 * V::N <= columns; c += 2 * V::N)
        for (int i = 0; i < ROWS; i += kStep)
            into_columns<V, kStep, 2, LDX>(x + i * LDX, f + c, columns, depth, t + i * kNarrow + c, first);
    for (; c + V::N <= columns; c += V::N) into_columns<V, ROWS, 1, LDX>(x, f + c, columns, depth, t + c, first);
    for (; c < columns; c += H::N) into_columns<H, ROWS, 1, LDX>(x, f + c, columns, depth, t + c, first);
}

// y <- y + u F_out^T for `tokens` of a tile and the packed panels first .. last.
template <int ROWS, class T>
static void out_tile(const ForwardPass& pass, const float* u, T* y, int64_t tokens, int64_t first, int64_t last) {
    constexpr int kStep = ROWS % kTallRows ? 4 : kTallRows;
    for (int64_t panel = first; panel < last; ++panel) {
        const float* f = pass.out_of + panel * pass.rank * kForwardPanel;
        const int64_t column = panel * kForwardPanel, columns = pass.outputs - column;
        for (int r = 0; r < ROWS; r += kStep) {
            T* out = y + r * pass.outputs + column;
            const int64_t rows = tokens - r;
            if (panel + 1 < last)
                for (int64_t i = 0; i < kStep && i < rows; ++i)
                    for (int64_t b = 0; b < int64_t(kForwardPanel * sizeof(T)); b += 64)
                        V::prefetch((const char*)(out + i * pass.outputs + kForwardPanel) + b);
            if (columns >= kForwardPanel) {
                multiply<V, kStep, 2, kNarrow>(u + r * kNarrow, f, kForwardPanel, pass.rank,
                                               [&](int i, int v, V::F sum) {
                    if (i >= rows) return;
                    T* to = out + i * pass.outputs + v * V::N;
                    V::store(to, V::add(V::load(to), sum));
                });
                continue;
            }
            float sums[kStep][kForwardPanel];
            multiply<V, kStep, 2, kNarrow>(u + r * kNarrow, f, kForwardPanel, pass.rank,
                                           [&](int i, int v, V::F sum) { V::store(sums[i] + v * V::N, sum); });
            for (int64_t i = 0; i < kStep && i < rows; ++i)
                for (int64_t c = 0; c < columns; ++c)
                    narrow_to(out[i * pass.outputs + c], widen(out[i * pass.outputs + c]) + sums[i][c]);
        }
    }
}

// f(tile's first token, tokens in it, Height of 4, 8 or 12 that holds them)
template <int N> struct Height { static constexpr int value = N; };
template <class F> static void each_tile(int64_t tokens, F f) {
    for (int64_t i = 0; i < tokens; i += kTokens) {
        const int64_t n = tokens - i;
        if (n <= 4) f(i, n, Height<4>());
        else if (n <= 8) f(i, n, Height<8>());
        else f(i, n < kTokens ? n : kTokens, Height<kTokens>());
    }
}

template <class T> static void widen_row(const T* in, int64_t count, float* out) {
    int64_t k = 0;
    for (; k + V::N <= count; k += V::N) V::store(out + k, V::load(in + k));
    for (; k < count; ++k) out[k] = widen(in[k]);
}

template <class T>
static void into_block(const ForwardPass& pass, int64_t begin, int64_t tokens, float* t, float* wide) {
    for (int64_t k = 0; k < pass.inputs; k += kDepth) {
        const int64_t depth = pass.inputs - k < kDepth ? pass.inputs - k : kDepth;
        each_tile(tokens, [&](int64_t i, int64_t n, auto height) {
            for (int64_t r = 0; r < height.value; ++r) {
                if (r < n) widen_row((const T*)pass.in + (begin + i + r) * pass.ld_in + k, depth, wide + r * kWide);
                else for (int64_t j = 0; j < depth; ++j) wide[r * kWide + j] = 0.0f;
            }
            into_tile<height.value, kWide>(wide, (const float*)pass.into + k * pass.width, pass.width, depth,
                                           t + i * kNarrow, k == 0);
        });
    }
}

// x is rows of an identity: t is those rows of F_in.
template <class T> static void gather_block(const ForwardPass& pass, int64_t begin, int64_t tokens, float* t) {
    for (int64_t i = 0; i < tokens; ++i)
        widen_row((const T*)pass.into + pass.numbers[begin + i] * pass.rank, pass.rank, t + i * kNarrow);
}

template <class T> static void out_block(const ForwardPass& pass, int64_t begin, int64_t tokens, const float* u) {
    const int64_t panels = (pass.outputs + kForwardPanel - 1) / kForwardPanel;
    const int64_t fit = kGroupFloats / (kForwardPanel * pass.rank), group = fit < 1 ? 1 : fit;
    for (int64_t p = 0; p < panels; p += group)
        each_tile(tokens, [&](int64_t i, int64_t n, auto height) {
            out_tile<height.value, T>(pass, u + i * kNarrow, (T*)pass.out + (begin + i) * pass.outputs, n, p,
                                      p + group < panels ? p + group : panels);
        });
}

// Tokens begin .. end, all under one core. scratch: kForwardScratch floats.
static void forward(const ForwardPass& pass, const float* core, int64_t begin, int64_t end, float* scratch) {
    float *t = scratch, *u = t + kForwardTokens * kNarrow, *wide = u + kForwardTokens * kNarrow;
    for (; begin < end; begin += kForwardTokens) {
        const int64_t tokens = end - begin < kForwardTokens ? end - begin : kForwardTokens;
        if (pass.numbers)
            with_type(pass.into_type, [&](auto x) { gather_block<decltype(x)>(pass, begin, tokens, t); });
        else
            with_type(pass.in_type, [&](auto x) { into_block<decltype(x)>(pass, begin, tokens, t, wide); });
        each_tile(tokens, [&](int64_t i, int64_t, auto height) {
            for (int64_t k = 0; k < pass.rank; k += kDepth)
                into_tile<height.value, kNarrow>(t + i * kNarrow + k, core + k * pass.width, pass.width,
                                                 pass.rank - k < kDepth ? pass.rank - k : kDepth, u + i * kNarrow,
                                                 k == 0);
        });
        with_type(pass.out_type, [&](auto y) { out_block<decltype(y)>(pass, begin, tokens, u); });
    }
}
