// The noise of a group: delta = sum_j a_j z(key_j), and the random words of its elements.
//
//   delta = a_1 z_1,  then  delta = fma(a_j, z_j, delta)  for j = 2 ..
//
//   normal      element e is output lane (e >> 10) & 3 of counter (e >> 12 << 10) | (e & 1023), see noise.h
//   rademacher  element e is bit e & 31 of word w = e >> 5, whose counter and lane follow from w as above from e

static Philox7 group_philox(const Group& g, uint32_t tensor_id, uint64_t key) {
    return Philox7(uint32_t(uint64_t(g.index) >> 22), tensor_id, key);
}
static uint32_t first_counter(const Group& g) { return uint32_t(uint64_t(g.index) << 10); }

// FIRST: delta = a z, else delta = fma(a, z, delta).
template <bool FIRST> static void add_normal(float* delta, const Group& g, uint32_t tensor_id, uint64_t key,
                                             float coefficient) {
    const Philox7 philox = group_philox(g, tensor_id, key);
    const uint32_t counter = first_counter(g);
    const V2::F a = V2::set(coefficient);
    // Memory is idle while noise is drawn, so the first draw prefetches the group's weights.
    const char* fetch = g.whole;
    const int64_t fetch_step = FIRST && g.whole ? g.whole_bytes * V2::N / kBlocks : 0;
    for (int64_t r = g.block_begin; r < g.block_end; r += V2::N, fetch += fetch_step) {
        for (int64_t b = 0; b < fetch_step; b += 64) V::prefetch(fetch + b);
        V2::U x[4];
        V2::F z[4];
        philox.words<V2>(counter + uint32_t(r), x);
        box_muller<V2>(x[0], x[1], z[0], z[1]);
        box_muller<V2>(x[2], x[3], z[2], z[3]);
        for (int lane = 0; lane < 4; ++lane) {
            float* d = delta + lane * kBlocks + r;
            V2::store(d, FIRST ? V2::mul(a, z[lane]) : V2::fma(a, z[lane], V2::load(d)));
        }
    }
}

// The signs of a group's 4096 elements: 128 consecutive words, which all lie in one output lane.
struct SignWords {
    int64_t first, block;
    Philox7 philox;
    SignWords(const Group& g, uint32_t tensor_id, uint64_t key)
        : first(g.index * (kGroup / 32)), block((first >> 12 << 10) | (first & 1023)),
          philox(uint32_t(uint64_t(block) >> 32), tensor_id, key) {}
    void get(int from, uint32_t (&words)[V::N]) const {
        V::U x[4];
        philox.words<V>(uint32_t(block) + uint32_t(from), x);
        V::storeu(words, x[(first >> 10) & 3]);
    }
};

template <bool FIRST> static void add_rademacher(float* delta, const Group& g, uint32_t tensor_id, uint64_t key,
                                                 float coefficient) {
    const SignWords signs(g, tensor_id, key);
    const V::F a = V::set(coefficient);
    const V::U sign_bit = V::setu(0x80000000u);  // a random bit of 1 means +1, of 0 means -1
    const char* fetch = g.whole;
    const int64_t fetch_step = g.whole ? g.whole_bytes * V::N / 128 : 0;
    for (int i = 0; i < 128; i += V::N) {
        for (int64_t b = 0; FIRST && b < fetch_step; b += 64) V::prefetch(fetch + b);
        fetch += fetch_step;
        uint32_t words[V::N];
        signs.get(i, words);
        for (int k = 0; k < V::N; ++k) {
            float* d = delta + (i + k) * 32;
            for (int bit = 0; bit < 32; bit += V::N, d += V::N) {
                const V::U negative = V::xoru(V::lane_bits(words[k], bit), sign_bit);
                if (FIRST) V::store(d, V::as_f(V::xoru(negative, V::as_u(a))));
                else V::store(d, V::fma(a, V::as_f(V::oru(negative, V::setu(0x3f800000u))), V::load(d)));
            }
        }
    }
}

template <bool FIRST> static void add_draw(float* delta, const Group& g, Distribution distribution, uint32_t tensor_id,
                                           uint64_t key, float a) {
    if (distribution == Distribution::rademacher) add_rademacher<FIRST>(delta, g, tensor_id, key, a);
    else add_normal<FIRST>(delta, g, tensor_id, key, a);
}

// delta = the sum of draws begin .. end - 1, or 0 if there are none.
static void sum_draws(float* delta, const Group& g, const Draws& draws, int64_t begin, int64_t end, const Piece& p) {
    if (begin == end)
        for (int64_t i = g.first; i < g.last; ++i) delta[i] = 0.0f;
    for (int64_t j = begin; j < end; ++j) {
        const float a = draws.coefficients[j * draws.columns + p.column];
        if (j == begin) add_draw<true>(delta, g, draws.distribution, p.tensor_id, draws.keys[j], a);
        else add_draw<false>(delta, g, draws.distribution, p.tensor_id, draws.keys[j], a);
    }
}

// The random word of each element under a key, for stochastic rounding or a random mask.
static void element_words(uint32_t* words, const Group& g, uint32_t tensor_id, uint64_t key) {
    const Philox7 philox = group_philox(g, tensor_id, key);
    for (int64_t r = g.block_begin; r < g.block_end; r += V::N) {
        V::U x[4];
        philox.words<V>(first_counter(g) + uint32_t(r), x);
        for (int lane = 0; lane < 4; ++lane) V::storeu(words + lane * kBlocks + r, x[lane]);
    }
}
