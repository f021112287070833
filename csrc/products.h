// Sums of products of two panels of kTile channels over samples, kept tile by tile.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fourier.h"
#include "vec.h"

namespace fastcil {

template <typename T>
class Products {
  using Vec = at::vec::Vectorized<T>;
  static constexpr int kVectors = kTile / Vec::size();           // of a row
  static constexpr int kRows = kVectors >= 4 ? 2 : 8 / kVectors;  // what the registers hold

 public:
  // tile = decay tile + sum over samples of a bᵀ; a and b are [samples][kTile].
  static void real(T* tile, int64_t stride, const T* a, const T* b, int64_t samples, T decay) {
    for (int64_t row = 0; row < kTile; row += kRows) {
      Vec sums[kRows][kVectors];
      load(sums, tile + row * stride, stride, decay);
      for (int64_t n = 0; n < samples; ++n) {
        step(sums, a + n * kTile + row, b + n * kTile, T(1));
      }
      store(sums, tile + row * stride, stride);
    }
  }

  // The imaginary part of conj(a) bᵀ; a and b are [samples][real, imaginary][kTile].
  static void imaginary(T* tile, int64_t stride, const T* a, const T* b, int64_t samples, T decay) {
    for (int64_t row = 0; row < kTile; row += kRows) {
      Vec sums[kRows][kVectors];
      load(sums, tile + row * stride, stride, decay);
      for (int64_t n = 0; n < samples; ++n) {
        const T *an = a + 2 * n * kTile + row, *bn = b + 2 * n * kTile;
        step(sums, an, bn + kTile, T(1));
        step(sums, an + kTile, bn, T(-1));
      }
      store(sums, tile + row * stride, stride);
    }
  }

 private:
  static C10_ALWAYS_INLINE void step(Vec (&sums)[kRows][kVectors], const T* a, const T* b, T sign) {
    Vec right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = Vec::loadu(b + v * Vec::size());
    for (int r = 0; r < kRows; ++r) {
      const Vec left(sign * a[r]);
      for (int v = 0; v < kVectors; ++v) sums[r][v] = at::vec::fmadd(left, right[v], sums[r][v]);
    }
  }

  static C10_ALWAYS_INLINE void load(Vec (&sums)[kRows][kVectors], const T* tile, int64_t stride,
                                     T decay) {
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] = Vec::loadu(tile + r * stride + v * Vec::size()) * Vec(decay);
      }
    }
  }

  static C10_ALWAYS_INLINE void store(const Vec (&sums)[kRows][kVectors], T* tile, int64_t stride) {
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v].store(tile + r * stride + v * Vec::size());
      }
    }
  }
};

}  // namespace fastcil
