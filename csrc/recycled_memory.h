// Memory for large results. One that is gone leaves its memory to the next: malloc gives it back,
// and to be given fresh pages again takes the kernel about as long as the computation takes.
#pragma once

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <mutex>
#include <new>
#include <optional>
#include <vector>

namespace fastcil {

class RecycledMemory final : public c10::Allocator {
 public:
  static constexpr size_t kLargePage = size_t{1} << 21;
  static constexpr size_t kLeast = 2 * kLargePage;  // malloc keeps what is smaller itself

  c10::DataPtr allocate(size_t nbytes) override {
    const size_t room = (nbytes + kLargePage - 1) / kLargePage * kLargePage;
    auto* block = take(room);
    if (!block) block = make(room);
    return {block->data, block, &release, c10::Device(c10::kCPU)};
  }

  void copy_data(void* to, const void* from, size_t nbytes) const override {
    std::memcpy(to, from, nbytes);
  }

  // The one of the process; never destroyed, since tensors may outlive everything else.
  static RecycledMemory& instance() {
    static auto* memory = new RecycledMemory;
    return *memory;
  }

 private:
  static constexpr size_t kKept = size_t{256} << 20;  // bytes that nobody uses, at most

  struct Block {
    void* data;
    size_t room;
  };

  std::mutex mutex_;
  std::vector<Block*> kept_;  // the oldest first
  size_t kept_bytes_ = 0;

  static Block* make(size_t room) {
    void* data = nullptr;
    if (posix_memalign(&data, kLargePage, room)) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    madvise(data, room, MADV_HUGEPAGE);
#endif
    return new Block{data, room};
  }

  Block* take(size_t room) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto place = std::find_if(kept_.rbegin(), kept_.rend(),
                                    [&](const Block* block) { return block->room == room; });
    return place == kept_.rend() ? nullptr : remove(std::prev(place.base()));
  }

  Block* remove(std::vector<Block*>::iterator place) {
    Block* block = *place;
    kept_bytes_ -= block->room;
    kept_.erase(place);
    return block;
  }

  static void release(void* context) {
    std::vector<Block*> old;
    instance().keep(static_cast<Block*>(context), old);
    for (Block* block : old) {
      std::free(block->data);
      delete block;
    }
  }

  // Keeps a block, and hands out the oldest ones that this leaves no room for.
  void keep(Block* block, std::vector<Block*>& old) {
    const std::lock_guard<std::mutex> lock(mutex_);
    kept_.push_back(block);
    kept_bytes_ += block->room;
    while (kept_bytes_ > kKept) old.push_back(remove(kept_.begin()));
  }
};

// Whether a result of so many bytes takes recycled memory. Where nothing may be left to chance,
// at::empty fills what it gives.
inline bool recycles(size_t nbytes) {
  return nbytes >= RecycledMemory::kLeast && !at::globalContext().deterministicAlgorithms();
}

// As at::empty.
inline at::Tensor recycled_empty(at::IntArrayRef sizes, at::ScalarType dtype,
                                 std::optional<at::MemoryFormat> format = std::nullopt) {
  if (!recycles(c10::multiply_integers(sizes) * c10::elementSize(dtype))) {
    return at::empty(sizes, at::TensorOptions().dtype(dtype), format);
  }
  return at::detail::empty_generic(sizes, &RecycledMemory::instance(),
                                   c10::DispatchKeySet(c10::DispatchKey::CPU), dtype, format);
}

// As at::empty_like, of a dense tensor.
inline at::Tensor recycled_like(const at::Tensor& x) {
  if (!recycles(x.nbytes())) return at::empty_like(x);
  return at::detail::empty_strided_generic(x.sizes(), x.strides(), &RecycledMemory::instance(),
                                           c10::DispatchKeySet(c10::DispatchKey::CPU),
                                           x.scalar_type());
}

}  // namespace fastcil
