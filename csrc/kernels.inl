// Kernel bodies, written once over the vector type V that the including isa_*.cpp defines.

// ---- element noise ------------------------------------------------------------------------------------------

// Where a pass stands within one group: the blocks it needs (multiples of V::N) and, if the group is one
// contiguous run of weights, where they lie, so that they are fetched while the noise is computed.
struct GroupSpan {
    int64_t block_begin, block_end;
    const char* run;
    int64_t run_bytes;
};

// delta = a z  (first draw)   or   delta = fma(a, z, delta)
template <bool FIRST> static void add_normal(float* delta, const GroupSpan& span, const Philox7<V>& philox,
                                             uint32_t block, float coefficient) {
    const V::F a = V::set(coefficient);
    const char* ahead = span.run;
    const int64_t step = span.run ? span.run_bytes * V::N / kBlocks : 0;
    for (int64_t r = span.block_begin; r < span.block_end; r += V::N) {
        if (FIRST && step) {
            for (int64_t b = 0; b < step; b += 64) V::prefetch(ahead + b);
            ahead += step;
        }
        V::U x[4];
        philox.words(block + uint32_t(r), x);
        V::F z[4];
        box_muller<V>(x[0], x[1], z[0], z[1]);
        box_muller<V>(x[2], x[3], z[2], z[3]);
        for (int lane = 0; lane < 4; ++lane) {
            float* d = delta + lane * kBlocks + r;
            V::store(d, FIRST ? V::mul(a, z[lane]) : V::fma(a, z[lane], V::load(d)));
        }
    }
}

// Signs of the group's 4096 elements: 128 consecutive words, all in one output lane.
template <bool FIRST> static void add_rademacher(float* delta, int64_t group, const GroupSpan& span,
                                                 uint32_t tensor_id, uint64_t key, float coefficient) {
    const int64_t word = group * (kGroup / 32), block = ((word >> 12) << 10) | (word & 1023);
    const int lane = int((word >> 10) & 3);
    const Philox7<V> philox(uint32_t(uint64_t(block) >> 32), tensor_id, key);
    const V::F a = V::set(coefficient);
    const V::U minus = V::setu(0x80000000u);
    const char* ahead = span.run;
    const int64_t step = span.run ? span.run_bytes * V::N / 128 : 0;
    for (int i = 0; i < 128; i += V::N) {
        for (int64_t b = 0; FIRST && b < step; b += 64) V::prefetch(ahead + b);
        ahead += step;
        V::U x[4];
        uint32_t words[V::N];
        philox.words(uint32_t(block) + uint32_t(i), x);
        V::storeu(words, x[lane]);
        for (int k = 0; k < V::N; ++k) {
            float* d = delta + (i + k) * 32;
            for (int bit = 0; bit < 32; bit += V::N, d += V::N) {
                if (FIRST) {
                    V::store(d, V::as_f(V::xoru(V::xoru(V::lane_bits(words[k], bit), minus), V::as_u(a))));
                } else {
                    const V::F one = V::as_f(V::oru(V::xoru(V::lane_bits(words[k], bit), minus), V::setu(0x3f800000u)));
                    V::store(d, V::fma(a, one, V::load(d)));
                }
            }
        }
    }
}

static void rounding_words(uint32_t* words, const GroupSpan& span, const Philox7<V>& philox, uint32_t block) {
    for (int64_t r = span.block_begin; r < span.block_end; r += V::N) {
        V::U x[4];
        philox.words(block + uint32_t(r), x);
        for (int lane = 0; lane < 4; ++lane) V::storeu(words + lane * kBlocks + r, x[lane]);
    }
}

// ---- acc = W + fma(-d, W, delta), rounded once --------------------------------------------------------------

template <class X, class T> static int64_t apply_lanes(T* out, const T* in, const float* delta, int64_t i, int64_t n,
                                                       float decay) {
    const typename X::F d = X::set(decay);
    for (; i + X::N <= n; i += X::N) {
        typename X::F acc = X::load(delta + i);
        if (in) {
            const typename X::F w = X::load(in + i);
            if (decay != 0.0f) acc = X::fnma(d, w, acc);
            acc = X::add(w, acc);
        }
        X::store(out + i, acc);
    }
    return i;
}

template <class T> static void apply_nearest(T* out, const T* in, const float* delta, int64_t n, float decay) {
    const int64_t done = apply_lanes<V>(out, in, delta, 0, n, decay);
    apply_lanes<Generic<1>>(out, in, delta, done, n, decay);
}

// lo: toward zero; hi: the next away; hi iff s 2^-16 < (|acc| - |lo|) / (|hi| - |lo|), s = top 16 bits of the word.
static inline void round_stochastic(float& out, float acc, uint32_t) { out = acc; }
static inline void round_stochastic(BF16& out, float acc, uint32_t word) {
    const uint32_t b = float_to_bits(acc);
    if ((b & 0x7fffffffu) > 0x7f7f0000u) return narrow_to(out, acc);
    out.bits = uint16_t((b >> 16) + ((word >> 16) < (b & 0xffffu)));
}
static inline void round_stochastic(FP16& out, float acc, uint32_t word) {
    const uint32_t b = float_to_bits(acc), a = b & 0x7fffffffu, sign = (b >> 16) & 0x8000u;
    if (a > 0x477fe000u) return narrow_to(out, acc);
    if (a >= 0x38800000u) {
        out.bits = uint16_t(sign | (((a - 0x38000000u) >> 13) + ((word >> 16) < ((a & 0x1fffu) << 3))));
        return;
    }
    const float units = bits_to_float(a) * 0x1p24f;  // multiples of the subnormal step; exact
    const uint32_t lo = uint32_t(units);
    out.bits = uint16_t(sign | (lo + (float(word >> 16) * 0x1p-16f < units - float(lo))));
}

template <class T> static void apply_stochastic(T* out, const T* in, const float* delta, const uint32_t* words,
                                                int64_t n, float decay) {
    for (int64_t i = 0; i < n; ++i) {
        float acc = delta[i];
        if (in) {
            const float w = widen(in[i]);
            if (decay != 0.0f) acc = __builtin_fmaf(-decay, w, acc);
            acc = w + acc;
        }
        round_stochastic(out[i], acc, words[i]);
    }
}

// ---- dense: W <- W - d W + sum_j a_j z(key_j), stage by stage ------------------------------------------------

template <class T> static void dense_groups(const DensePass& pass, const Piece& p, int64_t begin, int64_t end) {
    alignas(64) float delta[kGroup];
    alignas(64) uint32_t words[kGroup];
    const int64_t stride = p.row_stride;
    for (int64_t g = begin; g < end; ++g) {
        const int64_t e0 = g * kGroup, behind = e0 - p.base - p.cols;
        int64_t row0 = behind < 0 ? 0 : behind / stride + 1;
        // Index of a row's first element relative to the group; rows stop at row_end.
        const int64_t start0 = p.base + row0 * stride - e0;
        int64_t row_end = row0, start = start0;
        while (row_end < p.rows && start < kGroup) ++row_end, start += stride;
        if (row_end == row0) continue;
        const int64_t first = start0 > 0 ? start0 : 0;
        const int64_t tail = start0 + (row_end - 1 - row0) * stride + p.cols;
        const int64_t last = tail < kGroup ? tail : kGroup;
        GroupSpan span = {0, kBlocks, nullptr, 0};
        if (first / kBlocks == (last - 1) / kBlocks) {
            span.block_begin = first % kBlocks / V::N * V::N;
            span.block_end = ((last - 1) % kBlocks / V::N + 1) * V::N;
        } else if (row_end - row0 == 1 && last - first == kGroup && p.in) {
            span.run = (const char*)((const T*)p.in + row0 * p.ld_in - start0);
            span.run_bytes = kGroup * int64_t(sizeof(T));
        }
        const uint32_t block = uint32_t(uint64_t(g) << 10), block_hi = uint32_t(uint64_t(g) >> 22);
        int64_t draw = 0;
        for (int64_t stage = 0; stage < pass.stages; ++stage) {
            if (pass.draws_per_stage[stage] == 0)
                for (int64_t i = first; i < last; ++i) delta[i] = 0.0f;
            for (int64_t j = 0; j < pass.draws_per_stage[stage]; ++j, ++draw) {
                const float a = pass.coefficients[draw * pass.table_columns + p.scalar];
                const uint64_t key = pass.keys[draw];
                if (pass.distribution == Distribution::rademacher) {
                    if (j == 0) add_rademacher<true>(delta, g, span, p.tensor_id, key, a);
                    else add_rademacher<false>(delta, g, span, p.tensor_id, key, a);
                } else {
                    const Philox7<V> philox(block_hi, p.tensor_id, key);
                    if (j == 0) add_normal<true>(delta, span, philox, block, a);
                    else add_normal<false>(delta, span, philox, block, a);
                }
            }
            const float decay = pass.decay[stage * pass.table_columns + p.scalar];
            const bool stochastic = pass.rounding_keys && sizeof(T) == 2;
            if (stochastic)
                rounding_words(words, span, Philox7<V>(block_hi, p.tensor_id, pass.rounding_keys[stage]), block);
            const T* source = (const T*)(stage == 0 ? p.in : p.out);
            const int64_t ld_source = stage == 0 ? p.ld_in : p.ld_out;
            start = start0;
            for (int64_t row = row0; row < row_end; ++row, start += stride) {
                const int64_t lo = start > 0 ? start : 0, hi = start + p.cols < kGroup ? start + p.cols : kGroup;
                T* out = (T*)p.out + row * p.ld_out + (lo - start);
                const T* in = source ? source + row * ld_source + (lo - start) : nullptr;
                if (stochastic) apply_stochastic(out, in, delta + lo, words + lo, hi - lo, decay);
                else apply_nearest(out, in, delta + lo, hi - lo, decay);
            }
        }
    }
}

static void dense(const DensePass& pass, const Piece& piece, int64_t begin, int64_t end) {
    switch (pass.dtype) {
        case DType::f32: return dense_groups<float>(pass, piece, begin, end);
        case DType::bf16: return dense_groups<BF16>(pass, piece, begin, end);
        case DType::f16: return dense_groups<FP16>(pass, piece, begin, end);
    }
}

// ---- low rank: W <- W - d W + a P Bt -------------------------------------------------------------------------

// Every element is the same fma chain over k, whatever the tile: bits depend on nothing but the operands.
template <int ROWS, class T> static void low_rank_tile(const LowRankPass& pass, int64_t row, int64_t col,
                                                       const float* right) {
    const Piece& p = pass.piece;
    const int64_t rank = pass.rank, cols = p.cols - col < kPanel ? p.cols - col : kPanel;
    V::F acc[ROWS][kPanelVectors];
    for (int i = 0; i < ROWS; ++i)
        for (int v = 0; v < kPanelVectors; ++v) acc[i][v] = V::set(0.0f);
    if (p.in)
        for (int i = 0; i < ROWS; ++i)
            for (int64_t b = 0; b < int64_t(kPanel * sizeof(T)); b += 64)
                V::prefetch((const char*)((const T*)p.in + (row + i) * p.ld_in + col + kPanel) + b);
    const float* left = pass.left + row * rank;
    for (int64_t k = 0; k < rank; ++k) {
        V::F b[kPanelVectors];
        for (int v = 0; v < kPanelVectors; ++v) b[v] = V::load(right + k * kPanel + v * V::N);
        for (int i = 0; i < ROWS; ++i) {
            const V::F a = V::set(left[i * rank + k]);
            for (int v = 0; v < kPanelVectors; ++v) acc[i][v] = V::fma(a, b[v], acc[i][v]);
        }
    }
    const V::F scale = V::set(pass.coefficient);
    if (cols == kPanel && !pass.rounding_key) {
        const V::F d = V::set(pass.decay);
        for (int i = 0; i < ROWS; ++i) {
            T* out = (T*)p.out + (row + i) * p.ld_out + col;
            const T* in = p.in ? (const T*)p.in + (row + i) * p.ld_in + col : nullptr;
            for (int v = 0; v < kPanelVectors; ++v) {
                V::F value = V::mul(scale, acc[i][v]);
                if (in) {
                    const V::F w = V::load(in + v * V::N);
                    if (pass.decay != 0.0f) value = V::fnma(d, w, value);
                    value = V::add(w, value);
                }
                V::store(out + v * V::N, value);
            }
        }
        return;
    }
    for (int i = 0; i < ROWS; ++i) {
        alignas(64) float delta[kPanel];
        for (int v = 0; v < kPanelVectors; ++v) V::store(delta + v * V::N, V::mul(scale, acc[i][v]));
        T* out = (T*)p.out + (row + i) * p.ld_out + col;
        const T* in = p.in ? (const T*)p.in + (row + i) * p.ld_in + col : nullptr;
        if (pass.rounding_key && sizeof(T) == 2) {
            uint32_t words[kPanel];
            const int64_t e0 = p.base + (row + i) * p.row_stride + col;
            for (int64_t j = 0; j < cols; ++j) {
                const int64_t e = e0 + j, block = ((e >> 12) << 10) | (e & 1023);
                Generic<1>::U x[4];
                Philox7<Generic<1>>(uint32_t(uint64_t(block) >> 32), p.tensor_id, *pass.rounding_key)
                    .words(uint32_t(block), x);
                words[j] = x[(e >> 10) & 3].v[0];
            }
            apply_stochastic(out, in, delta, words, cols, pass.decay);
        } else {
            apply_nearest(out, in, delta, cols, pass.decay);
        }
    }
}

template <class T> static void low_rank_rows(const LowRankPass& pass, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end;) {
        const bool full = end - row >= kTileRows;
        const float* right = pass.right;
        for (int64_t col = 0; col < pass.piece.cols; col += kPanel, right += kPanel * pass.rank) {
            if (full) low_rank_tile<kTileRows, T>(pass, row, col, right);
            else for (int64_t i = row; i < end; ++i) low_rank_tile<1, T>(pass, i, col, right);
        }
        row = full ? row + kTileRows : end;
    }
}

static void low_rank(const LowRankPass& pass, int64_t begin, int64_t end) {
    switch (pass.dtype) {
        case DType::f32: return low_rank_rows<float>(pass, begin, end);
        case DType::bf16: return low_rank_rows<BF16>(pass, begin, end);
        case DType::f16: return low_rank_rows<FP16>(pass, begin, end);
    }
}

// ---- conversions of small factors -----------------------------------------------------------------------------

template <class T> static void widen_all(const T* in, float* out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) out[i] = widen(in[i]);
}
template <class T> static void round_all(float* values, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        T t;
        narrow_to(t, values[i]);
        values[i] = widen(t);
    }
}

static void to_float(DType from, const void* in, float* out, int64_t count) {
    switch (from) {
        case DType::f32: return widen_all((const float*)in, out, count);
        case DType::bf16: return widen_all((const BF16*)in, out, count);
        case DType::f16: return widen_all((const FP16*)in, out, count);
    }
}

static void round_to(DType to, float* values, int64_t count) {
    if (to == DType::bf16) round_all<BF16>(values, count);
    if (to == DType::f16) round_all<FP16>(values, count);
}

// ---- the transform alone, for its own tests and error sweep --------------------------------------------------

static void transform(const uint32_t* a, const uint32_t* b, float* even, float* odd, int64_t count) {
    for (int64_t i = 0; i < count; i += V::N) {
        uint32_t wa[V::N] = {}, wb[V::N] = {};
        float ze[V::N], zo[V::N];
        const int64_t n = count - i < V::N ? count - i : V::N;
        for (int64_t k = 0; k < n; ++k) wa[k] = a[i + k], wb[k] = b[i + k];
        V::U ua, ub;
        __builtin_memcpy(&ua, wa, sizeof wa), __builtin_memcpy(&ub, wb, sizeof wb);
        V::F fe, fo;
        box_muller<V>(ua, ub, fe, fo);
        V::store(ze, fe), V::store(zo, fo);
        for (int64_t k = 0; k < n; ++k) even[i + k] = ze[k], odd[i + k] = zo[k];
    }
}
