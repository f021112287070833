// Where the pixels of a packed image lie, as in fastcil/ops/_packed.py, and rows taken out of it.
//
// geometry is (H, W, y0, x0, y1, x1, gh, gw): the box kept at full resolution and the size of the
// nearest-neighbour background grid, (0, 0) for a raw image. The bytes are the box, row after row,
// then the grid's cells without those wholly under the box.
#pragma once

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <vector>

#ifdef __SSSE3__
#include <tmmintrin.h>
#endif

namespace fastcil {

// Where some columns of an image find their background within a row of the grid.
struct Cells {
  static constexpr int64_t kGroup = 5;  // pixels that fit a vector of 16 bytes

  std::vector<int32_t> bytes;      // first byte of the cell that each column shows
  std::vector<uint8_t> shuffles;   // 16 bytes from a group's first cell on, to its pixels
  bool narrow;                     // whether 16 bytes reach the last cell of every group

  void find_shuffles() {
    const int64_t groups = bytes.size() / kGroup;
    shuffles.resize(16 * groups);
    narrow = true;
    for (int64_t i = 0; i < kGroup * groups; ++i) {
      const int32_t byte = bytes[i] - bytes[i / kGroup * kGroup];
      narrow = narrow && byte + 3 <= 16;
      uint8_t* shuffle = shuffles.data() + i / kGroup * 16 + i % kGroup * 3;
      for (int c = 0; c < 3; ++c) shuffle[c] = static_cast<uint8_t>(byte + c);
    }
  }

  // Columns from..to, out of a grid row that lies before `end`.
  void spread(const uint8_t* row, const uint8_t* end, int64_t from, int64_t to,
              uint8_t* out) const {
    const auto copy = [&](int64_t x) { std::memcpy(out + 3 * x, row + bytes[x], 3); };
    int64_t x = from;
#ifdef __SSSE3__
    if (narrow) {
      for (; x < to && x % kGroup; ++x) copy(x);
      // The 16th byte falls into the next pixel, which comes after.
      for (; x + kGroup < to && end - (row + bytes[x]) >= 16; x += kGroup) {
        const auto load = [](const uint8_t* from) {
          return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        };
        const __m128i shuffle = load(shuffles.data() + x / kGroup * 16);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 3 * x),
                         _mm_shuffle_epi8(load(row + bytes[x]), shuffle));
      }
    }
#endif
    for (; x < to; ++x) copy(x);
  }
};

// floor(i * part / whole) for one i after the other; part <= whole.
class Share {
 public:
  Share(int64_t first, int64_t part, int64_t whole)
      : part_(part), whole_(whole), quotient_(first * part / whole),
        remainder_(first * part % whole) {}

  int32_t next() {
    const auto now = static_cast<int32_t>(quotient_);
    remainder_ += part_;
    if (remainder_ >= whole_) {
      remainder_ -= whole_;
      ++quotient_;
    }
    return now;
  }

 private:
  int64_t part_, whole_, quotient_, remainder_;
};

struct PackedImage {
  const uint8_t* bytes;
  const uint8_t* end;              // of the buffer that it is in
  int64_t height, width;
  int64_t y0, x0, y1, x1;          // all 0 where the box is empty
  int64_t grid_height, grid_width;
  int64_t under_begin, under_end;  // grid rows shown by rows that all cross the box
  int64_t hole_row, hole_rows, hole_columns;  // cells left out
  bool simulated;                  // a view: cells are pixels of the raw image itself

  bool raw() const { return grid_height == 0; }
  bool crosses_box(int64_t y) const { return y >= y0 && y < y1; }
  // In 32 bits, which is faster; sides are 15.
  int64_t cell_row(int64_t y) const {
    return static_cast<uint32_t>(y * grid_height) / static_cast<uint32_t>(height);
  }

  // Bytes from a row of the box to the next.
  int64_t box_stride() const { return 3 * (simulated ? width : x1 - x0); }

  // Byte of pixel (y, x), which lies in the box.
  const uint8_t* in_box(int64_t y, int64_t x) const {
    const int64_t pixel = simulated ? y * width + x : (y - y0) * (x1 - x0) + (x - x0);
    return bytes + 3 * pixel;
  }

  // Row r of the grid. Right of the box it begins `right_shift` bytes earlier.
  const uint8_t* grid_row(int64_t r, int64_t* right_shift) const {
    *right_shift = 0;
    if (simulated) return bytes + 3 * (r * height / grid_height * width);
    const int64_t below = r - hole_row;
    if (below >= 0 && below < hole_rows) *right_shift = 3 * hole_columns;
    const int64_t left_out = std::clamp<int64_t>(below, 0, hole_rows) * hole_columns;
    return bytes + 3 * ((y1 - y0) * (x1 - x0) + r * grid_width - left_out);
  }

  // cell_row of rows from..to.
  void find_cell_rows(int64_t from, int64_t to, int32_t* out) const {
    Share share(from, grid_height, height);
    for (int64_t y = from; y < to; ++y) out[y - from] = share.next();
  }

  void find_cells(int64_t from, int64_t to, Cells& cells) const {
    cells.bytes.resize(to - from);
    Share share(from, grid_width, width);
    int64_t cell = -1, pixel = 0;
    for (int64_t x = from; x < to; ++x) {
      const int64_t c = share.next();
      if (c != cell) pixel = simulated ? c * width / grid_width : c;
      cell = c;
      cells.bytes[x - from] = static_cast<int32_t>(3 * pixel);
    }
    cells.find_shuffles();
  }

  // What grid row r shows in a crop's columns: those left and right of the box's, and where rows
  // that show it do not cross the box, those between as well.
  void background_row(int64_t r, const Cells& cells, int64_t left, int64_t right, int64_t columns,
                      uint8_t* out) const {
    int64_t shift;
    const uint8_t* row = grid_row(r, &shift);
    const bool under = r >= under_begin && r < under_end;
    cells.spread(row, end, 0, under ? left : right, out);
    cells.spread(row - shift, end, right, columns, out);
  }

  // Columns from..to of row y. `above` is what this wrote for row y - 1, or null.
  void row(int64_t y, int64_t from, int64_t to, const Cells& cells, const uint8_t* above,
           uint8_t* out) const {
    const bool crosses = crosses_box(y);
    const int64_t left = crosses ? std::clamp(x0, from, to) : to;
    const int64_t right = crosses ? std::clamp(x1, from, to) : to;
    if (above && cell_row(y - 1) == cell_row(y) && (crosses || !crosses_box(y - 1))) {
      std::memcpy(out, above, 3 * (left - from));
      std::memcpy(out + 3 * (right - from), above + 3 * (right - from), 3 * (to - right));
    } else if (left > from || right < to) {
      int64_t shift;
      const uint8_t* row = grid_row(cell_row(y), &shift);
      cells.spread(row, end, 0, left - from, out);
      cells.spread(row - shift, end, right - from, to - from, out);
    }
    if (right > left) std::memcpy(out + 3 * (left - from), in_box(y, left), 3 * (right - left));
  }

  int64_t nbytes() const {
    return 3 * ((y1 - y0) * (x1 - x0) + grid_height * grid_width - hole_rows * hole_columns);
  }
};

namespace detail {

// Whether a box, be it empty, keeps to the image.
inline bool inside(const int16_t* box, int64_t height, int64_t width) {
  return box[0] >= 0 && box[0] <= height && box[2] >= 0 && box[2] <= height &&
         box[1] >= 0 && box[1] <= width && box[3] >= 0 && box[3] <= width;
}

// A box and a grid (gh, gw), one after the other, and the cells wholly under the box.
inline void set_box(PackedImage& image, const int16_t* box) {
  image.grid_height = box[4];
  image.grid_width = box[5];
  if (box[2] <= box[0] || box[3] <= box[1]) return;
  std::tie(image.y0, image.x0, image.y1, image.x1) =
      std::make_tuple(box[0], box[1], box[2], box[3]);
  const auto first = [](int64_t begin, int64_t side, int64_t cells) {
    return begin == 0 ? 0 : (begin - 1) * cells / side + 1;
  };
  image.under_begin = first(image.y0, image.height, image.grid_height);
  image.under_end = image.y1 * image.grid_height / image.height;
  image.hole_row = image.under_begin;
  image.hole_rows = image.under_end - image.under_begin;
  image.hole_columns = image.x1 * image.grid_width / image.width -
                       first(image.x0, image.width, image.grid_width);
  if (image.simulated || image.hole_rows <= 0 || image.hole_columns <= 0) {
    image.hole_rows = image.hole_columns = 0;
  }
}

}  // namespace detail

// Image i at `offset` in a buffer of `room` bytes; `geometry` and `view` (or null) are its rows.
inline PackedImage open_image(int64_t i, const uint8_t* pixels, int64_t room, int64_t offset,
                              const int16_t* geometry, const int16_t* view) {
  const int16_t* g = geometry;
  PackedImage image{};
  image.height = g[0];
  image.width = g[1];
  const bool raw = g[6] == 0 && g[7] == 0;
  const auto grid_fits = [&](int16_t rows, int16_t columns) {
    return rows > 0 && rows <= g[0] && columns > 0 && columns <= g[1];
  };
  const bool sound = g[0] > 0 && g[1] > 0 && detail::inside(g + 2, g[0], g[1]) &&
                     (raw ? g[2] == 0 && g[3] == 0 && g[4] == g[0] && g[5] == g[1]
                          : grid_fits(g[6], g[7]));
  TORCH_CHECK_VALUE(sound, "geometry[", i, "] is [", g[0], ", ", g[1], ", ", g[2], ", ", g[3],
                    ", ", g[4], ", ", g[5], ", ", g[6], ", ", g[7],
                    "], not (H, W, y0, x0, y1, x1, gh, gw) of an image");
  detail::set_box(image, g + 2);
  TORCH_CHECK_VALUE(offset >= 0 && offset <= room - image.nbytes(), "offsets[", i, "] is ", offset,
                    ", not an offset inside the pixels");
  image.bytes = pixels + offset;
  image.end = pixels + room;
  if (view && view[4] > 0) {
    TORCH_CHECK_VALUE(
        raw && detail::inside(view, g[0], g[1]) && grid_fits(view[4], view[5]), "views[", i,
        "] is [", view[0], ", ", view[1], ", ", view[2], ", ", view[3], ", ", view[4], ", ",
        view[5], "], not a view that fits its raw image");
    image.y0 = image.x0 = image.y1 = image.x1 = 0;
    image.simulated = true;
    detail::set_box(image, view);
  }
  return image;
}

}  // namespace fastcil
