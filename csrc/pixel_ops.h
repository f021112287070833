// Pillow's image operations, bit for bit what fastcil/ops/pixel_ops.py does: loops over the bytes
// of one image, which is [height, width, 3] with a few bytes of padding behind it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "finish.h"

namespace fastcil {

using Levels = uint8_t[3][256];  // what each level becomes, for each channel

constexpr int64_t kPadding = 32;

inline void look_up(const Levels& levels, int64_t samples, uint8_t* bytes) {
  for (int64_t j = 0; j < samples; j += 3) {
    const uint8_t red = bytes[j], green = bytes[j + 1], blue = bytes[j + 2];
    bytes[j] = levels[0][red];
    bytes[j + 1] = levels[1][green];
    bytes[j + 2] = levels[2][blue];
  }
}

// levels = base + weight * (level - base), cut off to a byte. `step` is 1, or 0 where all levels
// have the one base, given 8 times.
inline void blend_bytes(uint8_t* __restrict levels, const uint8_t* __restrict bases, int64_t step,
                        int64_t count, float weight) {
  int64_t j = 0;
#ifdef FASTCIL_AVX2
  const auto widen = [](const uint8_t* bytes) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
  };
  const auto blend8 = [=](const uint8_t* level, const uint8_t* base) {
    const __m256i from = widen(base);
    const __m256 step = _mm256_cvtepi32_ps(_mm256_sub_epi32(widen(level), from));
    const __m256 mixed = _mm256_add_ps(_mm256_mul_ps(step, _mm256_set1_ps(weight)),
                                       _mm256_cvtepi32_ps(from));
    // Packing cuts off what is left.
    return _mm256_cvttps_epi32(_mm256_min_ps(mixed, _mm256_set1_ps(255.0f)));
  };
  for (; j + 16 <= count; j += 16) {
    const __m256i words = _mm256_packus_epi32(blend8(levels + j, bases + step * j),
                                              blend8(levels + j + 8, bases + step * (j + 8)));
    const __m256i ordered = _mm256_permutevar8x32_epi32(
        _mm256_packus_epi16(words, words), _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(levels + j), _mm256_castsi256_si128(ordered));
  }
#endif
  for (; j < count; ++j) {
    const float base = bases[step * j];
    const float mixed = (levels[j] - base) * weight + base;
    levels[j] = static_cast<uint8_t>(static_cast<int32_t>(std::clamp(mixed, 0.0f, 255.0f)));
  }
}

// Pillow's "L" of each pixel.
inline void find_grey(const uint8_t* __restrict pixels, int64_t count, uint8_t* __restrict out) {
  int64_t i = 0;
#ifdef FASTCIL_AVX2
  // The weight of green is above an int16: half of it, twice.
  const __m256i weights = _mm256_set1_epi64x(0x1d2f'4b23'4b23'4c8b);
  const __m256i half = _mm256_set1_epi32(0x8000);
  // R G G B of two pixels in each half of a vector, in 16 bits
  const __m256i apart = _mm256_setr_epi8(0, -1, 1, -1, 1, -1, 2, -1, 3, -1, 4, -1, 4, -1, 5, -1,
                                         6, -1, 7, -1, 7, -1, 8, -1, 9, -1, 10, -1, 10, -1, 11, -1);
  for (; i + 8 <= count; i += 8) {
    const auto products = [&](int64_t first) {
      const auto* from = reinterpret_cast<const __m128i*>(pixels + 3 * first);
      const __m256i four = _mm256_broadcastsi128_si256(_mm_loadu_si128(from));
      return _mm256_madd_epi16(_mm256_shuffle_epi8(four, apart), weights);
    };
    const __m256i sums = _mm256_hadd_epi32(products(i), products(i + 4));  // 0 1 4 5, 2 3 6 7
    const __m256i grey = _mm256_srli_epi32(_mm256_add_epi32(sums, half), 16);
    const __m256i bytes = _mm256_shuffle_epi8(
        grey, _mm256_setr_epi8(0, 4, -1, -1, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                               -1, -1, 0, 4, -1, -1, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1));
    const __m128i low = _mm256_castsi256_si128(bytes), high = _mm256_extracti128_si256(bytes, 1);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out + i), _mm_or_si128(low, high));
  }
#endif
  for (; i < count; ++i) {
    const uint8_t* pixel = pixels + 3 * i;
    out[i] = static_cast<uint8_t>(
        (pixel[0] * 19595u + pixel[1] * 38470u + pixel[2] * 7471u + 0x8000u) >> 16);
  }
}

// Every byte three times over; `out` has padding.
inline void triple(const uint8_t* __restrict bytes, int64_t count, uint8_t* __restrict out) {
  int64_t i = 0;
#ifdef FASTCIL_AVX2
  const __m128i five = _mm_setr_epi8(0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5);
  for (; i + 16 <= count; i += 5) {
    const __m128i from = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + i));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 3 * i), _mm_shuffle_epi8(from, five));
  }
#endif
  for (; i < count; ++i) std::fill_n(out + 3 * i, 3, bytes[i]);
}

// Stretches each channel's levels to 0 .. 255.
inline void find_autocontrast(const uint8_t* pixels, int64_t samples, Levels& levels) {
  constexpr int64_t kLanes = 96;  // whole vectors and whole pixels
  uint8_t least[kLanes], most[kLanes];
  std::fill_n(least, kLanes, 255);
  std::fill_n(most, kLanes, 0);
  int64_t j = 0;
#ifdef FASTCIL_AVX2
  __m256i low[3], high[3];
  std::fill_n(low, 3, _mm256_set1_epi8(-1));
  std::fill_n(high, 3, _mm256_setzero_si256());
  for (; j + kLanes <= samples; j += kLanes) {
    for (int n = 0; n < 3; ++n) {
      const auto* from = reinterpret_cast<const __m256i*>(pixels + j + 32 * n);
      const __m256i now = _mm256_loadu_si256(from);
      low[n] = _mm256_min_epu8(low[n], now);
      high[n] = _mm256_max_epu8(high[n], now);
    }
  }
  std::memcpy(least, low, kLanes);
  std::memcpy(most, high, kLanes);
#endif
  for (; j < samples; ++j) {
    least[j % kLanes] = std::min(least[j % kLanes], pixels[j]);
    most[j % kLanes] = std::max(most[j % kLanes], pixels[j]);
  }
  for (int64_t c = 0; c < 3; ++c) {
    double low = 255, high = 0;
    for (int64_t k = c; k < kLanes; k += 3) {
      low = std::min<double>(low, least[k]);
      high = std::max<double>(high, most[k]);
    }
    const double scale = high > low ? 255.0 / (high - low) : 1.0;
    const double offset = high > low ? -low * scale : 0.0;
    for (int v = 0; v < 256; ++v) {
      levels[c][v] = static_cast<uint8_t>(std::clamp(v * scale + offset, 0.0, 255.0));
    }
  }
}

// Spreads each channel's histogram evenly.
inline void find_equalize(const uint8_t* pixels, int64_t samples, Levels& levels) {
  // Two counts for each level, because like pixels lie beside each other.
  int32_t counts[2][3][256] = {};
  for (int64_t j = 0; j < samples; j += 3) {
    for (int64_t c = 0; c < 3; ++c) ++counts[j & 1][c][pixels[j + c]];
  }
  for (int64_t c = 0; c < 3; ++c) {
    int32_t below[256], sum = 0, highest = 0;
    for (int v = 0; v < 256; ++v) {
      const int32_t count = counts[0][c][v] + counts[1][c][v];
      below[v] = sum;
      sum += count;
      if (count > 0) highest = v;
    }
    const int32_t step = below[highest] / 255;
    for (int v = 0; v < 256; ++v) {
      const int32_t level = step > 0 ? (below[v] + step / 2) / step : v;
      levels[c][v] = static_cast<uint8_t>(std::min(level, 255));
    }
  }
}

// Shows at (x, y) what lies at (a x + b y + c, d x + e y + f), or the fill colour, which goes
// behind the pixels as one more. `places` is a row of scratch.
inline void affine(uint8_t* __restrict from, int32_t height, int32_t width,
                   const double* coefficients, const uint8_t* fill, int32_t* __restrict places,
                   uint8_t* __restrict to) {
  // Pillow walks through the source in 16.16 fixed point; sums wrap around as torch's do.
  const auto fixed = [](double value) {
    return static_cast<uint32_t>(static_cast<int32_t>(std::floor(value * 65536.0 + 0.5)));
  };
  const double *m = coefficients, *n = coefficients + 3;
  const uint32_t right_x = fixed(m[0]), right_y = fixed(n[0]);
  const uint32_t down_x = fixed(m[1]), down_y = fixed(n[1]);
  const uint32_t first_x = fixed(m[2] + m[0] * 0.5 + m[1] * 0.5);
  const uint32_t first_y = fixed(n[2] + n[0] * 0.5 + n[1] * 0.5);
  const int32_t outside = height * width;
  std::memcpy(from + int64_t{3} * outside, fill, 3);
  for (int32_t y = 0; y < height; ++y) {
    const uint32_t line_x = first_x + static_cast<uint32_t>(y) * down_x;
    const uint32_t line_y = first_y + static_cast<uint32_t>(y) * down_y;
    for (int32_t x = 0; x < width; ++x) {
      const int32_t i = static_cast<int32_t>(line_y + static_cast<uint32_t>(x) * right_y) >> 16;
      const int32_t j = static_cast<int32_t>(line_x + static_cast<uint32_t>(x) * right_x) >> 16;
      const bool inside = (i >= 0) & (i < height) & (j >= 0) & (j < width);
      places[x] = inside ? i * width + j : outside;
    }
    // Four bytes are faster than three; the fourth is the next pixel's or padding.
    for (int32_t x = 0; x < width; ++x, to += 3) {
      std::memcpy(to, from + int64_t{3} * places[x], 4);
    }
  }
}

// Each pixel of row `from` smoothed over its neighbours, but for the first and last; `from` is not
// the image's first or last row. `sums` is a row of scratch.
inline void smooth_row(const uint8_t* __restrict from, int64_t row, uint16_t* __restrict sums,
                       uint8_t* __restrict out) {
  for (int64_t j = 0; j < row; ++j) {
    sums[j] = static_cast<uint16_t>(from[j - row] + from[j] + from[j + row]);
  }
  for (int64_t j = 3; j < row - 3; ++j) {
    const auto sum = static_cast<uint16_t>(sums[j - 3] + sums[j] + sums[j + 3] + 4 * from[j]);
    // sum / 13, rounded to the nearest.
    out[j] = static_cast<uint8_t>(static_cast<uint16_t>(2 * sum + 13) / 26);
  }
}

}  // namespace fastcil
