// fastcil::read on the CPU: crops out of packed images, resized, without unpacking them.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <optional>

#include "packed.h"
#include "resample.h"

namespace fastcil {
namespace {

constexpr double kFarthest = 65536;  // of a crop's corner, in pixels
constexpr int64_t kPrefetch = 8;     // rows

// Reads one image after the other, keeping its buffers.
class Reader {
 public:
  void read(const PackedImage& image, const float* crop, bool flip, bool antialias,
            int64_t height, int64_t width, uint8_t* out) {
    rows_.fit(crop[0], crop[2], image.height, height, antialias, false);
    columns_.fit(crop[1], crop[3], image.width, width, antialias, flip);
    placed_.set(columns_);
    row_bytes_ = 3 * (columns_.high - columns_.low);
    line_.assign(row_bytes_ + 3 * columns_.taps + 8, 0);
    pixels_.resize(3 * columns_.first.size() + 4);
    asked_for_ = -1;
    if (!image.raw()) prepare(image);
    for (int64_t i = 0; i < height; ++i) {
      gathered_.clear();
      for (int64_t k = 0; k < rows_.taps; ++k) {
        const int16_t weight = rows_.weights[i * rows_.taps + k];
        if (weight) gathered_.add(row(image, rows_.first[i] + k), weight);
      }
      blend_rows(gathered_, row_bytes_, line_.data());
      const auto blend = columns_.taps == 2   ? blend_columns<2>
                         : columns_.taps == 4 ? blend_columns<4>
                                              : blend_columns<0>;
      blend(line_.data(), placed_, columns_.taps, pixels_.data());
      std::memcpy(out + 3 * width * i, pixels_.data(), 3 * width);
    }
  }

 private:
  Axis rows_, columns_;
  Columns placed_;
  Rows gathered_;
  Cells cells_;
  std::vector<int64_t> same_row_, held_;
  std::vector<uint8_t> shown_, pixels_;
  std::vector<int16_t> line_;
  int64_t row_bytes_, slots_, asked_for_;

  // The last rows of a packed image stay in `shown_`, row y in slot y mod slots_, a power of two.
  // They are so many that no two of an output's rows, or of the equal rows that stand in for
  // them, share a slot.
  void prepare(const PackedImage& image) {
    image.find_cells(columns_.low, columns_.high, cells_);
    const int64_t wanted = rows_.taps + image.height / image.grid_height + 1;
    for (slots_ = 1; slots_ < wanted;) slots_ *= 2;
    shown_.resize(row_bytes_ * slots_);
    held_.assign(slots_, -1);
    same_row_.resize(rows_.high - rows_.low);
    for (int64_t y = rows_.low; y < rows_.high; ++y) {
      same_row_[y - rows_.low] = image.same_row(y);
    }
  }

  int64_t slot(int64_t y) const { return y & (slots_ - 1); }
  bool holds(int64_t y) const { return y >= 0 && held_[slot(y)] == y; }

  // The crop's columns of row y.
  const uint8_t* row(const PackedImage& image, int64_t y) {
    if (image.raw()) return raw_row(image, y);
    y = same_row_[y - rows_.low];
    uint8_t* out = shown_.data() + row_bytes_ * slot(y);
    if (!holds(y)) {
      const uint8_t* above = holds(y - 1) ? shown_.data() + row_bytes_ * slot(y - 1) : nullptr;
      image.row(y, columns_.low, columns_.high, cells_, above, out);
      held_[slot(y)] = y;
    }
    return out;
  }

  const uint8_t* raw_row(const PackedImage& image, int64_t y) {
    const uint8_t* out = image.in_box(y, columns_.low);
    if (y > asked_for_) {
      // The image is new to the cache: ask for a row that will be read soon.
      asked_for_ = y;
      const uint8_t* ahead = out + 3 * image.width * kPrefetch;
      for (int64_t j = 0; j < row_bytes_; j += 64) __builtin_prefetch(ahead + j);
    }
    return out;
  }
};

std::vector<float> whole_or_checked(const std::optional<at::Tensor>& crops,
                                    const std::vector<PackedImage>& images) {
  std::vector<float> out;
  out.reserve(4 * images.size());
  if (!crops) {
    for (const auto& image : images) {
      out.insert(out.end(), {0, 0, float(image.height), float(image.width)});
    }
    return out;
  }
  const at::Tensor rows = crops->contiguous();
  const float* c = rows.const_data_ptr<float>();
  for (size_t i = 0; i < images.size(); ++i, c += 4) {
    bool sound = c[0] < c[2] && c[1] < c[3];
    for (int k = 0; k < 4; ++k) sound = sound && std::abs(c[k]) <= kFarthest;
    TORCH_CHECK_VALUE(sound, "crops[", i, "] is [", c[0], ", ", c[1], ", ", c[2], ", ", c[3],
                      "], not a finite (y0, x0, y1, x1) with y0 < y1 and x0 < x1, within ",
                      int64_t(kFarthest), " pixels");
    out.insert(out.end(), c, c + 4);
  }
  return out;
}

at::Tensor read_cpu(at::TensorList arenas, const at::Tensor& arena, const at::Tensor& offsets,
                    const at::Tensor& geometry, int64_t height, int64_t width,
                    const std::optional<at::Tensor>& crops, const std::optional<at::Tensor>& flips,
                    const std::optional<at::Tensor>& views, bool antialias) {
  const auto contiguous = [](const std::optional<at::Tensor>& rows) {
    return rows ? rows->contiguous() : at::Tensor();
  };
  std::vector<at::Tensor> buffers;
  for (const auto& pixels : arenas) buffers.push_back(pixels.contiguous());
  const at::Tensor which = arena.contiguous(), begins = offsets.contiguous();
  const at::Tensor rows = geometry.contiguous(), mirrored = contiguous(flips);
  const at::Tensor seen = contiguous(views);
  const int64_t batch = rows.size(0);
  std::vector<PackedImage> images;
  images.reserve(batch);
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t k = which.const_data_ptr<int64_t>()[i];
    TORCH_CHECK_VALUE(k >= 0 && k < int64_t(buffers.size()), "arena[", i, "] is ", k,
                      ", but there are ", buffers.size(), " arenas");
    images.push_back(open_image(i, buffers[k].const_data_ptr<uint8_t>(), buffers[k].numel(),
                                begins.const_data_ptr<int64_t>()[i],
                                rows.const_data_ptr<int16_t>() + 8 * i,
                                views ? seen.const_data_ptr<int16_t>() + 6 * i : nullptr));
  }
  const std::vector<float> crop = whole_or_checked(crops, images);
  at::Tensor out = at::empty({batch, 3, height, width}, geometry.options().dtype(at::kByte),
                             at::MemoryFormat::ChannelsLast);
  uint8_t* bytes = out.mutable_data_ptr<uint8_t>();
  const bool* flip = flips ? mirrored.const_data_ptr<bool>() : nullptr;
  at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    Reader reader;
    for (int64_t i = begin; i < end; ++i) {
      reader.read(images[i], crop.data() + 4 * i, flip && flip[i], antialias, height, width,
                  bytes + 3 * height * width * i);
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastcil, CPU, m) { m.impl("read", &read_cpu); }

}  // namespace fastcil
