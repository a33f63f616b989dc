// Kernel bodies, written once over the vector type V that the including isa_*.cpp defines.

using V2 = Twice<V>;

// ---- element noise ------------------------------------------------------------------------------------------

// Where a pass stands within one group of logical elements. Indices of elements are relative to the group.
struct Group {
    int64_t number;
    int64_t row, row_end, start;     // rows of the piece that reach into it; index of the first one's first element
    int64_t first, last;             // all that is covered lies in first .. last
    int64_t block_begin, block_end;  // blocks of counters needed, multiples of V2::N
    const char* run;                 // if the group is one run of weights: where it lies, to be fetched meanwhile
    int64_t run_bytes;
};

// False if no row of the piece reaches into the group.
template <class T> static bool enter_group(const Piece& p, int64_t number, Group& g) {
    const int64_t e0 = number * kGroup, behind = e0 - p.base - p.cols;
    const int64_t row = behind < 0 ? 0 : behind / p.row_stride + 1, start = p.base + row * p.row_stride - e0;
    int64_t row_end = row;
    for (int64_t s = start; row_end < p.rows && s < kGroup; s += p.row_stride) ++row_end;
    if (row_end == row) return false;
    const int64_t tail = start + (row_end - 1 - row) * p.row_stride + p.cols;
    const int64_t first = start > 0 ? start : 0, last = tail < kGroup ? tail : kGroup;
    g = {number, row, row_end, start, first, last, 0, kBlocks, nullptr, 0};
    if (first / kBlocks == (last - 1) / kBlocks) {
        g.block_begin = first % kBlocks / V2::N * V2::N;
        g.block_end = ((last - 1) % kBlocks / V2::N + 1) * V2::N;
    } else if (row_end - row == 1 && last - first == kGroup && p.in) {
        g.run = (const char*)((const T*)p.in + row * p.ld_in - start);
        g.run_bytes = kGroup * int64_t(sizeof(T));
    }
    return true;
}

// f(row, column, lo, n): elements lo .. lo + n of the group are those of a row from a column on.
template <class F> static void each_row(const Piece& p, const Group& g, F f) {
    int64_t start = g.start;
    for (int64_t row = g.row; row < g.row_end; ++row, start += p.row_stride) {
        const int64_t lo = start > 0 ? start : 0, hi = start + p.cols < kGroup ? start + p.cols : kGroup;
        f(row, lo - start, lo, hi - lo);
    }
}

static Philox7 philox_of(const Group& g, uint32_t tensor_id, uint64_t key) {
    return Philox7(uint32_t(uint64_t(g.number) >> 22), tensor_id, key);
}
static uint32_t block_of(const Group& g) { return uint32_t(uint64_t(g.number) << 10); }

// delta = a z  (first draw)   or   delta = fma(a, z, delta)
template <bool FIRST> static void add_normal(float* delta, const Group& g, uint32_t tensor_id, uint64_t key,
                                             float coefficient) {
    const Philox7 philox = philox_of(g, tensor_id, key);
    const uint32_t block = block_of(g);
    const V2::F a = V2::set(coefficient);
    const char* ahead = g.run;
    const int64_t step = FIRST && g.run ? g.run_bytes * V2::N / kBlocks : 0;
    for (int64_t r = g.block_begin; r < g.block_end; r += V2::N, ahead += step) {
        for (int64_t b = 0; b < step; b += 64) V::prefetch(ahead + b);
        V2::U x[4];
        V2::F z[4];
        philox.words<V2>(block + uint32_t(r), x);
        box_muller<V2>(x[0], x[1], z[0], z[1]);
        box_muller<V2>(x[2], x[3], z[2], z[3]);
        for (int lane = 0; lane < 4; ++lane) {
            float* d = delta + lane * kBlocks + r;
            V2::store(d, FIRST ? V2::mul(a, z[lane]) : V2::fma(a, z[lane], V2::load(d)));
        }
    }
}

// Signs of the group's 4096 elements: 128 consecutive words, all in one output lane.
struct Signs {
    int64_t first, block;
    Philox7 philox;
    Signs(const Group& g, uint32_t tensor_id, uint64_t key)
        : first(g.number * (kGroup / 32)), block((first >> 12 << 10) | (first & 1023)),
          philox(uint32_t(uint64_t(block) >> 32), tensor_id, key) {}
    void words(int from, uint32_t (&to)[V::N]) const {
        V::U x[4];
        philox.words<V>(uint32_t(block) + uint32_t(from), x);
        V::storeu(to, x[(first >> 10) & 3]);
    }
};

template <bool FIRST> static void add_rademacher(float* delta, const Group& g, uint32_t tensor_id, uint64_t key,
                                                 float coefficient) {
    const Signs signs(g, tensor_id, key);
    const V::F a = V::set(coefficient);
    const V::U minus = V::setu(0x80000000u);
    const char* ahead = g.run;
    const int64_t step = g.run ? g.run_bytes * V::N / 128 : 0;
    for (int i = 0; i < 128; i += V::N) {
        for (int64_t b = 0; FIRST && b < step; b += 64) V::prefetch(ahead + b);
        ahead += step;
        uint32_t words[V::N];
        signs.words(i, words);
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

template <bool FIRST> static void add_draw(float* delta, const Group& g, Distribution distribution, uint32_t tensor_id,
                                           uint64_t key, float a) {
    if (distribution == Distribution::rademacher) add_rademacher<FIRST>(delta, g, tensor_id, key, a);
    else add_normal<FIRST>(delta, g, tensor_id, key, a);
}

// delta = sum_j a_j z(key_j) over the draws begin .. end
static void combine(float* delta, const Group& g, const Draws& draws, int64_t begin, int64_t end, const Piece& p) {
    if (begin == end)
        for (int64_t i = g.first; i < g.last; ++i) delta[i] = 0.0f;
    for (int64_t j = begin; j < end; ++j) {
        const float a = draws.coefficients[j * draws.columns + p.scalar];
        if (j == begin) add_draw<true>(delta, g, draws.distribution, p.tensor_id, draws.keys[j], a);
        else add_draw<false>(delta, g, draws.distribution, p.tensor_id, draws.keys[j], a);
    }
}

// The word of each element under a key: of stochastic rounding, or of a random mask.
static void element_words(uint32_t* words, const Group& g, uint32_t tensor_id, uint64_t key) {
    const Philox7 philox = philox_of(g, tensor_id, key);
    for (int64_t r = g.block_begin; r < g.block_end; r += V::N) {
        V::U x[4];
        philox.words<V>(block_of(g) + uint32_t(r), x);
        for (int lane = 0; lane < 4; ++lane) V::storeu(words + lane * kBlocks + r, x[lane]);
    }
}

// ---- acc = W + fma(-d, W, delta), rounded once --------------------------------------------------------------

template <class X, bool STREAM, class T> static int64_t apply_lanes(T* out, const T* in, const float* delta, int64_t i,
                                                                    int64_t n, float decay) {
    const typename X::F d = X::set(decay);
    for (; i + X::N <= n; i += X::N) {
        typename X::F acc = X::load(delta + i);
        if (in) {
            const typename X::F w = X::load(in + i);
            if (decay != 0.0f) acc = X::fnma(d, w, acc);
            acc = X::add(w, acc);
        }
        if (STREAM) X::stream(out + i, acc);
        else X::store(out + i, acc);
    }
    return i;
}

template <class T> static void apply_nearest(T* out, const T* in, const float* delta, int64_t n, float decay,
                                             bool stream = false) {
    const bool aligned = (uintptr_t)out % (V::N * sizeof(T)) == 0;
    const int64_t done = stream && aligned ? apply_lanes<V, true>(out, in, delta, 0, n, decay)
                                           : apply_lanes<V, false>(out, in, delta, 0, n, decay);
    apply_lanes<Generic<1>, false>(out, in, delta, done, n, decay);
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

// The same for a vector, if all of it is away from zero and infinity: adding what the fraction may lack carries.
static inline bool round_lanes(float* out, V::F acc, V::U) { return V::store(out, acc), true; }
static inline bool round_lanes(BF16* out, V::F acc, V::U words) {
    const V::U b = V::as_u(acc), lack = V::template shr<16>(V::xoru(words, V::setu(~0u)));
    if (!V::within(V::andu(b, V::setu(0x7fffffffu)), 0, 0x7f7f0000u)) return false;
    V::store16(out, V::template shr<16>(V::addu(b, lack)));
    return true;
}
static inline bool round_lanes(FP16* out, V::F acc, V::U words) {
    const V::U b = V::as_u(acc), a = V::andu(b, V::setu(0x7fffffffu));
    if (!V::within(a, 0x38800000u, 0x477fe000u)) return false;
    const V::U lack = V::template shr<19>(V::xoru(words, V::setu(~0u))), sign = V::template shr<16>(V::xoru(a, b));
    V::store16(out, V::oru(sign, V::template shr<13>(V::addu(V::addu(a, V::setu(0u - 0x38000000u)), lack))));
    return true;
}

template <class T> static void apply_stochastic(T* out, const T* in, const float* delta, const uint32_t* words,
                                                int64_t n, float decay) {
    const V::F d = V::set(decay);
    for (int64_t i = 0; i < n; i += V::N) {
        if (i + V::N <= n) {
            V::F acc = V::load(delta + i);
            if (in) {
                const V::F w = V::load(in + i);
                acc = V::add(w, decay != 0.0f ? V::fnma(d, w, acc) : acc);
            }
            if (round_lanes(out + i, acc, V::loadu(words + i))) continue;
        }
        for (int64_t k = i; k < n && k < i + V::N; ++k) {
            float acc = delta[k];
            if (in) {
                const float w = widen(in[k]);
                acc = w + (decay != 0.0f ? __builtin_fmaf(-decay, w, acc) : acc);
            }
            round_stochastic(out[k], acc, words[k]);
        }
    }
}

// Words or nullptr, for rounding to nearest.
template <class T> static void apply(T* out, const T* in, const float* delta, const uint32_t* words, int64_t n,
                                     float decay, bool stream = false) {
    if (words) apply_stochastic(out, in, delta, words, n, decay);
    else apply_nearest(out, in, delta, n, decay, stream);
}

// f(0 of the C++ type that holds a dtype)
template <class F> static void with_type(DType dtype, F f) {
    switch (dtype) {
        case DType::f32: return f(float());
        case DType::bf16: return f(BF16());
        case DType::f16: return f(FP16());
    }
}

// ---- dense: W <- W - d W + sum_j a_j z(key_j), stage by stage ------------------------------------------------

// One draw of signs over a whole group costs less than a buffer for it.
template <class T> static void add_signs(const DensePass& pass, const Piece& p, const Group& g) {
    const Signs signs(g, p.tensor_id, pass.draws.keys[0]);
    const V::U a = V::as_u(V::set(-pass.draws.coefficients[p.scalar]));
    const float decay = pass.decay[p.scalar];
    const V::F d = V::set(decay);
    const T* in = (const T*)g.run;
    T* out = (T*)p.out + g.row * p.ld_out - g.start;
    for (int i = 0; i < 128; i += V::N) {
        uint32_t words[V::N];
        signs.words(i, words);
        for (int k = 0; k < V::N; ++k)
            for (int bit = 0; bit < 32; bit += V::N, in += V::N, out += V::N) {
                const V::F delta = V::as_f(V::xoru(V::lane_bits(words[k], bit), a)), w = V::load(in);
                V::store(out, V::add(w, decay != 0.0f ? V::fnma(d, w, delta) : delta));
            }
    }
}

template <class T> static void dense_groups(const DensePass& pass, const Piece& p, int64_t begin, int64_t end) {
    alignas(64) float delta[kGroup];
    alignas(64) uint32_t words[kGroup];
    const bool stochastic = pass.rounding_keys && sizeof(T) == 2;
    const bool signs = pass.draws.distribution == Distribution::rademacher && pass.draws.count == 1 &&
                       pass.stages == 1 && pass.draws_per_stage[0] == 1 && !stochastic;
    for (int64_t number = begin; number < end; ++number) {
        Group g;
        if (!enter_group<T>(p, number, g)) continue;
        if (signs && g.run) {
            add_signs<T>(pass, p, g);
            continue;
        }
        int64_t draw = 0;
        for (int64_t stage = 0; stage < pass.stages; ++stage) {
            combine(delta, g, pass.draws, draw, draw + pass.draws_per_stage[stage], p);
            draw += pass.draws_per_stage[stage];
            if (stochastic) element_words(words, g, p.tensor_id, pass.rounding_keys[stage]);
            const float decay = pass.decay[stage * pass.draws.columns + p.scalar];
            const T* source = (const T*)(stage == 0 ? p.in : p.out);
            const int64_t ld_source = stage == 0 ? p.ld_in : p.ld_out;
            each_row(p, g, [&](int64_t row, int64_t column, int64_t lo, int64_t n) {
                T* out = (T*)p.out + row * p.ld_out + column;
                const T* in = source ? source + row * ld_source + column : nullptr;
                apply(out, in, delta + lo, stochastic ? words + lo : nullptr, n, decay, p.stream && pass.stages == 1);
            });
        }
    }
    if (p.stream) V::fence();
}

static void dense(const DensePass& pass, const Piece& piece, int64_t begin, int64_t end) {
    with_type(pass.dtype, [&](auto t) { dense_groups<decltype(t)>(pass, piece, begin, end); });
}

// ---- conversions ----------------------------------------------------------------------------------------------

template <class T> static void widen_all(const T* in, float* out, int64_t count) {
    int64_t i = 0;
    for (; i + V::N <= count; i += V::N) V::store(out + i, V::load(in + i));
    for (; i < count; ++i) out[i] = widen(in[i]);
}
template <class T> static void round_all(float* values, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        T t;
        narrow_to(t, values[i]);
        values[i] = widen(t);
    }
}

static void to_float(DType from, const void* in, float* out, int64_t count) {
    with_type(from, [&](auto t) { widen_all((const decltype(t)*)in, out, count); });
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
