// The arguments of the ops, as pointers and sizes.
#pragma once
#include <algorithm>
#include <cstdint>

#include "isa/kernels.h"

namespace gistops {

inline int64_t element_size(Format format) { return format == Format::f64 ? 8 : format == Format::f32 ? 4 : 2; }

// The storage format of the type of computation T.
template <class T>
constexpr Format kFormat = sizeof(T) == 8 ? Format::f64 : Format::f32;

// A row-major matrix [rows, d] in its storage format.
struct StoredMatrix {
  const void* data;
  Format format;
  int64_t rows, d;

  int64_t element_size() const { return gistops::element_size(format); }
  const void* row(int64_t i, int64_t column = 0) const {
    return static_cast<const char*>(data) + (i * d + column) * element_size();
  }
  template <class T>
  bool is() const {
    return format == kFormat<T>;
  }

  // Rows [begin, begin + n) in the type of computation: in place, or converted into `scratch`.
  template <class T>
  const T* as(int64_t begin, int64_t n, T* scratch) const {
    if (is<T>()) return static_cast<const T*>(row(begin));
    kernels<T>().load(row(begin), format, n * d, scratch);
    return scratch;
  }
  template <class T>
  int64_t scratch_elements(int64_t n) const {
    return is<T>() ? 0 : n * d;
  }
};

// The number of vectors that are converted to the type of computation, then read again from L1.
inline int64_t group_size(int64_t d) { return std::clamp<int64_t>(8192 / d, 4, 16); }

// Where the forward stores logits and slots, [B, K] each. Slots are null if they are not needed.
struct StoredScores {
  void* logits;
  Format format;  // of the logits
  uint8_t* slots;
};

// The definition of a class's M slots:
//   translation: w_k and w_k + delta_j, with m = M - 1 displacements shared by all classes;
//   subcenter:   M vectors per class;
//   rotation:    w_k and w_k + a rank-2 term (rotation.h), of the same norm.
enum class Transform { translation, subcenter, rotation };

// Returns tau, of magnitude 1e-20 at least: the backward finds the cosine of a logit by division.
template <class T>
T nonzero_tau(T tau) {
  constexpr T kSmallest = static_cast<T>(1e-20);
  return tau > -kSmallest && tau < kSmallest ? (tau < 0 ? -kSmallest : kSmallest) : tau;
}

template <class T>
struct Problem {
  StoredMatrix input, centers;  // [B, d], [K * vectors_per_class(), d]
  const T* delta;               // [num_shared(), d]: the displacements, or the directions of a rotation
  Transform transform;
  int64_t B, K, d, m, M;  // m = 0 without translation
  T tau;
  const T* turns = nullptr;                // [3, M - 1] of a rotation
  const T* norms = nullptr;                // [M, K], the output of center_norms(), if known
  bool half = false;                       // P = f W' takes input and centers as stored (half_product.h)
  bool bf16_dots = false;                  // norms by dots_bf16(): centers and displacements are bfloat16
  const uint16_t* stored_delta = nullptr;  // [m, d], as stored

  // True if the products of the backward, too, are in half precision. With float16 they are in float32: small weights H
  // would underflow. Those of sub-centers multiply the winners alone, without a matrix product.
  bool half_backward() const { return half && input.format == Format::bf16 && !is_subcenter(); }
  bool is_subcenter() const { return transform == Transform::subcenter; }
  bool is_rotation() const { return transform == Transform::rotation; }
  int64_t vectors_per_class() const { return is_subcenter() ? M : 1; }
  int64_t num_shared() const { return is_rotation() ? M : m; }  // vectors that all classes share; slots M - this to M
};

}  // namespace gistops
