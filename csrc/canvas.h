// An image between reader and batch, and the operations that its program carries out on it.
#pragma once

#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "pixel_ops.h"

namespace fastcil {

// As in fastcil/ops/pixel_program.py.
enum class Operation : int8_t {
  kNone,
  kAffine,
  kAutocontrast,
  kEqualize,
  kInvert,
  kSolarize,
  kPosterize,
  kBrightness,
  kContrast,
  kColour,
  kSharpness,
  kCutout,
};
constexpr int64_t kOperations = 12;
constexpr int64_t kAmounts = 9;  // six numbers and a fill colour
constexpr int64_t kFill = 6;

struct Colour {
  uint8_t levels[3] = {};

  Colour() = default;
  explicit Colour(const double* amounts) {
    for (int c = 0; c < 3; ++c) levels[c] = static_cast<uint8_t>(amounts[kFill + c]);
  }
};

// Cutout's square, in whole pixels, and its colour. An empty one covers nothing.
struct Cover {
  int64_t top = 0, left = 0, bottom = 0, right = 0;
  Colour fill;

  Cover() = default;
  // y, x, side and fill colour, for an image of this size.
  Cover(const double* amounts, int64_t height, int64_t width) : fill(amounts) {
    const auto side = static_cast<int64_t>(amounts[2]);
    const int64_t y = static_cast<int64_t>(amounts[0]) - side / 2;
    const int64_t x = static_cast<int64_t>(amounts[1]) - side / 2;
    top = std::clamp<int64_t>(y, 0, height);
    left = std::clamp<int64_t>(x, 0, width);
    bottom = std::clamp<int64_t>(y + side, top, height);
    right = std::clamp<int64_t>(x + side, left, width);
  }

  bool covers() const { return top < bottom && left < right; }

  template <typename T>
  void paint(const Finish& finish, int64_t width, T* out) const {
    T colour[3];
    for (int c = 0; c < 3; ++c) colour[c] = finish.of<T>(fill.levels[c], c);
    for (int64_t y = top; y < bottom; ++y) {
      T* row = out + 3 * (y * width + left);
      for (int64_t j = 0; j < right - left; ++j) std::copy_n(colour, 3, row + 3 * j);
    }
  }
};

// Operations that look at one level at a time are put off where that saves a pass: the table that
// autocontrast and equalize make, then a brightness factor, then a cover wait until the pixels
// themselves are needed.
class Canvas {
 public:
  // Where to put the image, height * width * 3 bytes.
  uint8_t* begin(int64_t height, int64_t width) {
    height_ = height;
    width_ = width;
    samples_ = 3 * height * width;
    pixels_.resize(samples_ + kPadding);
    other_.resize(samples_ + kPadding);
    has_levels_ = false;
    factor_ = 1;
    cover_ = Cover();
    return pixels_.data();
  }

  void apply(Operation operation, const double* amounts) {
    if (operation == Operation::kNone) return;
    if (cover_.covers()) settle();
    if (operation == Operation::kCutout) {
      cover_ = Cover(amounts, height_, width_);
      return;
    }
    dim();
    const auto factor = static_cast<float>(amounts[0]);
    switch (operation) {
      case Operation::kInvert:
        return invert();
      case Operation::kSolarize:
        return solarize(std::ceil(amounts[0]));
      case Operation::kPosterize: {
        const auto kept = static_cast<uint8_t>(256 - std::exp2(8 - amounts[0]));
        return point([kept](uint8_t v) { return static_cast<uint8_t>(v & kept); });
      }
      case Operation::kBrightness:
        factor_ = std::max(factor, 0.0f);
        return;
      default:
        settle();
        return apply_to_pixels(operation, amounts, factor);
    }
  }

  // The image, finished; `finish` does not dim, this does.
  template <typename T>
  void write(Finish finish, T* out) {
    if (has_levels_) dim();
    finish.factor = factor_;
    const int64_t row = 3 * width_;
    for (int64_t j = 0; j < samples_; j += row) {
      if (has_levels_) look_up(levels_, row, pixels_.data() + j);
      finish_bytes(finish, pixels_.data() + j, row, out + j);
    }
    cover_.paint(finish, width_, out);
  }

 private:
  int64_t height_, width_, samples_;
  std::vector<uint8_t> pixels_, other_, grey_, greys_;
  std::vector<uint16_t> sums_;
  std::vector<int32_t> places_;
  bool has_levels_;
  Levels levels_;
  float factor_;
  Cover cover_;

  // Changes each level: in the table if there is one, or else in the image.
  template <typename Change>
  void point(Change change) {
    uint8_t* levels = has_levels_ ? levels_[0] : pixels_.data();
    const int64_t count = has_levels_ ? 3 * 256 : samples_;
    for (int64_t j = 0; j < count; ++j) levels[j] = change(levels[j]);
  }

  void dim() {
    if (factor_ == 1) return;
    Finish dimmer;
    dimmer.factor = factor_;
    point([dimmer](uint8_t v) { return dimmer.dim(v); });
    factor_ = 1;
  }

  // Carries out what was put off.
  void settle() {
    dim();
    if (has_levels_) look_up(levels_, samples_, pixels_.data());
    has_levels_ = false;
    cover_.paint(Finish(), width_, pixels_.data());
    cover_ = Cover();
  }

  void invert() {
    point([](uint8_t v) { return static_cast<uint8_t>(~v); });
  }

  void solarize(double least) {
    if (least <= 0) return invert();
    const auto kept = static_cast<uint8_t>(std::min(least - 1, 255.0));
    point([kept](uint8_t v) { return static_cast<uint8_t>(v > kept ? ~v : v); });
  }

  void apply_to_pixels(Operation operation, const double* amounts, float factor) {
    switch (operation) {
      case Operation::kAffine:
        places_.resize(width_);
        affine(pixels_.data(), static_cast<int32_t>(height_), static_cast<int32_t>(width_), amounts,
               Colour(amounts).levels, places_.data(), other_.data());
        return pixels_.swap(other_);
      case Operation::kAutocontrast:
        find_autocontrast(pixels_.data(), samples_, levels_);
        has_levels_ = true;
        return;
      case Operation::kEqualize:
        find_equalize(pixels_.data(), samples_, levels_);
        has_levels_ = true;
        return;
      case Operation::kContrast:
        return contrast(factor);
      case Operation::kColour:
        return colour(factor);
      default:
        return sharpness(factor);
    }
  }

  void contrast(float weight) {
    const int64_t area = height_ * width_;
    grey_.resize(area);
    find_grey(pixels_.data(), area, grey_.data());
    const int64_t sum = std::accumulate(grey_.begin(), grey_.end(), int64_t{0});
    uint8_t mean[8];
    std::fill_n(mean, 8, static_cast<uint8_t>((2 * sum + area) / (2 * area)));
    blend_bytes(pixels_.data(), mean, 0, samples_, weight);
  }

  void colour(float weight) {
    grey_.resize(width_);
    greys_.resize(3 * width_ + kPadding);
    for (int64_t y = 0; y < height_; ++y) {
      uint8_t* row = pixels_.data() + 3 * width_ * y;
      find_grey(row, width_, grey_.data());
      triple(grey_.data(), width_, greys_.data());
      blend_bytes(row, greys_.data(), 1, 3 * width_, weight);
    }
  }

  void sharpness(float weight) {
    const int64_t row = 3 * width_;
    std::memcpy(other_.data(), pixels_.data(), samples_);
    sums_.resize(row);
    greys_.resize(row);
    for (int64_t j = row; width_ > 2 && j < samples_ - row; j += row) {
      smooth_row(pixels_.data() + j, row, sums_.data(), greys_.data());
      blend_bytes(other_.data() + j + 3, greys_.data() + 3, 1, row - 6, weight);
    }
    pixels_.swap(other_);
  }
};

}  // namespace fastcil
