#include <array>

#include "check.h"
#include "core/keyed_draw.h"
#include "core/philox.h"

using namespace eapo;

namespace {

// Random123 1.14, kat_vectors, "philox4x32 10".
void gives_the_known_answers() {
  constexpr std::uint32_t kOnes = 0xFFFFFFFF;
  EXPECT((philox4x32({0, 0, 0, 0}, {0, 0}) ==
          PhiloxCounter{0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8}));
  EXPECT((philox4x32({kOnes, kOnes, kOnes, kOnes}, {kOnes, kOnes}) ==
          PhiloxCounter{0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD}));
}

void hashes_purposes_as_published() {
  static_assert(fnv1a64("") == 0xCBF29CE484222325);
  static_assert(fnv1a64("a") == 0xAF63DC4C8601EC8C);
  static_assert(fnv1a64("foobar") == 0x85944171F73967E8);
}

void draws_depend_on_every_index() {
  const std::array<std::int64_t, 5> indices{1, 2, 3, 4, 5};
  const KeyedDraw draw(7, "sample", indices);
  for (std::size_t at = 0; at < indices.size(); ++at) {
    auto other = indices;
    other[at] += std::int64_t{1} << 40;
    EXPECT(KeyedDraw(7, "sample", other).bits() != draw.bits());
  }
  EXPECT(KeyedDraw(7, "sample", indices).bits() == draw.bits());
  EXPECT(draw.uniform() >= 0 && draw.uniform() < 1);
  EXPECT(draw.uniform_f32() <= draw.uniform());
  EXPECT(draw.uniform() - draw.uniform_f32() < 0x1p-24);
}

}  // namespace

int main() {
  return eapo_test::run(gives_the_known_answers, hashes_purposes_as_published,
                        draws_depend_on_every_index);
}
