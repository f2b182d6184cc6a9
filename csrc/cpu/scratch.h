// Scratch memory.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>

namespace gistops {

// Uninitialized memory, aligned to a cache line.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n) : size_(n), data_(allocate(n)) {}
  // Uses `borrowed` as its memory if that is not null.
  Scratch(int64_t n, T* borrowed) : size_(n), data_(borrowed ? borrowed : allocate(n), Free{!borrowed}) {}

  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }
  void zero() const { std::fill_n(get(), size_, T(0)); }
  void add(const Scratch& other) const {
    for (int64_t i = 0; i < size_; ++i) data_[i] += other.data_[i];
  }

 private:
  struct Free {
    bool owned = true;
    void operator()(T* p) const {
      if (owned) std::free(p);
    }
  };
  static T* allocate(int64_t n) {
    const int64_t bytes = std::max<int64_t>(n, 1) * static_cast<int64_t>(sizeof(T));
    void* memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!memory)
      throw std::runtime_error("gistops: out of memory: cannot allocate " + std::to_string(bytes) +
                               " bytes of scratch memory; a smaller batch needs less");
    return static_cast<T*>(memory);
  }
  int64_t size_;
  std::unique_ptr<T[], Free> data_;
};

}  // namespace gistops
