// Any bytes as a page file of Landmark's blocks: what it hands out is a page that was written.
#include "fuzz.h"
#include "mechanisms/landmark/kernel_pages_file.h"

using namespace everlong;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const landmark::PageShape shape{.block = 4, .key_dim = 3, .value_dim = 2};
  const fs::path path = fuzz::file("store.pages", data, size);
  {
    auto pages = landmark::PageFile::open(path, shape);
    if (!fuzz::accepted(pages)) return 0;
    fuzz::require(pages->bytes() >= landmark::kFileUnit, "a page file has a header");
    std::vector<std::byte> page(static_cast<std::size_t>(shape.page_bytes()));
    for (std::int64_t record = -1; record <= pages->records(); ++record) {
      fuzz::accepted(pages->check({record, 7}));
      fuzz::accepted(pages->read({record, 7}, page));
    }
    // Whatever was there before, what is appended now is read back.
    const std::vector<std::byte> written(page.size(), std::byte{5});
    const auto place = pages->append(3, 0, written);
    if (!fuzz::accepted(place)) return 0;
    fuzz::require(pages->read(*place, page).ok() && page == written, "a page comes back");
  }
  auto again = landmark::PageFile::open(path, shape);
  fuzz::require(again.ok() && again->cut_bytes() == 0, "an accepted file opens again, whole");
  return 0;
}
