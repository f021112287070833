// The last step of a batch: from levels 0 .. 255 to what the network takes.
//
// A level is dimmed by a factor, then becomes level * scale + shift in one fused multiply-add, as
// fastcil/ops/read_batch.py does it; where bytes are wanted it stays as it is.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define FASTCIL_AVX2
#include <immintrin.h>
#endif

namespace fastcil {

constexpr int64_t kBlock = 24;  // samples of 8 pixels: three vectors of 8

struct Finish {
  float factor = 1;
  alignas(32) float scale[kBlock] = {}, shift[kBlock] = {};  // for R G B R G B ...

  Finish() = default;
  Finish(const double* mean, const double* std) {
    for (int64_t j = 0; j < kBlock; ++j) {
      scale[j] = static_cast<float>(1 / (255 * std[j % 3]));
      shift[j] = static_cast<float>(-mean[j % 3] / std[j % 3]);
    }
  }

  bool dims() const { return factor != 1; }

  uint8_t dim(uint8_t level) const {
    return static_cast<uint8_t>(static_cast<int32_t>(std::min(level * factor, 255.0f)));
  }

  template <typename T>
  T of(uint8_t level, int64_t channel) const {
    if constexpr (std::is_same_v<T, uint8_t>) {
      return level;
    } else {
      return static_cast<T>(std::fma(static_cast<float>(level), scale[channel], shift[channel]));
    }
  }
};

#ifdef FASTCIL_AVX2
inline void store8(float* out, __m256 values) { _mm256_storeu_ps(out, values); }

inline void store8(c10::Half* out, __m256 values) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                   _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
}

inline void store8(c10::BFloat16* out, __m256 values) {
  const __m256i bits = _mm256_castps_si256(values);
  // To nearest, ties to even.
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i high = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
  const __m256i packed = _mm256_packus_epi32(high, high);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                   _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}

// Eight levels, those of a block from its sample 8 * part on.
template <bool kDim, typename T>
inline void finish8(const Finish& finish, __m256i levels, int part, T* out) {
  __m256 values = _mm256_cvtepi32_ps(levels);
  if constexpr (kDim) {
    values = _mm256_mul_ps(values, _mm256_set1_ps(finish.factor));
    values = _mm256_cvtepi32_ps(
        _mm256_cvttps_epi32(_mm256_min_ps(values, _mm256_set1_ps(255.0f))));
  }
  store8(out + 8 * part, _mm256_fmadd_ps(values, _mm256_load_ps(finish.scale + 8 * part),
                                         _mm256_load_ps(finish.shift + 8 * part)));
}
#endif

// Whole pixels of bytes.
template <typename T>
void finish_bytes(const Finish& finish, const uint8_t* bytes, int64_t samples, T* out) {
  int64_t j = 0;
#ifdef FASTCIL_AVX2
  if constexpr (!std::is_same_v<T, uint8_t>) {
    const auto run = [&](auto dims) {
      for (; j + kBlock <= samples; j += kBlock) {
        for (int part = 0; part < 3; ++part) {
          const auto* from = reinterpret_cast<const __m128i*>(bytes + j + 8 * part);
          finish8<dims>(finish, _mm256_cvtepu8_epi32(_mm_loadl_epi64(from)), part, out + j);
        }
      }
    };
    finish.dims() ? run(std::true_type{}) : run(std::false_type{});
  }
#endif
  for (; j < samples; ++j) out[j] = finish.of<T>(finish.dim(bytes[j]), j % 3);
}

}  // namespace fastcil
