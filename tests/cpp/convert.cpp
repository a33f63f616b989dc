// Every 16-bit pattern to float and back, and counts that end within a vector.
#include "run.h"

namespace pgap {

void test_convert(Run& run) {
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16})
        for (int64_t count : {0, 1, 7, 8, 9, 15, 17, 33, 63, 65536}) {
            const std::string name = "conversion " + std::to_string(int(dtype)) + " " + std::to_string(count);
            Matrix in(dtype, 1, count, 0, count % 3, 5);
            if (dtype != DType::f32)
                for (int64_t i = 0; i < count; ++i) ((uint16_t*)in.at(0))[i] = uint16_t(count == 65536 ? i : hashed(i));
            Matrix out(DType::f32, 1, count, 0, 1, 0, Fill::nan), near(DType::f32, 1, count, 0, 1, 8);
            run.k.to_float(dtype, in.at(0), out.floats(), count);
            Digest digest, again;
            out.add_to(digest);
            run.same(name, digest.value);
            if (dtype == DType::f32) continue;
            run.k.round_to(dtype, out.floats(), count);
            out.add_to(again);
            run.expect(again.value == digest.value, name + ": a 16-bit value is its own nearest");
            run.k.round_to(dtype, near.floats(), count);
            Digest rounded;
            near.add_to(rounded);
            run.same(name + " rounded", rounded.value);
            run.expect(out.guards_intact() && near.guards_intact(), name + ": memory beside");
        }
}

}  // namespace pgap
