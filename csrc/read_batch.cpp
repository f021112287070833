// fastcil::read_batch on the CPU: each image is read, changed and finished while it is in cache.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "recycled_memory.h"
#include "canvas.h"
#include "reader.h"

namespace fastcil {
namespace {

constexpr double kLargestAmount = 16383;

// What happens to the pixels of one image.
struct Program {
  const int8_t* operations;
  const double* amounts;
  int64_t steps;

  Operation operation(int64_t k) const { return static_cast<Operation>(operations[k]); }
  const double* of(int64_t k) const { return amounts + kAmounts * k; }

  void check(int64_t i) const {
    for (int64_t k = 0; k < steps; ++k) {
      TORCH_CHECK_VALUE(operations[k] >= 0 && operations[k] < kOperations, "operations[", i, ", ",
                        k, "] is ", int(operations[k]), ", which is no operation's number");
      bool sound = true;
      for (int64_t n = 0; n < kAmounts; ++n) {
        sound = sound && std::abs(of(k)[n]) <= kLargestAmount;
        sound = sound && (n < kFill || (of(k)[n] >= 0 && of(k)[n] <= 255));
      }
      if (operation(k) == Operation::kPosterize) sound = sound && of(k)[0] >= 0 && of(k)[0] <= 8;
      TORCH_CHECK_VALUE(sound, "amounts[", i, ", ", k, "] has a number out of its range: all must ",
                        "lie within ", int64_t(kLargestAmount), ", posterize's bits between 0 and ",
                        "8, and fill colours between 0 and 255");
    }
  }

  // Whether there is no more to it than brightness and then a cover, which need no canvas.
  bool is_light(Finish& finish, Cover& cover, int64_t height, int64_t width) const {
    for (int64_t k = 0; k < steps; ++k) {
      if (operation(k) == Operation::kNone) continue;
      if (cover.covers()) return false;
      if (operation(k) == Operation::kCutout) {
        cover = Cover(of(k), height, width);
      } else if (operation(k) == Operation::kBrightness && !finish.dims()) {
        finish.factor = std::max(static_cast<float>(of(k)[0]), 0.0f);
      } else {
        return false;
      }
    }
    return true;
  }
};

template <typename T>
void read_images(const Sources& sources, const std::vector<Program>& programs, bool antialias,
                 int64_t height, int64_t width, const Finish& plain, T* out) {
  const int64_t batch = sources.images.size();
  at::parallel_for(0, batch, 1, [=, &sources, &programs, &plain](int64_t begin, int64_t end) {
    Reader reader;
    Canvas canvas;
    const auto read = [&](int64_t i, const Finish& finish, auto* to) {
      reader.read(sources.images[i], sources.crop(i), sources.flip(i), antialias, height, width,
                  finish, to);
    };
    for (int64_t i = begin; i < end; ++i) {
      T* to = out + 3 * height * width * i;
      Finish finish = plain;
      Cover cover;
      const bool light = programs[i].is_light(finish, cover, height, width);
      if (light && !(std::is_same_v<T, uint8_t> && finish.dims())) {
        read(i, finish, to);
        cover.paint(finish, width, to);
        continue;
      }
      read(i, plain, canvas.begin(height, width));
      for (int64_t k = 0; k < programs[i].steps; ++k) {
        canvas.apply(programs[i].operation(k), programs[i].of(k));
      }
      canvas.write(plain, to);
    }
  });
}

at::Tensor read_batch_cpu(at::TensorList arenas, const at::Tensor& arena,
                          const at::Tensor& offsets, const at::Tensor& geometry, int64_t height,
                          int64_t width, const std::optional<at::Tensor>& crops,
                          const std::optional<at::Tensor>& flips,
                          const std::optional<at::Tensor>& views, bool antialias,
                          const std::optional<at::Tensor>& operations,
                          const std::optional<at::Tensor>& amounts, at::ArrayRef<double> mean,
                          at::ArrayRef<double> std, at::ScalarType dtype) {
  const Sources sources(arenas, arena, offsets, geometry, crops, flips, views);
  const int64_t batch = sources.images.size();
  std::vector<Program> programs(batch);
  const at::Tensor codes = operations ? operations->contiguous() : at::Tensor();
  const at::Tensor numbers = amounts ? amounts->contiguous() : at::Tensor();
  for (int64_t i = 0; operations && i < batch; ++i) {
    const int64_t steps = codes.size(1);
    programs[i] = {codes.const_data_ptr<int8_t>() + steps * i,
                   numbers.const_data_ptr<double>() + kAmounts * steps * i, steps};
    programs[i].check(i);
  }
  const at::Tensor out =
      recycled_empty({batch, 3, height, width}, dtype, at::MemoryFormat::ChannelsLast);
  const Finish finish(mean.data(), std.data());
  const auto read = [&](auto sample) {
    using T = decltype(sample);
    read_images(sources, programs, antialias, height, width, finish, out.mutable_data_ptr<T>());
  };
  switch (dtype) {
    case at::kByte:
      read(uint8_t());
      break;
    case at::kHalf:
      read(at::Half());
      break;
    case at::kBFloat16:
      read(at::BFloat16());
      break;
    default:
      read(float());
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastcil, CPU, m) { m.impl("read_batch", &read_batch_cpu); }

}  // namespace fastcil
