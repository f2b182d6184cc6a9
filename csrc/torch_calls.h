// Calls of PyTorch that allocate tensors. The stable ABI reports a failure without its message, so that an exhausted
// memory would read "API call failed"; these calls give PyTorch's message.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <stdexcept>
#include <string>

// The message of the last failure on this thread. Weak: PyTorch has this function since 2.13.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace gistops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class Range>
std::string shape_text(const Range& sizes) {
  std::string text;
  for (const int64_t n : sizes) text += (text.empty() ? "" : ", ") + std::to_string(n);
  return "[" + text + "]";
}

// Returns the result of call(). Its failure raises an error that says what was tried, and why it failed.
template <class Call>
auto explained(const std::string& tried, Call call) {
  try {
    return call();
  } catch (const std::exception&) {
    const char* why =
        torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace() : nullptr;
    throw std::runtime_error("gistops: " + tried + " failed, " +
                             (why && *why ? std::string(why) : "most likely because the memory is exhausted"));
  }
}

// An uninitialized tensor on the device of x.
inline Tensor empty_on_device_of(const Tensor& x, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  return explained("allocating " + shape_text(sizes) + " " + torch::headeronly::toString(dtype),
                   [&] { return torch::stable::new_empty(x, sizes, dtype); });
}

// x as this type in contiguous memory; x itself if there is nothing to convert.
inline Tensor converted(const Tensor& x, ScalarType dtype) {
  if (x.scalar_type() == dtype && x.is_contiguous()) return x;
  return explained("converting " + shape_text(x.sizes()) + " to " + torch::headeronly::toString(dtype), [&] {
    const Tensor y = x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
    return y.is_contiguous() ? y : torch::stable::contiguous(y);
  });
}

}  // namespace gistops
