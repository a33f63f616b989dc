// A plain Philox against Random123's known answers, the kernels' draws against that Philox, and the transform against
// float64.
#include <cmath>
#include <fstream>
#include <sstream>

#include "run.h"

namespace pgap {
namespace {

struct Words { uint32_t x[4]; };

Words philox(int rounds, Words c, uint32_t k0, uint32_t k1) {
    for (int i = 0; i < rounds; ++i, k0 += 0x9e3779b9u, k1 += 0xbb67ae85u) {
        const uint64_t p0 = uint64_t(0xd2511f53u) * c.x[0], p1 = uint64_t(0xcd9e8d57u) * c.x[2];
        c = {{uint32_t(p1 >> 32) ^ c.x[1] ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ c.x[3] ^ k1, uint32_t(p0)}};
    }
    return c;
}

void test_known_answers(Run& run, const char* path) {
    std::ifstream file(path);
    int vectors = 0;
    for (std::string line; std::getline(file, line);) {
        if (line.empty() || line[0] == '#') continue;
        std::istringstream in(line);
        int rounds;
        uint32_t v[10];
        in >> rounds >> std::hex;
        for (uint32_t& x : v) in >> x;
        const Words got = philox(rounds, {{v[0], v[1], v[2], v[3]}}, v[4], v[5]);
        run.expect(in && !std::memcmp(got.x, v + 6, sizeof got.x), "known answer " + line);
        ++vectors;
    }
    run.expect(vectors == 6, std::string("six known answers in ") + path);
}

struct Place { int64_t base; uint32_t id; uint64_t key; };
constexpr Place kPlaces[] = {{0, 0, 0},
                             {0, ~0u, ~uint64_t(0)},
                             {4096 * 3 - 64, 7, 11},
                             {(int64_t(1) << 33) + 32 * 1000, 0x243f6a88u, 0xa4093822299f31d0u},
                             {(int64_t(1) << 47) - 32 * 5, 99, uint64_t(1) << 63},
                             {INT64_MAX - 9 * 4096, 0x85a308d3u, 3}};

void draw(Run& run, Distribution distribution, const Place& place, Matrix& to) {
    const float one = 1.0f, zero = 0.0f;
    const int64_t draws = 1;
    const DensePass pass = {.dtype = DType::f32,
                            .draws = {.distribution = distribution,
                                      .count = 1,
                                      .columns = 1,
                                      .keys = &place.key,
                                      .coefficients = &one},
                            .stages = 1,
                            .draws_per_stage = &draws,
                            .decay = &zero};
    const Piece p = {.out = to.at(0),
                     .rows = 1,
                     .cols = to.cols,
                     .ld_out = to.cols,
                     .base = place.base,
                     .row_stride = to.cols,
                     .tensor_id = place.id};
    run.k.dense(pass, p, first_group(p), end_group(p));
}

// The four words that a counter gives; those of element e are in lane (e >> 10) & 3.
Words words_of(int64_t e, const Place& place) {
    const uint64_t block = uint64_t(e) >> 12 << 10 | (uint64_t(e) & 1023);
    return philox(7, {{uint32_t(block), uint32_t(block >> 32), place.id, 0}}, uint32_t(place.key),
                  uint32_t(place.key >> 32));
}

void test_draws(Run& run) {
    for (const Place& place : kPlaces) {
        const std::string name = "draw at " + std::to_string(place.base);
        constexpr int64_t kCount = 9 * 4096;
        Matrix signs(DType::f32, 1, kCount, 0, 1, 0, Fill::nan), normals(DType::f32, 1, kCount, 0, 3, 0, Fill::nan);
        draw(run, Distribution::rademacher, place, signs);
        draw(run, Distribution::normal, place, normals);
        bool right = true;
        for (int64_t i = 0; i < kCount; ++i) {
            const int64_t e = place.base + i, word = e >> 5;
            const uint32_t bits = words_of(word, place).x[(word >> 10) & 3];
            right &= signs.floats()[i] == (bits >> (e & 31) & 1 ? 1.0f : -1.0f);
        }
        run.expect(right, name + ": signs are Philox's bits");
        Matrix a(DType::f32, 1, kCount, 0, 0, 0), b(DType::f32, 1, kCount, 0, 0, 0);
        Matrix even(DType::f32, 1, kCount, 0, 1, 0, Fill::nan), odd(DType::f32, 1, kCount, 0, 2, 0, Fill::nan);
        for (int64_t i = 0; i < kCount; ++i) {
            const Words w = words_of(place.base + i, place);
            const int64_t lane = ((place.base + i) >> 10) & 3;
            std::memcpy(a.floats() + i, w.x + (lane & 2), 4);
            std::memcpy(b.floats() + i, w.x + (lane | 1), 4);
        }
        run.k.box_muller((const uint32_t*)a.at(0), (const uint32_t*)b.at(0), even.floats(), odd.floats(), kCount);
        right = true;
        for (int64_t i = 0; i < kCount; ++i) {
            const Matrix& z = (place.base + i) >> 10 & 1 ? odd : even;
            right &= bits_of(DType::f32, z.floats() + i) == bits_of(DType::f32, normals.floats() + i);
        }
        run.expect(right, name + ": normals are the transform of Philox's words");
    }
}

void test_transform(Run& run) {
    const double half_turn = std::acos(-1.0) * 0x1p-23;
    const uint32_t edges[] = {0, ~0u, 0x1ffu, 0x200u, 0x7fffffffu, 0x80000000u};
    for (int64_t count = 1; count <= 4000; count = count < 40 ? count + 1 : count * 3) {
        Matrix a(DType::f32, 1, count, 0, count % 5, 1), b(DType::f32, 1, count, 0, count % 3, 2);
        Matrix even(DType::f32, 1, count, 0, count % 7, 0), odd(DType::f32, 1, count, 0, count % 2, 0);
        for (int64_t i = 0; i < count; ++i) {
            const uint64_t x = hashed(uint64_t(count * 5000 + i));
            const uint32_t wa = i < 36 ? edges[i % 6] : uint32_t(x), wb = i < 36 ? edges[i / 6] : uint32_t(x >> 32);
            std::memcpy(a.floats() + i, &wa, 4);
            std::memcpy(b.floats() + i, &wb, 4);
        }
        const uint32_t *wa = (const uint32_t*)a.at(0), *wb = (const uint32_t*)b.at(0);
        run.k.box_muller(wa, wb, even.floats(), odd.floats(), count);
        bool right = true;
        for (int64_t i = 0; i < count; ++i) {
            const double r = std::sqrt(-2 * std::log(double(wa[i] >> 9) * 0x1p-23 + 0x1p-24));
            const double angle = half_turn * (wb[i] >> 8), cosine = r * std::cos(angle), sine = r * std::sin(angle);
            const auto near = [](double z, double want) {
                return std::fabs(z - want) <= 2e-6 * std::fmax(std::fabs(want), 1);
            };
            right &= near(even.floats()[i], cosine) && near(odd.floats()[i], sine);
        }
        run.expect(right && even.guards_intact() && odd.guards_intact(), "transform of " + std::to_string(count));
        Digest digest;
        even.add_to(digest);
        odd.add_to(digest);
        run.same("transform " + std::to_string(count), digest.value);
    }
}

}  // namespace

void test_noise(Run& run, const char* known_answers) {
    test_known_answers(run, known_answers);
    test_draws(run);
    test_transform(run);
}

}  // namespace pgap
