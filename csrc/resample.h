// Resizing by triangle filters in integers, bit for bit what fastcil/ops/read.py does.
//
// Rows are blended first, because their bytes lie one after the other, and then columns. The AVX2
// code and the plain loops beside it do the same arithmetic.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "finish.h"

namespace fastcil {

constexpr int kWeightBits = 14;  // a weight of one still fits int16
constexpr int kLineBits = 7;     // so does 255 with these bits behind the point
constexpr int kLineShift = kWeightBits - kLineBits;
constexpr int kPixelShift = kWeightBits + kLineBits;
constexpr int kGroup = 8;        // pixels blended together along a row

// For each output along one axis: `taps` weights, an even number, from source pixel `first` on.
struct Axis {
  int64_t low, high;  // the source pixels that crop and image share
  int64_t taps;
  std::vector<int64_t> first;
  std::vector<int16_t> weights;

  void fit(double begin, double end, int64_t side, int64_t size, bool antialias, bool flip);

 private:
  std::vector<double> centre_, start_, total_, share_;
  std::vector<int32_t> rounded_;
};

// `size` outputs, mirrored or not, of a crop from `begin` to `end` of an image with this side.
inline void Axis::fit(double begin, double end, int64_t side, int64_t size, bool antialias,
                      bool flip) {
  const double width = antialias ? std::max((end - begin) / size, 1.0) : 1.0;
  const double covered_low = std::floor(begin), covered_high = std::ceil(end);
  const auto count = static_cast<int64_t>(std::ceil(2 * width));
  low = std::clamp<int64_t>(covered_low, 0, side);
  high = std::clamp<int64_t>(covered_high, low, side);
  taps = (count + 1) / 2 * 2;
  centre_.resize(size);
  start_.resize(size);
  share_.resize(size);
  total_.resize(size * count);
  rounded_.resize(size * count);
  for (int64_t i = 0; i < size; ++i) {
    centre_[i] = (i + 0.5) * (end - begin) / size + begin;
    start_[i] = std::floor(centre_[i] - width + 0.5);
  }
  // total_[k] holds the sums of each output's first k + 1 weights: vectorised over the outputs.
  for (int64_t k = 0; k < count; ++k) {
    double* total = total_.data() + k * size;
    const double* before = k > 0 ? total - size : nullptr;
    for (int64_t i = 0; i < size; ++i) {
      const double x = start_[i] + k;
      const double weight = std::max(1 - std::abs(x + 0.5 - centre_[i]) / width, 0.0);
      const bool covered = x >= covered_low && x < covered_high;
      total[i] = (before ? before[i] : 0.0) + (covered ? weight : 0.0);
    }
  }
  const double* whole = total_.data() + (count - 1) * size;
  for (int64_t i = 0; i < size; ++i) share_[i] = (1 << kWeightBits) / whole[i];
  for (int64_t k = 0; k < count; ++k) {
    for (int64_t i = 0; i < size; ++i) {
      rounded_[k * size + i] = static_cast<int32_t>(std::rint(total_[k * size + i] * share_[i]));
    }
  }
  // Whole groups of outputs, the last ones without weight.
  const int64_t padded = (size + kGroup - 1) / kGroup * kGroup;
  first.assign(padded, low);
  weights.assign(padded * taps, 0);
  for (int64_t i = 0; i < size; ++i) {
    const int64_t out = flip ? size - 1 - i : i;
    const auto start = static_cast<int64_t>(start_[i]);
    first[out] = std::clamp(start, low, std::max(low, high - 1));
    const int64_t begin = first[out] - start, end = std::min(count, high - start);
    int16_t* weight = weights.data() + out * taps - begin;
    int32_t before = begin > 0 ? rounded_[(std::min(begin, count) - 1) * size + i] : 0;
    for (int64_t k = std::max<int64_t>(begin, 0); k < end; ++k) {
      const int32_t sum = rounded_[k * size + i];
      weight[k] = static_cast<int16_t>(sum - before);
      before = sum;
    }
  }
}

// The rows that one output row is made of; sample j of a row is its byte j.
struct Rows {
  std::vector<const uint8_t*> bytes;
  std::vector<int16_t> weights;

  void clear() {
    bytes.clear();
    weights.clear();
  }
  void add(const uint8_t* row, int16_t weight) {
    if (!bytes.empty() && bytes.back() == row) {
      weights.back() += weight;
    } else {
      bytes.push_back(row);
      weights.push_back(weight);
    }
  }
};

#ifdef FASTCIL_AVX2
// 32 samples from the j-th on; the rows come in pairs.
inline void blend_block(const uint8_t* const* rows, const int16_t* weights, size_t taps, int64_t j,
                        int16_t* line) {
  const __m256i zero = _mm256_setzero_si256();
  const __m256i half = _mm256_set1_epi32(1 << (kLineShift - 1));
  __m256i sum[4] = {half, half, half, half};
  for (size_t k = 0; k < taps; k += 2) {
    const auto load = [j](const uint8_t* row) {
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + j));
    };
    const __m256i a = load(rows[k]), b = load(rows[k + 1]);
    int32_t pair;
    std::memcpy(&pair, weights + k, sizeof(pair));
    const __m256i weight = _mm256_set1_epi32(pair);
    const __m256i low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
    const __m256i samples[4] = {
        _mm256_unpacklo_epi8(low, zero), _mm256_unpackhi_epi8(low, zero),
        _mm256_unpacklo_epi8(high, zero), _mm256_unpackhi_epi8(high, zero)};
    for (int n = 0; n < 4; ++n) {
      sum[n] = _mm256_add_epi32(sum[n], _mm256_madd_epi16(samples[n], weight));
    }
  }
  for (auto& total : sum) total = _mm256_srai_epi32(total, kLineShift);
  const __m256i even = _mm256_packs_epi32(sum[0], sum[1]);
  const __m256i odd = _mm256_packs_epi32(sum[2], sum[3]);
  auto* out = reinterpret_cast<__m256i*>(line + j);
  _mm256_storeu_si256(out, _mm256_permute2x128_si256(even, odd, 0x20));
  _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(even, odd, 0x31));
}

inline __m256i widen(const uint8_t* samples) {
  const auto* from = reinterpret_cast<const __m128i*>(samples);
  return _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(from)), kLineBits);
}

// 32 samples of two rows a, b whose weights make 1: a + (b - a) w, in 16 bits and yet exact.
inline void mix_block(const uint8_t* a, const uint8_t* b, __m256i twice_weight, int16_t* line) {
  for (int half = 0; half < 32; half += 16) {
    const __m256i from = widen(a + half), to = widen(b + half);
    // mulhrs rounds (b - a) 2^7 * 2 w at 2^15: the bits that it drops are those of (b - a) w.
    const __m256i step = _mm256_mulhrs_epi16(_mm256_sub_epi16(to, from), twice_weight);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(line + half), _mm256_add_epi16(from, step));
  }
}

inline void copy_block(const uint8_t* row, int16_t* line) {
  for (int half = 0; half < 32; half += 16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(line + half), widen(row + half));
  }
}

// Calls block(j) for blocks of 32 from `begin` on; the last one passes `end` if it may, or else
// overlaps the one before.
template <typename Block>
inline void for_blocks(int64_t begin, int64_t end, bool may_pass, Block block) {
  const int64_t last = may_pass ? end : end - 32;
  for (int64_t j = begin; j < end; j += 32) block(std::min(j, last));
}
#endif

// Samples begin .. end of the rows, to those of the line. `padded`: 32 more may be read and
// written.
inline void blend_rows(Rows& rows, int64_t begin, int64_t end, bool padded, int16_t* line) {
#ifdef FASTCIL_AVX2
  const auto* bytes = rows.bytes.data();
  const auto* weights = rows.weights.data();
  size_t taps = rows.bytes.size();
  if (taps > 0 && (padded || end - begin >= 32)) {
    if (taps == 1 && weights[0] == 1 << kWeightBits) {
      const uint8_t* a = bytes[0];
      return for_blocks(begin, end, padded, [=](int64_t j) { copy_block(a + j, line + j); });
    }
    if (taps == 2 && weights[0] + weights[1] == 1 << kWeightBits) {
      const uint8_t *a = bytes[0], *b = bytes[1];
      const __m256i weight = _mm256_set1_epi16(static_cast<int16_t>(2 * weights[1]));
      return for_blocks(begin, end, padded,
                        [=](int64_t j) { mix_block(a + j, b + j, weight, line + j); });
    }
    if (taps % 2) {
      rows.bytes.push_back(rows.bytes.back());
      rows.weights.push_back(0);
      bytes = rows.bytes.data();
      weights = rows.weights.data();
      ++taps;
    }
    return for_blocks(begin, end, padded,
                      [=](int64_t j) { blend_block(bytes, weights, taps, j, line); });
  }
#endif
  for (int64_t j = begin; j < end; ++j) {
    int32_t sum = 1 << (kLineShift - 1);
    for (size_t k = 0; k < rows.bytes.size(); ++k) sum += rows.weights[k] * rows.bytes[k][j];
    line[j] = static_cast<int16_t>(sum >> kLineShift);
  }
}

// What blend_columns reads: for each output pixel where its first tap's sample lies in the line,
// and the weights, copied into the lanes where they are wanted.
struct Columns {
  std::vector<int32_t> samples;
  std::vector<int16_t> weights;

  void set(const Axis& axis) {
    const int64_t size = axis.first.size();
    samples.resize(size);
    for (int64_t i = 0; i < size; ++i) {
      samples[i] = static_cast<int32_t>(3 * (axis.first[i] - axis.low));
    }
#ifdef FASTCIL_AVX2
    const int64_t taps = axis.taps;
    weights.resize(4 * size * taps);
    int16_t* out = weights.data();
    for (int64_t i = 0; i < size; i += kGroup) {
      for (int64_t k = 0; k < taps; k += 2) {
        for (int64_t n = 0; n < kGroup; ++n, out += 8) {
          int32_t pair;
          std::memcpy(&pair, axis.weights.data() + (i + kLane[n]) * taps + k, sizeof(pair));
          _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_set1_epi32(pair));
        }
      }
    }
#else
    weights = axis.weights;
#endif
  }

  static constexpr int kLane[kGroup] = {0, 4, 1, 5, 2, 6, 3, 7};
};

#ifdef FASTCIL_AVX2
// Eight output pixels. Sum n is of pixels n and n + 4, its colours turned so that three blends make
// R G B R .. of four sums.
template <typename T, bool kDim>
[[gnu::always_inline]] inline void blend_group(const int16_t* line, const int32_t* samples,
                                               const int16_t* weights, int64_t taps,
                                               const Finish& finish, T* out) {
  const auto order = [](int a, int b, int c, int d) {
    // R0 G0 B0 R1 G1 B1 in 16 bits, to pairs R0 R1, G0 G1, B0 B1 and nothing in this order
    constexpr uint32_t kPairs[4] = {0x07060100, 0x09080302, 0x0b0a0504, 0xffffffff};
    return _mm256_broadcastsi128_si256(
        _mm_setr_epi32(kPairs[a], kPairs[b], kPairs[c], kPairs[d]));
  };
  const __m256i turned[4] = {order(0, 1, 2, 3), order(1, 2, 3, 0), order(2, 3, 0, 1),
                             order(3, 0, 1, 2)};
  const __m256i half = _mm256_set1_epi32(1 << (kPixelShift - 1));
  __m256i sum[4] = {half, half, half, half};
  for (int64_t k = 0; k < taps; k += 2, weights += 8 * kGroup) {
    for (int n = 0; n < 4; ++n) {
      const auto load = [&](int pixel) {
        const int16_t* from = line + samples[pixel] + 3 * k;
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
      };
      const __m256i pixels = _mm256_set_m128i(load(n + 4), load(n));
      const __m256i weight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights + 16 * n));
      sum[n] = _mm256_add_epi32(
          sum[n], _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, turned[n]), weight));
    }
  }
  const __m256i a = _mm256_srai_epi32(_mm256_blend_epi32(sum[0], sum[1], 0x88), kPixelShift);
  const __m256i b = _mm256_srai_epi32(_mm256_blend_epi32(sum[1], sum[2], 0xcc), kPixelShift);
  const __m256i c = _mm256_srai_epi32(_mm256_blend_epi32(sum[2], sum[3], 0xee), kPixelShift);
  if constexpr (std::is_same_v<T, uint8_t>) {
    const __m256i bytes =
        _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, c));
    const __m256i whole =
        _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 1, 2, 4, 5, 6, 6, 6));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(whole));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out + 16), _mm256_extracti128_si256(whole, 1));
  } else {
    finish8<kDim>(finish, _mm256_permute2x128_si256(a, b, 0x20), 0, out);
    finish8<kDim>(finish, _mm256_permute2x128_si256(c, a, 0x30), 1, out);
    finish8<kDim>(finish, _mm256_permute2x128_si256(b, c, 0x31), 2, out);
  }
}
#endif

// One row of output pixels. Bytes are not dimmed.
template <typename T, bool kDim, int kTaps>  // kTaps 0: as many as there are
void blend_columns(const int16_t* line, const Columns& columns, int64_t taps, int64_t width,
                   const Finish& finish, T* out) {
  if (kTaps) taps = kTaps;
  const int32_t* samples = columns.samples.data();
  const int16_t* weights = columns.weights.data();
#ifdef FASTCIL_AVX2
  T rest[kBlock];
  for (int64_t i = 0; i < width; i += kGroup) {
    T* to = i + kGroup <= width ? out + 3 * i : rest;
    blend_group<T, kDim>(line, samples + i, weights, taps, finish, to);
    weights += 4 * kGroup * taps;
  }
  const int64_t left = width % kGroup;
  std::memcpy(out + 3 * (width - left), rest, 3 * left * sizeof(T));
#else
  for (int64_t i = 0; i < width; ++i, weights += taps) {
    for (int c = 0; c < 3; ++c) {
      int32_t sum = 1 << (kPixelShift - 1);
      for (int64_t k = 0; k < taps; ++k) sum += weights[k] * line[samples[i] + 3 * k + c];
      const auto level = static_cast<uint8_t>(sum >> kPixelShift);
      out[3 * i + c] = finish.of<T>(kDim ? finish.dim(level) : level, c);
    }
  }
#endif
}

}  // namespace fastcil
