// fastcil::read on the CPU: crops out of packed images, resized, without unpacking them.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "reader.h"
#include "recycled_memory.h"

namespace fastcil {
namespace {

at::Tensor read_cpu(at::TensorList arenas, const at::Tensor& arena, const at::Tensor& offsets,
                    const at::Tensor& geometry, int64_t height, int64_t width,
                    const std::optional<at::Tensor>& crops, const std::optional<at::Tensor>& flips,
                    const std::optional<at::Tensor>& views, bool antialias) {
  const Sources sources(arenas, arena, offsets, geometry, crops, flips, views);
  const int64_t batch = sources.images.size();
  at::Tensor out =
      recycled_empty({batch, 3, height, width}, at::kByte, at::MemoryFormat::ChannelsLast);
  uint8_t* bytes = out.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, batch, 1, [&sources, antialias, height, width, bytes](int64_t begin,
                                                                            int64_t end) {
    Reader reader;
    const Finish none;
    for (int64_t i = begin; i < end; ++i) {
      reader.read(sources.images[i], sources.crop(i), sources.flip(i), antialias, height, width,
                  none, bytes + 3 * height * width * i);
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastcil, CPU, m) { m.impl("read", &read_cpu); }

}  // namespace fastcil
