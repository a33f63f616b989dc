// Passes with a rule of their own over the noise of a group: masks, preconditioned updates, anchors, sums.
// Included after kernels.inl. Rules are scalar loops in the reference's order of operations; fma only where written.

// ---- masked: delta = sum_j a_j z_j where kept, -0 elsewhere; W <- W - d W + delta ---------------------------------

// d = d where the bit of an element is set, else -0; element i has bit number `at` + i
static void keep_bits(float* d, const uint32_t* bits, int64_t at, int64_t n) {
    const V::U minus = V::setu(0x80000000u), all = V::setu(~0u);
    int64_t i = 0;
    for (; i + 32 <= n; i += 32, at += 32) {
        const int shift = int(at & 31);
        const uint32_t* from = bits + (at >> 5);
        const uint32_t word = shift ? from[0] >> shift | from[1] << (32 - shift) : from[0];
        for (int bit = 0; bit < 32; bit += V::N) {
            const V::U drop = V::addu(V::shr<31>(V::lane_bits(word, bit)), all), keep = V::xoru(drop, all);
            const V::U kept = V::andu(V::as_u(V::load(d + i + bit)), keep);
            V::store(d + i + bit, V::as_f(V::oru(kept, V::andu(drop, minus))));
        }
    }
    for (; i < n; ++i, ++at)
        if (!(bits[at >> 5] >> (at & 31) & 1u)) d[i] = -0.0f;
}

template <class T> static void masked_groups(const MaskedPass& pass, const Piece& p, int64_t begin, int64_t end) {
    alignas(64) float delta[kGroup];
    alignas(64) uint32_t words[kGroup], mask_words[kGroup];
    const bool stochastic = pass.rounding_key && sizeof(T) == 2;
    const float threshold = pass.threshold[p.scalar], decay = pass.decay[p.scalar];
    for (int64_t number = begin; number < end; ++number) {
        Group g;
        if (!enter_group<T>(p, number, g)) continue;
        combine(delta, g, pass.draws, 0, pass.draws.count, p);
        if (pass.mask == Mask::share) element_words(mask_words, g, p.tensor_id, pass.mask_key);
        if (stochastic) element_words(words, g, p.tensor_id, *pass.rounding_key);
        each_row(p, g, [&](int64_t row, int64_t column, int64_t lo, int64_t n) {
            const T* in = (const T*)p.in + row * p.ld_in + column;
            float* d = delta + lo;
            switch (pass.mask) {
                case Mask::threshold:
                    for (int64_t i = 0; i < n; ++i) d[i] = __builtin_fabsf(widen(in[i])) <= threshold ? d[i] : -0.0f;
                    break;
                case Mask::share:
                    for (int64_t i = 0; i < n; ++i) d[i] = mask_words[lo + i] < pass.word_limit ? d[i] : -0.0f;
                    break;
                case Mask::bits:
                    keep_bits(d, p.bits, p.element + row * p.cols + column, n);
                    break;
            }
            apply((T*)p.out + row * p.ld_out + column, in, d, stochastic ? words + lo : nullptr, n, decay);
        });
    }
}

static void masked(const MaskedPass& pass, const Piece& piece, int64_t begin, int64_t end) {
    with_type(pass.dtype, [&](auto t) { masked_groups<decltype(t)>(pass, piece, begin, end); });
}

// ---- preconditioned: g = sum_j c_j z_j, b = sum_j r_j z_j; a rule; W <- W - d W + delta ---------------------------

// A run of n elements: delta holds b and takes the rule's delta; g, and z of the last draw; states; scalars.
struct RuleRun {
    int64_t n;
    float* __restrict delta;
    const float *g, *z;
    float *__restrict first, *__restrict second;
    const float* s;
};

static inline float fma1(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
static inline float root(float a) { return __builtin_sqrtf(a); }

// delta = b / sqrt(H)
static void rule_perturb(const RuleRun& r) {
    for (int64_t i = 0; i < r.n; ++i) r.delta[i] = r.delta[i] / root(r.first[i]);
}

// m = fma(beta, m, g);  delta = fma(-lr, m, b)
static void rule_momentum(const RuleRun& r) {
    const float lr = r.s[0], beta = r.s[1];
    for (int64_t i = 0; i < r.n; ++i) {
        const float m = r.first[i] = fma1(beta, r.first[i], r.g[i]);
        r.delta[i] = fma1(-lr, m, r.delta[i]);
    }
}

// m = fma(beta1, m, rest1 g);  v = fma(beta2, v, rest2 g^2);  delta = fma(-lr, m / (sqrt(v correction) + eps), b)
static void rule_adam(const RuleRun& r) {
    const float lr = r.s[0], beta1 = r.s[1], rest1 = r.s[2], beta2 = r.s[3], rest2 = r.s[4], correction = r.s[5],
                eps = r.s[6];
    for (int64_t i = 0; i < r.n; ++i) {
        const float g = r.g[i];
        const float m = r.first[i] = fma1(beta1, r.first[i], rest1 * g);
        const float v = r.second[i] = fma1(beta2, r.second[i], rest2 * (g * g));
        r.delta[i] = fma1(-lr, m / (root(v * correction) + eps), r.delta[i]);
    }
}

// H' = fma(growth H, z^2, rest H);  delta = fma(-lr, g / sqrt(H'), b / sqrt(H))
static void rule_hizoo(const RuleRun& r) {
    const float lr = r.s[0], rest = r.s[1], growth = r.s[2];
    for (int64_t i = 0; i < r.n; ++i) {
        const float h = r.first[i], z = r.z[i];
        const float updated = r.first[i] = fma1(growth * h, z * z, rest * h);
        r.delta[i] = fma1(-lr, r.g[i] / root(updated), r.delta[i] / root(h));
    }
}

// m = fma(beta1, m, anneal g);  h = fma(beta2, h, rest2 g^2) if REFRESH
// delta = fma(-lr, m / fma(gamma, max(h, floor), eps), b)
template <bool REFRESH> static void rule_helene(const RuleRun& r) {
    const float lr = r.s[0], beta1 = r.s[1], anneal = r.s[2], gamma = r.s[3], floor = r.s[4], eps = r.s[5],
                beta2 = r.s[6], rest2 = r.s[7];
    for (int64_t i = 0; i < r.n; ++i) {
        const float g = r.g[i];
        const float m = r.first[i] = fma1(beta1, r.first[i], anneal * g);
        if (REFRESH) r.second[i] = fma1(beta2, r.second[i], rest2 * (g * g));
        const float h = r.second[i];
        r.delta[i] = fma1(-lr, m / fma1(gamma, h > floor ? h : floor, eps), r.delta[i]);
    }
}

static void apply_rule(Rule rule, const RuleRun& run) {
    switch (rule) {
        case Rule::perturb: return rule_perturb(run);
        case Rule::momentum: return rule_momentum(run);
        case Rule::adam: return rule_adam(run);
        case Rule::hizoo: return rule_hizoo(run);
        case Rule::helene: return rule_helene<false>(run);
        case Rule::helene_refresh: return rule_helene<true>(run);
    }
}

// Both sums from each z, which is drawn once.
static void both_sums(float* g, float* b, float* z, const Group& group, const PreconditionedPass& pass,
                      const Piece& p) {
    for (int64_t j = 0; j < pass.draws.count; ++j) {
        add_draw<true>(z, group, pass.draws.distribution, p.tensor_id, pass.draws.keys[j], 1.0f);
        const int64_t at = j * pass.draws.columns + p.scalar;
        const float c = pass.draws.coefficients[at], r = pass.restore[at];
        for (int64_t i = group.first; i < group.last; ++i) {
            g[i] = j ? fma1(c, z[i], g[i]) : c * z[i];
            b[i] = j ? fma1(r, z[i], b[i]) : r * z[i];
        }
    }
}

static float* state_at(const Companion& c, int64_t row, int64_t column) {
    return c.data ? (float*)c.data + row * c.ld + column : nullptr;
}

template <class T> static void preconditioned_groups(const PreconditionedPass& pass, const Piece& p, int64_t begin,
                                                     int64_t end) {
    alignas(64) float delta[kGroup], g[kGroup], z[kGroup];
    alignas(64) uint32_t words[kGroup];
    const bool stochastic = pass.rounding_key && sizeof(T) == 2;
    const float decay = pass.decay[p.scalar];
    float scalars[kMaxScalars] = {};
    for (int64_t k = 0; k < pass.scalar_rows; ++k) scalars[k] = pass.scalars[k * pass.draws.columns + p.scalar];
    for (int64_t number = begin; number < end; ++number) {
        Group group;
        if (!enter_group<T>(p, number, group)) continue;
        both_sums(g, delta, z, group, pass, p);
        if (stochastic) element_words(words, group, p.tensor_id, *pass.rounding_key);
        each_row(p, group, [&](int64_t row, int64_t column, int64_t lo, int64_t n) {
            apply_rule(pass.rule, {n, delta + lo, g + lo, z + lo, state_at(p.first, row, column),
                                   state_at(p.second, row, column), scalars});
            apply((T*)p.out + row * p.ld_out + column, (const T*)p.in + row * p.ld_in + column, delta + lo,
                  stochastic ? words + lo : nullptr, n, decay);
        });
    }
}

static void preconditioned(const PreconditionedPass& pass, const Piece& piece, int64_t begin, int64_t end) {
    with_type(pass.dtype, [&](auto t) { preconditioned_groups<decltype(t)>(pass, piece, begin, end); });
}

// ---- affine: W <- fma(c, X, W0), X = Delta where given, else W - W0 -----------------------------------------------

// f(its row from a column on, as float32 or as the weights' T, which is all that attach() lets in); null without one
template <class T, class F> static void with_row(const Companion& c, int64_t row, int64_t column, F f) {
    const int64_t at = row * c.ld + column;
    if (!c.data) f((const T*)nullptr);
    else if (c.dtype == DType::f32) f((const float*)c.data + at);
    else f((const T*)c.data + at);
}

// out = fma(c, x - origin, origin), or with x the difference itself
template <class X, class T, class A, class B>
static int64_t affine_lanes(T* out, const A* origin, const B* x, bool difference, float c, int64_t i, int64_t n) {
    const typename X::F factor = X::set(c);
    for (; i + X::N <= n; i += X::N) {
        const typename X::F o = X::load(origin + i), value = X::load(x + i);
        X::store(out + i, X::fma(factor, difference ? value : X::sub(value, o), o));
    }
    return i;
}
template <class T, class A, class B>
static void affine_row(T* out, const A* origin, const B* x, bool difference, float c, int64_t n) {
    affine_lanes<Generic<1>>(out, origin, x, difference, c, affine_lanes<V>(out, origin, x, difference, c, 0, n), n);
}

template <class T> static void affine_groups(const AffinePass& pass, const Piece& p, int64_t begin, int64_t end) {
    alignas(64) float acc[kGroup];
    alignas(64) uint32_t words[kGroup];
    const bool stochastic = pass.rounding_key && sizeof(T) == 2, difference = p.second.data;
    const Companion from = difference ? p.second : Companion{const_cast<void*>(p.in), p.ld_in, pass.dtype};
    const float c = pass.coefficient[p.scalar];
    for (int64_t number = begin; number < end; ++number) {
        Group g;
        if (!enter_group<T>(p, number, g)) continue;
        if (stochastic) element_words(words, g, p.tensor_id, *pass.rounding_key);
        each_row(p, g, [&](int64_t row, int64_t column, int64_t lo, int64_t n) {
            T* const out = (T*)p.out + row * p.ld_out + column;
            with_row<T>(p.first, row, column, [&](auto* origin) {
                with_row<T>(from, row, column, [&](auto* x) {
                    if (!stochastic) return affine_row(out, origin, x, difference, c, n);
                    affine_row(acc, origin, x, difference, c, n);
                    apply_stochastic(out, (const T*)nullptr, acc, words + lo, n, 0.0f);
                });
            });
        });
    }
}

static void affine(const AffinePass& pass, const Piece& piece, int64_t begin, int64_t end) {
    with_type(pass.dtype, [&](auto t) { affine_groups<decltype(t)>(pass, piece, begin, end); });
}

// ---- reduce: sum x z with a key, sum x^2 without; x = T, or T - T0 in float32 -------------------------------------

// Products are exact in float64 and summed by columns of a row's 16 in index order, the columns then in theirs: neither
// threads nor instruction sets matter.
constexpr int kColumns = 16;

template <class T, class A>
static void add_products(double (&sums)[kColumns], const T* in, const A* origin, const float* z, int64_t n) {
    constexpr int kVectors = kColumns / V::N;
    V::D acc[kVectors];
    for (int v = 0; v < kVectors; ++v) acc[v] = V::load(sums + v * V::N);
    int64_t i = 0;
    for (; i + kColumns <= n; i += kColumns)
        for (int v = 0; v < kVectors; ++v) {
            const int64_t at = i + v * V::N;
            V::F x = V::load(in + at);
            if (origin) x = V::sub(x, V::load(origin + at));
            acc[v] = V::add_product(x, z ? V::load(z + at) : x, acc[v]);
        }
    for (int v = 0; v < kVectors; ++v) V::store(sums + v * V::N, acc[v]);
    for (int k = 0; i < n; ++i, ++k) {
        const float x = origin ? widen(in[i]) - widen(origin[i]) : widen(in[i]);
        sums[k] += double(x) * double(z ? z[i] : x);
    }
}

template <class T> static void reduce_groups(const ReducePass& pass, const Piece& p, int64_t begin, int64_t end,
                                             double* partials) {
    alignas(64) float z[kGroup];
    for (int64_t number = begin; number < end; ++number) {
        double sums[kColumns] = {}, sum = 0;
        Group g;
        if (enter_group<T>(p, number, g)) {
            if (pass.key) add_draw<true>(z, g, pass.distribution, p.tensor_id, *pass.key, 1.0f);
            each_row(p, g, [&](int64_t row, int64_t column, int64_t lo, int64_t n) {
                const T* in = (const T*)p.in + row * p.ld_in + column;
                with_row<T>(p.first, row, column,
                            [&](auto* origin) { add_products(sums, in, origin, pass.key ? z + lo : nullptr, n); });
            });
        }
        for (const double part : sums) sum += part;
        *partials++ = sum;
    }
}

static void reduce(const ReducePass& pass, const Piece& piece, int64_t begin, int64_t end, double* partials) {
    with_type(pass.dtype, [&](auto t) { reduce_groups<decltype(t)>(pass, piece, begin, end, partials); });
}
