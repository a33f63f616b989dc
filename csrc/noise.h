// The noise contract, version 1, over a vector type V (vec.h); docs/noise_v1.md is its text.
//
//   words(block)  = Philox4x32-7 of counter (block lo, block hi, tensor id, 0) under a 64-bit key
//   normal        = Box-Muller: sqrt(-2 ln u) * (cos, sin)(angle), from the pairs (x0, x1) and (x2, x3)
//   element e     -> group e >> 12, output lane (e >> 10) & 3, block (group << 10) | (e & 1023)

constexpr int kGroup = 4096;   // elements of a group,
constexpr int kBlocks = 1024;  // which are the 4 output lanes of this many consecutive counters

// Within a group only the lowest counter word varies, so that most of the first two rounds is the same for all of it:
// the constructor computes that part once, in scalars.
struct Philox7 {
    static constexpr uint32_t M0 = 0xD2511F53u, M1 = 0xCD9E8D57u, W0 = 0x9E3779B9u, W1 = 0xBB67AE85u;
    uint32_t k1_round1, x1k0_round2, p0k1_round2, x3k1_round3, k0[8], k1[8];

    Philox7() = default;
    Philox7(uint32_t c1, uint32_t tensor_id, uint64_t key) {
        for (int i = 0; i < 7; ++i) {
            k0[i] = uint32_t(key) + uint32_t(i) * W0;
            k1[i] = uint32_t(key >> 32) + uint32_t(i) * W1;
        }
        const uint64_t p1 = uint64_t(M1) * tensor_id;
        const uint64_t p0 = uint64_t(M0) * (uint32_t(p1 >> 32) ^ c1 ^ k0[0]);
        k1_round1 = k1[0];
        x1k0_round2 = uint32_t(p1) ^ k0[1];
        p0k1_round2 = uint32_t(p0 >> 32) ^ k1[1];
        x3k1_round3 = uint32_t(p0) ^ k1[2];
    }

    // The four output words of counters c0 .. c0+N-1, in order.
    template <class V> inline __attribute__((always_inline)) void words(uint32_t c0, typename V::U out[4]) const {
        using W = typename V::W;
        const W m0 = V::setw(M0), m1 = V::setw(M1);
        W p0 = V::mulw(V::counters(c0), m0);
        W x3 = p0;
        W p1 = V::mulw(V::xorw(V::high(p0), V::setw(k1_round1)), m1);
        W x0 = V::xorw(V::high(p1), V::setw(x1k0_round2)), x1 = p1;
        W x2 = V::xorw(x3, V::setw(p0k1_round2));
        p0 = V::mulw(x0, m0);
        p1 = V::mulw(x2, m1);
        x0 = V::xor3(V::high(p1), x1, V::setw(k0[2])), x1 = p1;
        x2 = V::xorw(V::high(p0), V::setw(x3k1_round3)), x3 = p0;
        for (int i = 3; i < 7; ++i) {
            p0 = V::mulw(x0, m0);
            p1 = V::mulw(x2, m1);
            x0 = V::xor3(V::high(p1), x1, V::setw(k0[i])), x1 = p1;
            x2 = V::xor3(V::high(p0), x3, V::setw(k1[i])), x3 = p0;
        }
        out[0] = V::narrow(x0), out[1] = V::narrow(x1), out[2] = V::narrow(x2), out[3] = V::narrow(x3);
    }
};

// Two words -> two normals. The coefficients and the order of operations are those of docs/noise_v1.md, to the bit.
template <class V> inline __attribute__((always_inline))
void box_muller(typename V::U a, typename V::U b, typename V::F& z_even, typename V::F& z_odd) {
    using F = typename V::F;
    using U = typename V::U;
    const U one = V::setu(0x3f800000u), fraction = V::setu(0x007fffffu);
    // u = (a >> 9) 2^-23 + 2^-24;  -2 ln u = i c + (1/4 - s^2) H(s),  i = bits(u) - bits(1),  s = mantissa - 3/2
    const F u = V::add(V::as_f(V::oru(V::template shr<9>(a), one)), V::set(-0x1.fffffep-1f));
    const U ub = V::as_u(u);
    const F i = V::from_int(V::addu(ub, V::setu(0u - 0x3f800000u)));
    const F s = V::add(V::as_f(V::oru(V::andu(ub, fraction), one)), V::set(-1.5f));
    F h = V::fma(V::set(bits_to_float(0x3c965f6du)), s, V::set(bits_to_float(0xbd0f9754u)));
    h = V::fma(h, s, V::set(bits_to_float(0x3d6b8b4du)));
    h = V::fma(h, s, V::set(bits_to_float(0xbdda36ffu)));
    h = V::fma(h, s, V::set(bits_to_float(0x3e58ea59u)));
    h = V::fma(h, s, V::set(bits_to_float(0xbef13875u)));
    const F square = V::fma(i, V::set(bits_to_float(0xb4317218u)), V::mul(V::fnma(s, s, V::set(0.25f)), h));
    const U half_turn = V::andu(b, V::setu(0x80000000u));
    const F radius = V::as_f(V::xoru(V::as_u(V::sqrt(square)), half_turn));
    // angle = half_turn pi + pi/2 + pi y:  cos = -+sin(pi y) = -+y P(y^2),  sin = +-cos(pi y) = +-Q(y^2)
    const F y = V::add(V::as_f(V::oru(V::andu(V::template shr<8>(b), fraction), one)), V::set(-1.5f));
    const F w = V::mul(y, y);
    F p = V::fma(V::set(bits_to_float(0x3f0ec7dau)), w, V::set(bits_to_float(0xc022c5e2u)));
    p = V::fma(p, w, V::set(bits_to_float(0x40a55aceu)));
    p = V::fma(p, w, V::set(bits_to_float(0xc0490fcau)));
    F q = V::fma(V::set(bits_to_float(0x3e5f4e93u)), w, V::set(bits_to_float(0xbfaa5efeu)));
    q = V::fma(q, w, V::set(bits_to_float(0x4081dd55u)));
    q = V::fma(q, w, V::set(bits_to_float(0xc09de9c2u)));
    q = V::fma(q, w, V::set(bits_to_float(0x3f7ffffeu)));
    z_even = V::mul(radius, V::mul(y, p));
    z_odd = V::mul(radius, q);
}
