// Crops out of packed images, resized and finished, without unpacking them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>
#include <vector>

#include "packed.h"
#include "resample.h"

namespace fastcil {

// What a batch is read from: images, and for each a crop and whether it is mirrored.
struct Sources {
  std::vector<at::Tensor> buffers;
  std::vector<PackedImage> images;
  std::vector<float> crops;  // y0, x0, y1, x1
  at::Tensor mirrored;

  Sources(at::TensorList arenas, const at::Tensor& arena, const at::Tensor& offsets,
          const at::Tensor& geometry, const std::optional<at::Tensor>& crops,
          const std::optional<at::Tensor>& flips, const std::optional<at::Tensor>& views) {
    for (const auto& pixels : arenas) buffers.push_back(pixels.contiguous());
    const at::Tensor which = arena.contiguous(), begins = offsets.contiguous();
    const at::Tensor rows = geometry.contiguous();
    const at::Tensor seen = views ? views->contiguous() : at::Tensor();
    if (flips) mirrored = flips->contiguous();
    const int64_t batch = rows.size(0);
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
    find_crops(crops);
  }

  const float* crop(int64_t i) const { return crops.data() + 4 * i; }
  bool flip(int64_t i) const { return mirrored.defined() && mirrored.const_data_ptr<bool>()[i]; }

 private:
  static constexpr double kFarthest = 65536;  // of a crop's corner, in pixels

  // Checked ones, or the whole images.
  void find_crops(const std::optional<at::Tensor>& given) {
    crops.reserve(4 * images.size());
    if (!given) {
      for (const auto& image : images) {
        crops.insert(crops.end(), {0, 0, float(image.height), float(image.width)});
      }
      return;
    }
    const at::Tensor rows = given->contiguous();
    const float* c = rows.const_data_ptr<float>();
    for (size_t i = 0; i < images.size(); ++i, c += 4) {
      bool sound = c[0] < c[2] && c[1] < c[3];
      for (int k = 0; k < 4; ++k) sound = sound && std::abs(c[k]) <= kFarthest;
      TORCH_CHECK_VALUE(sound, "crops[", i, "] is [", c[0], ", ", c[1], ", ", c[2], ", ", c[3],
                        "], not a finite (y0, x0, y1, x1) with y0 < y1 and x0 < x1, within ",
                        int64_t(kFarthest), " pixels");
      crops.insert(crops.end(), c, c + 4);
    }
  }
};

// Reads one image after the other, keeping its buffers.
class Reader {
 public:
  // Bytes are not finished, only the other types are.
  template <typename T>
  void read(const PackedImage& image, const float* crop, bool flip, bool antialias,
            int64_t height, int64_t width, const Finish& finish, T* out) {
    rows_.fit(crop[0], crop[2], image.height, height, antialias, false);
    columns_.fit(crop[1], crop[3], image.width, width, antialias, flip);
    placed_.set(columns_);
    image_ = &image;
    asked_for_ = -1;
    samples_ = 3 * (columns_.high - columns_.low);
    const auto of_line = [this](int64_t x) {
      return 3 * (std::clamp(x, columns_.low, columns_.high) - columns_.low);
    };
    left_ = of_line(image.x0);
    right_ = of_line(image.x1);
    line_.resize(samples_ + 3 * columns_.taps + 8 + kPadding);
    if (!image.raw()) prepare_background();
    const auto blend = pick<T>(columns_.taps, finish.dims());
    for (int64_t i = 0; i < height; ++i) {
      if (samples_ > 0) find_line(i);
      blend(line_.data(), placed_, columns_.taps, width, finish, out + 3 * width * i);
    }
  }

 private:
  static constexpr int64_t kPadding = 32;
  static constexpr int64_t kPrefetch = 8;  // rows

  Axis rows_, columns_;
  Columns placed_;
  Rows box_, background_;
  Cells cells_;
  std::vector<int32_t> cell_rows_;
  std::vector<int64_t> held_;
  std::vector<uint8_t> shown_;
  std::vector<int16_t> line_;
  const PackedImage* image_;
  int64_t samples_, left_, right_;  // of a line: all of them, and where the box begins and ends
  int64_t slots_, stride_, asked_for_;

  template <typename T>
  static auto pick(int64_t taps, bool dims) {
    const auto among = [taps](auto dim) {
      return taps == 2   ? blend_columns<T, dim, 2>
             : taps == 4 ? blend_columns<T, dim, 4>
                         : blend_columns<T, dim, 0>;
    };
    return dims ? among(std::true_type{}) : among(std::false_type{});
  }

  // The line that output row i is made of: background, box and background, each blended where it
  // lies.
  void find_line(int64_t i) {
    box_.clear();
    background_.clear();
    bool meets_box = false;
    for (int64_t k = 0; k < rows_.taps; ++k) {
      const int16_t weight = rows_.weights[i * rows_.taps + k];
      if (!weight) continue;
      const int64_t y = rows_.first[i] + k;
      const bool crosses = left_ < right_ && image_->crosses_box(y);
      const bool outside = !crosses || left_ > 0 || right_ < samples_;
      const uint8_t* behind = outside ? background(y) : nullptr;
      if (behind) background_.add(behind, weight);
      box_.add(crosses ? box_row(y) : behind, weight);
      meets_box = meets_box || crosses;
    }
    const int64_t begin = meets_box ? left_ : samples_, end = meets_box ? right_ : samples_;
    if (begin > 0) blend_rows(background_, 0, begin, true, line_.data());
    if (begin < end) blend_rows(box_, begin, end, false, line_.data());
    if (end < samples_) blend_rows(background_, end, samples_, true, line_.data());
  }

  const uint8_t* box_row(int64_t y) {
    const uint8_t* row = image_->in_box(y, columns_.low);
    if (y > asked_for_) {
      // The image is new to the cache: ask for a row that will be read soon.
      asked_for_ = y;
      const uint8_t* ahead = row + kPrefetch * image_->box_stride();
      for (int64_t j = left_; j < right_; j += 64) __builtin_prefetch(ahead + j);
    }
    return row;
  }

  // The last rows of the background stay in `shown_`, grid row r in slot r mod slots_, a power of
  // two. An output row needs no more of them than it has taps.
  void prepare_background() {
    image_->find_cells(columns_.low, columns_.high, cells_);
    cell_rows_.resize(rows_.high - rows_.low);
    image_->find_cell_rows(rows_.low, rows_.high, cell_rows_.data());
    for (slots_ = 1; slots_ < rows_.taps;) slots_ *= 2;
    stride_ = samples_ + kPadding;
    shown_.resize(stride_ * slots_);
    held_.assign(slots_, -1);
  }

  const uint8_t* background(int64_t y) {
    const int64_t r = cell_rows_[y - rows_.low], slot = r & (slots_ - 1);
    uint8_t* row = shown_.data() + stride_ * slot;
    if (held_[slot] != r) {
      image_->background_row(r, cells_, left_ / 3, right_ / 3, samples_ / 3, row);
      held_[slot] = r;
    }
    return row;
  }
};

}  // namespace fastcil
