// fastcil::reconstruct on the CPU: packed images, unpacked into raw ones.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "packed.h"
#include "recycled_memory.h"

namespace fastcil {
namespace {

void write_raw(const PackedImage& image, Cells& cells, uint8_t* out) {
  if (image.raw()) {
    std::memcpy(out, image.bytes, image.nbytes());
    return;
  }
  image.find_cells(0, image.width, cells);
  for (int64_t y = 0; y < image.height; ++y) {
    uint8_t* row = out + 3 * image.width * y;
    image.row(y, 0, image.width, cells, y > 0 ? row - 3 * image.width : nullptr, row);
  }
}

std::tuple<at::Tensor, at::Tensor> reconstruct_cpu(const at::Tensor& pixels,
                                                   const at::Tensor& offsets,
                                                   const at::Tensor& geometry) {
  const auto packed = pixels.contiguous(), begins = offsets.contiguous();
  const auto rows = geometry.contiguous();
  const int64_t count = rows.size(0);
  at::Tensor starts = at::empty({count}, offsets.options());
  std::vector<PackedImage> images;
  images.reserve(count);
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    images.push_back(open_image(i, packed.const_data_ptr<uint8_t>(), packed.numel(),
                                begins.const_data_ptr<int64_t>()[i],
                                rows.const_data_ptr<int16_t>() + 8 * i, nullptr));
    starts.mutable_data_ptr<int64_t>()[i] = total;
    total += 3 * images[i].height * images[i].width;
  }
  at::Tensor out = recycled_empty({total}, at::kByte);
  uint8_t* bytes = out.mutable_data_ptr<uint8_t>();
  const int64_t* places = starts.const_data_ptr<int64_t>();
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    Cells cells;
    for (int64_t i = begin; i < end; ++i) write_raw(images[i], cells, bytes + places[i]);
  });
  return {out, starts};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastcil, CPU, m) { m.impl("reconstruct", &reconstruct_cpu); }

}  // namespace fastcil
