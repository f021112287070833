// Memory for batches. One that is gone leaves its memory to the next: to be given fresh pages takes
// the kernel about as long as reading the images takes.
#pragma once

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

namespace fastcil {

class BatchMemory final : public c10::Allocator {
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
  static BatchMemory& instance() {
    static auto* memory = new BatchMemory;
    return *memory;
  }

 private:
  static constexpr size_t kKept = 2;  // while one batch is used, another is read

  struct Block {
    void* data;
    size_t room;
  };

  std::mutex mutex_;
  std::vector<Block*> kept_;  // the oldest first

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
    for (auto place = kept_.begin(); place != kept_.end(); ++place) {
      if ((*place)->room != room) continue;
      Block* block = *place;
      kept_.erase(place);
      return block;
    }
    return nullptr;
  }

  static void release(void* context) {
    auto& memory = instance();
    Block* old = nullptr;
    {
      const std::lock_guard<std::mutex> lock(memory.mutex_);
      memory.kept_.push_back(static_cast<Block*>(context));
      if (memory.kept_.size() > kKept) {
        old = memory.kept_.front();
        memory.kept_.erase(memory.kept_.begin());
      }
    }
    if (!old) return;
    std::free(old->data);
    delete old;
  }
};

// [batch, 3, height, width] in channels_last memory, as at::empty.
inline at::Tensor empty_batch(int64_t batch, int64_t height, int64_t width, at::ScalarType dtype) {
  const std::vector<int64_t> sizes = {batch, 3, height, width};
  const size_t nbytes = batch * 3 * height * width * c10::elementSize(dtype);
  // Where nothing may be left to chance, at::empty fills what it gives.
  if (nbytes < BatchMemory::kLeast || at::globalContext().deterministicAlgorithms()) {
    return at::empty(sizes, at::TensorOptions().dtype(dtype), at::MemoryFormat::ChannelsLast);
  }
  return at::detail::empty_generic(sizes, &BatchMemory::instance(),
                                   c10::DispatchKeySet(c10::DispatchKey::CPU), dtype,
                                   at::MemoryFormat::ChannelsLast);
}

}  // namespace fastcil
